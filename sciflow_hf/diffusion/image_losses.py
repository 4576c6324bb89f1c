"""Losses between images: in Fourier space, of features, over scales. All per sample, (B,), float32."""

from collections.abc import Callable, Iterable, Sequence

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


def squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference: (B, ...) twice -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def perceptual_loss(
    images: torch.Tensor,
    target: torch.Tensor,
    features: torch.nn.Module,
    *,
    compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = squared_error,
) -> torch.Tensor:
    """The difference of what `features` returns for both, averaged over its outputs: -> (B,).

    Johnson et al. 2016, equation 2, with the features of any network: a VGG, an encoder of one's own microscope. Of
    `HierarchicalFeatures` it is the multi-scale consistency loss: image and target agree at every scale.

    Args:
        images, target: (B, C, H, W), in the units that `features` takes.
        features: images -> a tensor (B, ...) or several.
        compare: loss of an output, (B, ...) twice -> (B,); if outputs are (B, C, h, w), also `fourier_loss` or
            `multiscale_loss`.

    Raises:
        ValueError: it returns something else.
    """
    with torch.no_grad():
        wanted = _as_tuple(features(target.float()), len(target))
    found = _as_tuple(features(images.float()), len(images))
    return torch.stack([compare(a, b) for a, b in zip(found, wanted, strict=True)]).mean(dim=0)


class HierarchicalFeatures(torch.nn.Module):
    """Features of an image at several scales, from fine to coarse: those of a network, or else its local structure.

    At each scale the image is averaged over blocks. Of every channel the local structure is the mean and its
    derivatives down and to the right by Sobel's kernels, per block: the 1-jet of Koenderink and van Doorn 1987.

    Args:
        network: images (B, C, h, w) -> a tensor (B, ...) or several, for every size; None: the local structure.
        scales: sides of the blocks in pixels; those that do not fit in the image are left out.
    """

    def __init__(self, network: torch.nn.Module | None = None, scales: Sequence[int] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.network, self.scales = network, tuple(scales)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, C, H, W) -> the features of each scale; of the local structure (B, 3 C, H / scale, W / scale)."""
        found: list[torch.Tensor] = []
        for scale in self.scales:
            if scale <= min(images.shape[-2:]):
                coarse = F.avg_pool2d(images, scale)
                of_scale = _local_structure(coarse) if self.network is None else self.network(coarse)
                found += _as_tuple(of_scale, len(images))
        return tuple(found)


def _local_structure(images: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, 3 C, h, w): of each channel itself, and its derivatives down and to the right."""
    smooth, slope = images.new_tensor([0.25, 0.5, 0.25]), images.new_tensor([-0.5, 0, 0.5])
    mean = images.new_tensor([0, 1.0, 0])
    pairs = ((mean, mean), (slope, smooth), (smooth, slope))
    kernels = torch.stack([torch.outer(down, right) for down, right in pairs])[:, None]
    channels = images.shape[1]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels.repeat(channels, 1, 1, 1), groups=channels)


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
