"""A tiny Stable Diffusion 3 pipeline of random, non-degenerate weights: for the demo and the tests, no download."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .folders import write_pipeline
from .tiny import clip, clip_tokenizer, dims_of, probe, quiet, redraw, rounded, sample_pixels, t5, t5_tokenizer

if TYPE_CHECKING:
    from torch import nn

TIME_CHANNELS = 256  # of diffusers' time embedding, for SD3 and FLUX.1 alike

# The published SD3 and SD3.5 checkpoints' scheduler: a fixed shift.
SCHEDULER_CONFIG: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}

# Three levels in the VAE: 4x smaller, with the 2x2 patches a token is 8x8 pixels (the real SD3: 16x16).
SIZES: dict[str, dict[str, Any]] = {
    "test": {"vae_channels": (4, 8, 8), "latent": 4, "heads": 2, "head_dim": 16, "clip_length": 16, "max_tokens": 16},
    "demo": {"vae_channels": (8, 16, 16), "latent": 4, "heads": 4, "head_dim": 16, "clip_length": 77, "max_tokens": 32},
}

# Widths of the text encoders; the CLIPs' together are smaller than T5's, so that padding to it shows.
CLIP_WIDTH, CLIP_2_WIDTH, T5_WIDTH = 8, 12, 32


def make_tiny(folder: str | Path, *, seed: int = 0, size: Literal["demo", "test"] = "demo") -> Path:
    """Writes a pipeline folder that `diffusers.StableDiffusion3Pipeline.from_pretrained` loads.

    As in SD3.5 medium: normed queries and keys, a second attention in the first block, positions cut out of the
    middle of a larger grid. The weights are random but drawn so that positions, timestep scale and each of the three
    texts show in the network's output. One seed gives the same bytes.

    Args:
        folder: where to write; must not exist or be empty. It appears complete or not at all.
        seed: changes every weight.
        size: "test" is the smallest (a forward takes milliseconds, images up to 128 pixels), "demo" can learn
            something in 150 steps.

    Returns:
        The folder.

    Raises:
        SciflowError: `size` is unknown, or the folder holds something.
    """
    dims = dims_of(size, SIZES)
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):  # the constructors draw weights that are replaced below
        tokenizer = clip_tokenizer(dims["clip_length"], pad_token="<|endoftext|>")
        tokenizer_2 = clip_tokenizer(dims["clip_length"], pad_token="!")
        tokenizer_3 = t5_tokenizer()
        pipeline: Any = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
            vae=vae(dims, seed),
            text_encoder=clip(tokenizer, CLIP_WIDTH, seed, "text_encoder", projected=True),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer_2, CLIP_2_WIDTH, seed, "text_encoder_2", projected=True),
            tokenizer_2=tokenizer_2,
            text_encoder_3=t5(tokenizer_3, T5_WIDTH, seed, "text_encoder_3"),
            tokenizer_3=tokenizer_3,
            transformer=_transformer(dims, seed),
        )
    return write_pipeline(folder, pipeline)


def vae(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Log-variance near -6; shift and scale that bring drawn figures to mean 0 and deviation 1."""
    import torch
    from diffusers import AutoencoderKL

    levels, half = len(dims["vae_channels"]), dims["latent"]
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=dims["vae_channels"],
        layers_per_block=1,
        latent_channels=half,
        norm_num_groups=4,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model.eval()
    redraw(model, seed, "vae", gains={"encoder.conv_out": 1.0})
    with torch.no_grad():
        model.encoder.conv_out.weight[half:] *= 0.05
        model.encoder.conv_out.bias[half:] = -6.0
        means = [model.encode(pixels).latent_dist.mode().flatten().double() for pixels in sample_pixels(seed)]
    values = torch.cat(means)
    # Rounded, so that the last bit of a convolution on another machine does not change the file.
    shift, scale = (float(f"{float(rounded(value)):.3g}") for value in (values.mean(), 1 / values.std()))
    model.register_to_config(shift_factor=shift, scaling_factor=scale)
    return model


def _transformer(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Two joint blocks whose output has a standard deviation of about one."""
    import torch
    from diffusers import SD3Transformer2DModel

    width, channels = dims["heads"] * dims["head_dim"], dims["latent"]
    model: Any = SD3Transformer2DModel(
        sample_size=dims["max_tokens"],
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=dims["head_dim"],
        num_attention_heads=dims["heads"],
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=CLIP_WIDTH + CLIP_2_WIDTH,
        pos_embed_max_size=dims["max_tokens"],
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    model.eval()
    # Modulations of half size: larger ones leave little that training can build on.
    redraw(model, seed, "transformer", gains={"norm": 0.5})
    with torch.no_grad():
        model.time_text_embed.timestep_embedder.linear_1.weight *= quiet(TIME_CHANNELS)
    rng = probe(seed)
    with torch.no_grad():
        output = model(
            hidden_states=torch.randn(4, channels, 8, 12, generator=rng),
            encoder_hidden_states=torch.randn(4, 12, T5_WIDTH, generator=rng),
            pooled_projections=torch.randn(4, CLIP_WIDTH + CLIP_2_WIDTH, generator=rng),
            timestep=torch.tensor([100.0, 400.0, 700.0, 950.0]),
            return_dict=False,
        )[0]
        model.proj_out.weight /= rounded(output.double().std()).float()
    return model
