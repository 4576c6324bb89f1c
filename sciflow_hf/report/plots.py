"""The plot of a run, `training.png`: loss by noise range, held-out loss, learning rate, from the log history alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SciflowError
from ..files import atomic_file, disk_full_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_NAME = "training.png"

MAX_POINTS = 100  # of a line; more logs are averaged, so that noise does not fill the panel
LOG_FROM = 4.0  # values whose ratio is larger get a logarithmic axis
_INK, _SOFT, _LINE, _TRAINED = "#1f2328", "#59636e", "#d1d9e0", "#1f77b4"
_RANGES = ("#440154", "#3b6fa0", "#2aa876", "#e0a500")  # from dark to light, so also in grey: least to most noise

Line = tuple[np.ndarray, np.ndarray]


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draws a run into a PNG, complete or not there (`atomic_file`); returns its path.

    Three panels over the optimizer steps, those without data left out: the training loss, all of it and in each quarter
    of the noise range; the held-out loss of the base model and of the trained one, with the 95 % interval of the gain
    laid around the trained one (base - gain_high to base - gain_low: where it lies below the base, training helped);
    the learning rate, with Prodigy the one in use. Of more than `MAX_POINTS` logs, means of equal runs of them.

    Args:
        log_history: `trainer.state.log_history`, or the list of that name in a checkpoint's `trainer_state.json`.
        path: of the PNG.

    Raises:
        SciflowError: there is nothing to draw, or the file cannot be written.
    """
    figure = training_figure(log_history)
    if figure is None:
        raise SciflowError("`log_history` holds no loss: train at least `--logging_steps` steps before plotting.")
    file = Path(path)
    try:
        with disk_full_named(file.parent), atomic_file(file) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise SciflowError(f"{file} cannot be written ({error}). Is its folder writable?") from error
    return file


def training_figure(log_history: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """The matplotlib figure of `plot_training`; None where no loss was logged."""
    from matplotlib.figure import Figure

    losses = loss_names(log_history)
    if not losses:
        return None
    names = {name for entry in log_history for name in entry}
    rate = "effective_learning_rate" if "effective_learning_rate" in names else "learning_rate"
    draw = {
        "training loss": _draw_losses if "loss" in losses else None,
        "held-out loss": _draw_held_out if losses - {"loss"} else None,
        "learning rate in use" if rate != "learning_rate" else "learning rate": _draw_rates if rate in names else None,
    }
    panels = {title: function for title, function in draw.items() if function is not None}
    last = max(entry["step"] for entry in log_history)
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    for axes, (title, function) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        function(axes, log_history)
        axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
        axes.set_xlabel("optimizer step")
        axes.set_xlim(0, 1.03 * max(last, 1))
        _tidy(axes, from_zero=title == "learning rate")  # Prodigy's grows by factors, schedules fall to 0
    return figure


def loss_names(log_history: Iterable[Mapping[str, Any]]) -> set[str]:
    """Which losses the logs have that a plot shows: `loss`, `eval_loss` and such; empty where nothing was logged."""
    finite = {name for entry in log_history for name, value in entry.items() if np.isfinite(value)}
    return {name for name in finite if name == "loss" or (name.startswith("eval_") and name.endswith("loss"))}


def series(log_history: Iterable[Mapping[str, Any]], name: str) -> Line:
    """Steps and values of one entry of the logs, finite ones; of a step that is there twice the later one."""
    found = {e["step"]: float(e[name]) for e in log_history if name in e and np.isfinite(float(e[name]))}
    steps = sorted(found)
    return np.array(steps), np.array([found[step] for step in steps])


def thinned(line: Line, points: int = MAX_POINTS) -> Line:
    """At most that many points: means of steps and values over equal runs of neighbours."""
    if len(line[0]) <= points:
        return line
    steps, values = (np.array([part.mean() for part in np.array_split(each, points)]) for each in line)
    return steps, values


def _draw_losses(axes: "Axes", history: Sequence[Mapping[str, Any]]) -> None:
    ends = {1: " (least noise)", len(_RANGES): " (most noise)"}
    _draw(axes, thinned(series(history, "loss")), _INK, "all", 2.4)
    for number, colour in enumerate(_RANGES, start=1):
        _draw(axes, thinned(series(history, f"loss_q{number}")), colour, f"quarter {number}{ends.get(number, '')}", 1.3)
    _draw(axes, thinned(series(history, "prior_loss")), _SOFT, "prior", 1.3, style="--")


def _draw_held_out(axes: "Axes", history: Sequence[Mapping[str, Any]]) -> None:
    """`eval_loss`, or `eval_NAME_loss` for each of several data sets, with base and interval where there are any."""
    names = loss_names(history) - {"loss"}
    prefixes = sorted({name.removesuffix("loss").removesuffix("base_") for name in names})
    colours = (_TRAINED, *_RANGES) if len(prefixes) > 1 else (_TRAINED,)
    for prefix, colour in zip(prefixes, colours, strict=False):
        data = prefix.removeprefix("eval_").rstrip("_")
        trained, base = series(history, f"{prefix}loss"), series(history, f"{prefix}base_loss")
        if len(base[0]):  # measured once, true of every step
            base = np.append(0, base[0]), np.append(base[1][0], base[1])
        _draw(axes, base, _SOFT if len(prefixes) == 1 else colour, f"{data} base model".strip(), 1.6, style="--")
        ends = [f"{prefix}{name}" for name in ("base_loss", "gain_low", "gain_high")]
        measured = [e for e in history if all(np.isfinite(e.get(end, np.nan)) for end in ends)]
        steps, low = series(_differences(measured, prefix, "gain_high"), "loss")
        _, high = series(_differences(measured, prefix, "gain_low"), "loss")
        if len(steps):
            label = f"{data} 95 % interval of the gain".strip()
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, label=label)
            axes.vlines(steps, low, high, color=colour, alpha=0.35, linewidth=1.5)
        _draw(axes, trained, colour, f"{data} trained".strip(), 2.2, marker="o")


def _differences(history: Iterable[Mapping[str, Any]], prefix: str, name: str) -> list[dict[str, float]]:
    """Base loss minus an end of the gain's interval."""
    return [{"step": e["step"], "loss": e[f"{prefix}base_loss"] - e[f"{prefix}{name}"]} for e in history]


def _draw_rates(axes: "Axes", history: Sequence[Mapping[str, Any]]) -> None:
    effective = series(history, "effective_learning_rate")
    if len(effective[0]):
        return _draw(axes, effective, _TRAINED, "Prodigy: d x learning rate", 2.2)
    groups = sorted({name for entry in history for name in entry if name.startswith("learning_rate_")})
    if not groups:
        return _draw(axes, series(history, "learning_rate"), _TRAINED, "", 2.2)
    for name, colour in zip(groups, (_TRAINED, *_RANGES), strict=False):
        _draw(axes, series(history, name), colour, name.removeprefix("learning_rate_"), 2.2)
    return None


def _draw(
    axes: "Axes", line: Line, colour: str, label: str, width: float, *, style: str = "-", marker: str = ""
) -> None:
    """A line, of a single point a dot; in the legend where it has a label."""
    if len(line[0]):
        marker = "o" if len(line[0]) == 1 else marker
        axes.plot(
            *line, color=colour, label=label or "_", linewidth=width, linestyle=style, marker=marker, markersize=4.5
        )


def _tidy(axes: "Axes", *, from_zero: bool) -> None:
    """Logarithmic where values span much, unless `from_zero`; few readable ticks, a legend where lines have labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if not from_zero and values.min() > 0 and values.max() > LOG_FROM * values.min():
        axes.set_yscale("log")
        wide = values.max() > 1000 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if from_zero or (values.min() >= 0 and axes.get_ylim()[0] < 0):
            axes.set_ylim(0, 1.08 * (values.max() or 1) if from_zero else None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(True, color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(colors=_SOFT, labelsize=9)
    axes.xaxis.label.set_color(_SOFT)
    if any(not str(line.get_label()).startswith("_") for line in axes.lines):
        where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.16), "ncols": 2}
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, borderpad=0, handlelength=1.6, **where)
