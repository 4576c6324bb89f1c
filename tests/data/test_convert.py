"""Conversion of caches: the same samples in every layout, resumed, divided among processes, and refused."""

import json
import logging
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import encoder_settings, write_cache

from sciflow_hf.data.build import convert
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.cache import LatentCache
from sciflow_hf.data.layouts.shards import read_header
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError, SciflowError

BUCKETS = {(32, 48): 7, (48, 32): 4, (24, 64): 3}
ROWS = 14
SHARD = 8000  # bytes: several blocks
LAYOUTS = [("shards", "none"), ("shards", "zstd"), ("inline", "none"), ("inline", "zstd"), ("npz", "none")]


def change_index(folder: Path, change) -> None:
    for file in folder.rglob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)


def replace(table: pa.Table, **columns: list) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, [values])
    return table


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """14 samples with ragged text in float16, in two parts."""
    return write_cache(
        tmp_path / "source", settings=encoder_settings("x"), buckets=BUCKETS, text_lengths=[12, 9, 10],
        dtype="float16", parts=2,
    )  # fmt: skip


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """14 samples with 4 distinct captions; equal captions have equal embeddings."""
    folder = write_cache(tmp_path / "repeated", settings=encoder_settings("x"), buckets=BUCKETS, dtype="bfloat16")
    table = pq.read_table(next(folder.rglob("*.parquet")))
    files = [folder / path for path in table.column("cache_path").to_pylist()]
    for row, file in enumerate(files):
        with np.load(files[row % 4]) as first, np.load(file) as own:
            arrays = dict(own) | {"prompt_embeds": first["prompt_embeds"]}
        np.savez(file, **arrays)
    change_index(folder, lambda table: replace(table, caption=[f"caption {row % 4}" for row in range(ROWS)]))
    return folder


def by_numpy(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The samples of an npz cache in bfloat16, without our readers."""
    samples = []
    for file in sorted(folder.rglob("*.parquet")):
        for path in pq.read_table(file).column("cache_path").to_pylist():
            with np.load(folder / path) as stored:
                sample = {}
                for name in stored.files:
                    value = torch.from_numpy(
                        stored[name].astype(np.int64 if name == "text_ids" else stored[name].dtype)
                    )
                    if value.dtype == torch.uint16:
                        value = value.view(torch.bfloat16)
                    sample[name] = value.bfloat16() if value.is_floating_point() else value
                sample["txt_ids"] = sample.pop("text_ids")
                samples.append(sample)
    return samples


def check_equal(cache, samples: list[dict[str, torch.Tensor]]) -> None:
    assert len(cache) == len(samples)
    for row, sample in enumerate(samples):
        read = cache[row]
        assert read.keys() == sample.keys()
        for name, value in sample.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value), (row, name)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


# --- the same samples ---


@pytest.mark.promise("A14")
@pytest.mark.parametrize("payload, codec", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_sample_is_equal_and_in_its_place(tmp_path, payload, codec, dtype):
    folder = write_cache(
        tmp_path / "source", settings=encoder_settings("x"), buckets=BUCKETS, text_lengths=[12, 9], dtype=dtype, parts=2
    )
    before = contents(folder)
    report = convert_cache(folder, tmp_path / "new", payload=payload, codec=codec, shard_bytes=SHARD)
    assert (report.samples, report.prompts, report.waiting) == (ROWS, ROWS, 0)
    assert report.blocks == report.written > 2
    old, new = load_cache(folder), load_cache(tmp_path / "new")
    check_equal(new, by_numpy(folder))
    assert new.row_ids == old.row_ids and new.groups == old.groups and new.captions == old.captions
    assert new.batch_keys == old.batch_keys and new.fingerprint == old.fingerprint
    new.check_family(encoder_settings("x"))
    assert contents(folder) == before, "the source is never touched"


def test_there_and_back(tmp_path, source):
    """npz -> shards (zstd) -> inline -> npz -> shards."""
    steps = [("shards", "zstd"), ("inline", "none"), ("npz", "none"), ("shards", "none")]
    last = source
    for number, (payload, codec) in enumerate(steps):
        convert_cache(last, tmp_path / str(number), payload=payload, codec=codec, shard_bytes=SHARD)
        last = tmp_path / str(number)
        check_equal(load_cache(last), by_numpy(source))
    straight = convert_cache(source, tmp_path / "straight", shard_bytes=SHARD)
    assert straight.samples == ROWS
    for name in ("shards/part00000.safetensors", "shards/part00001.safetensors"):
        assert (last / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.promise("A15")
def test_free_columns_keep_their_types(tmp_path, source):
    change_index(source, lambda table: table.append_column("year", pa.array([2015] * len(table), pa.int16())))
    change_index(source, lambda table: replace(table, latent_shape=[str(s) for s in table["latent_shape"].to_pylist()]))
    convert_cache(source, tmp_path / "new")
    index = pq.read_table(tmp_path / "new" / "data_part00000.parquet")
    assert index.schema.field("year").type == pa.int16() and index["paper_id"][0].as_py() == "1501.00000"
    check_equal(load_cache(tmp_path / "new"), by_numpy(source))


def test_a_view_and_a_url(tmp_path, source):
    rows = [5, 0, 13, 7]
    view = load_cache(source, dtype=torch.float32).select(rows)
    convert_cache(view, tmp_path / "new", payload="inline")
    samples = by_numpy(source)
    check_equal(load_cache(tmp_path / "new"), [samples[row] for row in rows])
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/new/", "memory://convert-source", recursive=True)
    convert_cache("memory://convert-source", tmp_path / "again")
    check_equal(load_cache(tmp_path / "again"), [samples[row] for row in rows])
    fs.rm("memory://convert-source", recursive=True)


def test_the_empty_prompt_comes_along(tmp_path, source):
    np.savez(source / "empty_prompt.npz", prompt_embeds=np.ones((3, 48), np.float32))
    for payload in ("shards", "inline", "npz"):
        convert_cache(source, tmp_path / payload, payload=payload)
        assert (tmp_path / payload / "empty_prompt.npz").read_bytes() == (source / "empty_prompt.npz").read_bytes()
        assert torch.equal(load_cache(tmp_path / payload).empty_prompt["prompt_embeds"], torch.ones(3, 48).bfloat16())
    convert_cache(source, tmp_path / "none", embeds="none")
    assert not (tmp_path / "none" / "empty_prompt.npz").exists()


# --- prompts once ---


def test_each_prompt_is_stored_once(tmp_path, repeated):
    plain = convert_cache(repeated, tmp_path / "inline", payload="inline", shard_bytes=SHARD)
    report = convert_cache(repeated, tmp_path / "new", shard_bytes=4000)
    assert (report.prompts, report.own_copies) == (4, 0) and report.blocks > 2
    keys = [key for file in (tmp_path / "new/shards").iterdir() for key in read_header(str(file))]
    assert len([key for key in keys if key.startswith("prompt_embeds.")]) == 4
    assert len([key for key in keys if key.startswith("txt_ids.")]) == 4
    assert len([key for key in keys if key.startswith("latents.")]) == ROWS
    check_equal(load_cache(tmp_path / "new"), by_numpy(repeated))
    assert plain.prompts == 4
    again = convert_cache(tmp_path / "new", tmp_path / "again", shard_bytes=4000)
    assert (again.prompts, again.own_copies) == (4, 0)
    names = [f"shards/part{n:05d}.safetensors" for n in range(report.blocks)]
    assert all((tmp_path / "new" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_other_embeddings_of_a_prompt_are_kept(tmp_path, repeated):
    """Row 9 differs clearly from row 1, row 10 by rounding from row 2, row 11 in its number of tokens from row 3."""
    table = pq.read_table(next(repeated.rglob("*.parquet")))
    files = [repeated / path for path in table.column("cache_path").to_pylist()]
    draw = np.random.default_rng(0)
    for row, change in {9: 0.1, 10: 0.001, 11: 0.0}.items():
        with np.load(files[row]) as stored:
            arrays = dict(stored)
        bits = torch.from_numpy(arrays["prompt_embeds"]).view(torch.bfloat16).float()
        bits *= 1 + change * torch.from_numpy(draw.standard_normal(bits.shape)).float()
        arrays["prompt_embeds"] = bits.bfloat16().view(torch.uint16).numpy()
        if row == 11:
            arrays |= {name: arrays[name][:7] for name in ("prompt_embeds", "text_ids")}
        np.savez(files[row], **arrays)
    shapes = [[12, 48]] * ROWS
    shapes[11] = [7, 48]
    change_index(repeated, lambda table: replace(table, prompt_embeds_shape=shapes))
    report = convert_cache(repeated, tmp_path / "new", shard_bytes=4000)
    assert (report.prompts, report.own_copies) == (4, 2)
    new, old = load_cache(tmp_path / "new"), by_numpy(repeated)
    for row in range(ROWS):
        stored = 2 if row == 10 else row
        assert torch.equal(new[row]["prompt_embeds"], old[stored]["prompt_embeds"]), row
    assert not torch.equal(old[10]["prompt_embeds"], old[2]["prompt_embeds"])


# --- fewer bytes ---


def test_fp8_and_its_error(tmp_path, source):
    for payload in ("shards", "inline"):
        report = convert_cache(source, tmp_path / payload, payload=payload, embeds="fp8")
        new, errors = load_cache(tmp_path / payload), []
        for read, exact in zip((new[row] for row in range(ROWS)), by_numpy(source), strict=True):
            difference = (read["prompt_embeds"].float() - exact["prompt_embeds"].float()).norm(dim=1)
            errors += (difference / exact["prompt_embeds"].float().norm(dim=1)).tolist()
            assert torch.equal(read["latents"], exact["latents"])
        assert report.fp8_error_mean == pytest.approx(np.mean(errors), rel=0.05)
        assert report.fp8_error_max == pytest.approx(np.max(errors), rel=0.1)
        assert 0.015 < report.fp8_error_mean < 0.035
    assert convert_cache(source, tmp_path / "bf16").fp8_error_mean is None


@pytest.mark.parametrize("payload", ["shards", "inline", "npz"])
def test_without_embeddings(tmp_path, source, payload):
    convert_cache(source, tmp_path / "new", payload=payload, embeds="none")
    new = load_cache(tmp_path / "new")
    check_equal(new, [{"latents": sample["latents"]} for sample in by_numpy(source)])
    assert new.captions == load_cache(source).captions
    assert "prompt_embeds_shape" not in new.index.column_names
    with pytest.raises(SciflowError, match="cache build"):
        convert_cache(tmp_path / "new", tmp_path / "back")
    convert_cache(tmp_path / "new", tmp_path / "other", payload="inline", embeds="none")
    check_equal(load_cache(tmp_path / "other"), [{"latents": sample["latents"]} for sample in by_numpy(source)])


def test_without_embeddings_needs_captions(tmp_path, source):
    change_index(source, lambda table: table.drop_columns(["caption"]))
    with pytest.raises(CacheError, match="caption"):
        convert_cache(source, tmp_path / "new", embeds="none")
    report = convert_cache(source, tmp_path / "bf16")
    assert report.prompts == ROWS
    change_index(source, lambda table: table.append_column("text", pa.array(["a"] * len(table))))
    convert_cache(source, tmp_path / "text", embeds="none")
    assert load_cache(tmp_path / "text").captions == ["a"] * ROWS


# --- interrupted, divided ---


@pytest.mark.parametrize("payload, codec", LAYOUTS)
def test_it_goes_on_where_it_stopped(tmp_path, repeated, payload, codec, caplog):
    def run():
        return convert_cache(repeated, tmp_path / "new", payload=payload, codec=codec, shard_bytes=4000)

    run()
    whole = contents(tmp_path / "new")
    assert run().written == 0
    names = sorted(whole.keys() - {"convert.json"})
    for name in names[2::3]:
        (tmp_path / "new" / name).unlink()
    (tmp_path / "new" / ".half.safetensors.1.tmp").write_bytes(b"half")
    for name in [name for name in names[::3] if not name.endswith(".npz")]:
        (tmp_path / "new" / name).write_bytes(whole[name][:-3])
    with caplog.at_level(logging.WARNING):
        run()
    assert contents(tmp_path / "new") == whole


@pytest.mark.parametrize("payload", ["shards", "inline", "npz"])
def test_ranks_make_what_one_process_makes(tmp_path, repeated, payload):
    options = {"payload": payload, "shard_bytes": 4000}
    convert_cache(repeated, tmp_path / "one", **options)
    first = convert_cache(repeated, tmp_path / "two", rank=0, world_size=2, **options)
    second = convert_cache(repeated, tmp_path / "two", rank=1, world_size=2, **options)
    assert first.waiting > 0 and second.waiting == 0
    assert first.written + second.written == second.blocks
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("payload", ["shards", "inline", "npz"])
def test_stopped_in_a_block(tmp_path, source, payload, monkeypatch):
    read = LatentCache.read
    calls = []

    def failing(self, row, members):
        calls.append(row)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return read(self, row, members)

    monkeypatch.setattr(LatentCache, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        convert_cache(source, tmp_path / "new", payload=payload, shard_bytes=SHARD)
    there = contents(tmp_path / "new")
    assert not [name for name in there if name.endswith(".tmp")]
    monkeypatch.undo()
    convert_cache(source, tmp_path / "new", payload=payload, shard_bytes=SHARD)
    convert_cache(source, tmp_path / "straight", payload=payload, shard_bytes=SHARD)
    whole = contents(tmp_path / "straight")
    assert contents(tmp_path / "new") == whole
    assert {name: whole[name] for name in there} == there


def test_a_broken_payload_stops_it_and_what_is_done_is_kept(tmp_path, source):
    file = source / pq.read_table(sorted(source.rglob("*.parquet"))[1]).column("cache_path")[4].as_py()
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CacheError) as caught:
        convert_cache(source, tmp_path / "new", shard_bytes=SHARD)
    for word in ("row 11", str(file), "kept"):
        assert word in str(caught.value)
    assert (tmp_path / "new/shards/part00000.safetensors").is_file()
    file.write_bytes(whole)
    report = convert_cache(source, tmp_path / "new", shard_bytes=SHARD)
    assert 0 < report.written < report.blocks
    check_equal(load_cache(tmp_path / "new"), by_numpy(source))


# --- refused ---


@pytest.mark.parametrize(
    "options, words",
    [
        ({"payload": "tar"}, ["payload", "tar"]),
        ({"shard_bytes": 0}, ["shard_bytes", "0"]),
        ({"rank": 2, "world_size": 2}, ["rank", "2"]),
        ({"payload": "npz", "codec": "zstd"}, ["npz", "zstd"]),
    ],
)
def test_wrong_options(tmp_path, source, options, words):
    with pytest.raises(SciflowError) as caught:
        convert_cache(source, tmp_path / "new", **options)
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "new").exists()


def test_an_output_that_holds_something_else(tmp_path, source):
    other = write_cache(tmp_path / "other", buckets={(32, 48): 3}, settings=encoder_settings("x"))
    convert_cache(source, tmp_path / "new")
    whole = contents(tmp_path / "new")
    for changed, options, words in [
        (source, {"codec": "zstd"}, ["codec", "'none'", "'zstd'"]),
        (source, {"payload": "inline"}, ["payload", "'shards'", "'inline'"]),
        (other, {}, [str(source), str(other), "`source` was"]),
    ]:
        with pytest.raises(SciflowError) as caught:
            convert_cache(changed, tmp_path / "new", **options)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    change_index(source, lambda table: replace(table, caption=["other"] * len(table)))
    with pytest.raises(SciflowError, match="plan"):
        convert_cache(source, tmp_path / "new")
    assert contents(tmp_path / "new") == whole
    with pytest.raises(SciflowError, match="not made by"):
        convert_cache(source, other)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "build.json").write_text("{}")
    with pytest.raises(SciflowError, match="not made by"):
        convert_cache(source, tmp_path / "begun")
    (tmp_path / "new" / "convert.json").write_text("{")
    with pytest.raises(SciflowError, match=r"convert\.json"):
        convert_cache(source, tmp_path / "new")


def test_output_and_source_lie_apart(tmp_path, source):
    for output in (source, source / "new", source / "2015", tmp_path, tmp_path / "x" / ".." / "source"):
        with pytest.raises(SciflowError, match="one must not be in the other"):
            convert_cache(source, output)
    with pytest.raises(SciflowError, match="one must not be in the other"):
        convert_cache(load_cache(source), source / "new")
    with pytest.raises(SciflowError, match="local folder"):
        convert_cache(source, "memory://new")


def test_rows_with_other_tensors(tmp_path, source):
    file = source / pq.read_table(sorted(source.rglob("*.parquet"))[0]).column("cache_path")[3].as_py()
    with np.load(file) as stored:
        np.savez(file, extra=np.ones(3, np.float32), **stored)
    with pytest.raises(CacheError) as caught:
        convert_cache(source, tmp_path / "new")
    assert "row 3" in str(caught.value) and "extra" in str(caught.value)


def test_a_disk_with_too_little_room_is_said_before(tmp_path, source, monkeypatch, caplog):
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with caplog.at_level(logging.WARNING):
        convert_cache(source, tmp_path / "new")
    assert "100 B free" in caplog.text


def test_settings_say_what_was_done(tmp_path, source):
    convert_cache(source, tmp_path / "new", payload="inline", codec="zstd")
    facts = json.loads((tmp_path / "new" / "convert.json").read_text())
    assert facts["settings"] | {"payload": "inline", "codec": "zstd", "embeds": "bf16"} == facts["settings"]
    assert facts["source"] == [str(source)]
