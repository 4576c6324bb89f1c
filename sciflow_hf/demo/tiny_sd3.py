"""A tiny Stable Diffusion 3 pipeline, as SD3.5 medium.

Normed queries and keys, a second attention in the first block, positions cut out of the middle of a larger grid.
"""

from collections.abc import Sequence
from typing import Any

from .tiny import LATENT_CHANNELS, clip, clip_tokenizer, drawn, image_vae, quiet, rounded, t5, t5_tokenizer

TIME_CHANNELS = 256  # of diffusers' time embedding, for SD3 and FLUX.1 alike

# `max_tokens`: a side of the grid; images of 128 pixels at most in "test".
SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "heads": 2, "clip_length": 16, "max_tokens": 16},
    "demo": {"vae_channels": (8, 16, 16), "heads": 4, "clip_length": 77, "max_tokens": 32},
}

# Widths of the text encoders; the CLIPs' together are smaller than T5's, so that padding to it shows.
CLIP_WIDTH, CLIP_2_WIDTH, T5_WIDTH = 8, 12, 32


def pipeline(seed: int, *, vae_channels: Sequence[int], heads: int, clip_length: int, max_tokens: int) -> Any:
    """Two CLIPs and T5, and two joint blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizer = clip_tokenizer(clip_length, pad_token="<|endoftext|>")
    tokenizer_2 = clip_tokenizer(clip_length, pad_token="!")
    tokenizer_3 = t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # as published
        vae=vae(seed, vae_channels),
        text_encoder=clip(tokenizer, CLIP_WIDTH, seed, "text_encoder", projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer_2, CLIP_2_WIDTH, seed, "text_encoder_2", projected=True),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5(tokenizer_3, T5_WIDTH, seed, "text_encoder_3"),
        tokenizer_3=tokenizer_3,
        transformer=_transformer(seed, heads, max_tokens),
    )


def vae(seed: int, channels: Sequence[int]) -> Any:
    """Shift and scale bring drawn figures to mean 0 and deviation 1."""
    import torch
    from diffusers import AutoencoderKL

    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    model, latents = image_vae(AutoencoderKL, seed, channels, last="encoder.conv_out", **plain)
    values = torch.cat([mean.flatten().double() for mean in latents])
    shift, scale = (float(f"{float(rounded(value)):.3g}") for value in (values.mean(), 1 / values.std()))
    model.register_to_config(shift_factor=shift, scaling_factor=scale)
    return model


def _transformer(seed: int, heads: int, max_tokens: int) -> Any:
    import torch
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=max_tokens,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=CLIP_WIDTH + CLIP_2_WIDTH,
        pos_embed_max_size=max_tokens,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": (4, LATENT_CHANNELS, 8, 12),
        "encoder_hidden_states": (4, 12, T5_WIDTH),
        "pooled_projections": (4, CLIP_WIDTH + CLIP_2_WIDTH),
        "timestep": torch.tensor([100.0, 400.0, 700.0, 950.0]),
    }
    smooth = {"time_text_embed.timestep_embedder.linear_1": quiet(TIME_CHANNELS)}
    # Modulations of half size: larger ones leave little that training can build on.
    return drawn(model, seed, inputs, smooth=smooth, gains={"norm": 0.5})
