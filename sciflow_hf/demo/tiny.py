"""What the tiny pipelines share: how weights are drawn, tokenizers, text encoders, pixels to measure latents on."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..diffusion.randomness import hash64
from ..errors import SciflowError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def dims_of(size: str, sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Widths and lengths of the pipeline of one size.

    Raises:
        SciflowError: no such size.
    """
    if size not in sizes:
        raise SciflowError(f"`size` is {size!r}; allowed: {', '.join(map(repr, sizes))}.")
    return sizes[size]


def redraw(model: "nn.Module", seed: int, part: str, gains: dict[str, float] | None = None) -> None:
    """Draws every parameter anew from (seed, part, its name): weights with std gain / sqrt(fan_in).

    The gain is 1.6 unless `gains` has a name that occurs in the parameter's. Vectors that scale (norms) stay
    near one, biases near zero. A generator per name keeps the others when a library adds a parameter.
    """
    import numpy as np
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.from_numpy(
                np.random.default_rng(hash64(seed, part, name)).standard_normal(tuple(parameter.shape))
            )
            if parameter.ndim > 1:
                gain = next((value for key, value in (gains or {}).items() if key in name), 1.6)
                value = draw * gain / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                value = 1 + 0.2 * draw
            else:
                value = 0.1 * draw
            parameter.copy_(value)


def rounded(values: "torch.Tensor") -> "torch.Tensor":
    """Three significant digits."""
    import torch

    scale = 10.0 ** (2 - torch.floor(torch.log10(values.abs().clamp_min(1e-12))))
    return torch.round(values * scale) / scale


def probe(seed: int) -> "torch.Generator":
    """Draws the inputs on which the size of a network's output is measured."""
    import torch

    return torch.Generator().manual_seed(hash64(seed, "probe") & 0xFFFFFFFF)


def quiet(channels: int, fastest: float = 0.005) -> "torch.Tensor":
    """Factors for the weights that read a sinusoidal embedding's cosines, then sines: (channels,).

    Trained networks are smooth in the timestep (0 to 1000): frequencies above `fastest` (radians a unit) count less.
    """
    import torch

    half = channels // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    return (fastest / frequencies).clamp_max(1).repeat(2)


def sample_pixels(seed: int) -> "list[torch.Tensor]":
    """Drawn figures of about 96x72 pixels in [-1, 1], (1, 3, H, W) each."""
    import numpy as np
    import torch

    from .figures import draw_figures

    pages = ((320, 240), (240, 320), (400, 160))  # times 0.3: multiples of 8 pixels
    return [
        torch.from_numpy(np.array(figure.image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        for figure in draw_figures(24, seed=seed, pixels_per_unit=0.3, page_sizes=pages)
    ]


def word_merges(words: Iterable[Sequence[str]]) -> dict[tuple[str, str], None]:
    """Merges of byte pairs that put words, sequences of letters, together from left to right into one token each."""
    return dict.fromkeys(("".join(word[:i]), word[i]) for word in words for i in range(1, len(word)))


def clip_tokenizer(length: int, *, pad_token: str) -> "PreTrainedTokenizerBase":
    """Bytes as tokens, no merges: nothing to train. As in CLIP, `!` is the lowest id and the end the highest."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(char + "</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=length)


def t5_tokenizer() -> "PreTrainedTokenizerBase":
    """Printable ASCII characters as tokens."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def clip(tokenizer: Any, width: int, seed: int, part: str, *, projected: bool) -> "nn.Module":
    """A CLIP text encoder of three layers; `projected`: with the projection of its pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu" if part == "text_encoder" else "gelu",
        bos_token_id=0,
        eos_token_id=2,  # as published: the pooled state is that of the highest id
        pad_token_id=1,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    gains = {"token_embedding": 3.0, "position_embedding": 1.0, "out_proj": 0.8, "fc2": 0.8}
    redraw(model, seed, part, gains=gains)
    return model


def t5(tokenizer: Any, width: int, seed: int, part: str) -> "nn.Module":
    """A T5 v1.1 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config).eval()
    redraw(model, seed, part, gains={"shared": 4.0, ".q.": 0.5, "relative_attention_bias": 1.0})
    return model
