"""The index of a cache: its parquet files found, checked against each other, and joined."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import CacheError
from . import storage
from .layouts.members import Member
from .layouts.npz import NpzPart
from .parquet import BUILD, Columns, check_schemas, common_metadata, is_binary, part_metadata, read_schema, read_table

if TYPE_CHECKING:
    import pyarrow as pa

EMPTY_PROMPT_FILE = "empty_prompt.npz"
CAPTION_COLUMNS = ("caption", "text")
NAME_COLUMNS = ("image_path", "paper_id", "variant")
REQUIRED_COLUMNS = ("cache_path", "latent_shape", "prompt_embeds_shape", "bucket_h", "bucket_w")
PLACE_COLUMNS = ("cache_path", "inline_row", "latents_offset", "prompt_embeds_path", "prompt_embeds_offset")
_KEPT = (*NAME_COLUMNS, "cache_path", "inline_row")  # in memory; shapes and places become arrays
_PathLike = str | os.PathLike[str]


class Part(Protocol):
    """The rows of one index file: where the arrays of each lie."""

    def members(self, i: int, where: str) -> dict[str, Member]:
        """The arrays of row `i` of this part by name; CacheError if they cannot be found."""


@dataclass(frozen=True)
class CacheIndex:
    """All parts of an index, joined; N rows. What every view of a cache shares.

    Only the columns that are needed to find, name and batch samples are in memory: 1,000,000 rows are about
    150 MB. `read_columns` reads the others when they are asked for.
    """

    table: "pa.Table"  # (N rows) of the names and places
    part_names: list[str]  # parquet files
    part_roots: list[str]  # where the paths of each are rooted
    part_starts: np.ndarray  # (parts + 1,) int64: first row of each part
    part_sources: np.ndarray  # (parts,) int32: number of the `dataset_dir` entry
    parts: list[Part]
    payloads: list[dict[str, Any]]  # of each part, {} for npz
    latent_shapes: np.ndarray  # (N, 3) int32
    text_shapes: np.ndarray  # (N, 2) int32; (0, 0) where no embeddings are stored
    sizes: np.ndarray  # (N, 2) int32: height, width in pixels
    metadata: dict[str, Any]
    empty_prompt_file: str | None
    _read: dict[str, "pa.ChunkedArray"] = field(default_factory=dict, repr=False, compare=False)

    def part_number(self, row: int) -> int:
        """Number of the part that row `row` came from."""
        return int(np.searchsorted(self.part_starts, row, side="right")) - 1

    def part_of(self, row: int) -> str:
        """The parquet file that row `row` came from."""
        return self.part_names[self.part_number(row)]

    def members(self, row: int, where: str) -> dict[str, Member]:
        """The arrays of a row by name."""
        number = self.part_number(row)
        return self.parts[number].members(row - int(self.part_starts[number]), where)

    def value(self, name: str, row: int) -> Any:
        """One value of a column in memory; None where there is no such column."""
        return self.table.column(name)[row].as_py() if name in self.table.column_names else None

    def payload_file(self, row: int) -> str:
        """The file that holds the latents of row `row`."""
        number, path = self.part_number(row), self.value("cache_path", row)
        return self.part_names[number] if path is None else storage.join(self.part_roots[number], path)

    def column(self, name: str) -> "pa.ChunkedArray | None":
        """A column of all rows, read from the files where it is not in memory; None if no part has it."""
        if name in self.table.column_names:
            return self.table.column(name)
        if name not in self._read:
            table = self.read_columns([name])
            if name not in table.column_names:
                return None
            self._read[name] = table.column(name)
        return self._read[name]

    @cached_property
    def captions(self) -> "pa.ChunkedArray | None":
        """The captions of all rows, where there are any."""
        found = (self.column(name) for name in CAPTION_COLUMNS)
        return next((column for column in found if column is not None), None)

    def read_columns(self, names: Sequence[str] | None = None) -> "pa.Table":
        """Columns of all parts, joined; all but the payloads' bytes where `names` is None."""
        import pyarrow as pa

        tables = []
        for file in self.part_names:
            schema = read_schema(file)
            wanted = [f.name for f in schema if not is_binary(f.type) and (names is None or f.name in names)]
            table = read_table(file, wanted)
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
            name = (images and images[row]) or (paths and paths[row]) or f"row {row}"
            if os.path.isabs(name) and not (images and images[row]):  # so that such a cache may be moved
                name = inside(name, self.part_roots[self.part_number(row)]) or name
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
                place = (self.part_roots[self.part_number(row)], *found)  # several caches may have equal names
                if any(value is not None for value in found) and place in seen:
                    raise CacheError(
                        f"Rows {seen[place]} and {row} ({self.part_of(row)}) are the same sample twice: {name!r}, "
                        f"payload {self.payload_file(row)}. Remove one of them, or run "
                        "`sciflow-hf cache verify --repair`."
                    )
                seen[place] = row
                ids[row] = f"{name}#{count}" if count else name

    def _strings(self, name: str) -> list[str | None] | None:
        if name not in self.table.column_names:
            return None
        return [None if value is None else str(value) for value in self.table.column(name).to_pylist()]


def open_index(dataset_dir: _PathLike | Sequence[_PathLike], *, payload_dir: _PathLike | None = None) -> CacheIndex:
    """Reads and joins the index of one or more caches; see `load_cache` for the arguments and errors."""
    import pyarrow as pa

    folders = [os.fspath(f) for f in ([dataset_dir] if isinstance(dataset_dir, str | os.PathLike) else dataset_dir)]
    if not folders:
        raise CacheError("`dataset_dir` is an empty list: name at least one cache.")
    files = [(source, file) for source, folder in enumerate(folders) for file in index_files(folder)]
    names = [file for _, file in files]
    check_no_file_twice(names)
    schemas = [read_schema(file) for file in names]
    check_schemas(names, [source for source, _ in files], schemas)
    described = [part_metadata(name, schema) for name, schema in zip(names, schemas, strict=True)]
    metadata = common_metadata(names, described)
    roots: list[str] = []
    parts: list[Part] = []
    places: list[pa.Table] = []
    latent_shapes, text_shapes, sizes, starts = [], [], [], [0]
    for (source, file), schema, facts in zip(files, schemas, described, strict=True):
        payload = facts.get("payload", {})
        own = read_table(file, wanted_columns(file, schema, facts))
        columns = Columns(own, file, starts[-1])
        if "cache_path" in own.column_names:
            columns.column("cache_path")
        latent_shapes.append(columns.shapes("latent_shape", "(C, h, w)"))
        with_text = "prompt_embeds_shape" in own.column_names
        no_text = np.zeros((own.num_rows, 2), dtype=np.int32)
        text_shapes.append(columns.shapes("prompt_embeds_shape", "(L, D)") if with_text else no_text)
        sizes.append(np.stack([columns.sizes("bucket_h"), columns.sizes("bucket_w")], axis=1))
        roots.append(find_root(own, folders[source], payload_dir, file, starts[-1]))
        if payload.get("layout", "npz") == "npz":
            parts.append(NpzPart(roots[-1], own.column("cache_path")))
        else:
            layout = layouts()[payload["layout"]]
            parts.append(layout(file, roots[-1], own, payload, latent_shapes[-1], text_shapes[-1]))
        places.append(own.select([n for n in _KEPT if n in own.column_names]).replace_schema_metadata(None))
        starts.append(starts[-1] + own.num_rows)
    if not starts[-1]:
        raise CacheError(f"The index {names[0]} holds no samples. {BUILD}.")
    pa.default_memory_pool().release_unused()  # of the columns that became arrays
    empties = [storage.join(root, EMPTY_PROMPT_FILE) for root in dict.fromkeys((*folders, *roots))]
    return CacheIndex(
        table=pa.concat_tables(places, promote_options="permissive"),
        part_names=names,
        part_roots=roots,
        part_starts=np.array(starts),
        part_sources=np.array([source for source, _ in files], dtype=np.int32),
        parts=parts,
        payloads=[facts.get("payload", {}) for facts in described],
        latent_shapes=np.concatenate(latent_shapes),
        text_shapes=np.concatenate(text_shapes),
        sizes=np.concatenate(sizes),
        metadata=metadata,
        empty_prompt_file=next((file for file in empties if storage.exists(file)), None),
    )


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


def layouts() -> dict[str, Any]:
    from .layouts.inline import InlinePart
    from .layouts.shards import ShardPart

    return {"shards": ShardPart, "inline": InlinePart}


def wanted_columns(file: str, schema: "pa.Schema", facts: Mapping[str, Any]) -> list[str]:
    """The columns of a part that are kept in memory or checked."""
    payload = facts.get("payload", {})
    layout = payload.get("layout", "npz")
    if layout != "npz" and layout not in layouts():
        raise CacheError(f"The index {file} says its payload layout is {layout!r}; known are npz, shards and inline.")
    own = [] if layout == "npz" else layouts()[layout].columns(payload)
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
    return [n for n in dict.fromkeys((*NAME_COLUMNS, *REQUIRED_COLUMNS, *own)) if n in schema.names]


def find_root(table: "pa.Table", folder: str, payload_dir: _PathLike | None, file: str, start: int) -> str:
    """Where the paths of one part are rooted; CacheError if a path leads outside or no payload is found."""
    import pyarrow as pa

    beside = file.rpartition("/")[0] if storage.is_url(file) else str(Path(file).parent)
    tried = [os.fspath(payload_dir)] if payload_dir is not None else [beside if folder == file else folder, beside]
    roots = list(dict.fromkeys(root if storage.is_url(root) else os.path.abspath(root) for root in tried))
    checked = [n for n in table.column_names if n.endswith("_path") and n != "image_path"]
    root = roots[0]
    for name in checked:
        paths = table.column(name).drop_null().cast(pa.large_string())
        if name == "cache_path":
            check_inside(paths, roots, file, start, name)
            root = _choose_root(roots, paths, file)
        check_inside(paths, [root], file, start, name)
    return root


def check_inside(paths: "pa.ChunkedArray", roots: Sequence[str], file: str, start: int, name: str) -> None:
    """Refuses a path that leads out of all roots. Only suspicious paths are looked at one by one."""
    import pyarrow.compute as pc

    if not len(paths):
        return
    suspicious = pc.match_substring_regex(paths, r"\.\.|^[/\\]|^[A-Za-z]:|://|^\.?/*$").to_numpy()
    for i in np.flatnonzero(suspicious).tolist():
        path = paths[i].as_py()
        if all(inside(path, root) is None for root in roots):
            raise CacheError(
                f"Row {start + i} (in {file}): column `{name}` is {path!r}, which lies outside of "
                f"{' and '.join(roots)}. If the payloads are there by intention, name their folder by "
                "`--payload_dir`."
            )


def _choose_root(roots: Sequence[str], paths: "pa.ChunkedArray", file: str) -> str:
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
