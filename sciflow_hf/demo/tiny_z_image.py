"""A tiny Z-Image pipeline. Its network pads images and texts to multiples of 32 tokens, as the published one."""

from collections.abc import Sequence
from typing import Any

from .tiny import LATENT_CHANNELS, QWEN_TOKENS, drawn, quiet, qwen3, qwen_tokenizer
from .tiny_flux2_klein import CHAT_TEMPLATE
from .tiny_sd3 import TIME_CHANNELS, vae

# As published a multiple of 3: the MLPs are 8/3 of the width.
SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "heads": 3},
    "demo": {"vae_channels": (8, 16, 16), "heads": 6},
}
_TEXT_HIDDEN = 16


def pipeline(seed: int, *, vae_channels: Sequence[int], heads: int) -> Any:
    """A refiner of the image, one of the text, and two blocks of both."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from tokenizers import AddedToken

    tokenizer = qwen_tokenizer(QWEN_TOKENS, chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens([AddedToken(token) for token in ("<think>", "</think>")])
    width = {"hidden_size": _TEXT_HIDDEN, "intermediate_size": 2 * _TEXT_HIDDEN, "num_attention_heads": 2}
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed, vae_channels),
        text_encoder=qwen3(tokenizer, seed, gains={"embed_tokens": 4.0}, num_hidden_layers=3, **width).model,
        tokenizer=tokenizer,
        transformer=_transformer(seed, heads),
    )


def _transformer(seed: int, heads: int) -> Any:
    import torch
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=16 * heads,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=_TEXT_HIDDEN,
        axes_dims=[4, 6, 6],  # published: 32, 48, 48 of 128
        axes_lens=[1024, 64, 64],
    )
    rng = torch.Generator().manual_seed(seed)
    inputs = {
        "x": list(torch.randn(4, LATENT_CHANNELS, 1, 8, 12, generator=rng)),
        "t": torch.tensor([0.1, 0.4, 0.7, 0.95]),
        "cap_feats": list(torch.randn(4, 12, _TEXT_HIDDEN, generator=rng)),
    }
    last = "all_final_layer.2-1.linear"
    # Modulations of half size: larger ones leave little that training can build on.
    return drawn(
        model, seed, inputs, smooth={"t_embedder.mlp.0": quiet(TIME_CHANNELS)}, gains={"adaLN": 0.5},
        scaled=(f"{last}.weight", f"{last}.bias"),
    )  # fmt: skip
