"""A tiny FLUX.2 [dev] pipeline: that of klein with another text encoder and a guidance embedding."""

from typing import Any

from . import tiny_flux2_klein
from .tiny import qwen_tokenizer, redraw

SIZES = tiny_flux2_klein.SIZES
_TEXT_HIDDEN = 16
# Of a vision tower, which reads no prompt.
PIXTRAL = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
# Mistral's, of a system message and a turn whose content is a list of parts.
_CHAT_TEMPLATE = (
    "{{- '<s>' }}{%- for message in messages %}{{- '[' + message.role + ']' }}"
    "{%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '[/' + message.role + ']' }}{%- endfor %}"
)


def pipeline(seed: int, **size: Any) -> Any:
    """31 layers of text encoder whose hidden states 10, 20 and 30 differ clearly, and a vision tower, never used.

    Words of the system message are tokens.
    """
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    roles = [f"[{end}{role}]" for role in ("system", "user") for end in ("", "/")]
    words = [f"Ġ{word}" for word in SYSTEM_MESSAGE.split()]
    tokenizer = qwen_tokenizer(("<|endoftext|>", "<|im_end|>", "<s>", *roles), words, chat_template=_CHAT_TEMPLATE)
    parts = tiny_flux2_klein.pipeline(seed, guidance_embeds=True, **size).components
    parts |= {"text_encoder": _text_encoder(tokenizer, seed), "tokenizer": tokenizer}
    return Flux2Pipeline(**parts)


def _text_encoder(tokenizer: Any, seed: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": _TEXT_HIDDEN,
            "intermediate_size": 2 * _TEXT_HIDDEN,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": tokenizer.model_max_length,
        },
        vision_config=PIXTRAL,
    )
    model = Mistral3ForConditionalGeneration(config).eval()
    # Residual layers add up: half-size writes keep the hidden states of order one to three.
    redraw(model, seed, "text_encoder", gains={"embed_tokens": 4.0, "o_proj": 0.8, "down_proj": 0.8})
    return model
