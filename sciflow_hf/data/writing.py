"""Write the files of a cache, complete or not at all, with errors that say what to do; tables and sizes for people."""

import errno
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import SciflowError
from ..files import atomic_file, sync

_SYNCED_AT_ONCE = 8


@contextmanager
def output_file(file: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which appears under its name, complete, when the block ends without an error.

    Unless it is `durable`, a power failure may leave a part of it: see `sync_files`.

    Raises:
        SciflowError: the disk is full, or the folder cannot be written.
    """
    try:
        with atomic_file(file, durable=durable) as temporary, open(temporary, "wb") as handle:
            yield handle
    except OSError as error:
        raise cannot_write(file, error) from error


def sync_files(files: Iterable[Path]) -> None:
    """Brings files that were not `durable` to the disk, with their names: several at once, which a disk takes together.

    Raises:
        SciflowError: the disk is full, or broken.
    """

    def sync_one(path: Path) -> None:
        try:
            sync(path)
        except OSError as error:
            raise cannot_write(path, error) from error

    found = list(files)
    with ThreadPoolExecutor(_SYNCED_AT_ONCE) as pool:
        for paths in (found, dict.fromkeys(file.parent for file in found)):
            list(pool.map(sync_one, paths))


def check_file(file: Path) -> None:
    """Raises SciflowError where `file` could not be written; before the work whose result it is to hold."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise cannot_write(file, error) from error


def cannot_write(file: Path, error: OSError) -> SciflowError:
    """The error to raise when the disk is full, or the folder cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SciflowError(
            f"{file} cannot be written: the disk is full ({error}). Free disk space and repeat the same "
            "command: it continues from here."
        )
    return SciflowError(f"{file} cannot be written ({error}). Is its folder writable?")


def text_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lines of aligned columns; those numbered in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{c:>{w}}" if k in right else f"{c:<{w}}" for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def readable_bytes(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
