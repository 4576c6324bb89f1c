"""Staging of shards and inline files: samples are kept one by one, and joined when those of a block are complete."""

import hashlib
import json
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError
from .. import storage
from ..cache import LatentCache, open_index, read_schema, read_table
from ..layouts.base import MADE_COLUMNS, METADATA_KEY, TEXT_TENSORS, Block, Encoded, Sample, index_file, payload_columns
from ..layouts.shards import Shard, read_header, shard_file, write_shard
from ..writing import output_file
from .blocks import prompt_hash, writer_of
from .index import OWN_COLUMNS, SOURCE_COLUMNS, index_schema, index_table
from .jobs import Job, Prompt, text_key
from .references import SourceView
from .staging import FOLDER, Shared, Staging, Tensors

logger = logging.getLogger(__name__)

_OWN = re.compile(r"(?:data_)?(part\d{5,}-[0-9a-f]{12})\.(?:parquet|safetensors)")
_SUFFIX = ".safetensors"  # of staged samples
_LIGHT = {"sample_id": "text"} | {name: kind for name, kind in OWN_COLUMNS.items() if name not in MADE_COLUMNS}


class InlineFile:
    """The members of an inline file as they are stored, as `Shard` has those of a shard.

    Args:
        prompts: hash of each row's prompt; None where nobody asks for it.
        sources: ids of each row's sources.
    """

    def __init__(self, file: Path, prompts: Iterable[str | None], sources: Iterable[Sequence[str]]) -> None:
        self.file, self._cache = file, LatentCache(open_index(str(file)))
        self._row_of = {prompt: row for row, prompt in enumerate(prompts) if prompt is not None}
        self._source_of = {i: (row, number) for row, ids in enumerate(sources) for number, i in enumerate(ids)}
        self.shared = {*self._row_of, *self._source_of}

    def image(self, row: int) -> dict[str, Encoded]:
        stored = dict(self._read(row))
        apart = {*TEXT_TENSORS, *source_names_in(stored)}
        return {name: value for name, value in stored.items() if name not in apart}

    def item(self, name: str) -> dict[str, Encoded]:
        if name in self._source_of:
            row, number = self._source_of[name]
            return {source_name(0): dict(self._read(row))[source_name(number)]}
        return {tensor: value for tensor, value in self._read(self._row_of[name]) if tensor in TEXT_TENSORS}

    def _read(self, row: int) -> Iterator[tuple[str, Encoded]]:
        for m in (m for member in self._cache.members(row).values() for m in (member, member.scale) if m is not None):
            yield m.name, Encoded(m.dtype, m.shape, storage.read(m.file, m.offset, m.nbytes))


@dataclass(frozen=True)
class OldBlock:
    """A block that an earlier run has written.

    Attributes:
        ids: of its samples, by row.
        rows: its part of the index, light columns only; None where there is none.
        stored: its members.
        sources: for how many of a row its index has columns.
    """

    ids: list[str]
    rows: pa.Table | None
    stored: Shard | InlineFile
    sources: int = 0


class BlockStaging(Staging):
    """Common to shards and inline files.

    A block that exists stays as it is while all of its samples are wanted; the index may say new things about them.
    Other blocks are taken apart: what is wanted of them goes back to the staged samples, and from there into new
    blocks, which stand behind those that stay.
    """

    with_text = False

    def look(self) -> None:
        self.folder, self.writer = self.output / FOLDER, writer_of(self.output, self.layout)
        self.job_of = {job.id: job for job in self.jobs}
        own = _LIGHT if self.layout.latent_shape is None else _LIGHT | {"latent_shape": "shape"}
        own = own | (SOURCE_COLUMNS if self.layout.sources else {})
        self.schema = index_schema([job.record.columns for job in self.jobs], self.facts, own)
        keys = {job.text_key for job in self.jobs} if self.layout.embeds != "none" else set()
        self.good: set[str] = set()  # what this process has saved of what rows share
        self.hashes = {key: prompt_hash(key, self.facts) for key in keys}
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

    def _found(self) -> dict[str, Callable[[], OldBlock]]:
        """Name of each block that may be there, and what opens it."""
        files = ((_OWN.fullmatch(file.name), file) for file in self.output.glob("data_part*.parquet"))
        return {match[1]: partial(self._indexed, match[1], file) for match, file in files if match}

    def _indexed(self, name: str, file: Path) -> OldBlock:
        schema = read_schema(str(file))
        payload = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")).get("payload", {})
        tensors = payload.get("tensors", {})
        made = payload_columns(payload) | tensors.keys()
        rows = read_table(str(file), [name for name in schema.names if name not in made])
        sources = len(source_names_in(tensors))
        return OldBlock(rows["sample_id"].to_pylist(), rows, self._open(name, rows), sources)

    @abstractmethod
    def _open(self, name: str, rows: pa.Table) -> Shard | InlineFile:
        """The members of a block."""

    def clean(self) -> None:
        for kind in ("images", "prompts"):
            for file in (self._file(kind, name) for name in sorted(self._staged(kind))):
                try:
                    Shard(file).check()
                except CacheError as error:
                    logger.warning("Encoded again: %s", error)
                    file.unlink()

    def plan(self, samples_per_block: int) -> list[list[Job]]:
        old = self.old.values()
        images = self._staged("images") | {i for block in old for i in block.ids}
        shared = self._staged("prompts") | {name for block in old for name in block.stored.shared}
        self.kept = self._kept(images, shared)
        stored = {i for block in self.kept.values() for i in block.ids}
        rest = [job for job in self.jobs if job.id not in stored]
        self.new = [rest[i : i + samples_per_block] for i in range(0, len(rest), samples_per_block)]
        taken = {int(name.partition("-")[0].removeprefix("part")) for name in self.old}
        free = (number for number in range(len(taken) + len(self.new)) if number not in taken)
        self.numbers = [next(free) for _ in self.new]
        # Of each block of the round: its name, what it holds, and what `finish` returns.
        self.ready: dict[int, tuple[str, list[Job], list[tuple[Job, Shared]]]] = {}
        self.owner = self._owners(self.kept)
        self.last_use: dict[str, int] = {}
        self.new_shared: list[dict[str, Shared]] = []  # of each block, what is first needed there
        for number, jobs in enumerate(self.new):
            items = {name: item for job in jobs for name, item in self._items(job).items()}
            self.new_shared.append({name: item for name, item in items.items() if name not in shared})
            shared.update(items)
            self.last_use |= dict.fromkeys(items, number)
        self.new_prompts = [[i for i in new.values() if isinstance(i, Prompt)] for new in self.new_shared]
        return [[job for job in jobs if job.id not in images] for jobs in self.new]

    def shared(self, number: int) -> Sequence[Shared]:
        staged = self._staged("images")
        used = self._shared(job.id for job in self.new[number] if job.id in staged)
        used |= {name for name, last in self.last_use.items() if last > number}
        return [item for name, item in self.new_shared[number].items() if name in used]

    def _kept(self, images: set[str], shared: set[str]) -> dict[str, OldBlock]:
        """The blocks that can stay; what there is of `images` and of what they share includes staged files."""
        kept, claimed = dict[str, OldBlock](), set[str]()
        for name, block in self.old.items():
            wanted = bool(block.ids) and claimed.isdisjoint(block.ids) and self.job_of.keys() >= set(block.ids)
            if wanted and self._is_right(block):
                kept[name] = block
                claimed.update(block.ids)
        while True:
            # Every prompt and source of a row that stays must be in a block that stays, or move with a row that moves.
            moved = (images & self.job_of.keys()).difference(*(block.ids for block in kept.values()))
            homes = (shared & self._shared(moved)).union(*(block.stored.shared for block in kept.values()))
            left = {name: block for name, block in kept.items() if self._shared(block.ids) <= homes}
            if len(left) == len(kept):
                return kept
            kept = left

    def _is_right(self, block: OldBlock) -> bool:
        """Whether a block, all of whose samples are wanted, says the right things about them."""
        return True

    def _owners(self, blocks: Mapping[str, OldBlock]) -> dict[str, str]:
        """The block that other blocks find a prompt or a source in."""
        return {}

    def _items(self, job: Job) -> dict[str, Shared]:
        """The prompt of a row by its hash, and its sources by their ids: others may share both."""
        prompt: dict[str, Shared] = {self.hashes[job.text_key]: job.prompt} if job.text_key in self.hashes else {}
        return prompt | {source.id: source for source in job.sources}

    def _shared(self, ids: Iterable[str]) -> set[str]:
        return {name for i in ids for name in self._items(self.job_of[i])}

    def clear(self) -> None:
        for name, block in self.old.items():
            if name not in self.kept:
                for row, i in enumerate(block.ids):
                    if i in self.job_of and not self._file("images", i).is_file():
                        self._stage("images", i, block.stored.image(row), durable=True)
            for item in sorted(block.stored.shared & self.last_use.keys() - self.owner.keys()):
                if not self._file("prompts", item).is_file():
                    self._stage("prompts", item, block.stored.item(item), durable=True)
            if name not in self.kept:
                self._remove(name)

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Takes a block away from readers."""

    def save(self, job: Job, sample: Tensors) -> int:
        return self._stage("images", job.id, self._members(sample))

    def save_shared(self, item: Shared, tensors: Tensors | None) -> int:
        name = item.id if isinstance(item, SourceView) else self.hashes[item.key]
        if tensors is not None:
            self.good.add(name)
        return self._stage("prompts", name, self._members(tensors or {}))

    def _members(self, sample: Tensors) -> dict[str, Encoded]:
        """In the order of safetensors: wide numbers first, then by name."""
        plain = self.layout.tensors(sample)
        return self.layout.encode({name: plain[name] for name in sorted(plain, key=lambda n: (-plain[n].itemsize, n))})

    def _stage(self, kind: str, name: str, stored: Mapping[str, Encoded], *, durable: bool = False) -> int:
        """Unless it is `durable`, as the only copy of what took time, `clean` finds what a power failure has left."""
        file = self._file(kind, name)
        number = 0 if kind == "images" else name
        tensors = ((f"{tensor}.{number}", value) for tensor, value in stored.items())
        write_shard(file, tensors, self.layout.codec, durable=durable)
        return file.stat().st_size

    def _file(self, kind: str, name: str) -> Path:
        """A small shard: a staged image (as its row 0), or what rows share ("prompts"), empty if that has nothing."""
        return self.folder / "members" / kind / (name + _SUFFIX)

    def _staged(self, kind: str) -> set[str]:
        folder = self._file(kind, "").parent
        names = os.listdir(folder) if folder.is_dir() else []
        return {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}

    def gather(self, start: int, stop: int) -> None:
        staged = self._staged("images")
        for number in range(start, stop):
            there = [job for job in self.new[number] if job.id in staged]
            bad = {name for name in self._shared(job.id for job in there) if self._is_bad(name)}
            lacking = [(job, item) for job in there for name, item in self._items(job).items() if name in bad]
            left_out = {job.id: (job, item) for job, item in reversed(lacking)}
            ready = [job for job in there if job.id not in left_out]
            # Names of blocks sort like their rows, and differ where the content does.
            content = [[job.id, self.hashes.get(job.text_key)] for job in ready]
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
            self.ready[number] = f"part{self.numbers[number]:05d}-{digest}", ready, list(left_out.values())
            for name in self._shared(job.id for job in ready):
                self.owner.setdefault(name, self.ready[number][0])
        # Only now: in the round before, another rank may still have read it.
        for name in [name for name, last in self.last_use.items() if last < start]:
            del self.last_use[name]
            self._file("prompts", name).unlink(missing_ok=True)

    def finish(self, number: int) -> list[tuple[Job, Shared]]:
        name, ready, left_out = self.ready[number]
        if ready:
            self._write(name, ready)
        for job in ready:
            self._file("images", job.id).unlink(missing_ok=True)
        return left_out

    @abstractmethod
    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        """Writes these samples as a block."""

    def _is_bad(self, name: str) -> bool:
        """Whether a prompt or source has no tensors; this process knows the ones that it has encoded."""
        file = self._file("prompts", name)
        return name not in self.good and file.is_file() and not read_header(str(file))

    def _table(self, jobs: Iterable[Job]) -> pa.Table:
        rows = [job.row() | {"sample_id": job.id} for job in jobs]
        if self.layout.latent_shape is not None:
            rows = [row | {"latent_shape": self.layout.latent_shape(row["bucket_h"], row["bucket_w"])} for row in rows]
        return index_table(rows, self.schema)

    def _image(self, job: Job) -> Sample:
        return self._read("images", job.id).image(0)

    def _shared_of(self, job: Job, names: Collection[str]) -> Sample:
        """The text and the sources of a row, those among `names`."""
        prompt = self.hashes.get(job.text_key)
        found = {} if prompt not in names else self._item(str(prompt))
        sources = {source_name(number): source.id for number, source in enumerate(job.sources)}
        return found | {name: self._item(i)[source_name(0)] for name, i in sources.items() if i in names}

    def _item(self, name: str) -> dict[str, Encoded]:
        return self._read("prompts", name).item(name)

    def _block(self, name: str, jobs: Sequence[Job], owners: Mapping[str, str]) -> Block:
        """A block of these rows, of which `owners` are the blocks that store what they share."""
        prompts = [self.hashes.get(job.text_key, "") for job in jobs]
        sources = [[source.id for source in job.sources] for job in jobs]
        elsewhere = {item: owners[item] for item in {*prompts}.union(*sources) if owners.get(item, name) != name}
        return Block(name, self._table(jobs), prompts, sources, elsewhere)

    def _read(self, kind: str, name: str) -> Shard:
        file = self._file(kind, name)
        return Shard(file, file.read_bytes())

    def close(self) -> tuple[int, int]:
        live = {n: block for n, block in self._read_blocks().items() if n in self.kept or n not in self.old}
        self._complete(live)
        files = {block.stored.file for block in live.values()}
        keep = files | {self.output / index_file(name) for name in live}
        for file in [*self.output.glob("data_part*.parquet"), *self.output.glob("shards/part*.safetensors")]:
            if _OWN.fullmatch(file.name) and file not in keep:
                file.unlink()
        return sum(len(block.ids) for block in live.values()), sum(file.stat().st_size for file in files)

    def _complete(self, blocks: Mapping[str, OldBlock]) -> None:
        """Writes what the index says of these blocks, which are the cache."""


class ShardStaging(BlockStaging):
    """Shards with an index file each, written last: a row may refer to an embedding in another shard.

    A shard without an index file has a receipt, the ids of its samples. That of a shard that was taken apart is empty:
    the index of others refers to it until they have a new one.
    """

    def _found(self) -> dict[str, Callable[[], OldBlock]]:
        def received(file: Path) -> OldBlock:
            return OldBlock(json.loads(file.read_text()), None, self._open(file.stem))

        return {file.stem: partial(received, file) for file in self.folder.glob("part*.json")} | super()._found()

    def _open(self, name: str, rows: pa.Table = None) -> Shard:
        return Shard(self.output / shard_file(name))

    def _owners(self, blocks: Mapping[str, OldBlock]) -> dict[str, str]:
        owners: dict[str, str] = {}
        for name, block in blocks.items():
            owners = dict.fromkeys(block.stored.shared, name) | owners
        return owners

    def clear(self) -> None:
        super().clear()
        for name, block in self.kept.items():  # all index files of a cache have the same columns
            old = block.rows is not None and not block.rows.schema.equals(self.schema)
            if old or (block.rows is not None and block.sources != self.layout.sources):
                self._remove(name, block.ids)

    def _remove(self, name: str, ids: Sequence[str] = ()) -> None:
        self._write_receipt(name, ids)
        (self.output / index_file(name)).unlink(missing_ok=True)

    def _write_receipt(self, name: str, ids: Sequence[str]) -> None:
        with output_file(self.folder / f"{name}.json") as handle:
            handle.write(json.dumps(list(ids)).encode())

    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        block = self._block(name, jobs, self.owner)

        def samples() -> Iterator[Sample]:
            left = {item for item in self._shared(job.id for job in jobs) if self.owner.get(item) == name}
            for job in jobs:
                yield {**self._image(job), **self._shared_of(job, left)}
                left -= self._items(job).keys()

        self.writer.write_payload(block, samples())
        self._write_receipt(name, [job.id for job in jobs])

    def _complete(self, blocks: Mapping[str, OldBlock]) -> None:
        owners = self._owners(blocks)
        for name, block in blocks.items():
            self.writer.write_index(self._block(name, [self.job_of[i] for i in block.ids], owners))


class InlineStaging(BlockStaging):
    """Parquet files that hold index and payload."""

    def _open(self, name: str, rows: pa.Table) -> InlineFile:
        captions, none = rows["caption"].to_pylist(), pa.array([[]] * len(rows))
        sources = (rows["source_ids"] if "source_ids" in rows.column_names else none).to_pylist()
        reads = self.facts.get("text_reads_sources")
        keys = [text_key(text, ids if reads else ()) for text, ids in zip(captions, sources, strict=True)]
        return InlineFile(self.output / index_file(name), map(self.hashes.get, keys), sources)

    def _is_right(self, block: OldBlock) -> bool:
        rows = self._table(self.job_of[i] for i in block.ids)
        return rows.equals(block.rows) and block.sources == self.layout.sources

    def _remove(self, name: str) -> None:
        (self.output / index_file(name)).unlink()

    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        samples = ({**self._image(job), **self._shared_of(job, self._items(job))} for job in jobs)
        self.writer.write_payload(Block(name, self._table(jobs)), samples)
