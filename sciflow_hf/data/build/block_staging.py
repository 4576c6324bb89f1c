"""Staging of shards and inline files: samples are kept one by one, and joined when those of a block are complete."""

import hashlib
import json
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import CacheError
from ...files import move_file
from .. import storage
from ..cache import LatentCache, open_index
from ..layouts.base import TEXT_TENSORS, Block, Encoded, Sample, index_file, payload_columns
from ..layouts.shards import Shard, shard_file
from ..writing import output_file
from .blocks import prompt_hash, writer_of
from .index import OWN_COLUMNS, index_schema, index_table
from .jobs import Job
from .staging import FOLDER, Staging, Tensors, Todo

logger = logging.getLogger(__name__)

_OWN = re.compile(r"(?:data_)?(part\d{5,}-[0-9a-f]{12})\.(?:parquet|safetensors)")
_LIGHT = {"sample_id": "text"} | {
    name: kind
    for name, kind in OWN_COLUMNS.items()
    if name not in ("cache_path", "latent_shape", "prompt_embeds_shape")
}


class OldBlock:
    """A block that an earlier run has written.

    Attributes:
        name: of the block.
        file: of its payload.
        ids: of its samples, by row.
        prompts: hashes of the prompts whose embeddings it holds.
        rows: its part of the index, where there is one; light columns only.
    """

    name: str
    file: Path
    ids: list[str]
    prompts: set[str]
    rows: pa.Table | None = None

    def image(self, row: int) -> dict[str, Encoded]:
        """All members of a row but those of its text, as they are stored."""
        raise NotImplementedError

    def text(self, prompt: str) -> dict[str, Encoded]:
        """The members that follow from a prompt."""
        raise NotImplementedError


class OldShard(OldBlock):
    def __init__(self, output: Path, name: str, ids: list[str], rows: pa.Table | None = None) -> None:
        self.name, self.file, self.ids, self.rows = name, output / shard_file(name), ids, rows
        self.shard = Shard(self.file)
        self.prompts = self.shard.prompts

    def image(self, row: int) -> dict[str, Encoded]:
        return self.shard.image(row)

    def text(self, prompt: str) -> dict[str, Encoded]:
        return self.shard.text(prompt)


class OldInline(OldBlock):
    def __init__(self, file: Path, name: str, hashes: Mapping[str, str]) -> None:
        self.name, self.file = name, file
        index = open_index(str(file))
        table = index.read_columns()
        made = payload_columns(index.readers[0].payload)
        self.rows = table.drop_columns([name for name in table.column_names if name in made])
        self.ids = table["sample_id"].to_pylist()
        self.row_of = {hashes[text]: row for row, text in enumerate(table["caption"].to_pylist()) if text in hashes}
        self.prompts = set(self.row_of)

    @cached_property
    def _cache(self) -> LatentCache:  # opened when it is read: until then the file may be moved
        return LatentCache(open_index(str(self.file)))

    def image(self, row: int) -> dict[str, Encoded]:
        return {n: value for n, value in self._read(row).items() if n not in TEXT_TENSORS}

    def text(self, prompt: str) -> dict[str, Encoded]:
        return {n: value for n, value in self._read(self.row_of[prompt]).items() if n in TEXT_TENSORS}

    def _read(self, row: int) -> dict[str, Encoded]:
        members = [m for member in self._cache.members(row).values() for m in (member, member.scale) if m is not None]
        return {m.name: Encoded(m.dtype, m.shape, storage.read(m.file, m.offset, m.nbytes)) for m in members}


class BlockStaging(Staging):
    """What shards and inline files have in common.

    A block that exists stays as it is while all of its samples are wanted; the index may say new things about them.
    Of other blocks the samples are copied into new ones, which stand behind those that stay.
    """

    with_text = False

    def look(self) -> None:
        self.folder, self.writer = self.output / FOLDER, writer_of(self.output, self.layout)
        self.job_of = {job.id: job for job in self.jobs}
        self.schema = index_schema([job.record.columns for job in self.jobs], self.facts, _LIGHT)
        captions = {job.caption for job in self.jobs} if self.layout.embeds != "none" else set()
        self.hashes = {caption: prompt_hash(caption, self.facts) for caption in captions}
        self.old = self._read_blocks()
        known: dict[str, str | None] = {}
        for block in self.old.values():
            images = [None] * len(block.ids) if block.rows is None else block.rows["image_path"].to_pylist()
            known |= dict(zip(block.ids, images, strict=True))
        self.check_input(known, self.job_of)

    def _read_blocks(self) -> dict[str, OldBlock]:
        blocks = {}
        for name, read in sorted(self._found().items()):
            try:
                blocks[name] = read()
            except (CacheError, OSError, ValueError, KeyError) as error:
                logger.warning("Encoded again: what block %s holds (%s)", name, error)
        return blocks

    @abstractmethod
    def _found(self) -> dict[str, Callable[[], OldBlock]]:
        """Name of each block that may be there, and what opens it."""

    def measure(self, jobs: Iterable[Job]) -> int | None:
        for job in jobs:
            files = [self._image_file(job.id)]
            if job.caption in self.hashes:
                files.append(self._prompt_file(self.hashes[job.caption]))
            if all(file.is_file() for file in files):
                return sum(file.stat().st_size for file in files)
        return None

    def plan(self, samples_per_block: int) -> list[Todo]:
        self.kept = self._kept()
        stay = {block.name for block in self.kept}
        self.stale = [block for block in self.old.values() if block.name not in stay]
        self.old_images = {i: (block, row) for block in self.stale for row, i in enumerate(block.ids)}
        self.old_texts = {prompt: block for block in self.old.values() for prompt in block.prompts}

        stored = {i for block in self.kept for i in block.ids}
        rest = [job for job in self.jobs if job.id not in stored]
        self.new = [rest[i : i + samples_per_block] for i in range(0, len(rest), samples_per_block)]
        taken = {int(name.partition("-")[0].removeprefix("part")) for name in self.old}
        free = (number for number in range(len(taken) + len(self.new)) if number not in taken)
        self.numbers = [next(free) for _ in self.new]
        self.ready: dict[int, list[Job]] = {}
        self.textless: dict[int, list[Job]] = {}
        self.names: dict[int, str] = {}
        self.owner = {prompt: block.name for block in self.kept for prompt in block.prompts}

        staged = set(_names(self.folder / "images")), set(_names(self.folder / "prompts"))
        seen = set(self.old_texts) | {name.partition(".")[0] for name in staged[1]}
        self.last_use: dict[str, int] = {}
        plan = []
        for number, jobs in enumerate(self.new):
            missing = [j for j in jobs if j.id not in self.old_images and self._image_file(j.id).name not in staged[0]]
            prompts = []
            for caption in dict.fromkeys(job.caption for job in jobs if job.caption in self.hashes):
                prompt = self.hashes[caption]
                self.last_use[prompt] = number
                if prompt not in seen:
                    seen.add(prompt)
                    prompts.append(caption)
            plan.append(Todo(missing, prompts))
        return plan

    def _kept(self) -> list[OldBlock]:
        """The blocks that can stay."""
        wanted = [
            block for block in self.old.values() if self.job_of.keys() >= set(block.ids) and self._is_right(block)
        ]
        stored = {prompt for block in self.old.values() for prompt in block.prompts}
        while True:
            kept: list[OldBlock] = []
            claimed: set[str] = set()
            for block in wanted:
                if claimed.isdisjoint(block.ids):
                    kept.append(block)
                    claimed.update(block.ids)
            # Every prompt of a row that stays must be in a block that stays, or be copied with a row that moves.
            homes = {prompt for block in kept for prompt in block.prompts}
            left = self.job_of.keys() - claimed
            homes |= stored & self._prompts(i for block in self.old.values() for i in block.ids if i in left)
            homeless = [block.name for block in kept if not self._prompts(block.ids) <= homes]
            if not homeless:
                return kept
            wanted = [block for block in wanted if block.name not in homeless]

    def _is_right(self, block: OldBlock) -> bool:
        """Whether a block, all of whose samples are wanted, says the right things about them."""
        return True

    def _prompts(self, ids: Iterable[str]) -> set[str]:
        return {self.hashes[self.job_of[i].caption] for i in ids if self.job_of[i].caption in self.hashes}

    def save(self, job: Job, sample: Tensors) -> int:
        return self._stage(self._image_file(job.id), sample)

    def save_prompt(self, prompt: str, text: Tensors | None) -> int:
        file = self._prompt_file(self.hashes[prompt])
        return self._stage(file.with_suffix(".bad") if text is None else file, text or {})

    def _stage(self, file: Path, sample: Tensors) -> int:
        from safetensors.torch import save

        data = save({name: value.cpu().contiguous() for name, value in self.layout.tensors(sample).items()})
        with output_file(file) as handle:
            handle.write(data)
        return len(data)

    def gather(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            there = [j for j in self.new[number] if j.id in self.old_images or self._image_file(j.id).is_file()]
            self.textless[number] = [job for job in there if self._is_bad(job.caption)]
            self.ready[number] = [job for job in there if not self._is_bad(job.caption)]
            self.names[number] = self._name(number)
            for prompt in [self.hashes[job.caption] for job in self.ready[number] if job.caption in self.hashes]:
                self.owner.setdefault(prompt, self.names[number])
        # Only now: in the round before, another rank may still have read it.
        for prompt in [prompt for prompt, last in self.last_use.items() if last < start]:
            del self.last_use[prompt]
            self._prompt_file(prompt).unlink(missing_ok=True)

    def finish(self, number: int) -> None:
        for job in self.textless[number]:
            self.skip(job.name, "its encoded prompt holds NaN or Inf")
        if self.ready[number]:
            self._write(self.names[number], self.ready[number])
        for job in self.ready[number]:
            self._image_file(job.id).unlink(missing_ok=True)

    @abstractmethod
    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        """Writes these samples as a block."""

    def _is_bad(self, caption: str) -> bool:
        return caption in self.hashes and self._prompt_file(self.hashes[caption]).with_suffix(".bad").is_file()

    def _name(self, number: int) -> str:
        """Names of blocks sort like their rows, and differ where the content does."""
        content = [[job.id, self.hashes.get(job.caption)] for job in self.ready[number]]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        return f"part{self.numbers[number]:05d}-{digest}"

    def _table(self, jobs: Iterable[Job]) -> pa.Table:
        return index_table([job.row() | {"sample_id": job.id} for job in jobs], self.schema)

    def _image(self, job: Job) -> Sample:
        if job.id in self.old_images:
            block, row = self.old_images[job.id]
            return block.image(row)
        return _load(self._image_file(job.id))

    def _text(self, caption: str) -> Sample:
        if caption not in self.hashes:
            return {}
        prompt = self.hashes[caption]
        if prompt in self.old_texts:
            return self.old_texts[prompt].text(prompt)
        return _load(self._prompt_file(prompt))

    def _image_file(self, sample_id: str) -> Path:
        return self.folder / "images" / f"{sample_id}.safetensors"

    def _prompt_file(self, prompt: str) -> Path:
        return self.folder / "prompts" / f"{prompt}.safetensors"

    def close(self) -> tuple[int, int]:
        stay = {block.name for block in self.kept}
        live = {n: block for n, block in self._read_blocks().items() if n in stay or n not in self.old}
        for block in live.values():
            if block.name not in stay:  # an index file of that name is from before the block was lost and made again
                block.rows = None
        self._complete(list(live.values()))
        files = {block.file for block in live.values()}
        keep = files | {self.output / index_file(name) for name in live}
        for file in [*self.output.glob("data_part*.parquet"), *self.output.glob("shards/part*.safetensors")]:
            if _OWN.fullmatch(file.name) and file not in keep:
                file.unlink()
        return sum(len(block.ids) for block in live.values()), sum(file.stat().st_size for file in files)

    def _complete(self, blocks: Sequence[OldBlock]) -> None:
        """Writes what the index says of these blocks, which are the cache."""


class ShardStaging(BlockStaging):
    """Shards with an index file each, written last: a row may refer to an embedding in another shard."""

    def _found(self) -> dict[str, Callable[[], OldBlock]]:
        def indexed(name: str, file: Path) -> OldBlock:
            table = pq.read_table(file)
            return OldShard(self.output, name, table["sample_id"].to_pylist(), table)

        def received(file: Path) -> OldBlock:
            return OldShard(self.output, file.stem, json.loads(file.read_text()))

        # A block without an index file has a receipt, the ids of its samples.
        found: dict[str, Callable[[], OldBlock]]
        found = {file.stem: partial(received, file) for file in self.folder.glob("part*.json")}
        return found | {name: partial(indexed, name, file) for name, file in _index_files(self.output)}

    def clear(self) -> None:
        kept = {block.name for block in self.kept}
        for block in self.old.values():
            if block.rows is not None and (block.name not in kept or not self._fits(block.rows.schema)):
                self._write_receipt(block.name, block.ids)
                (self.output / index_file(block.name)).unlink()

    def _fits(self, schema: pa.Schema) -> bool:
        return all(
            name in schema.names and schema.field(name).equals(self.schema.field(name)) for name in self.schema.names
        )

    def _write_receipt(self, name: str, ids: Sequence[str]) -> None:
        with output_file(self.folder / f"{name}.json") as handle:
            handle.write(json.dumps(list(ids)).encode())

    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        prompts = [self.hashes.get(job.caption, "") for job in jobs]
        block = Block(name, self._table(jobs), prompts, [self.owner.get(prompt, "") for prompt in prompts])
        own = {prompt for prompt in prompts if self.owner.get(prompt) == name}

        def samples() -> Iterator[Sample]:
            left = set(own)
            for job, prompt in zip(jobs, prompts, strict=True):
                yield {**self._image(job), **(self._text(job.caption) if prompt in left else {})}
                left.discard(prompt)

        self.writer.write_payload(block, samples())
        self._write_receipt(name, [job.id for job in jobs])
        for prompt in own:
            self._prompt_file(prompt).unlink(missing_ok=True)

    def _complete(self, blocks: Sequence[OldBlock]) -> None:
        owners: dict[str, str] = {}
        for block in blocks:
            for prompt in sorted(block.prompts):
                owners.setdefault(prompt, block.name)
        for block in blocks:
            table = self._table(self.job_of[i] for i in block.ids)
            prompts = [self.hashes.get(caption, "") for caption in table["caption"].to_pylist()]
            homes = [owners.get(prompt, block.name) for prompt in prompts]
            if not self._says(block.rows, table, homes):
                self.writer.write_index(Block(block.name, table, prompts, homes))

    def _says(self, before: pa.Table | None, table: pa.Table, homes: Sequence[str]) -> bool:
        """Whether an index file needs no change."""
        if before is None or not self._fits(before.schema) or not before.select(table.column_names).equals(table):
            return False
        paths = [shard_file(name) for name in homes]
        return "prompt_embeds_path" not in before.column_names or before["prompt_embeds_path"].to_pylist() == paths


class InlineStaging(BlockStaging):
    """Parquet files that hold index and payload. Those of a stale block are hidden until the new ones are there."""

    def _found(self) -> dict[str, Callable[[], OldBlock]]:
        files = dict(_index_files(self.folder / "old")) | dict(_index_files(self.output))
        return {name: partial(OldInline, file, name, self.hashes) for name, file in files.items()}

    def _is_right(self, block: OldBlock) -> bool:
        rows = self._table(self.job_of[i] for i in block.ids)
        return block.file.parent == self.output and rows.equals(block.rows)

    def plan(self, samples_per_block: int) -> list[Todo]:
        plan = super().plan(samples_per_block)
        for block in self.stale:
            block.file = self.folder / "old" / block.file.name  # where `clear` puts it
        return plan

    def clear(self) -> None:
        for block in self.stale:
            if (self.output / block.file.name).is_file():
                block.file.parent.mkdir(parents=True, exist_ok=True)
                move_file(self.output / block.file.name, block.file)

    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        samples = ({**self._image(job), **self._text(job.caption)} for job in jobs)
        self.writer.write_payload(Block(name, self._table(jobs)), samples)


def _index_files(folder: Path) -> list[tuple[str, Path]]:
    """(block, file) of each index file that a build has written."""
    found = ((_OWN.fullmatch(file.name), file) for file in folder.glob("data_part*.parquet"))
    return [(match[1], file) for match, file in found if match]


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _load(file: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise CacheError(f"{file} is broken ({error}). Delete it, and repeat the command.") from error
