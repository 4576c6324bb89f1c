"""FSDP2: what it may be combined with, and files of weights that it spreads over the ranks."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..adapters.initial import INITIAL
from ..adapters.layers import adapter_layers, adapter_parameters
from ..adapters.text_encoders import NetworkWithText
from ..errors import SciflowError

if TYPE_CHECKING:
    from ..training.trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""They compute element by element, so that a rank needs only its shard."""


def check_sharding(trainer: "DiffusionTrainer") -> None:
    """Refuses what FSDP cannot work with, and sets how it computes: as without it.

    Parameters are gathered in the dtype of the run and gradients added up in float32. Inputs of blocks are not cast:
    16 bits are too few for noise levels.

    Raises:
        SciflowError: FSDP1, or an option that does not go with FSDP.
    """
    if not trainer.is_fsdp_enabled:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    args, plugin = trainer.args, trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise SciflowError("`fsdp_version` 1 is being removed from the libraries: use 2 (`fsdp_version: 2`).")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in OPTIMIZERS:
        raise SciflowError(f"`optim` {optim!r} does not know of sharded weights: use one of {', '.join(OPTIMIZERS)}.")
    for name in ("quantize_base", "offload", "fp16"):  # a launch file switches FSDP on without `--fsdp`, too
        if getattr(args, name):
            raise SciflowError(f"`{name}` {getattr(args, name)!r} cannot work with FSDP: leave one of the two out.")
    if isinstance(trainer.model, NetworkWithText):
        raise SciflowError("`train_text_encoder` cannot work with FSDP, which knows the blocks of one network only.")
    if plugin.activation_checkpointing:
        raise SciflowError("`fsdp_activation_checkpointing`: use `--activation_checkpointing`, which does the same.")
    classes = {type(module).__name__ for module in trainer.model.modules()}
    for name in plugin.transformer_cls_names_to_wrap or ():
        if name not in classes:
            raise SciflowError(
                f"`fsdp_transformer_layer_cls_to_wrap` {name!r}: {type(trainer.model).__name__} has no such layer. "
                "Leave it out: the blocks of each network are known."
            )
    plugin.cpu_ram_efficient_loading = False  # every rank has loaded the weights
    dtype = None if args.weight_dtype == torch.float32 else args.weight_dtype
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


class WholeWeights:
    """A plain network beside a sharded one, whole on the first rank where files are written and read.

    Of the frozen weights under an adapter it has the shapes only. All methods are for all ranks at once.

    Args:
        model: the network before it is sharded.
    """

    def __init__(self, model: Any) -> None:
        # By the names in the network: those in its state dict are the same.
        self.names = list(adapter_parameters(model) | adapter_parameters(model, INITIAL))
        if not adapter_layers(model):
            self.names = [name for name, _ in model.named_parameters()]
        empty = {
            id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        self.network = copy.deepcopy(model, empty)

    def gather(self, sharded: torch.nn.Module) -> Any:
        """The plain network with the weights of the sharded one; on other ranks than the first it stays empty."""
        found = dict(sharded.named_parameters())
        for name in self.names:
            value = whole(found[name].detach())
            if value is not None:
                path, _, own = name.rpartition(".")
                parameter = torch.nn.Parameter(value, requires_grad=found[name].requires_grad)
                setattr(self.network.get_submodule(path), own, parameter)
        return self.network

    def scatter(self, sharded: torch.nn.Module) -> None:
        """Gives the weights of the plain network on the first rank to the sharded one."""
        found = dict(sharded.named_parameters())
        for name in self.names:
            value = self.network.get_parameter(name).detach()
            if value.is_meta:
                value = torch.empty(value.shape, dtype=value.dtype)
            local(found[name]).data.copy_(_shard(value, found[name], source=0).to_local())


def whole(value: Any) -> Any:
    """A tensor in one piece on the host of the first rank, None on the others; what is no DTensor as it is."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else None


def _shard(value: torch.Tensor, like: Any, source: int | None = None) -> DTensor:
    """A whole tensor sharded as another: the tensor of rank `source`, or on each rank the part of its own."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=source)


def local(parameter: Any) -> torch.Tensor:
    """What of a parameter lies on this rank, not a copy; without autograd's way back to it."""
    if not isinstance(parameter, DTensor):
        return parameter
    sharded: Any = parameter.detach()
    return sharded.to_local().requires_grad_(parameter.requires_grad)


def whole_like(values: torch.Tensor, parameter: Any) -> Any:
    """`whole` of values that lie as `local(parameter)`."""
    if not isinstance(parameter, DTensor):
        return values
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return whole(DTensor.from_local(values, mesh, parameter.placements, run_check=False, shape=shape, stride=stride))


def local_like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """What of a whole tensor, which every rank has, lies as `local(parameter)`."""
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
def as_without_fsdp(trainer: Any) -> Iterator[None]:
    """The Trainer takes the way of one process."""
    before, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
    try:
        yield
    finally:
        trainer.is_fsdp_enabled = before


def whole_state(optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer as one process would have it, on the first rank. All ranks."""
    state = optimizer.state_dict()
    values = {i: {name: whole(value) for name, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": values}


def load_whole_state(optimizer: Any, path: Path) -> None:
    """Loads what `whole_state` gave, each rank its part of the file."""
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def sharded(entry: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
        moments = {n: v for n, v in entry.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
        return {**entry, **{name: _shard(value, parameter) for name, value in moments.items()}}

    state = {i: sharded(entry, parameters[i]) for i, entry in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})
