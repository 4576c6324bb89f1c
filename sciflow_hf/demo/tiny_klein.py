"""A tiny FLUX.2 klein pipeline of random, non-degenerate weights: for the demo and the tests, no download."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .folders import write_pipeline
from .tiny import dims_of, probe, quiet, redraw, rounded, sample_pixels

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TEXT_HIDDEN = 16
TEXT_LAYERS = 28  # klein reads hidden states 9, 18 and 27
_TIME_CHANNELS = 64

# The published klein checkpoints' scheduler: shift by resolution, exponential form.
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}

# Three levels in the VAE: 4x smaller, with the 2x2 patches a token is 8x8 pixels (the real klein: 16x16).
_SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "latent": 4, "heads": 2, "head_dim": 16, "double": 1, "single": 2},
    "demo": {"vae_channels": (8, 16, 16), "latent": 4, "heads": 4, "head_dim": 16, "double": 1, "single": 2},
}

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK_TOKENS = ("<think>", "</think>")

# What Qwen3's template makes of plain turns without tools; thinking off writes an empty thought.
_CHAT_TEMPLATE = (
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


def make_tiny_klein(folder: str | Path, *, seed: int = 0, size: Literal["demo", "test"] = "demo") -> Path:
    """Writes a klein pipeline folder that `diffusers.Flux2KleinPipeline.from_pretrained` loads.

    The weights are random but drawn so that position ids, timestep scale, text and its order all show in the
    network's output (the default initialisation gives a nearly constant one). One seed gives the same bytes.

    Args:
        folder: where to write; must not exist or be empty. It appears complete or not at all.
        seed: changes every weight.
        size: "test" is the smallest (a forward takes milliseconds), "demo" can learn something in 150 steps.

    Returns:
        The folder.

    Raises:
        SciflowError: `size` is unknown, or the folder holds something.
    """
    dims = dims_of(size, _SIZES)
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    with torch.random.fork_rng(devices=[]):  # the constructors draw weights that are replaced below
        tokenizer = _tokenizer()
        text_encoder = _text_encoder(len(tokenizer), seed)
        vae = _vae(dims, seed)
        transformer = _transformer(dims, seed)
    pipeline: Any = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )
    return write_pipeline(folder, pipeline)


def _tokenizer() -> "PreTrainedTokenizerBase":
    """Bytes as tokens, no merges: nothing to train, so nothing that could differ between machines."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer  # also known as Qwen2TokenizerFast

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token) for token in _THINK_TOKENS])
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    return tokenizer


def _text_encoder(vocab_size: int, seed: int) -> "nn.Module":
    """28 layers of width 16 whose hidden states 9, 18 and 27 differ clearly."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=TEXT_HIDDEN,
        intermediate_size=2 * TEXT_HIDDEN,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    # 28 residual layers add up: half-size writes keep the hidden states of order one to three.
    redraw(model, seed, "text_encoder", gains={"embed_tokens": 4.0, "o_proj": 0.8, "down_proj": 0.8})
    return model


def _vae(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Log-variance near -6, batch-norm statistics measured on drawn figures."""
    import torch
    from diffusers import AutoencoderKLFlux2

    levels = len(dims["vae_channels"])
    vae: Any = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=dims["vae_channels"],
        layers_per_block=1,
        latent_channels=dims["latent"],
        norm_num_groups=4,
        sample_size=128,
    )
    vae.eval()
    redraw(vae, seed, "vae", gains={"quant_conv": 1.0})
    half = dims["latent"]
    with torch.no_grad():
        vae.quant_conv.weight[half:] *= 0.05
        vae.quant_conv.bias[half:] = -6.0
        tokens = []
        for pixels in sample_pixels(seed):
            mean = vae.encode(pixels).latent_dist.mode()  # (1, c, h, w)
            patches = torch.nn.functional.pixel_unshuffle(mean, 2)  # (1, 4c, h/2, w/2), order (c, ph, pw)
            tokens.append(patches.flatten(2).transpose(1, 2)[0].double())
        both = torch.cat(tokens)
        # Rounded, so that the last bit of a convolution on another machine does not change the file.
        vae.bn.running_mean.copy_(rounded(both.mean(0)))
        vae.bn.running_var.copy_(rounded(both.var(0)))
    return vae


def _transformer(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Double and single blocks whose output has a standard deviation of about one."""
    import torch
    from diffusers import Flux2Transformer2DModel

    channels, axis = 4 * dims["latent"], dims["head_dim"] // 4
    model: Any = Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=dims["double"],
        num_single_layers=dims["single"],
        attention_head_dim=dims["head_dim"],
        num_attention_heads=dims["heads"],
        joint_attention_dim=3 * TEXT_HIDDEN,
        timestep_guidance_channels=_TIME_CHANNELS,
        axes_dims_rope=(axis,) * 4,
        guidance_embeds=False,
    )
    model.eval()
    redraw(model, seed, "transformer")
    with torch.no_grad():
        model.time_guidance_embed.timestep_embedder.linear_1.weight *= quiet(_TIME_CHANNELS)
    rng = probe(seed)
    height, width, length = 4, 6, 12
    zero = torch.arange(1)
    img_ids = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
    txt_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(length))
    with torch.no_grad():
        output = model(
            hidden_states=torch.randn(4, height * width, channels, generator=rng),
            encoder_hidden_states=torch.randn(4, length, 3 * TEXT_HIDDEN, generator=rng),
            timestep=torch.tensor([0.1, 0.4, 0.7, 0.95]),
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=None,
            return_dict=False,
        )[0]
        model.proj_out.weight /= rounded(output.double().std()).float()
    return model
