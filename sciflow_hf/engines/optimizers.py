"""Optimizers behind `--optim`: what transformers does not know, what they need, and rates of their own for groups."""

import importlib.util
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from transformers.training_args import OptimizerNames

from ..errors import SciflowError
from ..options import arguments, option

logger = logging.getLogger(__name__)

OPTIMIZERS = {"prodigy": 1.0}
"""Optimizers that transformers does not know -> learning rate when none is given."""
DEFAULT_LEARNING_RATE = 1e-4


def needed_package(optim: str) -> str | None:
    """The package that transformers imports for an optimizer of bitsandbytes or a schedule-free one."""
    if optim.startswith("schedule_free"):
        return "schedulefree"
    if re.match(r"adamw_8bit|.*_bnb|paged_|ademamix|lion_", optim):
        return "bitsandbytes"
    return None


def check(args: Any) -> None:
    """Raises SciflowError where an optimizer, or rates for its groups, cannot work: before any model is loaded."""
    optim = str(getattr(args.optim, "value", args.optim))
    package = needed_package(optim)
    if package is not None and importlib.util.find_spec(package) is None:
        raise SciflowError(f"`optim` {optim!r} needs {package}: `pip install {package}`, or choose another optimizer.")
    if optim.startswith("paged_") and args.device.type == "cpu":
        raise SciflowError(
            f"`optim` {optim!r} pages its state between a GPU and the host, and this run is on a CPU: "
            f"{optim.removeprefix('paged_')!r} is the same without paging."
        )
    if optim.startswith("schedule_free"):
        _check_schedule_free(optim, args)
    for name in ("lora_plus_ratio", "text_encoder_learning_rate"):
        value = getattr(args, name)
        if value is not None and (optim in OPTIMIZERS or "layerwise" in optim or "lomo" in optim):
            raise SciflowError(
                f"`{name}` {value} cannot work with `optim` {optim!r}, which has one rate for everything: choose an "
                "AdamW, or leave it out."
            )
    if optim in OPTIMIZERS and args.learning_rate < 0.1:
        logger.warning("`learning_rate` %g with `%s`: it is a factor here, usually 1.0.", args.learning_rate, optim)


def _check_schedule_free(optim: str, args: Any) -> None:
    if 0 < args.warmup_steps < 1:
        raise SciflowError(
            f"`warmup_steps` {args.warmup_steps} with `optim` {optim!r}, which warms up by itself and counts: give "
            "the number of steps."
        )
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if not schedule.startswith("constant"):
        logger.warning("`lr_scheduler_type` %s with `%s`, which is meant to go without.", schedule, optim)


@arguments
class OptimizerArguments:
    """The optimizer and its learning rates."""

    heading: ClassVar[str] = "Optimizer"

    optim: str = option(
        "adamw_torch_fused",
        "Optimizer, of transformers or of ours.",
        choices=[*OPTIMIZERS, *(name.value for name in OptimizerNames)],
        check=check,
    )
    learning_rate: float | None = option(
        None,
        f"Initial learning rate; {DEFAULT_LEARNING_RATE:g}, usual for LoRA, when not given. With --optim prodigy, "
        f"which finds the rate itself, a factor on it; {OPTIMIZERS['prodigy']:g} when not given.",
        within="[0, inf)",
    )
    lora_plus_ratio: float | None = option(
        None,
        "LoRA+ (Hayou et al. 2024): lora_B learns at this multiple of --learning_rate, such as 16; at the same rate "
        "when not given.",
        within="(0, inf)",
        advice="Leave it out for one rate.",
        check=check,
    )
    text_encoder_learning_rate: float | None = option(
        None,
        "Learning rate of trained text encoders; --learning_rate when not given.",
        within="(0, inf)",
        advice="Leave it out for one rate.",
        check=check,
    )


def optimizer_class(name: str, learning_rate: float, options: str | None) -> tuple[type, dict[str, Any]]:
    """Class and keyword arguments of one of `OPTIMIZERS`.

    Args:
        options: `--optim_args`, such as "d_coef=2,safeguard_warmup=False".

    Prodigy (Mishchenko and Defazio 2023) estimates the step size itself; `learning_rate` is a factor on it, 1.0.
    Bias correction and safeguarded warm-up are on, as its authors advise for diffusion models.
    """
    from prodigyopt import Prodigy

    kwargs: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (0.9, 0.999),
        "use_bias_correction": True,
        "safeguard_warmup": True,
    }
    for pair in filter(None, (options or "").replace(" ", "").split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in _PRODIGY_OPTIONS:
            allowed = ", ".join(_PRODIGY_OPTIONS)
            raise SciflowError(f"`optim_args` {pair!r}: write name=value, with one of {allowed}.")
        try:
            kwargs[key] = _PRODIGY_OPTIONS[key](value)
        except ValueError as error:
            kind = {float: "number", int: "whole number"}.get(_PRODIGY_OPTIONS[key], "true or false")
            raise SciflowError(f"`optim_args` {pair!r}: expected {kind}, got {value!r}.") from error
    return Prodigy, kwargs


def _boolean(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError(value)
    return value.lower() in ("true", "1")


_PRODIGY_OPTIONS: Mapping[str, Any] = {
    "d0": float,
    "d_coef": float,
    "growth_rate": float,
    "eps": float,
    "beta3": float,
    "slice_p": int,
    "decouple": _boolean,
    "use_bias_correction": _boolean,
    "safeguard_warmup": _boolean,
}


def effective_learning_rate(param_groups: Iterable[Mapping[str, Any]]) -> float | None:
    """d * lr of Prodigy, the step size in use; None for optimizers that have no d."""
    group = next(iter(param_groups), {})
    return float(group["d"]) * float(group["lr"]) if "d" in group else None


def state_bytes(optim: str) -> int:
    """Bytes that an optimizer keeps per trained parameter, for estimates."""
    name = str(getattr(optim, "value", optim))
    if name == "prodigy":
        return 16  # two moments, the start and a sum of gradients
    return 2 if "8bit" in name else 8


# -- parameter groups --------------------------------------------------------------------------------------------------


def parameter_groups(
    names: Iterable[str],
    *,
    learning_rate: float,
    lora_plus_ratio: float | None = None,
    text_encoder_learning_rate: float | None = None,
) -> dict[str, tuple[float, list[str]]]:
    """Names of trained parameters by group: {group: (learning rate, names)}.

    The groups are "base", "lora_B", "text_encoder" and "text_encoder_lora_B"; those without parameters are left out.

    Args:
        names: such as "transformer_blocks.0.attn.to_q.lora_B.default.weight"; those of a text encoder have a part
            that begins with `text_encoder`.
        learning_rate: of what has no other.
        lora_plus_ratio: LoRA+ (Hayou et al. 2024): B learns at this multiple of the rate of A, 16 in the paper.
        text_encoder_learning_rate: of the text encoders.
    """
    groups: dict[str, tuple[float, list[str]]] = {}
    for name in names:
        parts, rate = [], learning_rate
        if text_encoder_learning_rate is not None and re.search(r"(^|\.)text_encoder", name):
            parts, rate = ["text_encoder"], text_encoder_learning_rate
        if lora_plus_ratio is not None and ".lora_B." in name:
            parts, rate = [*parts, "lora_B"], rate * lora_plus_ratio
        groups.setdefault("_".join(parts) or "base", (rate, []))[1].append(name)
    return groups


def rates_of(model: torch.nn.Module, args: Any, *, learning_rate: float) -> dict[str, tuple[float, list[str]]]:
    """`parameter_groups` of what `model` trains; SciflowError where an option would change nothing."""
    groups = parameter_groups(
        (name for name, parameter in model.named_parameters() if parameter.requires_grad),
        learning_rate=learning_rate,
        lora_plus_ratio=args.lora_plus_ratio,
        text_encoder_learning_rate=args.text_encoder_learning_rate,
    )
    if args.lora_plus_ratio is not None and not any(group.endswith("lora_B") for group in groups):
        raise SciflowError(
            f"`lora_plus_ratio` {args.lora_plus_ratio}: nothing that is trained is called lora_B. It is for "
            "`--adapter_type` lora and dora: leave it out."
        )
    if args.text_encoder_learning_rate is not None and not any(group.startswith("text_") for group in groups):
        raise SciflowError(
            f"`text_encoder_learning_rate` {args.text_encoder_learning_rate}: no text encoder is trained. Add "
            "`--train_text_encoder`, or leave it out."
        )
    return groups


def split_groups(optimizer: Any, model: torch.nn.Module, groups: Mapping[str, tuple[float, list[str]]]) -> None:
    """Divides the groups of a new optimizer (with and without weight decay) once more, by `parameter_groups`."""
    parameters = dict(model.named_parameters())
    of = {id(parameters[name]): group for group, (_, names) in groups.items() for name in names}
    divided = []
    for old in optimizer.param_groups:
        for group, (rate, _) in groups.items():
            members = [p for p in old["params"] if of.get(id(p)) == group]
            if members:
                divided.append({**old, "params": members, "lr": rate, "name": group})
    optimizer.param_groups[:] = divided


def group_rates(param_groups: Iterable[Mapping[str, Any]], learning_rate: float) -> dict[str, float]:
    """Learning rates for the logs, `learning_rate_lora_B` and so on; nothing where there is one for all.

    Args:
        learning_rate: the current one of the first group; schedules keep the ratios.
    """
    groups = [group for group in param_groups if "name" in group]
    return {
        f"learning_rate_{group['name']}": learning_rate * group["initial_lr"] / groups[0]["initial_lr"]
        for group in groups
    }
