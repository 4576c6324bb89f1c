"""A tiny FLUX.1 Kontext pipeline. Its VAE halves four times: sources of 1 megapixel are 1024 tokens."""

from typing import Any

from . import tiny_flux

SIZES: dict[str, dict[str, Any]] = {
    "test": tiny_flux.SIZES["test"] | {"vae_channels": (4, 4, 8, 8, 8)},
    "demo": tiny_flux.SIZES["demo"] | {"vae_channels": (8, 8, 16, 16, 16)},
}


def pipeline(seed: int, **size: Any) -> Any:
    """The parts of `tiny_flux`."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**tiny_flux.pipeline(seed, **size).components)
