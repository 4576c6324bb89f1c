"""The frozen weights of the blocks in host memory: on the device only while a layer computes with them."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import arguments, option
from .checkpointing import block_kinds, blocks_of, computed_again


def check(args: Any) -> None:
    """Raises SciflowError for options that `--offload` cannot work with, or not save anything with."""
    if not args.activation_checkpointing:
        raise SciflowError(
            "`offload` saves nothing without `--activation_checkpointing`: the weights of all blocks would stay on "
            "the device for the backward pass. Add it."
        )
    for name in ("quantize_base", "fsdp", "deepspeed", "torch_compile"):
        value = getattr(args, name)
        if value:
            raise SciflowError(f"`offload` cannot work with `{name}` {value!r}: leave one of the two out.")


@arguments
class OffloadArguments:
    """Keeping the frozen weights in host memory."""

    heading: ClassVar[str] = "Offload"

    offload: bool = option(
        False,
        "Keep the frozen weights of the blocks in host memory and copy each to the device only while its layer "
        "computes; needs --activation_checkpointing.",
        check=check,
    )


def offload_blocks(network: Any, device: torch.device | str) -> None:
    """Moves the frozen matrices and kernels in the blocks of `network` to the host, and the rest to `device`.

    A layer gets a copy on `device` before its forward and drops it afterwards. Autograd itself keeps the part that
    the backward pass needs, so gradients are exact with any layout of checkpointing; with activation
    checkpointing the copies of a block live while this block is computed again and differentiated, and no longer.
    Between layers the parameter is None, so nothing (`Module.to`, `state_dict`) can move or copy it by mistake.

    diffusers' group offloading is made for sampling. Its hooks also move trained weights away from their
    gradients, and in a backward pass they fetch the blocks but leave them on the device, because checkpointing breaks
    off a recomputed forward when it has what it needs, before the hook that takes the block away (diffusers 0.42).

    Args:
        network: with its adapter. For its blocks see `block_kinds`.
        device: where it is trained.

    Raises:
        SciflowError: a network that names no blocks, or has nothing frozen in them.
    """
    if getattr(network, "is_offloaded", False):  # by an earlier trainer
        return
    layers = list(_held_layers(network))
    if not layers:
        raise SciflowError(
            f"`offload`: there are no frozen weights in the blocks of {type(network).__name__}. It is for training an "
            "adapter of a diffusers transformer or UNet: leave it out."
        )
    for module, layer, names in layers:
        held = _Held(layer, names, torch.device(device))
        module.register_forward_pre_hook(held.fetch)
        module.register_forward_hook(held.let_go, always_call=True)  # also where checkpointing breaks off
    network.to(device)
    network.is_offloaded = True


class _Held:
    """Weights of one layer on the host, page-locked where there is a GPU so that copies are queued."""

    def __init__(self, layer: torch.nn.Module, names: list[str], device: torch.device) -> None:
        self.layer, self.device = layer, device
        self.weights = {name: _on_host(layer.get_parameter(name)) for name in names}
        self.let_go()

    def fetch(self, *inputs: Any) -> None:
        for name, weight in self.weights.items():
            copy = weight.to(self.device, non_blocking=True, copy=True)
            setattr(self.layer, name, torch.nn.Parameter(copy, requires_grad=False))

    def let_go(self, *inputs: Any) -> None:
        for name in self.weights:
            setattr(self.layer, name, None)


def _on_host(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach().cpu()
    return weight.pin_memory() if torch.cuda.is_available() else weight


def _held_layers(network: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module, list[str]]]:
    """The layers in the blocks: (module to hook, layer, names of its frozen weights of two or more dimensions).

    The module is the layer itself, or PEFT's around it, which in DoRA also reads the weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = block_kinds(network)
    seen = set()
    for block in (module for module in network.modules() if type(module).__name__ in kinds):
        for module in block.modules():
            layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if layer in seen:
                continue
            seen.add(layer)
            names = [n for n, p in layer.named_parameters(recurse=False) if p.ndim > 1 and not p.requires_grad]
            if names:
                yield module, layer, names


def held_bytes(network: torch.nn.Module, share: float = 1.0) -> tuple[int, int]:
    """Bytes that `offload_blocks` would hold on the host, and those of them on the device at once; for estimates.

    At once there are those of the largest block, or of all blocks that keep their activations for the backward pass,
    where only a `share` of them computes them again.
    """
    sizes = {
        layer: sum(p.numel() * p.element_size() for p in map(layer.get_parameter, names))
        for _, layer, names in _held_layers(network)
    }
    kinds = block_kinds(network)
    blocks = (module for module in network.modules() if type(module).__name__ in kinds)
    kept = [block for _, block in blocks_of(network)]
    kept = kept[computed_again(len(kept), share) :]
    inside = {block: sum(sizes.get(m, 0) for m in block.modules()) for block in (*blocks, *kept)}
    return sum(sizes.values()), max([sum(inside[block] for block in kept), *inside.values()])
