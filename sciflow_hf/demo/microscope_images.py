"""The biomedical images of scikit-image's wheel as grey TIFF files: real, small, nothing downloaded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import SciflowError
from ..images.files import ImageFile, write_image

# Name -> file of skimage/data, the channel that is taken (None: it is grey), the side of the central square that is
# kept (None: all). cell: in saline, quantitative phase; ihc: colon tissue, immunohistochemistry; retina: a fundus,
# of which the green channel is the usual one, without the black around it; microaneurysms: a detail of another fundus.
IMAGES = {
    "cell": ("cell.png", None, None),
    "ihc": ("ihc.png", 1, None),
    "retina": ("retina.jpg", 1, 704),
    "microaneurysms": ("microaneurysms.png", None, None),
}


def microscope_images(folder: str | Path, names: Sequence[str] = tuple(IMAGES)) -> Path:
    """Writes the images as `<folder>/<name>.tif`, uint8, where they are not there yet.

    Raises:
        SciflowError: scikit-image is missing.
    """
    from PIL import Image

    try:
        import skimage.data
    except ImportError as error:
        raise SciflowError("The demo's images are scikit-image's: `pip install 'sciflow_hf[microscopy]'`.") from error
    folder, source = Path(folder), Path(skimage.data.__file__).parent
    for name in names:
        file, channel, side = IMAGES[name]
        target = folder / f"{name}.tif"
        if target.is_file():
            continue
        with Image.open(source / file) as image:
            values = np.asarray(image)
        values = values if channel is None else values[..., channel]
        if side is not None:
            top, left = ((size - side) // 2 for size in values.shape)
            values = values[top : top + side, left : left + side]
        write_image(ImageFile(target, values[None, None], "YX", values.shape), target)
    return folder
