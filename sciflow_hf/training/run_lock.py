"""One run per folder: a lock that names its holder and that a dead process does not leave behind."""

import atexit
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import SciflowError
from ..files import write_json

logger = logging.getLogger(__name__)

LOCK, FACTS = ".run.lock", ".run.json"
BEAT = 15.0
"""Seconds after which a running process touches its facts; after four without, it counts as dead on another host."""

_HELD: dict[Path, "RunLock"] = {}
"""The folders that this process holds."""


def hold(folder: str | os.PathLike) -> bool:
    """Holds a folder for this process until `let_go`, or until it ends; False where it holds it already.

    Raises:
        SciflowError: another process trains there.
    """
    place = Path(folder).resolve()
    if place in _HELD:
        return False
    lock = RunLock(folder)
    lock.acquire()
    _HELD[place] = lock
    return True


def let_go(folder: str | os.PathLike) -> None:
    """Gives a folder free that this process holds."""
    lock = _HELD.pop(Path(folder).resolve(), None)
    if lock is not None:
        lock.release()


@contextmanager
def holding(folder: str | os.PathLike) -> Iterator[None]:
    """Holds a folder while the block runs; longer where this process has held it before."""
    is_new = hold(folder)
    try:
        yield
    finally:
        if is_new:
            let_go(folder)


def check_held(folder: str | os.PathLike) -> None:
    """Raises SciflowError where another run has taken over a folder that this process holds."""
    lock = _HELD.get(Path(folder).resolve())
    if lock is not None:
        lock.check()


@atexit.register
def let_go_of_all() -> None:
    """Gives all folders free that this process holds."""
    for folder, lock in list(_HELD.items()):
        if lock.pid == os.getpid():  # not of the process that this one was forked from
            let_go(folder)


class RunLock:
    """Holds a folder for the run of this process.

    On one host the kernel's lock decides, which ends with its process however that ends. Another host may not see this
    lock, and its process numbers say nothing here: there the time of the last heartbeat decides.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder, self.pid = Path(folder), os.getpid()
        self._lock = FileLock(self.folder / LOCK, timeout=0)
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "machine": uuid.getnode(),
            "pid": self.pid,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Raises SciflowError where another run holds the folder; names its host, process and beginning."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise self._refusal(self._read()) from None
        except (OSError, NotImplementedError) as error:  # a file system without locks: the heartbeat alone decides
            logger.info("%s cannot be locked (%s): two runs in it are told apart by heartbeats.", self.folder, error)
        other = self._read()
        if other and self._beats(other):
            self._lock.release()
            raise self._refusal(other)
        if other:
            logger.warning("%s was held by %s, which has ended without a word.", self.folder, _named(other))
        write_json(self.folder / FACTS, self._facts)
        self._ended.clear()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raises SciflowError where another run has taken the folder over, after this process stood still for long."""
        other = self._read()
        if other is not None and other != self._facts:
            raise SciflowError(f"{self.folder} was taken over by {_named(other)}: this run saves nothing more there.")

    def release(self) -> None:
        """Gives the folder free."""
        self._ended.set()
        if self._read() == self._facts:
            (self.folder / FACTS).unlink(missing_ok=True)
            (self.folder / LOCK).unlink(missing_ok=True)
        self._lock.release()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                os.utime(self.folder / FACTS)
            except OSError as error:
                logger.debug("no heartbeat in %s: %s", self.folder, error)

    def _read(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _beats(self, other: dict[str, Any]) -> bool:
        """Whether the holder that is named there lives: on this host its lock would, elsewhere it was seen lately."""
        here = all(other.get(name) == self._facts[name] for name in ("host", "machine"))
        if here and self._lock.is_locked:
            return False
        with tempfile.NamedTemporaryFile(dir=self.folder) as now:  # by the clock of the file system
            return os.stat(now.name).st_mtime - (self.folder / FACTS).stat().st_mtime < 4 * BEAT

    def _refusal(self, other: dict[str, Any] | None) -> SciflowError:
        return SciflowError(
            f"`output_dir` {self.folder}: {_named(other or {})} trains there. Take another folder, or end that run "
            "first."
        )


def _named(facts: dict[str, Any]) -> str:
    if not facts:
        return "another run"
    return f"a run on {facts.get('host')} (process {facts.get('pid')}, since {facts.get('since')})"
