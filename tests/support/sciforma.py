"""Data in the forms in which SciForma publishes its own, 20 rows each, with images that are drawn here."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS = 20
BUCKETS = [(64, 96), (96, 64), (64, 128)]  # height, width: none is square, and klein takes them as sources
TIERS = ["High", "Medium", "Low", "High"]


def drawing(row: int, *, edited: bool = False) -> Image.Image:
    """A figure of its bucket's size; of an edit the target has another upper left corner."""
    height, width = BUCKETS[row % 3]
    levels = np.random.default_rng(row).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    pixels = np.kron(levels, np.ones((8, 8, 1), np.uint8))
    if edited:
        pixels[:16, :24] = (10 * row, 0, 255)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def columns(kind: str) -> dict[str, list[Any]]:
    """The columns of both kinds but their images."""
    rows = range(ROWS)
    found: dict[str, list[Any]] = {
        "caption": [f"{kind} {row}: a plot" for row in rows],
        "paper_id": [f"2401.{row // 2:05d}" for row in rows],
        "bucket_w": [BUCKETS[row % 3][1] for row in rows],
        "bucket_h": [BUCKETS[row % 3][0] for row in rows],
    }
    if kind == "generation":
        return found | {"quality_tier": [TIERS[row % 4] for row in rows], "is_tikz": [row % 5 == 0 for row in rows]}
    return found | {"edit_bboxes": [json.dumps([[0, 0, 24, 16]])] * ROWS}


def parquet(folder: Path, kind: str = "generation") -> Path:
    """A configuration of the Hub, as a folder of parquet files whose images `datasets` has written."""
    import datasets

    folder.mkdir(parents=True)
    images = {"image": [png(drawing(row)) for row in range(ROWS)]}
    if kind == "editing":
        targets = [png(drawing(row, edited=True)) for row in range(ROWS)]
        images = {"source_image": images["image"], "target_image": targets}
    cells: Any = {name: [{"bytes": data, "path": None} for data in column] for name, column in images.items()}
    data = datasets.Dataset.from_dict(cells | columns(kind))
    for name in images:
        data = data.cast_column(name, datasets.Image())
    half = ROWS // 2
    data.select(range(half)).to_parquet(folder / "train-00000-of-00002.parquet")
    data.select(range(half, ROWS)).to_parquet(folder / "train-00001-of-00002.parquet")
    return folder


def files(folder: Path, *, older: bool = False) -> Path:
    """PNG files with one metadata.parquet of all splits; older tables call the bucket `width` and `height`."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for kind, split in (("generation", "gen_768"), ("editing", "edit_1024")):
        table = columns(kind)
        for row in range(ROWS):
            found = {name: values[row] for name, values in table.items()} | {"split": split}
            if kind == "generation":
                found["image_path"] = f"images/gen_{row:02d}.png"
                drawing(row).save(folder / found["image_path"])
            else:
                found["source_image_path"], found["target_image_path"] = (
                    f"images/{name}_{row:02d}.png" for name in ("source", "target")
                )
                drawing(row).save(folder / found["source_image_path"])
                drawing(row, edited=True).save(folder / found["target_image_path"])
            if older:
                found["width"], found["height"] = found.pop("bucket_w"), found.pop("bucket_h")
            rows.append(found)
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), folder / "metadata.parquet")
    return folder
