"""The data of a page, from the files of a training run or an evaluation."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import SciflowError, counted, first_line
from .contact_sheet import source_paths, step_folders
from .model_card import RUN_FACTS_NAME, CardFacts, public_value, read_facts
from .page import UNREAD, UNREADABLE, Chart, Line, Page, Picture, Row, Table
from .plots import Line as Points
from .plots import loss_names, series, thinned

LOG_NAME = "log.jsonl"
"""The log of a run, a line an entry, see `LogCallback`."""
SCORES, SUMMARY = "scores.parquet", "summary.json"
MAX_POINTS = 300  # of a line
_KNOWN = ("row", "model", "prompt", "image", "reference", "sources", "seed", "width", "height", "incomplete")
_LOWER = re.compile(r"(^|_)(error|distance|loss|fid|kid|cer|wer|mse|rmse|nrmse|mae|lpips)(_|$)")
"""Less of these metrics is better, unless `lower_is_better` of the summary lists others."""
_RUN_FILES = ("run.json", LOG_NAME, RUN_FACTS_NAME, "validation", "checkpoint-*/trainer_state.json")
_EVALUATION_FILES = (SCORES, SUMMARY, "images")
_NOT_DRAWN = re.compile(r"epoch|step|total_flos|train_.*|.*_(runtime|per_second|low|high)|(eval_)?.*loss(_q\d)?")


def page_of(folder: str | Path) -> Page:
    """The page of a run's or an evaluation's folder, finished or not.

    Raises:
        SciflowError: no such folder, neither kind of folder, or no images in that of an evaluation.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SciflowError(f"{str(folder)!r} is no folder. Give the output folder of a training or an evaluation.")
    if any((folder / name).exists() for name in _EVALUATION_FILES[:2]) or any(folder.glob("images/*/*.png")):
        return evaluation_page(folder)
    if any(any(folder.glob(name)) for name in _RUN_FILES):
        return run_page(folder)
    there = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
    raise SciflowError(
        f"{str(folder)!r} has no images to show: it is neither the folder of a training ({', '.join(_RUN_FILES)}) nor "
        f"that of an evaluation ({', '.join(_EVALUATION_FILES)}). It holds {shown}."
    )


# ---- a training run ----


def run_page(folder: Path) -> Page:
    """Validation images of all steps side by side, losses by noise range, buckets and options of a run."""
    page = Page(title=folder.resolve().name)
    facts = _facts(folder, page)
    identity = _read_json(folder / "run.json", page) or _of_checkpoint(folder, "run.json", page)
    history = read_log(folder, page)
    page.rows, page.columns = _validation_rows(folder / "validation", page)
    drawn = [column for column in page.columns if not column.startswith("source")]
    page.base = drawn[0] if len(drawn) > 1 else ""
    page.charts = charts(history)
    if not page.rows:
        page.notices.append("No validation images: `--validation_prompts` draws them during training.")
    if not page.charts:
        page.notices.append("No losses were logged yet.")
    step = max([int(entry.get("step", 0)) for entry in history] + [facts.global_step if facts else 0])
    adapter = (facts.adapter if facts else identity.get("adapter")) or {}
    kind = f"{adapter['type']}, rank {adapter['rank']}" if {"type", "rank"} <= adapter.keys() else adapter.get("type")
    family = facts.family if facts else identity.get("family", "")
    ended = facts is not None and facts.global_step >= step
    page.subtitle = " · ".join(filter(None, (family, kind, f"{counted(step, 'step')}{'' if ended else ' so far'}")))
    if facts is not None:
        buckets = facts.dataset.get("buckets", {})
        pairs = [[str(size), f"{number:,}"] for size, number in buckets.items()]
        data = {key: value for key, value in facts.dataset.items() if key != "buckets"}
        page.details = [
            Table("Buckets", ["height x width", "figures"], pairs),
            _pairs("Last evaluation", facts.metrics),
            _pairs("Options that differ from their defaults", facts.non_default_args),
            _pairs("Model", {"base_model": facts.base_model, "revision": facts.revision, **adapter}),
            _pairs("Data", data),
            _pairs("Versions", facts.versions),
        ]
    else:
        page.details = [_pairs("Model", adapter), _pairs("Options", identity.get("options", {}))]
    page.details = [table for table in page.details if table.rows]
    return page


def _facts(folder: Path, page: Page) -> CardFacts | None:
    try:
        return read_facts(folder)
    except SciflowError as error:
        page.notices.append(str(error))
        return None


def read_log(folder: Path, page: Page) -> list[dict[str, Any]]:
    """The log of a run: its own file, or where an earlier version wrote none the newest checkpoint's."""
    file = folder / LOG_NAME
    if file.is_file():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                if line.endswith("\n"):  # otherwise it is being written
                    page.notices.append(f"{LOG_NAME}, line {number}: is no JSON object and was left out.")
        return entries
    return list(_of_checkpoint(folder, "trainer_state.json", page).get("log_history", []))


def _of_checkpoint(folder: Path, name: str, page: Page) -> dict[str, Any]:
    """A JSON file of the newest checkpoint that has it; {} without one."""
    numbers = {path: path.parent.name.removeprefix("checkpoint-") for path in folder.glob(f"checkpoint-*/{name}")}
    files = {int(number): path for path, number in numbers.items() if number.isdigit()}
    return (_read_json(files[max(files)], page) or {}) if files else {}


def _validation_rows(folder: Path, page: Page) -> tuple[list[Row], list[str]]:
    steps = {step: f"step {step:,}" if step else "before training" for step in step_folders(folder)}
    rows: dict[str, Row] = {}
    most, others = 0, []  # of the sources; images of other prompts
    for step, path in reversed(step_folders(folder).items()):  # the newest prompt is the row's
        for file in sorted(path.glob("p*_seed*.png")):
            found = re.fullmatch(r"p(\d+)_seed(-?\d+)", file.stem)
            if not found:
                continue
            picture, about = _picture(folder.parent, file)
            row = rows.setdefault(file.stem, Row(file.stem, about.get("prompt", ""), {}, {"seed": found[2]}))
            if not picture.problem and about.get("prompt", "") != row.prompt:
                others.append(picture.path)
                continue
            row.pictures[steps[step]] = picture
    for name, row in rows.items():
        sources = [_picture(folder.parent, file)[0] for file in source_paths(folder, int(name[1:].split("_")[0]))]
        most = max(most, len(sources))
        row.pictures |= dict(zip(_numbered("source", len(sources)), sources, strict=True))
    if others:
        page.notices.append(f"{counted(len(others), 'image')} of other prompts left out, such as {others[0]}.")
    order = sorted(rows, key=lambda name: [int(part) for part in re.findall(r"-?\d+", name)])
    return [rows[name] for name in order], [*_numbered("source", most), *steps.values()]


def charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Training loss and held-out loss, both also by noise range, learning rates, and one chart for any other number."""
    history = [entry for entry in history if "step" in entry]
    history = [{k: v for k, v in entry.items() if isinstance(v, int | float)} for entry in history]
    names = sorted({name for entry in history for name in entry})
    ranges = {1: "quarter 1 (least noise)", 2: "quarter 2", 3: "quarter 3", 4: "quarter 4 (most noise)"}

    def quarters(prefix: str) -> list[Line | None]:
        return [_line(history, f"{prefix}loss_q{i}", label, f"q{i}") for i, label in ranges.items()]

    found: list[tuple[str, list[Line | None]]] = [
        (
            "Training loss",
            [_line(history, "loss", "all", "ink"), *quarters(""), _line(history, "prior_loss", "prior", "soft")],
        )
    ]
    prefixes = {name.removesuffix("loss").removesuffix("base_") for name in loss_names(history) - {"loss"}}
    for prefix in sorted(prefixes):
        data = prefix.removeprefix("eval_").rstrip("_").replace("_", " ")
        base, trained = _line(history, f"{prefix}base_loss", "base model", "soft"), _held_out(history, prefix)
        if base is not None and base.steps[0] > 0:  # measured once, true of every step
            base = Line(base.name, [0, *base.steps], [base.values[0], *base.values], base.colour)
        found.append((f"Held-out loss {data}".strip(), [base, trained]))
        found.append((f"Held-out loss {data} by noise range".replace("  ", " "), quarters(prefix)))
    rates = [name for name in names if re.fullmatch(r"(effective_)?learning_rate.*", name)]
    colours = ("trained", "q1", "q2", "q3", "q4")
    found.append(
        ("Learning rate", [_line(history, n, n.replace("_", " "), c) for n, c in zip(rates, colours, strict=False)])
    )
    rest = [name for name in names if name not in rates and not _NOT_DRAWN.fullmatch(name)]
    found += [(_words(name), [_line(history, name, _words(name), "trained")]) for name in rest]
    return [Chart(title, lines) for title, made in found if (lines := [line for line in made if line is not None])]


def _line(history: Sequence[Mapping[str, Any]], name: str, label: str, colour: str) -> Line | None:
    points: Points = thinned(series(history, name), MAX_POINTS)
    return Line(label, points[0].tolist(), points[1].tolist(), colour) if len(points[0]) else None


def _held_out(history: Sequence[Mapping[str, Any]], prefix: str) -> Line | None:
    """The held-out loss; where each evaluation has an interval of the gain, that around it."""
    line = _line(history, f"{prefix}loss", "trained", "trained")
    base, low, high = (dict(zip(*series(history, f"{prefix}{n}"), strict=True))
                       for n in ("base_loss", "gain_low", "gain_high"))  # fmt: skip
    if line is not None and all(step in base and step in low and step in high for step in line.steps):
        line.low = [float(base[step] - high[step]) for step in line.steps]
        line.high = [float(base[step] - low[step]) for step in line.steps]
    return line


# ---- an evaluation ----


def evaluation_page(folder: Path) -> Page:
    """Source, reference and the images of each model side by side, with their scores."""
    page = Page(title=folder.resolve().name)
    summary = _read_json(folder / SUMMARY, page) or {}
    records = _scores(folder, page)
    models = list(dict.fromkeys([*summary.get("models", []), *(str(record["model"]) for record in records)]))
    metrics = _metrics(records, summary)
    lower = summary.get("lower_is_better", [name for name in metrics if _LOWER.search(name)])
    page.metrics = {name: name not in lower for name in metrics}
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault(str(record["row"]), []).append(record)
    page.rows = [_row(found, folder, metrics, models) for found in grouped.values()]
    given = {column for row in page.rows for column in row.pictures if column not in models}
    page.columns = [*sorted(given, key=_given_order), *models]
    page.base = models[0] if models else ""
    if not any(_shown(row, model) for row in page.rows for model in models):
        told = " ".join(page.document()["notices"]) or "It has no rows."
        raise SciflowError(f"{str(folder)!r} has no images to show. {told} Run the evaluation again.")
    page.subtitle = f"{counted(len(page.rows), 'row')} · {', '.join(models)}"
    page.scores = _score_tables(summary, models)
    sizes = Counter(row.facts.get("size", "unknown") for row in page.rows)
    page.details = [
        Table("Sizes", ["width x height", "rows"], [[size, f"{n:,}"] for size, n in sizes.most_common()]),
        _pairs("Options", summary.get("options", {})),
    ]
    page.details = [table for table in page.details if table.rows]
    return page


def _row(records: Sequence[Mapping[str, Any]], folder: Path, metrics: Sequence[str], models: Sequence[str]) -> Row:
    """The images of a prompt and seed: sources, reference, and those of the models with their scores."""
    first = records[0]
    row = Row(str(first["row"]), str(first.get("prompt") or ""), {})
    for kind in ("sources", "reference"):
        paths = _paths(first.get(kind))
        columns = _numbered(kind.removesuffix("s"), len(paths))
        columns = [f"{column} image" if column in models else column for column in columns]
        row.pictures |= {c: _picture(folder, folder / path)[0] for c, path in zip(columns, paths, strict=True)}
    others = [name for name in first if name not in (*_KNOWN, *metrics)]
    shared = {name: first[name] for name in others if all(record.get(name) == first[name] for record in records)}
    size = {"size": f"{first['width']} x {first['height']}"} if first.get("width") else {}
    facts = {"seed": first.get("seed"), **size, **shared}
    row.facts = {key: _text(value) for key, value in facts.items() if value not in (None, "")}
    for record in records:
        model = str(record["model"])
        picture = _picture(folder, folder / str(record.get("image") or f"images/{model}/{row.name}.png"))[0]
        picture.scores = {metric: _number(record.get(metric)) for metric in metrics}
        own = [
            f"{name.replace('_', ' ')} {_text(record[name])}" for name in others if name not in shared and record[name]
        ]
        picture.note = ", ".join([*(["incomplete"] if record.get("incomplete") else []), *own])
        row.pictures[model] = picture
    return row


def _given_order(column: str) -> tuple[bool, int, str]:
    """Sources, then the reference."""
    return column.startswith("reference"), len(column), column


def _shown(row: Row, column: str) -> bool:
    return column in row.pictures and not row.pictures[column].problem


def _scores(folder: Path, page: Page) -> list[dict[str, Any]]:
    """The rows of `scores.parquet`; of an evaluation that has not come that far those of its images."""
    import pyarrow
    import pyarrow.parquet

    file = folder / SCORES
    if not file.is_file():
        page.notices.append(f"{SCORES} is missing: the evaluation has not ended. Images are shown without prompts.")
        files = sorted(folder.glob("images/*/*.png"), key=lambda p: (_natural(p.stem), p.parent.name != "base", p))
        return [{"row": path.stem, "model": path.parent.name} for path in files]
    try:
        records: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise SciflowError(f"{str(file)!r} cannot be read ({first_line(error)}). Run the evaluation again.") from error
    missing = [name for name in ("row", "model") if records and name not in records[0]]
    if missing:
        raise SciflowError(
            f"{str(file)!r} has no column `{missing[0]}`, only {', '.join(records[0])}: an evaluation did not write it."
        )
    return records


def _metrics(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Those of the summary, then other columns of numbers."""
    columns = {name: None for record in records for name in record if name not in _KNOWN}
    numbers = [n for n in columns if any(_number(record.get(n)) is not None for record in records)]
    return list(dict.fromkeys([*(name for name in summary.get("metrics", {}) if name in numbers), *numbers]))


def _score_tables(summary: Mapping[str, Any], models: Sequence[str]) -> list[Table]:
    means = [
        [metric, *(_interval(found.get(model, {}), "mean") for model in models)]
        for metric, found in summary.get("metrics", {}).items()
    ]
    paired = summary.get("paired", {})
    adapters = [model for model in models if any(model in found for found in paired.values())]
    differences = [
        [metric, *(_interval(found.get(model, {}), "difference") for model in adapters)]
        for metric, found in paired.items()
    ]
    base = models[0] if models else "base"
    copies = [
        [found["image"], model, found["training_image"], f"{found['similarity']:.3f}"]
        for model, copied in summary.get("copies", {}).items()
        for found in copied
    ]
    incomplete = [[model, f"{number:,}"] for model, number in summary.get("incomplete", {}).items() if number]
    tables = [
        Table("Mean (95 % interval)", ["metric", *models], means),
        Table(f"Difference from {base}, paired by prompt", ["metric", *adapters], differences),
        Table("Near copies of training figures", ["image", "model", "training figure", "similarity"], copies),
        Table("Images without all of their scores", ["model", "images"], incomplete),
    ]
    return [table for table in tables if table.rows]


def _interval(found: Mapping[str, Any], name: str) -> str:
    value, low, high = (_number(found.get(key)) for key in (name, "low", "high"))
    if value is None:
        return "not measured"
    sign = "+" if name == "difference" else ""
    text = f"{value:{sign}.4g}"
    if low is not None and high is not None:
        text += f" ({low:.4g} to {high:.4g})"
        if name == "difference" and low <= 0 <= high:
            text += ", no clear difference"
    return text


# ---- shared ----


def _picture(folder: Path, file: Path) -> tuple[Picture, dict[str, str]]:
    """An image of the folder with the text fields of its file; with its problem where it cannot be shown."""
    inside = folder.resolve()
    if not file.resolve().is_relative_to(inside):
        return Picture(str(file), problem="outside the folder, left out"), {}
    picture = Picture(file.resolve().relative_to(inside).as_posix())
    try:
        picture.version = file.stat().st_mtime_ns
        (picture.width, picture.height), about = _header(file, picture.version)
    except FileNotFoundError:
        picture.problem, about = "missing", {}
    except UNREADABLE:
        picture.problem, about = UNREAD, {}
    return picture, about


@functools.lru_cache(maxsize=20_000)
def _header(file: Path, version: int) -> tuple[tuple[int, int], dict[str, str]]:
    with Image.open(file) as image:
        return image.size, {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def _paths(value: Any) -> list[str]:
    """Paths of a column that has none, one, or a list of them."""
    return [str(path) for path in ([value] if isinstance(value, str) else value or []) if path]


def _numbered(name: str, number: int) -> list[str]:
    return [name if i == 0 else f"{name} {i + 1}" for i in range(number)]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (1 << 62, text)


def _words(name: str) -> str:
    return name.replace("eval_", "held-out ", 1).replace("_", " ").replace("/", " ").capitalize()


def _pairs(title: str, values: Mapping[str, Any]) -> Table:
    shown = {key: value for key, value in public_value(values).items() if value not in (None, "", [], {})}
    return Table(title, [], [[key, _text(value)] for key, value in shown.items()])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read_json(file: Path, page: Page) -> dict[str, Any] | None:
    """An object of a JSON file; a notice where it is damaged."""
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        page.notices.append(f"{file.name} cannot be read ({first_line(error)}).")
        return None
