"""FSDP2: what it may be combined with, and files of weights that it spreads over the ranks."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import SciflowError
from .checkpointing import block_kinds

ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""They compute element by element, so that a rank needs only its shard."""


def check(args: Any, plugin: Any, model: torch.nn.Module, *, trains_text_encoder: bool) -> None:
    """Raises SciflowError for FSDP1, and for options that FSDP cannot work with.

    Args:
        plugin: accelerate's, which also a launch file without `--fsdp` makes.
        model: before it is sharded.
    """
    if plugin.fsdp_version != 2:
        raise SciflowError("`fsdp_version` 1 is being removed from the libraries: use 2 (`fsdp_version: 2`).")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ELEMENTWISE_OPTIMIZERS:
        allowed = ", ".join(ELEMENTWISE_OPTIMIZERS)
        raise SciflowError(f"`optim` {optim!r} does not know of sharded weights: use one of {allowed}.")
    for name in ("quantize_base", "offload", "fp16"):
        if getattr(args, name):
            raise SciflowError(f"`{name}` {getattr(args, name)!r} cannot work with FSDP: leave one of the two out.")
    if trains_text_encoder:
        raise SciflowError("`train_text_encoder` cannot work with FSDP, which knows the blocks of one network only.")
    if plugin.activation_checkpointing:
        raise SciflowError("`fsdp_activation_checkpointing`: use `--activation_checkpointing`, which does the same.")
    classes = {type(module).__name__ for module in model.modules()}
    for name in plugin.transformer_cls_names_to_wrap or ():
        if name not in classes:
            raise SciflowError(
                f"`fsdp_transformer_layer_cls_to_wrap` {name!r}: {type(model).__name__} has no such layer. "
                "Leave it out: the blocks of each network are known."
            )


def configure(plugin: Any, dtype: torch.dtype, model: torch.nn.Module) -> None:
    """Makes FSDP compute as a run without it does in `dtype`, with a shard for each block of `model`.

    Parameters are gathered in `dtype` and gradients added up in float32. Inputs of blocks are not cast: 16 bits are
    too few for noise levels. accelerate knows the blocks of networks that name those which must not be split.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or block_kinds(model)
    plugin.cpu_ram_efficient_loading = False  # every rank has loaded the weights
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


class GatheredNetwork:
    """The network as one process would have it, with weights on the first rank, where files are written and read.

    Of the weights that no file needs it has the shapes only. All methods are for all ranks at once.

    Args:
        model: the network before it is sharded.
        names: of the parameters that files need.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self.names = list(names)
        empty = {
            id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        self.network = copy.deepcopy(model, empty)

    def gather(self, sharded: torch.nn.Module) -> Any:
        """The network with the weights of the sharded one; on other ranks than the first it stays empty."""
        found = dict(sharded.named_parameters())
        for name in self.names:
            value = gathered(found[name].detach())
            if value is not None:
                path, _, own = name.rpartition(".")
                parameter = torch.nn.Parameter(value, requires_grad=found[name].requires_grad)
                setattr(self.network.get_submodule(path), own, parameter)
        return self.network

    def scatter(self, sharded: torch.nn.Module) -> None:
        """Gives the weights of the network on the first rank to the sharded one."""
        found = dict(sharded.named_parameters())
        for name in self.names:
            value = self.network.get_parameter(name).detach()
            if value.is_meta:
                value = torch.empty(value.shape, dtype=value.dtype)
            local(found[name]).data.copy_(_shard(value, found[name], source=0).to_local())


def gathered(value: Any) -> Any:
    """A complete tensor on the host of the first rank, None on the others; what is no DTensor as it is."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else None


def _shard(value: torch.Tensor, like: Any, source: int | None = None) -> DTensor:
    """A complete tensor sharded as another: the tensor of rank `source`, or on each rank the part of its own."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=source)


def local(parameter: Any) -> torch.Tensor:
    """The part of a parameter on this rank, not a copy; without autograd's way back to it."""
    if not isinstance(parameter, DTensor):
        return parameter
    sharded: Any = parameter.detach()
    return sharded.to_local().requires_grad_(parameter.requires_grad)


def gathered_like(values: torch.Tensor, parameter: Any) -> Any:
    """`gathered` of values that are sharded as `local(parameter)`."""
    if not isinstance(parameter, DTensor):
        return values
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return gathered(DTensor.from_local(values, mesh, parameter.placements, run_check=False, shape=shape, stride=stride))


def local_like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """The part of a complete tensor, which every rank has, that belongs to `local(parameter)`."""
    return _shard(value, parameter).to_local() if isinstance(parameter, DTensor) else value.to(parameter.device)


@contextmanager
def resharded(network: torch.nn.Module) -> Iterator[None]:
    """For forward passes that no backward pass follows: these leave the outer layers gathered, with today's values."""
    from torch.distributed.fsdp import FSDPModule

    try:
        yield
    finally:
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def as_one_process(trainer: Any) -> Iterator[None]:
    """Make `Trainer` behave as if there were one process."""
    before, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
    try:
        yield
    finally:
        trainer.is_fsdp_enabled = before


def gathered_state(optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer as one process would have it, on the first rank. All ranks."""
    state = optimizer.state_dict()
    values = {i: {name: gathered(value) for name, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": values}


def load_gathered_state(optimizer: Any, path: Path) -> None:
    """Loads what `gathered_state` gave, each rank its part of the file."""
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def sharded(entry: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
        moments = {n: v for n, v in entry.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
        return {**entry, **{name: _shard(value, parameter) for name, value in moments.items()}}

    state = {i: sharded(entry, parameters[i]) for i, entry in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})
