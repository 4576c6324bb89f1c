"""The files below a folder, linked folders too, and the suffixes of pictures."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NO_TARGET = "a link to nothing"
READ_ALREADY = "links to folders that are read already, or hold this one"
_NOT_DECODED = {"EPS", "MPEG"}  # a document that another program draws; a film, of which Pillow knows the header


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the formats that Pillow opens and decodes without other programs."""
    from PIL import Image, ImageFile

    Image.init()
    stubs = {
        name
        for name, (kind, _) in Image.OPEN.items()
        if isinstance(kind, type) and issubclass(kind, ImageFile.StubImageFile)
    }
    known = Image.OPEN.keys() - stubs - _NOT_DECODED
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        files: sorted.
        left_out: {file: reason} of hidden files and what is none.
        closed: {folder: reason} of folders that were not read.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)
    closed: dict[Path, str] = field(default_factory=dict)


def list_files(folder: Path, leave_out: Path | None = None) -> Listing:
    """All files below `folder`.

    Links to folders are followed, each folder once: a folder that lies below `folder` itself keeps its own name.

    Args:
        folder: that is read.
        leave_out: folder below it that is no part of it, and not counted either.
    """
    found = Listing()
    seen: set[str] = set()
    links = [folder]
    root, skip = os.path.realpath(folder), leave_out and os.path.realpath(leave_out)

    def closed(error: OSError) -> None:
        found.closed[Path(error.filename)] = f"folders that cannot be opened ({error.strerror})"

    while links:
        start, *links = links
        target = os.path.realpath(start)
        if start != folder and (target in seen or Path(root).is_relative_to(target)):
            found.closed[start] = READ_ALREADY
            continue
        for parent, subfolders, names in os.walk(start, onerror=closed):
            seen.add(os.path.realpath(parent))
            below = sorted(Path(parent, name) for name in subfolders)
            subfolders.clear()
            for path in below:
                target = os.path.realpath(path)
                if target == skip:
                    continue
                if path.name.startswith("."):
                    found.left_out |= dict.fromkeys(_all_files(path), "hidden")
                elif path.is_symlink():
                    links.append(path)
                elif target in seen:
                    found.closed[path] = READ_ALREADY
                else:
                    subfolders.append(path.name)
            for file in (Path(parent, name) for name in names):
                if file.name.startswith("."):
                    found.left_out[file] = "hidden"
                elif file.is_file():
                    found.files.append(file)
                else:
                    found.left_out[file] = NO_TARGET if file.is_symlink() else "no regular file"
    found.files.sort()
    return found


def _all_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def utf8_name(name: str) -> str:
    """A name whose bytes are not UTF-8 with these bytes as \\x.., so that it can be printed and stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
