"""The scores of an evaluation as a plot, and as a section of a model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError
from ..files import atomic_file, disk_full_named
from ..metrics.comparison import comparison_rows
from .model_card import public_value
from .plots import _INK, _LINE, _SOFT, _TRAINED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEGIN, _END = "<!-- sciflow-hf evaluate -->", "<!-- end of sciflow-hf evaluate -->"
_COLUMNS = 3


def plot_scores(summary: Mapping[str, Any], path: Path) -> Path:
    """Draws the means of a summary with their intervals, a panel for each metric, into a PNG; returns its path."""
    with disk_full_named(path.parent), atomic_file(path) as temporary:
        scores_figure(summary).savefig(temporary, format="png", dpi=110)
    return path


def scores_figure(summary: Mapping[str, Any]) -> "Figure":
    """The matplotlib figure of `plot_scores`: a row for each model, filled where it differs clearly from the base."""
    from matplotlib.figure import Figure

    models, metrics = summary["models"], summary["metrics"]
    lines = -(-len(metrics) // _COLUMNS)
    wide = min(len(metrics), _COLUMNS)
    figure = Figure(figsize=(3.6 * wide, (1.1 + 0.32 * len(models)) * lines), layout="constrained")
    axes = figure.subplots(lines, wide, squeeze=False).ravel()
    for panel in axes[len(metrics) :]:
        panel.set_visible(False)
    for panel, (metric, found) in zip(axes, metrics.items(), strict=False):
        for place, model in enumerate(models):
            if model not in found:
                continue
            pair = summary["paired"].get(metric, {}).get(model, {})
            clear = "low" in pair and not pair["low"] <= 0 <= pair["high"]
            colour, values = _SOFT if place == 0 else _TRAINED, found[model]
            if "low" in values:
                panel.hlines(place, values["low"], values["high"], color=colour, linewidth=2)
            filled = colour if clear or place == 0 else "white"
            panel.plot(values["mean"], place, "o", color=colour, markerfacecolor=filled)
        panel.set_yticks(range(len(models)), models)
        panel.set_ylim(len(models) - 0.5, -0.5)
        lower = " (lower is better)" if metric in summary["lower_is_better"] else ""
        panel.set_title(metric.replace("_", " ") + lower, loc="left", color=_INK, fontsize=10, fontweight="bold")
        panel.grid(True, axis="x", color=_LINE, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(_SOFT)
        panel.tick_params(colors=_SOFT, labelsize=9)
    return figure


def add_to_card(folder: Path, model: str, summary: Mapping[str, Any]) -> None:
    """Puts the scores of one adapter into the README.md of its folder, instead of an earlier evaluation's.

    Raises:
        SciflowError: no README.md.
    """
    file = folder / "README.md"
    if not file.is_file():
        raise SciflowError(f"{file} is missing: it is written when a training ends.")
    section = f"{_BEGIN}\n{card_section(model, summary)}\n{_END}"
    text = file.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if between.search(text):
        text = between.sub(lambda _: section, text, count=1)
    else:
        before, training, after = text.partition("\n## Training\n")
        text = f"{before.rstrip()}\n\n{section}\n{training}{after}"
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def card_section(model: str, summary: Mapping[str, Any]) -> str:
    """The section of a model card, without its marks."""
    base = summary["models"][0]
    alone = {**summary, "models": [base, model]}
    head, *rows = comparison_rows(alone)
    head = ["", "base model", "this one", "difference"]
    options = public_value(summary["options"])
    source = next(str(options[name]) for name in ("prompts", "dataset", "benchmark") if name in options)
    lower = f" Lower is better: {', '.join(summary['lower_is_better'])}." if summary["lower_is_better"] else ""
    lines = [head, ["---"] * len(head), *rows]
    return (
        f"## Evaluation\n\nMeans over the images of {summary['prompts']:,} prompts (`{source}`), drawn by both "
        f"from the same seeds; differences are paired, with their 95 % interval over prompts.{lower}\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in lines)
    )
