"""A tiny FLUX.1 pipeline, with guidance embedding as dev."""

from collections.abc import Sequence
from typing import Any

from .tiny import FLUX_SCHEDULER, LATENT_CHANNELS, clip, clip_tokenizer, drawn, quiet, t5, t5_tokenizer
from .tiny_sd3 import CLIP_WIDTH, T5_WIDTH, TIME_CHANNELS, vae

SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "heads": 2, "clip_length": 16},
    "demo": {"vae_channels": (8, 16, 16), "heads": 4, "clip_length": 77},
}


def pipeline(seed: int, *, vae_channels: Sequence[int], heads: int, clip_length: int) -> Any:
    """CLIP for the pooled text, T5 for its tokens; double and single blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    tokenizer, tokenizer_2 = clip_tokenizer(clip_length, pad_token="<|endoftext|>"), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=vae(seed, vae_channels),
        text_encoder=clip(tokenizer, CLIP_WIDTH, seed, "text_encoder", projected=False),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2, T5_WIDTH, seed, "text_encoder_2"),
        tokenizer_2=tokenizer_2,
        transformer=_transformer(seed, heads),
    )


def _transformer(seed: int, heads: int) -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    channels = 4 * LATENT_CHANNELS
    model = FluxTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),  # published: 16, 56, 56 of 128
    )
    inputs = {
        "hidden_states": (4, 24, channels),
        "encoder_hidden_states": (4, 12, T5_WIDTH),
        "pooled_projections": (4, CLIP_WIDTH),
        "timestep": torch.tensor([0.1, 0.4, 0.7, 0.95]),
        "guidance": torch.ones(4),
        "img_ids": torch.cartesian_prod(*(torch.arange(side) for side in (1, 4, 6))),
        "txt_ids": torch.zeros(12, 3, dtype=torch.int64),
    }
    embedders = (f"time_text_embed.{name}_embedder.linear_1" for name in ("timestep", "guidance"))
    # Modulations of half size: larger ones leave little that training can build on.
    return drawn(model, seed, inputs, smooth=dict.fromkeys(embedders, quiet(TIME_CHANNELS)), gains={"norm": 0.5})
