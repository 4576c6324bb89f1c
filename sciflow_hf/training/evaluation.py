"""`eval_loss` on a fixed grid, and how sure we are that training improved on the base model."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..metrics.intervals import mean_interval

NUM_QUARTERS = 4


def quarter_means(losses: np.ndarray, levels: np.ndarray) -> dict[str, float]:
    """Mean loss per quarter of the noise range: `loss_q1` (nearly clean) to `loss_q4`; empty quarters left out.

    Args:
        losses, levels: same shape; levels in [0, 1].
    """
    quarter = np.minimum((levels * NUM_QUARTERS).astype(int), NUM_QUARTERS - 1)
    return {f"loss_q{q + 1}": float(losses[quarter == q].mean()) for q in range(NUM_QUARTERS) if (quarter == q).any()}


def summarise(
    losses: np.ndarray,
    levels: np.ndarray,
    row_ids: Sequence[str],
    groups: Mapping[str, str],
    base: Mapping[str, Sequence[float]] | None,
    edits: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics of one evaluation, without prefix: loss, loss_q1..4, base_loss, gain, gain_low, gain_high.

    Where there are edits, loss and gain are also given by kind: loss_edit, gain_edit, gain_edit_low, gain_edit_high,
    and the same of "generation", the rows without sources.

    Args:
        losses: (N, K), row by level; rows that occur twice (filled tails) count once.
        levels: (K,), in [0, 1].
        row_ids: (N,).
        groups: row id -> group.
        base: row id -> (K,) losses of the base model on the same noise and levels; None where there is no base.
        edits: (N,) bool, whether the row has sources; by default none has.
    """
    first = {row: i for i, row in reversed(list(enumerate(row_ids)))}
    rows = sorted(first)
    order = [first[row] for row in rows]
    losses = losses[order]
    metrics = {"loss": float(losses.mean())}
    metrics |= quarter_means(losses, np.broadcast_to(levels, losses.shape))
    kinds = {"": np.ones(len(rows), bool)}
    if edits is not None and edits.any():
        kinds |= {"_edit": edits[order], "_generation": ~edits[order]}
    gains, names = np.zeros(0), np.array([groups[row] for row in rows])
    if base is not None:
        base_losses = np.array([base[row] for row in rows])
        gains = (base_losses - losses).mean(axis=1)
        metrics["base_loss"] = float(base_losses.mean())
    for kind, chosen in kinds.items():
        if not chosen.any():
            continue
        if kind:
            metrics[f"loss{kind}"] = float(losses[chosen].mean())
        if base is not None:
            metrics[f"gain{kind}"] = float(gains[chosen].mean())
            interval = mean_interval(gains[chosen], names[chosen].tolist())
            if interval is not None:
                metrics[f"gain{kind}_low"], metrics[f"gain{kind}_high"] = interval
    return metrics
