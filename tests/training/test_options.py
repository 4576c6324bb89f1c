"""Ranges of the options of training: every number has one, and what is outside is named before anything is loaded."""

import dataclasses
import math
import typing

import pytest
import torch
from trainings import make_args

import sciflow_hf as sf
from sciflow_hf.diffusion.process import mode_density
from sciflow_hf.families import BUILT_IN, load_family
from sciflow_hf.images.class_source import ClassImageArguments
from sciflow_hf.images.microscopes import MicroscopyDataArguments
from sciflow_hf.training.arguments import _STOCK_RANGES
from sciflow_hf.training.preference_arguments import PreferenceArguments
from sciflow_hf.training.reward_arguments import RewardArguments

REFUSED = [
    ("min_snr_gamma", -1), ("min_snr_gamma", 0), ("timestep_shift", "inf"), ("timestep_shift", "nan"),
    ("timestep_shift", "-3"), ("logit_mean", math.nan), ("logit_mean", math.inf), ("logit_std", -1), ("logit_std", 0),
    ("huber_delta", 0), ("seed", -1), ("seed", 2**32), ("data_seed", -1), ("adam_beta1", 1), ("adam_beta2", -0.1),
    ("adam_epsilon", 0), ("learning_rate", math.nan), ("learning_rate", -1e-4), ("learning_rate", math.inf),
    ("weight_decay", -1), ("max_grad_norm", -1), ("max_steps", 0), ("max_steps", -2), ("num_train_epochs", 0),
    ("num_train_epochs", math.inf), ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", -1),
    ("gradient_accumulation_steps", 0), ("logging_steps", 0), ("save_steps", 0), ("eval_steps", -5),
    ("save_total_limit", 0), ("warmup_steps", -1), ("dataloader_num_workers", -1), ("mode_scale", 2),
    ("mode_scale", -1.1), ("validation_guidance_scale", math.nan), ("validation_seeds", [0, -1]),
    ("validation_size", [0, 64]), ("lora_plus_ratio", math.nan), ("ema_decay", math.nan), ("eval_levels", 0),
]  # fmt: skip


@pytest.mark.promise("C28")
@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_number_out_of_its_range_is_named(tmp_path, name, value):
    with pytest.raises(sf.SciflowError, match=rf"^`{name}` ") as caught:
        make_args(tmp_path, **{name: value})
    assert "at least" in str(caught.value) or any(w in str(caught.value) for w in ("above", "in [", " to ", "finite"))


def numbers(kind):
    """(name, range or check) of the options of a class that are numbers."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float} and field.init:
            described = field.metadata.get("help")
            yield field.name, getattr(described, "within", "") or getattr(described, "check", None)


@pytest.mark.promise("C28")
def test_every_number_has_a_range():
    """Of the training, and of every family; what the parent declares has it in one table."""
    elsewhere = {"max_steps", "label_smoothing_factor", "neftune_noise_alpha", "local_rank"}  # refused, or not options
    without = [n for n, r in numbers(sf.DiffusionTrainingArguments) if not r and n not in {*elsewhere, *_STOCK_RANGES}]
    assert without == []
    for name in BUILT_IN:
        assert [n for n, r in numbers(load_family(name)) if not r] == []
    preferences = (PreferenceArguments, sf.TupleArguments, RewardArguments, sf.PromptArguments)
    for kind in (sf.DataArguments, sf.AdapterArguments, ClassImageArguments, MicroscopyDataArguments, *preferences):
        assert [n for n, r in numbers(kind) if not r] == []


def test_mode_scale_is_where_the_density_is_one():
    """Equation 20 of Esser et al. 2024 falls from 1 to 0 as u grows, within the range only."""
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)
    for scale, falls in ((-1.0, True), (1.7519, True), (1.8, False), (-1.1, False)):
        assert bool((mode_density(u, mode_scale=scale).diff() <= 1e-12).all()) == falls
