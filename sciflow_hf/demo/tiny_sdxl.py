"""A tiny Stable Diffusion XL pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tiny import LATENT_CHANNELS, clip, clip_tokenizer, drawn, image_vae, quiet, rounded

TEXT_LENGTH = 77

# With the two levels of the UNet sides are multiples of 8 pixels (the real SDXL: 32).
# `texts`: widths of the text encoders; `size_channels`: of the embedding of each number of `time_ids`.
SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae": (4, 8, 8), "unet": (8, 16), "head_dim": 8, "texts": (8, 12), "size_channels": 8},
    "demo": {"vae": (8, 16, 16), "unet": (16, 32), "head_dim": 16, "texts": (16, 24), "size_channels": 16},
}


def pipeline(
    seed: int,
    *,
    vae: Sequence[int],
    unet: Sequence[int],
    head_dim: int,
    texts: Sequence[int],
    size_channels: int,
) -> Any:
    """Words of captions are tokens, those of the file next to this one: captions of figures are 20 to 60."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    listed = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split()
    words = [[*word[:-1], word[-1] + "</w>"] for word in listed]
    tokenizer, tokenizer_2 = (clip_tokenizer(TEXT_LENGTH, pad_token=pad, words=words) for pad in ("<|endoftext|>", "!"))
    # As published.
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(**noise, timestep_spacing="leading", steps_offset=1),
        vae=_vae(seed, vae),
        text_encoder=clip(tokenizer, texts[0], seed, "text_encoder", projected=False),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer_2, texts[1], seed, "text_encoder_2", projected=True),
        tokenizer_2=tokenizer_2,
        unet=_unet(seed, unet, head_dim, texts, size_channels),
        add_watermarker=False,
    )


def _vae(seed: int, channels: Sequence[int]) -> Any:
    """A scale that brings drawn figures to deviation 1."""
    import torch
    from diffusers import AutoencoderKL

    model, latents = image_vae(AutoencoderKL, seed, channels)
    scale = rounded(1 / torch.cat([mean.flatten().double() for mean in latents]).std())
    model.register_to_config(scaling_factor=float(f"{float(scale):.3g}"))
    return model


def _unet(seed: int, channels: Sequence[int], head_dim: int, texts: Sequence[int], size_channels: int) -> Any:
    """As in SDXL, a level of convolutions above one with attention."""
    import torch
    from diffusers import UNet2DConditionModel

    width, pooled = sum(texts), texts[1]
    model = UNet2DConditionModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(number // head_dim for number in channels),  # in truth the number of heads
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_channels,
        projection_class_embeddings_input_dim=6 * size_channels + pooled,
    )
    inputs = {
        "sample": (4, LATENT_CHANNELS, 8, 12),
        "timestep": torch.tensor([100, 400, 700, 950]),
        "encoder_hidden_states": (4, TEXT_LENGTH, width),
        "added_cond_kwargs": {
            "text_embeds": (4, pooled),
            "time_ids": torch.tensor([[48.0, 32.0, 0.0, 4.0, 32.0, 48.0]]).repeat(4, 1),
        },
    }
    smooth = {
        "time_embedding.linear_1": quiet(channels[0]),
        # Networks are also smooth in sizes (here about 100).
        "add_embedding.linear_1": torch.cat([torch.ones(pooled), quiet(size_channels, 0.05).repeat(6)]),
    }
    return drawn(model, seed, inputs, smooth=smooth, part="unet", scaled=("conv_out.weight", "conv_out.bias"))
