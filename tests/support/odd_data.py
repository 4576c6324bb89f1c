"""Random data sets with oddities, as people have them, and whether a build makes of them what was meant.

A case follows from its seed: `Case` has its figures, written as one of `KINDS` with some of `ODDITIES`. Each figure has
a colour of its own, which its latents must show, and a caption; what is expected of a figure is that it is in the
cache, that it is skipped by name, or that the whole build is refused for it.
"""

import codecs
import csv
import io
import json
import logging
import os
import random
import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from builds import PAYLOADS, StubEncoders, build, samples_of
from PIL import Image

from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

KINDS = ("texts", "jsonl", "csv", "snapshot", "metadata.parquet", "parquet", "table", "saved")
TABLES = ("parquet", "table", "saved")
GRID = (10, 90, 170, 250)
"""Values of a colour's red, green and blue: no two figures of a case are less than 80 of 255 apart."""


@dataclass
class Figure:
    """One figure of a data set, and what is expected of it.

    Attributes:
        name: its path in the data set.
        colour: of all its pixels, 8 bits.
        captions: one sample each.
        data: the encoded image.
        skipped: what the reason says, where the figure cannot be used.
        text: bytes of the file with its caption, where it has one of its own.
        listed: what the metadata call it.
        size: (height, width) in pixels, as it is meant to be seen.
    """

    name: str
    colour: tuple[int, int, int]
    captions: list[str]
    data: bytes = b""
    skipped: str = ""
    text: bytes | None = None
    listed: str = ""
    size: tuple[int, int] = (40, 40)

    def draw(self, *, save: dict[str, Any] | None = None, mode: str = "RGB") -> None:
        picture = Image.new("RGB", self.size[::-1], self.colour).convert(mode)
        self.data = encoded(picture, Path(self.name).suffix, **(save or {}))


@dataclass
class Case:
    """A data set: how it is written, its figures, further files, and what refuses it as a whole."""

    seed: int
    kind: str
    figures: list[Figure]
    options: dict[str, Any]
    of: random.Random
    more: dict[str, bytes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    separator: str = ","
    said: list[str] = field(default_factory=list)

    @property
    def usable(self) -> list[Figure]:
        return [figure for figure in self.figures if not figure.skipped]


def encoded(picture: Image.Image, suffix: str, **save: Any) -> bytes:
    file = io.BytesIO()
    kind = Image.registered_extensions()[suffix.lower()]
    exact = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    picture.save(file, kind, **exact.get(kind, {}) | save)
    return file.getvalue()


def draw(seed: int) -> Case:
    """The case of a seed; kinds take turns."""
    of = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    colours = [(r, g, b) for r in GRID for g in GRID for b in GRID]
    of.shuffle(colours)
    figures = []
    for number in range(of.randint(1, 60)):
        folder = of.choice(["", "", "a/", "paper 2/"]) if kind not in TABLES else ""
        suffix = of.choice([".png", ".png", ".bmp", ".webp", ".tiff"])
        size = of.choice([(32, 32), (40, 56), (56, 40), (64, 64)])
        figure = Figure(f"{folder}fig{number:02d}{suffix}", colours[number], [f"figure {number}, é"], size=size)
        figure.draw()
        figures.append(figure)
    options = {
        "payload": of.choice(PAYLOADS), "batch_size": of.choice([1, 1, 3]), "crops": of.choice([0, 0, 0, 1]),
        "flip": of.random() < 0.1, "samples_per_part": of.choice([4, 500]),
    }  # fmt: skip
    case = Case(seed, kind, figures, options, of)
    possible = [oddity for oddity in ODDITIES if kind in oddity.kinds]
    for oddity in of.sample(possible, min(len(possible), of.randint(1, 3))):
        oddity.make(case)
    return case


# ---- oddities ----


@dataclass(frozen=True)
class Oddity:
    make: Callable[[Case], None]
    kinds: tuple[str, ...]


ODDITIES: list[Oddity] = []
FOLDERS = tuple(kind for kind in KINDS if kind not in TABLES)
NOTES = ("jsonl", "csv", "snapshot", "metadata.parquet")


def oddity(*kinds: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def added(make: Callable[[Case], None]) -> Callable[[Case], None]:
        ODDITIES.append(Oddity(make, kinds or KINDS))
        return make

    return added


def one(case: Case) -> Figure:
    """A figure that nothing else has made odd."""
    plain = [f for f in case.figures if not f.skipped and len(f.captions) == 1 and f.text is None and not f.listed]
    if not plain:
        figure = Figure(f"more{len(case.figures)}.png", (130, 130, 130), ["one more figure"])
        figure.draw()
        case.figures.append(figure)
        return figure
    return case.of.choice(plain)


def renamed(case: Case, figure: Figure, name: str) -> None:
    figure.name = os.path.join(os.path.dirname(figure.name), name)


@oddity("texts")
def captions_in_other_encodings(case: Case) -> None:
    encodings = ["cp1252", "utf-8-sig", "utf-16", "utf-32"]
    figure, encoding = one(case), case.of.choice(encodings)
    figure.text = figure.captions[0].encode(encoding)
    if encoding == "cp1252":
        case.said.append("Windows-1252")


@oddity("texts")
def caption_of_utf_16_without_a_mark(case: Case) -> None:
    figure = one(case)
    figure.text, figure.skipped = figure.captions[0].encode("utf-16-le"), "text file cannot be read"


@oddity("texts")
def captions_with_empty_lines_around(case: Case) -> None:
    figure = one(case)
    figure.text = f"\r\n  {figure.captions[0]}\n\n".encode()


@oddity("jsonl", "snapshot", "metadata.parquet", *TABLES)
def several_captions(case: Case) -> None:
    if case.kind in ("jsonl", "snapshot"):
        figure = one(case)
        figure.captions = [*figure.captions, "another caption", f"a third of {figure.name}"]
    else:
        for figure in case.figures:
            figure.captions = [*figure.captions, f"another caption of {figure.name}"] if figure.captions[0] else [""]


@oddity("jsonl", "snapshot")
def a_caption_that_is_no_text(case: Case) -> None:
    figure = one(case)
    figure.captions = [case.of.choice([7, {"en": "a plot"}, True])]
    case.refused = r"(Line|Row) \d+ of .*`caption` is .*a caption is a text"


@oddity("jsonl", "snapshot")
def half_an_emoji(case: Case) -> None:
    figure = one(case)
    figure.captions, figure.skipped = ["A chart \ud83d"], "half a character"


@oddity()
def no_caption(case: Case) -> None:
    figure = one(case)
    figure.captions, figure.skipped = [""], "no caption"


@oddity()
def a_broken_image(case: Case) -> None:
    figure = one(case)
    kinds = [b"", b"no image at all", figure.data[: len(figure.data) // 2]]
    figure.data, figure.skipped = case.of.choice(kinds[: 2 if figure.name.endswith(("tiff", "bmp")) else 3]), "image"


@oddity()
def another_format(case: Case) -> None:
    figure = one(case)
    renamed(case, figure, Path(figure.name).stem + case.of.choice([".gif", ".jpg", ".jp2", ".tga", ".ppm", ".PNG"]))
    figure.draw()


@oddity()
def the_wrong_suffix(case: Case) -> None:
    figure = one(case)
    renamed(case, figure, Path(figure.name).stem + ".png")
    figure.data = encoded(Image.new("RGB", figure.size[::-1], figure.colour), ".bmp")


@oddity()
def turned_by_its_metadata(case: Case) -> None:
    figure = one(case)
    renamed(case, figure, Path(figure.name).stem + case.of.choice([".tiff", ".png", ".webp"]))
    figure.size = (24, 64)
    exif = Image.Exif()
    exif[0x0112] = case.of.choice([6, 8])
    picture = Image.new("RGB", (24, 64), figure.colour)
    figure.data = encoded(picture, Path(figure.name).suffix, exif=exif)


@oddity()
def transparent(case: Case) -> None:
    figure = one(case)
    renamed(case, figure, Path(figure.name).stem + ".png")
    figure.data, figure.colour = encoded(Image.new("RGBA", figure.size[::-1], (0, 0, 0, 0)), ".png"), (255, 255, 255)


@oddity()
def cmyk_or_grey(case: Case) -> None:
    figure = one(case)
    renamed(case, figure, Path(figure.name).stem + ".tiff")
    mode = case.of.choice(["CMYK", "L", "LA", "1", "P"])
    if mode in ("L", "LA", "1"):
        figure.colour = (255, 255, 255)
    if mode == "P":
        renamed(case, figure, Path(figure.name).stem + ".bmp")
        figure.colour = (255, 0, 0)
    figure.draw(mode=mode)


@oddity()
def grey_of_more_bits(case: Case) -> None:
    figure = one(case)
    renamed(case, figure, Path(figure.name).stem + ".tiff")
    values = np.full(figure.size, 51 * 257, np.uint16)
    if case.of.random() < 0.5:
        values = np.full(figure.size, 0.2, np.float32)
        values[0, 0] = np.nan
    figure.data, figure.colour = encoded(Image.fromarray(values), ".tiff"), (51, 51, 51)


@oddity()
def an_odd_shape(case: Case) -> None:
    figure = one(case)
    figure.size = case.of.choice([(10, 10), (1, 1), (30, 180), (200, 33), (300, 310)])
    figure.draw()


@oddity(*FOLDERS)
def an_odd_name(case: Case) -> None:
    figure, suffix = one(case), ".png"
    names = [
        "in [v2]",
        "a b",
        "50%",
        "x#1",
        "it's",
        "Übersicht",
        unicodedata.normalize("NFD", "Übersicht"),
        "a,b;c",
        "日本",
    ]
    renamed(case, figure, case.of.choice(names) + suffix)
    figure.draw()


@oddity(*FOLDERS)
def an_odd_folder(case: Case) -> None:
    figure = one(case)
    figure.name = f"{case.of.choice(['in [v2]', 'ü', 'a#b', 'data*'])}/{os.path.basename(figure.name)}"


@oddity("jsonl", "csv", "metadata.parquet")
def names_as_others_write_them(case: Case) -> None:
    figure = one(case)
    names = [
        figure.name.replace("/", "\\"),
        f"./{figure.name}",
        unicodedata.normalize("NFD", figure.name),
        f"data/{figure.name}",
    ]
    figure.listed = case.of.choice(names)


@oddity("csv")
def another_separator(case: Case) -> None:
    case.separator = case.of.choice([";", "\t", "|"])


@oddity("csv")
def a_comma_in_a_caption(case: Case) -> None:
    figure = one(case)
    figure.captions = [f"a plot{case.separator} with a legend"]
    if case.of.random() < 0.5:
        figure.text = b"unquoted"
        case.refused = r"Line \d+ of .* has \d+ fields"


@oddity(*NOTES)
def a_row_without_a_file(case: Case) -> None:
    case.missing.append("gone.png")


@oddity(*FOLDERS)
def files_of_other_kinds(case: Case) -> None:
    case.more |= {"notes.pdf": b"%PDF", "README.md": b"# Figures", ".DS_Store": b"\0"}
    case.more |= {"drawing.svg": b"<svg/>", "drawing.txt": b"A drawing."} if case.kind == "texts" else {}


@oddity("texts", "jsonl")
def a_linked_folder(case: Case) -> None:
    figure = one(case)
    figure.name = f"linked/{os.path.basename(figure.name)}"
    case.links["linked"] = "folder"


@oddity("texts", "jsonl")
def links_to_nothing(case: Case) -> None:
    case.links["nothing.png"] = "nothing"


@oddity(*TABLES)
def other_splits(case: Case) -> None:
    case.more["test"] = b""
    case.said.append("test")


# ---- writing ----


def write(case: Case, folder: Path) -> Path:
    """The data set of a case in `folder`; returns what `cache build` gets as its input."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "data"
    source.mkdir(parents=True)
    if case.kind in TABLES:
        return _write_table(case, source)
    for number, figure in enumerate(case.figures):
        file = source / figure.name
        if case.links.get(figure.name.split("/")[0]) == "folder" and not (source / "linked").exists():
            (folder / "elsewhere").mkdir()
            (source / "linked").symlink_to(folder / "elsewhere")
        file.parent.mkdir(parents=True, exist_ok=True)
        if case.kind == "snapshot":  # as huggingface_hub leaves them
            blob = folder / "blobs" / f"{number:040x}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(figure.data)
            file.symlink_to(blob)
        else:
            file.write_bytes(figure.data)
        if case.kind == "texts" and (figure.text is not None or figure.captions[0]):
            file.with_suffix(".txt").write_bytes(figure.text or figure.captions[0].encode())
    for name, data in case.more.items():
        (source / name).write_bytes(data)
    for name, what in case.links.items():
        if what == "nothing":
            (source / name).symlink_to(folder / "nowhere.png")
    if case.kind != "texts":
        _write_notes(case, source)
    return source


def _write_notes(case: Case, source: Path) -> None:
    rows: list[dict[str, Any]] = []
    alone = all(len(figure.captions) == 1 for figure in case.figures)
    for figure in case.figures:
        several = not alone if case.kind == "metadata.parquet" else len(figure.captions) > 1
        caption = figure.captions if several else figure.captions[0]
        rows.append({"file_name": figure.listed or figure.name, "caption": caption})
    for name in case.missing:
        rows.append({"file_name": name, "caption": "gone" if alone else ["gone"]})
    if case.kind == "metadata.parquet":
        pq.write_table(pa.Table.from_pylist(rows), source / "metadata.parquet")
    elif case.kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, delimiter=case.separator)
        writer.writerow(rows[0])
        for row, figure in zip(rows, [*case.figures, *[None] * len(case.missing)], strict=True):
            if figure is not None and figure.text == b"unquoted":
                text.write(case.separator.join(row.values()) + "\n")
            else:
                writer.writerow(row.values())
        (source / "metadata.csv").write_bytes(codecs.BOM_UTF8 * (case.seed % 2) + text.getvalue().encode())
    else:
        lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
        (source / "metadata.jsonl").write_text(lines, encoding="utf-8")


def _write_table(case: Case, source: Path) -> Path:
    several = any(len(figure.captions) > 1 for figure in case.figures)
    captions: list[Any] = [figure.captions if several else figure.captions[0] for figure in case.figures]
    images = [{"bytes": figure.data, "path": figure.name} for figure in case.figures]
    table = pa.table({"image": images, "caption": captions})
    if case.kind == "saved":
        text = datasets.Value("string")
        features = datasets.Features({"image": datasets.Image(decode=False), "caption": [text] if several else text})
        data: Any = datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features)
        if "test" in case.more:
            data = datasets.DatasetDict({"train": data, "test": data.select([0])})
        data.save_to_disk(source)
        return source
    if case.kind == "table":
        # Bare bytes, as polars and duckdb write them: rows have numbers for names.
        table = table.set_column(0, "image", pa.array([figure.data for figure in case.figures], pa.binary()))
        for number, figure in enumerate(case.figures):
            figure.listed = f"row_{number:08d}"
    folder = source / "in [v2]"
    folder.mkdir()
    if "test" in case.more:
        pq.write_table(table.slice(0, 1), folder / "test-00000-of-00001.parquet")
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    return source


# ---- edits ----


def edit(case: Case) -> str:
    """Changes one figure as people do between two builds."""
    figure = case.of.choice(case.usable)
    kinds = ["repainted", "resized", "caption", "removed", "added", "swapped"]
    what = case.of.choice(kinds if len(case.usable) > 2 else kinds[:3])
    if what == "repainted":
        figure.colour = (50, 130, 210)
        figure.draw()  # a BMP keeps its length
    elif what == "resized":
        figure.size = (48, 30)
        figure.draw()
    elif what == "caption":
        figure.captions, figure.text = ["as it should have been said", *figure.captions[1:]], None
    elif what == "removed":
        case.figures.remove(figure)
    elif what == "added":
        more = Figure("zz_new.png", (50, 210, 130), ["a new figure", *(["and again"] * (len(figure.captions) > 1))])
        more.draw()
        case.figures.append(more)
    else:
        other = next(f for f in case.usable if f is not figure)
        for name in ("data", "colour", "size"):
            mine, theirs = getattr(figure, name), getattr(other, name)
            setattr(figure, name, theirs)
            setattr(other, name, mine)
    return what


# ---- what came of it ----


class Said(logging.Handler):
    """What the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def check(case: Case, folder: Path) -> str:
    """Builds the case, looks at what came of it, edits it and builds again; says what was seen.

    Raises:
        AssertionError: something was not as it should be.
    """
    source, cache = write(case, folder / "source"), folder / "cache"
    if case.refused:
        message = refusal(source, cache, case.options)
        assert re.search(case.refused, message), message
        return f"refused: {message[:200]}"
    if not case.usable:
        message = refusal(source, cache, case.options)
        return f"nothing usable: {message[:200]}"
    looked_at(case, source, cache)
    encoders = StubEncoders()
    again = build(source, cache, encoders, **case.options)
    assert again.encoded == encoders.num_images == 0, "an unchanged data set is encoded again"
    if any(figure.skipped for figure in case.figures) or case.missing:
        message = refusal(source, folder / "strict", case.options | {"strict": True})
        assert "--strict" in message, message
    what = edit(case)
    source = write(case, folder / "source")
    looked_at(case, source, cache)
    build(source, folder / "fresh", **case.options)
    one, other = samples_of(cache), samples_of(folder / "fresh")
    assert one.keys() == other.keys()
    for name, sample in one.items():
        assert all(torch.equal(value, other[name][key]) for key, value in sample.items()), f"{name} is stale"
    return f"{case.kind}, {len(case.figures)} figures, {what}"


def refusal(source: Path, cache: Path, options: dict[str, Any]) -> str:
    try:
        build(source, cache, **options)
    except SciflowError as error:
        return str(error)
    raise AssertionError("it was built")


def looked_at(case: Case, source: Path, cache: Path) -> None:
    """Builds, and compares samples, reasons and counts with those that the case expects."""
    logger, said = logging.getLogger("sciflow_hf"), Said()
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        report = build(source, cache, **case.options)
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)
    text = "\n".join(said.lines)
    for words in case.said:
        assert words in text, f"{words} is not said:\n{text}"
    views = (1 + case.options["crops"]) * (1 + case.options["flip"])
    loaded = load_cache(cache, dtype=torch.float32)
    meant = {name_of(case, figure): figure for figure in case.usable}
    assert len(loaded) == report.samples == views * sum(len(figure.captions) for figure in case.usable)
    found: dict[str, set[str]] = {}
    for row, name in enumerate(loaded.strings("image_path") or []):
        assert name in meant, f"{name} is in the cache"
        found.setdefault(name, set()).add(loaded.caption(row))
        shown = (loaded[row]["latents"].mean(dim=(1, 2)) + 1) * 127.5
        off = (shown - torch.tensor(meant[name].colour)).abs().max()
        assert off < 20, f"{name} shows {shown.tolist()}, not {meant[name].colour}"
    assert found == {name: set(figure.captions) for name, figure in meant.items()}
    tally = report.tally
    for figure in case.figures:
        if figure.skipped:
            reasons = {n: r for n, r in tally.skipped.items() if n.split("#caption")[0] == name_of(case, figure)}
            assert any(figure.skipped in reason for reason in reasons.values()), (figure.name, tally.skipped)
    assert set(case.missing) == set(tally.missing)
    assert tally.encoded + tally.kept == len(meant)
    assert tally.images == len(case.figures) + list(case.links.values()).count("nothing") + ("drawing.svg" in case.more)
    if case.kind in FOLDERS:
        assert tally.files == sum(len(names) for _, _, names in os.walk(source, followlinks=True))
    assert verify_cache(loaded, progress=False).problems == []


def name_of(case: Case, figure: Figure) -> str:
    return figure.listed if case.kind == "table" and figure.listed else figure.name
