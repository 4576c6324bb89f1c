"""Going on with a build after any kind of stop, and after the input changed."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import (
    PAYLOADS,
    RandomEncoders,
    StubEncoders,
    assert_same_samples,
    build,
    build_on,
    index_of,
    make_images,
    picture,
    samples_of,
    settled,
    write_notes,
)
from PIL import Image

from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

BLOCKS = ("shards", "inline")
payloads = pytest.mark.parametrize("payload", PAYLOADS)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@payloads
def test_a_second_run_encodes_nothing_and_changes_nothing(images: Path, tmp_path: Path, payload: str) -> None:
    build(images, tmp_path / "cache", samples_per_part=5, payload=payload)
    before = settled(tmp_path / "cache")
    times = {
        name: (tmp_path / "cache" / name).stat().st_mtime_ns
        for name in before
        if name.endswith(("npz", "parquet", "safetensors"))
    }
    encoders = StubEncoders(stop_after=0)
    report = build(images, tmp_path / "cache", encoders, samples_per_part=5, payload=payload)
    assert (report.samples, report.encoded, report.reused) == (12, 0, 12) and encoders.prompts == []
    assert settled(tmp_path / "cache") == before
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in times} == times


@payloads
@pytest.mark.parametrize("stop_after", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stopped_build_goes_on_to_the_same_cache(
    images: Path,
    tmp_path: Path,
    payload: str,
    stop_after: int,
    error: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "cache"
    with pytest.raises(error):
        build(images, output, StubEncoders(stop_after, error), samples_per_part=5, payload=payload)
    if error is KeyboardInterrupt:
        assert f"Stopped with {stop_after} of 12" in caplog.text
    if payload == "npz":
        assert len(index_of(output)) == stop_after, "what is finished is in the index already"
    (output / ".left.npz.123.tmp").write_bytes(b"half a file")
    (output / "hep_0").mkdir(exist_ok=True)
    (output / "hep_0" / ".left.npz.123.tmp").write_bytes(b"half a file")
    encoders = StubEncoders()
    report = build(images, output, encoders, samples_per_part=5, payload=payload)
    assert (report.samples, report.encoded, report.reused) == (12, 12 - stop_after, stop_after)
    assert encoders.num_images == 12 - stop_after
    build(images, tmp_path / "straight", samples_per_part=5, payload=payload)
    assert settled(output) == settled(tmp_path / "straight")


def test_payloads_count_without_an_index(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    build(images, output, payload="npz")
    before = settled(output)
    for file in output.glob("*.parquet"):
        file.unlink()
    broken = sorted(output.rglob("*_latents.npz"))[3]
    broken.write_bytes(broken.read_bytes()[:200])
    report = build(images, output, payload="npz")
    assert (report.encoded, report.reused) == (1, 11) and settled(output) == before


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"family": "stub", "max_sequence_length": 7}},
        {"settings": {}},
        {"resolution": 48},
        {"dtype": "fp16"},
        {"bucket_step": 16},
        {"payload": "npz"},
        {"embeds": "fp8"},
        {"codec": "zstd"},
    ],
)
def test_other_settings_are_refused_by_name(images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    build(images, tmp_path / "cache")
    before = settled(tmp_path / "cache")
    name = {"settings": r"(max_sequence_length|family)"}.get(next(iter(options)), next(iter(options)))
    with pytest.raises(SciflowError, match=rf"other settings: `{name}` was .* and is now [^;]*\. Use"):
        build(images, tmp_path / "cache", **options)
    assert settled(tmp_path / "cache") == before


@payloads
def test_a_grown_or_changed_input_is_encoded_where_it_is_new(
    images: Path, tmp_path: Path, payload: str, caplog: Any
) -> None:
    output, options = tmp_path / "cache", dict(samples_per_part=4, payload=payload)
    build(images, output, **options)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    picture(60, 40).save(images / "aaa.png")  # sorts before all others: every part of the index shifts
    picture(50, 50, (1, 2, 3)).resize((55, 55)).save(images / "p0" / "fig_02.png")  # another picture, same name
    rows[5]["caption"] = "a better caption"
    rows = [*rows[:11], {"file_name": "aaa.png", "caption": "new", "licence": "cc-by"}]
    (images / rows[10]["file_name"]).unlink()
    del rows[10]
    os.remove(images / "p1" / "fig_11.png")
    write_notes(images, rows)
    encoders = StubEncoders()
    report = build(images, output, encoders, **options)
    new = 3 if payload == "npz" else 2  # an npz holds its caption's embedding
    assert (report.samples, report.encoded, report.reused) == (11, new, 11 - new) and encoders.num_images == new
    assert set(encoders.prompts) == {"a better caption", "new"} | ({"figure 2"} if payload == "npz" else set())
    assert "Leaving the index" in caplog.text
    cache = load_cache(output)
    assert sorted(cache.row_ids) == sorted(row["file_name"] for row in rows)
    build(images, tmp_path / "straight", **options)
    assert_same_samples(output, tmp_path / "straight")
    straight = load_cache(tmp_path / "straight")
    columns = set(straight.index.column_names) & set(
        rows[-1] | {"caption": "", "bucket_h": 0, "variant": "", "crop_top": 0}
    )
    said = [{row["image_path"]: {c: row[c] for c in columns} for row in c.index} for c in (cache, straight)]
    assert said[0] == said[1]
    if payload == "npz":
        assert cache.fingerprint == straight.fingerprint, "the order follows from the input alone"
    if payload == "shards":
        used = {row[name] for row in index_of(output) for name in ("cache_path", "prompt_embeds_path")}
        assert {f"shards/{file.name}" for file in (output / "shards").iterdir()} == used, "nothing old is left"


@pytest.mark.parametrize("payload", BLOCKS)
@pytest.mark.parametrize(("embeds", "codec"), [("fp8", "none"), ("bf16", "zstd"), ("fp8", "zstd")])
def test_what_is_copied_keeps_its_bits(images: Path, tmp_path: Path, payload: str, embeds: str, codec: str) -> None:
    options = dict(samples_per_part=4, payload=payload, embeds=embeds, codec=codec)
    build(images, tmp_path / "cache", RandomEncoders(), **options)
    before = samples_of(tmp_path / "cache")
    (images / "p1" / "fig_05.png").unlink()
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    write_notes(images, rows[:5] + rows[6:])
    encoders = StubEncoders(stop_after=0)
    build(images, tmp_path / "cache", encoders, **options)
    after = samples_of(tmp_path / "cache")
    assert encoders.prompts == [] and after.keys() == before.keys() - {"p1/fig_05.png"}
    for name, sample in after.items():
        assert all(torch.equal(value, before[name][key]) for key, value in sample.items())


def test_a_lost_block_is_made_again_alone(images: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "cache", dict(samples_per_part=4)
    build(images, output, **options)
    before = settled(output)
    shards = sorted((output / "shards").iterdir())
    shards[1].unlink()
    encoders = StubEncoders()
    assert build(images, output, encoders, **options).encoded == 4 == encoders.num_images
    assert settled(output) == before
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    assert build(images, output, **options).encoded == 4
    assert settled(output) == before


@payloads
def test_a_changed_input_never_leaves_a_row_twice(images: Path, tmp_path: Path, payload: str) -> None:
    output, options = tmp_path / "cache", dict(samples_per_part=4, payload=payload)
    build(images, output, **options)
    picture(60, 40).save(images / "aaa.png")
    (images / "aaa.txt").write_text("new")
    with pytest.raises(RuntimeError):  # killed before the later parts are written anew
        build(images, output, StubEncoders(stop_after=0), **options)
    left = [row["image_path"] for row in index_of(output)]
    assert len(set(left)) == len(left)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for row in rows[3:]:
        (images / row["file_name"]).unlink()
    write_notes(images, rows[:3])
    assert build(images, output, **options).samples == 4 == len(load_cache(output))
    assert payload != "npz" or len(list(output.glob("*.parquet"))) == 1
    assert not (output / ".staging").exists()


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


@payloads
def test_the_size_is_told_before_the_rest_is_encoded(
    images: Path, tmp_path: Path, payload: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    report = build(images, tmp_path / "cache", payload=payload)
    told = re.search(r"12 images in 3 buckets, 12 to encode: about ([\d.]+) KiB \(.* free\)", caplog.text)
    assert told
    if payload == "npz":  # of so small arrays, a block's own names and numbers are the larger part
        assert float(told[1]) == pytest.approx(report.bytes / 1024, rel=0.1)
    assert "Free more" not in caplog.text
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr("sciflow_hf.data.build.build.shutil.disk_usage", lambda _: usage)
    build(images, tmp_path / "full", payload=payload)
    assert "has 10 B free. Free more" in caplog.text


# --- a sample is its content and all that decides its arrays ---


def _edited_images(folder: Path) -> dict[str, str]:
    """Images that change, but not in length (uncompressed), and one that does not; what changes: encoded or not."""
    (folder / "masks").mkdir(parents=True)
    sizes = {
        "swap_1": (40, 40),
        "swap_2": (40, 40),
        "paint": (40, 40),
        "turn": (40, 60),
        "same": (40, 40),
        "mask": (40, 40),
    }
    for number, (name, size) in enumerate(sizes.items()):
        picture(*size, (40 * number, 9, 9)).save(folder / f"{name}.bmp")
    _tagged(folder, 1)
    picture(40, 40, (0, 0, 0)).save(folder / "masks/mask.bmp")
    _captions(folder, "the same words")
    return dict.fromkeys(["swap_1.bmp", "swap_2.bmp", "paint.bmp", "turn.bmp", "mask.bmp", "tag.tif"], "changed")


def _tagged(folder: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 60, (0, 0, 200)).save(folder / "tag.tif", exif=exif, compression=None)


def _captions(folder: Path, of_same: str) -> None:
    names = ["swap_1.bmp", "swap_2.bmp", "paint.bmp", "turn.bmp", "tag.tif"]
    notes = [{"file_name": name, "caption": name} for name in names]
    notes += [{"file_name": "mask.bmp", "caption": "mask", "loss_mask": "masks/mask.bmp"}]
    write_notes(folder, [*notes, {"file_name": "same.bmp", "caption": of_same}])


@payloads
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_changed_is_encoded_again_and_nothing_stale_stays(tmp_path: Path, payload: str, ranks: int) -> None:
    folder, output, options = tmp_path / "images", tmp_path / "cache", dict(payload=payload, samples_per_part=2)
    changed = _edited_images(folder)
    build(folder, output, **options)
    before, lengths = samples_of(output), {f: f.stat().st_size for f in folder.rglob("*.*")}
    for source, target in (("swap_1", "x"), ("swap_2", "swap_1"), ("x", "swap_2")):
        (folder / f"{source}.bmp").rename(folder / f"{target}.bmp")
    picture(40, 40, (1, 2, 3)).save(folder / "paint.bmp")
    picture(60, 40, (120, 9, 9)).save(folder / "turn.bmp")  # another bucket
    picture(40, 40, (255, 255, 255)).save(folder / "masks/mask.bmp")
    _tagged(folder, 6)
    assert {f: f.stat().st_size for f in folder.rglob("*.*")} == lengths

    encoders = [StubEncoders() for _ in range(ranks)]
    build_on(ranks, folder, output, encoders, **options)
    assert sum(e.num_images for e in encoders) == len(changed)
    assert payload == "npz" or not any(e.prompts for e in encoders)
    build(folder, tmp_path / "straight", **options)
    assert_same_samples(output, tmp_path / "straight")
    for name, sample in samples_of(output).items():
        same = {key: torch.equal(value, before[name][key]) for key, value in sample.items()}
        assert all(same.values()) == (name not in changed), (name, same)
    assert len(list(output.rglob("*_latents.npz"))) == (7 if payload == "npz" else 0), "no payload of old samples"
    assert build(folder, output, StubEncoders(stop_after=0), **options).reused == 7

    _captions(folder, "other words")
    encoders = [StubEncoders() for _ in range(ranks)]
    build_on(ranks, folder, output, encoders, **options)
    assert [p for e in encoders for p in e.prompts] == ["other words"]
    assert sum(e.num_images for e in encoders) == (payload == "npz")
    assert samples_of(output)["same.bmp"]["prompt_embeds"].eq(len("other words")).all()


@payloads
def test_other_buckets_are_other_samples(images: Path, tmp_path: Path, payload: str) -> None:
    output = tmp_path / "cache"
    build(images, output, payload=payload, buckets=[(16, 16)])
    encoders = StubEncoders()
    assert build(images, output, encoders, payload=payload).encoded == 12 == encoders.num_images
    build(images, tmp_path / "straight", payload=payload)
    assert_same_samples(output, tmp_path / "straight")
    for i, sample in enumerate(load_cache(output)):
        height, width = load_cache(output).buckets[i]
        assert tuple(sample["latents"].shape[1:]) == (height // 8, width // 8)


@payloads
def test_a_cache_of_an_earlier_version_is_continued_by_its_rules(
    images: Path, tmp_path: Path, payload: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ids by length: nothing is encoded again, so that runs on it resume; what is new is added by the same rules."""
    output = tmp_path / "cache"
    output.mkdir()
    noted = {"payload": payload, "family": "stub", "dtype": "bf16", "resolution": 32, "bucket_step": 8}
    (output / "build.json").write_text(json.dumps({"settings": noted}))
    build(images, output, payload=payload)
    # As the version before wrote it: a hash of name, caption where it is stored along, resolution and length.
    file = images / "p1" / "fig_05.png"
    facts = ["p1/fig_05.png", "figure 5" if payload == "npz" else None, 32, file.stat().st_size]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    assert digest in {row.get("sample_id") or Path(row["cache_path"]).name[:16] for row in index_of(output)}
    picture(60, 40).save(images / "new.png")
    (images / "new.txt").write_text("new")
    caplog.clear()
    report = build(images, output, payload=payload)
    assert (report.encoded, report.reused) == (1, 12)
    assert caplog.text.count("an edited image whose file is as long as before is not encoded again") == 1
    assert "rules" not in json.loads((output / "build.json").read_text())
