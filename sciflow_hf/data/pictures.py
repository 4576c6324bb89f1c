"""The pictures of a folder or data set, whether they have captions or not."""

import functools
from pathlib import Path

from ..errors import SciflowError
from .build.sources.find import find_records
from .build.sources.listing import image_suffixes, list_files
from .build.sources.record import Stored


def find_pictures(source: str, *, option: str = "training_images") -> dict[str, Stored]:
    """Name -> file of each image of a source; none is read.

    Args:
        source: a folder of images, or what `find_records` takes.
        option: which holds it, for messages.

    Raises:
        SciflowError: no such source, or no images in it; a cache, which holds latents.
    """
    path = Path(source)
    found: dict[str, Stored] = {}
    if path.is_dir():
        images = [file for file in list_files(path).files if file.suffix.lower() in image_suffixes()]
        found = {file.relative_to(path).as_posix(): Stored(functools.partial(Path, file)) for file in images}
    if not found:
        try:
            found = {record.name: record.image for record in find_records(source)[0]}
        except SciflowError as error:
            told = str(error).replace("`input_dir`", f"`{option}`")
            raise SciflowError(f"{told} A cache holds no images: give what it was built from.") from error
    return found
