"""`find_records`: the captioned images of a folder, of parquet files, of a saved data set or of one of the Hub."""

import os
from collections.abc import Sequence
from pathlib import Path

from ....errors import SciflowError
from ...row_filter import RowFilter
from ..tally import Tally
from .folder import HOW_TO_CAPTION, folder_records, listed_records, what_lies_there
from .listing import image_suffixes, list_files, utf8_name
from .record import Record
from .splits import choose_splits
from .tables import dataset_records, load_parquet, names_files, parquet_records, saved_records


def find_records(
    source: str | os.PathLike[str],
    *,
    caption_column: str = "caption",
    split: str | None = None,
    leave_out: Path | None = None,
    source_dir: Sequence[str | os.PathLike[str]] = (),
    source_column: Sequence[str] = (),
    row_filter: RowFilter | None = None,
) -> tuple[list[Record], Tally]:
    """All captioned images of `source`, in a fixed order, and what became of everything else in it.

    Args:
        source: a folder of images (captions in metadata.jsonl, metadata.csv, metadata.parquet or .txt files), a folder
            written by `datasets.Dataset.save_to_disk`, a parquet file or a folder of such, a .jsonl, .csv or .parquet
            table with a column `file_name`, or a Hub data set's name.
        caption_column: column with the captions; where there is no "caption", "text" is taken. A column
            `loss_mask` holds images, or paths of images relative to `source`: white counts, black does not.
        split: of a source that has several: a name, several joined by "+", or "all"; by default train, or the only one.
        leave_out: folder below `source` that is not part of it (the cache that is being built).
        source_dir: folders with reference images, as `build_cache` takes them.
        source_column: columns with reference images, as `build_cache` takes them.
        row_filter: leaves out rows; a fresh one, which counts them.

    Raises:
        SciflowError: if there is no such source or split, no image, or no caption; a caption that is no text.
    """
    path = Path(source)
    dirs = [Path(os.path.abspath(folder)) for folder in source_dir]
    if ".." in path.parts:  # metadata are matched by path
        path = path.resolve()
    if path.is_file() and (path.suffix in (".jsonl", ".csv") or names_files(path)):
        _refuse_folders(dirs, source)
        return listed_records(path, caption_column, split, source_column, row_filter)
    if path.is_file() and path.suffix == ".parquet":
        choose_splits([], split, str(source))
        _refuse_folders(dirs, source)
        records, tally = dataset_records(load_parquet([path]), str(source), caption_column, source_column, row_filter)
        tally.used = 1
        return records, tally
    if not path.is_dir() or any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        _refuse_folders(dirs, source)
        return saved_records(source, caption_column, split, source_column, row_filter)
    listing = list_files(path, leave_out)
    tables = [file for file in listing.files if file.suffix == ".parquet"]
    if any(file.suffix.lower() in image_suffixes() for file in listing.files):
        return folder_records(path, listing, caption_column, split, dirs, source_column, row_filter=row_filter)
    if not tables:
        raise SciflowError(
            f"`input_dir` is {str(source)!r}, which holds no images, but {what_lies_there(listing.files)}. Images are "
            f".png, .jpg, .webp, .tif, .bmp, .gif, .avif, .jp2 and what else Pillow decodes. {HOW_TO_CAPTION}."
        )
    _refuse_folders(dirs, source)
    records, tally = parquet_records(path, tables, caption_column, split, source_column, row_filter)
    others = dict.fromkeys(set(listing.files).difference(tables), "no table: the images are in parquet files")
    for file, reason in sorted({**listing.left_out, **others}.items()):
        tally.ignored[utf8_name(file.relative_to(path).as_posix())] = reason
    for folder, reason in sorted(listing.closed.items()):
        tally.remark(reason, utf8_name(folder.relative_to(path).as_posix()))
    return records, tally


def _refuse_folders(folders: Sequence[Path], source: str | os.PathLike[str]) -> None:
    if folders:
        raise SciflowError(
            f"`source_dir` {str(folders[0])!r} is for folders of image files, but `input_dir` {str(source)!r} holds "
            "tables. Name the columns with reference images by `--source_column`."
        )
