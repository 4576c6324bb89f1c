"""`--optim`: every optimizer resumes exactly; schedule-free averages; rates of their own for groups of parameters."""

import dataclasses
import importlib.util
import shutil

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from trainings import make_args, make_trainer, same, trained
from transformers import TrainerCallback, trainer_optimizer
from transformers.training_args import OptimizerNames

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME, load_adapter_weights
from sciflow_hf.engines.optimizers import (
    group_rates,
    needed_package,
    parameter_groups,
    rates_of,
    split_groups,
    state_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CHOICES = {
    "adamw_torch_fused": {},
    "prodigy": {"learning_rate": None},
    "adamw_bnb_8bit": {},
    "schedule_free_adamw": {},
    "ema": {"ema_decay": 0.9},
    "ema prodigy": {"ema_decay": 0.9, "optim": "prodigy", "learning_rate": None},
    "ema 8bit": {"ema_decay": 0.9, "optim": "adamw_bnb_8bit"},
    "lora+": {"lora_plus_ratio": 16, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
    "lora+ schedule_free": {"lora_plus_ratio": 4, "optim": "schedule_free_adamw"},
}


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("E12")
@pytest.mark.parametrize("choice", CHOICES)
def test_resumed_equals_uninterrupted(tmp_path, family, tiny_cache, choice):
    """6 steps = 3 steps, resume, 3 steps: the same bits, with accumulation and evaluations in between."""
    options = {"optim": choice} if choice in (*OptimizerNames, "prodigy") else {}
    options |= CHOICES[choice] | dict(
        rank=32, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3, eval_fraction=0.3, eval_levels=1,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8,
    )  # fmt: skip
    whole = make_trainer(tmp_path / "whole", family, tiny_cache, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = make_trainer(tmp_path / "again", family, tiny_cache, resume_from_checkpoint="latest", **options)
    again.train()
    assert same(trained(whole), trained(again))
    half, *ends = (load_file(tmp_path / f / WEIGHT_NAME) for f in (
        "whole/checkpoint-3", "whole/checkpoint-6", "again/checkpoint-6"))  # fmt: skip
    assert same(*ends) and not any(torch.equal(half[name], ends[0][name]) for name in half if "lora_B" in name)
    logs = [[e for e in t.state.log_history if e["step"] > 3 and "train_loss" not in e] for t in (whole, again)]
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert [{k: v for k, v in e.items() if k not in timed} for e in logs[0]] == [
        {k: v for k, v in e.items() if k not in timed} for e in logs[1]
    ]
    kinds = {v.dtype for s in whole.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim}
    assert (torch.uint8 in kinds) is ("8bit" in choice)  # the wide layers' moments, 4,096 values and more


def test_two_ranks_resume_exactly(tmp_path, tiny_klein, tiny_cache):
    """Schedule-free on two gloo ranks: all of them go over to the average where one saves."""
    job = dict(
        pipeline=tiny_klein, cache=tiny_cache, held_out=6, learning_rate=1e-2, max_steps=2, save_steps=1, eval_levels=1,
        optim="schedule_free_adamw", gradient_accumulation_steps=2,
    )  # fmt: skip
    again = dict(start=tmp_path / "whole" / "checkpoint-1", resume_from_checkpoint="latest")
    launch(tmp_path, job | {"output_dir": tmp_path / "whole"}, job | again | {"output_dir": tmp_path / "again"})
    files = [load_file(tmp_path / f / WEIGHT_NAME) for f in ("whole", "again", "whole/checkpoint-1")]
    assert same(files[0], files[1]) and not same(files[0], files[2])


# -- schedule-free -------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Copies of what a schedule-free optimizer walks along, after every step."""

    def __init__(self):
        self.z = []

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        names = {id(p): n for n, p in model.named_parameters()}
        self.z.append({names[id(p)]: s["z"].clone() for p, s in optimizer.state.items() if "z" in s})


def mean_of(steps):
    """At a constant rate the average of Schedule-Free (Defazio et al. 2024) is the plain mean of z_1 ... z_T."""
    return {name: torch.stack([step[name].double() for step in steps]).mean(0) for name in steps[-1]}


def close(found, wanted):
    found = {n: found[n] for n in wanted}
    return all(torch.allclose(found[n].double(), wanted[n], rtol=0, atol=2e-6) for n in wanted)


def test_schedule_free_shows_its_average(tmp_path, family, even_cache):
    """Checkpoints, evaluations, validation images and the final file are of the mean of z, training steps are not."""
    family, steps, drawn, stepped = dataclasses.replace(family), Steps(), [], []
    draw, loss = family.generate, family.compute_loss
    trainer = make_trainer(
        tmp_path, family, even_cache, optim="schedule_free_adamw", callbacks=[steps], max_steps=5, save_steps=3,
        save_strategy="steps", eval_fraction=0.3, eval_strategy="steps", eval_steps=2, validation_prompts=["A chart."],
        validation_steps=1, num_inference_steps=1, validation_size=[32, 48],
    )  # fmt: skip

    def generate(*args, **kwargs):
        drawn.append((len(steps.z), trained(trainer)))
        return draw(*args, **kwargs)

    def compute_loss(model, batch, args, **kwargs):
        stepped.append((model.training, len(steps.z), trained(trainer)))
        return loss(model, batch, args, **kwargs)

    family.generate, family.compute_loss = generate, compute_loss
    trainer.train()
    for number, weights in drawn:
        assert number == 0 or close(weights, mean_of(steps.z[:number]))
    assert [number for number, _ in drawn] == [0, 1, 2, 3, 4, 5]
    evaluated = [(number, weights) for training, number, weights in stepped if not training and weights]
    assert {number for number, _ in evaluated} == {2, 4, 5}
    assert all(close(w, mean_of(steps.z[:n])) for n, w in evaluated)
    after = [(number, weights) for training, number, weights in stepped if training and number > 1]
    for number, weights in after:  # y = 0.1 z + 0.9 x
        x, z = mean_of(steps.z[:number]), steps.z[number - 1]
        assert close(weights, {n: 0.1 * z[n].double() + 0.9 * x[n] for n in x}) and not close(weights, x)
    assert len(after) == 3
    trainer.save_model()
    for folder, number in (("checkpoint-3", 3), ("checkpoint-5", 5), (".", 5)):
        plain = make_trainer(tmp_path / "plain", family, even_cache)
        load_adapter_weights(plain.model, tmp_path / folder, family=family)
        assert close(trained(plain), mean_of(steps.z[:number]))


def test_schedule_free_leaves_its_average_in_the_network(tmp_path, family, even_cache):
    steps = Steps()
    trainer = make_trainer(tmp_path, family, even_cache, optim="schedule_free_adamw", callbacks=[steps], max_steps=3)
    trainer.train()
    assert close(trained(trainer), mean_of(steps.z))
    trainer.save_model()
    assert close(trained(trainer), mean_of(steps.z))


def test_schedule_free_and_the_best_checkpoint(tmp_path, family, even_cache):
    """The average of an earlier step comes back unchanged: here the largest loss counts as the best."""
    trainer = make_trainer(
        tmp_path, family, even_cache, optim="schedule_free_adamw", max_steps=5, eval_fraction=0.3,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < 5
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    trainer.save_model()
    assert same(load_file(tmp_path / WEIGHT_NAME), load_file(f"{trainer.state.best_model_checkpoint}/{WEIGHT_NAME}"))


# -- groups with their own rate --------------------------------------------------------------------------------------


def test_groups_of_names():
    a, b, other = "blocks.0.to_q.lora_A.default.weight", "blocks.0.to_q.lora_B.default.weight", "norm.weight"
    text = [f"text_encoder{n}.layers.0.q_proj.lora_{x}.default.weight" for n in ("", "_2") for x in "AB"]
    assert parameter_groups([a, b, other, *text], learning_rate=0.5) == {"base": (0.5, [a, b, other, *text])}
    assert parameter_groups([a, b, other], learning_rate=0.5, lora_plus_ratio=8) == {
        "base": (0.5, [a, other]), "lora_B": (4.0, [b]),
    }  # fmt: skip
    names = [f"transformer.{a}", f"transformer.{b}", *text]
    assert parameter_groups(names, learning_rate=0.5, text_encoder_learning_rate=0.25) == {
        "base": (0.5, names[:2]), "text_encoder": (0.25, text),
    }  # fmt: skip
    both = parameter_groups(names, learning_rate=0.5, text_encoder_learning_rate=0.25, lora_plus_ratio=2)
    assert both == {
        "base": (0.5, names[:1]), "lora_B": (1.0, names[1:2]),
        "text_encoder": (0.25, text[::2]), "text_encoder_lora_B": (0.5, text[1::2]),
    }  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adamw_bnb_8bit", "schedule_free_adamw", "adafactor"])
def test_lora_plus_equals_pefts(tmp_path, family, even_cache, optim):
    """The same gradients three times: the same weights as by PEFT's own LoRA+ optimizer."""
    from peft.optimizers import create_loraplus_optimizer

    found = []
    for ours in (True, False):
        trainer = make_trainer(tmp_path, family, even_cache, optim=optim, lora_plus_ratio=16, learning_rate=1e-3)
        if not ours:
            cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
            trainer.optimizer = create_loraplus_optimizer(trainer.model, cls, loraplus_lr_ratio=16, **options)
        optimizer = trainer.create_optimizer()
        if optim.startswith("schedule"):
            optimizer.train()
        for step in range(3):
            for number, p in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
            optimizer.step()
        found.append(trained(trainer))
    assert same(*found)


def test_rates_follow_the_schedule_and_are_logged(tmp_path, family, even_cache):
    options = dict(lr_scheduler_type="linear", learning_rate=1e-3, max_steps=4)
    trainer = make_trainer(tmp_path, family, even_cache, lora_plus_ratio=16, weight_decay=0.1, **options)
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["learning_rate"] for e in logs] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [e["learning_rate_base"] for e in logs] == pytest.approx([e["learning_rate"] for e in logs])
    assert [e["learning_rate_lora_B"] for e in logs] == pytest.approx([16 * e["learning_rate"] for e in logs])
    groups = [(g["name"], g["initial_lr"], g["weight_decay"], len(g["params"])) for g in trainer.optimizer.param_groups]
    half = len(trained(trainer)) // 2
    assert groups == [("base", 1e-3, 0.1, half), ("lora_B", 0.016, 0.1, half)]
    plain = make_trainer(tmp_path / "plain", family, even_cache, **options)
    plain.train()
    assert not any(name.startswith("learning_rate_") for e in plain.state.log_history for name in e)


class WithText(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer, self.text_encoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)


def test_text_encoders_learn_at_their_rate_and_decay_as_before(tmp_path):
    args, model = make_args(tmp_path, text_encoder_learning_rate=1e-4, lora_plus_ratio=None), WithText()
    weights, biases = [model.transformer.weight, model.text_encoder.weight], [
        model.transformer.bias, model.text_encoder.bias]  # fmt: skip
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=1e-2)
    split_groups(optimizer, model, rates_of(model, args, learning_rate=1e-2))
    found = [(g["name"], g["lr"], g["weight_decay"], [id(p) for p in g["params"]]) for g in optimizer.param_groups]
    assert found == [
        ("base", 1e-2, 0.1, [id(weights[0])]), ("text_encoder", 1e-4, 0.1, [id(weights[1])]),
        ("base", 1e-2, 0, [id(biases[0])]), ("text_encoder", 1e-4, 0, [id(biases[1])]),
    ]  # fmt: skip


def test_names_of_trained_text_encoders(tmp_path):
    from sciflow_hf.demo import make_tiny

    family = sf.SDXL(pretrained_model_name_or_path=str(make_tiny(tmp_path / "sdxl", "sdxl", size="test")))
    options = sf.AdapterArguments(rank=3, train_text_encoder=True)
    model = sf.add_adapter(family.load_model(dtype=torch.float32, meta=True), options, family=family)
    args = make_args(tmp_path, text_encoder_learning_rate=1e-5)
    groups = {group: names for group, (_, names) in rates_of(model, args, learning_rate=1e-4).items()}
    assert {name.split(".")[0] for name in groups["base"]} == {"unet"} and len(groups["base"]) > 10
    assert {name.split(".")[0] for name in groups["text_encoder"]} == {"text_encoder", "text_encoder_2"}
    assert len(groups) == 2 and sum(map(len, groups.values())) == sum(p.requires_grad for p in model.parameters())


def test_another_ratio_is_another_run(tmp_path, family, even_cache):
    options = dict(save_strategy="steps", save_steps=3)
    make_trainer(tmp_path, family, even_cache, lora_plus_ratio=16, **options).train()
    with pytest.raises(sf.SciflowError, match="another run: lora_plus_ratio: 16 then, None now"):
        make_trainer(tmp_path, family, even_cache, resume_from_checkpoint="latest", **options).train()


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_plus_ratio": 0}, "`lora_plus_ratio` 0: above 0"),
        ({"text_encoder_learning_rate": -1.0}, "`text_encoder_learning_rate` -1.0: above 0"),
        ({"lora_plus_ratio": 16, "optim": "prodigy"}, "`lora_plus_ratio` 16 cannot work with `optim` 'prodigy'"),
        ({"text_encoder_learning_rate": 1e-5, "optim": "adalomo"}, "cannot work with `optim` 'adalomo'"),
        ({"optim": "schedule_free_adamw", "warmup_steps": 0.1}, "`warmup_steps` 0.1 .*give the number of steps"),
        ({"optim": "paged_adamw_8bit"}, "`optim` 'paged_adamw_8bit'.*on a CPU: 'adamw_8bit' is the same"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, words):
    with pytest.raises(sf.SciflowError, match=words):
        make_args(tmp_path, **options)


def test_schedule_free_with_a_schedule_is_warned_of(tmp_path, caplog):
    make_args(tmp_path, optim="schedule_free_adamw", lr_scheduler_type="constant_with_warmup", warmup_steps=10)
    assert caplog.text == ""
    make_args(tmp_path, optim="schedule_free_adamw", lr_scheduler_type="cosine")
    assert "`lr_scheduler_type` cosine with `schedule_free_adamw`" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_plus_ratio": 16.0, "no_adapter": True}, "`lora_plus_ratio` 16.0: nothing.*called lora_B"),
        ({"text_encoder_learning_rate": 1e-5}, "`text_encoder_learning_rate` 1e-05: no text encoder is trained"),
    ],
)
def test_rates_of_what_is_not_trained(tmp_path, family, even_cache, options, words):
    with pytest.raises(sf.SciflowError, match=words):
        make_trainer(tmp_path, family, even_cache, **options)


@pytest.mark.promise("C26")
def test_packages_are_looked_for_before_anything_is_loaded(tmp_path, monkeypatch):
    """By the same names as transformers imports them for."""
    for optim in OptimizerNames:
        stock = {
            "bitsandbytes": optim in trainer_optimizer._BITSANDBYTES_OPTIMIZERS,
            "schedulefree": optim in trainer_optimizer._SCHEDULE_FREE_OPTIMIZERS,
        }
        assert needed_package(optim.value) == next((name for name, needs in stock.items() if needs), None), optim
    find = importlib.util.find_spec
    gone = ("bitsandbytes", "schedulefree")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    for optim, package in (("adamw_bnb_8bit", "bitsandbytes"), ("schedule_free_adamw", "schedulefree")):
        with pytest.raises(sf.SciflowError, match=f"`optim` '{optim}' needs {package}: `pip install {package}`"):
            make_args(tmp_path, optim=optim)
    assert make_args(tmp_path).optim == "adamw_torch_fused"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "schedule_free_adamw", "prodigy"])
def test_bytes_of_the_state(tmp_path, optim):
    args = make_args(tmp_path, optim=optim, learning_rate=None)
    cls, options = sf.DiffusionTrainer.get_optimizer_cls_and_kwargs(args)
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer, weight.grad = cls([weight], **options), torch.randn(512, 512)
    if optim.startswith("schedule"):
        optimizer.train()
    optimizer.step()
    kept = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.numel() > 1]
    assert sum(v.numel() * v.element_size() for v in kept) / weight.numel() == pytest.approx(
        state_bytes(optim), rel=0.03
    )


def test_logged_rates_keep_their_ratio_when_a_schedule_has_reached_zero():
    groups = [{"name": "base", "initial_lr": 1e-4, "lr": 0.0}, {"name": "lora_B", "initial_lr": 1.6e-3, "lr": 0.0}]
    assert group_rates(groups, 5e-5) == pytest.approx({"learning_rate_base": 5e-5, "learning_rate_lora_B": 8e-4})
    assert group_rates(groups, 0.0) == {"learning_rate_base": 0.0, "learning_rate_lora_B": 0.0}
    assert group_rates([{"lr": 1e-4, "initial_lr": 1e-4}], 5e-5) == {}
