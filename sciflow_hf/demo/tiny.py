"""Tiny pipelines of random, non-degenerate weights for the demo and the tests, and what their modules share.

`tiny_<family>.py` has `pipeline(seed, **SIZES[size])`. Where a VAE has three levels, its latents are 4x smaller; with
the 2x2 patches a token is 8x8 pixels (the published networks': 16x16).
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion.randomness import hash64
from ..errors import SciflowError
from .folders import write_pipeline

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# The scheduler of the published FLUX.1-dev and FLUX.2 klein. Its line, 0.5 at 256 tokens to 1.15 at 4096, and its
# exponential form are diffusers' defaults.
FLUX_SCHEDULER: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
LATENT_CHANNELS = 4
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tiny(folder: str | Path, family: str = "flux2_klein", *, seed: int = 0, size: str = "demo") -> Path:
    """Writes a family's pipeline folder, which the diffusers class of the published one loads.

    The weights are random but drawn so that all inputs show in the network's output (positions, timestep scale, each
    text and its order; the default initialisation gives a nearly constant one). One seed gives the same bytes.

    Args:
        folder: where to write; must not exist or be empty. It appears complete or not at all.
        family: one that has a file `tiny_<family>.py` here.
        seed: changes every weight.
        size: "test" is the smallest (a forward takes milliseconds), "demo" can learn something in 150 steps.

    Returns:
        The folder.

    Raises:
        SciflowError: `family` or `size` is unknown, or the folder holds something.
    """
    import torch

    families = sorted(file.stem.removeprefix("tiny_") for file in Path(__file__).parent.glob("tiny_*.py"))
    if family not in families:
        raise SciflowError(
            f"the demo has no pipeline for `{family}`, only for {', '.join(families)}: name one of yours."
        )
    module = import_module(f".tiny_{family}", __package__)
    if size not in module.SIZES:
        raise SciflowError(f"`size` is {size!r}; allowed: {', '.join(map(repr, module.SIZES))}.")
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights that are replaced
        return write_pipeline(folder, module.pipeline(seed, **module.SIZES[size]))


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


def quiet(channels: int, fastest: float = 0.005) -> "torch.Tensor":
    """Factors for the weights that read a sinusoidal embedding's cosines, then sines: (channels,).

    Trained networks are smooth in the timestep (0 to 1000): frequencies above `fastest` (radians a unit) count less.
    """
    import torch

    half = channels // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    return (fastest / frequencies).clamp_max(1).repeat(2)


def drawn(
    network: Any,
    seed: int,
    inputs: dict[str, Any],
    *,
    smooth: Mapping[str, "torch.Tensor"],
    part: str = "transformer",
    gains: dict[str, float] | None = None,
    scaled: Sequence[str] = ("proj_out.weight",),
) -> Any:
    """`network` with weights drawn anew, whose output has a standard deviation of about one.

    Args:
        inputs: what the deviation is measured on; a tuple is the shape of numbers that are drawn.
        smooth: layer -> factors for the columns of its weight: see `quiet`.
        scaled: parameters that are divided by the deviation.
    """
    import torch

    rng = torch.Generator().manual_seed(hash64(seed, "probe") & 0xFFFFFFFF)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return torch.randn(value, generator=rng) if isinstance(value, tuple) else value

    redraw(network.eval(), seed, part, gains)
    with torch.no_grad():
        for layer, factors in smooth.items():
            network.get_submodule(layer).weight *= factors
        answer = network(**filled(inputs), return_dict=False)[0]
        answer = torch.stack(answer) if isinstance(answer, list) else answer
        scale = rounded(answer.double().std()).float()
        for name in scaled:
            network.get_parameter(name).div_(scale)
    return network


def image_vae(kind: Any, seed: int, channels: Sequence[int], *, last: str = "quant_conv", **options: Any) -> Any:
    """A VAE of diffusers' class `kind` and, as its latents, those of drawn figures: see `latents_of_figures`."""
    model = kind(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=128,
        **options,
    )
    redraw(model.eval(), seed, "vae", gains={last: 1.0})
    return model, latents_of_figures(model, seed, last)


def latents_of_figures(vae: Any, seed: int, last: str = "quant_conv", frames: bool = False) -> "list[torch.Tensor]":
    """Sets the posterior's log-variance near -6; then its means of drawn figures, (1, c, h, w) each.

    Statistics of them are `rounded`, so that the last bit of a convolution on another machine does not change a file.

    Args:
        last: the encoder's last layer, means above log-variances.
        frames: the VAE is one of videos: (1, c, 1, h, w).
    """
    import torch

    layer = vae.get_submodule(last)
    with torch.no_grad():
        layer.weight[LATENT_CHANNELS:] *= 0.05
        layer.bias[LATENT_CHANNELS:] = -6.0
        pixels = (x.unsqueeze(2) if frames else x for x in sample_pixels(seed))
        return [vae.encode(x).latent_dist.mode() for x in pixels]


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


def qwen_tokenizer(
    special: Sequence[str], words: Iterable[Sequence[str]] = (), *, chat_template: str | None = None, length: int = 4096
) -> Any:
    """Bytes, and `words` put together: nothing to train, so nothing that could differ between machines."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer  # also known as Qwen2TokenizerFast

    merges = word_merges(words)
    tokens = dict.fromkeys([*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)])
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.model_max_length = length
    return tokenizer


def clip_tokenizer(length: int, *, pad_token: str, words: Iterable[Sequence[str]] = ()) -> "PreTrainedTokenizerBase":
    """Bytes, and `words` put together. As in CLIP, `!` is the lowest id and the end of the text the highest."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet, merges = sorted(ByteLevel.alphabet()), word_merges(words)
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), pad_token=pad_token, model_max_length=length)


def t5_tokenizer() -> "PreTrainedTokenizerBase":
    """Printable ASCII characters as tokens."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def qwen3(tokenizer: Any, seed: int, *, gains: dict[str, float], num_hidden_layers: int = 28, **options: Any) -> Any:
    """28 layers, of which klein reads hidden states 9, 18 and 27."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=num_hidden_layers,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        **options,
    )
    model = Qwen3ForCausalLM(config).eval()
    redraw(model, seed, "text_encoder", gains=gains)
    return model


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
