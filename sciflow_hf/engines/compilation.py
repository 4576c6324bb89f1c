"""`--torch_compile` with buckets: the repeated blocks of a network are compiled, for changing shapes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate.utils import DynamoBackend

from ..options import arguments, option

RECOMPILE_LIMIT = 64
"""Compilations of one kind of block before torch stops compiling. Its own 8 also count evaluations and base models."""


@arguments
class CompilationArguments:
    """Options of the parent, about what they do here."""

    heading: ClassVar[str] = "Compilation"

    torch_compile: bool = option(False, "Compile the repeated blocks of the network by `torch.compile`.")
    torch_compile_backend: str | None = option(
        None,
        "Backend of `torch.compile`, which it switches on; inductor when not given.",
        choices=[backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO],
    )
    torch_compile_mode: str | None = option(
        None, "Mode of `torch.compile`, which it switches on, such as max-autotune; torch's default when not given."
    )


def compile_blocks(network: Any, args: Any) -> None:
    """Compiles the repeated blocks of `network`, or all of a network without any; each kind of block once for all.

    The blocks are those that diffusers' `compile_repeated_blocks` takes, else those that must not be split. A first
    shape is compiled for itself, a second one for any shape after it. Names of parameters stay as they are, and hooks
    that come later (FSDP) are called.
    """
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    kinds = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or []
    for module in [m for m in network.modules() if type(m).__name__ in kinds] or [network]:
        if module._compiled_call_impl is None:  # by an earlier `train`
            module.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def uncompiled(network: torch.nn.Module) -> AbstractContextManager[Any]:
    """Inside, compiled blocks run as they were written: for the few images of a size that training does not have."""
    if all(module._compiled_call_impl is None for module in network.modules()):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
