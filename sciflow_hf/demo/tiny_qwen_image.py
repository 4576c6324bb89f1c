"""A tiny Qwen-Image pipeline of random, non-degenerate weights: for the demo and the tests, no download."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .folders import write_pipeline
from .tiny import dims_of, probe, quiet, redraw, rounded, sample_pixels, word_merges
from .tiny_klein import SCHEDULER_CONFIG

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TEXT_HIDDEN = 16
_TIME_CHANNELS = 256  # fixed in diffusers' network

# As published: a flatter line than FLUX's, and a last sampling step at 0.02.
_SCHEDULER = SCHEDULER_CONFIG | {"shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}

# The VAE halves twice; with the 2x2 patches a token is 8x8 pixels (the real Qwen-Image: 16x16).
_SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_width": 4, "latent": 4, "heads": 2, "head_dim": 16, "layers": 2, "rope": (4, 6, 6)},
    "demo": {"vae_width": 8, "latent": 4, "heads": 4, "head_dim": 16, "layers": 3, "rope": (4, 6, 6)},
}

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def make_tiny(folder: str | Path, *, seed: int = 0, size: Literal["demo", "test"] = "demo") -> Path:
    """Writes a Qwen-Image pipeline folder that `diffusers.QwenImagePipeline.from_pretrained` loads.

    The weights are random but drawn so that positions, timestep scale, text, its order and its mask all show in the
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
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    with torch.random.fork_rng(devices=[]):  # the constructors draw weights that are replaced below
        tokenizer = _tokenizer()
        pipeline: Any = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER),
            vae=_vae(dims, seed),
            text_encoder=_text_encoder(tokenizer, seed),
            tokenizer=tokenizer,
            transformer=_transformer(dims, seed),
        )
    return write_pipeline(folder, pipeline)


def _tokenizer() -> "PreTrainedTokenizerBase":
    """Bytes, and the words of the file next to this one, each joined letter by letter from its start."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    lines = files(__package__).joinpath("tiny_qwen_image.txt").read_text(encoding="utf-8").splitlines()
    words = [line.replace("_", "Ġ") for line in lines if line and not line.startswith("#")]
    merges = word_merges(words)
    tokens = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS], special_tokens=True)
    tokenizer.model_max_length = 4096
    return tokenizer


def _text_encoder(tokenizer: "PreTrainedTokenizerBase", seed: int) -> "nn.Module":
    """Two layers of width 16, and a vision tower that prompts do not use."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    names = ("vision_start", "vision_end", "image", "video")
    ids = tokenizer.convert_tokens_to_ids(list(_SPECIAL_TOKENS[3:]))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_HIDDEN,
            "intermediate_size": 2 * TEXT_HIDDEN,
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
            "out_hidden_size": TEXT_HIDDEN,
            "fullatt_block_indexes": [0],
        },
        **{f"{name}_token_id": number for name, number in zip(names, ids, strict=True)},
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    redraw(model, seed, "text_encoder", gains={"embed_tokens": 4.0})
    return model


def _vae(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Log-variance near -6; the mean and deviation of its latents are measured on drawn figures."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    channels = dims["latent"]
    vae: Any = AutoencoderKLQwenImage(
        base_dim=dims["vae_width"],
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    vae.eval()
    redraw(vae, seed, "vae", gains={"quant_conv": 1.0})
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):  # a norm's scale, of more than one dimension here
                parameter.copy_(1 + parameter / 8)
        vae.quant_conv.weight[channels:] *= 0.05
        vae.quant_conv.bias[channels:] = -6.0
        latents = [vae.encode(pixels.unsqueeze(2)).latent_dist.mode() for pixels in sample_pixels(seed)]
    both = torch.cat([latent[0].flatten(1) for latent in latents], dim=1).double()  # (C, pixels)
    # Rounded, so that the last bit of a convolution on another machine does not change the file.
    vae.register_to_config(latents_mean=rounded(both.mean(1)).tolist(), latents_std=rounded(both.std(1)).tolist())
    return vae


def _transformer(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Blocks of two streams whose output has a standard deviation of about one."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    channels = 4 * dims["latent"]
    model: Any = QwenImageTransformer2DModel(
        in_channels=channels,
        out_channels=dims["latent"],
        num_layers=dims["layers"],
        attention_head_dim=dims["head_dim"],
        num_attention_heads=dims["heads"],
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=dims["rope"],
    )
    model.eval()
    redraw(model, seed, "transformer")
    with torch.no_grad():
        model.time_text_embed.timestep_embedder.linear_1.weight *= quiet(_TIME_CHANNELS)
    rng = probe(seed)
    height, width, length = 4, 6, 12
    with torch.no_grad():
        output = model(
            hidden_states=torch.randn(4, height * width, channels, generator=rng),
            encoder_hidden_states=torch.randn(4, length, TEXT_HIDDEN, generator=rng),
            timestep=torch.tensor([0.1, 0.4, 0.7, 0.95]),
            img_shapes=[[(1, height, width)]] * 4,
            return_dict=False,
        )[0]
        model.proj_out.weight /= rounded(output.double().std()).float()
    return model
