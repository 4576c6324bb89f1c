"""Building caches: what is written from every form of input, and what is said of unusable input."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from builds import LENGTH, PAYLOADS, STEP, WIDTH, StubEncoders, build, index_of, make_images, picture, write_notes

from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.build.cut import find_cut, lengths_text
from sciflow_hf.data.inspect.describe import describe_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


# --- what is written ---


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("samples_per_part", [5, 500])
def test_the_cache_holds_what_the_encoders_gave(
    images: Path, tmp_path: Path, payload: str, samples_per_part: int
) -> None:
    options = dict(dtype="fp32", batch_size=2, payload=payload, samples_per_part=samples_per_part)
    report = build(images, tmp_path / "cache", **options)
    assert (report.samples, report.encoded, report.reused, report.skipped) == (12, 12, 0, [])
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    assert report.bytes == cache.payload_bytes()[0]
    assert sorted(cache.index["caption"]) == sorted(f"figure {i}" for i in range(12))
    for i, row in enumerate(cache.index):
        number = int(row["caption"].split()[1])
        height, width = cache.buckets[i]
        assert row["image_path"] == f"p{number % 2}/fig_{number:02d}.png"
        assert row["paper_id"] == f"hep/{number // 3}" == cache.groups[i]
        assert row["aspect_ratio"] == f"{width / height:.2f}" and row["variant"] == ""
        assert payload != "npz" or row["cache_path"].startswith(f"hep_{number // 3}/")
        assert (row["original_h"], row["original_w"]) == [(40, 60), (60, 40), (50, 50)][number % 3]
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
    expected = {"family": "stub", "dtype": "fp32", "resolution": 32}
    assert {name: cache.metadata[name] for name in expected} == expected
    plain = datasets.load_dataset("parquet", data_files=str(tmp_path / "cache" / "*.parquet"), split="train")
    assert plain["caption"] == cache.index["caption"], "plain `datasets` reads the index"
    empty = cache.empty_prompt
    assert empty is not None and (empty["prompt_embeds"] == 0).all() and "pooled_prompt_embeds" in empty


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", np.uint16), ("fp16", np.float16), ("fp32", np.float32)])
def test_stored_dtypes(images: Path, tmp_path: Path, dtype: str, stored: type) -> None:
    build(images, tmp_path / "cache", dtype=dtype, payload="npz")
    exact = StubEncoders().images(torch.full((1, 3, 32, 32), 20 * 5 / 127.5 - 1))["latents"][0, 0, 0, 0]
    cache = load_cache(tmp_path / "cache", dtype=torch.float32)
    i = cache.index["caption"].index("figure 5")
    with np.load(cache.payload_path(i)) as arrays:
        assert arrays["latents"].dtype == stored and arrays["text_ids"].dtype == np.int64
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert cache[i]["latents"][0, 0, 0] == exact.to(kinds[dtype]).float()
    for payload in ("shards", "inline"):
        build(images, tmp_path / payload, dtype=dtype, payload=payload)
        other = load_cache(tmp_path / payload, dtype=torch.float32)
        assert other.members(0)["latents"].dtype == {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
        j = other.index["caption"].index("figure 5")
        assert all(torch.equal(value, cache[i][name]) for name, value in other[j].items())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_batches_share_a_bucket_and_encode_a_prompt_once(tmp_path: Path, payload: str) -> None:
    (tmp_path / "images").mkdir()
    for i in range(10):
        picture(40, 60 if i % 2 else 40, (i, i, i)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("the same words" if i < 8 else "others")
    encoders = StubEncoders()
    build(tmp_path / "images", tmp_path / "cache", encoders, batch_size=4, payload=payload)
    assert [shape[0] for shape in encoders.image_shapes] == [4, 4, 1, 1]
    assert len({shape[1:] for shape in encoders.image_shapes}) == 2
    assert encoders.prompts == ["", "the same words", "others"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_extra_columns_have_one_type_in_all_parts(tmp_path: Path, payload: str) -> None:
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
    build(tmp_path / "images", tmp_path / "cache", samples_per_part=1, payload=payload)
    rows = {row["caption"]: row for row in load_cache(tmp_path / "cache").index}
    assert [rows["c0"][k] for k in ("year", "score", "mixed", "nested", "good", "late")] == [
        2015, 1.0, "1", '{"a": [1]}', True, None,
    ]  # fmt: skip
    assert rows["c1"]["late"] == "only here" and rows["c1"]["bucket_h"] == 32


# --- sizes of images ---


def _sizes(output: Path) -> dict[str, tuple[int, int]]:
    return {row["image_path"]: (row["bucket_h"], row["bucket_w"]) for row in index_of(output)}


def _of_many_sizes(folder: Path) -> Path:
    folder.mkdir()
    sizes = {"large": (90, 80), "small": (18, 17), "strip": (20, 120), "tiny": (5, 4), "near": (30, 30)}
    for name, size in sizes.items():
        picture(*size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


@pytest.mark.parametrize("payload", PAYLOADS)
def test_small_images_are_not_enlarged_and_what_is_lost_is_told(tmp_path: Path, payload: str) -> None:
    source = _of_many_sizes(tmp_path / "images")
    tally = build(source, tmp_path / "cache", payload=payload, crops=1, flip=True).tally
    sizes = {"large": (32, 32), "small": (16, 16), "strip": (16, 24), "tiny": (8, 8), "near": (32, 32)}
    assert _sizes(tmp_path / "cache") == {f"{name}.png": size for name, size in sizes.items()}
    assert tally.measures == {
        "images that are enlarged": "2, at most 2.00 times: near.png, ...",  # 4 -> 8 pixels, and 30 -> 32
        "images that lose more than 10% of their area at the edges": "3, at most 75%: large.png, ...",
    }
    assert all(what in str(tally) for what in tally.measures)


def test_enlarge_brings_all_images_to_the_resolution(tmp_path: Path) -> None:
    source = _of_many_sizes(tmp_path / "images")
    tally = build(source, tmp_path / "cache", enlarge=True).tally
    assert {h * w for h, w in _sizes(tmp_path / "cache").values()} == {32 * 32, 40 * 24, 24 * 40}
    assert tally.measures["images that are enlarged"] == "4, at most 8.00 times: near.png, ..."
    given = build(source, tmp_path / "given", buckets=[(64, 64)]).tally
    assert set(_sizes(tmp_path / "given").values()) == {(64, 64)}, "buckets that are given stay"
    assert given.measures["images that are enlarged"].startswith("4, at most 16.00 times")


def test_a_cache_of_an_earlier_version_keeps_its_buckets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, output = _of_many_sizes(tmp_path / "images"), tmp_path / "cache"
    build(source, output, enlarge=True)
    noted = json.loads((output / "build.json").read_text())
    assert noted.pop("rules") == 2
    (output / "build.json").write_text(json.dumps(noted))
    assert "earlier version" not in caplog.text
    for _ in range(2):
        caplog.clear()
        build(source, output)
        assert caplog.text.count("begun by an earlier version") == 1 and "another folder" in caplog.text
        assert {h * w for h, w in _sizes(output).values()} == {32 * 32, 40 * 24, 24 * 40}


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
        ({"payload": "zip"}, "`payload` is 'zip'.*npz, shards, inline"),
        ({"embeds": "int4"}, "`embeds` is 'int4'.*bf16, fp8, none"),
        ({"codec": "lz4"}, "`codec` is 'lz4'.*none, zstd"),
        ({"payload": "npz", "embeds": "none"}, "npz, which always stores embeddings"),
        ({"payload": "npz", "embeds": "fp8"}, "npz stores neither fp8 nor zstd"),
        ({"payload": "npz", "codec": "zstd"}, "npz stores neither fp8 nor zstd"),
        ({"crops": -1}, "`crops` is -1"),
        ({"rank": 2, "world_size": 2}, "`rank` is 2"),
        ({"resolution": 4}, "`resolution` is 4.*multiples of 8"),
    ],
)
def test_bad_options_are_named(images: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SciflowError, match=message):
        build(images, tmp_path / "cache", **options)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_bad_images_are_named_skipped_and_counted(images: Path, tmp_path: Path, payload: str) -> None:
    (images / "p0" / "fig_00.png").write_bytes(b"not an image")
    whole = (images / "p1" / "fig_01.png").read_bytes()
    (images / "p1" / "fig_01.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    picture(40, 40).save(images / "uncaptioned.png")
    (images / "p0" / "fig_02.png").unlink()
    encoders = StubEncoders()
    report = build(images, tmp_path / "cache", encoders, batch_size=4, payload=payload)
    # Texts are encoded ahead of the images that they are stored with: here of one whose header is fine.
    assert len(encoders.prompts) == 10 + (payload == "npz"), "no prompt is encoded that no image needs"
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


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_nan_from_the_encoders_is_not_stored(images: Path, tmp_path: Path, payload: str) -> None:
    encoders = StubEncoders()
    plain = encoders.images

    def overflow(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = plain(pixel_values)["latents"]
        return {"latents": latents * 1e6 if encoders.num_images == 3 else latents}  # beyond float16

    encoders.images = overflow  # type: ignore[method-assign]
    report = build(images, tmp_path / "cache", encoders, dtype="fp16", payload=payload)
    assert (
        report.samples == 11 == len(load_cache(tmp_path / "cache"))
        and "latents holds NaN or Inf in fp16" in report.skipped[0][1]
    )


# --- captions that are longer than what is read ---


def _count(prompts: Sequence[str]) -> tuple[list[int], int]:
    """Words, of which five are read."""
    COUNTED.extend(prompts)
    return [len(prompt.split()) for prompt in prompts], 5


COUNTED: list[str] = []


def test_lengths_of_captions_are_classes() -> None:
    """Powers of two from 64 on, which `--max_sequence_length` is chosen from; a caption of 512 tokens needs 512."""
    lengths = {"a": 3, "b": 64, "c": 65, "d": 512, "e": 513, "f": 2048}
    captions = [(name, name) for name in [*lengths, "c"]]
    found = find_cut(captions, lambda texts: ([lengths[text] for text in texts], 512))
    assert found is not None and (found["count"], found["longest"], found["first"]) == (2, 2048, "e")
    assert found["lengths"] == {"64": 2, "128": 2, "512": 1, "1024": 1, "2048": 1}
    assert lengths_text(found) == "2 up to 64, 2 up to 128, 1 up to 512, 1 up to 1,024, 1 up to 2,048"


@pytest.mark.parametrize("options", [{}, {"payload": "npz"}, {"payload": "inline", "embeds": "none"}])
def test_captions_that_are_cut_are_counted_and_noted(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    source, output = tmp_path / "images", tmp_path / "cache"
    source.mkdir()
    captions = ["one two three four five", "a b c d e f", "short", "a b c d e f", "1 2 3 4 5 6 7 8"]
    for i, caption in enumerate(captions):
        picture(40, 40, (i, i, i)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(caption)
    COUNTED.clear()
    report = build(source, output, count_tokens=_count, flip=True, **options)
    assert sorted(COUNTED) == sorted(set(captions)), "each text once"
    text = "3 after 5 tokens, the longest has 8: 1.png, ..."
    assert report.tally.measures["captions that are cut"] == text and f"of 5: {text}" in caplog.text
    assert "Captions by their tokens: 5 up to 64." in caplog.text
    assert report.tally.measures["captions by their tokens"] == "5 up to 64"
    table = describe_cache(load_cache(output), [str(output)])
    assert re.search(rf"cut captions +{re.escape(text)}", table)
    convert_cache(output, tmp_path / "other", payload="inline", embeds=options.get("embeds", "bf16"))
    assert text in describe_cache(load_cache(tmp_path / "other"), ["other"])
    both = [str(output), str(tmp_path / "other")]
    table = describe_cache(load_cache(both), both)
    assert "6 after 5 tokens" in table and re.search(r"captions by their tokens +10 up to 64\n", table)

    COUNTED.clear()
    build(source, output, count_tokens=_count, flip=True, **options)
    assert COUNTED == [], "what was noted holds while the captions stay"
    (source / "1.txt").write_text("short")
    report = build(source, output, count_tokens=_count, flip=True, **options)
    assert report.tally.measures["captions that are cut"].startswith("2 after 5 tokens, the longest has 8: 3.png")
    for i in (3, 4):
        (source / f"{i}.txt").write_text("short")
    assert "captions that are cut" not in str(build(source, output, count_tokens=_count, flip=True, **options).tally)
    assert re.search(r"cut captions +none", describe_cache(load_cache(output), [str(output)]))


def test_of_families_that_do_not_count_nothing_is_said(images: Path, tmp_path: Path) -> None:
    report = build(images, tmp_path / "cache", count_tokens=lambda prompts: None)
    assert "cut" not in str(report.tally) and "cut captions" not in describe_cache(
        load_cache(tmp_path / "cache"), ["x"]
    )
