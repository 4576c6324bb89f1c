"""Distances between sets of images in the feature space of any network: Frechet (FID) and kernel (KID)."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..errors import SciflowError

Features = Callable[[torch.Tensor], torch.Tensor]
"""Images (B, C, H, W), float32 in [-1, 1] -> features (B, D). FID as published is with Inception-v3's 2,048."""


def image_features(network: Features, batches: Iterable[torch.Tensor]) -> np.ndarray:
    """Features of all images: batches of (B, C, H, W) -> (N, D), float64.

    Raises:
        SciflowError: the network gives anything but one vector an image, or values that are not finite.
    """
    found = []
    with torch.no_grad():
        for images in batches:
            features = network(images)
            if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
                shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
                raise SciflowError(
                    f"the feature network makes {shape} of images {tuple(images.shape)}, but ({len(images)}, D) is "
                    "needed: one vector an image. Take the mean over positions, for example."
                )
            found.append(features.double().cpu().numpy())
    rows = np.concatenate(found)
    if not np.isfinite(rows).all():
        raise SciflowError(
            "the feature network gives values that are not finite: look at the images and at the network."
        )
    return rows


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
    """Frechet distance of two normal distributions with the means and covariances of the features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017). The trace of the root is that of the root of
    S1^(1/2) S2 S1^(1/2), which is symmetric. It is biased: two samples of one distribution have a distance above 0,
    the more so the fewer they are, so that only distances between equally large sets compare.

    Args:
        features, others: (N, D) and (M, D), at least 2 rows each.

    Raises:
        SciflowError: different D, or a single row.
    """
    _check_pair(features, others)
    means = [rows.mean(axis=0) for rows in (features, others)]
    first, second = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (features, others))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * trace)


def kernel_distance(
    features: np.ndarray, others: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x y / D + 1)^3 (Binkowski et al. 2018): mean and deviation.

    Unbiased: 0 in the mean for two samples of one distribution, whatever their sizes.

    Args:
        features, others: (N, D) and (M, D), at least 2 rows each.
        subsets: random subsets over which mean and standard deviation are taken.
        subset_size: rows of each, at most N and M.
        seed: of the subsets.
    """
    _check_pair(features, others)
    size, rng = min(subset_size, len(features), len(others)), np.random.default_rng(seed)
    found = [
        _discrepancy(features[rng.choice(len(features), size, False)], others[rng.choice(len(others), size, False)])
        for _ in range(subsets)
    ]
    return float(np.mean(found)), float(np.std(found))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased, (n, D) and (n, D)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, xx, yy = len(x), kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def nearest_distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distance of each image to the nearest of `others`: (N, ...) and (M, ...) -> (N,).

    Copies of training images are nearer to them than images of other people's hand are: compare with held-out ones.
    """
    x, y = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (images, others))
    squared = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x @ y.T
    return np.sqrt(squared.clip(0).min(axis=1))


def _check_pair(features: np.ndarray, others: np.ndarray) -> None:
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise SciflowError(f"features of the shapes {features.shape} and {others.shape}: (N, D) and (M, D) are needed.")
    if min(len(features), len(others)) < 2:
        raise SciflowError(f"{len(features)} and {len(others)} images: a distance of distributions needs 2 of each.")
