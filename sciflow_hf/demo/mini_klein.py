"""`mini_klein`, a FLUX.2 klein pipeline of 3.6 million parameters for small figures: its parts before training."""

from pathlib import Path
from typing import Any

from .folders import write_pipeline
from .mini_figures import COLOURS, COUNTS, KINDS
from .mini_vae import LATENT_CHANNELS
from .tiny import FLUX_SCHEDULER, QWEN_TOKENS, qwen3, qwen_tokenizer

TEXT_LENGTH = 16  # tokens; a caption has 9 to 13
_TEXT_HIDDEN = 32
_OTHER_WORDS = (
    "A An a an with and on in of the style night dark light bright page paper background figure plot chart "
    "white black grey brown one five six bar line point slice box axes grid frame small large"
)
# The prompt alone between two tokens: text tokens take part in attention, so fewer are faster.
_CHAT_TEMPLATE = "{%- for message in messages %}{{- '<|im_start|>' + message.content + '<|im_end|>' }}{%- endfor %}"


def start_mini_klein(folder: str | Path, vae: Any, *, seed: int = 0) -> Path:
    """Writes a klein pipeline around a trained VAE, its transformer as diffusers initialises it.

    Raises:
        SciflowError: the folder holds something.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        listed = [" ".join([*KINDS, *KINDS.values(), *COLOURS, *COUNTS]), _OTHER_WORDS]
        words = (f"Ġ{word}" for word in dict.fromkeys(" ".join(listed).split()))
        tokenizer = qwen_tokenizer(QWEN_TOKENS, words, chat_template=_CHAT_TEMPLATE, length=512)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=5,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=3 * _TEXT_HIDDEN,
            axes_dims_rope=(4, 12, 12, 4),
            guidance_embeds=False,
        )
        pipeline: Any = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
            vae=vae,
            text_encoder=_text_encoder(tokenizer, seed),
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=False,
        )
    return write_pipeline(folder, pipeline)


def _text_encoder(tokenizer: Any, seed: int) -> Any:
    """Random, and never trained: each token becomes 3 x 32 numbers of its own, and padding becomes zeros.

    The attention writes nothing and the embedding of padding is zero. So the rows of a prompt do not depend on how
    far it is padded, as those of a real klein do; the transformer sees the order by the position ids.
    """
    import torch

    model = qwen3(
        tokenizer,
        seed,
        gains={"embed_tokens": 5.0, "down_proj": 0.3},
        hidden_size=_TEXT_HIDDEN,
        intermediate_size=_TEXT_HIDDEN,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.pad_token_id] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model
