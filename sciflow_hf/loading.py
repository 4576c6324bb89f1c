"""Loading published weights: their configurations, errors that say what to do, and no progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import SciflowError


def read_config(path: str, part: str = "", *, revision: str | None = None) -> dict[str, Any]:
    """The configuration of one part of a pipeline ("vae", "transformer", "scheduler"), or of the pipeline itself."""
    from diffusers import ConfigMixin

    with explain_loading(path, f"{part or 'pipeline'} configuration"):
        names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
        reader: Any = type("Reader", (ConfigMixin,), {"config_name": names.get(part, "config.json")})
        found: dict[str, Any] = reader.load_config(path, subfolder=part or None, revision=revision)
        return found


def read_index(path: str, component: str, *, revision: str | None, family: str, network: str) -> dict[str, Any]:
    """`model_index.json` of a pipeline whose `component` is a `network`, which `family` trains; see `check_kind`."""
    index = read_config(path, revision=revision)
    classes = [(index.get(part) or [None, None])[1] for part in (component, "transformer", "unet")]
    check_kind(path, next(filter(None, classes), "pipeline without a network"), family=family, network=network)
    return index


def check_kind(path: str, found: str, *, family: str, network: str) -> None:
    """Raises SciflowError where a checkpoint's network, of class `found`, is another than `family` trains."""
    if found != network:
        raise SciflowError(
            f"`pretrained_model_name_or_path` {path!r} holds a {found}, but `{family}` trains a {network}. Take the "
            "family of that model."
        )


@contextmanager
def explain_loading(path: str, what: str) -> Iterator[None]:
    """Turns the many errors of a missing or gated repository into one that says what to do."""
    try:
        yield
    except Exception as error:  # every layer below has errors of its own, the HTTP client's included
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SciflowError(
            f"`pretrained_model_name_or_path` {path!r}: cannot load its {what} ({reason}). It must be a folder "
            "or a Hub repository in diffusers layout; for a gated one accept its licence and run `hf auth login`."
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of diffusers for a while: validation loads a small VAE again and again."""
    from diffusers.utils import logging as diffusers_logging

    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def network_dtype(model: torch.nn.Module) -> torch.dtype:
    """dtype of the network's own weights, through any wrapper (`model.dtype` fails under DDP).

    Where they are packed in integers, that of what is not: norms and biases. An adapter's, float32, is another.
    """
    first = next(model.parameters())
    if first.is_floating_point():
        return first.dtype
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return next((p for p in floating if not p.requires_grad), floating[0]).dtype


def vae_config(path: str, **where: Any) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL`; `where`: subfolder, revision."""
    from diffusers import AutoencoderKL

    with explain_loading(path, "VAE configuration"):
        return dict(AutoencoderKL.load_config(path, **where))


def load_vae(path: str, *, dtype: Any = None, **where: Any) -> Any:
    """An `AutoencoderKL`, frozen, in evaluation mode; float32 unless given."""
    from diffusers import AutoencoderKL

    with explain_loading(path, "VAE"), quiet_loading():
        vae = AutoencoderKL.from_pretrained(path, torch_dtype=dtype or torch.float32, **where)
        return vae.requires_grad_(False).eval()
