"""What transformers.Trainer offers stays as it is there: one test per feature, through our trainer."""

import json
import os

import pytest
import torch
from trainings import losses, make_args, make_trainer, same, trained
from transformers import EarlyStoppingCallback

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.promise("E20")
def test_save_total_limit_keeps_the_newest_and_the_best(tmp_path, family, even_cache):
    trainer = make_trainer(
        tmp_path, family, even_cache, eval_fraction=0.3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, save_total_limit=2, load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_global_step
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert best == min(evaluated, key=evaluated.get)
    kept = {p.name for p in list_checkpoints(tmp_path)}
    assert f"checkpoint-{best}" in kept and "checkpoint-6" in kept and len(kept) <= 2
    assert all(checkpoint_fault(tmp_path / name) is None for name in kept)


@pytest.mark.promise("E20")
def test_checkpoints_of_weights_alone_resume_with_a_warning(tmp_path, family, even_cache, caplog):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
    make_trainer(tmp_path, family, even_cache, **options).train()
    assert not list(tmp_path.glob("checkpoint-*/optimizer*")) and not list(tmp_path.glob("checkpoint-*/scheduler*"))
    trainer = make_trainer(tmp_path, family, even_cache, resume_from_checkpoint="checkpoint-2", **options)
    trainer.train()
    assert "checkpoint-2 holds weights alone (`--save_only_model`)" in caplog.text and trainer.state.global_step == 4


@pytest.mark.promise("E31")
def test_load_best_model_at_end_puts_the_best_weights_back(tmp_path, family, even_cache):
    trainer = make_trainer(
        tmp_path, family, even_cache, eval_fraction=0.3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.state.best_global_step < 6  # the loss falls, and here the largest counts as best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_early_stopping(tmp_path, family, even_cache):
    trainer = make_trainer(
        tmp_path, family, even_cache, eval_fraction=0.3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, learning_rate=0.5, max_steps=30,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == trainer.state.best_global_step + 2 < 30


@pytest.mark.promise("E29")
def test_tensorboard_gets_losses_and_evaluation(tmp_path, family, even_cache, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(
        tmp_path / "run", family, even_cache, eval_fraction=0.3, eval_strategy="steps", eval_steps=3,
        report_to="tensorboard",
    )  # fmt: skip
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "eval/loss", "eval/gain", "train/loss_q3"} <= set(scalars)
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(trainer))


@pytest.mark.promise("B15")
def test_wandb_without_login_logs_offline_and_says_so(tmp_path, family, even_cache, monkeypatch, caplog):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "others")  # the flag wins
    import wandb

    wandb.teardown()
    trainer = make_trainer(
        tmp_path / "run", family, even_cache, report_to="wandb", project="figures", run_name="night style"
    )
    assert os.environ["WANDB_MODE"] == "offline" and "offline" in caplog.text
    trainer.train()
    assert (wandb.run.project, wandb.run.name) == ("figures", "night style")
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.promise("C35")
def test_hyperparameter_search_minimises_eval_loss(tmp_path, family, even_cache):
    def model_init():
        model = family.load_model(dtype=torch.float32)
        return sf.add_adapter(model, sf.AdapterArguments(rank=2), family=family, seed=1)

    train, held_out = sf.load_cache(even_cache, dtype=torch.float32).split(0.3)
    args = make_args(tmp_path, eval_strategy="steps", eval_steps=6)
    trainer = sf.DiffusionTrainer(
        None, args, family=family, train_dataset=train, eval_dataset=held_out, model_init=model_init
    )
    import optuna

    seen = {}

    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-8, 1e-2])}

    best = trainer.hyperparameter_search(
        space, n_trials=2, backend="optuna", direction="minimize",
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-8, 1e-2]}, seed=0),
    )  # fmt: skip
    seen.update(best.hyperparameters)
    assert seen == {"learning_rate": 1e-2}
    assert best.objective == pytest.approx(
        min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e), rel=0.2
    )


def test_dropped_tail_is_reported(tmp_path, family, even_cache, caplog):
    caplog.set_level("INFO")
    trainer = make_trainer(
        tmp_path, family, even_cache, per_device_train_batch_size=5, dataloader_drop_last=True, max_steps=2
    )
    trainer.train()
    total = next(line for line in caplog.text.splitlines() if line.startswith("total"))
    assert total.split()[1] == "24" and total.split()[-1] == str(24 - 5 * 3)


def test_workers_read_the_same_batches(tmp_path, family, even_cache):
    plain = make_trainer(tmp_path / "a", family, even_cache, max_steps=8)
    plain.train()
    workers = make_trainer(tmp_path / "b", family, even_cache, max_steps=8, dataloader_num_workers=2)
    workers.train()
    assert same(trained(plain), trained(workers))


def test_a_finished_run_is_not_trained_over(tmp_path, family, even_cache):
    options = dict(save_strategy="steps", save_steps=3)
    make_trainer(tmp_path, family, even_cache, **options).train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    with pytest.raises(sf.SciflowError, match="overwrite_output_dir"):
        make_trainer(tmp_path, family, even_cache, **options).train()
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text()) == state
    make_trainer(tmp_path, family, even_cache, overwrite_output_dir=True, max_steps=3, **options).train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(rank=8), "adapter.rank"),
        (dict(per_device_train_batch_size=1), "total_train_batch_size"),
        (dict(eval_fraction=0.5), "data"),
        (dict(seed=4), "seed"),
        (dict(optim="prodigy", learning_rate=None), "optim"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, family, even_cache, change, words):
    options = dict(save_strategy="steps", save_steps=3, eval_fraction=0.3)
    make_trainer(tmp_path, family, even_cache, **options).train()
    with pytest.raises(sf.SciflowError, match=f"another run: .*{words}: .* then, .* now"):
        make_trainer(tmp_path, family, even_cache, resume_from_checkpoint="latest", **(options | change)).train()


def test_models_that_would_train_nothing_are_refused(tmp_path, family, even_cache):
    data = sf.load_cache(even_cache, dtype=torch.float32)
    frozen = family.load_model(dtype=torch.float32).requires_grad_(False)
    with pytest.raises(sf.SciflowError, match="add_adapter"):
        sf.DiffusionTrainer(frozen, make_args(tmp_path), family=family, train_dataset=data)
    half = family.load_model(dtype=torch.bfloat16)
    with pytest.raises(sf.SciflowError, match="16 bit"):
        sf.DiffusionTrainer(half, make_args(tmp_path), family=family, train_dataset=data)


def test_cache_of_another_model_is_refused(tmp_path, family, even_cache):
    import dataclasses

    other = dataclasses.replace(family, max_sequence_length=16)
    with pytest.raises(sf.CacheError, match="max_sequence_length"):
        make_trainer(tmp_path, other, even_cache)


def test_final_folder_is_a_lora_and_its_facts(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, eval_fraction=0.3)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
        WEIGHT_NAME, "README.md", "run.json", "run_facts.json", "training.png", "log.jsonl",
    }  # fmt: skip
    assert "gain" in sf.summary(trainer) and "README.md" in sf.summary(trainer)
