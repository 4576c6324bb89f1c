"""Stub encoders that count, and the folder of images that the tests of building use."""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sciflow_hf.data.build.build import BuildReport, build_cache
from sciflow_hf.data.load import load_cache

PAYLOADS = ("npz", "shards", "inline")
STEP, LENGTH, WIDTH = 8, 5, 6  # pixels per latent, tokens, embedding width


class StubEncoders:
    """Latents are block means of the pixels, embeddings a function of the prompt alone; counts what it is given."""

    def __init__(self, stop_after: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.image_shapes: list[tuple[int, ...]] = []
        self.prompts: list[str] = []
        self.stop_after, self.error = stop_after, error

    @property
    def num_images(self) -> int:
        return sum(shape[0] for shape in self.image_shapes)

    def images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.stop_after is not None and self.num_images + len(pixel_values) > self.stop_after:
            raise self.error("stopped by the test")
        assert pixel_values.dtype == torch.float32 and pixel_values.abs().max() <= 1
        self.image_shapes.append(tuple(pixel_values.shape))
        return {"latents": torch.nn.functional.avg_pool2d(pixel_values, STEP)}

    def texts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.prompts += prompts
        embeds = [torch.full((LENGTH, WIDTH), float(len(prompt))) for prompt in prompts]
        ids = torch.arange(LENGTH)[:, None].expand(len(prompts), LENGTH, 4)
        return {
            "prompt_embeds": torch.stack(embeds),
            "text_ids": ids,
            "pooled_prompt_embeds": torch.stack(embeds)[:, 0],
        }


class RandomEncoders(StubEncoders):
    """Numbers without a pattern, which follow from the image and from the prompt."""

    def images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = super().images(pixel_values)["latents"]
        return {"latents": torch.sin(latents * 1000) * 3, "latents_std": torch.cos(latents * 1000).abs()}

    def texts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        found = super().texts(prompts)
        seeds = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
        return found | {"prompt_embeds": torch.stack([torch.randn(LENGTH, WIDTH, generator=seed) for seed in seeds])}


def build(source: str | Path, output: Path, encoders: StubEncoders | None = None, **options: Any) -> BuildReport:
    encoders = encoders or StubEncoders()
    options = {"settings": {"family": "stub"}, "bucket_step": STEP, "resolution": 32} | options
    return build_cache(source, output, encode_images=encoders.images, encode_prompts=encoders.texts, **options)


def build_on(ranks: int, source: Path, output: Path, encoders: list[StubEncoders], **options: Any) -> list[BuildReport]:
    """One thread a rank. The first error of a rank is raised, the others are stopped."""
    meeting, errors = threading.Barrier(ranks, timeout=60), []

    def run(rank: int) -> BuildReport | None:
        try:
            return build(
                source, output, encoders[rank], rank=rank, world_size=ranks, barrier=lambda: meeting.wait() and None,
                **options,
            )  # fmt: skip
        except threading.BrokenBarrierError:
            return None
        except BaseException as error:
            errors.append(error)
            meeting.abort()
            return None

    with ThreadPoolExecutor(ranks) as pool:
        reports = list(pool.map(run, range(ranks)))
    if errors:
        raise errors[0]
    return [report for report in reports if report is not None]


def picture(height: int, width: int, colour: tuple[int, int, int] = (200, 100, 0)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def write_notes(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_images(folder: Path, count: int = 12) -> Path:
    """`count` images of three shapes in two folders, captions in metadata.jsonl."""
    rows = []
    for i in range(count):
        file = folder / f"p{i % 2}" / f"fig_{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        height, width = [(40, 60), (60, 40), (50, 50)][i % 3]
        picture(height, width, (20 * i, 0, 255 - 20 * i)).save(file)
        rows.append({"file_name": f"p{i % 2}/{file.name}", "caption": f"figure {i}", "paper_id": f"hep/{i // 3}"})
    write_notes(folder, rows)
    return folder


def index_of(output: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def samples_of(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every sample of a cache by its name."""
    cache = load_cache(output, dtype=torch.float32)
    assert len(set(cache.row_ids)) == len(cache)
    return {name: cache[i] for i, name in enumerate(cache.row_ids)}


def assert_same_samples(one: Path, other: Path) -> None:
    left, right = samples_of(one), samples_of(other)
    assert left.keys() == right.keys()
    for name, sample in left.items():
        assert sample.keys() == right[name].keys()
        assert all(torch.equal(value, right[name][key]) for key, value in sample.items()), name


def settled(output: Path) -> dict[str, bytes]:
    """Every file of a cache with its content."""
    files = [f for f in sorted(output.rglob("*")) if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(output)): f.read_bytes() for f in files}


class Killed(BaseException):
    """What no part of the library expects."""


class Disk:
    """Fails at the n-th file that is about to appear or vanish."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, plain: Any) -> Any:
        def call(path: Any, *args: Any, **options: Any) -> None:
            if not str(path).endswith(".tmp") or args:  # a temporary file that is tidied away does not count
                self.calls += 1
                if self.calls == self.fail_at:
                    raise self.error
            plain(path, *args, **options)

        return call
