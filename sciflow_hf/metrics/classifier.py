"""A small classifier, trained on the images at hand: the default feature network, where nothing is downloaded."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..diffusion.randomness import generator, hash64
from ..errors import SciflowError

logger = logging.getLogger(__name__)

WIDTH, NARROWEST = 64, 16
SHIFT = 1  # pixels by which images are moved in training, in 16ths of their side (at least one pixel)


class SmallClassifier(nn.Module):
    """Convolutions of 3x3, halving down to 4 pixels, mean over positions, one linear layer: about 0.1 M parameters.

    64 channels up to 8 pixels, above that half as many for each doubling of the side, at least 16.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        width = _width(image_size)
        layers: list[nn.Module] = [_block(in_channels, width, stride=1)]
        while image_size > 4:
            image_size = (image_size + 1) // 2
            layers.append(_block(width, _width(image_size), stride=2))
            width = _width(image_size)
        self.convolutions = nn.Sequential(*layers, _block(WIDTH, WIDTH, stride=1))
        self.head = nn.Linear(WIDTH, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, 64)."""
        return self.convolutions(images).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores, (B, num_classes)."""
        return self.head(self.features(images))


def _width(image_size: int) -> int:
    return min(WIDTH, max(NARROWEST, WIDTH * 8 // image_size))


def _block(channels: int, width: int, *, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def train_classifier(dataset: Any, *, num_classes: int, steps: int = 500, batch_size: int = 128, seed: int = 0) -> Any:
    """A `SmallClassifier` of the images of a data set, in evaluation mode, on the CPU.

    Args:
        dataset: map-style, of `pixel_values` (C, H, W) in [-1, 1] and `class_labels`.
        steps: of AdamW, at a learning rate that falls from 3e-3 to 0; images are shifted by up to 1/16 of their side.
        seed: of weights, order and shifts; torch's own generator is left as it was.

    Raises:
        SciflowError: there are no labels.
    """
    first = dataset[0]
    if not num_classes or "class_labels" not in first:
        raise SciflowError("a classifier needs images with `class_labels`: give a feature network of your own.")
    channels, height, _ = first["pixel_values"].shape
    logger.info(
        "A small classifier of the training images is trained, %d steps on the CPU: the judge of drawn images.", steps
    )
    draws = generator(hash64(seed), "classifier")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(hash64(seed, "weights") & 0xFFFFFFFF)
        network = SmallClassifier(channels, height, num_classes)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(dataset), (batch_size,), generator=draws).tolist()
            samples = [dataset[row] for row in rows]
            images = _shifted(torch.stack([s["pixel_values"] for s in samples]), draws, max(1, height * SHIFT // 16))
            labels = torch.stack([torch.as_tensor(s["class_labels"]) for s in samples])
            loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _shifted(images: torch.Tensor, draws: torch.Generator, most: int) -> torch.Tensor:
    """The batch, moved by the same few pixels; the border is repeated."""
    down, right = torch.randint(-most, most + 1, (2,), generator=draws).tolist()
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    height, width = images.shape[-2:]
    return padded[..., most + down : most + down + height, most + right : most + right + width]


def class_accuracy(classifier: Any, images: torch.Tensor, labels: torch.Tensor, *, batch_size: int = 256) -> float:
    """Share of images (N, C, H, W) in [-1, 1] that `classifier` gives their class, (N,).

    Raises:
        SciflowError: the classifier gives no scores (N, classes).
    """
    right = 0
    with torch.no_grad():
        for part, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            scores = classifier(part)
            if scores.ndim != 2 or len(scores) != len(part) or scores.shape[1] <= int(truth.max()):
                raise SciflowError(
                    f"the classifier makes {tuple(scores.shape)} of images {tuple(part.shape)} with labels up to "
                    f"{int(truth.max())}; one score a class is needed."
                )
            right += int((scores.argmax(dim=1).cpu() == truth.cpu()).sum())
    return right / len(images)
