"""EMA of the trained weights: the recursion, swapping, checkpoints, and what a run evaluates, draws and saves with."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from caches import encoder_settings, write_cache
from recipe_runs import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainings import make_trainer, same, trained
from transformers import TrainerCallback, TrainerControl, TrainerState

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.training.callbacks.ema import EMA_NAME, EMACallback
from sciflow_hf.training.checkpoints import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Line(torch.nn.Linear):
    """Five trained weights and a frozen one."""

    def __init__(self):
        super().__init__(5, 1)
        self.bias.requires_grad = False


class Weights(TrainerCallback):
    """Keeps a copy of the trained weights at the start and after every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    on_step_end = on_train_begin


def closed_form(values, decays):
    """prod(d) w_0 + sum_i (1 - d_i) prod_{k > i} d_k w_i, in float64."""
    parts = [float(np.prod(decays)) * values[0].double()]
    for i, (value, decay) in enumerate(zip(values[1:], decays, strict=True)):
        parts.append((1 - decay) * float(np.prod(decays[i + 1 :])) * value.double())
    return sum(parts)


def walk(ema, model, steps, *, start=0, seed=0):
    """The events of a training in which every step moves the weights at random; the weights after each."""
    generator, state = torch.Generator().manual_seed(seed), TrainerState(global_step=start)
    ema.on_train_begin(None, state, TrainerControl(), model=model)
    seen = [model.weight.detach().clone()]
    for step in range(1, start + steps + 1):
        move = torch.randn(1, 5, generator=generator)
        if step > start:
            state.global_step = step
            model.weight.data += move
            ema.on_step_end(None, state, TrainerControl(), model=model)
            seen.append(model.weight.detach().clone())
    return seen


def average_of(ema, model):
    with ema.swapped():
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.promise("E25")
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("update_every", [1, 3])
def test_closed_form(warmup, update_every):
    """With warm-up the first decays are 2/11, 3/12, ... up to 0.6 (n = 13); the start counts from the first update."""
    model, ema = Line(), EMACallback(0.6, warmup, update_every)
    seen = walk(ema, model, 24)
    values = seen[::update_every]
    decays = [min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(1, len(values))]
    found = average_of(ema, model)
    assert list(found) == ["weight"] and found["weight"].dtype == torch.float32
    torch.testing.assert_close(found["weight"].double(), closed_form(values, decays), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found["weight"], seen[-1], atol=1e-2)


@pytest.mark.promise("E25")
def test_swap_gives_the_same_bits_back_also_after_an_error():
    model, ema = Line(), EMACallback(0.9)
    with ema.swapped():  # before training: nothing to swap
        pass
    walk(ema, model, 5)
    before = model.weight.detach().clone()
    average = average_of(ema, model)["weight"]
    assert torch.equal(model.weight, before) and not torch.equal(average, before)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        with ema.swapped():
            assert torch.equal(model.weight, average)
        assert torch.equal(model.weight, average)  # the inner one leaves that to the outer one
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)


def test_saved_and_loaded_goes_on_bit_for_bit(tmp_path):
    whole, model = EMACallback(0.999), Line()
    start = model.weight.detach().clone()
    walk(whole, model, 9)
    half, other = EMACallback(0.999), Line()
    other.weight.data.copy_(start)
    walk(half, other, 4)
    half.save(tmp_path)
    again = EMACallback(0.999)
    again.load(tmp_path, other)
    walk(again, other, 5, start=4)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(average_of(again, other)["weight"], average_of(whole, model)["weight"])
    walk(again, other, 0)  # a new training begins anew
    assert torch.equal(average_of(again, other)["weight"], other.weight)


def test_a_file_that_does_not_fit(tmp_path):
    EMACallback().save(tmp_path)
    assert not (tmp_path / EMA_NAME).exists()
    with pytest.raises(sf.SciflowError, match=rf"`ema_decay`.*{EMA_NAME} is missing.*leave out `--ema_decay`"):
        EMACallback().load(tmp_path, Line())
    for wrong, tensors in (
        ("weight", {"weight": torch.zeros(1, 4)}),
        ("more", {"weight": torch.zeros(1, 5), "more": torch.zeros(1)}),
    ):
        save_file(tensors, tmp_path / EMA_NAME, metadata={"updates": "3"})
        with pytest.raises(sf.SciflowError, match=f"{EMA_NAME} does not fit.*such as {wrong}"):
            EMACallback().load(tmp_path, Line())


# -- in a training -------------------------------------------------------------------------------------------------


def ema_trainer(folder, family, cache, **options):
    defaults = dict(max_steps=4, ema_decay=0.9, eval_levels=1, eval_fraction=0.3)
    return make_trainer(folder, family, cache, **(defaults | options))


@pytest.mark.promise("C13")
def test_a_run_evaluates_and_saves_the_average(tmp_path, family, tiny_cache):
    """Accumulation: one update every second optimizer step. The output has the average, the checkpoint both."""
    from diffusers import Flux2KleinPipeline

    weights = Weights()
    options = dict(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=4, save_strategy="steps")
    options |= dict(ema_update_every=2, ema_device="cpu")
    trainer = ema_trainer(tmp_path, family, tiny_cache, callbacks=[weights], save_steps=4, **options)
    trainer.train()
    trainer.save_model()
    seen, after, checkpoint = weights.seen, trained(trainer), tmp_path / "checkpoint-4"
    assert len(seen) == 5 and same(after, seen[-1])
    average = load_file(checkpoint / EMA_NAME)
    assert average.keys() == after.keys() and not same(average, after)
    assert EMA_NAME in json.loads((checkpoint / MANIFEST).read_text())["files"]
    with safe_open(checkpoint / EMA_NAME, "pt") as file:
        assert file.metadata()["updates"] == "2"
    decays = [(1 + n) / (10 + n) for n in range(1, 3)]
    for name, value in average.items():
        wanted = closed_form([step[name] for step in seen[::2]], decays)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)

    # The same weights in a trainer without an average: evaluated, and saved as a user would.
    eval_loss = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    plain = ema_trainer(tmp_path / "plain", family, tiny_cache, ema_decay=None)
    for values, folder, is_equal in ((after, checkpoint, False), (average, tmp_path, True)):
        plain.model.load_state_dict(values, strict=False)
        assert (plain.evaluate()["eval_loss"] == eval_loss) is is_equal
        plain.save_model(str(tmp_path / "plain"))
        lora = load_file(tmp_path / "plain" / WEIGHT_NAME)
        assert same(lora, load_file(folder / WEIGHT_NAME))
        assert same(lora, Flux2KleinPipeline.lora_state_dict(str(folder)))  # finds its file beside the average's


def test_weights_are_back_after_an_evaluation_that_raises(tmp_path, family, tiny_cache):
    trainer = ema_trainer(tmp_path, dataclasses.replace(family), tiny_cache)
    trainer.train()
    before = trained(trainer)

    def fail(model, *args, **kwargs):
        assert not same(before, {n: p for n, p in model.named_parameters() if p.requires_grad})
        raise ZeroDivisionError

    trainer.family.compute_loss = fail
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert same(before, trained(trainer))


def test_images_are_drawn_with_the_average(tmp_path, family, tiny_cache):
    family, drawn = dataclasses.replace(family), []
    draw = family.generate
    trainer = ema_trainer(
        tmp_path, family, tiny_cache, max_steps=2, validation_prompts=["A chart."], validation_steps=2,
        num_inference_steps=1, validation_size=[32, 48],
    )  # fmt: skip

    def generate(*args, **kwargs):
        drawn.append(trained(trainer))
        return draw(*args, **kwargs)

    family.generate = generate
    start = trained(trainer)
    trainer.train()
    assert len(drawn) == 2 and same(drawn[0], start)
    with trainer.averaged_weights():
        assert same(drawn[1], trained(trainer))
    assert not same(drawn[1], trained(trainer))


@pytest.mark.parametrize("no_adapter", [False, True])
def test_resume_is_exact(tmp_path, family, tiny_cache, no_adapter):
    options = dict(save_strategy="steps", save_steps=2, no_adapter=no_adapter, gradient_accumulation_steps=2)
    whole = ema_trainer(tmp_path / "whole", family, tiny_cache, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = ema_trainer(tmp_path / "again", family, tiny_cache, resume_from_checkpoint="latest", **options)
    again.train()
    assert same(trained(whole), trained(again))
    file = family.component + "/diffusion_pytorch_model.safetensors" if no_adapter else WEIGHT_NAME
    for trainer in (whole, again):
        trainer.save_model()
    raw = load_file(tmp_path / "whole" / "checkpoint-4" / file)
    saved = [load_file(tmp_path / name / file) for name in ("whole", "again")]
    assert same(*saved) and not same(saved[0], raw)
    files = [load_file(tmp_path / name / "checkpoint-4" / EMA_NAME) for name in ("whole", "again")]
    assert same(*files) and not same(files[0], load_file(tmp_path / "whole" / "checkpoint-2" / EMA_NAME))


def test_resume_without_the_file(tmp_path, family, tiny_cache):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, eval_fraction=0.3)
    ema_trainer(tmp_path, family, tiny_cache, ema_decay=None, **options).train()
    assert not (tmp_path / "checkpoint-1" / EMA_NAME).exists()
    with pytest.raises(sf.SciflowError, match=f"checkpoint-1/{EMA_NAME} is missing"):
        ema_trainer(tmp_path, family, tiny_cache, resume_from_checkpoint="checkpoint-1", **options).train()


def test_the_best_checkpoint_brings_its_average(tmp_path, family, tiny_cache):
    """By the largest loss, the first evaluation is the best."""
    trainer = ema_trainer(
        tmp_path, family, tiny_cache, max_steps=4, load_best_model_at_end=True,
        eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    with trainer.averaged_weights():
        assert same(trained(trainer), load_file(f"{best}/{EMA_NAME}"))


def test_two_ranks(tmp_path, tiny_klein):
    """Two ranks against one: the same average, and the same `eval_loss`, half of which the second rank measures."""
    folder = write_cache(
        tmp_path / "even", settings=encoder_settings(tiny_klein), buckets={(32, 48): 12, (48, 32): 8, (24, 64): 4}
    )
    found = {}
    for ranks in (1, 2):
        options = dict(
            pretrained_model_name_or_path=tiny_klein, max_sequence_length=12, dataset_dir=folder, eval_fraction=0.3,
            output_dir=tmp_path / str(ranks), rank=4, lora_alpha=8, learning_rate=1e-2, max_steps=3, logging_steps=1,
            save_steps=3, eval_strategy="steps", eval_steps=3, use_cpu=True, seed=3, disable_tqdm=True, optim="sgd",
            per_device_train_batch_size=4 // ranks, per_device_eval_batch_size=1, ema_decay=0.9,
        )  # fmt: skip
        run(*(word for name, value in options.items() for word in (f"--{name}", value)), ranks=ranks)
        checkpoint = tmp_path / str(ranks) / "checkpoint-3"
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        found[ranks] = load_file(checkpoint / EMA_NAME), next(e["eval_loss"] for e in history if "eval_loss" in e)
    assert found[1][0].keys() == found[2][0].keys()
    for name, value in found[1][0].items():
        torch.testing.assert_close(found[2][0][name], value, rtol=0, atol=1e-4)
    assert found[2][1] == pytest.approx(found[1][1], rel=1e-5)


# -- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.0, 99.99])
def test_decay_out_of_range(tmp_path, family, tiny_cache, decay):
    with pytest.raises(sf.SciflowError, match=r"`ema_decay`.*in \[0, 1\)"):
        ema_trainer(tmp_path, family, tiny_cache, ema_decay=decay)
    with pytest.raises(sf.SciflowError, match=r"`ema_decay`.*from 0 to below 1"):
        EMACallback(decay)


def test_refused_with_what_averages_or_shards_itself(tmp_path, family, tiny_cache, monkeypatch):
    with pytest.raises(sf.SciflowError, match="`ema_update_every` 0"):
        EMACallback(update_every=0)
    with pytest.raises(sf.SciflowError, match=r"`ema_decay` 0.9 cannot work with `--optim schedule_free_adamw`"):
        ema_trainer(tmp_path, family, tiny_cache, optim="schedule_free_adamw")
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(sf.SciflowError, match=r"`ema_decay` 0.9999 cannot work with DeepSpeed"):
        EMACallback().on_init_end(SimpleNamespace(optim="adamw_torch"), TrainerState(), TrainerControl())
