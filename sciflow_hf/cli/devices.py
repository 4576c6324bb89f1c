"""What commands share: their device, the dtype that they compute in, and options handed on by name."""

import argparse
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


def named(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """These options, their names between spaces, as keyword arguments."""
    return {name: getattr(args, name) for name in names.split()}
