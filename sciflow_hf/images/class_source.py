"""Where images with class labels come from: folders, parquet files and data sets of `datasets`, and their checks."""

import glob
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..data.build.sources.listing import NO_TARGET, image_suffixes, list_files
from ..data.build.sources.record import Record, Stored
from ..data.build.sources.tables import kept_rows, with_images
from ..data.row_filter import RowFilter
from ..errors import SciflowError, counted
from ..options import Options, arguments, option

if TYPE_CHECKING:
    import datasets
    from PIL import Image

logger = logging.getLogger(__name__)

LABEL = "label"  # column of a cache with the class of each image
CHANNELS = {"L": 1, "RGB": 3}
SAME_AS = {"P": "RGB", "1": "L"}
"""Modes that are another one in fewer bits."""


def _check_row_filter(args: "ClassImageArguments") -> None:
    RowFilter(args.row_filter)


@arguments
class ClassImageArguments(Options):
    """Images of a run, with the class of each."""

    heading: ClassVar[str] = "Images with classes"

    input_dir: str | None = option(
        None,
        "A folder with one subfolder of images for each class (below `train` and `test`, or not), a folder written by "
        "`save_to_disk`, a folder of parquet files, or a data set of the Hub. digits: scikit-learn's 1,797 digits of "
        "8x8 pixels, 70 % to train on.",
        required_unless="dataset_dir",
        advice="give `--input_dir` (images) or `--dataset_dir` (a cache of latents).",
    )
    dataset_dir: list[str] = option(
        [],
        "Caches of VAE latents to train on, or the one to build from `--input_dir` (with `--vae_name_or_path`; by "
        "default <output_dir>/cache).",
    )
    image_column: str = option("image", "Column with the images.")
    label_column: str = option("label", "Column with the classes.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(
        None,
        "Split that is held out. Without, `--eval_fraction` of the training split is, by a hash of the image's name.",
    )
    eval_fraction: float = option(
        0.05, "Share of the images held out where there is no `--eval_split`.", within="[0, 1)"
    )
    image_mode: str | None = option(
        None,
        "Convert all images to L (grey) or RGB; by default all must be of one mode already.",
        choices=tuple(CHANNELS),
    )
    flip: bool = option(False, "Also train on a mirror image of each image.")
    row_filter: list[str] = option(
        [],
        "Conditions that a row must meet, by the columns of `--input_dir` or of the cache's index: column=value, "
        "column=value,other, column>=number, column<=number, such as quality=High year>=2020. The value none stands "
        "for rows without one.",
        check=_check_row_filter,
    )
    max_train_samples: int | None = option(
        None, "Train on so many images only, spread over the data; for a first try.", within="[1, inf)"
    )
    encode_batch_size: int = option(8, "Images that the VAE encodes at once.", within="[1, inf)")

    def names(self) -> list[str]:
        """Names of the data for a model card: the last part of each folder."""
        return [Path(folder).name for folder in ([self.input_dir] if self.input_dir else self.dataset_dir)]


class ClassSource:
    """One split of the data of `args`.

    Raises:
        SciflowError: no such data, split or column of images.
    """

    def __init__(self, args: ClassImageArguments, split: str, option: str = "train_split") -> None:
        import datasets

        self.args, splits = args, open_splits(str(args.input_dir))
        if split not in splits:
            raise SciflowError(f"`{option}` {split!r}: {args.input_dir!r} has the splits {', '.join(splits)}.")
        if option == "train_split" and (others := splits.keys() - {split, args.eval_split}):
            logger.info("Not looked at: the splits %s. Hold one out by `--eval_split`.", ", ".join(sorted(others)))
        self.rows = splits[split]
        if args.image_column in self.rows.column_names:
            self.rows = with_images(self.rows, args.image_column, paths=False)
        if not isinstance(self.rows.features.get(args.image_column), datasets.Image):
            columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in self.rows.features.items())
            raise SciflowError(
                f"`image_column` {args.image_column!r} is no column of images in {args.input_dir!r}; it has {columns}."
            )
        self.images = self.rows.select_columns([args.image_column]).cast_column(
            args.image_column, datasets.Image(decode=False)
        )
        self.names = self._names()  # of all rows, so that a filter renames none
        if args.row_filter:
            kept = kept_rows(self.rows, RowFilter(args.row_filter), f"{args.input_dir}, split {split}")
            self.rows, self.images = self.rows.select(kept), self.images.select(kept)
            self.names = [self.names[row] for row in kept]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, row: int) -> "Image.Image":
        """The image of a row, in its own mode; its pixels are not read yet.

        Raises:
            SciflowError: it cannot be read.
        """
        try:
            return Stored(lambda: self.stored(row)).open()
        except OSError as error:
            name = self.names[row]
            raise SciflowError(f"`input_dir`: {name} cannot be read ({error}). Mend or remove it.") from error

    def stored(self, row: int) -> Path | bytes:
        """The file of a row's image, or its bytes.

        Raises:
            OSError: there is none.
        """
        stored = self.images[row][self.args.image_column] or {}
        if not (stored.get("bytes") or stored.get("path")):
            raise OSError("there is no image")
        return bytes(stored["bytes"]) if stored.get("bytes") else Path(stored["path"])

    def mode(self) -> str:
        """L or RGB: what the images shall be, by `image_mode` or the first of them."""
        if self.args.image_mode:
            return self.args.image_mode
        found = self.open(0).mode
        mode = SAME_AS.get(found, found)
        if mode not in CHANNELS:
            raise SciflowError(
                f"`input_dir`: {self.names[0]} is an image of mode {mode}. Convert the images by `--image_mode RGB` or "
                "`--image_mode L`; images of 16 bits train as they are with `microscopy_unet`."
            )
        return mode

    def labels(self, num_classes: int | None, known: list[str] | None = None) -> tuple[np.ndarray | None, list[str]]:
        """(N,) numbers of the classes, and their names; (None, []) where `num_classes` is 0.

        Args:
            num_classes: how many there shall be; None: as many as there are.
            known: names of the classes of training, which these shall be.
        """
        if num_classes == 0:
            return None, []
        column, where = self.args.label_column, self.args.input_dir
        if column not in self.rows.column_names:
            raise SciflowError(
                f"`label_column` {column!r}: {where!r} has the columns {', '.join(self.rows.column_names)}. Name the "
                "one with the classes, put the images into one folder a class, or train without by `--num_classes 0`."
            )
        values = list(self.rows.select_columns([column])[column])
        missing = [self.names[i] for i, value in enumerate(values) if value in (None, "")]
        if missing:
            some = ", ".join(missing[:5])
            raise SciflowError(
                f"`label_column` {column!r}: {counted(len(missing), 'image')} without a class: {some}. Label or remove "
                "what lacks one."
            )
        values, names = self._numbers(values, num_classes, known)
        if known is not None and names != known:
            raise SciflowError(
                f"`eval_split` {self.args.eval_split!r} has the classes {names[:10]}, training has {known[:10]}."
            )
        limit = num_classes or len(names)
        outside = [i for i, value in enumerate(values) if not 0 <= value < limit]
        if outside:
            raise SciflowError(
                f"`label_column` {column!r}: {counted(len(outside), 'label')} not in 0 to {limit - 1}, first that of "
                f"{self.names[outside[0]]}: {self.rows[outside[0]][column]!r}. Correct them, or set `--num_classes`."
            )
        if known is None and (empty := limit - len(set(values))):
            logger.warning("`label_column` %r: %d of %d classes have no image to train on.", column, empty, limit)
        return np.array(values, dtype=np.int64), [*names, *map(str, range(len(names), limit))][:limit]

    def _numbers(
        self, values: list[Any], num_classes: int | None, known: list[str] | None
    ) -> tuple[list[int], list[str]]:
        import datasets

        feature = self.rows.features[self.args.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return values, list(feature.names)
        if all(isinstance(value, str) for value in values):
            names = known or sorted(set(values))
            return [names.index(value) if value in names else -1 for value in values], names
        if all(isinstance(value, int) for value in values):
            return values, known or [str(i) for i in range(num_classes or max(values) + 1)]
        raise SciflowError(
            f"`label_column` {self.args.label_column!r} holds {feature}, not one class an image: numbers or names."
        )

    def _paths(self) -> list[str | None]:
        column = self.images.flatten().select_columns([f"{self.args.image_column}.path"])
        return [path for rows in column.with_format("arrow").iter(10_000) for path in rows.column(0).to_pylist()]

    def _names(self) -> list[str]:
        """The file of each row below `input_dir`; its number where files are not known or not distinct."""
        paths = [path or "" for path in self._paths()]
        root = Path(str(self.args.input_dir)).expanduser().absolute()
        inside = [Path(path).is_absolute() and Path(path).is_relative_to(root) for path in paths]
        names = [os.path.relpath(p, root) if below else p for p, below in zip(paths, inside, strict=True)]
        if all(names) and len(set(names)) == len(names):
            return [Path(name).as_posix() for name in names]
        return [f"row {number}" for number in range(len(names))]


def class_records(source: ClassSource, num_classes: int | None) -> tuple[list[Record], list[str]]:
    """The images of a source for `build_cache`, with `label` in their columns, and the names of the classes."""
    labels, names = source.labels(num_classes)
    records = []
    for row, name in enumerate(source.names):
        columns: dict[str, Any] = {} if labels is None else {LABEL: int(labels[row])}
        caption = "image" if labels is None else names[int(labels[row])]
        records.append(Record(name, caption, Stored(partial(source.stored, row)), columns))
    return records, names


def _say_left_out(folder: Path, splits: "datasets.DatasetDict") -> None:
    """Warns of images that `datasets` has passed over: in linked folders, or of formats it does not know."""
    import datasets

    taken: set[str] = set()
    for rows in splits.values():
        images = rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)).flatten()
        taken.update(os.path.realpath(path) for path in images["image.path"])
    suffixes, listing = image_suffixes(), list_files(folder)
    lost = [f for f in listing.files if f.suffix.lower() in suffixes and os.path.realpath(f) not in taken]
    lost += [file for file, reason in listing.left_out.items() if reason == NO_TARGET]
    if lost:
        some = ", ".join(file.relative_to(folder).as_posix() for file in lost[:5])
        text = "`input_dir`: %s not looked at, of formats that `datasets` passes over or behind links: %s"
        logger.warning(text, counted(len(lost), "image"), some)


def open_splits(source: str) -> "dict[str, datasets.Dataset]":
    """Every split of the data set by name."""
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(str(path))
        elif path.is_dir():
            # With one of "[*?" in its name a folder must be given as a pattern, and the kind of its files with it.
            tables = any(path.rglob("*.parquet"))
            kind = "parquet" if tables else "imagefolder"
            plain = tables and not glob.has_magic(str(path))
            found = datasets.load_dataset(
                str(path) if plain else kind, data_dir=None if plain else glob.escape(str(path))
            )
            if not tables:
                _say_left_out(path, found)
        elif "/" in source and not path.exists() and not source.startswith((".", "/", "~")):
            found = datasets.load_dataset(source)
        else:
            raise FileNotFoundError("there is no such folder")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SciflowError(
            f"`input_dir` {source!r} cannot be read ({reason}). Give a folder with one subfolder of images a class, a "
            "folder of `save_to_disk` or of parquet files, or a data set of the Hub (user/name)."
        ) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
