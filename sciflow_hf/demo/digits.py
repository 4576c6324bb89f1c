"""scikit-learn's handwritten digits as folders of images: 1,797 real images of 8x8 pixels, nothing downloaded."""

from pathlib import Path

from ..errors import SciflowError
from .folders import new_folder

DIGITS = "digits"
EVAL_SHARE = 0.3
SPLIT_SEED = 0


def write_digits(folder: Path) -> Path:
    """Writes `train/<digit>/<number>.png` and `test/<digit>/<number>.png`, unless they exist; returns `folder`.

    The split is stratified: 1,257 to train on, 540 held out.

    Raises:
        SciflowError: scikit-learn is not installed.
    """
    if (folder / "test").is_dir():
        return folder
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise SciflowError(
            "`input_dir` digits: scikit-learn has them and is not installed. Run `pip install 'sciflow_hf[scratch]'`."
        ) from error
    import numpy as np
    from PIL import Image

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=EVAL_SHARE, stratify=digits.target, random_state=SPLIT_SEED
    )
    for split, rows in (("train", train), ("test", test)):  # `test` last: it says that all is there
        if (folder / split).is_dir():
            continue
        with new_folder(folder / split) as target:
            for row in rows:
                place = target / str(digits.target[row])
                place.mkdir(exist_ok=True)
                pixels = (digits.images[row] * 255 / 16).round().astype(np.uint8)  # 17 levels of grey
                Image.fromarray(pixels).save(place / f"{row:04d}.png")
    return folder
