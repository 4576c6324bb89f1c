"""The index of a cache: its parquet files found, checked against each other, and joined."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from sciflow_hf.errors import CacheError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

METADATA_KEY = b"sciflow_hf"
EMPTY_PROMPT_FILE = "empty_prompt.npz"
REQUIRED_COLUMNS = ("cache_path", "latent_shape", "prompt_embeds_shape", "bucket_h", "bucket_w")
_BUILD = "`sciflow-hf cache build` makes a cache from a folder of captioned images"
_PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CacheIndex:
    """All parts of an index, joined; N rows. What every view of a cache shares."""

    table: "pa.Table"
    part_names: list[str]  # parquet files
    part_roots: list[str]  # where the `cache_path` of each is rooted
    part_of_row: np.ndarray  # (N,) int32
    cache_paths: "pa.Array"
    latent_shapes: np.ndarray  # (N, 3) int64
    text_shapes: np.ndarray  # (N, 2) int64
    sizes: np.ndarray  # (N, 2) int64: height, width in pixels
    metadata: dict[str, Any]
    empty_prompt_file: str | None

    def part_of(self, row: int) -> str:
        """The parquet file that row `row` came from."""
        return self.part_names[self.part_of_row[row]]

    def root_of(self, row: int) -> str:
        """The folder in which row `row`'s `cache_path` is rooted."""
        return self.part_roots[self.part_of_row[row]]


def open_index(dataset_dir: _PathLike | Sequence[_PathLike], *, payload_dir: _PathLike | None = None) -> CacheIndex:
    """Reads and joins the index of one or more caches; see `load_cache` for the arguments and errors."""
    import pyarrow as pa

    folders = [dataset_dir] if isinstance(dataset_dir, str | os.PathLike) else list(dataset_dir)
    if not folders:
        raise CacheError("`dataset_dir` is an empty list: name at least one cache.")
    parts = [(Path(folder), file) for folder in folders for file in _index_files(Path(folder))]
    seen: set[str] = set()
    for _, file in parts:
        if (real := os.path.realpath(file)) in seen:
            raise CacheError(f"`dataset_dir` names {file} twice: give every cache once.")
        seen.add(real)
    names = [str(file) for _, file in parts]
    tables = [_read_part(file) for _, file in parts]
    metadata = _common_metadata(names, [table.schema.metadata or {} for table in tables])
    table = _join(names, tables)
    if not table.num_rows:
        raise CacheError(f"The index {names[0]} holds no samples. {_BUILD}.")

    lengths = [part.num_rows for part in tables]
    part_of_row = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    check = _Checker(table, names, part_of_row)
    cache_paths = check.column("cache_path").cast(pa.large_string()).combine_chunks()
    part_roots = []
    for (folder, file), start, length in zip(parts, np.cumsum(lengths) - lengths, lengths, strict=True):
        paths = cache_paths.slice(int(start), length)
        tried = [payload_dir] if payload_dir is not None else [folder if folder.is_dir() else file.parent, file.parent]
        roots = list(dict.fromkeys(os.path.abspath(root) for root in tried))
        _check_inside(paths, roots, str(file), int(start))
        root = _choose_root(roots, paths, str(file))
        _check_inside(paths, [root], str(file), int(start))
        part_roots.append(root)
    empties = [os.path.join(root, EMPTY_PROMPT_FILE) for root in (*part_roots, *(os.fspath(f) for f in folders))]
    return CacheIndex(
        table=table.replace_schema_metadata(None),
        part_names=names,
        part_roots=part_roots,
        part_of_row=part_of_row,
        cache_paths=cache_paths,
        latent_shapes=check.shapes("latent_shape", "(C, h, w)"),
        text_shapes=check.shapes("prompt_embeds_shape", "(L, D)"),
        sizes=np.stack([check.sizes("bucket_h"), check.sizes("bucket_w")], axis=1),
        metadata=metadata,
        empty_prompt_file=next((file for file in empties if os.path.isfile(file)), None),
    )


def inside(path: str, root: str) -> str | None:
    """`path` (absolute or relative) as relative to `root`; None if it leads outside. Purely lexical."""
    whole = os.path.normpath(os.path.join(root, path))
    for base in (root, os.path.realpath(root)):
        if whole.startswith(base.rstrip(os.sep) + os.sep):
            return os.path.relpath(whole, base)
    return None


def same_setting(key: str, one: Any, other: Any) -> bool:
    """Whether two encoder settings are equal. Of a model folder only the name counts: it may lie elsewhere here."""
    if key == "pretrained_model_name_or_path" and (_is_folder(one) or _is_folder(other)):
        return PurePath(str(one)).name == PurePath(str(other)).name
    plain = [list(value) if isinstance(value, tuple) else value for value in (one, other)]
    return plain[0] == plain[1]


def _is_folder(model: Any) -> bool:
    """Whether `model` is (or was, on another machine) a folder and not the name of a Hub repository."""
    return os.path.isdir(str(model)) or os.path.isabs(str(model)) or len(PurePath(str(model)).parts) > 2


def _index_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise CacheError(f"`dataset_dir` is {str(folder)!r}, which does not exist. {_BUILD}.")
    found = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if name.endswith(".parquet") and not name.startswith(".")]
    if not found:
        raise CacheError(f"`dataset_dir` is {str(folder)!r}, which holds no index (*.parquet). {_BUILD}.")
    return sorted(found)


def _read_part(file: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as part:
            table = part.read()
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({_first_line(error)}). {_BUILD}.") from error
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        raise CacheError(
            f"The index {file} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, table.column_names))}. Is `dataset_dir` a cache? {_BUILD}."
        )
    return table


def _join(names: Sequence[str], tables: Sequence["pa.Table"]) -> "pa.Table":
    import pyarrow as pa

    columns = tables[0].column_names
    for name, table in zip(names, tables, strict=True):
        if odd := sorted(set(columns) ^ set(table.column_names)):
            raise CacheError(
                f"The index files {names[0]} and {name} do not have the same columns: only one of them has "
                f"{', '.join(map(repr, odd))}. Add the column to the other, or train on one of them."
            )
    joined = tables[0]
    for name, table in zip(names, tables, strict=True):
        try:
            pa.unify_schemas([joined.schema, table.select(columns).schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise CacheError(
                f"The index files {names[0]} and {name} have columns of other types ({_first_line(error)}). {_BUILD}."
            ) from error
    return pa.concat_tables([table.select(columns) for table in tables], promote_options="permissive")


def _common_metadata(names: Sequence[str], schemas: Sequence[Mapping[bytes, bytes]]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for name, schema in zip(names, schemas, strict=True):
        try:
            metadata = json.loads(schema.get(METADATA_KEY, b"{}"))
        except ValueError as error:
            raise CacheError(f"The schema metadata `sciflow_hf` of {name} is not JSON ({error}). {_BUILD}.") from error
        if not isinstance(metadata, dict):
            raise CacheError(
                f"The schema metadata `sciflow_hf` of {name} is {metadata!r}, not a JSON object. {_BUILD}."
            )
        found.append(metadata)
    for name, metadata in zip(names, found, strict=True):
        # The library's own version is for people: a cache may be finished by a newer one.
        differ = [
            f"`{key}` is {found[0].get(key)!r} and {metadata.get(key)!r}"
            for key in sorted(set(found[0]) | set(metadata))
            if key != "version" and found[0].get(key) != metadata.get(key)
        ]
        if differ:
            raise CacheError(
                f"The index files {names[0]} and {name} were not made with the same settings: "
                f"{'; '.join(differ)}. Train on one of them, or build both by `sciflow-hf cache build` with "
                "the same settings."
            )
    if not found[0]:
        logger.warning("%s says nothing about the encoders that made it: they cannot be checked.", names[0])
    return found[0]


class _Checker:
    """Columns of a joined index as arrays, with errors that name row and file."""

    def __init__(self, table: "pa.Table", names: Sequence[str], part_of_row: np.ndarray) -> None:
        self.table, self.names, self.part_of_row = table, names, part_of_row

    def error(self, row: int, name: str, needed: str) -> CacheError:
        value = self.table.column(name)[row].as_py()
        return CacheError(
            f"Row {row} (in {self.names[self.part_of_row[row]]}): column `{name}` is {value!r}, but must be "
            f"{needed}. Mend the index, or run `sciflow-hf cache build` again."
        )

    def column(self, name: str) -> "pa.ChunkedArray":
        import pyarrow.types as types

        column = self.table.column(name)
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
            raise self.error(0, name, f"a whole number of pixels in every row ({_first_line(error)})") from error
        if (values <= 0).any():
            raise self.error(int(np.argmax(values <= 0)), name, "a positive number of pixels")
        return values

    def shapes(self, name: str, form: str) -> np.ndarray:
        """Lists or strings ("(32, 64, 48)", "[32, 64, 48]", "32,64,48") -> (N, numbers in `form`), int64."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.types as types

        column, size = self.column(name), form.count(",") + 1
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
                raise self.error(0, name, f"{needed}, in every row ({_first_line(error)})") from error
            shapes = flat.to_numpy().reshape(-1, size)
        else:
            raise self.error(0, name, f"{needed}, as a list or a string")
        odd = (shapes <= 0).any(axis=1)
        if odd.any():
            raise self.error(int(np.argmax(odd)), name, needed)
        return shapes


def _parse_shape(text: str, size: int) -> list[int]:
    """The numbers of a shape in brackets or without; zeros, which no shape has, if it is none."""
    numbers = re.findall(r"\d+", text) if re.fullmatch(r"[\[(\s]*\d+(?:[,\s]+\d+)*[\])\s,]*", text) else []
    return [int(number) for number in numbers] if len(numbers) == size else [0] * size


def _check_inside(paths: "pa.Array", roots: Sequence[str], file: str, start: int) -> None:
    """Refuses a `cache_path` that leads out of all roots. Only suspicious paths are looked at one by one."""
    import pyarrow.compute as pc

    if not len(paths):
        return
    suspicious = pc.match_substring_regex(paths, r"\.\.|^[/\\]|^[A-Za-z]:|^\.?/*$").to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(suspicious).tolist():
        path = paths[i].as_py()
        if all(inside(path, root) is None for root in roots):
            raise CacheError(
                f"Row {start + i} (in {file}): column `cache_path` is {path!r}, which lies outside of "
                f"{' and '.join(roots)}. If the payloads are there by intention, name their folder by "
                "`--payload_dir`."
            )


def _choose_root(roots: Sequence[str], paths: "pa.Array", file: str) -> str:
    """The first root under which some of the payloads exist; looks at a few rows, spread over the part."""
    if not len(paths):
        return roots[0]
    some = [paths[int(i)].as_py() for i in np.unique(np.linspace(0, len(paths) - 1, 8).astype(int))]
    for root in roots:
        if any(inside(path, root) is not None and os.path.exists(os.path.join(root, path)) for path in some):
            return root
    raise CacheError(
        f"The payloads of {file} are missing: no {some[0]!r} (column `cache_path` of its first row) under "
        f"{' or '.join(roots)}. Say where they are by `--payload_dir`, or run `sciflow-hf cache build` again."
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
