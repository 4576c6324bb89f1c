"""Losses between images: in Fourier space, of features, over scales. All per sample, (B,), float32."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F


def fourier_loss(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean modulus of the difference of the orthonormal 2-D Fourier transforms: (B, C, H, W) twice -> (B,).

    The squared modulus would be the pixels' squared error again (Parseval); the modulus gives the weak, fine
    frequencies of an image a share of the gradient that does not depend on their size.
    """
    difference = torch.fft.rfft2(images.float() - target.float(), norm="ortho")
    modulus = torch.view_as_real(difference).square().sum(-1).add(1e-12).sqrt()
    columns = torch.full((modulus.shape[-1],), 2.0, device=modulus.device)  # of a real image half is kept
    columns[0] = 1
    if images.shape[-1] % 2 == 0:
        columns[-1] = 1
    return (modulus * columns).sum(dim=(1, 2, 3)) / images[0].numel()


def perceptual_loss(images: torch.Tensor, target: torch.Tensor, features: torch.nn.Module) -> torch.Tensor:
    """Mean squared difference of what `features` returns for both, averaged over its outputs: -> (B,).

    Johnson et al. 2016, equation 2, with the features of any network: a VGG, an encoder of one's own microscope.

    Args:
        images, target: (B, C, H, W), in the units that `features` takes.
        features: images -> a tensor (B, ...) or several.

    Raises:
        ValueError: it returns something else.
    """
    with torch.no_grad():
        wanted = _as_tuple(features(target.float()), len(target))
    found = _as_tuple(features(images.float()), len(images))
    differences = [(a.float() - b.float()).square().flatten(1).mean(1) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(differences).mean(dim=0)


def multiscale_loss(images: torch.Tensor, target: torch.Tensor, *, scales: Iterable[int] = (2, 4, 8)) -> torch.Tensor:
    """Squared error of the images averaged over blocks of each scale, times the pixels of a block: -> (B,).

    White errors count alike at every scale; errors that are alike over a block, which the pixels' mean hardly shows,
    count that many times more. So large structures agree before small ones.

    Args:
        images, target: (B, C, H, W).
        scales: sides of the blocks; those that do not fit in the image are left out.
    """
    difference = images.float() - target.float()
    total = torch.zeros(len(images), device=images.device)
    fitting = [scale for scale in scales if scale <= min(images.shape[-2:])]
    for scale in fitting:
        total = total + scale**2 * F.avg_pool2d(difference, scale).square().flatten(1).mean(1)
    return total / max(len(fitting), 1)


def _as_tuple(features: object, batch_size: int) -> tuple[torch.Tensor, ...]:
    found = (features,) if isinstance(features, torch.Tensor) else features
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"`feature_network` returns {type(found).__name__}: tensors (B, ...) are wanted, one or more.")
    for value in found:
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or len(value) != batch_size:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"`feature_network` returns {shape} for {batch_size} images: (B, ...) is wanted.")
    return tuple(found)
