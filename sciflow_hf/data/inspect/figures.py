"""A look at a folder of images before anything is built from it: `sciflow-hf init`."""

import statistics
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import SciflowError, counted
from ..build.ahead import in_order
from ..build.sources.find import find_records
from ..build.sources.listing import image_suffixes, list_files
from ..build.sources.pixels import oriented_size, unreadable
from ..build.sources.record import Record, Stored, stored_file
from ..build.tally import Tally, by_reason
from ..split import spread

_LOOKED_AT = 2000  # images whose header is read, evenly spread
_MEASURING = ("I", "F")  # modes of Pillow with more than 8 bits a channel: what instruments write


@dataclass
class Figures:
    """The figures of a folder.

    Attributes:
        folder: its path.
        kind: "captioned" figures, "classes" (one subfolder each), or "measured" images without captions.
        count: images that can be used.
        sizes: (height, width) of those that were looked at.
        captions: of captioned ones, one a sample.
        groups: papers or images: groups are held out as units.
        left_out: lines on what is not used, and why.
    """

    folder: Path
    kind: str
    count: int
    sizes: list[tuple[int, int]]
    captions: list[str] = field(default_factory=list)
    groups: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def area(self) -> float:
        """Median number of pixels."""
        return statistics.median(height * width for height, width in self.sizes)

    @property
    def shortest_side(self) -> int:
        return min(min(size) for size in self.sizes)

    def smaller_than(self, resolution: int) -> float:
        """Share of the images with less than 0.9 x resolution**2 pixels."""
        return float(np.mean([height * width < 0.9 * resolution**2 for height, width in self.sizes]))

    def longer_than(self, aspect_ratio: float) -> float:
        """Share of the images whose longer side is more than that many times the shorter one."""
        return float(np.mean([max(size) > aspect_ratio * min(size) for size in self.sizes]))

    def describe(self) -> list[str]:
        """Number, sizes and captions, a fact a line."""
        (low, _), (high, _) = (min((min(s), s) for s in self.sizes), max((max(s), s) for s in self.sizes))
        looked = f" (of {len(self.sizes):,} that were looked at)" if len(self.sizes) < self.count else ""
        lines = [f"{counted(self.count, 'image')}, sides of {low:,} to {high:,} pixels{looked}"]
        if self.captions:
            words = [len(text.split()) for text in self.captions]
            distinct = len(set(self.captions))
            lines.append(
                f"{counted(len(self.captions), 'caption')}, {distinct:,} different, of {min(words)} to {max(words)} "
                f"words, {statistics.median(words):g} in the middle"
            )
            if script := _script(self.captions):
                lines.append(f"most captions are written in {script} letters")
        return lines + self.left_out


def look_at(folder: str | Path) -> Figures:
    """Finds out what images a folder holds; reads captions and the headers of images, and no pixels.

    Raises:
        SciflowError: there is nothing to train on; says what was looked for and what was found.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SciflowError(f"{str(folder)!r} is no folder. Name one of images.")
    try:
        records, tally = find_records(path)
    except SciflowError as error:
        return _without_captions(path, error)
    return _captioned(path, records, tally)


def _captioned(path: Path, records: Sequence[Record], tally: Tally) -> Figures:
    sizes, broken = _sizes([(record.name, record.image) for record in records])
    if not sizes:
        raise SciflowError(f"{str(path)!r}: none of its images can be read. First: {next(iter(broken.items()))}.")
    found = {"skipped": tally.skipped | broken, "listed, but missing": tally.missing, "not looked at": tally.ignored}
    left_out = _told(found)
    left_out += [f"{what}: {len(names)}" for what, names in tally.remarks.items()]
    return Figures(
        path, "captioned", len({record.name for record in records}) - len(broken), sizes,
        captions=[record.caption for record in records],
        groups=len({record.columns.get("paper_id") or record.name for record in records}), left_out=left_out,
    )  # fmt: skip


def _without_captions(path: Path, error: SciflowError) -> Figures:
    """Images of classes or of an instrument; `error` says that captions were looked for in vain."""
    files = [file for file in list_files(path).files if file.suffix.lower() in image_suffixes()]
    images = [(file.relative_to(path).as_posix(), stored_file(file)) for file in files]
    sizes, broken = _sizes(images)
    if not sizes:
        raise error
    first = next(image for name, image in images if name not in broken)
    with first.open() as image:
        measured = image.mode.startswith(_MEASURING)
    left_out = _told({"skipped": broken})
    if measured:
        return Figures(path, "measured", len(images) - len(broken), sizes, groups=len(images), left_out=left_out)
    classes = Counter(name.split("/")[0] for name, _ in images if "/" in name)
    if len(classes) > 1 and sum(classes.values()) == len(images) and min(classes.values()) > 1:
        return Figures(
            path, "classes", len(images) - len(broken), sizes, groups=len(images),
            left_out=[f"{len(classes)} folders, taken for classes: {', '.join(sorted(classes)[:5])}", *left_out],
        )  # fmt: skip
    raise error


def _told(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """{what became of it: {name: reason}} as lines, each reason with its number and first names."""
    return [f"{what.strip()}: {text}" for title, names in found.items() for what, text in by_reason(title, names)]


def _sizes(images: Sequence[tuple[str, Stored]]) -> tuple[list[tuple[int, int]], dict[str, str]]:
    """(height, width) of images as they are meant to be seen, and {name: reason} of those that cannot be read."""

    def size(named: tuple[str, Stored]) -> tuple[int, int] | str:
        try:
            with named[1].open() as image:
                return oriented_size(image)
        except Exception as error:  # whatever Pillow's decoders raise; the image is named
            return unreadable(error)

    chosen = [images[i] for i in spread(len(images), min(_LOOKED_AT, len(images)))]
    sizes, broken = [], {}
    for (name, _), found in in_order(size, chosen):
        if isinstance(found, str):
            broken[name] = found
        else:
            sizes.append(found)
    return sizes, broken


def _script(captions: Sequence[str]) -> str:
    """The script of most captions, if it is not Latin, such as "Cyrillic"; "" for Latin."""
    scripts: Counter[str] = Counter()
    for text in captions[:1000]:
        names = (unicodedata.name(letter, "") for letter in text if letter.isalpha())
        letters = Counter(name.split()[0] for name in names if name)
        scripts.update([max(letters, key=lambda name: letters[name], default="LATIN")])
    name = scripts.most_common(1)[0][0] if scripts else "LATIN"
    return "" if name == "LATIN" else "Chinese" if name == "CJK" else name.capitalize()
