"""Folders of small random images, a folder a class."""

import numpy as np
from PIL import Image


def pixels(seed, height=8, width=8, channels=3):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[:, :, 0] if channels == 1 else values


def write_folder(root, *, classes=("axon", "cell"), each=6, **options):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(pixels(100 * number + i, **options)).save(root / name / f"{i}.png")
    return root
