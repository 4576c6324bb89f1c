"""Files of an index: schemas and settings, and their columns as arrays, with errors that name row and file."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError, first_line
from . import storage
from .layouts.members import BROKEN

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

METADATA_KEY = b"sciflow_hf"
# What describes a build and not what was encoded: parts may differ in it, as caches of several resolutions do.
_OF_THE_BUILD = ("version", "payload", "embeds", "dtype", "resolution")
# What decides which numbers an encoder gives; everything else in the metadata is for people.
ENCODER_KEYS = (
    "family",
    "pretrained_model_name_or_path",
    "vae_name_or_path",
    "revision",
    "max_sequence_length",
    "text_encoder_layers",
    "padding_side",
)
BUILD = "`sciflow-hf cache build` makes a cache from a folder of captioned images"


def is_binary(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def read_schema(file: str) -> "pa.Schema":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_file(file) as handle:
            return pq.read_schema(handle)
    except (pa.ArrowException, *BROKEN) as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def read_table(file: str, columns: Sequence[str]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_file(file) as handle, pq.ParquetFile(handle) as part:
            return part.read(columns=list(columns))
    except (pa.ArrowException, *BROKEN) as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def check_schemas(names: Sequence[str], sources: Sequence[int], schemas: Sequence["pa.Schema"]) -> None:
    """The parts of one cache have the same columns; those of different caches, the same types where they share one."""
    import pyarrow as pa

    for name, source, schema in zip(names, sources, schemas, strict=True):
        first = sources.index(source)
        if odd := sorted(set(schemas[first].names) ^ set(schema.names)):
            raise CacheError(
                f"The index files {names[first]} and {name} do not have the same columns: only one of them has "
                f"{', '.join(map(repr, odd))}. Add the column to the other, or train on one of them."
            )
        try:
            pa.unify_schemas([schemas[0], schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise CacheError(
                f"The index files {names[0]} and {name} have columns of other types ({first_line(error)}). {BUILD}."
            ) from error


def part_metadata(name: str, schema: "pa.Schema") -> dict[str, Any]:
    """What the schema of an index file says about its build; {} if nothing."""
    try:
        metadata = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except ValueError as error:
        raise CacheError(f"The schema metadata `sciflow_hf` of {name} is not JSON ({error}). {BUILD}.") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("payload", {}), dict):
        raise CacheError(f"The schema metadata `sciflow_hf` of {name} is {metadata!r}, not a JSON object. {BUILD}.")
    return metadata


def common_metadata(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metadata of the first part; CacheError where another was made with other settings."""
    for name, metadata in zip(names, found, strict=True):
        differ = [
            f"`{key}` is {found[0].get(key)!r} and {metadata.get(key)!r}"
            for key in sorted(set(found[0]) | set(metadata))
            if key not in _OF_THE_BUILD and not same_setting(key, found[0].get(key), metadata.get(key))
        ]
        if differ:
            raise CacheError(
                f"The index files {names[0]} and {name} were not made with the same settings: "
                f"{'; '.join(differ)}. Train on one of them, or build both by `sciflow-hf cache build` with "
                "the same settings."
            )
    if "family" not in found[0]:
        logger.warning("%s says nothing about the encoders that made it: they cannot be checked.", names[0])
    return dict(found[0])


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that stay the same when a model folder is moved: of one only the name is kept."""
    key = "pretrained_model_name_or_path"
    moves = key in settings and _is_folder(settings[key])
    return {**settings, key: PurePath(str(settings[key])).name} if moves else dict(settings)


def same_setting(key: str, one: Any, other: Any) -> bool:
    """Whether two encoder settings are equal. Of a model folder only the name counts: it may lie elsewhere here."""
    if key.endswith("_name_or_path") and (_is_folder(one) or _is_folder(other)):
        return PurePath(str(one)).name == PurePath(str(other)).name
    plain = [list(value) if isinstance(value, tuple) else value for value in (one, other)]
    return plain[0] == plain[1]


def _is_folder(model: Any) -> bool:
    """Whether `model` is (or was, on another machine) a folder and not the name of a Hub repository."""
    return os.path.isdir(str(model)) or os.path.isabs(str(model)) or len(PurePath(str(model)).parts) > 2


class Columns:
    """Columns of one index file, whose first row is row `start` of the complete index; N rows."""

    def __init__(self, table: "pa.Table", file: str, start: int) -> None:
        self.table, self.file, self.start = table, file, start

    def error(self, row: int, name: str, needed: str) -> CacheError:
        value = self.table.column(name)[row].as_py()
        return CacheError(
            f"Row {self.start + row} (in {self.file}): column `{name}` is {value!r}, but must be "
            f"{needed}. Mend the index, or run `sciflow-hf cache build` again."
        )

    def column(self, name: str) -> "pa.ChunkedArray":
        import pyarrow.types as types

        column = self.table.column(name)
        if not len(column):
            return column
        if column.null_count:
            raise self.error(int(np.argmax(column.is_null().to_numpy())), name, "given")
        if name == "cache_path" and not (types.is_string(column.type) or types.is_large_string(column.type)):
            raise self.error(0, name, "a path")
        return column

    def sizes(self, name: str) -> np.ndarray:
        import pyarrow as pa

        column = self.column(name)
        try:
            values = column.cast(pa.int64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self.error(0, name, f"a whole number of pixels in every row ({first_line(error)})") from error
        if (values <= 0).any():
            raise self.error(int(np.argmax(values <= 0)), name, "a positive number of pixels")
        return values.astype(np.int32)

    def shapes(self, name: str, form: str) -> np.ndarray:
        """Lists or strings ("(32, 64, 48)", "[32, 64, 48]", "32,64,48") -> (N, numbers in `form`), int32."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.types as types

        column, size = self.column(name), form.count(",") + 1
        if not len(column):
            return np.zeros((0, size), dtype=np.int32)
        needed = f"{size} positive whole numbers {form}"
        if types.is_string(column.type) or types.is_large_string(column.type):
            encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()  # few distinct shapes
            parsed = np.array([_parse_shape(text, size) for text in encoded.dictionary.to_pylist()], dtype=np.int64)
            shapes = parsed.reshape(-1, size)[encoded.indices.to_numpy()]
        elif types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
            odd = pc.not_equal(pc.list_value_length(column), size).to_numpy()
            if odd.any():
                raise self.error(int(np.argmax(odd)), name, needed)
            try:
                flat = pc.list_flatten(column).cast(pa.int64()).fill_null(0)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise self.error(0, name, f"{needed}, in every row ({first_line(error)})") from error
            shapes = flat.to_numpy().reshape(-1, size)
        else:
            raise self.error(0, name, f"{needed}, as a list or a string")
        odd = (shapes <= 0).any(axis=1)
        if odd.any():
            raise self.error(int(np.argmax(odd)), name, needed)
        return shapes.astype(np.int32)


def _parse_shape(text: str, size: int) -> list[int]:
    """The numbers of a shape in brackets or without; zeros, which no shape has, if it is none."""
    numbers = re.findall(r"\d+", text) if re.fullmatch(r"[\[(\s]*\d+(?:[,\s]+\d+)*[\])\s,]*", text) else []
    return [int(number) for number in numbers] if len(numbers) == size else [0] * size
