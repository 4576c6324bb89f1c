"""Building caches: every form of input, broken images, and going on after any kind of stop."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sciflow_hf.data.build import BuildReport, build_cache
from sciflow_hf.data.cache import load_cache
from sciflow_hf.data.sources import fit_pixels, oriented_size, to_rgb
from sciflow_hf.errors import SciflowError

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


def build(source: str | Path, output: Path, encoders: StubEncoders | None = None, **options: Any) -> BuildReport:
    encoders = encoders or StubEncoders()
    options = {"settings": {"family": "stub"}, "bucket_step": STEP, "resolution": 32} | options
    return build_cache(source, output, encode_images=encoders.images, encode_prompts=encoders.texts, **options)


def picture(height: int, width: int, colour: tuple[int, int, int] = (200, 100, 0)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def write_notes(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images of three shapes in two folders, captions in metadata.jsonl."""
    folder = tmp_path / "images"
    rows = []
    for i in range(12):
        file = folder / f"p{i % 2}" / f"fig_{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        height, width = [(40, 60), (60, 40), (50, 50)][i % 3]
        picture(height, width, (20 * i, 0, 255 - 20 * i)).save(file)
        rows.append({"file_name": f"p{i % 2}/{file.name}", "caption": f"figure {i}", "paper_id": f"hep/{i // 3}"})
    write_notes(folder, rows)
    return folder


def index_of(output: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


# --- what is written ---


def test_the_cache_holds_what_the_encoders_gave(images: Path, tmp_path: Path) -> None:
    report = build(images, tmp_path / "cache", dtype="fp32", batch_size=2)
    assert (report.samples, report.encoded, report.reused, report.skipped) == (12, 12, 0, [])
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    assert report.bytes == cache.payload_bytes()[0]
    assert sorted(cache.index["caption"]) == sorted(f"figure {i}" for i in range(12))
    for i, row in enumerate(cache.index):
        number = int(row["caption"].split()[1])
        height, width = cache.buckets[i]
        assert row["image_path"] == f"p{number % 2}/fig_{number:02d}.png"
        assert row["paper_id"] == f"hep/{number // 3}" == cache.groups[i]
        assert row["cache_path"].startswith(f"hep_{number // 3}/") and row["aspect_ratio"] == f"{width / height:.2f}"
        # Wide images go to wide buckets; an image of one colour has latents of that colour.
        assert np.sign(width - height) == [1, -1, 0][number % 3] and height * width <= 32**2
        assert row["latent_shape"] == [3, height // STEP, width // STEP] and row["prompt_embeds_shape"] == [
            LENGTH,
            WIDTH,
        ]
        colour = torch.tensor([20.0 * number, 0, 255 - 20 * number]) / 127.5 - 1
        sample = cache[i]
        assert torch.allclose(sample["latents"], colour[:, None, None].expand(row["latent_shape"]), atol=1e-6)
        assert (sample["prompt_embeds"] == len(row["caption"])).all() and sample["prompt_embeds"].shape == (
            LENGTH,
            WIDTH,
        )
        assert torch.equal(sample["txt_ids"][:, 3], torch.arange(LENGTH)) and sample["txt_ids"].dtype == torch.int64
        assert sample["pooled_prompt_embeds"].shape == (WIDTH,)
    assert cache.metadata == {"family": "stub", "dtype": "fp32", "resolution": 32, "version": cache.metadata["version"]}
    plain = datasets.load_dataset("parquet", data_files=str(tmp_path / "cache" / "*.parquet"), split="train")
    assert plain["caption"] == cache.index["caption"], "plain `datasets` reads the index"
    empty = cache.empty_prompt
    assert empty is not None and (empty["prompt_embeds"] == 0).all() and "pooled_prompt_embeds" in empty


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", np.uint16), ("fp16", np.float16), ("fp32", np.float32)])
def test_stored_dtypes(images: Path, tmp_path: Path, dtype: str, stored: type) -> None:
    build(images, tmp_path / "cache", dtype=dtype)
    exact = StubEncoders().images(torch.full((1, 3, 32, 32), 20 * 5 / 127.5 - 1))["latents"][0, 0, 0, 0]
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    i = cache.index["caption"].index("figure 5")
    with np.load(cache.payload_path(i)) as arrays:
        assert arrays["latents"].dtype == stored and arrays["text_ids"].dtype == np.int64
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert cache[i]["latents"][0, 0, 0] == exact.to(kinds[dtype]).float()


def test_batches_share_a_bucket_and_encode_a_prompt_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(10):
        picture(40, 60 if i % 2 else 40, (i, i, i)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("the same words" if i < 8 else "others")
    encoders = StubEncoders()
    build(tmp_path / "images", tmp_path / "cache", encoders, batch_size=4)
    assert [shape[0] for shape in encoders.image_shapes] == [4, 4, 1, 1]
    assert len({shape[1:] for shape in encoders.image_shapes}) == 2
    assert encoders.prompts == ["", "the same words", "the same words", "others", "others"]


def test_extra_columns_have_one_type_in_all_parts(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    values: list[dict[str, Any]] = [
        {"year": 2015, "score": 1, "mixed": 1, "nested": {"a": [1]}, "good": True},
        {"year": None, "score": 0.5, "mixed": "x", "late": "only here", "bucket_h": 7},
        {},
    ]
    for i in range(3):
        picture(40, 40, (i, 0, 0)).save(tmp_path / f"images/{i}.png")
    write_notes(
        tmp_path / "images", [{"file_name": f"{i}.png", "caption": f"c{i}"} | row for i, row in enumerate(values)]
    )
    build(tmp_path / "images", tmp_path / "cache", samples_per_part=1)
    rows = {row["caption"]: row for row in load_cache(tmp_path / "cache").index}
    assert [rows["c0"][k] for k in ("year", "score", "mixed", "nested", "good", "late")] == [
        2015, 1.0, "1", '{"a": [1]}', True, None,
    ]  # fmt: skip
    assert rows["c1"]["late"] == "only here" and rows["c1"]["bucket_h"] == 32


# --- forms of input ---


def _captions(output: Path) -> dict[str, str]:
    return {row["image_path"]: row["caption"] for row in index_of(output)}


def test_csv_txt_and_text_column(tmp_path: Path) -> None:
    source = tmp_path / "images"
    (source / "below").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "below/c.webp", "below/d.tif", "below/e.bmp"):
        picture(40, 50).save(source / name)
    (source / "below" / "metadata.csv").write_text('file_name,text\nc.webp,"one, with a comma"\nd.tif,two\n')
    for name in ("a", "b", "below/e"):
        (source / f"{name}.txt").write_text(f"words of {name}\n", encoding="utf-8")
    build(source, tmp_path / "cache")
    assert _captions(tmp_path / "cache") == {
        "a.png": "words of a",
        "b.JPG": "words of b",
        "below/c.webp": "one, with a comma",
        "below/d.tif": "two",
        "below/e.bmp": "words of below/e",
    }


def _data_set() -> datasets.Dataset:
    pictures = [picture(40, 60, (i, 0, 0)) for i in range(3)] + [picture(60, 40)]
    columns = {"image": pictures, "prompt": ["x", "yy", "zzz", "w"], "paper_id": [1, 1, 2, 2]}
    features = datasets.Features(
        {"image": datasets.Image(), "prompt": datasets.Value("string"), "paper_id": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("form", ["save_to_disk", "dict", "parquet", "parquet_folder"])
def test_data_sets(tmp_path: Path, form: str) -> None:
    source, data = tmp_path / "data", _data_set()
    if form == "save_to_disk":
        data.save_to_disk(source)
    elif form == "dict":
        datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(source)
    else:
        source.mkdir()
        data.to_parquet(source / "x.parquet")
        source = source if form == "parquet_folder" else source / "x.parquet"
    report = build(source, tmp_path / "cache", caption_column="prompt")
    cache = load_cache(tmp_path / "cache")
    assert report.samples == 4 and sorted(cache.index["caption"]) == ["w", "x", "yy", "zzz"]
    assert len(set(cache.row_ids)) == 4 and sorted(cache.groups) == ["1", "1", "2", "2"]
    assert build(source, tmp_path / "cache", caption_column="prompt").reused == 4


def test_a_data_set_of_the_hub_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def load(name: str) -> datasets.DatasetDict:
        names.append(name)
        return datasets.DatasetDict({"train": _data_set()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert build("user/figures", tmp_path / "cache", caption_column="prompt").samples == 4
    assert names == ["user/figures"]


def test_the_cache_may_lie_in_the_input_folder(images: Path) -> None:
    build(images, images / "cache")
    assert build(images, images / "cache").reused == 12
    tables = images.parent / "tables"
    tables.mkdir()
    _data_set().to_parquet(tables / "x.parquet")
    for _ in range(2):  # the second time the cache's own parquet lies there, too
        assert build(tables, tables / "cache", caption_column="prompt").samples == 4


# --- unusable input ---


def test_unusable_sources_say_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SciflowError, match="does not exist"):
        build(tmp_path / "absent", tmp_path / "cache")
    with pytest.raises(SciflowError, match=r"holds no images.*metadata\.jsonl"):
        build(empty, tmp_path / "cache")
    picture(40, 40).save(empty / "a.png")
    with pytest.raises(SciflowError, match=r"none of its 1 images has a caption.*metadata\.jsonl"):
        build(empty, tmp_path / "cache")
    write_notes(empty, [{"file_name": "a.png", "title": "x"}])
    with pytest.raises(SciflowError, match=r"`caption_column` is 'caption'.*'title'"):
        build(empty, tmp_path / "cache")
    (empty / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "x"}\n{"file_name": \n')
    with pytest.raises(SciflowError, match=r"Line 2 of .*metadata\.jsonl is not JSON"):
        build(empty, tmp_path / "cache")
    (empty / "metadata.jsonl").write_text('{"caption": "x"}\n')
    with pytest.raises(SciflowError, match=r"Line 1 of .* has no `file_name`"):
        build(empty, tmp_path / "cache")
    (empty / "metadata.jsonl").unlink()
    (empty / "a.png").write_bytes(b"no image")
    (empty / "a.txt").write_text("x")
    with pytest.raises(SciflowError, match=r"none of its images can be read.*a\.png"):
        build(empty, tmp_path / "cache")
    data = datasets.Dataset.from_dict({"caption": ["x"]})
    data.save_to_disk(tmp_path / "data")
    with pytest.raises(SciflowError, match="no `image`"):
        build(tmp_path / "data", tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "nothing is written before the input is understood"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"dtype": "int8"}, "`dtype` is 'int8'.*bf16, fp16, fp32"),
        ({"resolution": 4}, "`resolution` is 4.*multiples of 8"),
    ],
)
def test_bad_options_are_named(images: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SciflowError, match=message):
        build(images, tmp_path / "cache", **options)


def test_bad_images_are_named_skipped_and_counted(images: Path, tmp_path: Path) -> None:
    (images / "p0" / "fig_00.png").write_bytes(b"not an image")
    whole = (images / "p1" / "fig_01.png").read_bytes()
    (images / "p1" / "fig_01.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    picture(40, 40).save(images / "uncaptioned.png")
    (images / "p0" / "fig_02.png").unlink()
    report = build(images, tmp_path / "cache", batch_size=4)
    assert report.samples == 9 == len(load_cache(tmp_path / "cache"))
    reasons = dict(report.skipped)
    assert len(report.skipped) == 4 and reasons["uncaptioned.png"] == "no caption"
    assert "unreadable" in reasons["p0/fig_00.png"] and "unreadable" in reasons["p1/fig_01.png"]
    assert "not an image file in the folder" in reasons["p0/fig_02.png"]
    for name in reasons:
        (images / name).unlink(missing_ok=True)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    write_notes(images, [row for row in rows if row["file_name"] not in reasons])
    assert build(images, tmp_path / "other", strict=True).samples == 9


@pytest.mark.parametrize("damage", ["header", "body", "caption"])
def test_strict_stops_at_a_bad_image(images: Path, tmp_path: Path, damage: str) -> None:
    file = images / "p0" / "fig_04.png"
    if damage == "caption":
        file = images / "p0" / "new.png"
        picture(40, 40).save(file)
    else:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if damage == "body" else b"")
    with pytest.raises(SciflowError, match=rf"{file.name}.*--strict"):
        build(images, tmp_path / "cache", strict=True)


def test_a_nan_from_the_encoders_is_not_stored(images: Path, tmp_path: Path) -> None:
    encoders = StubEncoders()
    plain = encoders.images

    def overflow(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = plain(pixel_values)["latents"]
        return {"latents": latents * 1e6 if encoders.num_images == 3 else latents}  # beyond float16

    encoders.images = overflow  # type: ignore[method-assign]
    report = build(images, tmp_path / "cache", encoders, dtype="fp16")
    assert report.samples == 11 and "latents holds NaN or Inf in fp16" in report.skipped[0][1]


# --- going on ---


def _settled(output: Path) -> dict[str, bytes]:
    """Every file of a cache with its content."""
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted(output.rglob("*")) if f.is_file()}


def test_a_second_run_encodes_nothing_and_changes_nothing(images: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "cache", samples_per_part=5)
    before = _settled(tmp_path / "cache")
    times = {
        name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in before if name.endswith(("npz", "parquet"))
    }
    encoders = StubEncoders(stop_after=0)
    report = build(images, tmp_path / "cache", encoders, samples_per_part=5)
    assert (report.samples, report.encoded, report.reused) == (12, 0, 12) and encoders.prompts == []
    assert _settled(tmp_path / "cache") == before
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stopped_build_goes_on_to_the_same_cache(
    images: Path, tmp_path: Path, stop_after: int, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "cache"
    with pytest.raises(error):
        build(images, output, StubEncoders(stop_after, error), samples_per_part=5)
    if error is KeyboardInterrupt:
        assert f"Stopped with {stop_after} of 12" in caplog.text
    assert len(index_of(output)) == stop_after, "what is finished is in the index already"
    (output / ".left.npz.123.tmp").write_bytes(b"half a file")
    (output / "hep_0").mkdir(exist_ok=True)
    (output / "hep_0" / ".left.npz.123.tmp").write_bytes(b"half a file")
    encoders = StubEncoders()
    report = build(images, output, encoders, samples_per_part=5)
    assert (report.samples, report.encoded, report.reused) == (12, 12 - stop_after, stop_after)
    assert encoders.num_images == 12 - stop_after
    build(images, tmp_path / "straight", samples_per_part=5)
    assert _settled(output) == _settled(tmp_path / "straight")


def test_payloads_count_without_an_index(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    build(images, output)
    before = _settled(output)
    for file in output.glob("*.parquet"):
        file.unlink()
    broken = sorted(output.rglob("*_latents.npz"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    report = build(images, output)
    assert (report.encoded, report.reused) == (1, 11) and _settled(output) == before


_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_build import StubEncoders, build
import sciflow_hf.data.writing as writing
calls = 0
replace = os.replace
def replace_or_die(source, target):
    global calls
    calls += 1
    if calls == {die_at}:  # the temporary file is complete, the real one not there yet
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
build({images!r}, __import__("pathlib").Path({output!r}), samples_per_part=5)
"""


@pytest.mark.parametrize("die_at", [6, 9])  # build.json, empty prompt, 5 payloads, index part, payloads ...
def test_sigkill_loses_nothing_that_was_finished(images: Path, tmp_path: Path, die_at: int) -> None:
    output = tmp_path / "cache"
    code = _KILLED.format(tests=str(Path(__file__).parent), images=str(images), output=str(output), die_at=die_at)
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    finished = list(output.rglob("*_latents.npz"))
    assert len(finished) == {6: 3, 9: 5}[die_at] and len(list(output.rglob(".*.tmp"))) == 1
    encoders = StubEncoders()
    report = build(images, output, encoders, samples_per_part=5)
    assert report.reused == len(finished) and encoders.num_images == 12 - len(finished)
    build(images, tmp_path / "straight", samples_per_part=5)
    assert _settled(output) == _settled(tmp_path / "straight")


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"family": "stub", "max_sequence_length": 7}},
        {"settings": {}},
        {"resolution": 48},
        {"dtype": "fp16"},
        {"bucket_step": 16},
    ],
)
def test_other_settings_are_refused_by_name(images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    build(images, tmp_path / "cache")
    before = _settled(tmp_path / "cache")
    name = {"settings": r"(max_sequence_length|family)"}.get(next(iter(options)), next(iter(options)))
    with pytest.raises(SciflowError, match=rf"other settings: `{name}` was .* and is now [^;]*\. Use"):
        build(images, tmp_path / "cache", **options)
    assert _settled(tmp_path / "cache") == before


def test_a_grown_or_changed_input_is_encoded_where_it_is_new(images: Path, tmp_path: Path, caplog: Any) -> None:
    output = tmp_path / "cache"
    build(images, output, samples_per_part=4)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    picture(60, 40).save(images / "aaa.png")  # sorts before all others: every part of the index shifts
    picture(50, 50, (1, 2, 3)).resize((55, 55)).save(images / "p0" / "fig_02.png")  # another picture, same name
    rows[5]["caption"] = "a better caption"
    rows = [*rows[:11], {"file_name": "aaa.png", "caption": "new", "licence": "cc-by"}]
    (images / rows[10]["file_name"]).unlink()
    del rows[10]
    os.remove(images / "p1" / "fig_11.png")
    write_notes(images, rows)
    report = build(images, output, samples_per_part=4)
    assert (report.samples, report.encoded, report.reused) == (11, 3, 8)
    assert "leave the index" in caplog.text
    cache = load_cache(output)
    assert sorted(cache.row_ids) == sorted(row["file_name"] for row in rows)
    build(images, tmp_path / "straight", samples_per_part=4)
    straight = load_cache(tmp_path / "straight")
    assert cache.fingerprint == straight.fingerprint and cache.index["licence"] == straight.index["licence"]


def test_a_changed_input_never_leaves_a_row_twice(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    build(images, output, samples_per_part=4)
    picture(60, 40).save(images / "aaa.png")
    (images / "aaa.txt").write_text("new")
    with pytest.raises(RuntimeError):  # killed before the later parts are written anew
        build(images, output, StubEncoders(stop_after=0), samples_per_part=4)
    left = [row["image_path"] for row in index_of(output)]
    assert len(set(left)) == len(left)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for row in rows[3:]:
        (images / row["file_name"]).unlink()
    write_notes(images, rows[:3])
    assert build(images, output, samples_per_part=4).samples == 4 == len(load_cache(output))
    assert len(list(output.glob("*.parquet"))) == 1


def test_foreign_folders_are_not_touched(images: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "cache")
    other = tmp_path / "other"
    other.mkdir()
    picture(40, 40).save(other / "x.png")
    (other / "x.txt").write_text("x")
    with pytest.raises(SciflowError, match=r"a cache of other images \(12 samples\)"):
        build(other, tmp_path / "cache")
    (tmp_path / "cache" / "build.json").unlink()
    with pytest.raises(SciflowError, match=r"no build\.json"):
        build(images, tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(SciflowError, match="is a file"):
        build(images, tmp_path / "file")
    assert len(load_cache(tmp_path / "cache")) == 12


def test_the_size_is_told_before_the_rest_is_encoded(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    report = build(images, tmp_path / "cache")
    told = re.search(r"12 images in 3 buckets, 12 to encode: about ([\d.]+) KiB \(.* free\)", caplog.text)
    assert told and float(told[1]) == pytest.approx(report.bytes / 1024, rel=0.1)
    assert "Make room" not in caplog.text
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr("sciflow_hf.data.build.shutil.disk_usage", lambda _: usage)
    build(images, tmp_path / "full")
    assert "has 10 B free. Make room" in caplog.text


# --- pixels ---


def _saved(image: Image.Image, file: Path, **options: Any) -> Image.Image:
    image.save(file, **options)
    return Image.open(file)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 51))  # a fifth of blue
    rgb = to_rgb(_saved(image, tmp_path / "a.png"))
    assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (255, 0, 0) and rgb.getpixel((1, 0)) == (204, 204, 255)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert to_rgb(_saved(grey, tmp_path / "b.png")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([9, 9, 9] * 4)
    assert to_rgb(_saved(palette, tmp_path / "c.png", transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(_saved(palette, tmp_path / "d.png")).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[257, 514, 32768, 40000]], dtype=np.uint16)
    rgb = to_rgb(_saved(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert np.asarray(rgb)[0].tolist() == [[1] * 3, [2] * 3, [128] * 3, [156] * 3]


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.float32([[0, 0.5, 1]]))))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.float32([[-10, 0, 10]]))))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.int32([[0, 1 << 20]]))))[0, :, 0].tolist() == [0, 255]
    for mode in ("1", "L", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = picture(20, 40, (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 20))  # the left quarter is black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    saved = _saved(image, tmp_path / "a.jpg", exif=exif, quality=95)
    assert oriented_size(saved) == (40, 20)
    grey = np.asarray(to_rgb(saved).convert("L"))
    assert grey.shape == (40, 20) and grey[:8].max() < 40 and grey[12:].min() > 215
    (tmp_path / "a.txt").write_text("x")
    build(tmp_path, tmp_path / "cache")
    height, width = load_cache(tmp_path / "cache").buckets[0]
    assert height > width


def test_resizing_covers_and_crops_the_centre() -> None:
    image = picture(40, 100, (0, 0, 0))
    image.paste((255, 255, 255), (30, 0, 70, 40))  # the middle square
    pixels = fit_pixels(image, (16, 16))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.float32 and pixels.min() > 0.8
    image = picture(100, 40, (0, 0, 0))
    image.paste((255, 255, 255), (0, 30, 40, 70))
    assert fit_pixels(image, (8, 8)).min() > 0.8
    assert fit_pixels(image, (20, 8)).min() == -1, "nothing is cropped where the shape fits"


def test_resizing_is_antialiased() -> None:
    """A fine checkerboard becomes grey; picking single pixels would keep black and white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = fit_pixels(Image.fromarray(board).convert("RGB"), (8, 8))
    assert np.abs(pixels[:, 1:-1, 1:-1]).max() < 0.1


# --- the command line ---


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from sciflow_hf.cli import main

    def run(*argv: str | Path) -> tuple[int, str, str]:
        status = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_cli_builds_and_describes(
    cli: Callable[..., tuple[int, str, str]], images: Path, tmp_path: Path, tiny_klein: Path
) -> None:
    (images / "p0" / "fig_00.png").write_bytes(b"")
    output = tmp_path / "cache"
    command = ["cache", "build", "--family", "flux2_klein", "--pretrained_model_name_or_path", tiny_klein]
    command += ["--input_dir", images, "--output_dir", output, "--resolution", "32", "--max_sequence_length", "12"]
    status, out, _ = cli(*command)
    assert status == 0 and "1 images skipped" in out and "p0/fig_00.png" in out and "11 samples in" in out
    cache = load_cache(output)
    from sciflow_hf.families import load_family

    family = load_family("flux2_klein")(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)
    cache.check_family(family.encoder_settings())
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    caption = cache.index[4]["caption"]
    expected = family.encode_prompts([caption], encoders)["prompt_embeds"][0]
    assert torch.equal(cache[4]["prompt_embeds"], expected.to(torch.bfloat16))
    with Image.open(images / cache.index[4]["image_path"]) as image:
        pixels = torch.from_numpy(fit_pixels(image.convert("RGB"), cache.buckets[4]))[None]
    latents = family.encode_images(pixels, encoders)["latents"][0]
    assert torch.allclose(cache[4]["latents"].float(), latents, rtol=0.01, atol=0.01)

    status, out, _ = cli("cache", "info", "--dataset_dir", output)
    assert status == 0 and re.search(r"samples +11\n", out) and "text lengths  12 tokens" in out
    assert "max_sequence_length: 12" in out and "flux2_klein" in out
    height, width = cache.buckets[0]
    assert re.search(rf"{height} x {width} +{cache.buckets.count((height, width))}\n", out)


def test_cli_errors_are_one_line(
    cli: Callable[..., tuple[int, str, str]], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = cli("cache", "info", "--dataset_dir", tmp_path / "absent")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "absent" in err
    for argv in (["cache", "info", "--dataset", "x"], ["cache", "build"], ["nonsense"], []):
        with pytest.raises(SystemExit) as caught:
            cli(*argv)
        assert caught.value.code == 2

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sciflow_hf.data.cache.load_cache", interrupt)
    assert cli("cache", "info", "--dataset_dir", tmp_path)[0] == 130


def test_cli_env_names_versions(cli: Callable[..., tuple[int, str, str]]) -> None:
    from importlib.metadata import version

    status, out, _ = cli("env")
    assert status == 0
    for name in ("torch", "transformers", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"):
        assert re.search(rf"^{name} +{re.escape(version(name))}$", out, re.M)


def test_cli_help_imports_no_model_library() -> None:
    code = (
        "import sys; from sciflow_hf.cli import main\n"
        "try: main(['cache', 'build', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'diffusers', 'datasets', 'PIL'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
