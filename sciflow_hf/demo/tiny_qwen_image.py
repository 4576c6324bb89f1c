"""A tiny Qwen-Image pipeline."""

from pathlib import Path
from typing import Any

from .tiny import (
    FLUX_SCHEDULER,
    LATENT_CHANNELS,
    QWEN_TOKENS,
    drawn,
    latents_of_figures,
    quiet,
    qwen_tokenizer,
    redraw,
    rounded,
)

SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_width": 4, "heads": 2, "layers": 2},
    "demo": {"vae_width": 8, "heads": 4, "layers": 3},
}
_TEXT_HIDDEN = 16
_TIME_CHANNELS = 256  # fixed in diffusers' network

# As published: a flatter line than FLUX's, and a last sampling step at 0.02.
_SCHEDULER = FLUX_SCHEDULER | {"shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def pipeline(seed: int, *, vae_width: int, heads: int, layers: int, halvings: int = 2) -> Any:
    """Words of captions are tokens: those of the file next to this one. Latents are 2^`halvings` times smaller."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    words = [line.replace("_", "Ġ") for line in lines if line and not line.startswith("#")]
    tokenizer = qwen_tokenizer((*QWEN_TOKENS, *_VISION_TOKENS), words)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER),
        vae=_vae(seed, vae_width, halvings),
        text_encoder=_text_encoder(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=_transformer(seed, heads, layers),
    )


def _text_encoder(tokenizer: Any, seed: int) -> Any:
    """Two layers of width 16, and a vision tower, which reads the sources of edits."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    names = ("vision_start", "vision_end", "image", "video")
    ids = tokenizer.convert_tokens_to_ids(list(_VISION_TOKENS))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _TEXT_HIDDEN,
            "intermediate_size": 2 * _TEXT_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            # Three sections make up half of the head's 8 numbers; the short base lets positions show in a tiny head.
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": _TEXT_HIDDEN,
            "fullatt_block_indexes": [0],
        },
        **{f"{name}_token_id": number for name, number in zip(names, ids, strict=True)},
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    redraw(model, seed, "text_encoder", gains={"embed_tokens": 4.0})
    return model


def _vae(seed: int, width: int, halvings: int) -> Any:
    """The mean and deviation of its latents are measured on drawn figures."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1] + [2] * halvings,
        num_res_blocks=1,
        temperal_downsample=[False] * (halvings - 1) + [True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    ).eval()
    redraw(vae, seed, "vae", gains={"quant_conv": 1.0})
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):  # a norm's scale, of more than one dimension here
                parameter.copy_(1 + parameter / 8)
    latents = latents_of_figures(vae, seed, frames=True)
    both = torch.cat([latent[0].flatten(1) for latent in latents], dim=1).double()  # (C, pixels)
    vae.register_to_config(latents_mean=rounded(both.mean(1)).tolist(), latents_std=rounded(both.std(1)).tolist())
    return vae


def _transformer(seed: int, heads: int, layers: int) -> Any:
    import torch
    from diffusers import QwenImageTransformer2DModel

    channels = 4 * LATENT_CHANNELS
    model = QwenImageTransformer2DModel(
        in_channels=channels,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=_TEXT_HIDDEN,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": (4, 24, channels),
        "encoder_hidden_states": (4, 12, _TEXT_HIDDEN),
        "timestep": torch.tensor([0.1, 0.4, 0.7, 0.95]),
        "img_shapes": [[(1, 4, 6)]] * 4,
    }
    return drawn(model, seed, inputs, smooth={"time_text_embed.timestep_embedder.linear_1": quiet(_TIME_CHANNELS)})
