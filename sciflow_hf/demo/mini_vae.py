"""The VAE of `mini_klein`: sides four times smaller, eight channels; trained on drawn figures of every tint."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion.randomness import hash64
from ..files import atomic_file
from .mini_figures import SIZES, MiniFigure, mini_figures

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 8
_WARMUP = 100  # steps
_EDGES, _KL = 0.5, 1e-3  # weights, where the absolute error has 1
_EMA = 0.998
_SAVE_EVERY = 250
_RATE = 1.5e-3
_CROPS = 0.8  # share of the steps with windows of 32 x 32 pixels
_MEASURED = 180  # figures of each style and size for the statistics of the latents


def mini_vae() -> Any:
    """An `AutoencoderKLFlux2` of 0.66 million parameters, before training.

    One group in the norms: of a blank page in a colour, more would leave hardly more than signs. The weights start so
    that colours get through: variance kept, residual blocks at nothing, offsets that tell light from dark after a
    norm, a posterior of small deviation. After 300 steps the error is 0.16 instead of 0.28 with diffusers' start.
    """
    import torch
    from diffusers import AutoencoderKLFlux2
    from diffusers.models.resnet import ResnetBlock2D

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
    )
    blocks = [block for block in vae.modules() if isinstance(block, ResnetBlock2D)]
    inside = {id(conv) for block in blocks for conv in (block.conv1, block.conv2)}
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, torch.nn.Conv2d) and id(layer) not in inside:
                torch.nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        for block in blocks:
            block.conv2.weight.zero_()
        for half in (vae.encoder, vae.decoder):
            torch.nn.init.normal_(half.conv_in.bias, std=0.5)
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -4.0
    return vae


def pixels(figures: Sequence[MiniFigure]) -> "torch.Tensor":
    """Figures of one size as (B, 3, H, W) in [-1, 1]."""
    import numpy as np
    import torch

    images = torch.from_numpy(np.stack([np.asarray(figure.image()) for figure in figures]))
    return images.permute(0, 3, 1, 2) / 127.5 - 1


def train_mini_vae(folder: str | Path, *, steps: int, batch_size: int = 16, seed: int = 0) -> Any:
    """Trains the VAE on figures drawn as it goes, 60 % of them of style "any", the rest plain.

    Absolute error of pixels and of their differences to the neighbours, and a little KL; AdamW, cosine schedule,
    moving average. The state is kept in `folder`: called again, it continues from there, with the same result.

    Returns:
        The averaged VAE, with the statistics of its batch norm measured.
    """
    import torch

    path = Path(folder) / "vae.pt"
    torch.manual_seed(seed)
    vae = mini_vae()
    average = {name: p.detach().clone() for name, p in vae.named_parameters()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_RATE, weight_decay=1e-3, fused=True)
    done = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        average, done = state["average"], state["step"]
    shown: list[float] = []
    for step in range(done, steps):
        rate = _RATE * min(1, (step + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash64(seed, "posterior", step) & 0xFFFFFFFF)
        x = pixels(_batch(step, batch_size, seed))
        if step < _CROPS * steps:  # many figures in a step teach colours, full pages in the end
            top, left = (4 * (hash64(seed, side, step) % (x.shape[i] // 4 - 7)) for i, side in ((2, "y"), (3, "x")))
            x = x[:, :, top : top + 32, left : left + 32].contiguous()
        loss, error = _loss(vae, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(_EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in vae.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        shown.append(error)
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            logger.info("VAE step %d of %d: error %.4f", step + 1, steps, sum(shown) / len(shown))
            shown = []
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step + 1}
            with atomic_file(path) as temporary:
                torch.save(state, temporary)
    vae.load_state_dict(vae.state_dict() | average)
    vae.eval().requires_grad_(False)
    set_statistics(vae, seed=seed)
    return vae


def _batch(step: int, batch_size: int, seed: int) -> list[MiniFigure]:
    """Figures of one size."""
    style = "any" if hash64(seed, "style", step) % 5 < 3 else "plain"
    size = SIZES[step % len(SIZES)]
    return list(mini_figures(batch_size, seed=hash64(seed, "vae", step), style=style, sizes=[size]))


def _loss(vae: Any, x: "torch.Tensor") -> "tuple[torch.Tensor, float]":
    """The loss, and the mean absolute error of the pixels in it."""
    posterior = vae.encode(x).latent_dist
    wrong = vae.decode(posterior.sample()).sample - x
    error = wrong.abs().mean()
    edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    mean, logvar = posterior.mean, posterior.logvar
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error + _EDGES * edges + _KL * kl, error.item()


def set_statistics(vae: Any, *, seed: int) -> None:
    """Mean and variance of the patchified latents, (4C,), over plain figures and those of any style in equal parts."""
    import torch

    tokens = []
    with torch.no_grad():
        for style in ("plain", "any"):
            for size in SIZES:
                figures = list(mini_figures(_MEASURED, seed=hash64(seed, "statistics"), style=style, sizes=[size]))
                latents = vae.encode(pixels(figures)).latent_dist.mode()
                patches = torch.nn.functional.pixel_unshuffle(latents, 2)  # channels in the order (c, ph, pw)
                tokens.append(patches.flatten(2).transpose(1, 2).flatten(0, 1).double())
        together = torch.cat(tokens)
        vae.bn.running_mean.copy_(together.mean(0))
        vae.bn.running_var.copy_(together.var(0))
