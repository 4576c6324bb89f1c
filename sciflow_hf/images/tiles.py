"""A network on images of any size, tile by tile: the memory of one batch of tiles, blended without seams."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import SciflowError

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs (B, C, H, W), timesteps (B,)) -> (B, C', H, W)."""


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `size` pixels and overlap by `overlap` or more, evenly spread."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def blend_weight(start: int, length: int, size: int, overlap: int) -> torch.Tensor:
    """Weight of each pixel of a tile along one axis, (length,): rising as sin^2 from its border over `overlap` pixels.

    1 everywhere at a border of the image, where no other tile is. Two tiles that overlap by so much sum to 1.
    """
    distance = torch.arange(1, length + 1, dtype=torch.float32)
    ramp = torch.sin(math.pi / 2 * (distance / (overlap + 1)).clamp_max(1)) ** 2
    left = torch.ones(length) if start == 0 else ramp
    right = torch.ones(length) if start + length == size else ramp.flip(0)
    return torch.minimum(left, right)


def tiled(network: Network, *, tile_size: int, overlap: int, batch_size: int) -> Network:
    """The same network for images that are larger than `tile_size`, whose outputs are blended where tiles overlap.

    At every step of sampling the tiles see parts of one noisy image, and one output is made of all of theirs, so
    they never part (Bar-Tal et al. 2023). Memory holds one batch of tiles, and images.

    Args:
        network: returns as many pixels as it gets.
        tile_size: pixels of a square tile, at best what the network was trained on.
        overlap: least pixels that neighbours share; about the network's reach makes seams vanish.
        batch_size: tiles of one call.

    Raises:
        SciflowError: an overlap of half a tile or more.
    """
    if not 0 <= overlap <= tile_size // 2 or batch_size < 1:
        raise SciflowError(f"`tile_overlap` {overlap}: 0 to half of `tile_size` {tile_size}.")

    def whole(inputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        height, width = inputs.shape[-2:]
        if max(height, width) <= tile_size:
            return network(inputs, timesteps)
        rows, columns = min(tile_size, height), min(tile_size, width)
        places = [
            (image, top, left)
            for image in range(len(inputs))
            for top in tile_starts(height, rows, min(overlap, rows // 2))
            for left in tile_starts(width, columns, min(overlap, columns // 2))
        ]
        total: torch.Tensor | None = None
        weights = inputs.new_zeros(len(inputs), 1, height, width)
        for first in range(0, len(places), batch_size):
            chosen = places[first : first + batch_size]
            parts = torch.stack([inputs[i, :, y : y + rows, x : x + columns] for i, y, x in chosen])
            found = network(parts, timesteps[[i for i, _, _ in chosen]])
            if total is None:
                total = found.new_zeros(len(inputs), found.shape[1], height, width)
            for (i, y, x), part in zip(chosen, found, strict=True):
                window = torch.outer(
                    blend_weight(y, rows, height, overlap), blend_weight(x, columns, width, overlap)
                ).to(part)
                total[i, :, y : y + rows, x : x + columns] += window * part
                weights[i, 0, y : y + rows, x : x + columns] += window
        if total is None:
            raise SciflowError("no image to restore.")
        return total.div_(weights)

    return whole


def turned(images: torch.Tensor, turn: int) -> torch.Tensor:
    """(..., H, W) in one of the eight orientations of a square, 0 to 7; odd ones exchange height and width."""
    images = torch.rot90(images, turn % 4, (-2, -1))
    return images.flip(-1).contiguous() if turn >= 4 else images.contiguous()


def turned_back(images: torch.Tensor, turn: int) -> torch.Tensor:
    """The inverse of `turned`."""
    images = images.flip(-1) if turn >= 4 else images
    return torch.rot90(images, -(turn % 4), (-2, -1)).contiguous()


def padded(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """(B, C, H, W) mirrored beyond its lower and right border, to a multiple of `multiple` pixels."""
    bottom, right = (-size % multiple for size in images.shape[-2:])
    if not (bottom or right):
        return images
    mode = "reflect" if bottom < images.shape[-2] and right < images.shape[-1] else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode)
