"""Accounts for everything in the input of a build: the table at its end."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

_REASONS = 12
EDITS = "edits"
"""Key of the measure that a build of edits has."""
_NAMED = 3  # examples of each reason; the messages of the build name all


@dataclass
class Measure:
    """How many images exceed a bound, by how much at most, and the first of them."""

    count: int = 0
    largest: float = 0.0
    first: str = ""
    last: str = ""

    def add(self, name: str, value: float, bound: float) -> None:
        """Counts `name` where `value` is more than `bound`; once, where it comes several times in a row."""
        if value > bound:
            self.count += name != self.last
            self.largest, self.first, self.last = max(self.largest, value), self.first or name, name

    def text(self, largest: str) -> str:
        """For a table, with a format of `largest`; "" where there is none."""
        more = ", ..." * (self.count > 1)
        return f"{self.count}, {largest.format(self.largest)}: {self.first}{more}" if self.count else ""


@dataclass
class Tally:
    """Counts of what was found, by what became of it.

    Each image (row, if the images are in tables) is encoded, kept or skipped; each file is an image, one of `used`, or
    `ignored`. So the counts add up to `images` and to `files`.

    Attributes:
        unit: "images", or "rows" of tables.
        encoded: images of which this build encoded something.
        kept: images that an earlier build had encoded.
        skipped: {image: reason}.
        missing: {name: reason} of what the metadata list and nobody finds; no files.
        used: number of files that hold captions, metadata, masks, sources or tables.
        ignored: {file: reason} of what was not looked at.
        remarks: {what: names} of what is in the cache otherwise than one might think.
        measures: {what: text} for what also has a size.
    """

    unit: str = "images"
    encoded: int = 0
    kept: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    used: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.encoded + self.kept + len(self.skipped)

    @property
    def files(self) -> int:
        return self.used + len(self.ignored) + (self.images if self.unit == "images" else 0)

    def remark(self, what: str, name: str) -> None:
        """Adds `name` to the line `what` of the table; once, where it comes several times in a row."""
        names = self.remarks.setdefault(what, [])
        if names[-1:] != [name]:
            names.append(name)

    def close(self, samples: Mapping[str, str], skipped: Mapping[str, str], encoded: Collection[str]) -> None:
        """Sorts the images by what became of them.

        Args:
            samples: {sample: its image}, of all that were to be encoded.
            skipped: {sample, image or what is missing: reason}.
            encoded: images of which this build encoded, or tried to encode, a sample.
        """
        stored = {image for sample, image in samples.items() if sample not in skipped}
        self.skipped = {}
        for name, reason in skipped.items():
            image = samples.get(name, name.rpartition("#caption")[0] or name)
            if image in stored:
                self.remark("samples left out, of images that have others", name)
            elif name not in self.missing:
                self.skipped.setdefault(image, reason)
        self.encoded = len(stored.intersection(encoded))
        self.kept = len(stored) - self.encoded

    def __str__(self) -> str:
        rows = [("encoded now", f"{self.encoded}"), ("encoded before", f"{self.kept}")]
        rows += by_reason("skipped", self.skipped)
        rows.append((f"{self.unit} together", f"{self.images}"))
        rows += by_reason("listed, but missing", self.missing)
        if self.used or self.ignored:
            files = "captions, metadata, masks" + ", sources" * (EDITS in self.measures)
            what = files if self.unit == "images" else "tables"
            rows += [(what, f"{self.used}"), *by_reason("not looked at", self.ignored)]
            rows.append(("files together", f"{self.files}"))
        rows += [(what, _with_examples(names)) for what, names in self.remarks.items()]
        rows += self.measures.items()
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"  {name:<{width}}{text}" for name, text in rows)


def by_reason(title: str, found: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    if not found:
        return
    yield title, f"{len(found)}"
    reasons: dict[str, list[str]] = {}
    for name, reason in found.items():
        reasons.setdefault(reason, []).append(name)
    for reason in list(reasons)[_REASONS:]:
        reasons.setdefault("other reasons, which the messages above say", []).extend(reasons.pop(reason))
    for reason, names in reasons.items():
        yield f"  {reason}", _with_examples(names)


def _with_examples(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:_NAMED])}" + ", ..." * (len(names) > _NAMED)
