"""`--attention_backend`: the kernel of attention, chosen by diffusers' `set_attention_backend`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..errors import SciflowError, first_line
from ..options import arguments, option


def _check_name(args: Any) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = [backend.value for backend in AttentionBackendName]
    if args.attention_backend not in names:
        raise SciflowError(f"`attention_backend` {args.attention_backend!r}: use one of {', '.join(names)}.")


@arguments
class AttentionArguments:
    """Which kernel computes attention."""

    heading: ClassVar[str] = "Attention"

    attention_backend: str | None = option(
        None,
        "Kernel of attention, by its name in diffusers, such as _native_cudnn, _flash_3 or flex; torch chooses one "
        "when not given. Refused where it cannot run or has no backward pass.",
        check=_check_name,
    )


def set_backend(network: Any, args: Any, *, masked: bool, trust_remote_code: bool) -> None:
    """Makes the attention of a network compute by `--attention_backend`, once a small example of it has worked.

    Other networks of the process stay as they are.

    Args:
        network: of diffusers.
        args: with `attention_backend`, the device and the dtype of the run.
        masked: whether texts of different lengths, which need a mask, may share a batch.
        trust_remote_code: whether compiled code of the Hub may run, of which some backends are made.

    Raises:
        SciflowError: the backend cannot run here, or has no backward pass; the network does not use diffusers'
            backends.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = args.attention_backend
    layers = [m for m in network.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
    if not layers:
        raise SciflowError(
            f"`attention_backend` {name!r}: {type(network).__name__} computes attention by torch, not by the backends "
            "of diffusers. Leave it out."
        )
    if name.endswith("_hub") and not trust_remote_code:
        raise SciflowError(
            f"`attention_backend` {name!r} runs compiled code that it downloads from the Hub: add "
            "`--trust_remote_code`, or choose one that is installed."
        )
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        network.set_attention_backend(name)
    except (RuntimeError, ImportError, OSError) as error:
        raise SciflowError(f"`attention_backend` {name!r} cannot run here: {first_line(error)}") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(active)  # which would be that of all other networks
    width = getattr(layers[0], "head_dim", None) or layers[0].inner_dim // layers[0].heads
    masks = [None, torch.ones(2, 1, 1, 32, dtype=torch.bool, device=args.device)][: 1 + masked]
    if refused := _refusal(AttentionBackendName(name), width, args.device, args.weight_dtype, masks):
        network.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(active)
        raise SciflowError(f"`attention_backend` {name!r} {refused}. Choose another one, or leave it out.")


def _refusal(
    backend: Any, width: int, device: torch.device, dtype: torch.dtype, masks: Sequence[torch.Tensor | None]
) -> str:
    """Why a backend cannot train heads of `width` numbers; "" if it can."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    for mask in masks:
        tokens = [torch.ones(2, 32, 2, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        where = f"on {device.type} in {str(dtype).removeprefix('torch.')}" + " with a mask" * (mask is not None)
        try:
            found = dispatch_attention_fn(*tokens, attn_mask=mask, backend=backend)
        except Exception as error:  # kernels raise whatever they like
            needs = " (texts of different lengths need one: take 1 sample per device)" * (mask is not None)
            return f"cannot run {where}{needs}: {first_line(error).rstrip('.')}"
        try:
            found.float().sum().backward()
        except Exception as error:  # kernels raise whatever they like
            return f"has no backward pass {where}: {first_line(error).rstrip('.')}"
        if any(each.grad is None for each in tokens):
            return f"has no backward pass {where}"
    return ""
