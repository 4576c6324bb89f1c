"""Shared by commands: their device and processes, the dtype that they compute in, and options handed on by name."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ..errors import SciflowError


def find_device(name: str) -> Any:
    """The `torch.device` of `--device`; "auto" is a GPU if there is one. SciflowError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SciflowError(f"`device` {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SciflowError(f"`device` {name!r}: there is no CUDA device here. Use `--device cpu`.")
    return device


def inference_dtype(device: Any) -> Any:
    """bfloat16, on CPUs float32."""
    import torch

    return torch.float32 if device.type == "cpu" else torch.bfloat16


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """This process's device, and its `rank`, `world_size` and `barrier` under torchrun or accelerate; {} if alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield find_device(device), {}
        return
    from datetime import timedelta

    from accelerate import PartialState

    # Ranks wait for the slowest, however long that takes.
    state = PartialState(cpu=find_device(device).type == "cpu", timeout=timedelta(days=30))
    try:
        ranks = {"rank": state.process_index, "world_size": state.num_processes, "barrier": state.wait_for_everyone}
        yield state.device, ranks
        state.wait_for_everyone()  # a rank that leaves early may take the others with it
    finally:
        state.destroy_process_group()


_PARTS = ("vae_name_or_path", "text_encoder_name_or_path", "text_encoder_2_name_or_path", "text_encoder_3_name_or_path")
_NETWORK = "network_name_or_path"


def add_parts(add: Any, *, network: bool = False) -> None:
    """Adds the options of parts of a pipeline that have a path of their own."""
    for name in (*_PARTS, *([_NETWORK] if network else [])):
        part = name.removesuffix("_name_or_path").replace("_", " ")
        add(f"--{name}", help=f"folder, Hub repository or safetensors file of the {part}, instead of the pipeline's")


def named_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Those that are given."""
    return {name: value for name in (*_PARTS, _NETWORK) if (value := getattr(args, name, None)) is not None}


def named(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """These options, their names between spaces, as keyword arguments."""
    return {name: getattr(args, name) for name in names.split()}
