"""Shards: safetensors files of many samples, with each distinct prompt's embeddings once; offsets from the index."""

import functools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ...errors import CacheError, SciflowError
from .. import storage
from ..writing import output_file
from .base import (
    BROKEN,
    CONVERT,
    METADATA_KEY,
    TEXT_TENSORS,
    Block,
    ColumnReader,
    Columns,
    Encoded,
    Member,
    Sample,
    Writer,
    compact,
    explain,
    stored_columns,
)  # fmt: skip

_ALIGN = 8  # bytes; what torch needs to view any dtype in place
_KEPT_IN_MEMORY = 64 << 20  # bytes
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


# -- reading ---------------------------------------------------------------------------------------------------


class ShardReader(ColumnReader):
    """Rows whose payloads lie in safetensors files.

    Columns: `<name>_offset`, and the file in `<name>_path` or `cache_path`.
    """

    def __init__(self, file: str, root: str, table: pa.Table, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(file, root, table, payload, *shapes)
        columns = Columns(table, file)
        self._offsets = {name: compact(columns.numbers(f"{name}_offset")) for name in self.tensors}
        paths = {name: f"{name}_path" if f"{name}_path" in columns.names else "cache_path" for name in self.tensors}
        found = {column: columns.files(column, root) for column in set(paths.values())}
        self._files = {name: found[column] for name, column in paths.items()}
        self._complete: set[str] = set()

    def _find(self, name: str, i: int, nbytes: int, where: object) -> tuple[str, int]:
        files, number = self._files[name]
        file = files[number[i]]
        # Where a file has lost or gained bytes, the index's offsets would lead to wrong ones. Behind a URL that would
        # cost more requests than it is worth.
        if file not in self._complete and not storage.is_url(file):
            with explain(file, where):
                _parse_header(file)
            self._complete.add(file)
        return file, int(self._offsets[name][i])

    def files(self) -> set[str]:
        return {file for files, _ in self._files.values() for file in files}

    def places(self, name: str) -> dict[tuple[str, int], int]:
        files, number = self._files[name]
        found = np.stack([number, self._offsets[name], self._nbytes[name]], axis=1)
        return {(files[n], offset): nbytes for n, offset, nbytes in np.unique(found, axis=0).tolist()}

    def checker(self) -> Callable[[Member, int], str]:
        check, entries = super().checker(), functools.lru_cache(maxsize=16)(_by_place)

        def check_header(member: Member, crc32: int) -> str:
            said = Entry(member.dtype, list(member.shape), member.codec, member.offset, member.nbytes, crc32)
            if wrong := check(member, crc32):
                return wrong
            agrees = entries(member.file).get((member.offset, member.nbytes)) == said
            return "" if agrees else f"`{member.name}`: the index and the header of its file disagree"

        return check_header


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a shard: values of `dtype` and `shape`, stored in `nbytes` bytes from `offset` on."""

    dtype: str
    shape: list[int]
    codec: str
    offset: int
    nbytes: int
    crc32: int


def read_header(file: str) -> dict[str, Entry]:
    """The tensors of a shard, by their name in the file ("latents.0", "prompt_embeds.<hash>").

    Raises:
        CacheError: if the file is missing, cut short, or not a shard of this library.
    """
    try:
        start, entries, facts = _parse_header(file)
        found = {}
        for name, (dtype, shape, codec, crc32) in json.loads(facts).items():
            first, last = entries[name]["data_offsets"]
            found[name] = Entry(dtype, shape, codec, start + first, last - first, crc32)
    except FileNotFoundError as error:
        raise CacheError(f"The shard {file} is missing. {CONVERT}.") from error
    except (*BROKEN, TypeError) as error:
        raise CacheError(f"The shard {file} is cut short or not a shard ({error}). Delete it. {CONVERT}.") from error
    return found


def _parse_header(file: str) -> tuple[int, dict[str, Any], str]:
    """Where the data begins, the tensors, the metadata. ValueError unless the file ends where the tensors do."""
    size = storage.size(file)
    length = int.from_bytes(storage.read(file, 0, 8), "little")
    if length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(storage.read(file, 8, length))
    try:
        facts = header.pop("__metadata__")[METADATA_KEY.decode()]
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its header is not that of a shard: {error}") from error
    if end != size:
        raise ValueError(f"{size} bytes where its header says {end}")
    return 8 + length, header, facts


def _by_place(file: str) -> dict[tuple[int, int], Entry]:
    return {(entry.offset, entry.nbytes): entry for entry in read_header(file).values()}


class Shard:
    """The tensors of a shard as they are stored, without its index.

    Attributes:
        prompts: hashes of the prompts of which it holds what follows from them.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.entries = file, read_header(str(file))
        self.prompts = {key.split(".")[1] for key in self.entries if key.startswith(TEXT_TENSORS)}
        self._names = sorted({key.split(".")[0] for key in self.entries if not key.startswith(TEXT_TENSORS)})

    def image(self, row: int) -> dict[str, Encoded]:
        """All tensors of a row but those of its text."""
        return {name: self._read(f"{name}.{row}") for name in self._names}

    def text(self, prompt: str) -> dict[str, Encoded]:
        """The tensors that follow from a prompt."""
        return {name: self._read(f"{name}.{prompt}") for name in TEXT_TENSORS if f"{name}.{prompt}" in self.entries}

    def _read(self, key: str) -> Encoded:
        entry = self.entries[key]
        return Encoded(entry.dtype, tuple(entry.shape), storage.read(str(self.file), entry.offset, entry.nbytes))


# -- writing ---------------------------------------------------------------------------------------------------


class ShardWriter(Writer):
    """`shards/<block>.safetensors`, with what follows from a prompt once."""

    payload = "shards"

    def has_payload(self, block: Block) -> bool:
        file = self.output / shard_file(block.name)
        return file.is_file() and bool(read_header(str(file)))

    def is_ready(self, block: Block) -> bool:
        return all((self.output / shard_file(name)).is_file() for name in {block.name, *(block.owners or ())})

    def write_payload(self, block: Block, samples: Iterable[Sample]) -> None:
        write_shard(
            self.output / shard_file(block.name), self._named(block, samples), block.rows.num_rows, self.layout.codec
        )

    def _named(self, block: Block, samples: Iterable[Sample]) -> Iterator[tuple[str, Encoded]]:
        stored: set[str] = set()
        for row, (sample, prompt, owner) in enumerate(zip(samples, *_prompts(block), strict=True)):
            home = owner == block.name and prompt not in stored
            for name, encoded in self.layout.encode(sample).items():
                own = f"{name}.{prompt}" if home else f"{name}.{prompt}.{row}"
                yield own if name in TEXT_TENSORS else f"{name}.{row}", encoded
                if name in TEXT_TENSORS:
                    stored.add(prompt)

    def _columns(self, block: Block) -> tuple[dict[str, pa.Array], dict[str, dict[str, str]]]:
        prompts, owners = _prompts(block)
        blocks = dict.fromkeys([block.name, *owners])
        headers = {name: read_header(str(self.output / shard_file(name))) for name in blocks}
        here = headers[block.name]
        names = [key.removesuffix(".0") for key in here if key.endswith(".0") and not key.startswith(TEXT_TENSORS)]
        homes = {key.partition(".")[0] for entries in headers.values() for key in entries}
        names += [text for text in TEXT_TENSORS if text in homes]
        columns: dict[str, Any] = {"cache_path": pa.array([shard_file(block.name)] * len(prompts), pa.string())}
        tensors = {}
        for tensor in names:
            found = []
            for row, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
                places = [(block.name, f"{tensor}.{row}")]
                if tensor in TEXT_TENSORS:
                    places = [(block.name, f"{tensor}.{prompt}.{row}"), (owner, f"{tensor}.{prompt}")]
                place = next(((name, headers[name][key]) for name, key in places if key in headers[name]), None)
                if place is None:
                    raise CacheError(
                        f"Row {row} of block {block.name} has no `{tensor}` in {' or '.join(b for b, _ in places)}, "
                        f"but other rows have. Delete {self.output / shard_file(block.name)}. {CONVERT}."
                    )
                found.append(place)
            kinds = {(entry.dtype, entry.codec) for _, entry in found}
            if len(kinds) > 1:
                raise CacheError(
                    f"`{tensor}` is stored as {sorted(kinds)} in block {block.name} of {self.output}. {CONVERT}."
                )
            dtype, codec = kinds.pop()
            tensors[tensor] = {"dtype": dtype, "codec": codec}
            columns |= stored_columns(tensor, [(e.shape, e.nbytes, e.crc32) for _, e in found])
            columns[f"{tensor}_offset"] = pa.array([entry.offset for _, entry in found], pa.int64())
            if tensor in TEXT_TENSORS:
                columns[f"{tensor}_path"] = pa.array([shard_file(name) for name, _ in found], pa.string())
        return columns, tensors


def shard_file(name: str) -> str:
    """The shard of block `name`, relative to the cache."""
    return f"shards/{name}.safetensors"


def _prompts(block: Block) -> tuple[Sequence[str], Sequence[str]]:
    """Hash of each row's prompt, and the block that stores it."""
    rows = block.rows.num_rows
    prompts = [f"{row:016x}" for row in range(rows)] if block.prompts is None else block.prompts
    return prompts, [block.name] * rows if block.owners is None else block.owners


def write_shard(file: Path, tensors: Iterable[tuple[str, Encoded]], rows: int, codec: str) -> None:
    """A shard of tensors under their names in it, of at most `rows` samples."""
    with output_file(file) as handle:
        shard = _Safetensors(handle, rows, codec)
        for name, stored in tensors:
            shard.add(name, stored)
        shard.finish()


class _Safetensors:
    """A safetensors file, whose header has to stand before the data but is known last.

    A small file is kept in memory until then; of a larger one room is left at the beginning.
    """

    def __init__(self, handle: BinaryIO, rows: int, codec: str) -> None:
        self.handle, self.rows, self.codec = handle, rows, codec
        self.position = self.room = 0
        self.entries: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.waiting: list[Any] | None = []

    def add(self, name: str, stored: Encoded) -> None:
        if fill := -self.position % _ALIGN:  # the format knows no gaps
            self._append(f"fill.{self.position}", "U8", [fill], bytes(fill))
        data, shape = memoryview(stored.data), list(stored.shape)
        plain = self.codec == "none"
        self._append(name, stored.dtype if plain else "U8", shape if plain else [data.nbytes], data)
        self.facts[name] = [stored.dtype, shape, self.codec, zlib.crc32(data)]

    def _append(self, name: str, dtype: str, shape: list[int], data: Any) -> None:
        end = self.position + memoryview(data).nbytes
        self.entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self.position, end]}
        self.position = end
        if self.waiting is None:
            self.handle.write(data)
            return
        self.waiting.append(data)
        if end > _KEPT_IN_MEMORY:
            # Per tensor its entry, its facts and a filler's entry; its name stands in two of them.
            names = {*TEXT_TENSORS, *(key.partition(".")[0] for key in (*self.facts, name))}
            self.room = 1024 + self.rows * sum(2 * len(name) + 330 for name in names)
            self.room += -self.room % _ALIGN
            self.handle.seek(self.room)
            self._write_waiting()

    def _write_waiting(self) -> None:
        for data in self.waiting or ():
            self.handle.write(data)
        self.waiting = None

    def finish(self) -> None:
        facts = json.dumps(self.facts, separators=(",", ":"))
        whole = {"__metadata__": {METADATA_KEY.decode(): facts}, **self.entries}
        header = json.dumps(whole, separators=(",", ":")).encode()
        length = len(header) + -len(header) % _ALIGN if self.waiting is not None else self.room - 8
        if len(header) > min(length, _LARGEST_HEADER):
            raise SciflowError(
                f"A shard of {len(self.facts)} tensors needs a header of {len(header)} bytes, but at most "
                f"{min(length, _LARGEST_HEADER)} are possible. Make shards smaller (`--shard_size_mb`)."
            )
        self.handle.seek(0)
        self.handle.write(length.to_bytes(8, "little") + header.ljust(length))
        self._write_waiting()
