"""A tiny FLUX.1 pipeline of random, non-degenerate weights: for the demo and the tests, no download."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .folders import write_pipeline
from .tiny import clip, clip_tokenizer, dims_of, probe, quiet, redraw, rounded, t5, t5_tokenizer
from .tiny_sd3 import CLIP_WIDTH, SIZES, T5_WIDTH, TIME_CHANNELS, vae

if TYPE_CHECKING:
    from torch import nn

# The scheduler of FLUX.1-dev: shift by resolution, exponential form.
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def make_tiny(folder: str | Path, *, seed: int = 0, size: Literal["demo", "test"] = "demo") -> Path:
    """Writes a pipeline folder that `diffusers.FluxPipeline.from_pretrained` loads, with guidance embedding as dev.

    The weights are random but drawn so that position ids, timestep scale, guidance and both texts show in the
    network's output. One seed gives the same bytes.

    Args:
        folder: where to write; must not exist or be empty. It appears complete or not at all.
        seed: changes every weight.
        size: "test" is the smallest (a forward takes milliseconds), "demo" can learn something in 150 steps.

    Returns:
        The folder.

    Raises:
        SciflowError: `size` is unknown, or the folder holds something.
    """
    dims = dims_of(size, SIZES)
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with torch.random.fork_rng(devices=[]):  # the constructors draw weights that are replaced below
        tokenizer, tokenizer_2 = clip_tokenizer(dims["clip_length"], pad_token="<|endoftext|>"), t5_tokenizer()
        pipeline: Any = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
            vae=vae(dims, seed),
            text_encoder=clip(tokenizer, CLIP_WIDTH, seed, "text_encoder", projected=False),
            tokenizer=tokenizer,
            text_encoder_2=t5(tokenizer_2, T5_WIDTH, seed, "text_encoder_2"),
            tokenizer_2=tokenizer_2,
            transformer=_transformer(dims, seed),
        )
    return write_pipeline(folder, pipeline)


def _transformer(dims: dict[str, Any], seed: int) -> "nn.Module":
    """Double and single blocks whose output has a standard deviation of about one."""
    import torch
    from diffusers import FluxTransformer2DModel

    channels, axis = 4 * dims["latent"], dims["head_dim"] // 8
    model: Any = FluxTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=dims["head_dim"],
        num_attention_heads=dims["heads"],
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2 * axis, 3 * axis, 3 * axis),  # published: 16, 56, 56 of 128
    )
    model.eval()
    # Modulations of half size: larger ones leave little that training can build on.
    redraw(model, seed, "transformer", gains={"norm": 0.5})
    with torch.no_grad():
        for embedder in (model.time_text_embed.timestep_embedder, model.time_text_embed.guidance_embedder):
            embedder.linear_1.weight *= quiet(TIME_CHANNELS)
    rng = probe(seed)
    height, width, length = 4, 6, 12
    zero = torch.arange(1)
    with torch.no_grad():
        output = model(
            hidden_states=torch.randn(4, height * width, channels, generator=rng),
            encoder_hidden_states=torch.randn(4, length, T5_WIDTH, generator=rng),
            pooled_projections=torch.randn(4, CLIP_WIDTH, generator=rng),
            timestep=torch.tensor([0.1, 0.4, 0.7, 0.95]),
            guidance=torch.ones(4),
            img_ids=torch.cartesian_prod(zero, torch.arange(height), torch.arange(width)),
            txt_ids=torch.zeros(length, 3, dtype=torch.int64),
            return_dict=False,
        )[0]
        model.proj_out.weight /= rounded(output.double().std()).float()
    return model
