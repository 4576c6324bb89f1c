"""Staging of shards and inline files: samples are kept one by one, and joined when those of a block are complete."""

import hashlib
import json
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from ...errors import CacheError
from .. import storage
from ..cache import LatentCache, open_index, read_schema, read_table
from ..layouts.base import MADE_COLUMNS, METADATA_KEY, TEXT_TENSORS, Block, Encoded, Sample, index_file, payload_columns
from ..layouts.shards import Shard, read_header, shard_file, write_shard
from ..writing import output_file
from .blocks import prompt_hash, writer_of
from .index import OWN_COLUMNS, index_schema, index_table
from .jobs import Job
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
    """

    def __init__(self, file: Path, prompts: Iterable[str | None]) -> None:
        self.file, self._cache = file, LatentCache(open_index(str(file)))
        self._row_of = {prompt: row for row, prompt in enumerate(prompts) if prompt is not None}
        self.shared = set(self._row_of)

    def image(self, row: int) -> dict[str, Encoded]:
        return {name: value for name, value in self._read(row) if name not in TEXT_TENSORS}

    def item(self, prompt: str) -> dict[str, Encoded]:
        return {name: value for name, value in self._read(self._row_of[prompt]) if name in TEXT_TENSORS}

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
    """

    ids: list[str]
    rows: pa.Table | None
    stored: Shard | InlineFile


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
        self.schema = index_schema([job.record.columns for job in self.jobs], self.facts, own)
        keys = {job.text_key for job in self.jobs} if self.layout.embeds != "none" else set()
        self.good: set[str] = set()  # prompts with an embedding that this process has saved
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
        made = payload_columns(payload) | payload.get("tensors", {}).keys()
        rows = read_table(str(file), [name for name in schema.names if name not in made])
        return OldBlock(rows["sample_id"].to_pylist(), rows, self._open(name, rows))

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
        texts = self._staged("prompts") | {prompt for block in old for prompt in block.stored.shared}
        self.kept = self._kept(images, texts)
        stored = {i for block in self.kept.values() for i in block.ids}
        rest = [job for job in self.jobs if job.id not in stored]
        self.new = [rest[i : i + samples_per_block] for i in range(0, len(rest), samples_per_block)]
        taken = {int(name.partition("-")[0].removeprefix("part")) for name in self.old}
        free = (number for number in range(len(taken) + len(self.new)) if number not in taken)
        self.numbers = [next(free) for _ in self.new]
        self.ready: dict[int, tuple[str, list[Job], list[Job]]] = {}  # of each block of the round: see `finish`
        self.owner = self._owners(self.kept)
        self.last_use: dict[str, int] = {}
        for number, jobs in enumerate(self.new):
            prompts = {self.hashes[job.text_key]: job.prompt for job in jobs if job.text_key in self.hashes}
            self.new_prompts.append([prompt for name, prompt in prompts.items() if name not in texts])
            texts.update(prompts)
            self.last_use |= dict.fromkeys(prompts, number)
        return [[job for job in jobs if job.id not in images] for jobs in self.new]

    def shared(self, number: int) -> Sequence[Shared]:
        staged = self._staged("images")
        used = self._prompts(job.id for job in self.new[number] if job.id in staged)
        used |= {prompt for prompt, last in self.last_use.items() if last > number}
        return [prompt for prompt in self.new_prompts[number] if self.hashes[prompt.key] in used]

    def _kept(self, images: set[str], texts: set[str]) -> dict[str, OldBlock]:
        """The blocks that can stay, of which there are `images` and `texts`, staged ones included."""
        kept, claimed = dict[str, OldBlock](), set[str]()
        for name, block in self.old.items():
            wanted = bool(block.ids) and claimed.isdisjoint(block.ids) and self.job_of.keys() >= set(block.ids)
            if wanted and self._is_right(block):
                kept[name] = block
                claimed.update(block.ids)
        while True:
            # Every prompt of a row that stays must be in a block that stays, or move with a row that moves.
            moved = (images & self.job_of.keys()).difference(*(block.ids for block in kept.values()))
            homes = (texts & self._prompts(moved)).union(*(block.stored.shared for block in kept.values()))
            left = {name: block for name, block in kept.items() if self._prompts(block.ids) <= homes}
            if len(left) == len(kept):
                return kept
            kept = left

    def _is_right(self, block: OldBlock) -> bool:
        """Whether a block, all of whose samples are wanted, says the right things about them."""
        return True

    def _owners(self, blocks: Mapping[str, OldBlock]) -> dict[str, str]:
        """The block that other blocks find a prompt in."""
        return {}

    def _prompts(self, ids: Iterable[str]) -> set[str]:
        return {self.hashes[self.job_of[i].text_key] for i in ids if self.job_of[i].text_key in self.hashes}

    def clear(self) -> None:
        for name, block in self.old.items():
            if name not in self.kept:
                for row, i in enumerate(block.ids):
                    if i in self.job_of and not self._file("images", i).is_file():
                        self._stage("images", i, block.stored.image(row), durable=True)
            for prompt in sorted(block.stored.shared & self.last_use.keys() - self.owner.keys()):
                if not self._file("prompts", prompt).is_file():
                    self._stage("prompts", prompt, block.stored.item(prompt), durable=True)
            if name not in self.kept:
                self._remove(name)

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Takes a block away from readers."""

    def save(self, job: Job, sample: Tensors) -> int:
        return self._stage("images", job.id, self._members(sample))

    def save_shared(self, item: Shared, tensors: Tensors | None) -> int:
        if isinstance(item, SourceView):
            raise NotImplementedError("sources of rows are not stored yet")
        if tensors is not None:
            self.good.add(self.hashes[item.key])
        return self._stage("prompts", self.hashes[item.key], self._members(tensors or {}))

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
        """File of a staged image, row 0 of a small shard, or of a prompt; empty if that has no embedding."""
        return self.folder / "members" / kind / (name + _SUFFIX)

    def _staged(self, kind: str) -> set[str]:
        folder = self._file(kind, "").parent
        names = os.listdir(folder) if folder.is_dir() else []
        return {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}

    def gather(self, start: int, stop: int) -> None:
        staged = self._staged("images")
        for number in range(start, stop):
            there = [job for job in self.new[number] if job.id in staged]
            bad_prompts = {prompt for prompt in self._prompts(job.id for job in there) if self._is_bad(prompt)}
            # Names of blocks sort like their rows, and differ where the content does.
            ready = [job for job in there if self.hashes.get(job.text_key) not in bad_prompts]
            bad = [job for job in there if self.hashes.get(job.text_key) in bad_prompts]
            content = [[job.id, self.hashes.get(job.text_key)] for job in ready]
            digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
            self.ready[number] = f"part{self.numbers[number]:05d}-{digest}", ready, bad
            for prompt in self._prompts(job.id for job in ready):
                self.owner.setdefault(prompt, self.ready[number][0])
        # Only now: in the round before, another rank may still have read it.
        for prompt in [prompt for prompt, last in self.last_use.items() if last < start]:
            del self.last_use[prompt]
            self._file("prompts", prompt).unlink(missing_ok=True)

    def finish(self, number: int) -> list[tuple[Job, Shared]]:
        name, ready, bad = self.ready[number]
        if ready:
            self._write(name, ready)
        for job in ready:
            self._file("images", job.id).unlink(missing_ok=True)
        return [(job, job.prompt) for job in bad]

    @abstractmethod
    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        """Writes these samples as a block."""

    def _is_bad(self, prompt: str) -> bool:
        """Whether a prompt has no embedding; this process knows the ones that it has encoded."""
        file = self._file("prompts", prompt)
        return prompt not in self.good and file.is_file() and not read_header(str(file))

    def _table(self, jobs: Iterable[Job]) -> pa.Table:
        rows = [job.row() | {"sample_id": job.id} for job in jobs]
        if self.layout.latent_shape is not None:
            rows = [row | {"latent_shape": self.layout.latent_shape(row["bucket_h"], row["bucket_w"])} for row in rows]
        return index_table(rows, self.schema)

    def _image(self, job: Job) -> Sample:
        return self._read("images", job.id).image(0)

    def _text(self, job: Job) -> Sample:
        prompt = self.hashes.get(job.text_key)
        return {} if prompt is None else self._read("prompts", prompt).item(prompt)

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
            if block.rows is not None and not block.rows.schema.equals(self.schema):
                self._remove(name, block.ids)

    def _remove(self, name: str, ids: Sequence[str] = ()) -> None:
        self._write_receipt(name, ids)
        (self.output / index_file(name)).unlink(missing_ok=True)

    def _write_receipt(self, name: str, ids: Sequence[str]) -> None:
        with output_file(self.folder / f"{name}.json") as handle:
            handle.write(json.dumps(list(ids)).encode())

    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        prompts = [self.hashes.get(job.text_key, "") for job in jobs]
        owners = {prompt: owner for prompt in prompts if (owner := self.owner.get(prompt, name)) != name}
        block = Block(name, self._table(jobs), prompts, owners=owners)

        def samples() -> Iterator[Sample]:
            left = {prompt for prompt in prompts if self.owner.get(prompt) == name}
            for job, prompt in zip(jobs, prompts, strict=True):
                yield {**self._image(job), **(self._text(job) if prompt in left else {})}
                left.discard(prompt)

        self.writer.write_payload(block, samples())
        self._write_receipt(name, [job.id for job in jobs])

    def _complete(self, blocks: Mapping[str, OldBlock]) -> None:
        owners = self._owners(blocks)
        for name, block in blocks.items():
            table = self._table(self.job_of[i] for i in block.ids)
            prompts = [self.hashes.get(self.job_of[i].text_key, "") for i in block.ids]
            elsewhere = {prompt: owner for prompt in prompts if (owner := owners.get(prompt, name)) != name}
            self.writer.write_index(Block(name, table, prompts, owners=elsewhere))


class InlineStaging(BlockStaging):
    """Parquet files that hold index and payload."""

    def _open(self, name: str, rows: pa.Table) -> InlineFile:
        return InlineFile(self.output / index_file(name), map(self.hashes.get, rows["caption"].to_pylist()))

    def _is_right(self, block: OldBlock) -> bool:
        return self._table(self.job_of[i] for i in block.ids).equals(block.rows)

    def _remove(self, name: str) -> None:
        (self.output / index_file(name)).unlink()

    def _write(self, name: str, jobs: Sequence[Job]) -> None:
        samples = ({**self._image(job), **self._text(job)} for job in jobs)
        self.writer.write_payload(Block(name, self._table(jobs)), samples)
