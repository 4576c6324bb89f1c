"""Shards: safetensors files of many samples; what several have, text and sources, once; offsets from the index."""

import functools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa

from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError, SciflowError
from .. import storage
from ..writing import output_file
from .base import (
    CONVERT,
    METADATA_KEY,
    SHARED_TENSORS,
    TEXT_TENSORS,
    Block,
    ColumnReader,
    Columns,
    Encoded,
    Member,
    Sample,
    Writer,
    explain,
)

_ALIGN = 8  # bytes; what torch needs to view any dtype in place
_KEPT_IN_MEMORY = 64 << 20  # bytes
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


# -- reading ---------------------------------------------------------------------------------------------------


class ShardReader(ColumnReader):
    """Rows whose payloads lie in safetensors files.

    Columns: `<name>_offset`, and the file in `<name>_path` or `cache_path`.
    """

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(columns, root, payload, *shapes)
        self._offsets = {name: columns.numbers(f"{name}_offset") for name in self.tensors}
        paths = {name: f"{name}_path" if f"{name}_path" in columns.names else "cache_path" for name in self.tensors}
        found = {column: columns.files(column, root) for column in set(paths.values())}
        self._files = {name: found[column] for name, column in paths.items()}
        self._complete: set[str] = set()

    @functools.cached_property
    def _places(self) -> Callable[[str], dict[tuple[int, int], Member]]:
        return functools.lru_cache(maxsize=16)(_by_place)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are not forked: without what was read of headers."""
        return {name: value for name, value in vars(self).items() if name != "_places"}

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
        return {(files[n], offset): nbytes for n, offset, nbytes in np.unique(found, axis=0).tolist() if nbytes}

    def check(self, member: Member, crc32: int) -> str:
        if wrong := super().check(member, crc32):
            return wrong
        there = self._places(member.file).get((member.offset, member.nbytes))
        agrees = there is not None and replace(there, name=member.name) == replace(member, scale=None, crc32=crc32)
        return "" if agrees else f"`{member.name}`: the index and the header of its file disagree"


def read_header(file: str, data: memoryview | None = None) -> dict[str, Member]:
    """The tensors of a shard, by their name in the file ("latents.0", "prompt_embeds.<hash>").

    Args:
        file: its path or URL.
        data: all of its bytes, if they are read already.

    Raises:
        CacheError: if the file is missing, cut short, or not a shard of this library.
    """
    found = {}
    with explain(file, "a shard"):
        start, entries, facts = _parse_header(file, data)
        for name, (dtype, shape, codec, crc32) in json.loads(facts).items():
            first, last = entries[name]["data_offsets"]
            found[name] = Member(name, file, start + first, last - first, dtype, tuple(shape), codec, None, crc32)
    return found


def _parse_header(file: str, data: memoryview | None = None) -> tuple[int, dict[str, Any], str]:
    """Where the data begins, the tensors, the metadata. ValueError unless the file ends where the tensors do."""
    size = storage.size(file) if data is None else len(data)
    length = int.from_bytes(_part(file, data, 0, 8), "little")
    if length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(bytes(_part(file, data, 8, length)))
    try:
        facts = header.pop("__metadata__")[METADATA_KEY.decode()]
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its header is not that of a shard: {error}") from error
    if end != size:
        raise ValueError(f"{size} bytes where its header says {end}")
    return 8 + length, header, facts


def _part(file: str, data: memoryview | None, offset: int, nbytes: int) -> bytes | memoryview:
    return storage.read(file, offset, nbytes) if data is None else data[offset : offset + nbytes]


def _by_place(file: str) -> dict[tuple[int, int], Member]:
    return {(entry.offset, entry.nbytes): entry for entry in read_header(file).values()}


class Shard:
    """The tensors of a shard as they are stored, without its index.

    Args:
        file: its path.
        data: all of its bytes, if they are read already.

    Attributes:
        shared: hashes of prompts and ids of sources of which it holds what follows from them.
    """

    def __init__(self, file: Path, data: bytes | None = None) -> None:
        self.file, self._data = file, None if data is None else memoryview(data)
        self.entries = read_header(str(file), self._data)
        self.shared = {key.split(".")[1] for key in self.entries if key.startswith(SHARED_TENSORS)}
        self._names = dict.fromkeys(key.split(".")[0] for key in self.entries)

    def image(self, row: int) -> dict[str, Encoded]:
        """All tensors of a row but its text and its sources."""
        return {name: self._read(f"{name}.{row}") for name in self._names if name not in SHARED_TENSORS}

    def item(self, name: str) -> dict[str, Encoded]:
        """The tensors that follow from a prompt or a source."""
        return {tensor: self._read(f"{tensor}.{name}") for tensor in self._names if f"{tensor}.{name}" in self.entries}

    def check(self) -> None:
        """CacheError where the bytes of a tensor are not those that were written."""
        for key, entry in self.entries.items():
            if zlib.crc32(self._read(key).data) != entry.crc32:
                raise CacheError(f"{self.file}: the checksum of `{key}` differs.")

    def _read(self, key: str) -> Encoded:
        entry = self.entries[key]
        return Encoded(entry.dtype, entry.shape, _part(entry.file, self._data, entry.offset, entry.nbytes))


# -- writing ---------------------------------------------------------------------------------------------------


class ShardWriter(Writer):
    """`shards/<block>.safetensors`, with what follows from a prompt, and each source, once."""

    payload = "shards"

    def has_payload(self, block: Block) -> bool:
        file = self.output / shard_file(block.name)
        return file.is_file() and bool(read_header(str(file)))

    def is_ready(self, block: Block) -> bool:
        return all((self.output / shard_file(name)).is_file() for name in {block.name, *block.owners.values()})

    def write_payload(self, block: Block, samples: Iterable[Sample]) -> None:
        write_shard(self.output / shard_file(block.name), self._named(block, samples), self.layout.codec)

    def _named(self, block: Block, samples: Iterable[Sample]) -> Iterator[tuple[str, Encoded]]:
        stored: set[str] = set()
        for row, (sample, prompt, sources) in enumerate(zip(samples, *_shared(block), strict=True)):
            new: dict[str, str | None] = {}
            for name, encoded in self.layout.encode(sample).items():
                tensor, item = _stored_as(name, prompt, sources)
                home = item not in block.owners and item not in stored
                key = f"{tensor}.{row}" if item is None else f"{tensor}.{item}" if home else f"{tensor}.{item}.{row}"
                if key not in new:  # a row may have one source twice
                    yield key, encoded
                new[key] = item
            stored.update(item for item in new.values() if item is not None)

    def _columns(self, block: Block) -> tuple[dict[str, pa.Array], dict[str, dict[str, str]]]:
        blocks = dict.fromkeys([block.name, *block.owners.values()])
        headers = {name: read_header(str(self.output / shard_file(name))) for name in blocks}
        here = headers[block.name]
        names = [key.removesuffix(".0") for key in here if key.endswith(".0") and not key.startswith(SHARED_TENSORS)]
        homes = {key.partition(".")[0] for entries in headers.values() for key in entries}
        sources = [source_name(number) for number in range(self.layout.sources)]
        columns: dict[str, Any] = {"cache_path": pa.array([shard_file(block.name)] * block.rows.num_rows, pa.string())}
        tensors, shapes = {}, [list[Sequence[int]]() for _ in range(block.rows.num_rows)]
        for name in [*names, *(text for text in TEXT_TENSORS if text in homes), *sources]:
            found = self._members(name, block, headers)
            for row, member in enumerate(found if name in sources else ()):
                shapes[row] += [member.shape] if member.nbytes else []
            kinds = {(member.dtype, member.codec) for member in found if member.nbytes}
            if len(kinds) > 1:
                raise CacheError(
                    f"`{name}` is stored as {sorted(kinds)} in block {block.name} of {self.output}. {CONVERT}."
                )
            tensors[name] = {"dtype": found[0].dtype, "codec": found[0].codec}
            columns |= self.stored_columns(name, [(m.shape, m.nbytes, m.crc32) for m in found])
            columns[f"{name}_offset"] = pa.array([member.offset for member in found], pa.int64())
            if name in (*TEXT_TENSORS, *sources):
                path = {file: os.path.relpath(file, self.output) for file in {member.file for member in found}}
                columns[f"{name}_path"] = pa.array([path[member.file] for member in found], pa.string())
        return columns | self.source_columns(shapes), tensors

    def _members(self, name: str, block: Block, headers: Mapping[str, Mapping[str, Member]]) -> list[Member]:
        """Those of one name of each row, an empty one for a source that a row does not have."""
        here, file = headers[block.name], shard_file(block.name)
        dtype, codec = self.layout.no_source().dtype, self.layout.codec
        found = []
        for row, shared in enumerate(zip(*_shared(block), strict=True)):
            tensor, item = _stored_as(name, *shared)
            if item is None and tensor in SHARED_TENSORS:
                found.append(Member(name, str(self.output / file), 0, 0, dtype, (), codec, crc32=0))
                continue
            owner = block.owners.get(item or "", block.name)
            own = here.get(f"{tensor}.{row}") or here.get(f"{tensor}.{item}.{row}")
            if (member := own or headers[owner].get(f"{tensor}.{item}")) is None:
                raise CacheError(
                    f"Row {row} of block {block.name} has no `{name}` there or in {owner}, but other rows have. "
                    f"Delete {self.output / file}. {CONVERT}."
                )
            found.append(member)
        return found


def shard_file(name: str) -> str:
    """The shard of block `name`, relative to the cache."""
    return f"shards/{name}.safetensors"


def _shared(block: Block) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Hash of each row's prompt, and the ids of its sources."""
    rows = range(block.rows.num_rows)
    return block.prompts or [f"{row:016x}" for row in rows], block.sources or [()] * len(rows)


def _stored_as(name: str, prompt: str, sources: Sequence[str]) -> tuple[str, str | None]:
    """The name of a tensor in a shard, and what it follows from there: a prompt, a source, or (None) its row."""
    if not source_names_in([name]):
        return name, prompt if name in TEXT_TENSORS else None
    number = int(name.removeprefix(source_name(0)).lstrip("_") or 0)
    return source_name(0), sources[number] if number < len(sources) else None


def write_shard(file: Path, tensors: Iterable[tuple[str, Encoded]], codec: str, *, durable: bool = True) -> None:
    """A safetensors file of tensors by name; `durable` as in `output_file`.

    Its header, which is known last, stands before the data: these wait in memory, or in a file if they are many.
    """
    entries: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    end, plain = 0, codec == "none"
    with (
        output_file(file, durable=durable) as handle,
        SpooledTemporaryFile(_KEPT_IN_MEMORY, dir=str(file.parent)) as waiting,
    ):
        for name, stored in tensors:
            data, shape, start = memoryview(stored.data), list(stored.shape), end + -end % _ALIGN
            if start > end:  # the format knows no gaps
                entries[f"fill.{end}"] = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
                waiting.write(bytes(start - end))
            waiting.write(data)
            end = start + data.nbytes
            dtype, form = (stored.dtype, shape) if plain else ("U8", [data.nbytes])
            entries[name] = {"dtype": dtype, "shape": form, "data_offsets": [start, end]}
            facts[name] = [stored.dtype, shape, codec, zlib.crc32(data)]
        metadata = {METADATA_KEY.decode(): json.dumps(facts, separators=(",", ":"))}
        header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        header = header.ljust(len(header) + -len(header) % _ALIGN)
        if len(header) > _LARGEST_HEADER:
            raise SciflowError(
                f"A shard of {len(facts)} tensors needs a header of {len(header)} bytes, but at most {_LARGEST_HEADER} "
                "are possible. Make shards smaller (`--shard_size_mb`)."
            )
        handle.write(len(header).to_bytes(8, "little") + header)
        waiting.seek(0)
        shutil.copyfileobj(waiting, handle, 1 << 20)
