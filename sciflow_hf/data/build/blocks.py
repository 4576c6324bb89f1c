"""Shared by `build` and `convert`: rows cut into blocks, and that one command at a time writes into a folder."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import SciflowError
from ..cache import ENCODER_KEYS, differences, portable
from ..layouts.base import Layout, Writer
from ..layouts.inline import InlineWriter
from ..layouts.npz import NpzWriter
from ..layouts.shards import ShardWriter
from ..writing import output_file

MAX_ROWS = 10_000  # of a block
BUILD_FILE, CONVERT_FILE = "build.json", "convert.json"  # in a cache: the settings it was made with
WRITERS: dict[str, type[Writer]] = {writer.payload: writer for writer in (NpzWriter, ShardWriter, InlineWriter)}


def writer_of(output: Path, layout: Layout) -> Writer:
    """Writes blocks of a cache."""
    return WRITERS[layout.payload](output, layout)


def noted_settings(file: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """Notes of an earlier run on the folder of `file`, and how its settings `differ`; None for a new folder.

    Args:
        file: `BUILD_FILE` or `CONVERT_FILE` of `output_dir`.
        defaults: of settings that older files lack.

    Raises:
        SciflowError: `output_dir` holds something else.
    """
    output, what = file.parent, {BUILD_FILE: "build", CONVERT_FILE: "convert"}[file.name]
    if output.exists() and not output.is_dir():
        raise SciflowError(f"`output_dir` is {str(output)!r}, which is a file. Name a folder.")
    if not file.is_file():
        other = any((output / name).is_file() for name in (BUILD_FILE, CONVERT_FILE))
        if other or next(output.rglob("*.parquet"), None) is not None:
            raise SciflowError(
                f"`output_dir` is {str(output)!r}, which holds a cache or other parquet files, but no {file.name}: it "
                f"was not made by `sciflow-hf cache {what}`. Name another folder."
            )
        return None
    try:
        noted = dict(json.loads(file.read_text()))
        before = {**defaults, **noted["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SciflowError(
            f"{file} is not the settings of `cache {what}` ({error!r}). Name another `output_dir`."
        ) from error
    return noted | {"differ": "; ".join(differences(before, settings, "`{}` was {!r} and is now {!r}"))}


def write_settings(file: Path, settings: Mapping[str, Any], **more: Any) -> None:
    """Notes the settings of a run in its output."""
    with output_file(file) as handle:
        handle.write(json.dumps({"settings": settings, **more}, indent=2).encode() + b"\n")


def remove_temporaries(output: Path) -> None:
    """Removes the half files that a kill left."""
    for file in output.rglob(".*.tmp"):
        file.unlink(missing_ok=True)


def prompt_hash(caption: str, settings: Mapping[str, Any]) -> str:
    """16 hex digits: equal where caption and encoders are, so that the embeddings are."""
    encoder = portable({key: settings[key] for key in ENCODER_KEYS if key in settings})
    text = json.dumps([caption, encoder], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def npz_name(paper: str, digest: str) -> str:
    """The npz of a sample, relative to the cache: in a folder of its paper, where it has one."""
    folder = re.sub(r"[^\w.-]+", "_", paper).strip("._")[:80]
    return f"{folder or digest[:2]}/{digest}_latents.npz"


def cut_blocks(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive rows of at most `limit` bytes together (one row, if it is larger), and at most `MAX_ROWS`."""
    blocks, start, total = [], 0, 0
    for row, size in enumerate(sizes):
        if row > start and (total + size > limit or row - start == MAX_ROWS):
            blocks.append(range(start, row))
            start, total = row, 0
        total += size
    return [*blocks, range(start, len(sizes))] if len(sizes) else []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; the lock ends with it, however it ends.

    Raises:
        SciflowError: if another process has it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        why = f"which cannot be written ({error}). Name"
        if isinstance(error, Timeout):
            why = "into which another `cache build` or `cache convert` is writing. Wait for it, or name"
        raise SciflowError(f"`output_dir` is {str(folder)!r}, {why} another folder.") from error
    try:
        yield
    finally:
        lock.release()
