"""The index of a cache: its parquet files found, checked against each other, and joined."""

import json
import logging
import os
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as types

from ..errors import CacheError, first_line
from . import storage
from .layouts.base import BROKEN, METADATA_KEY, Columns, Reader
from .layouts.inline import InlineReader
from .layouts.npz import NpzReader
from .layouts.shards import ShardReader

logger = logging.getLogger(__name__)

READERS: dict[str, type[Reader]] = {"npz": NpzReader, "shards": ShardReader, "inline": InlineReader}
EMPTY_PROMPT_FILE = "empty_prompt.npz"
CAPTION_COLUMNS = ("caption", "text")
NAME_COLUMNS = ("image_path", "paper_id", "variant")
REQUIRED_COLUMNS = ("cache_path", "latent_shape", "prompt_embeds_shape", "bucket_h", "bucket_w")
PLACE_COLUMNS = ("cache_path", "inline_row", "latents_offset", "prompt_embeds_path", "prompt_embeds_offset")
_FILES_AT_ONCE = 8
_KEPT = (*NAME_COLUMNS, "cache_path", "inline_row")  # in memory; shapes and places become arrays
_PathLike = str | os.PathLike[str]
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


@dataclass(frozen=True)
class IndexFile:
    """A file of an index, and what its footer says."""

    name: str
    folder: str  # the entry of `dataset_dir`
    source: int  # its number
    footer: pq.FileMetaData
    schema: pa.Schema
    payload: dict[str, Any]
    columns: list[str]  # that say of which shapes the arrays of a row are, and where they lie


@dataclass(frozen=True)
class CacheIndex:
    """The files of an index, joined; N rows. What every view of a cache shares.

    Only the columns that are needed to find, name and batch samples are in memory: 1,000,000 rows are about
    150 MB. `read_columns` reads the others when they are asked for.
    """

    table: pa.Table  # (N rows) of the names, and of what tells the members of a row from those of another
    readers: list[Reader]  # of each index file
    starts: np.ndarray  # (files + 1,) int64: first row of each
    sources: np.ndarray  # (files,) int32: number of the `dataset_dir` entry that each is of
    latent_shapes: np.ndarray  # (N, 3) int32
    text_shapes: np.ndarray  # (N, 2) int32; (0, 0) where no embeddings are stored
    sizes: np.ndarray  # (N, 2) int32: height, width in pixels
    metadata: dict[str, Any]
    empty_prompt_file: str | None
    _read: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False, compare=False)

    def find(self, row: int) -> tuple[Reader, int]:
        """The reader of a row, and the row's number in its index file."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.readers[number], row - int(self.starts[number])

    def file_of(self, row: int) -> str:
        """The index file of a row."""
        return self.find(row)[0].file

    def number(self, row: int) -> int:
        """What a row is called in messages: its number in the complete index."""
        return row

    def value(self, name: str, row: int) -> Any:
        """One value of a column in memory; None where there is no such column."""
        return self.table.column(name)[row].as_py() if name in self.table.column_names else None

    def payload_file(self, row: int) -> str:
        """The file that holds the latents of row `row`."""
        reader, path = self.find(row)[0], self.value("cache_path", row)
        return reader.file if path is None else storage.join(reader.root, path)

    def column(self, name: str) -> pa.ChunkedArray | None:
        """A column of all rows, read from the files where it is not in memory; None if no file has it."""
        if name in self.table.column_names:
            return self.table.column(name)
        if name in _KEPT:
            return None
        if name not in self._read:
            table = self.read_columns([name])
            if name not in table.column_names:
                return None
            self._read[name] = table.column(name)
        return self._read[name]

    def read_columns(self, names: Sequence[str] | None = None) -> pa.Table:
        """Columns of all files, joined; all but the payloads' bytes where `names` is None."""
        tables = []
        for reader in self.readers:
            schema = read_schema(reader.file)
            wanted = [f.name for f in schema if not is_binary(f.type) and (names is None or f.name in names)]
            table = read_table(reader.file, wanted)
            if not wanted:  # a table without columns forgets its number of rows
                table = pa.table({"": pa.nulls(table.num_rows)})
            tables.append(table.replace_schema_metadata(None))
        joined = pa.concat_tables(tables, promote_options="permissive")
        return joined.drop_columns([""]) if "" in joined.column_names else joined

    @cached_property
    def row_ids(self) -> list[str]:
        """A name of each row that stays the same wherever the cache lies: image and variant, else the payload.

        Raises:
            CacheError: two rows with the same image and the same payload.
        """
        ids: list[str] = []
        images, variants, paths = (self._strings(n) for n in ("image_path", "variant", "cache_path"))
        for row in range(len(self.sizes)):
            name = (images and images[row]) or (paths and paths[row]) or f"row {self.number(row)}"
            if os.path.isabs(name) and not (images and images[row]):  # so that such a cache may be moved
                name = inside(name, self.find(row)[0].root) or name
            ids.append(f"{name}#{variants[row]}" if variants and variants[row] else name)
        if len(set(ids)) < len(ids):
            self._tell_apart(ids)
        return ids

    def _tell_apart(self, ids: list[str]) -> None:
        """Numbers the rows of one image (several captions, say); the same payload twice is an error."""
        first: dict[str, list[int]] = {}
        for row, name in enumerate(ids):
            first.setdefault(name, []).append(row)
        places = [column for column in map(self.column, PLACE_COLUMNS) if column is not None]
        for name, rows in first.items():
            seen: dict[Any, int] = {}
            for count, row in enumerate(rows if len(rows) > 1 else []):
                found = [column[row].as_py() for column in places]
                place = (self.find(row)[0].root, *found)  # several caches may have equal names
                if any(value is not None for value in found) and place in seen:
                    raise CacheError(
                        f"Rows {seen[place]} and {row} ({self.file_of(row)}) are the same sample twice: {name!r}, "
                        f"payload {self.payload_file(row)}. Remove one of them, or run "
                        "`sciflow-hf cache verify --repair`."
                    )
                seen[place] = row
                ids[row] = f"{name}#{count}" if count else name

    def _strings(self, name: str) -> list[str | None] | None:
        if name not in self.table.column_names:
            return None
        return [None if value is None else str(value) for value in self.table.column(name).to_pylist()]


def find_index(dataset_dir: _PathLike | Sequence[_PathLike]) -> tuple[list[IndexFile], dict[str, Any]]:
    """The index files of one or more caches, checked against each other, and their common metadata."""
    folders = [os.fspath(f) for f in ([dataset_dir] if isinstance(dataset_dir, str | os.PathLike) else dataset_dir)]
    if not folders:
        raise CacheError("`dataset_dir` is an empty list: name at least one cache.")
    found = [(source, file) for source, folder in enumerate(folders) for file in index_files(folder)]
    sources, names = [source for source, _ in found], [file for _, file in found]
    check_no_file_twice(names)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        footers = list(pool.map(read_footer, names))
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    check_schemas(names, sources, schemas)
    described = [file_metadata(name, schema) for name, schema in zip(names, schemas, strict=True)]
    metadata = common_metadata(names, described)
    files = [
        IndexFile(
            name, folders[source], source, footer, schema, facts.get("payload", {}), wanted_columns(name, schema, facts)
        )
        for (source, name), footer, schema, facts in zip(found, footers, schemas, described, strict=True)
    ]
    if not any(footer.num_rows for footer in footers):
        raise CacheError(f"The index {names[0]} holds no samples. {BUILD}.")
    return files, metadata


def open_index(dataset_dir: _PathLike | Sequence[_PathLike], *, payload_dir: _PathLike | None = None) -> CacheIndex:
    """Reads and joins the index of one or more caches; see `load_cache` for the arguments and errors."""
    files, metadata = find_index(dataset_dir)
    readers: list[Reader] = []
    kept: list[pa.Table] = []
    latent_shapes, text_shapes, sizes, starts = [], [], [], [0]
    for file in files:
        table = read_table(file.name, file.columns)
        columns = Columns(table, file.name, starts[-1])
        latents, texts, size = row_shapes(columns)
        root = find_root(columns, file.folder, payload_dir)
        readers.append(READERS[file.payload.get("layout", "npz")](file.name, root, table, file.payload, latents, texts))
        kept.append(table.select([n for n in _KEPT if n in columns]).replace_schema_metadata(None))
        latent_shapes.append(latents)
        text_shapes.append(texts)
        sizes.append(size)
        starts.append(starts[-1] + table.num_rows)
    pa.default_memory_pool().release_unused()  # of the columns that became arrays
    return CacheIndex(
        table=pa.concat_tables(kept, promote_options="permissive"),
        readers=readers,
        starts=np.array(starts),
        sources=np.array([file.source for file in files], dtype=np.int32),
        latent_shapes=np.concatenate(latent_shapes),
        text_shapes=np.concatenate(text_shapes),
        sizes=np.concatenate(sizes),
        metadata=metadata,
        empty_prompt_file=find_empty_prompt([*(file.folder for file in files), *(reader.root for reader in readers)]),
    )


def row_shapes(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the shapes of `latents` (N, 3) and `prompt_embeds` (N, 2; 0: none), and the bucket (N, 2); int32."""
    latents = columns.shapes("latent_shape", "(C, h, w)")
    with_text = "prompt_embeds_shape" in columns
    texts = columns.shapes("prompt_embeds_shape", "(L, D)") if with_text else np.zeros((len(latents), 2), np.int32)
    sides = [columns.numbers(name, least=1, unit=" of pixels") for name in ("bucket_h", "bucket_w")]
    return latents, texts, np.stack(sides, axis=1).astype(np.int32)


def find_empty_prompt(folders: Sequence[str]) -> str | None:
    """The file with the embedding of the empty prompt, in the first of the folders that has one."""
    files = (storage.join(folder, EMPTY_PROMPT_FILE) for folder in dict.fromkeys(folders))
    return next((file for file in files if storage.exists(file)), None)


def inside(path: str, root: str) -> str | None:
    """`path` (absolute or relative) as relative to `root`; None if it leads outside. Purely lexical."""
    if storage.is_url(root):
        whole = posixpath.normpath(path)
        return None if whole.startswith(("../", "/")) or whole in (".", "..") or storage.is_url(path) else whole
    whole = os.path.normpath(os.path.join(root, path))
    for base in (root, os.path.realpath(root)):
        if whole.startswith(base.rstrip(os.sep) + os.sep):
            return os.path.relpath(whole, base)
    return None


def index_files(folder: str) -> list[str]:
    """The parquet files of a cache: of a folder, a URL, or the one file that is named. CacheError if there are none."""
    if folder.endswith(".parquet") and (storage.is_url(folder) or os.path.isfile(folder)):
        return [folder]
    if not storage.is_url(folder) and not os.path.isdir(folder):
        if os.path.isfile(folder):
            return [folder]
        raise CacheError(f"`dataset_dir` is {folder!r}, which does not exist. {BUILD}.")
    found = storage.find_files(folder, ".parquet")
    if not found:
        raise CacheError(f"`dataset_dir` is {folder!r}, which holds no index (*.parquet). {BUILD}.")
    return found


def check_no_file_twice(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if (real := name if storage.is_url(name) else os.path.realpath(name)) in seen:
            raise CacheError(f"`dataset_dir` names {name} twice: give every cache once.")
        seen.add(real)


def wanted_columns(file: str, schema: pa.Schema, facts: Mapping[str, Any]) -> list[str]:
    """The columns of an index file that are kept in memory or checked."""
    payload = facts.get("payload", {})
    layout = payload.get("layout", "npz")
    if layout not in READERS:
        raise CacheError(f"The index {file} says its payload layout is {layout!r}; known are npz, shards and inline.")
    required = [
        name
        for name in REQUIRED_COLUMNS
        if not (name == "cache_path" and layout == "inline")
        and not (name == "prompt_embeds_shape" and facts.get("embeds") == "none")
    ]
    missing = [name for name in required if name not in schema.names]
    if missing:
        raise CacheError(
            f"The index {file} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, schema.names))}. Is `dataset_dir` a cache? {BUILD}."
        )
    return [
        n
        for n in dict.fromkeys((*NAME_COLUMNS, *REQUIRED_COLUMNS, *READERS[layout].columns(payload)))
        if n in schema.names
    ]


def find_root(columns: Columns, folder: str, payload_dir: _PathLike | None) -> str:
    """Where the paths of one index file are rooted; CacheError if a path leads outside or no payload is found."""
    file = columns.file
    beside = file.rpartition("/")[0] if storage.is_url(file) else str(Path(file).parent)
    tried = [os.fspath(payload_dir)] if payload_dir is not None else [beside if folder == file else folder, beside]
    roots = list(dict.fromkeys(root if storage.is_url(root) else os.path.abspath(root) for root in tried))
    root = roots[0]
    if "cache_path" in columns:
        check_inside(columns, roots, "cache_path")
        root = _choose_root(roots, columns.paths("cache_path"), file)
    for name in columns.table.column_names:
        if name.endswith("_path") and name != "image_path":
            check_inside(columns, [root], name)
    return root


def check_inside(columns: Columns, roots: Sequence[str], name: str) -> None:
    """Refuses a path that leads out of all roots. Only suspicious paths are looked at one by one."""
    paths = columns.paths(name).cast(pa.large_string())
    suspicious = pc.match_substring_regex(paths, r"\.\.|^[/\\]|^[A-Za-z]:|://|^\.?/*$").to_numpy()
    for i in np.flatnonzero(suspicious).tolist():
        path = paths[i].as_py()
        if all(inside(path, root) is None for root in roots):
            raise CacheError(
                f"Row {columns.start + i} (in {columns.file}): column `{name}` is {path!r}, which lies outside of "
                f"{' and '.join(roots)}. If the payloads are there by intention, name their folder by "
                "`--payload_dir`."
            )


def _choose_root(roots: Sequence[str], paths: pa.ChunkedArray, file: str) -> str:
    """The first root under which some of the payloads exist; looks at a few rows, spread over the part."""
    if not len(paths):
        return roots[0]
    some = [paths[int(i)].as_py() for i in np.unique(np.linspace(0, len(paths) - 1, 8).astype(int))]
    for root in roots:
        if any(inside(path, root) is not None and storage.exists(storage.join(root, path)) for path in some):
            return root
    raise CacheError(
        f"The payloads of {file} are missing: no {some[0]!r} (column `cache_path` of its first row) under "
        f"{' or '.join(roots)}. Say where they are by `--payload_dir`, or run `sciflow-hf cache build` again."
    )


# -- settings --------------------------------------------------------------------------------------------------


def is_binary(kind: pa.DataType) -> bool:

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def read_schema(file: str) -> pa.Schema:
    return read_footer(file).schema.to_arrow_schema()


def read_footer(file: str) -> pq.FileMetaData:
    try:
        with storage.open_file(file) as handle:
            return pq.read_metadata(handle)
    except BROKEN as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def read_table(file: str, columns: Sequence[str]) -> pa.Table:

    try:
        with storage.open_file(file) as handle, pq.ParquetFile(handle) as part:
            return part.read(columns=list(columns))
    except BROKEN as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def check_schemas(names: Sequence[str], sources: Sequence[int], schemas: Sequence[pa.Schema]) -> None:
    """The parts of one cache have the same columns; those of different caches, the same types where they share one."""

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


def file_metadata(name: str, schema: pa.Schema) -> dict[str, Any]:
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
