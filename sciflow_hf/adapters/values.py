"""Values of an adapter: copies, other ones for a while, and whether it changes anything yet."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch

from .initial import INITIAL
from .layers import adapter_disabled, adapter_parameters

Values = dict[str, torch.Tensor]


def copies(parameters: Mapping[str, torch.Tensor]) -> Values:
    """Copies of the parameters of `adapter_parameters`."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def starting_values(model: torch.nn.Module) -> Values:
    """The values of an adapter that was loaded; {} for a LoRA or DoRA made in this run, which changes nothing yet."""
    parameters = adapter_parameters(model)
    if adapter_parameters(model, INITIAL):
        return {}  # what subtracts the start; a loaded adapter is a plain LoRA
    last = [p for name, p in parameters.items() if ".lora_B." in name]
    is_new = bool(last) and not any(p.detach().any() for p in last)
    return {} if is_new else copies(parameters)


def at_start(model: torch.nn.Module, start: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """The network for a while as training began with it; `start` are its `starting_values`."""
    return with_values(model, start) if start else adapter_disabled(model)


@contextmanager
def with_values(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Other values of an adapter for a while. A backward pass needs those that were there in its forward pass.

    Autocast keeps its 16 bit copies by parameter, and would take those of other values, or of a pass without gradients.
    """
    parameters = adapter_parameters(model)
    now = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].to(parameter.device)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for name, parameter in parameters.items():
            parameter.data = now[name]


def digest(values: Mapping[str, torch.Tensor]) -> str:
    """A hash of all values."""
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(name.encode() + value.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
