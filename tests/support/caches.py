"""Small caches written by hand, without the library's own builder."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TINY_LATENT_CHANNELS = 4  # of make_tiny(size="test")
TINY_PIXELS_PER_LATENT = 4
TINY_EMBED_DIM = 48  # three layers of width 16
TINY_TEXT_LENGTH = 12
# (height, width) in pixels -> samples; none is square.
TINY_BUCKETS = {(32, 48): 10, (48, 32): 8, (24, 64): 6}


def encoder_settings(pipeline: str | Path, *, max_sequence_length: int = TINY_TEXT_LENGTH) -> dict[str, Any]:
    """What a cache's schema metadata says about the encoders of `pipeline`."""
    return {
        "family": "flux2_klein",
        "pretrained_model_name_or_path": str(pipeline),
        "revision": None,
        "max_sequence_length": max_sequence_length,
        "text_encoder_layers": [9, 18, 27],
        "padding_side": "right",
    }


def to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as float32, float16, or uint16 holding bfloat16's bits (rounded to nearest even)."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def write_cache(
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    buckets: Mapping[tuple[int, int], int] = TINY_BUCKETS,
    text_lengths: int | Sequence[int] = TINY_TEXT_LENGTH,
    embed_dim: int = TINY_EMBED_DIM,
    latent_channels: int = TINY_LATENT_CHANNELS,
    pixels_per_latent: int = TINY_PIXELS_PER_LATENT,
    dtype: str = "float32",
    figures_per_paper: int = 2,
    text_ids: bool = True,
    shapes_as_strings: bool = False,
    parts: int = 1,
    year: str = "2015",
    seed: int = 0,
) -> Path:
    """Writes a cache in the npz layout: `<year>/<year>_rank0_part<p>.parquet` beside
    `<year>/<paper>/<id>_flux_latents.npz`, with `cache_path` relative to `folder`.
    The rows of the buckets alternate.

    Args:
        settings: the metadata under `b"sciflow_hf"` (see `encoder_settings`); None: none, as in old caches.
        buckets: samples of each (height, width) in pixels.
        text_lengths: tokens of every prompt, or a list that the rows cycle through.
        dtype: "float32", "float16" or "bfloat16" (bits in uint16).
        text_ids: whether the npz files hold `text_ids` (L, 4).
        shapes_as_strings: `latent_shape` as "[4, 8, 12]" in place of a list.
        parts: index files that the rows are dealt to in contiguous runs.

    Returns:
        `folder`.
    """
    folder, rng = Path(folder), np.random.default_rng(seed)
    lengths = itertools.cycle([text_lengths] if isinstance(text_lengths, int) else text_lengths)
    rounds = itertools.zip_longest(*([size] * count for size, count in buckets.items()))
    sizes = [size for one_round in rounds for size in one_round if size is not None]
    rows = []
    for i, ((height, width), length) in enumerate(zip(sizes, lengths, strict=False)):
        paper = f"{year[2:]}01.{i // figures_per_paper:05d}"
        size = (height // pixels_per_latent, width // pixels_per_latent)
        latents = rng.standard_normal((latent_channels, *size))
        latents = 0.8 * latents + np.linspace(-1, 1, latent_channels)[:, None, None]
        arrays = {
            "latents": to_dtype(latents.astype(np.float32), dtype),
            "prompt_embeds": to_dtype(rng.standard_normal((length, embed_dim)).astype(np.float32), dtype),
        }
        if text_ids:
            arrays["text_ids"] = np.stack([np.zeros(length, np.int64)] * 3 + [np.arange(length)], axis=1)
        name = f"{paper}_{i % figures_per_paper}"
        target = folder / year / paper / f"{name}_flux_latents.npz"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **arrays)
        as_column = str if shapes_as_strings else list
        rows.append(
            {
                "image_path": f"{paper}/{name}.png",
                "caption": f"Figure {i} of the test set, {width} by {height} pixels.",
                "paper_id": paper,
                "cache_path": target.relative_to(folder).as_posix(),
                "latent_shape": as_column(list(latents.shape)),
                "prompt_embeds_shape": as_column([length, embed_dim]),
                "bucket_h": height,
                "bucket_w": width,
                "aspect_ratio": f"{width / height:.2f}",
            }
        )
    for part, chosen in enumerate(np.array_split(np.arange(len(rows)), parts)):
        table = pa.Table.from_pylist([rows[i] for i in chosen])
        if settings is not None:
            table = table.replace_schema_metadata({b"sciflow_hf": json.dumps(dict(settings)).encode()})
        pq.write_table(table, folder / year / f"{year}_rank0_part{part}.parquet")
    return folder


def index_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def edit(file: Path, **columns: Callable[[list[Any]], list[Any]]) -> None:
    """Changes columns of an index file; its metadata stay."""
    table = pq.read_table(file)
    values = table.to_pydict()
    for name, change in columns.items():
        values[name] = change(values.get(name, []))
    pq.write_table(pa.table(values).replace_schema_metadata(table.schema.metadata), file)


def payload_of(folder: Path, row: int = 0) -> Path:
    return folder / pq.read_table(index_files(folder)[0]).column("cache_path")[row].as_py()


def resave(file: Path, **changes: Any) -> None:
    """Changes arrays of an npz; None takes one out."""
    with np.load(file) as stored:
        arrays = dict(stored) | changes
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})


def write_edits(folder: str | Path, *, settings: Mapping[str, Any], seed: int = 1) -> Path:
    """`write_cache` of two buckets of 12 rows, of each a third without sources, with one, and with two.

    Most rows with sources change their upper quarter only (`edit_mask`). No row shares its
    paper. A batch of 4 of one bucket and one number of sources leaves no tail.
    """
    folder = write_cache(folder, settings=settings, buckets={(64, 96): 12, (96, 64): 12}, figures_per_paper=1)
    rng, shapes = np.random.default_rng(seed), []
    for row in range(24):
        file = payload_of(folder, row)
        with np.load(file) as stored:
            channels, height, width = stored["latents"].shape
        shapes.append([[channels, height, width], [channels, 6, 4]][: row // 2 % 3])
        names = ("source_latents", "source_latents_1")
        sources = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip(names, shapes[-1], strict=False)}
        mask = np.full((height, width), 255, np.uint8)
        mask[height // 4 :] = 255 * (row % 5 == 0 or not sources)
        resave(file, edit_mask=mask, **sources)
    edit(index_files(folder)[0], source_shapes=lambda _: shapes)
    return folder
