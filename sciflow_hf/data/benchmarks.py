"""Benchmarks by name, as rows to draw and to score: SciFormaBench (arXiv 2607.18091)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SciflowError, first_line
from .build.sources.splits import split_of_table

SCIFORMA, LEVELS = "microsoft/SciFormaBench", ("simple", "medium", "hard")
BENCHMARKS = ("sciforma", *(f"sciforma:{level}" for level in LEVELS))

# As published: how its images are drawn, the seed being 42 + the row's number within its level.
_SEED, _SETTINGS = 42, {"num_inference_steps": 50, "guidance_scale": 4.0}
_RUBRIC = ("rubric_components", "rubric_arrows", "rubric_text")
_NEEDED = ("prompt", "width", "height", "gt_image", *_RUBRIC)
_KEPT = ("year", "image_path")


def load_benchmark(name: str, *, split: str = "test") -> list[dict[str, Any]]:
    """The rows of a benchmark.

    Args:
        name: "sciforma" for all three levels, "sciforma:simple", "sciforma:medium" or "sciforma:hard", from the Hub; or
            a local copy: a parquet file, or a folder of them in which each name of a file or folder tells the level.
        split: of the data.

    Returns:
        Of each row `prompt`, `width`, `height`, `seed`, `num_inference_steps`, `guidance_scale`, `reference` (bytes of
        an image file, or None), `rubric_components`, `rubric_arrows` and `rubric_text` (JSON texts), `level`, `number`
        (within its level), and `year` and `image_path` if there.

    Raises:
        SciflowError: an unknown name, a copy that cannot be read, or one that lacks columns.
    """
    rows = []
    for level, cells in (_local(Path(name), split) if Path(name).exists() else _hub(name, split)).items():
        for number, row in enumerate(cells):
            picture = row["gt_image"]
            rows.append(
                {column: row[column] for column in ("prompt", "width", "height")}
                | {"seed": _SEED + number, **_SETTINGS}
                | {"reference": picture["bytes"] if isinstance(picture, Mapping) else picture}
                | {column: row[column] for column in (*_RUBRIC, *_KEPT) if column in row}
                | {"level": level, "number": number}
            )
    if not rows:
        raise SciflowError(f"`benchmark` {name!r} has no rows in the split {split!r}.")
    return rows


def _hub(name: str, split: str) -> dict[str, list[dict[str, Any]]]:
    import datasets

    if name not in BENCHMARKS:
        raise SciflowError(
            f"`benchmark` {name!r} is unknown: use {', '.join(BENCHMARKS)}, or the folder of a local copy. Give other "
            "data sets as prompts."
        )
    found = {}
    for level in [name.partition(":")[2]] if ":" in name else LEVELS:
        try:
            data = datasets.load_dataset(SCIFORMA, level, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise SciflowError(
                f"`benchmark` {name!r}: {SCIFORMA} ({level}, split {split!r}) cannot be loaded ({first_line(error)})."
            ) from error
        _check_columns(data.column_names, f"{SCIFORMA} ({level})")
        kept = [column for column in (*_NEEDED, *_KEPT) if column in data.column_names]
        found[level] = data.select_columns(kept).cast_column("gt_image", datasets.Image(decode=False)).to_list()
    return found


def _local(path: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    root = path.absolute().parent if path.is_file() else path.absolute()
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        inside = file.absolute().relative_to(root)
        if not path.is_file() and split_of_table(inside) not in (None, split, *LEVELS):
            continue
        level = _level(inside) or _level(Path(root.name))
        try:
            table = pq.ParquetFile(file)
            _check_columns(table.schema_arrow.names, str(file))
            kept = [column for column in (*_NEEDED, *_KEPT) if column in table.schema_arrow.names]
            found.setdefault(level, []).extend(table.read(kept).to_pylist())
        except (OSError, ValueError) as error:
            if isinstance(error, SciflowError):
                raise
            raise SciflowError(f"`benchmark` {file} cannot be read as parquet ({first_line(error)}).") from error
    if not files:
        raise SciflowError(f"`benchmark` {str(path)!r} holds no parquet files: give a copy of {SCIFORMA}.")
    return dict(sorted(found.items(), key=lambda item: LEVELS.index(item[0]) if item[0] in LEVELS else len(LEVELS)))


def _level(file: Path) -> str:
    """The level that the name of a file, or of a folder above it, has as a word; "" if none has."""
    words = re.split(r"[^a-z]+", file.as_posix().lower())
    return next((level for level in LEVELS if level in words), "")


def _check_columns(names: Sequence[str], where: str) -> None:
    if lacking := [column for column in _NEEDED if column not in names]:
        raise SciflowError(
            f"`benchmark`: {where} has no {', '.join(lacking)}, only {', '.join(names)}. A benchmark has the columns "
            f"of {SCIFORMA}; give other tables as prompts."
        )
