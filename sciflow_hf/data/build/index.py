"""The index that a build writes: its columns, its schema, and rows as a table."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..layouts.base import METADATA_KEY

# Columns of every index that `build` writes; free columns of the input stand before them.
OWN_COLUMNS = {
    "image_path": "text",
    "caption": "text",
    "variant": "text",
    "cache_path": "text",
    "latent_shape": "shape",
    "prompt_embeds_shape": "shape",
    "bucket_w": "integer",
    "bucket_h": "integer",
    "aspect_ratio": "text",
    "original_h": "integer",
    "original_w": "integer",
    "crop_top": "integer",
    "crop_left": "integer",
}
# More of them where rows have sources; `source_shapes` stand next to what is stored.
SOURCE_COLUMNS = {"source_images": "texts", "source_ids": "texts", "source_sizes": "shapes"}


def index_schema(
    columns: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any], own: Mapping[str, str] = OWN_COLUMNS
) -> pa.Schema:
    """Schema of an index whose rows have free `columns` before their `own`: the same for all files.

    A free column of whole numbers, numbers or truth values keeps its type; any other becomes a string.
    """
    kinds: dict[str, set[type]] = {}
    for row in columns:
        for name in row.keys() - own.keys():
            kinds.setdefault(name, set()).add(type(row[name]))
    numbers = {(bool,): pa.bool_(), (int,): pa.int64(), (float,): pa.float64(), (float, int): pa.float64()}
    types = {"text": pa.string(), "integer": pa.int64(), "shape": pa.list_(pa.int64())}
    types |= {"texts": pa.list_(pa.string()), "shapes": pa.list_(pa.list_(pa.int64()))}
    fields = []
    for name in sorted(kinds):
        kind = tuple(sorted(kinds[name] - {type(None)}, key=lambda cls: cls.__name__))
        fields.append(pa.field(name, numbers.get(kind, pa.string())))
    fields += [pa.field(name, types[kind]) for name, kind in own.items()]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata).encode()})


def index_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; what is not a text where one belongs becomes JSON."""
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        plain = map(_text, values) if pa.types.is_string(field.type) else values
        columns.append(pa.array(list(plain), field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)
