"""Shards: safetensors files of many samples, with each distinct prompt's embeddings once; offsets from the index."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...errors import CacheError, SciflowError
from .. import storage
from ..parquet import METADATA_KEY, Columns
from ..writing import output_file
from .members import BROKEN, Stored, missing_file, unreadable
from .stored import CONVERT, TEXT_TENSORS, StoredPart, numbers, stored_columns, with_scales

if TYPE_CHECKING:
    import pyarrow as pa

_ALIGN = 8  # bytes; what torch needs to view any dtype in place
_KEPT_IN_MEMORY = 64 << 20  # bytes
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class ShardPart(StoredPart):
    """The rows of one index file whose payloads lie in safetensors files; see `StoredPart`."""

    def __init__(
        self,
        file: str,
        root: str,
        table: "pa.Table",
        payload: Mapping[str, Any],
        latent_shapes: np.ndarray,
        text_shapes: np.ndarray,
    ) -> None:
        super().__init__(file, root, table, payload, latent_shapes, text_shapes)
        columns = Columns(table, file, 0)
        self._offsets = {name: numbers(columns, f"{name}_offset") for name in self.tensors}
        paths = {
            name: f"{name}_path" if f"{name}_path" in table.column_names else "cache_path" for name in self.tensors
        }
        found = {column: self._files(columns, column) for column in set(paths.values())}
        self._places = {name: found[column] for name, column in paths.items()}
        self._whole: set[str] = set()

    def _place(self, name: str, i: int, nbytes: int, where: str) -> tuple[str, int]:
        files, number = self._places[name]
        file = files[number[i]]
        # Where a file has lost or gained bytes, the index's offsets would lead to wrong ones. Behind a URL that would
        # cost more requests than it is worth.
        if file not in self._whole and not storage.is_url(file):
            try:
                _parse_header(file)
            except FileNotFoundError as error:
                raise missing_file(file, where) from error
            except BROKEN as error:
                raise unreadable(file, where, str(error)) from error
            self._whole.add(file)
        return file, int(self._offsets[name][i])


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


def write_shard(
    file: Path, samples: Iterable[Mapping[str, Stored]], prompts: Sequence[str], owned: Sequence[bool], codec: str
) -> None:
    """Writes a shard sample by sample; memory does not grow with its size.

    Args:
        file: appears complete or not at all.
        samples: tensors of each row by name. One without text tensors refers to what its prompt's owner stored;
            one with them stores them for its prompt, or where that is done for its row alone.
        prompts: hash of each row's prompt.
        owned: whether the embeddings of the row's prompt belong into this shard.
        codec: of all tensors.
    """

    def write(handle: BinaryIO) -> None:
        writer: _Writer | None = None
        rows = zip(samples, prompts, owned, strict=True)
        for row, (sample, prompt, own) in enumerate(rows):
            writer = writer or _Writer(handle, [*sample, *TEXT_TENSORS], len(prompts), codec)
            home = own and f"prompt_embeds.{prompt}" not in writer.facts
            for name, stored in sample.items():
                if name not in TEXT_TENSORS:
                    writer.add(f"{name}.{row}", stored)
                else:
                    writer.add(f"{name}.{prompt}" if home else f"{name}.{prompt}.{row}", stored)
        if writer is not None:
            writer.finish()

    with output_file(file) as handle:
        write(handle)


class _Writer:
    """A safetensors file, whose header has to stand before the data but is known last.

    A small file is kept in memory until then; of a larger one room is left at the beginning.
    """

    def __init__(self, handle: BinaryIO, names: Sequence[str], rows: int, codec: str) -> None:
        self.handle, self.codec = handle, codec
        # Per tensor its entry, its facts and a filler's entry; its name stands in two of them.
        self.room = 1024 + rows * sum(2 * len(name) + 330 for name in dict.fromkeys(names))
        self.room += -self.room % _ALIGN
        self.position = 0
        self.entries: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.waiting: list[Any] | None = []

    def add(self, name: str, stored: Stored) -> None:
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


def shard_file(name: str) -> str:
    """The shard of block `name`, relative to the cache."""
    return f"shards/{name}.safetensors"


def shard_columns(
    output: Path, name: str, prompts: Sequence[str], owners: Sequence[str]
) -> tuple[dict[str, "pa.Array"], dict[str, dict[str, str]]]:
    """Index columns of a block's rows, and what each tensor is, from the headers of its shard and its owners'.

    Raises:
        CacheError: a shard that is missing or broken, or lacks a tensor that other rows have.
    """
    import pyarrow as pa

    headers = {block: read_header(str(output / shard_file(block))) for block in dict.fromkeys([name, *owners])}
    here = headers[name]
    names = [key.removesuffix(".0") for key in here if key.endswith(".0") and not key.startswith(TEXT_TENSORS)]
    homes = [*dict.fromkeys(key.partition(".")[0] for block in headers.values() for key in block)]
    names += [text for text in TEXT_TENSORS if text in homes]

    columns: dict[str, Any] = {"cache_path": pa.array([shard_file(name)] * len(prompts), pa.string())}
    tensors = {}
    for tensor in names:
        found = []
        for row, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
            places = [(name, f"{tensor}.{row}")]
            if tensor in TEXT_TENSORS:
                places = [(name, f"{tensor}.{prompt}.{row}"), (owner, f"{tensor}.{prompt}")]
            place = next(((block, headers[block][key]) for block, key in places if key in headers[block]), None)
            if place is None:
                raise CacheError(
                    f"Row {row} of block {name} has no `{tensor}` in {' or '.join(b for b, _ in places)}, but other "
                    f"rows have. Delete {output / shard_file(name)}. {CONVERT}."
                )
            found.append(place)
        kinds = {(entry.dtype, entry.codec) for _, entry in found}
        if len(kinds) > 1:
            raise CacheError(f"`{tensor}` is stored as {sorted(kinds)} in block {name} of {output}. {CONVERT}.")
        dtype, codec = kinds.pop()
        tensors[tensor] = {"dtype": dtype, "codec": codec}
        columns |= stored_columns(tensor, [(e.shape, e.nbytes, e.crc32) for _, e in found])
        columns[f"{tensor}_offset"] = pa.array([entry.offset for _, entry in found], pa.int64())
        if tensor in TEXT_TENSORS:
            columns[f"{tensor}_path"] = pa.array([shard_file(block) for block, _ in found], pa.string())
    return columns, with_scales(tensors)
