"""Several ranks build one cache: the same files as one makes, each image and prompt encoded once, the work shared."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import (
    PAYLOADS,
    RandomEncoders,
    StubEncoders,
    assert_same_samples,
    build,
    build_on,
    make_images,
    picture,
    samples_of,
    settled,
)
from PIL import Image

from sciflow_hf.data.build.build import BuildReport
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError, SciflowError

payloads = pytest.mark.parametrize("payload", PAYLOADS)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def repeat_prompts(images: Path) -> None:
    """The twelve images share four captions, over all parts."""
    rows = [f'{{"file_name": "p{i % 2}/fig_{i:02d}.png", "caption": "words {i * i % 7}"}}\n' for i in range(12)]
    (images / "metadata.jsonl").write_text("".join(rows))


@payloads
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("samples_per_part", [2, 5, 500])
def test_ranks_make_what_one_makes(
    images: Path, tmp_path: Path, payload: str, ranks: int, samples_per_part: int
) -> None:
    repeat_prompts(images)
    (images / "p0" / "fig_04.png").write_bytes((images / "p0" / "fig_04.png").read_bytes()[:90])
    options = dict(payload=payload, samples_per_part=samples_per_part, batch_size=2)
    one, encoders = RandomEncoders(), [RandomEncoders() for _ in range(ranks)]
    alone = build(images, tmp_path / "one", one, **options)
    reports = build_on(ranks, images, tmp_path / "many", encoders, **options)
    assert reports[0] == BuildReport(tmp_path / "many", alone.samples, 11, 0, alone.skipped, alone.bytes, alone.tally)
    assert sum(encoder.num_images for encoder in encoders) == 11 == one.num_images
    assert max(encoder.num_images for encoder in encoders) <= 11 // ranks + 3, "the work is shared"
    assert settled(tmp_path / "many") == settled(tmp_path / "one")
    if payload != "npz":
        prompts = Counter(prompt for encoder in encoders for prompt in encoder.prompts)
        assert prompts == Counter({""} | {f"words {i * i % 7}" for i in range(12)}) == Counter(one.prompts)


@payloads
def test_the_number_of_ranks_may_change_after_a_stop(images: Path, tmp_path: Path, payload: str) -> None:
    options = dict(payload=payload, samples_per_part=2)
    build(images, tmp_path / "straight", **options)
    for stop_after in range(4):
        output = tmp_path / str(stop_after)
        first = [StubEncoders(stop_after, RuntimeError), StubEncoders()]
        with pytest.raises(RuntimeError):
            build_on(2, images, output, first, **options)
        second = [StubEncoders() for _ in range(3)]
        reports = build_on(3, images, output, second, **options)
        done = sum(encoder.num_images for encoder in first)
        assert reports[0].samples == 12 and reports[0].reused == done
        assert sum(encoder.num_images for encoder in [*first, *second]) == 12
        assert settled(output) == settled(tmp_path / "straight")


@payloads
def test_a_changed_input_on_two_ranks(images: Path, tmp_path: Path, payload: str) -> None:
    options = dict(payload=payload, samples_per_part=3)
    build_on(2, images, tmp_path / "cache", [StubEncoders(), StubEncoders()], **options)
    repeat_prompts(images)
    (images / "p1" / "fig_05.png").unlink()
    picture(60, 40, (9, 9, 9)).save(images / "new.png")
    (images / "new.txt").write_text("words 4")
    encoders = [StubEncoders(), StubEncoders()]
    build_on(2, images, tmp_path / "cache", encoders, **options)
    assert payload == "npz" or sum(encoder.num_images for encoder in encoders) == 1
    build(images, tmp_path / "straight", **options)
    assert_same_samples(tmp_path / "cache", tmp_path / "straight")


def test_a_prompt_is_stored_once_across_shards(images: Path, tmp_path: Path) -> None:
    repeat_prompts(images)
    encoders = [RandomEncoders(), RandomEncoders()]
    build_on(2, images, tmp_path / "cache", encoders, samples_per_part=2)
    cache = load_cache(tmp_path / "cache")
    places: dict[str, set[tuple[str, int]]] = {}
    for i in range(12):
        member = cache.members(i)["prompt_embeds"]
        places.setdefault(cache.captions[i], set()).add((member.file, member.offset))
    assert len(places) == 4 and all(len(where) == 1 for where in places.values())
    assert len({next(iter(where)) for where in places.values()}) == 4
    assert len({cache.members(i)["latents"].file for i in range(12)}) == 6


@pytest.mark.parametrize("ranks", [1, 2])
@payloads
def test_a_prompt_that_becomes_nan_takes_its_images_with_it(
    images: Path, tmp_path: Path, payload: str, ranks: int
) -> None:
    repeat_prompts(images)

    class Overflowing(StubEncoders):
        def texts(self, prompts: Any) -> dict[str, torch.Tensor]:
            found = super().texts(prompts)
            for i, prompt in enumerate(prompts):
                found["prompt_embeds"][i] *= float("nan") if prompt == "words 1" else 1
            return found

    options = dict(payload=payload, samples_per_part=2)
    report = build_on(ranks, images, tmp_path / "cache", [Overflowing() for _ in range(ranks)], **options)[0]
    bad = {f"p{i % 2}/fig_{i:02d}.png" for i in range(12) if i * i % 7 == 1}
    assert len(bad) == 3 and {name for name, _ in report.skipped} == bad
    assert all("NaN" in reason for _, reason in report.skipped)
    assert samples_of(tmp_path / "cache").keys() == {f"p{i % 2}/fig_{i:02d}.png" for i in range(12)} - bad
    assert build(images, tmp_path / "cache", **options).samples == 12, "with other encoders it is tried again"


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_without_embeddings_no_prompt_is_encoded(images: Path, tmp_path: Path, payload: str) -> None:
    encoders = [StubEncoders(), StubEncoders()]
    build_on(2, images, tmp_path / "cache", encoders, payload=payload, embeds="none", samples_per_part=4)
    assert encoders[0].prompts == encoders[1].prompts == [] and not (tmp_path / "cache/empty_prompt.npz").exists()
    cache = load_cache(tmp_path / "cache")
    assert len(cache) == 12 and cache.metadata["embeds"] == "none" and set(cache[0]) == {"latents"}
    assert sorted(cache.captions) == sorted(f"figure {i}" for i in range(12)) and cache.empty_prompt is None
    assert build(images, tmp_path / "cache", payload=payload, embeds="none", samples_per_part=4).reused == 12


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_blocks_have_a_bounded_size(images: Path, tmp_path: Path, payload: str, monkeypatch: Any) -> None:
    """A block has as many samples as fit, judged by the first, and as many after a kill."""
    build(images, tmp_path / "whole", payload=payload)
    monkeypatch.setattr("sciflow_hf.data.build.build.BLOCK_BYTES", 2700)  # of samples of about 800 bytes, staged
    with pytest.raises(RuntimeError):
        build(images, tmp_path / "cut", StubEncoders(stop_after=4), payload=payload)
    build(images, tmp_path / "cut", payload=payload)
    parts = [len(load_cache(tmp_path / name).index_files) for name in ("whole", "cut")]
    assert parts[0] == 1 and 3 <= parts[1] <= 6
    assert_same_samples(tmp_path / "whole", tmp_path / "cut")


@payloads
def test_the_work_is_shared_within_a_part_too(images: Path, tmp_path: Path, payload: str) -> None:
    """Counted, not timed: 32 images in one part, of which each of two ranks encodes half."""
    for i in range(20):
        picture(40, 60, (i, i, i)).save(images / f"more_{i:02d}.png")
        (images / f"more_{i:02d}.txt").write_text(f"more {i}")
    encoders = [StubEncoders(), StubEncoders()]
    build_on(2, images, tmp_path / payload, encoders, payload=payload)
    assert sum(encoder.num_images for encoder in encoders) == 32
    assert max(encoder.num_images for encoder in encoders) <= 17 and max(len(e.prompts) for e in encoders) <= 18


def test_an_error_of_one_rank_reaches_the_caller(images: Path, tmp_path: Path) -> None:
    class Failing(StubEncoders):
        def images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            raise CacheError("the GPU fell off")

    with pytest.raises(SciflowError, match="fell off"):
        build_on(2, images, tmp_path / "cache", [StubEncoders(), Failing()])
    assert build(images, tmp_path / "cache").samples == 12


def test_what_ranks_have_to_remark_is_told_once(tmp_path: Path) -> None:
    """Texts and frames, which all ranks see, and pixels, which one of them sees."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        values = np.full((32, 32), 7, np.float32)
        values[i, i] = np.nan
        Image.fromarray(values).save(tmp_path / f"images/{i}.tif", save_all=True, append_images=[picture(8, 8)])
        (tmp_path / f"images/{i}.txt").write_bytes(f"naïve {i}".encode("cp1252"))
    alone = build(tmp_path / "images", tmp_path / "one").tally
    tally = build_on(2, tmp_path / "images", tmp_path / "two", [StubEncoders(), StubEncoders()])[0].tally
    assert len(alone.remarks) == 3 and all(len(names) == 4 for names in alone.remarks.values())
    assert {what: sorted(names) for what, names in tally.remarks.items()} == alone.remarks
    assert (tally.encoded, tally.files) == (4, 8)
