"""A new index next to a cache, without its bad rows; payloads and old index stay unchanged."""

import os
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import SciflowError
from ...files import atomic_folder
from .. import storage
from ..cache import EMPTY_PROMPT_FILE, LatentCache, is_binary, read_schema, read_table
from ..layouts.base import Reader
from ..layouts.flux_h import is_table_of_images
from ..writing import cannot_write


def write_repaired(
    cache: LatentCache, dataset_dir: str, bad_rows: Collection[int], *, with_empty_prompt: bool = True
) -> tuple[Path, str]:
    """Writes `<dataset_dir>-repaired`, the index without `bad_rows`, complete or not at all.

    Args:
        cache: all of the cache in `dataset_dir`.
        dataset_dir: its folder.
        bad_rows: rows of `cache`.
        with_empty_prompt: copy the empty prompt's embedding.

    Returns:
        The new folder, and the `payload_dir` to read it with.

    Raises:
        SciflowError: `dataset_dir` is no local folder, nothing would be left, or the new folder exists with other
            content.
    """
    if storage.is_url(dataset_dir) or not os.path.isdir(dataset_dir):
        raise SciflowError(
            f"`repair` writes a folder next to `dataset_dir`, which is {dataset_dir!r}. Give the local folder of one "
            "cache; its payloads may lie elsewhere (`--payload_dir`)."
        )
    if len(bad_rows) == len(cache):
        raise SciflowError(f"`repair` would leave nothing: all {len(cache)} rows of {dataset_dir!r} are bad.")
    folder = Path(os.path.abspath(dataset_dir))
    target = folder.with_name(f"{folder.name}-repaired")
    tables = [light_index(reader.file, folder) for reader in cache.readers]
    # An inline file holds its own payloads, wherever `payload_dir` is.
    roots = [str(folder) if moved else reader.root for reader, (_, moved) in zip(cache.readers, tables, strict=True)]
    root = roots[0] if len(set(roots)) == 1 else str(folder)
    keep = np.ones(len(cache), dtype=bool)
    keep[list(bad_rows)] = False

    def write(new: Path) -> None:
        start = 0
        for reader, (table, _), old in zip(cache.readers, tables, roots, strict=True):
            kept, start = keep[start : start + len(table)], start + len(table)
            if kept.any():
                file = new / os.path.relpath(reader.file, folder)
                file.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(_rebased(table, old, root, reader).filter(kept), file)
        if with_empty_prompt and (empty := cache.empty_prompt_file) is not None:
            (new / EMPTY_PROMPT_FILE).write_bytes(storage.read(empty, 0, storage.size(empty)))

    try:
        if not target.exists():
            with atomic_folder(target) as new:
                write(new)
        else:
            with TemporaryDirectory() as again:
                write(Path(again))
                same = _content(Path(again)) == _content(target)
            if not same:
                raise SciflowError(
                    f"`repair` would write {str(target)!r}, which holds something else. Move or delete it."
                )
    except OSError as error:
        raise cannot_write(target, error) from error
    return target, root


def light_index(file: str, folder: Path) -> tuple[pa.Table, bool]:
    """An index file without the payload's bytes, with its metadata; whether its rows now refer to those bytes."""
    schema = read_schema(file)
    table = read_table(file, [field.name for field in schema if not is_binary(field.type)])
    if "cache_path" in schema.names or is_table_of_images(schema.names):
        return table, False
    table = table.append_column("cache_path", pa.array([os.path.relpath(file, folder)] * len(table), pa.string()))
    return table.append_column("inline_row", pa.array(range(len(table)), pa.int64())), True


def _rebased(table: pa.Table, old: str, new: str, reader: Reader) -> pa.Table:
    """The table with its paths, rooted in `old`, relative to `new`."""
    for name in ["cache_path", *(f"{name}_path" for name in reader.tensors)] if old != new else ():
        if name in table.column_names:
            paths = [path and os.path.relpath(os.path.join(old, path), new) for path in table.column(name).to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(paths, pa.string()))
    return table


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
