"""Files of a cache, on a local disk or behind any fsspec URL: ranges of bytes straight into a buffer."""

import functools
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractBufferedFile

from ..errors import CacheError, first_line
from .disk_cache import DiskCache

logger = logging.getLogger(__name__)

TRIES = 4
PAUSE = 1.0  # seconds before the second try; doubles before each further one
_OPEN_FILES = 64
_READ_AHEAD = 1 << 18  # bytes: all light columns of a row group at once
_Buffer = Any  # memoryview or array of bytes; on Python 3.11 mypy does not know that arrays are buffers
T = TypeVar("T")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an fsspec URL ("hf://...", "s3://...") and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", os.fspath(path)) is not None


def join(root: str, path: str) -> str:
    """`path` below `root`; both local, or both of one URL."""
    return f"{root.rstrip('/')}/{path}" if is_url(root) else os.path.normpath(os.path.join(root, path))


def inside(path: str, root: str) -> str | None:
    """`path` (absolute or relative) as relative to `root`; None if it leads outside. Purely lexical."""
    if is_url(root):
        whole = posixpath.normpath(path)
        return None if whole.startswith(("../", "/")) or whole in (".", "..") or is_url(path) else whole
    whole = os.path.normpath(os.path.join(root, path))
    for base in (root, os.path.realpath(root)):
        if whole.startswith(base.rstrip(os.sep) + os.sep):
            return os.path.relpath(whole, base)
    return None


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_url(path):
        return os.path.isfile(path)
    fs, name = _filesystem(path)
    try:
        return bool(_try(path, lambda: fs.info(name))["type"] == "file")
    except FileNotFoundError:
        return False


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    if not is_url(path):
        return os.stat(path).st_size
    fs, name = _filesystem(path)
    return int(_try(path, lambda: fs.size(name)))


def reader(path: str) -> Callable[[int, _Buffer], None]:
    """A function (offset, buffer) that fills `buffer` with the bytes of the file from `offset` on.

    Raises:
        FileNotFoundError: no such file.
        EOFError: the file ends before.
        CacheError: a remote that does not answer, or does not let us in.
    """
    if is_url(path):
        return functools.partial(_read_url, path)
    found = os.stat(path)
    return _open_file(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)).read_into


def read(path: str, offset: int, nbytes: int) -> bytes:
    """`nbytes` bytes of a file; see `reader`."""
    buffer = bytearray(nbytes)
    reader(path)(offset, memoryview(buffer))
    return bytes(buffer)


def read_all(path: str) -> bytes:
    """All bytes of a file."""
    return read(path, 0, size(path))


def open_file(path: str) -> Any:
    """A seekable binary file, for libraries that want one."""
    return _RemoteFile(None, path, block_size=_READ_AHEAD, size=size(path)) if is_url(path) else open(path, "rb")


def find_files(folder: str, suffix: str) -> list[str]:
    """Files below `folder` whose names end so, sorted; hidden files and folders are left out."""
    if is_url(folder):
        fs, name = _filesystem(folder)
        protocol = folder.partition("://")[0]
        below = sorted(str(path) for path in _try(folder, lambda: fs.find(name)))
        visible = [p for p in below if not any(part.startswith(".") for part in p[len(name) :].split("/"))]
        return [f"{protocol}://{path.lstrip('/')}" for path in visible if path.endswith(suffix)]
    found = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        start = str(Path(parent, "_"))[:-1]
        found += [start + name for name in files if name.endswith(suffix) and not name.startswith(".")]
    return sorted(found, key=lambda file: file.split(os.sep))


def use_disk_cache(folder: str | os.PathLike[str] | None, max_bytes: int = 0) -> None:
    """From now on, what is read from URLs is kept in `folder`, `max_bytes` at most; None: not any more."""
    global _disk
    _disk = None if folder is None else DiskCache(folder, max_bytes)


_disk: DiskCache | None = None


# -- URLs ------------------------------------------------------------------------------------------------------


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the file's name there."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CacheError(
            f"{url} cannot be opened: {error}. Install what is missing, or copy the cache here."
        ) from error


def _try(url: str, action: Callable[[], T]) -> T:
    """`action()`, tried again after a pause where the remote fails in a way that may pass.

    Raises:
        FileNotFoundError, EOFError: at once.
        CacheError: no access; or no success in `TRIES` tries, with the last reason.
    """
    number = 0
    while True:
        number += 1
        try:
            return action()
        except EOFError:
            raise
        except Exception as error:  # storages have errors of their own; the last one is raised
            if denied := _denied(error):
                raise CacheError(
                    f"{url}: no access ({denied}). If it is private or gated, ask its owner for access, and log in "
                    "(`hf auth login` or `HF_TOKEN` for a Hub, the credentials of its own for other storage)."
                ) from error
            if isinstance(error, FileNotFoundError):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            if number >= TRIES:
                raise CacheError(
                    f"{url} could not be read in {TRIES} tries; the last one ended with {reason}. Check the network "
                    "and the remote's state and resume from the last checkpoint, or copy the cache to a local disk."
                ) from error
            logger.warning("%s: %s; try %d of %d follows.", url, reason, number + 1, TRIES)
            time.sleep(PAUSE * 2 ** (number - 1))


def _denied(error: BaseException) -> str:
    """Why the remote does not let us in; "" if that is not what went wrong."""
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "status", None)
    names = {cls.__name__ for cls in type(cause).__mro__}
    if "RepositoryNotFoundError" in names and status != 403:  # the Hub does not tell strangers what is private
        return "there is no such repository, or this token may not see it"
    if status in (401, 403) or isinstance(error, PermissionError):
        return first_line(cause) if str(cause).strip() else "permission denied"
    return ""


def _read_url(url: str, offset: int, buffer: _Buffer) -> None:
    view = memoryview(buffer)
    view[:] = _kept(url, offset, view.nbytes)


def _kept(url: str, offset: int, nbytes: int) -> bytes:
    """Exactly these bytes, from the disk cache where they are known."""
    if _disk is None or not nbytes:
        return _fetch(url, offset, nbytes)
    key = f"{url} {_version(url)} {offset} {nbytes}"
    data = _disk.get(key, nbytes)
    if data is None:
        _disk.put(key, data := _fetch(url, offset, nbytes))
    return data


def _fetch(url: str, offset: int, nbytes: int) -> bytes:
    fs, name = _filesystem(url)
    # The generic `cat_file` opens a file, which would read 5 MB ahead.
    options = {"cache_type": "none"} if type(fs).cat_file is fsspec.AbstractFileSystem.cat_file else {}

    def fetch() -> bytes:
        data = fs.cat_file(name, start=offset, end=offset + nbytes, **options)
        if len(data) != nbytes:
            raise EOFError(f"it ends {nbytes - len(data)} bytes early")
        return bytes(data)

    return _try(url, fetch) if nbytes else b""


@functools.lru_cache(maxsize=1 << 16)
def _version(url: str) -> str:
    """Changes when the file behind `url` does: a hash of its size, time and entity tag, as far as they are known."""
    fs, name = _filesystem(url)
    return str(_try(url, lambda: fs.ukey(name)))


class _RemoteFile(AbstractBufferedFile):
    """A file behind a URL as Python's own kind of file, whose reads are retried and kept like all others."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return _kept(self.path, start, end - start)


# -- local files -----------------------------------------------------------------------------------------------


class _OpenFile:
    """A descriptor that is closed when the last reader lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, offset: int, buffer: _Buffer) -> None:
        done, nbytes = 0, buffer.nbytes
        while done < nbytes:
            rest = memoryview(buffer)[done:] if done else buffer
            got = os.preadv(self.descriptor, [rest], offset + done)
            if not got:
                raise EOFError(f"it ends {nbytes - done} bytes early")
            done += got

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open_file(path: str, identity: tuple[int, ...]) -> _OpenFile:
    """One of the files read last, which stay open; another `identity` is a file that was replaced on the disk."""
    return _OpenFile(path)
