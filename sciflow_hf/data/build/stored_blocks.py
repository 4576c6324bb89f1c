"""Blocks that an earlier build has written: whose samples they hold, and their arrays as they are stored."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import storage
from ..layouts.inline import value_offsets
from ..layouts.members import Stored
from ..layouts.shards import read_header, shard_file
from ..layouts.stored import TEXT_TENSORS, shape_column
from ..parquet import METADATA_KEY
from .blocks import prompt_hash

if TYPE_CHECKING:
    import pyarrow as pa


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
