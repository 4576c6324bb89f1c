"""Optimizers behind `--optim` that transformers does not know."""

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import SciflowError

OPTIMIZERS = ("prodigy",)


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
