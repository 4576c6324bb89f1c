"""Checkpoints that are complete or absent: written aside, the manifest last; and the choice of what to resume from."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SciflowError
from ..files import move_folder, write_json
from .run_lock import holding

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = ".saving"
"""Folder in the run's, in which a checkpoint is written before it is moved to its place."""
FROM_THE_START = (None, False, "", "False", "false")
"""Values of `--resume_from_checkpoint` that mean a new run."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Names, sizes and sha256 of all files below `folder`. Written last: without it a checkpoint does not count."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    entries = {p.relative_to(folder).as_posix(): {"sha256": _sha256(p), "size": p.stat().st_size} for p in files}
    write_json(folder / MANIFEST, {"files": entries})


def publish(staged: Path, folder: Path) -> None:
    """Gives a complete checkpoint, once all of it is on the disk, its name; a damaged one that stood there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    move_folder(staged, folder)
    staged.parent.rmdir()


def remove_unfinished(run_dir: str | os.PathLike) -> None:
    """Removes what a save left that did not end."""
    shutil.rmtree(Path(run_dir) / STAGING, ignore_errors=True)


def checkpoint_fault(folder: Path) -> str | None:
    """The fault of a checkpoint, or None if every file of its manifest exists unchanged."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its save did not finish"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size, sha256 in entries:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != sha256:
            return f"{name} is damaged"
    return None


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """`checkpoint-N` folders, newest (largest N) first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=_step, reverse=True)


def resolve_checkpoint(value: str | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint to resume from.

    Args:
        value: None or False for none; "latest" (or True): the newest that verifies, or None where there is none;
            "checkpoint-N" in `output_dir`, or a path: that one, which must exist and verify.

    Raises:
        SciflowError: a named checkpoint that is missing or damaged.
    """
    if value in FROM_THE_START:
        return None
    if value in (True, "latest", "True", "true"):
        for folder in list_checkpoints(output_dir):
            fault = checkpoint_fault(folder)
            if fault is None:
                return folder
            logger.warning("%s is passed over: %s.", folder, fault)
        logger.info("No checkpoint to resume from in %s: starting at the beginning.", output_dir)
        return None
    inside = Path(output_dir) / str(value)
    folder = inside if inside.is_dir() else Path(str(value))
    if not folder.is_dir():
        there = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        raise SciflowError(
            f"`resume_from_checkpoint` {value!r} does not exist. In {output_dir}: {there}. Use `latest`, one of them, "
            "or a path."
        )
    fault = checkpoint_fault(folder)
    if fault is not None:
        raise SciflowError(f"`resume_from_checkpoint` {folder}: {fault}. `latest` takes the newest complete one.")
    return folder


@contextmanager
def explain_unpickling(folder: Path | None) -> Iterator[None]:
    """Turns torch's refusal of a pickle that is more than tensors into an error that names the checkpoint."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise SciflowError(
            f"`resume_from_checkpoint` {folder}: its optimizer, scheduler or random states are not the tensors and "
            "numbers that the Trainer saves, and loading them could run code. They were not loaded. Take another "
            "checkpoint, or start a new run from its weights with `--adapter_path`."
        ) from error


def check_writable(output_dir: str | os.PathLike) -> None:
    """Makes the folder, and raises SciflowError where a run could not save in it; leaves nothing behind in it."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise SciflowError(
            f"`output_dir` {folder} cannot be written ({error.strerror}): choose another one."
        ) from error
    named = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+|\.saving|validation", path.name)]
    if odd := [path.name for path in named if not path.is_dir()]:
        raise SciflowError(
            f"`output_dir` {folder}: {odd[0]} is a file where a folder of the run would go. Move it away."
        )
    kinds = r"README\.md|training\.png|\.run\.(json|lock)|\w+\.(json|safetensors)"
    if odd := [path.name for path in folder.iterdir() if re.fullmatch(kinds, path.name) and path.is_dir()]:
        raise SciflowError(
            f"`output_dir` {folder}: {odd[0]} is a folder where a file of the run would go. Move it away."
        )


def check_room(output_dir: str | os.PathLike, checkpoint_bytes: float) -> None:
    """Raises SciflowError where not even one checkpoint fits on the disk."""
    free = shutil.disk_usage(output_dir).free
    if free < checkpoint_bytes:
        raise SciflowError(
            f"`output_dir` {output_dir}: a checkpoint takes about {checkpoint_bytes / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} MiB are free there. Free disk space, or choose a folder on another disk."
        )


def check_output_dir(output_dir: str | os.PathLike, *, resume: Any, overwrite: bool) -> None:
    """Refuses an output folder that holds checkpoints, unless told to resume or to overwrite (which removes them).

    Raises:
        SciflowError: that, or the folder cannot be written, or another run trains there.
    """
    check_writable(output_dir)
    found = list_checkpoints(output_dir)
    if not found or resume not in FROM_THE_START:
        return
    if not overwrite:
        raise SciflowError(
            f"`output_dir` {output_dir} holds {found[0].name}. Resume with `--resume_from_checkpoint latest`, start "
            "anew with `--overwrite_output_dir` (removes its checkpoints), or choose another folder."
        )
    with holding(output_dir):
        for folder in found:
            logger.info("Removing %s (`--overwrite_output_dir`).", folder)
            shutil.rmtree(folder)


def rotate(
    output_dir: str | os.PathLike,
    *,
    limit: int | None,
    newest: Path,
    best: str | None = None,
    busy: Path | None = None,
) -> None:
    """Removes checkpoints until `limit` are left; `newest`, which is complete, `best` and `busy` always stay.

    Unfinished ones go first, then those of later steps (the run went back before them), then the oldest. transformers
    sorts by time and falls back to step numbers where times are unreliable (cloud drives): a torn checkpoint of a
    later step then displaces the complete one that was just written.
    """
    if not limit or limit < 0:
        return
    keep = {os.path.realpath(path) for path in (newest, best, busy) if path}
    others = [p for p in list_checkpoints(output_dir) if os.path.realpath(p) not in keep]
    others.sort(key=lambda p: ((p / MANIFEST).is_file(), _step(p) < _step(newest), _step(p)), reverse=True)
    for folder in others[max(limit - len(keep), 0) :]:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            logger.warning("%s is over `save_total_limit`, but could not be removed.", folder)


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])
