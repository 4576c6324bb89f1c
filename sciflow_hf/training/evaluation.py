"""`eval_loss` on a fixed grid, and how sure we are that training improved on the base model."""

from collections.abc import Mapping, Sequence

import numpy as np

NUM_QUARTERS = 4
NUM_BOOTSTRAP = 2000
MIN_GROUPS = 10


def quarter_means(losses: np.ndarray, levels: np.ndarray) -> dict[str, float]:
    """Mean loss per quarter of the noise range: `loss_q1` (nearly clean) to `loss_q4`; empty quarters left out.

    Args:
        losses, levels: same shape; levels in [0, 1].
    """
    quarter = np.minimum((levels * NUM_QUARTERS).astype(int), NUM_QUARTERS - 1)
    return {f"loss_q{q + 1}": float(losses[quarter == q].mean()) for q in range(NUM_QUARTERS) if (quarter == q).any()}


def bootstrap_interval(gains: np.ndarray, groups: Sequence[str], *, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of the mean gain over rows, by 2,000 seeded draws of whole groups.

    Figures of one paper resemble each other, so papers are drawn, not figures (Efron and Tibshirani 1993, ch. 13).

    Args:
        gains: (N,), one per row.
        groups: (N,), the row's group.

    Returns:
        (low, high), or None under 10 groups, where the percentiles mean little.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < MIN_GROUPS:
        return None
    totals = np.bincount(index, weights=gains)
    counts = np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(names), size=(NUM_BOOTSTRAP, len(names)))
    means = totals[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(
    losses: np.ndarray,
    levels: np.ndarray,
    row_ids: Sequence[str],
    groups: Mapping[str, str],
    base: Mapping[str, Sequence[float]] | None,
) -> dict[str, float]:
    """Metrics of one evaluation, without prefix: loss, loss_q1..4, base_loss, gain, gain_low, gain_high.

    Args:
        losses: (N, K), row by level; rows that occur twice (filled tails) count once.
        levels: (K,), in [0, 1].
        row_ids: (N,).
        groups: row id -> group.
        base: row id -> (K,) losses of the base model on the same noise and levels; None where there is no base.
    """
    first = {row: i for i, row in reversed(list(enumerate(row_ids)))}
    rows = sorted(first)
    losses = losses[[first[row] for row in rows]]
    metrics = {"loss": float(losses.mean())}
    metrics |= quarter_means(losses, np.broadcast_to(levels, losses.shape))
    if base is not None:
        base_losses = np.array([base[row] for row in rows])
        gains = (base_losses - losses).mean(axis=1)
        metrics |= {"base_loss": float(base_losses.mean()), "gain": float(gains.mean())}
        interval = bootstrap_interval(gains, [groups[row] for row in rows])
        if interval is not None:
            metrics["gain_low"], metrics["gain_high"] = interval
    return metrics
