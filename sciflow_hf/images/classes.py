"""Images with class labels: as pixels in [-1, 1], or as a cache of VAE latents."""

import logging
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..data.build.sources.pixels import to_rgb
from ..data.cache import LatentCache
from ..data.split import held_out_groups, spread
from ..diffusion.randomness import hash64
from ..errors import CacheError, SciflowError, counted
from .class_source import CHANNELS, LABEL, SAME_AS, ClassImageArguments, ClassSource

logger = logging.getLogger(__name__)

MEMORY = 4 * 2**30  # bytes of decoded images that are kept


class ClassImages(Dataset[dict[str, torch.Tensor]]):
    """Map-style: `pixel_values` (C, S, S), float32 in [-1, 1], and `class_labels`, int64, where there are classes.

    Images are cut to the square in their middle and resized. They are decoded once and kept as bytes where they need
    at most 4 GiB, and as they are read otherwise.

    Args:
        source: where they are.
        rows: those of its rows that are wanted.
        labels: of all rows of `source`, (N,), or None.
        class_names: of the numbers in `labels`.
        image_size: S.
        mode: "L" or "RGB".
        flip: every image once more, mirrored, after all the others.

    Raises:
        SciflowError: an image that cannot be read, or has another mode.
    """

    def __init__(
        self,
        source: ClassSource,
        rows: Sequence[int],
        *,
        labels: np.ndarray | None,
        class_names: Sequence[str],
        image_size: int,
        mode: str,
        flip: bool = False,
    ) -> None:
        self.source, self.rows, self.class_names = source, list(rows), list(class_names)
        self.image_size, self.mode, self.flip = image_size, mode, flip
        self.row_filter = tuple(source.args.row_filter)
        self.labels = None if labels is None else labels[self.rows]
        self.names = [source.names[row] for row in self.rows]
        self.num_classes, self.channels = len(self.class_names), CHANNELS[mode]
        self.row_ids = self.names + [f"{name} mirrored" for name in self.names] * flip
        self.groups = self.names * (1 + flip)  # an image and its mirror image belong together
        self.buckets = [(image_size, image_size)] * len(self.row_ids)
        kept = len(self.rows) * CHANNELS[mode] * image_size**2 <= MEMORY
        self._kept = np.stack([self._read(row) for row in self.rows]) if kept else None

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, mirrored = index % len(self.rows), index >= len(self.rows)
        image = self._read(self.rows[number]) if self._kept is None else self._kept[number]
        pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        sample = {"pixel_values": (pixels.flip(2) if mirrored else pixels).contiguous()}
        return sample if self.labels is None else sample | {"class_labels": torch.tensor(int(self.labels[number]))}

    def keyed(self, index: int, key: int) -> dict[str, torch.Tensor]:
        """The same sample for every key."""
        return self[index]

    def _read(self, row: int) -> np.ndarray:
        """(S, S, C), uint8."""
        from PIL import ImageOps

        image = self.source.open(row)
        try:
            image.load()
        except OSError as error:
            name = self.source.names[row]
            raise SciflowError(f"`input_dir`: {name} cannot be read ({error}). Mend or remove it.") from error
        if SAME_AS.get(image.mode, image.mode) != self.mode and not self.source.args.image_mode:
            raise SciflowError(
                f"`input_dir`: {self.source.names[row]} is an image of mode {image.mode}, {self.names[0]} one of mode "
                f"{self.mode}. Convert all of them by `--image_mode RGB` or `--image_mode L`."
            )
        image = ImageOps.exif_transpose(image) if image.mode == self.mode else to_rgb(image).convert(self.mode)
        return as_square(image, self.image_size)

    @property
    def fingerprint(self) -> str:
        labels = [] if self.labels is None else self.labels.tolist()
        return f"{hash64(self.image_size, self.mode, *self.row_ids, *labels):016x}"

    def describe(self, index: int) -> str:
        """A row in words, for messages."""
        return self.row_ids[index]


class ClassLatents(LatentCache):
    """A `LatentCache` whose samples also have `class_labels`; `ClassLatents.of(cache)` has the rows of another."""

    @cached_property
    def class_labels(self) -> torch.Tensor:
        """(N,), int64.

        Raises:
            CacheError: the index has no labels, or none in some row.
        """
        labels = self.column(LABEL)
        if labels is None or labels.null_count:
            raise CacheError(
                f"the index has no `{LABEL}` (class of the image) in every row. Build the cache by `sciflow-hf cache "
                "build --family dit`, or train without classes by `--num_classes 0`."
            )
        return torch.from_numpy(labels.to_numpy().astype("int64"))

    @property
    def class_names(self) -> list[str]:
        """As the build noted them; numbers where it did not."""
        names: list[str] = self.metadata.get("class_names") or []
        return names or [str(number) for number in range(int(self.class_labels.max()) + 1)]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(i) | {"class_labels": self.class_labels[i]}

    def shapes(self, i: int) -> dict[str, torch.Tensor]:
        return super().shapes(i) | {"class_labels": self.class_labels[i]}


def as_square(image: Image.Image, side: int) -> np.ndarray:
    """The square in the middle of an L or RGB image, resized: (side, side, C), uint8."""
    least = min(image.size)
    left, top = (image.width - least) // 2, (image.height - least) // 2
    if image.size != (side, side):
        box = (left, top, left + least, top + least)
        image = image.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def load_class_images(
    args: ClassImageArguments, *, image_size: int, num_classes: int | None = None
) -> tuple[ClassImages, ClassImages | None]:
    """The images to train on, and those held out; None where none are.

    Args:
        image_size: side of the images.
        num_classes: how many there shall be; by default as many as the data has. 0: labels are not read.

    Raises:
        SciflowError: no such data, column or split, labels that are missing or out of range, images of mixed modes.
    """
    source = ClassSource(args, args.train_split)
    labels, classes = source.labels(num_classes)
    make = partial(ClassImages, class_names=classes, image_size=image_size, mode=source.mode())
    rows = range(len(source))
    held: ClassImages | None = None
    if args.eval_split:
        others = ClassSource(args, args.eval_split, "eval_split")
        kept, _ = others.labels(len(classes), classes)
        held = make(others, range(len(others)), labels=kept)
    fraction = 0.0 if args.eval_split else args.eval_fraction
    held_out = held_out_groups(source.names, fraction)
    outside = {row for row in rows if source.names[row] in held_out}
    chosen = [row for row in rows if row not in outside]
    if not chosen:
        raise SciflowError(
            f"`eval_fraction` {args.eval_fraction} of {len(rows)} images leaves none to train on. Use a smaller one."
        )
    if args.max_train_samples and args.max_train_samples < len(chosen):
        chosen = [chosen[i] for i in spread(len(chosen), args.max_train_samples)]
    if outside:
        held = make(source, sorted(outside), labels=labels)
    train = make(source, chosen, labels=labels, flip=args.flip)
    images, kinds = counted(len(train), "image"), counted(len(classes), "class")
    logger.info("%s of %s to train on, %d held out.", images, kinds, len(held or []))
    return train, held
