"""Resuming: a finished run, other options than before, and what a run of several calls reports."""

import importlib.metadata
import json
import logging
import shutil

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file
from trainings import LONGER, losses, make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.training.checkpoints import list_checkpoints, write_manifest
from sciflow_hf.training.resume import FORMAT, IDENTITY_NAME

STEPS = dict(save_strategy="steps", save_steps=2, max_steps=4, resume_from_checkpoint="latest")


def rows(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def rewrite(folder, **facts):
    """Other facts in a checkpoint's `run.json`, and a manifest that goes with them; None takes one out."""
    path = folder / IDENTITY_NAME
    saved = {name: value for name, value in (json.loads(path.read_text()) | facts).items() if value is not None}
    path.write_text(json.dumps(saved))
    (folder / "manifest.json").unlink()
    write_manifest(folder)


# ---- a finished run ----


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1.0, "save_steps": 3}])
def test_a_finished_run_started_again_trains_nothing(tmp_path, family, even_cache, length):
    options = STEPS | dict(eval_fraction=0.3)
    first = make_trainer(tmp_path, family, even_cache, **options | {k: v for k, v in length.items() if v != 2})
    first.train()
    again = make_trainer(tmp_path, family, even_cache, **options | length)
    again.train()
    assert again.state.global_step == first.state.global_step
    assert same(trained(first), trained(again)) and losses(first) == losses(again)
    assert again.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]
    again.save_model()
    assert same(load_file(tmp_path / WEIGHT_NAME), load_file(list_checkpoints(tmp_path)[0] / WEIGHT_NAME))


@pytest.mark.promise("B16")
def test_the_mean_loss_is_of_all_steps(tmp_path, family, even_cache):
    """A run of 8 steps in three calls reports the mean of 8 losses, whatever was logged."""
    options = STEPS | LONGER | dict(save_steps=3, logging_steps=4, max_steps=8)
    whole = make_trainer(tmp_path / "whole", family, even_cache, **options | dict(logging_steps=1))
    whole.train()
    assert rows(whole, "train_loss") == [pytest.approx(np.mean(losses(whole)), rel=1e-4)]
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    again = make_trainer(tmp_path / "again", family, even_cache, **options)
    again.train()
    assert rows(again, "train_loss")[-1] == pytest.approx(rows(whole, "train_loss")[0], rel=1e-4)


# ---- other options than before ----


@pytest.fixture(scope="module")
def half(tmp_path_factory, family, even_cache):
    """A run that stopped at step 4 of 8, with an evaluation."""
    folder = tmp_path_factory.mktemp("half")
    trainer = make_trainer(
        folder, family, even_cache, eval_fraction=0.3, max_steps=4, save_strategy="steps", save_steps=4,
        eval_strategy="steps", eval_steps=4, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    return folder


def resumed(half, folder, family, data, **options):
    shutil.copytree(half / "checkpoint-4", folder / "checkpoint-4")
    return make_trainer(
        folder, family, data, resume_from_checkpoint="latest",
        **{"max_steps": 8, "eval_fraction": 0.3, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 4,
           "save_strategy": "steps", "save_steps": 4} | options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 5e-3},
        {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"weight_decay": 0.1},
        {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_rates_of_the_command_apply(half, tmp_path, family, even_cache, caplog, options):
    """The next step is AdamW's, with the moments of the checkpoint and the numbers of the command."""
    trainer = resumed(half, tmp_path, family, even_cache, max_steps=5, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    for name, value in options.items():
        assert f"{name} " in caplog.text and f"-> {value!r}" in caplog.text
    group, args = trainer.optimizer.param_groups[0], trainer.args
    assert group["betas"] == (args.adam_beta1, args.adam_beta2) and group["eps"] == args.adam_epsilon
    assert group["weight_decay"] == args.weight_decay and group["initial_lr"] == args.learning_rate
    logged = rows(trainer, "learning_rate")[-1]
    expected = args.learning_rate
    if args.lr_scheduler_type == "cosine":  # step 4 of 5, of which 2 warm up
        expected *= 0.5 * (1 + np.cos(np.pi * 2 / 3))
    assert logged == pytest.approx(expected, rel=1e-6)
    before = load_file(half / "checkpoint-4" / WEIGHT_NAME)
    assert not same(before, load_file_of(trainer, tmp_path))


def load_file_of(trainer, folder):
    trainer.save_model(str(folder / "now"))
    return load_file(folder / "now" / WEIGHT_NAME)


def test_no_change_changes_nothing(half, tmp_path, family, even_cache, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = resumed(half, tmp_path / "a", family, even_cache, max_steps=4)
        trainer.train()
    assert "Other options" not in caplog.text and "measured again" not in caplog.text


def test_a_rate_with_a_schedule_that_keeps_its_own(half, tmp_path, family, even_cache):
    options = dict(lr_scheduler_type="reduce_lr_on_plateau", eval_steps=2, save_strategy="steps", save_steps=2)
    options |= dict(eval_fraction=0.3, eval_strategy="steps", max_steps=2, learning_rate=1e-2)
    make_trainer(tmp_path, family, even_cache, **options).train()
    again = make_trainer(
        tmp_path, family, even_cache, resume_from_checkpoint="latest", **options | dict(max_steps=3, learning_rate=2e-3)
    )
    again.train()
    assert rows(again, "learning_rate")[-1] == 2e-3
    for name, value in (("lr_scheduler_type", "cosine"), ("lr_scheduler_kwargs", {"patience": 1})):
        other = make_trainer(tmp_path, family, even_cache, resume_from_checkpoint="latest", **options | {name: value})
        with pytest.raises(sf.SciflowError, match=f"`{name}` .* then, .* now: their states differ"):
            other.train()


def test_arguments_of_the_optimizer_are_part_of_its_state(tmp_path, family, even_cache):
    """They were said to apply, and those of the checkpoint did."""
    options = STEPS | dict(optim="sgd", max_steps=2)
    make_trainer(tmp_path, family, even_cache, **options).train()
    again = make_trainer(tmp_path, family, even_cache, **options | dict(optim_args="momentum=0.9", max_steps=4))
    with pytest.raises(sf.SciflowError, match=r"`optim_args` None then, momentum=0\.9 now.*`--adapter_path`"):
        again.train()


def test_options_of_the_data_that_change_a_step_are_said(half, tmp_path, family, even_cache, caplog):
    trainer = resumed(half, tmp_path, family, even_cache, max_steps=4, caption_dropout=0.5)
    with caplog.at_level(logging.WARNING), pytest.raises(sf.SciflowError, match="does not hold the empty prompt"):
        trainer.train()
    assert "caption_dropout 0.0 -> 0.5" in caplog.text


@pytest.mark.parametrize("options", [{"loss_type": "l1"}, {"eval_levels": 8}, {"min_snr_gamma": 5.0}, {"bf16": True}])
def test_the_base_is_measured_again_where_the_loss_is_another(half, tmp_path, family, even_cache, caplog, options):
    trainer = resumed(half, tmp_path / "again", family, even_cache, max_steps=4, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        now = trainer.evaluate()
    assert f"measured again: {next(iter(options))}" in caplog.text
    anew = make_trainer(tmp_path / "anew", family, even_cache, eval_fraction=0.3, **options)
    fresh = anew.evaluate()
    expected = pytest.approx(fresh["eval_loss"], rel=1e-6)  # means of single and of double precision
    assert now["eval_base_loss"] == expected and fresh["eval_base_loss"] == expected != now["eval_loss"]


def test_all_weights_are_measured_before_they_are_loaded(tmp_path, family, even_cache):
    """Full fine-tuning has no base to switch to: the network as it is loaded, before the checkpoint."""
    data, held_out = sf.load_cache(even_cache, dtype=torch.float32).split(0.3)

    def make(folder, **options):
        args = dict(
            output_dir=str(tmp_path / folder), use_cpu=True, max_steps=2, logging_steps=1, save_steps=2,
            report_to="none", per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="steps",
            disable_tqdm=True,
        )  # fmt: skip
        model = family.load_model(dtype=torch.float32)
        args = sf.DiffusionTrainingArguments(**args | options)
        return sf.DiffusionTrainer(model, args, family=family, train_dataset=data, eval_dataset=held_out)

    make("run").train()
    fresh = make("fresh", loss_type="l1")
    base = fresh.evaluate()["eval_loss"]
    again = make("run", loss_type="l1", resume_from_checkpoint="latest", max_steps=3)
    again.train()
    now = again.evaluate()
    assert now["eval_base_loss"] == pytest.approx(base, rel=1e-6) != now["eval_loss"]


def test_a_checkpoint_without_options_resumes(half, tmp_path, family, even_cache):
    """As earlier versions wrote them; another number of levels shows in what was measured."""
    trainer = resumed(half, tmp_path, family, even_cache, max_steps=4, eval_levels=3)
    rewrite(tmp_path / "checkpoint-4", options=None, loss_sum=None, versions=None, format=None)
    trainer.train()
    assert len(trainer._eval_base) == 0 or {len(v) for v in trainer._eval_base.values()} == {3}
    assert trainer.evaluate()["eval_gain"]


# ---- versions ----


@pytest.mark.promise("C33")
def test_a_checkpoint_holds_its_versions_and_others_are_said(half, tmp_path, family, even_cache, caplog):
    saved = json.loads((half / "checkpoint-4" / IDENTITY_NAME).read_text())
    names = ("torch", "transformers", "diffusers", "peft")
    assert saved["versions"] == {n: importlib.metadata.version(n) for n in names} | {"sciflow_hf": sf.__version__}
    assert saved["format"] == FORMAT
    trainer = resumed(half, tmp_path, family, even_cache, max_steps=4)
    for before in ({"torch": "1.13.0", "peft": saved["versions"]["peft"], "sciflow_hf": "0.0.9"}, {}):
        rewrite(tmp_path / "checkpoint-4", versions=before)
        caplog.clear()
        trainer.train()
        told = f"other versions: torch 1.13.0 -> {torch.__version__}, sciflow_hf 0.0.9 -> {sf.__version__}."
        assert (told in caplog.text) is bool(before) is ("other versions" in caplog.text)


@pytest.mark.promise("C33")
@pytest.mark.parametrize("value", ["latest", "checkpoint-4"])
def test_a_newer_format_is_refused_with_the_version_that_reads_it(half, tmp_path, family, even_cache, value):
    trainer = resumed(half, tmp_path, family, even_cache)
    rewrite(tmp_path / "checkpoint-4", format=FORMAT + 1, versions={"sciflow_hf": "7.1"}, family=None)
    with pytest.raises(sf.SciflowError, match=rf"format {FORMAT + 1}, written by sciflow_hf 7.1.*sciflow_hf>=7.1"):
        trainer.train(resume_from_checkpoint=value)


# ---- a result that is none ----


def test_a_run_that_diverges_does_not_end_well(tmp_path, family, even_cache):
    """Nothing is logged or saved before the end: the losses are looked at there."""
    trainer = make_trainer(tmp_path, family, even_cache, learning_rate=1e20, logging_steps=1000)
    with pytest.raises(sf.SciflowError, match=r"loss was not finite at step [23]\..*lower `--learning_rate`"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_makes_no_checkpoint(tmp_path, family, even_cache, max_grad_norm):
    """The loss of step 2 is finite, its gradient is NaN: no row is blamed, and `latest` is the step before."""
    options = dict(save_strategy="steps", save_steps=1, max_steps=4, logging_steps=1000, max_grad_norm=max_grad_norm)
    trainer = make_trainer(tmp_path, family, even_cache, **options)
    weight = trained_parameters(trainer)[0]
    weight.register_hook(lambda grad: grad * (torch.nan if trainer.state.global_step == 1 else 1))
    with pytest.raises(sf.SciflowError, match="gradient was not finite at step 2, though the loss was") as caught:
        trainer.train()
    assert "Rows" not in str(caught.value)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    again = make_trainer(tmp_path, family, even_cache, resume_from_checkpoint="latest", **options)
    again.train()
    assert again.state.global_step == 4


def test_the_same_trainer_can_train_after_an_error(tmp_path, family, even_cache):
    """What was not finite then is not blamed on the steps now; the mean loss is of these steps alone."""
    trainer = make_trainer(tmp_path, family, even_cache, max_steps=2)
    weight = trained_parameters(trainer)[0]
    handle = weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(sf.SciflowError, match="gradient was not finite at step 1"):
        trainer.train()
    handle.remove()
    again = trained(make_trainer(tmp_path, family, even_cache, max_steps=2))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in again:
                parameter.copy_(again[name])
    trainer.optimizer = trainer.lr_scheduler = None
    trainer._loss_before = 1e6  # as a resumed run leaves it
    trainer.train()
    assert rows(trainer, "train_loss")[-1] == pytest.approx(np.mean(losses(trainer)), rel=1e-4)


def trained_parameters(trainer):
    return [p for p in trainer.model.parameters() if p.requires_grad]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache)
    with torch.no_grad():
        trained_parameters(trainer)[3].view(-1)[0] = torch.inf
    with pytest.raises(sf.SciflowError, match=r"hold NaN or infinity \(1 of \d+ tensors, the first .*lora"):
        trainer.save_model()
    assert not (tmp_path / WEIGHT_NAME).exists()


# ---- ranks that differ ----


def test_ranks_that_differ_are_refused(tmp_path, tiny_klein, tiny_cache, even_cache):
    """Before the first step, on both; with other rows it was a hang."""
    job = dict(pipeline=tiny_klein, cache=even_cache, max_steps=2)
    others = {
        "seed": {"seed": 4}, "learning_rate": {"learning_rate": 2e-3}, "data": {"cache": str(tiny_cache)},
        "weight_decay": {"weight_decay": 0.1}, "adapter": {"adapter": {"rank": 2}}, "eval_data": {"held_out": 3},
        "ema_decay": {"ema_decay": 0.9}, "total_train_batch_size": {"per_device_train_batch_size": 1},
        "optim": {"optim": "sgd"},
    }  # fmt: skip
    jobs = [job | dict(output_dir=tmp_path / name, on_rank_1=other) for name, other in others.items()]
    results = ranks.launch(tmp_path, *jobs, job | dict(output_dir=tmp_path / "alike"))
    for (name, other), result in zip(others.items(), results, strict=False):
        assert f"the processes do not train the same: `{name}`" in result["error"], (other, result)
        assert "on rank 0" in result["error"] and "on rank 1" in result["error"]
        assert not (tmp_path / name / "checkpoint-2").exists()
    assert len(results[-1]["losses"]) == 2
