"""A tiny Stable Diffusion XL pipeline of random, non-degenerate weights: for the demo and the tests, no download."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .folders import write_pipeline
from .tiny import clip, dims_of, probe, quiet, redraw, rounded, sample_pixels, word_merges

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TEXT_LENGTH = 77

# The published SDXL base's scheduler.
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}

# Three levels in the VAE: 4x smaller; with the two of the UNet sides are multiples of 8 pixels (the real SDXL: 32).
# `texts`: widths of the text encoders; `size_channels`: of the embedding of each number of `time_ids`.
_SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae": (4, 8, 8), "unet": (8, 16), "head_dim": 8, "texts": (8, 12), "size_channels": 8},
    "demo": {"vae": (8, 16, 16), "unet": (16, 32), "head_dim": 16, "texts": (16, 24), "size_channels": 16},
}
_LATENT_CHANNELS = 4
_GROUPS = 4


def make_tiny(folder: str | Path, *, seed: int = 0, size: Literal["demo", "test"] = "demo") -> Path:
    """Writes a pipeline folder that `diffusers.StableDiffusionXLPipeline.from_pretrained` loads.

    As in SDXL, the first level of the UNet has no attention. The weights are random but drawn so that timestep,
    sizes, crops, both texts and the pooled one show in the network's output. One seed gives the same bytes.

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
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):  # the constructors draw weights that are replaced below
        tokenizer, tokenizer_2 = _tokenizer("<|endoftext|>"), _tokenizer("!")
        first, second = dims["texts"]
        text_encoder = clip(tokenizer, first, seed, "text_encoder", projected=False)
        text_encoder_2 = clip(tokenizer_2, second, seed, "text_encoder_2", projected=True)
        vae = _vae(dims, seed)
        unet = _unet(dims, seed)
    pipeline: Any = StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(**SCHEDULER_CONFIG),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        unet=unet,
        add_watermarker=False,
    )
    return write_pipeline(folder, pipeline)


def _tokenizer(pad_token: str) -> "PreTrainedTokenizerBase":
    """Bytes, and the words of a list put together from left to right: captions of figures are 20 to 60 tokens.

    As in CLIP, `!` is the lowest id and the end of the text the highest.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    listed = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split()
    merges = word_merges([*word[:-1], word[-1] + "</w>"] for word in listed)
    words = [*alphabet, *(char + "</w>" for char in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), pad_token=pad_token, model_max_length=TEXT_LENGTH)


def _vae(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Log-variance near -6; a scale that brings drawn figures to deviation 1."""
    import torch
    from diffusers import AutoencoderKL

    levels = len(dims["vae"])
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=dims["vae"],
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=_GROUPS,
        sample_size=128,
    )
    model.eval()
    redraw(model, seed, "vae", gains={"quant_conv": 1.0})
    with torch.no_grad():
        model.quant_conv.weight[_LATENT_CHANNELS:] *= 0.05
        model.quant_conv.bias[_LATENT_CHANNELS:] = -6.0
        means = [model.encode(pixels).latent_dist.mode().flatten().double() for pixels in sample_pixels(seed)]
    # Rounded, so that the last bit of a convolution on another machine does not change the file.
    model.register_to_config(scaling_factor=float(f"{float(rounded(1 / torch.cat(means).std())):.3g}"))
    return model


def _unet(dims: dict[str, Any], seed: int) -> "nn.Module":
    """A level of convolutions and one with attention; an output with a standard deviation of about one."""
    import torch
    from diffusers import UNet2DConditionModel

    width, pooled = sum(dims["texts"]), dims["texts"][1]
    model: Any = UNet2DConditionModel(
        sample_size=32,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=dims["unet"],
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        cross_attention_dim=width,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(channels // dims["head_dim"] for channels in dims["unet"]),  # in truth their number
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=dims["size_channels"],
        projection_class_embeddings_input_dim=6 * dims["size_channels"] + pooled,
    )
    model.eval()
    redraw(model, seed, "unet")
    rng = probe(seed)
    with torch.no_grad():
        # Networks are smooth in sizes (here about 100), too.
        model.time_embedding.linear_1.weight *= quiet(dims["unet"][0])
        model.add_embedding.linear_1.weight[:, pooled:] *= quiet(dims["size_channels"], 0.05).repeat(6)
        output = model(
            sample=torch.randn(4, _LATENT_CHANNELS, 8, 12, generator=rng),
            timestep=torch.tensor([100, 400, 700, 950]),
            encoder_hidden_states=torch.randn(4, TEXT_LENGTH, width, generator=rng),
            added_cond_kwargs={
                "text_embeds": torch.randn(4, pooled, generator=rng),
                "time_ids": torch.tensor([[48.0, 32.0, 0.0, 4.0, 32.0, 48.0]]).repeat(4, 1),
            },
            return_dict=False,
        )[0]
        scale = rounded(output.double().std()).float()
        model.conv_out.weight /= scale
        model.conv_out.bias /= scale
    return model
