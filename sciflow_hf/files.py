"""Files and folders that are complete or not there: written aside, brought to the disk, then renamed."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DiskFullError

_UMASK = os.umask(0o077)  # it can be read only by setting it
os.umask(_UMASK)
NEW_FILE = 0o666 & ~_UMASK
"""Mode of the files that `open` makes."""


@contextmanager
def atomic_file(file: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """A path next to `file` to write to, which replaces it when the block ends without an error.

    Whenever the process is killed or the power fails, `file` is the old one or the new one, complete. Makes its folder.
    Unless it is `durable`, this holds for kills alone: call `sync` later, or notice files that are not complete.
    """
    file = Path(file)
    temporary = _aside(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        follow_umask(temporary)
        if durable:
            sync(temporary)
        os.replace(temporary, file)
    except BaseException:  # also Ctrl-C: nothing is left aside
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync(file.parent)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder next to `folder` to fill, which becomes `folder` when the block ends without an error.

    Raises:
        OSError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    temporary = _aside(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with this number
    temporary.mkdir(parents=True)
    try:
        yield temporary
        move_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder on the same disk once everything below it is on the disk.

    Raises:
        OSError: `target` exists and is not an empty folder.
    """
    for path, _, names in os.walk(source):
        for name in names:
            follow_umask(Path(path, name))
            sync(Path(path, name))
        sync(Path(path))
    os.replace(source, target)
    sync(target.parent)


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Writes JSON with sorted keys, see `atomic_file`."""
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


@contextmanager
def disk_full_named(folder: str | os.PathLike) -> Iterator[None]:
    """Gives errors that mean a full disk one name, `DiskFullError`, and says what to do."""
    try:
        yield
    except Exception as error:  # of whichever library wrote
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(next(p for p in (Path(folder), *Path(folder).resolve().parents) if p.exists())).free
        raise DiskFullError(
            f"{folder} could not be written, its disk is full ({free / 2**20:.0f} MiB free, or a quota is used up). "
            "Free disk space, or keep fewer checkpoints with `--save_total_limit`. If the run has ended, resume with "
            "the same command and `--resume_from_checkpoint latest`."
        ) from error


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because no room was left, whoever wrote."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors' own error, and torch.save's, which looks for its place in the file after a short write
    return any(words in str(error) for words in ("os error 28", "os error 122", "inline_container.cc"))


def follow_umask(path: Path) -> None:
    """Gives a file that its owner alone may read, as safetensors makes it, the mode of any other new file."""
    if stat.S_IMODE(path.stat().st_mode) == 0o600 != NEW_FILE:
        path.chmod(NEW_FILE)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no way to
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def recipes_folder() -> Path:
    """The folder of recipes/ with its configs: within the installed package, or next to it in a clone."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"
