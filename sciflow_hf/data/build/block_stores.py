"""Stores of shards and inline files: samples are staged one by one, and joined in blocks when a part is complete."""

import hashlib
import json
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CacheError
from ...files import move_file
from .. import storage
from ..layouts.inline import value_offsets, write_inline
from ..layouts.members import Stored
from ..layouts.shards import read_header, shard_file, write_shard
from ..layouts.stored import TEXT_TENSORS, shape_column
from ..parquet import METADATA_KEY
from ..writing import output_file
from .blocks import index_file, prompt_hash, write_part
from .index import OWN_COLUMNS, index_schema, index_table
from .jobs import Job
from .stores import STAGING, Part, Store, Tensors

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_OWN = re.compile(r"(?:data_)?(part\d{5,}-[0-9a-f]{12})\.(?:parquet|safetensors)")
_LIGHT = {"sample_id": "text"} | {
    name: kind
    for name, kind in OWN_COLUMNS.items()
    if name not in ("cache_path", "latent_shape", "prompt_embeds_shape")
}


class StoredBlock:
    """Samples that an earlier run has stored, as they are stored.

    Attributes:
        name: of the block.
        file: of its payloads.
        ids: of its samples, by row.
        prompts: hashes of the prompts whose embeddings it holds.
        rows: its part of the index, where there is one; light columns only.
    """

    name: str
    file: Path
    ids: list[str]
    prompts: set[str]
    rows: "pa.Table | None" = None

    def image(self, row: int) -> dict[str, Stored]:
        """All arrays of a row but those of its text."""
        raise NotImplementedError

    def text(self, prompt: str) -> dict[str, Stored]:
        """The arrays that follow from a prompt."""
        raise NotImplementedError


class StoredShard(StoredBlock):
    def __init__(self, output: Path, name: str, ids: list[str], rows: "pa.Table | None" = None) -> None:
        self.name, self.ids, self.rows = name, ids, rows
        self.file = output / shard_file(name)
        self.entries = read_header(str(self.file))
        self.prompts = {key.split(".")[1] for key in self.entries if key.startswith(TEXT_TENSORS)}
        self.tensors = {key.split(".")[0] for key in self.entries if not key.startswith(TEXT_TENSORS)}

    def image(self, row: int) -> dict[str, Stored]:
        return {name: self._stored(f"{name}.{row}") for name in sorted(self.tensors)}

    def text(self, prompt: str) -> dict[str, Stored]:
        return {name: self._stored(f"{name}.{prompt}") for name in TEXT_TENSORS if f"{name}.{prompt}" in self.entries}

    def _stored(self, key: str) -> Stored:
        entry = self.entries[key]
        return Stored("", entry.dtype, tuple(entry.shape), storage.read(str(self.file), entry.offset, entry.nbytes))


class StoredInline(StoredBlock):
    def __init__(self, file: Path, name: str, facts: Mapping[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.name, self.file = name, file
        schema = pq.read_schema(file)
        self.tensors = json.loads(schema.metadata[METADATA_KEY])["payload"]["tensors"]
        self.table = pq.read_table(file, columns=[name for name in schema.names if name not in self.tensors])
        self.ids = self.table["sample_id"].to_pylist()
        stored = {f"{tensor}_{end}" for tensor in self.tensors for end in ("nbytes", "crc32", "shape")}
        self.rows = self.table.drop_columns([n for n in self.table.column_names if n in stored | {"latent_shape"}])
        texts = self.table["caption"].to_pylist() if "prompt_embeds" in self.tensors else []
        self.row_of = {prompt_hash(text, facts): row for row, text in enumerate(texts)}
        self.prompts = set(self.row_of)
        self.offsets = value_offsets(str(file), list(self.tensors))

    def image(self, row: int) -> dict[str, Stored]:
        return {name: self._stored(name, row) for name in self.tensors if name not in TEXT_TENSORS}

    def text(self, prompt: str) -> dict[str, Stored]:
        return {name: self._stored(name, self.row_of[prompt]) for name in self.tensors if name in TEXT_TENSORS}

    def _stored(self, name: str, row: int) -> Stored:
        shape = self.table[shape_column(name.removesuffix("_scale"))][row].as_py()
        shape = shape[:1] if name.endswith("_scale") else shape
        size = self.table[f"{name}_nbytes"][row].as_py()
        data = storage.read(str(self.file), int(self.offsets[name][row]), size)
        return Stored("", self.tensors[name]["dtype"], tuple(shape), data)


class BlockStore(Store):
    """What shards and inline files have in common.

    A block that exists stays as it is while all of its samples are wanted; the index may say new things about them.
    Of other blocks the samples are copied into new ones, which stand behind those that stay.
    """

    with_text = False

    def look(self) -> None:
        self.staging = self.output / STAGING
        self.job_of = {job.id: job for job in self.jobs}
        self.schema = index_schema([job.record.columns for job in self.jobs], self.facts, _LIGHT)
        captions = {job.caption for job in self.jobs} if self.layout.embeds != "none" else set()
        self.hashes = {caption: prompt_hash(caption, self.facts) for caption in captions}
        self.blocks = self._read_blocks()
        known: dict[str, str | None] = {}
        for block in self.blocks.values():
            images = [None] * len(block.ids) if block.rows is None else block.rows["image_path"].to_pylist()
            known |= dict(zip(block.ids, images, strict=True))
        self.check_input(known, self.job_of)

    def _read_blocks(self) -> dict[str, StoredBlock]:
        blocks = {}
        for name, read in sorted(self._found().items()):
            try:
                blocks[name] = read()
            except (CacheError, OSError, ValueError, KeyError) as error:
                logger.warning("Encoded again: what block %s holds (%s)", name, error)
        return blocks

    @abstractmethod
    def _found(self) -> dict[str, Callable[[], StoredBlock]]:
        """Name of each block that may be there, and what opens it."""

    @abstractmethod
    def _kept(self, candidates: Sequence[StoredBlock]) -> list[StoredBlock]:
        """Those of the blocks, all of whose samples are wanted, that can stay."""

    def measure(self, jobs: Iterable[Job]) -> int | None:
        for job in jobs:
            files = [self._image_file(job.id)]
            if job.caption in self.hashes:
                files.append(self._prompt_file(self.hashes[job.caption]))
            if all(file.is_file() for file in files):
                return sum(file.stat().st_size for file in files)
        return None

    def plan(self, samples_per_part: int) -> list[Part]:
        candidates = [block for block in self.blocks.values() if self.job_of.keys() >= set(block.ids)]
        self.kept = self._kept(candidates)
        stay = {block.name for block in self.kept}
        self.stale = [block for block in self.blocks.values() if block.name not in stay]
        self.old_images = {i: (block, row) for block in self.stale for row, i in enumerate(block.ids)}
        self.old_texts = {prompt: block for block in self.blocks.values() for prompt in block.prompts}

        stored = {i for block in self.kept for i in block.ids}
        rest = [job for job in self.jobs if job.id not in stored]
        self.parts = [rest[i : i + samples_per_part] for i in range(0, len(rest), samples_per_part)]
        taken = {int(name.partition("-")[0].removeprefix("part")) for name in self.blocks}
        free = (number for number in range(len(taken) + len(self.parts)) if number not in taken)
        self.numbers = [next(free) for _ in self.parts]
        self.ready: dict[int, list[Job]] = {}
        self.textless: dict[int, list[Job]] = {}
        self.names: dict[int, str] = {}
        self.owner = {prompt: block.name for block in self.kept for prompt in block.prompts}

        staged = set(_names(self.staging / "images")), set(_names(self.staging / "prompts"))
        seen = set(self.old_texts) | {name.partition(".")[0] for name in staged[1]}
        self.last_use: dict[str, int] = {}
        plan = []
        for number, part in enumerate(self.parts):
            missing = [j for j in part if j.id not in self.old_images and self._image_file(j.id).name not in staged[0]]
            prompts = []
            for caption in dict.fromkeys(job.caption for job in part if job.caption in self.hashes):
                prompt = self.hashes[caption]
                self.last_use[prompt] = number
                if prompt not in seen:
                    seen.add(prompt)
                    prompts.append(caption)
            plan.append(Part(missing, prompts))
        return plan

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
            there = [j for j in self.parts[number] if j.id in self.old_images or self._image_file(j.id).is_file()]
            self.textless[number] = [job for job in there if self._is_bad(job.caption)]
            self.ready[number] = [job for job in there if not self._is_bad(job.caption)]
            self.names[number] = self._name(number)
        # Only now: in the round before, another rank may still have read it.
        for prompt in [prompt for prompt, last in self.last_use.items() if last < start]:
            del self.last_use[prompt]
            self._prompt_file(prompt).unlink(missing_ok=True)

    def finish(self, number: int) -> None:
        for job in self.textless[number]:
            self.skip(job.name, "its encoded prompt holds NaN or Inf")
        if self.ready[number]:
            self._write(number, self.ready[number])
        for job in self.ready[number]:
            self._image_file(job.id).unlink(missing_ok=True)

    @abstractmethod
    def _write(self, number: int, jobs: Sequence[Job]) -> None:
        """Writes these samples of a part as a block."""

    def _is_bad(self, caption: str) -> bool:
        return caption in self.hashes and self._prompt_file(self.hashes[caption]).with_suffix(".bad").is_file()

    def _name(self, number: int) -> str:
        """Names of blocks sort like the parts, and differ where the content does."""
        content = [[job.id, self.hashes.get(job.caption)] for job in self.ready[number]]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        return f"part{self.numbers[number]:05d}-{digest}"

    def _table(self, jobs: Iterable[Job]) -> "pa.Table":
        return index_table([job.row() | {"sample_id": job.id} for job in jobs], self.schema)

    def _image(self, job: Job) -> dict[str, Stored]:
        if job.id in self.old_images:
            block, row = self.old_images[job.id]
            return block.image(row)
        return self.layout.encode(_load(self._image_file(job.id)))

    def _text(self, caption: str) -> dict[str, Stored]:
        if caption not in self.hashes:
            return {}
        prompt = self.hashes[caption]
        if prompt in self.old_texts:
            return self.old_texts[prompt].text(prompt)
        return self.layout.encode(_load(self._prompt_file(prompt)))

    def _image_file(self, sample_id: str) -> Path:
        return self.staging / "images" / f"{sample_id}.safetensors"

    def _prompt_file(self, prompt: str) -> Path:
        return self.staging / "prompts" / f"{prompt}.safetensors"

    def close(self) -> tuple[int, int]:
        stay = {block.name for block in self.kept}
        live = {n: block for n, block in self._read_blocks().items() if n in stay or n not in self.blocks}
        for block in live.values():
            if block.name not in stay:  # an index part of that name is from before the block was lost and made again
                block.rows = None
        files = self._complete(list(live.values()))
        keep = {self.output / index_file(name) for name in live} | set(files)
        for file in [*self.output.glob("data_part*.parquet"), *self.output.glob("shards/part*.safetensors")]:
            if _OWN.fullmatch(file.name) and file not in keep:
                file.unlink()
        return sum(len(block.ids) for block in live.values()), sum(file.stat().st_size for file in files)

    @abstractmethod
    def _complete(self, blocks: Sequence[StoredBlock]) -> list[Path]:
        """Writes what the index says of these blocks, which are the cache; returns their payload files."""


class ShardStore(BlockStore):
    """Shards with an index part each, written last: a row may refer to an embedding in another shard."""

    def _found(self) -> dict[str, Callable[[], StoredBlock]]:
        import pyarrow.parquet as pq

        def indexed(name: str, file: Path) -> StoredBlock:
            table = pq.read_table(file)
            return StoredShard(self.output, name, table["sample_id"].to_pylist(), table)

        def received(file: Path) -> StoredBlock:
            return StoredShard(self.output, file.stem, json.loads(file.read_text()))

        # A block without an index part has a receipt, the ids of its samples.
        found: dict[str, Callable[[], StoredBlock]]
        found = {file.stem: partial(received, file) for file in self.staging.glob("part*.json")}
        return found | {name: partial(indexed, name, file) for name, file in _index_files(self.output)}

    def _kept(self, candidates: Sequence[StoredBlock]) -> list[StoredBlock]:
        wanted, stored = list(candidates), {prompt for block in self.blocks.values() for prompt in block.prompts}
        while True:
            kept: list[StoredBlock] = []
            claimed: set[str] = set()
            for block in wanted:
                if claimed.isdisjoint(block.ids):
                    kept.append(block)
                    claimed.update(block.ids)
            # Every prompt of a row that stays must be in a block that stays, or be copied with a row that moves.
            homes = {prompt for block in kept for prompt in block.prompts}
            left = self.job_of.keys() - claimed
            homes |= stored & self._prompts(i for block in self.blocks.values() for i in block.ids if i in left)
            homeless = [block.name for block in kept if not self._prompts(block.ids) <= homes]
            if not homeless:
                return kept
            wanted = [block for block in wanted if block.name not in homeless]

    def _prompts(self, ids: Iterable[str]) -> set[str]:
        return {self.hashes[self.job_of[i].caption] for i in ids if self.job_of[i].caption in self.hashes}

    def clear(self) -> None:
        kept = {block.name for block in self.kept}
        for block in self.blocks.values():
            if block.rows is not None and (block.name not in kept or not self._fits(block.rows.schema)):
                self._write_receipt(block.name, block.ids)
                (self.output / index_file(block.name)).unlink()

    def _fits(self, schema: "pa.Schema") -> bool:
        return all(
            name in schema.names and schema.field(name).equals(self.schema.field(name)) for name in self.schema.names
        )

    def _write_receipt(self, name: str, ids: Sequence[str]) -> None:
        with output_file(self.staging / f"{name}.json") as handle:
            handle.write(json.dumps(list(ids)).encode())

    def gather(self, start: int, stop: int) -> None:
        super().gather(start, stop)
        for number in range(start, stop):
            for job in self.ready[number]:
                if job.caption in self.hashes:
                    self.owner.setdefault(self.hashes[job.caption], self.names[number])

    def _write(self, number: int, jobs: Sequence[Job]) -> None:
        name = self.names[number]
        prompts = [self.hashes.get(job.caption, "") for job in jobs]
        owned = [self.owner.get(prompt) == name for prompt in prompts]

        def samples() -> Iterator[dict[str, Stored]]:
            done: set[str] = set()
            for job, prompt, own in zip(jobs, prompts, owned, strict=True):
                yield self._image(job) | (self._text(job.caption) if own and prompt not in done else {})
                done.add(prompt)

        write_shard(self.output / shard_file(name), samples(), prompts, owned, self.layout.codec)
        self._write_receipt(name, [job.id for job in jobs])
        for prompt, own in zip(prompts, owned, strict=True):
            if own:
                self._prompt_file(prompt).unlink(missing_ok=True)

    def _complete(self, blocks: Sequence[StoredBlock]) -> list[Path]:
        owners: dict[str, str] = {}
        for block in blocks:
            for prompt in sorted(block.prompts):
                owners.setdefault(prompt, block.name)
        for block in blocks:
            table = self._table(self.job_of[i] for i in block.ids)
            prompts = [self.hashes.get(caption, "") for caption in table["caption"].to_pylist()]
            homes = [owners.get(prompt, block.name) for prompt in prompts]
            if not self._says(block.rows, table, homes):
                write_part(self.output, block.name, table, self.layout, prompts=prompts, owners=homes)
        return [self.output / shard_file(block.name) for block in blocks]

    def _says(self, before: "pa.Table | None", table: "pa.Table", homes: Sequence[str]) -> bool:
        """Whether a part of the index needs no change."""
        if before is None or not self._fits(before.schema) or not before.select(table.column_names).equals(table):
            return False
        paths = [shard_file(name) for name in homes]
        return "prompt_embeds_path" not in before.column_names or before["prompt_embeds_path"].to_pylist() == paths


class InlineStore(BlockStore):
    """Parquet files that hold index and payloads. Those of a stale block are hidden until the new ones are there."""

    def _found(self) -> dict[str, Callable[[], StoredBlock]]:
        files = dict(_index_files(self.staging / "old")) | dict(_index_files(self.output))
        return {name: partial(StoredInline, file, name, self.facts) for name, file in files.items()}

    def _kept(self, candidates: Sequence[StoredBlock]) -> list[StoredBlock]:
        kept: list[StoredBlock] = []
        claimed: set[str] = set()
        for block in candidates:
            rows = self._table(self.job_of[i] for i in block.ids)
            if block.file.parent == self.output and rows.equals(block.rows) and claimed.isdisjoint(block.ids):
                kept.append(block)
                claimed.update(block.ids)
        return kept

    def plan(self, samples_per_part: int) -> list[Part]:
        plan = super().plan(samples_per_part)
        for block in self.stale:
            block.file = self.staging / "old" / block.file.name  # where `clear` puts it
        return plan

    def clear(self) -> None:
        for block in self.stale:
            if (self.output / block.file.name).is_file():
                block.file.parent.mkdir(parents=True, exist_ok=True)
                move_file(self.output / block.file.name, block.file)

    def _write(self, number: int, jobs: Sequence[Job]) -> None:
        samples = (self._image(job) | self._text(job.caption) for job in jobs)
        file = self.output / index_file(self.names[number])
        write_inline(file, self._table(jobs), samples, self.layout.codec, self._metadata)

    def _metadata(self, tensors: Mapping[str, Any]) -> dict[bytes, bytes]:
        payload = {"layout": "inline", "tensors": tensors}
        return {METADATA_KEY: json.dumps({**self.facts, "embeds": self.layout.embeds, "payload": payload}).encode()}

    def _complete(self, blocks: Sequence[StoredBlock]) -> list[Path]:
        return [block.file for block in blocks]


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
