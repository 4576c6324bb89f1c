"""`report.html`: the images, scores and losses of a run or an evaluation as one file that needs no network."""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import counted, printable
from ..files import atomic_file, disk_full_named

PAGE_NAME = "report.html"
ASSETS = Path(__file__).parents[1] / "assets" / "page"
SIDE, SMALLEST, MANY = 320, 128, 1000
"""Pixels of a thumbnail's longer side: `SIDE`, fewer where there are more than `MANY`, `SMALLEST` at least."""
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Errors of Pillow for an image that it cannot read."""
UNREAD = "cannot be read"
_BLOCK = 48  # thumbnails that the page decodes together
_NAMED = 5  # images that a notice names


@dataclass
class Picture:
    """An image of a row.

    Args:
        path: relative to the folder of the page, with "/".
        width: in pixels; 0 where the image cannot be read.
        height: likewise.
        version: changes with the file, so that a page that follows a run asks for it again.
        scores: metric -> value; None was not measured.
        problem: why there is no image; "" where there is one.
        note: a short remark, such as "incomplete".
    """

    path: str
    width: int = 0
    height: int = 0
    version: int = 0
    scores: dict[str, float | None] = field(default_factory=dict)
    problem: str = ""
    note: str = ""


@dataclass
class Row:
    """Images that belong side by side: one prompt and seed, drawn by several models or at several steps.

    Args:
        name: of the row, different for each.
        prompt: as the user wrote it.
        pictures: column -> image.
        facts: what else is known of the row, such as its seed.
    """

    name: str
    prompt: str
    pictures: dict[str, Picture]
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class Line:
    """A line of a chart.

    Args:
        name: for the legend.
        steps: optimizer steps, ascending.
        values: as many, finite.
        colour: `ink`, `soft`, `trained`, or `q1` to `q4`, from the least noise to the most.
        low: the lower end of an interval at each step, or none.
        high: the upper end likewise.
    """

    name: str
    steps: list[float]
    values: list[float]
    colour: str = "trained"
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass
class Chart:
    """Lines over optimizer steps."""

    title: str
    lines: list[Line]


@dataclass
class Table:
    """A table of text: its title, names of columns (none: two columns, name and value), and rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Page:
    """All that a page shows.

    Args:
        title: of the page.
        subtitle: one line below it.
        columns: what stands side by side, in order: sources, reference, then models or steps.
        base: the column that others are compared with; "" for none.
        metrics: name of a score -> whether higher values are better.
        rows: the images.
        charts: losses over the steps.
        scores: tables of scores.
        details: other tables: buckets, options, versions.
        notices: what is missing or was left out, a sentence each.
    """

    title: str
    subtitle: str = ""
    columns: list[str] = field(default_factory=list)
    base: str = ""
    metrics: dict[str, bool] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    scores: list[Table] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def pictures(self) -> Iterator[Picture]:
        """The images that there are, in the order of the rows."""
        return (p for row in self.rows for p in row.pictures.values() if not p.problem)

    def document(self) -> dict[str, Any]:
        """The page as JSON types, with a notice for each kind of problem of its images."""
        found: dict[str, list[str]] = {}
        for picture in (p for row in self.rows for p in row.pictures.values() if p.problem):
            found.setdefault(picture.problem, []).append(picture.path)
        told = list(self.notices)
        for problem, paths in found.items():
            named = ", ".join(paths[:_NAMED]) + (", ..." if len(paths) > _NAMED else "")
            told.append(f"{counted(len(paths), 'image')} {problem}: {named}.")
        return json_types(asdict(self) | {"notices": told})


def page_html(page: Page, folder: Path) -> str:
    """The page as one file, with thumbnails of its images inside; the images themselves are linked by their paths.

    Args:
        page: what to show; images that cannot be read are marked in it.
        folder: that the paths of the images start from.
    """
    files = {picture.path: folder / picture.path for picture in page.pictures()}
    side = round(max(SMALLEST, min(SIDE, SIDE * (MANY / max(len(files), 1)) ** 0.5)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(files, pool.map(lambda file: _data_uri(file, side), files.values()), strict=True))
    for picture in page.pictures():
        if picture.path in made and made[picture.path] is None:
            picture.problem = UNREAD
    thumbnails = {path: uri for path, uri in made.items() if uri is not None}
    paths = list(thumbnails)
    blocks = [{path: thumbnails[path] for path in paths[i : i + _BLOCK]} for i in range(0, len(paths), _BLOCK)]
    places = {path: i // _BLOCK for i, path in enumerate(paths)}
    return _html(page, page.document() | {"blocks": places}, blocks)


def served_html(page: Page, seconds: float) -> str:
    """The page as it is served: it asks for thumbnails as needed, and for its data again every few seconds."""
    return _html(page, page.document() | {"follow": seconds}, [])


def write_page(page: Page, folder: str | Path) -> Path:
    """Writes `report.html` into the folder that the paths of the images start from; returns its path."""
    file = Path(folder) / PAGE_NAME
    text = page_html(page, Path(folder))
    with disk_full_named(folder), atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return file


def thumbnail(file: Path, side: int = SIDE) -> bytes:
    """A WebP of at most `side` pixels; an image that is smaller is kept as it is, without loss.

    Raises:
        OSError: no image, or a broken one; see `UNREADABLE` for the others.
    """
    with Image.open(file) as image:
        lossless = max(image.size) <= side
        image.draft("RGB", (side, side))
        image.thumbnail((side, side), reducing_gap=1.0)
        clear = "A" in image.mode or "transparency" in image.info
        written = io.BytesIO()
        image.convert("RGBA" if clear else "RGB").save(written, "WEBP", quality=82, method=1, lossless=lossless)
    return written.getvalue()


def _data_uri(file: Path, side: int) -> str | None:
    """A thumbnail; None of an image that cannot be read."""
    try:
        return f"data:image/webp;base64,{base64.b64encode(thumbnail(file, side)).decode()}"
    except UNREADABLE:
        return None


def json_types(value: Any) -> Any:
    """`value` without what JSON does not hold (NaN becomes None), and text without control characters."""
    if isinstance(value, dict):
        return {printable(str(key)): json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_types(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return printable(value) if isinstance(value, str) else value


def embedded(value: Any) -> str:
    """JSON that can stand in HTML: nothing in it ends a script or begins a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _html(page: Page, data: dict[str, Any], blocks: list[dict[str, str]]) -> str:
    style, script = ((ASSETS / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "'self' file: data:",
        "connect-src": "'self'" if "follow" in data else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    parts = {
        "policy": html.escape("; ".join(f"{name} {value}" for name, value in policy.items())),
        "title": html.escape(printable(page.title)),
        "style": style,
        "data": embedded(data),
        "thumbnails": "\n".join(f'<script type="application/json">{embedded(block)}</script>' for block in blocks),
        "script": script,
    }
    text = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
