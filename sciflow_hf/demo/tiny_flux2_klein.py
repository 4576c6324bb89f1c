"""A tiny FLUX.2 klein pipeline."""

from collections.abc import Sequence
from typing import Any

from .tiny import (
    FLUX_SCHEDULER,
    LATENT_CHANNELS,
    QWEN_TOKENS,
    drawn,
    image_vae,
    quiet,
    qwen3,
    qwen_tokenizer,
    rounded,
)

SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "heads": 2},
    "demo": {"vae_channels": (8, 16, 16), "heads": 4},
}
_TEXT_HIDDEN = 16
_TIME_CHANNELS = 64
# What Qwen3's template makes of plain turns without tools; thinking off writes an empty thought.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def pipeline(seed: int, *, vae_channels: Sequence[int], heads: int, guidance_embeds: bool = False) -> Any:
    """28 layers of text encoder whose hidden states 9, 18 and 27 differ clearly; double and single blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from tokenizers import AddedToken

    tokenizer = qwen_tokenizer(QWEN_TOKENS, chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens([AddedToken(token) for token in ("<think>", "</think>")])
    # 28 residual layers add up: half-size writes keep the hidden states of order one to three.
    gains, width = {"embed_tokens": 4.0, "o_proj": 0.8, "down_proj": 0.8}, _TEXT_HIDDEN
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=vae(seed, vae_channels),
        text_encoder=qwen3(
            tokenizer, seed, gains=gains, hidden_size=width, intermediate_size=2 * width, num_attention_heads=2
        ),
        tokenizer=tokenizer,
        transformer=_transformer(seed, heads, guidance_embeds),
        is_distilled=False,
    )


def vae(seed: int, channels: Sequence[int]) -> Any:
    """Batch-norm statistics measured on drawn figures."""
    import torch
    from diffusers import AutoencoderKLFlux2

    model, latents = image_vae(AutoencoderKLFlux2, seed, channels)
    patches = [torch.nn.functional.pixel_unshuffle(mean, 2)[0].flatten(1) for mean in latents]  # order (c, ph, pw)
    tokens = torch.cat(patches, dim=1).T.double()
    model.bn.running_mean.copy_(rounded(tokens.mean(0)))
    model.bn.running_var.copy_(rounded(tokens.var(0)))
    return model


def _transformer(seed: int, heads: int, guidance_embeds: bool) -> Any:
    import torch
    from diffusers import Flux2Transformer2DModel

    channels, zero = 4 * LATENT_CHANNELS, torch.arange(1)
    model = Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=3 * _TEXT_HIDDEN,
        timestep_guidance_channels=_TIME_CHANNELS,
        axes_dims_rope=(4,) * 4,
        guidance_embeds=guidance_embeds,
    )
    inputs = {
        "hidden_states": (4, 24, channels),
        "encoder_hidden_states": (4, 12, 3 * _TEXT_HIDDEN),
        "timestep": torch.tensor([0.1, 0.4, 0.7, 0.95]),
        "img_ids": torch.cartesian_prod(zero, torch.arange(4), torch.arange(6), zero),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(12)),
        "guidance": torch.ones(4) if guidance_embeds else None,
    }
    embedders = ("timestep", "guidance") if guidance_embeds else ("timestep",)
    smooth = {f"time_guidance_embed.{name}_embedder.linear_1": quiet(_TIME_CHANNELS) for name in embedders}
    return drawn(model, seed, inputs, smooth=smooth)
