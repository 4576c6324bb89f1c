"""The rows of one index file, as `datasets` streams them."""

import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import fsspec
import pyarrow as pa

from ...errors import CacheError, first_line
from .. import storage
from ..cache import BUILD, IndexFile
from .order import Place

if TYPE_CHECKING:
    import datasets

_PIECE = 1024  # rows


class _Files(fsspec.AbstractFileSystem):
    """The files of `storage`, for `datasets`: ranges of bytes, tried again and kept on the disk as everywhere.

    Their names are quoted, so that no character of them is part of a pattern.
    """

    protocol = "sciflow-hf"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return storage.open_file(unquote(path))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": None}


fsspec.register_implementation(_Files.protocol, _Files, clobber=True)
_loading = threading.Lock()


def stream_file(file: IndexFile, columns: list[str]) -> "datasets.IterableDataset":
    """Light columns of an index file, all its rows in their order."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every call tells a server
    with _loading, tempfile.TemporaryDirectory() as lock_folder:
        return datasets.load_dataset(
            "parquet",
            data_files=f"{_Files.protocol}://{quote(file.name, safe='')}",
            columns=columns,
            features=datasets.Features.from_arrow_schema(pa.schema([file.schema.field(name) for name in columns])),
            batch_size=_PIECE,
            split="train",
            streaming=True,
            cache_dir=lock_folder,
        )


def read_tables(file: IndexFile, columns: list[str], place: Place | None) -> Iterator[tuple[Place, pa.Table]]:
    """The rows from `place` on (or all) in tables, and the place where each table begins.

    Raises:
        CacheError: if the file cannot be read.
    """
    first, state = place or (0, None)
    stream = stream_file(file, columns).with_format("arrow")
    if state is not None:
        stream.load_state_dict(state)
    try:
        for table in stream.iter(_PIECE):
            yield (first, state), table
            first, state = first + len(table), stream.state_dict()
    except CacheError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CacheError(
            f"The index {file.name} cannot be read as parquet from its row {first} on ({first_line(error)}). {BUILD}."
        ) from error
