"""Scores of several models on the same prompts: means, and differences to the first model, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .intervals import mean_interval

Scores = Mapping[int, float]
"""Row -> score, of the rows that have one."""


def compare(scores: Mapping[str, Mapping[str, Scores]], groups: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Means of each metric, and differences that are paired by row.

    Args:
        scores: metric -> model -> scores; the first model is the base.
        groups: row -> its prompt, over which the intervals are.

    Returns:
        `metrics`: metric -> model -> `mean`, `number` of rows and, from 10 prompts on, `low` and `high`, the ends of
        the 95 % interval of `mean_interval`; `paired`: metric -> adapter -> `difference`, adapter - base, over the rows
        that both have, with `number`, `low` and `high` likewise. A model without a score is left out.
    """
    metrics: dict[str, Any] = {}
    paired: dict[str, Any] = {}
    for metric, models in scores.items():
        base, *adapters = models
        metrics[metric] = {name: _mean("mean", found, groups) for name, found in models.items() if found}
        for name in adapters:
            gains = {row: score - models[base][row] for row, score in models[name].items() if row in models[base]}
            if gains:
                paired.setdefault(metric, {})[name] = _mean("difference", gains, groups)
    return {"metrics": metrics, "paired": paired}


def _mean(name: str, scores: Scores, groups: Mapping[int, str]) -> dict[str, float]:
    values = np.array(list(scores.values()), np.float64)
    found = {name: float(values.mean()), "number": len(values)}
    interval = mean_interval(values, [groups[row] for row in scores])
    return found | ({} if interval is None else {"low": interval[0], "high": interval[1]})


def comparison_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of a summary as texts: metric, mean of each model, and of each adapter its difference to the base."""
    models: Sequence[str] = summary["models"]
    head = ["metric", *models, *(f"{name} - {models[0]}" for name in models[1:])]
    rows = [head]
    for metric, found in summary["metrics"].items():
        means = [f"{found[name]['mean']:.4g}" if name in found else "-" for name in models]
        pairs = summary["paired"].get(metric, {})
        better = -1 if metric in summary.get("lower_is_better", []) else 1
        rows.append([metric, *means, *(_difference(pairs.get(name), better) for name in models[1:])])
    return rows


def _difference(found: Mapping[str, float] | None, better: int) -> str:
    """ "+0.12 (0.05 to 0.19), better"."""
    if found is None:
        return "-"
    text = f"{found['difference']:+.4g}"
    if "low" not in found:
        return text
    text += f" ({found['low']:.4g} to {found['high']:.4g})"
    if found["low"] <= 0 <= found["high"]:
        return text + ", not clear"
    return text + (", better" if better * found["difference"] > 0 else ", worse")
