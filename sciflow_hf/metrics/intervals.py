"""95 % intervals of means over groups of rows that resemble each other."""

import math
from collections.abc import Sequence

import numpy as np

MIN_EFFECTIVE_GROUPS = 10


def mean_interval(gains: np.ndarray, groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % interval of the mean gain over rows; figures of one paper, a group, resemble each other.

    Variance and skewness of the mean are those of the jackknife over groups; Student's t has Satterthwaite's degrees
    of freedom (Bell and McCaffrey 2002), the fewer of those for rows of a group that are all alike and all different;
    skewness is taken out by Hall's cubic transformation (Hall 1992, JRSS B 54). docs/results.md has the coverage.

    Args:
        gains: (N,), one per row.
        groups: (N,), the row's group.

    Returns:
        (low, high), or None for fewer than 10 groups in effect: one that holds half of the rows leaves few others.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(index).astype(float)
    weights = counts / counts.sum()
    if 1 / (weights**2).sum() < MIN_EFFECTIVE_GROUPS - 1e-9:
        return None
    mean, number = float(np.mean(gains)), len(names)
    pulls = weights / (1 - weights) * (np.bincount(index, weights=gains) / counts - mean)  # without the group
    share = (number - 1) / number
    error = math.sqrt(share * (pulls**2).sum())
    if error <= 1e-12 * abs(mean):
        return mean, mean
    skewness = share * (pulls**3).sum() / error**3
    quantile = student_quantile(min(_degrees_of_freedom(weights, v) for v in (np.ones(number), 1 / counts)))
    low, high = (mean - error * _unskewed(sign * quantile, skewness) for sign in (1, -1))
    return low, high


def _degrees_of_freedom(weights: np.ndarray, variances: np.ndarray) -> float:
    """Satterthwaite's, 2 E[V]^2 / Var[V], of the jackknife's V where the groups' means have these variances, (G,).

    V is the quadratic form A = diag(d) - d w' - w d' + (sum d) w w' of the means: tr(A v)^2 / tr(A v A v).
    """
    w, v, d = weights, variances, (weights / (1 - weights)) ** 2
    off = d.sum() * w**2 - 2 * d * w  # of the diagonal, but for d
    dd, ww, dw = (v * d**2).sum(), (v * w**2).sum(), (v * d * w).sum()
    square = (v**2 * d * (d + 2 * off)).sum() + 2 * dd * ww + 2 * dw**2 + (d.sum() * ww) ** 2 - 4 * d.sum() * ww * dw
    return float((v * (d + off)).sum() ** 2 / square)


def _unskewed(quantile: float, skewness: float) -> float:
    """The t whose transform t + s t^2 / 3 + s^2 t^3 / 27 + s / 6 is `quantile`, for skewness s."""
    if abs(skewness) < 1e-6:
        return quantile
    return float(np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1) * 3 / skewness


def student_quantile(degrees: float) -> float:
    """97.5 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5; to 1e-3 from 4 degrees on)."""
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
