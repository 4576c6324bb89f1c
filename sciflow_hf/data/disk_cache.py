"""A folder of bounded size that keeps what was read from remote files."""

import contextlib
import hashlib
import logging
import os
import threading
import uuid
import zlib
from pathlib import Path

from ..errors import SciflowError

logger = logging.getLogger(__name__)

_CHECKSUM = 4  # bytes, before the data
_LOOK_AGAIN = 0.05  # of the allowed size: written between two looks at what others wrote


class DiskCache:
    """Ranges of bytes by name. Several threads and processes may share the folder.

    Files appear complete or not at all; one that is damaged is removed and counts as missing. The entry not used for
    longest goes first.

    Args:
        folder: made where there is none.
        max_bytes: of all its files together; passed by 5 % per process at most.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SciflowError(
                f"`remote_cache_dir` {folder} cannot be made ({error.strerror}): name another folder."
            ) from error
        self._lock = threading.Lock()
        self._unseen = max_bytes  # bytes written since the last look: the first look is at the first write

    def get(self, key: str, nbytes: int) -> bytes | None:
        """The entry under `key`, if it exists and is complete."""
        file = self._file(key)
        try:
            stored = file.read_bytes()
        except FileNotFoundError:
            return None
        data = stored[_CHECKSUM:]
        if len(data) != nbytes or zlib.crc32(data).to_bytes(_CHECKSUM, "little") != stored[:_CHECKSUM]:
            logger.warning("%s is damaged: read again from where it came.", file)
            file.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):  # another process may have made room
            os.utime(file)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps `data`, if there is room on the disk."""
        if len(data) > self.max_bytes:
            return
        file = self._file(key)
        half = file.with_name(f"{uuid.uuid4().hex}.half")
        try:
            with half.open("wb") as handle:
                handle.write(zlib.crc32(data).to_bytes(_CHECKSUM, "little"))
                handle.write(data)
            half.replace(file)
        except OSError as error:
            half.unlink(missing_ok=True)
            logger.warning("%s: cannot keep what was read (%s).", self.folder, error)
            return
        with self._lock:
            self._unseen += len(data) + _CHECKSUM
            if self._unseen > self.max_bytes * _LOOK_AGAIN:
                self._make_room()
                self._unseen = 0

    def _make_room(self) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat()
                files.append((found.st_mtime_ns, found.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def _file(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()
