"""Building caches of edits: sources encoded and stored once, whatever is edited, added, killed or shared by ranks."""

import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import PAYLOADS, STEP, Disk, Killed, StubEncoders, build, build_on, index_of, settled, write_notes
from PIL import Image

from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.build.references import SourceRules
from sciflow_hf.data.inspect.recheck import Difference, compare_afresh
from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.layouts.shards import read_header
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

payloads = pytest.mark.parametrize("payload", PAYLOADS)
ROWS: dict[str, list[str]] = {
    "t0.png": ["s0.png"], "t1.png": [], "t2.png": ["s1.png", "s2.png"], "t3.png": ["s0.png"], "t4.png": [],
    "t5.png": ["s2.png", "s1.png"], "t6.png": ["s3.png"], "t7.png": ["s0.png"],
}  # fmt: skip
"""Names of targets and their sources; the captions of t0 and t6, and of t2 and t3, are the same."""
SIZES = {"s0.png": (40, 64), "s1.png": (24, 32), "s2.png": (32, 48), "s3.png": (48, 32)}


class EditEncoders(StubEncoders):
    """Also encodes sources, and texts that read them; counts both."""

    def __init__(self, stop_after: int | None = None, stop_sources: int | None = None, reads: bool = False) -> None:
        super().__init__(stop_after)
        self.num_sources, self.stop_sources, self.reads = 0, stop_sources, reads

    def rules(self) -> SourceRules:
        def size(height: int, width: int) -> tuple[int, int]:
            return height // STEP * STEP, width // STEP * STEP

        return SourceRules(2, size, size, lambda height, width: "", self.sources, text=self.reads)

    def sources(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.stop_sources is not None and self.num_sources + len(pixel_values) > self.stop_sources:
            raise self.error("stopped by the test")
        self.num_sources += len(pixel_values)
        return torch.nn.functional.avg_pool2d(pixel_values, STEP)

    def texts(self, prompts: Any, sources: Any = None) -> dict[str, torch.Tensor]:
        found = super().texts(prompts)
        if sources is not None:
            means = torch.tensor([sum(float(np.asarray(image).mean()) for image in images) for images in sources])
            found["prompt_embeds"] = found["prompt_embeds"] + means[:, None, None]
        return found


def draw(file: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(file)


def make_edits(folder: Path, rows: dict[str, list[str]] = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, size) in enumerate(SIZES.items()):
        draw(folder / name, size, 100 + number)
    for number, name in enumerate(rows):
        draw(folder / name, (40, 64) if number % 2 else (48, 32), number)
    captions = {"t6.png": "t0.png", "t3.png": "t2.png"}
    notes = [{"file_name": name, "caption": f"edit {captions.get(name, name)}"} for name in rows]
    for note, sources in zip(notes, rows.values(), strict=True):
        note |= {"source_image": sources} if sources else {}
    write_notes(folder, notes)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_edits(tmp_path / "images")


def build_edits(images: Path, output: Path, encoders: EditEncoders | None = None, **options: Any) -> Any:
    encoders = encoders or EditEncoders()
    return build(images, output, encoders, **{"sources": encoders.rules(), "samples_per_part": 3, **options})


def samples_of(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    cache = load_cache(output, dtype=torch.float32)
    return {str(name): cache[i] for i, name in enumerate(cache.column("image_path").to_pylist())}


def assert_equal(one: Path, other: Path) -> None:
    left, right = samples_of(one), samples_of(other)
    assert left.keys() == right.keys()
    for name, sample in left.items():
        assert sample.keys() == right[name].keys(), name
        assert all(torch.equal(value, right[name][key]) for key, value in sample.items()), name


def latents_of(file: Path, size: tuple[int, int]) -> torch.Tensor:
    """What the stub makes of all of an image, stored in bfloat16."""
    pixels = np.asarray(Image.open(file).resize(size[::-1], Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    values = torch.from_numpy(np.ascontiguousarray(pixels)) / np.float32(127.5) - 1
    return torch.nn.functional.avg_pool2d(values[None], STEP)[0].bfloat16().float()


@payloads
def test_rows_have_their_own_sources(images, tmp_path, payload):
    encoders = EditEncoders()
    report = build_edits(images, tmp_path / "c", encoders, payload=payload)
    assert (report.samples, report.skipped) == (8, [])
    assert encoders.num_sources == 5 or payload == "npz", "four, of which s0 is shown in two windows"
    found, cache = samples_of(tmp_path / "c"), load_cache(tmp_path / "c")
    for name, sources in ROWS.items():
        slots = [key for key in found[name] if key.startswith("source")]
        assert sorted(slots) == ["source_latents", "source_latents_1"][: len(sources)]
    expected = {name: latents_of(images / name, SIZES[name]) for name in ("s1.png", "s2.png")}
    assert torch.equal(found["t2.png"]["source_latents"], expected["s1.png"])
    assert torch.equal(found["t2.png"]["source_latents_1"], expected["s2.png"])
    assert torch.equal(found["t5.png"]["source_latents"], expected["s2.png"])
    rows = {row["image_path"]: row for row in index_of(tmp_path / "c")}
    assert {name: row["source_images"] for name, row in rows.items()} == ROWS
    assert rows["t2.png"]["source_sizes"] == [[24, 32], [32, 48]] and rows["t1.png"]["source_ids"] == []
    assert rows["t2.png"]["source_ids"] == rows["t5.png"]["source_ids"][::-1]
    assert Counter(cache.kinds) == {"edit": 6, "generation": 2}
    assert verify_cache(cache, progress=False).clean


def test_layouts_hold_the_same_and_shards_hold_each_source_once(images, tmp_path):
    for payload in PAYLOADS:
        build_edits(images, tmp_path / payload, payload=payload)
    assert_equal(tmp_path / "npz", tmp_path / "shards")
    assert_equal(tmp_path / "npz", tmp_path / "inline")
    build_edits(images, tmp_path / "one", samples_per_part=8)
    for name, count in (("shards", 3), ("one", 1)):  # of blocks
        files = sorted((tmp_path / name / "shards").iterdir())
        entries = {key: entry for file in files for key, entry in read_header(str(file)).items()}
        sources = {key: entry.nbytes for key, entry in entries.items() if key.startswith("source")}
        rows = index_of(tmp_path / name)
        shown = [own for row in rows for own in zip(row["source_ids"], row["source_sizes"], strict=True)]
        sizes = {i: 2 * 3 * height * width // STEP**2 for i, (height, width) in shown}
        assert sources == {f"source_latents.{i}": nbytes for i, nbytes in sizes.items()}
        assert len(files) == count and len(sizes) == 5 and len(shown) == 8
    for payload in PAYLOADS:
        convert_cache(tmp_path / "inline", tmp_path / "again" / payload, payload=payload, shard_bytes=500)
        assert_equal(tmp_path / "npz", tmp_path / "again" / payload)


@payloads
def test_an_edited_source_and_more_sources(images, tmp_path, payload):
    """What changed is encoded again and nothing else; the cache is that of a build from the beginning."""
    rows = {name: sources[:1] for name, sources in ROWS.items()}
    make_edits(images, rows)
    build_edits(images, tmp_path / "c", payload=payload, samples_per_part=2)
    make_edits(images, ROWS)  # now with two sources
    draw(images / "s3.png", (48, 32), 999)
    encoders = EditEncoders()
    report = build_edits(images, tmp_path / "c", encoders, payload=payload, samples_per_part=2)
    assert (report.encoded, report.reused) == (3, 5), "t2 and t5 have one more source, that of t6 is another"
    if payload != "npz":
        assert encoders.num_sources == 1 and encoders.prompts == [], "s1 and s2 are known"
    build_edits(images, tmp_path / "straight", payload=payload, samples_per_part=2)
    assert_equal(tmp_path / "c", tmp_path / "straight")
    assert verify_cache(load_cache(tmp_path / "c"), progress=False).clean
    assert build_edits(images, tmp_path / "c", payload=payload, samples_per_part=2).encoded == 0


@payloads
def test_edits_are_added_to_generations_and_taken_away(images, tmp_path, payload):
    make_edits(images, {name: [] for name in ROWS})
    build_edits(images, tmp_path / "c", payload=payload)
    before = settled(tmp_path / "c")
    assert "source_ids" not in index_of(tmp_path / "c")[0]
    make_edits(images, ROWS)
    report = build_edits(images, tmp_path / "c", payload=payload)
    assert (report.encoded, report.reused) == (6, 2)
    build_edits(images, tmp_path / "straight", payload=payload)
    assert_equal(tmp_path / "c", tmp_path / "straight")
    make_edits(images, {name: [] for name in ROWS})
    build_edits(images, tmp_path / "c", payload=payload)
    assert not load_cache(tmp_path / "c").has_sources and "source_ids" not in index_of(tmp_path / "c")[0]
    assert payload == "inline" or len(settled(tmp_path / "c")) >= len(before)


@payloads
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_build_that_stops_at_any_source_is_finished(images, tmp_path, payload, stop):
    """After an error at a source the next build encodes what is missing, and the cache is that of one build."""
    first = EditEncoders(stop_sources=stop)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        build_edits(images, tmp_path / "c", first, payload=payload)
    second = EditEncoders()
    build_edits(images, tmp_path / "c", second, payload=payload)
    build_edits(images, tmp_path / "straight", payload=payload)
    if payload != "npz":
        assert first.num_sources + second.num_sources <= 5 + 1, "at most the sources at work are encoded twice"
    assert_equal(tmp_path / "c", tmp_path / "straight")
    assert verify_cache(load_cache(tmp_path / "c"), progress=False).clean


@payloads
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.acceptance), 4])
def test_killed_at_any_file_a_build_is_finished_by_the_next(tmp_path, payload, every):
    """The n-th file does not appear, or not vanish, of a build that takes blocks apart: see its twin."""
    images, few = (
        tmp_path / "few",
        {name: ROWS[name] for name in ("t0.png", "t1.png", "t3.png", "t4.png", "t2.png", "t6.png")},
    )
    make_edits(images, {name: sources[:1] for name, sources in few.items()})
    build_edits(images, tmp_path / "start", payload=payload, samples_per_part=2)
    make_edits(images, few)
    draw(images / "s3.png", (48, 32), 999)
    build_edits(images, tmp_path / "straight", payload=payload, samples_per_part=2)
    for fail_at in range(1, 100, every):
        output = shutil.copytree(tmp_path / "start", tmp_path / f"killed_{fail_at}")
        first, second = EditEncoders(), EditEncoders()
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            disk = Disk(patch, fail_at, Killed())
            build_edits(images, output, first, payload=payload, samples_per_part=2)
        if list(output.glob("*.parquet")):  # what is there meanwhile can be read, whatever is missing
            there = load_cache(output)
            assert [list(there[i]) for i in range(len(there))]
        build_edits(images, output, second, payload=payload, samples_per_part=2)
        assert not (output / ".staging").exists()
        if payload != "npz":
            assert first.num_sources + second.num_sources <= 2 + 1, "two are new, and one may be encoded twice"
        assert_equal(output, tmp_path / "straight")
        assert verify_cache(load_cache(output), threads=1, progress=False).clean
        if disk.calls < fail_at:
            break
    else:
        raise AssertionError("the build writes more files than were tried")
    assert fail_at > 7


@payloads
def test_two_ranks_build_what_one_builds(images, tmp_path, payload):
    encoders: list[StubEncoders] = [EditEncoders(), EditEncoders()]
    rules = EditEncoders().rules()
    build_on(2, images, tmp_path / "two", encoders, payload=payload, samples_per_part=2, sources=rules)
    build_edits(images, tmp_path / "one", payload=payload, samples_per_part=2)
    assert_equal(tmp_path / "two", tmp_path / "one")


@payloads
def test_texts_that_read_sources_are_those_of_the_row(images, tmp_path, payload):
    """t0 and t6, t2 and t3 have one caption and other sources: their embeddings differ, and stay so when rebuilt."""
    build_edits(images, tmp_path / "c", EditEncoders(reads=True), payload=payload)
    found = samples_of(tmp_path / "c")
    for one, other in (("t0.png", "t6.png"), ("t2.png", "t3.png")):
        assert not torch.equal(found[one]["prompt_embeds"], found[other]["prompt_embeds"])
    assert load_cache(tmp_path / "c").metadata["text_reads_sources"] is True
    encoders = EditEncoders(reads=True)
    assert build_edits(images, tmp_path / "c", encoders, payload=payload).encoded == 0 and not encoders.prompts
    for target in PAYLOADS:
        report = convert_cache(tmp_path / "c", tmp_path / "converted" / target, payload=target)
        assert (report.prompts, report.own_copies) == (8, 0)
        assert_equal(tmp_path / "c", tmp_path / "converted" / target)
    with pytest.raises(SciflowError, match="the text encoder of the source also reads the reference images"):
        convert_cache(tmp_path / "c", tmp_path / "none", payload="shards", embeds="none")


@payloads
def test_a_broken_source_leaves_out_its_rows(images, tmp_path, payload):
    class Broken(EditEncoders):
        def sources(self, pixel_values: torch.Tensor) -> torch.Tensor:
            found = super().sources(pixel_values)
            return found * float("nan") if pixel_values.shape[-2:] == (24, 32) else found

    report = build_edits(images, tmp_path / "c", Broken(), payload=payload)
    assert {name.partition("#")[0] for name, _ in report.skipped} == {"t2.png", "t5.png"}, report.skipped
    assert all("s1.png" in reason for _, reason in report.skipped)
    assert sorted(samples_of(tmp_path / "c")) == sorted(ROWS.keys() - {"t2.png", "t5.png"})
    assert verify_cache(load_cache(tmp_path / "c"), progress=False).clean


@payloads
@pytest.mark.parametrize("reads", [False, True])
def test_samples_encoded_afresh_are_those_of_the_cache(images, tmp_path, payload, reads):
    """Of all rows, crops and mirror images included; and a source that was edited since is found."""
    encoders = EditEncoders(reads=reads)
    build_edits(images, tmp_path / "c", encoders, payload=payload, crops=1, flip=True)
    cache = load_cache(tmp_path / "c", dtype=torch.float32)

    def compare() -> dict[str, Difference]:
        found = compare_afresh(
            cache, len(cache), input_dir=images, encode_images=encoders.images, encode_prompts=encoders.texts,
            sources=encoders.rules(),
        )  # fmt: skip
        return {difference.name: difference for difference in found}

    found = compare()
    samples = {"latents": 32, "source_latents": 24, "source_latents_1": 8, "prompt_embeds": 32}
    assert {name: found[name].samples for name in samples} == samples
    assert all(difference.ok for difference in found.values()), found
    draw(images / "s2.png", SIZES["s2.png"], 999)
    found = compare()
    assert not found["source_latents"].ok and not found["source_latents_1"].ok and found["latents"].ok
    assert found["source_latents"].worst.startswith("t5.png") and found["source_latents_1"].worst.startswith("t2.png")
    assert found["prompt_embeds"].ok != reads


@payloads
def test_edits_of_one_image_are_held_out_together(images, tmp_path, payload):
    """With their mirror images, and with the image itself where it is a target; the same of a stream."""
    rows = ROWS | {"s0.png": []}
    notes = [{"file_name": name, "caption": name} for name in rows]
    for note, sources in zip(notes, rows.values(), strict=True):
        note |= {"source_image": sources} if sources else {}
    write_notes(images, notes)
    build_edits(images, tmp_path / "c", payload=payload, flip=True)
    cache = load_cache(tmp_path / "c")
    names = dict(zip(cache.strings("image_path"), cache.groups, strict=True))
    assert names == {name: (sources or [name])[0] for name, sources in rows.items()}
    held_out = [load_cache(tmp_path / "c", streaming=stream).split(0.4)[1] for stream in (False, True)]
    assert sorted(held_out[0].row_ids) == sorted(held_out[1].row_ids) and 0 < len(held_out[0]) < len(cache)
    assert held_out[0].groups and set(held_out[0].groups) == set(held_out[1].groups)
