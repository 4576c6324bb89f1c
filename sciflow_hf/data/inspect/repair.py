"""A new index beside a cache, without its bad rows; the payloads stay where they are, and the old index as it is."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SciflowError
from ...files import atomic_folder
from .. import storage
from ..index import EMPTY_PROMPT_FILE
from ..parquet import is_binary, read_schema, read_table
from ..writing import cannot_write

if TYPE_CHECKING:
    import pyarrow as pa

    from ..cache import LatentCache


def write_repaired(
    cache: "LatentCache", dataset_dir: str, bad_rows: Collection[int], *, with_empty_prompt: bool = True
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
    import pyarrow.parquet as pq

    index = cache._index
    if storage.is_url(dataset_dir) or not os.path.isdir(dataset_dir):
        raise SciflowError(
            f"`repair` writes a folder beside `dataset_dir`, which is {dataset_dir!r}. Give the local folder of one "
            "cache; its payloads may lie elsewhere (`--payload_dir`)."
        )
    if len(bad_rows) == len(cache):
        raise SciflowError(f"`repair` would leave nothing: all {len(cache)} rows of {dataset_dir!r} are bad.")
    folder = Path(os.path.abspath(dataset_dir))
    target = folder.with_name(f"{folder.name}-repaired")
    schemas = [read_schema(file) for file in index.part_names]
    # An inline file holds its own payloads, wherever `payload_dir` is.
    roots = [
        r if "cache_path" in schema.names else str(folder) for r, schema in zip(index.part_roots, schemas, strict=True)
    ]
    root = roots[0] if len(set(roots)) == 1 else str(folder)
    keep = np.ones(len(cache), dtype=bool)
    keep[list(bad_rows)] = False

    def write(new: Path) -> None:
        for number, file in enumerate(index.part_names):
            kept = keep[index.part_starts[number] : index.part_starts[number + 1]]
            if kept.any():
                table = _rebased(_light(file, schemas[number], folder), roots[number], root, index.payloads[number])
                part = new / os.path.relpath(file, folder)
                part.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table.filter(kept), part)
        if with_empty_prompt and (empty := index.empty_prompt_file) is not None:
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


def _light(file: str, schema: "pa.Schema", folder: Path) -> "pa.Table":
    """An index file without the payloads' bytes, which its rows refer to, with its metadata."""
    import pyarrow as pa

    table = read_table(file, [field.name for field in schema if not is_binary(field.type)])
    if "cache_path" in schema.names:
        return table
    table = table.append_column("cache_path", pa.array([os.path.relpath(file, folder)] * len(table), pa.string()))
    return table.append_column("inline_row", pa.array(range(len(table)), pa.int64()))


def _rebased(table: "pa.Table", old: str, new: str, payload: Mapping[str, Any]) -> "pa.Table":
    """The table with its paths, rooted in `old`, relative to `new`."""
    import pyarrow as pa

    names = ["cache_path", *(f"{name}_path" for name in payload.get("tensors", {}))]
    for name in names if old != new else ():
        if name in table.column_names:
            paths = [path and os.path.relpath(os.path.join(old, path), new) for path in table.column(name).to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(paths, pa.string()))
    return table


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
