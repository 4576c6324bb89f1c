"""Reference images ("sources") that validation and `sciflow-hf sample` edit: read, and shown as in training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import SciflowError, counted
from .batches.buckets import image_sizes
from .batches.sizes import FITS, TOLERANCE, nearest_bucket
from .build.sources.pixels import to_rgb, unreadable
from .build.views import fit_image, own_pixels, view_of
from .stream.stream import StreamingCache

NONE = "none"
"""Entry of a prompt that draws without sources."""
_Size = tuple[int, int]


def source_files(entry: str) -> list[str]:
    """The files that an entry names: one, several joined by ",", or none."""
    if entry.strip().lower() == NONE:
        return []
    return [entry] if Path(entry).is_file() else [name.strip() for name in entry.split(",")]


def read_sources(entries: Iterable[str], family: Any, *, option: str) -> list[list[Image.Image]]:
    """The images of each entry, RGB, with the name of the file in `info["source_image"]`.

    Args:
        entries: see `source_files`.
        family: that shall edit them.
        option: which holds the entries, for messages.

    Raises:
        SciflowError: a file that is missing, no image, or of a size that the family refuses; more images than it
            takes.
    """
    return [[_read(file, family, option) for file in _allowed(entry, family, option)] for entry in entries]


def _allowed(entry: str, family: Any, option: str) -> list[str]:
    files, most = source_files(entry), family.max_sources
    if len(files) > most:
        takes = f"at most {most} for a prompt" if most else "no reference images: leave this out"
        raise SciflowError(f"`{option}` {entry!r}: {counted(len(files), 'image')}, and `{family.name}` takes {takes}.")
    return files


def read_target(entry: str, *, option: str) -> Image.Image | None:
    """The image of an entry, RGB, with the name of the file in `info["target_image"]`; None of the entry none.

    Raises:
        SciflowError: a file that is missing or no image.
    """
    if entry.strip().lower() == NONE:
        return None
    if not Path(entry).is_file():
        raise SciflowError(f"`{option}` {entry!r}: no such file. Give an image, or {NONE} for a prompt without.")
    image = _decoded(entry, option)
    image.info = {"target_image": Path(entry).name}
    return image


def _decoded(file: str, option: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:  # PIL lets through whatever its decoders raise
        raise SciflowError(f"`{option}` {file!r}: {unreadable(error)}.") from error


def _read(file: str, family: Any, option: str) -> Image.Image:
    if not Path(file).is_file():
        raise SciflowError(
            f'`{option}` {file!r}: no such file. Give an image, several joined by ",", or {NONE} for a prompt without.'
        )
    shown = _decoded(file, option)
    if refused := family.check_source(shown.height, shown.width):
        raise SciflowError(f"`{option}` {file!r}: {refused}.")
    shown.info = {"source_image": Path(file).name}
    return shown


@dataclass(frozen=True)
class EditViews:
    """At which size edits are drawn, and what is shown of their sources, so that both are as in training.

    Args:
        sizes: (height, width) of the images that were trained on.
        as_targets: the first source was trained on through the window of the image that it is edited to, as sources
            of the image's size are (see `cache build`); otherwise the pipeline shows all of it.
        fit: "cut" or "pad", as the cache was built.
    """

    sizes: Sequence[_Size] = ()
    as_targets: bool = False
    fit: str = "cut"

    @classmethod
    def of(cls, dataset: Any, family: Any) -> "EditViews":
        """As most edits of `dataset` were encoded; of data without `source_shapes` the pipeline's rule."""
        rows = dataset.first() if isinstance(dataset, StreamingCache) else dataset
        both = zip(getattr(rows, "buckets", ()), getattr(rows, "source_shapes", ()), strict=False)
        pairs = [(tuple(bucket), tuple(shapes[0])) for bucket, shapes in both if shapes]
        alike = {pair: family.latent_shape(*family.source_size(*pair[0])) == pair[1] for pair in set(pairs)}
        fit = getattr(rows, "metadata", {}).get("fit", FITS[0])
        return cls(list(image_sizes(dataset)), 2 * sum(alike[pair] for pair in pairs) > len(pairs), fit)

    def size_of(self, source: Image.Image, default: _Size) -> _Size:
        """(height, width) of an edit with this first source: of `sizes`, one that does not enlarge it if there is one.

        `default` where edits need not look like their sources, or no size is known.
        """
        if not self.as_targets or not self.sizes:
            return default
        height, width, room = source.height, source.width, 1 + TOLERANCE
        stays = any if self.fit == "pad" else all
        fitting = [(h, w) for h, w in self.sizes if stays((h <= room * height, w <= room * width))]
        return nearest_bucket(height, width, fitting or self.sizes)

    def shown(self, sources: Sequence[Image.Image], size: _Size, family: Any) -> list[Image.Image]:
        """The images that the pipeline is given of `sources` to draw an edit of `size`.

        Those as large as the first one lose what exceeds the shape of the edit, or are padded to it, and are resized as
        in training where the pipeline does not do that itself.

        Raises:
            SciflowError: the family refuses them at that size.
        """
        if not self.as_targets:
            return list(sources)
        shown, resizes = family.source_size(*size), self.resized(size, family) is not None
        if refused := family.check_source(*shown):
            name = sources[0].info.get("source_image", "the source")
            raise SciflowError(f"{name}, shown as in training, has {refused}. Draw a larger edit.")
        return [self._window(each, shown, resizes) if each.size == sources[0].size else each for each in sources]

    def resized(self, size: _Size, family: Any) -> _Size | None:
        """(height, width) that a user must bring a source to before the pipeline edits it at `size`; None: to none.

        The pipeline would show a larger image larger than training did.
        """
        height, width = shown = family.source_size(*size)
        return shown if self.as_targets and family.source_size(2 * height, 2 * width) != shown else None

    def _window(self, image: Image.Image, size: _Size, resizes: bool) -> Image.Image:
        """The view of an image in the shape (height, width) of `size`, in that size or in its own pixels."""
        view = view_of("", "", (image.height, image.width), size, self.fit)
        part = fit_image(image, view) if resizes else own_pixels(image, view)
        part.info = dict(image.info)
        return part
