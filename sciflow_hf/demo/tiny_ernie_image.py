"""A tiny ERNIE-Image pipeline, without the prompt enhancer."""

from collections.abc import Sequence
from typing import Any

from .tiny import LATENT_CHANNELS, drawn, quiet, redraw, t5_tokenizer
from .tiny_flux2 import PIXTRAL
from .tiny_flux2_klein import vae

SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "heads": 2, "text_length": 90},
    "demo": {"vae_channels": (8, 16, 16), "heads": 4, "text_length": 256},
}
_TEXT_HIDDEN = 16


def pipeline(seed: int, *, vae_channels: Sequence[int], heads: int, text_length: int) -> Any:
    """A text encoder of three layers, of which the last is not read, and two blocks."""
    from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler

    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = text_length
    return ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed, vae_channels),
        text_encoder=_text_encoder(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=_transformer(seed, heads),
    )


def _text_encoder(tokenizer: Any, seed: int) -> Any:
    from transformers import Mistral3Config, Mistral3Model

    config = Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": len(tokenizer),
            "hidden_size": _TEXT_HIDDEN,
            "intermediate_size": 2 * _TEXT_HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vision_config=PIXTRAL,
    )
    model = Mistral3Model(config).eval()
    redraw(model, seed, "text_encoder", gains={"embed_tokens": 4.0})
    return model


def _transformer(seed: int, heads: int) -> Any:
    import torch
    from diffusers import ErnieImageTransformer2DModel

    channels = 4 * LATENT_CHANNELS
    model = ErnieImageTransformer2DModel(
        hidden_size=16 * heads,
        num_attention_heads=heads,
        num_layers=2,
        ffn_hidden_size=32 * heads,
        in_channels=channels,
        out_channels=channels,
        text_in_dim=_TEXT_HIDDEN,
        rope_axes_dim=(4, 6, 6),  # published: 32, 48, 48 of 128
    )
    inputs = {
        "hidden_states": (4, channels, 4, 6),
        "timestep": torch.tensor([100.0, 400.0, 700.0, 950.0]),
        "text_bth": (4, 12, _TEXT_HIDDEN),
        "text_lens": torch.tensor([12, 12, 9, 5]),
    }
    # Modulations of half size: larger ones leave little that training can build on.
    smooth = {"time_embedding.linear_1": quiet(16 * heads)}
    scaled = ("final_linear.weight", "final_linear.bias")
    return drawn(model, seed, inputs, smooth=smooth, gains={"adaLN": 0.5}, scaled=scaled)
