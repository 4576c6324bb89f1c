"""Samples kept until a block is complete: the interface, and that of npz, whose files are the cache itself."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import torch

from ...diffusion.sources import source_names_in
from ...errors import CacheError, SciflowError, counted
from ..layouts.base import Layout, write_table
from ..layouts.npz import npz_members, npz_problems, write_npz
from ..writing import sync_files
from .blocks import npz_name
from .index import OWN_COLUMNS, SOURCE_COLUMNS, index_schema, index_table
from .jobs import Job, Prompt
from .references import SourceView

logger = logging.getLogger(__name__)

FOLDER = ".staging"  # in a cache: hidden, so that no reader looks into it
_PART = re.compile(r"data_rank0_part(\d{5,})\.parquet")
_SHAPES = {"latent_shape": "latents", "prompt_embeds_shape": "prompt_embeds"}
_OWN = re.compile(r"[0-9a-f]{16}_latents\.npz")
Tensors = Mapping[str, torch.Tensor]
Shared = Prompt | SourceView  # what rows share: encoded and stored once


class Skips:
    """Images that are not in the cache, with the reason; called with both.

    Args:
        strict: make the first of them an error.
        first_rank: whether this is the rank that tells what all ranks find alike.
    """

    def __init__(self, strict: bool = False, *, first_rank: bool = True) -> None:
        self.strict, self.first_rank = strict, first_rank
        self.found: dict[str, str] = {}

    def __call__(self, name: str, reason: str) -> None:
        if self.strict:
            raise SciflowError(f"{name}: {reason}. Mend or remove it, or leave out `--strict` to skip such images.")
        if name not in self.found:
            logger.warning("Skipped %s: %s.", name, reason)
            self.found[name] = reason

    def on_every_rank(self, name: str, reason: str) -> None:
        """Names an image that every rank leaves out, once."""
        if self.strict or self.first_rank:
            self(name, reason)

    def first(self) -> str:
        return next((f"{name} ({reason})" for name, reason in self.found.items()), "see the first rank's messages")


class Staging(ABC):
    """The samples of a cache that is being built by several ranks.

    In this order, with barriers between: all `look`; rank 0 calls `clean`; all `plan`; rank 0 calls `clear`. Then ranks
    `save` what they encoded, and, after a barrier, what is `shared` in these blocks; after another one, one of them
    each `finish`es a block. When all are done, rank 0 calls `close`.

    Args:
        output: the cache.
        jobs: all rows, in their order.
        facts: metadata of the index.
        layout: of the payloads.
        skip: told of a sample that cannot be stored.

    Attributes:
        new_prompts: after `plan`: of each block, those that are first needed there.
    """

    with_text: ClassVar[bool]  # whether a sample is saved together with its text and the latents of its sources

    def __init__(
        self, output: Path, jobs: Sequence[Job], facts: Mapping[str, Any], layout: Layout, skip: Skips
    ) -> None:
        self.output, self.jobs, self.facts, self.skip = output, jobs, facts, skip
        self.layout = replace(layout, sources=max((len(job.sources) for job in jobs), default=0))
        self.new_prompts: list[list[Prompt]] = []

    @abstractmethod
    def look(self) -> None:
        """Only reads; changes nothing.

        Raises:
            SciflowError: if it is a cache of other images.
        """

    def clean(self) -> None:
        """Removes what a power failure has left incomplete."""
        return

    @abstractmethod
    def plan(self, samples_per_block: int) -> list[list[Job]]:
        """The images of each block that are left to encode; changes nothing, and is the same on all ranks."""

    @abstractmethod
    def clear(self) -> None:
        """Takes away from readers what is not part of the cache any more."""

    @abstractmethod
    def save(self, job: Job, sample: Tensors) -> int:
        """Keeps a sample, complete or not at all; returns its bytes."""

    def shared(self, number: int) -> Sequence[Shared]:
        """Prompts and sources that rows share in block `number`, to be encoded once its images are saved."""
        return []

    def save_shared(self, item: Shared, tensors: Tensors | None) -> int:
        """Keeps the tensors of what rows share (None: that it has none); returns their bytes."""
        return 0

    def gather(self, start: int, stop: int) -> None:
        """Between barriers: the samples of blocks `start` to `stop` are all saved, those before `start` finished."""
        return

    @abstractmethod
    def finish(self, number: int) -> list[tuple[Job, Shared]]:
        """Completes block `number` of the plan; returns the samples left out, with what of theirs has no tensors."""

    def salvage(self, number: int) -> list[tuple[Job, Shared]]:
        """After an error: makes readable what is there of a block."""
        return []

    @abstractmethod
    def close(self) -> tuple[int, int]:
        """Completes the index, removes what nothing refers to; returns the samples, and the bytes of their payloads."""

    def check_input(self, known: Mapping[str, str | None], wanted: Iterable[str]) -> None:
        """Refuses a cache of other images; `known` are the names of the rows' payloads with those of the images."""
        wanted, names = set(wanted), {job.record.name for job in self.jobs}
        if known and not any(key in wanted or name in names for key, name in known.items()):
            raise SciflowError(
                f"`output_dir` is {str(self.output)!r}, which holds a cache of other images ({len(known)} "
                "samples). Name another folder: `--dataset_dir` takes several caches."
            )
        if gone := len(known.keys() - wanted):
            logger.warning(
                "Leaving the index: %s, whose images or captions are no longer in the input.",
                counted(gone, "sample"),
            )


class NpzStaging(Staging):
    """One npz a sample, and an index that names them."""

    with_text = True

    def look(self) -> None:
        self.tables = {}
        for file in sorted(self.output.glob("data_rank0_part*.parquet")):
            if match := _PART.fullmatch(file.name):
                self.tables[int(match[1])] = pq.read_table(file)
        self.known = {row["cache_path"]: row for table in self.tables.values() for row in table.to_pylist()}
        self.files = {job.id: npz_name(str(job.record.columns.get("paper_id") or ""), job.id) for job in self.jobs}
        images = {path: row.get("image_path") for path, row in self.known.items()}
        self.check_input(images, self.files.values())

    def plan(self, samples_per_block: int) -> list[list[Job]]:
        size = samples_per_block
        self.blocks = [self.jobs[i : i + size] for i in range(0, len(self.jobs), size)]
        own = OWN_COLUMNS | (SOURCE_COLUMNS | {"source_shapes": "shapes"} if self.layout.sources else {})
        self.schema = index_schema([job.record.columns for job in self.jobs], self.facts, own)
        self.shapes = {job.id: self._shapes(job) for job in self.jobs}
        return [[job for job in block if self.shapes[job.id] is None] for block in self.blocks]

    def _shapes(self, job: Job) -> dict[str, Any] | None:
        """Columns with the shapes of a finished sample; None if it has to be encoded."""
        file = self.output / self.files[job.id]
        if not file.is_file():
            return None
        if row := self.known.get(self.files[job.id]):
            return {name: row[name] for name in _SHAPES} | {"source_shapes": row.get("source_shapes") or []}
        try:
            members = npz_members(str(file), job.name)
            if problems := npz_problems(str(file)):
                raise CacheError(f"{file}: {problems[0]}")
            return _shapes_of(members)
        except (CacheError, KeyError) as error:
            logger.warning("Encoded again: %s", error)
            return None

    def clear(self) -> None:
        for number, table in self.tables.items():
            planned = {self.files[job.id] for job in self.blocks[number]} if number < len(self.blocks) else set()
            if not planned.issuperset(table["cache_path"].to_pylist()) or not table.schema.equals(self.schema):
                (self.output / _index_name(number)).unlink()

    def save(self, job: Job, sample: Tensors) -> int:
        file = self.output / self.files[job.id]
        write_npz(file, sample, self.layout.dtype, durable=False)
        self.shapes[job.id] = _shapes_of(sample)
        return file.stat().st_size

    def finish(self, number: int) -> list[tuple[Job, Shared]]:
        rows, new = [], []
        for job in self.blocks[number]:
            shapes = self.shapes[job.id] or self._shapes(job)  # another rank may have encoded it
            if shapes is not None:
                rows.append(job.row() | shapes | {"cache_path": self.files[job.id]})
                new += [self.output / self.files[job.id]] if self.files[job.id] not in self.known else []
        sync_files(new)  # before the index names them
        file = self.output / _index_name(number)
        write_table(file, index_table(rows, self.schema)) if rows else file.unlink(missing_ok=True)
        return []

    salvage = finish

    def close(self) -> tuple[int, int]:
        found = {self.output / file for file in self.files.values()}
        for file in set(self.output.glob("*/*_latents.npz")) - found:
            if _OWN.fullmatch(file.name):
                file.unlink()
        sizes = [file.stat().st_size for file in found if file.is_file()]
        return len(sizes), sum(sizes)


def _shapes_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Index columns with the shapes of a sample."""
    sources = [list(tensors[name].shape) for name in source_names_in(tensors)]
    return {name: list(tensors[tensor].shape) for name, tensor in _SHAPES.items()} | {"source_shapes": sources}


def _index_name(number: int) -> str:
    return f"data_rank0_part{number:05d}.parquet"
