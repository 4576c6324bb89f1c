"""Shards and inline files: what other programs read in them, what ours reads back, and what breaks them."""

import errno
import json
import os
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from stored_blocks import NAMES, ROWS, SETTINGS, data_file, light, make, samples, write_block

from sciflow_hf.data.build import blocks
from sciflow_hf.data.build.blocks import cut_blocks, locked, prompt_hash
from sciflow_hf.data.layouts import inline, shards
from sciflow_hf.data.layouts.base import Layout
from sciflow_hf.data.layouts.shards import read_header
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError, SciflowError


def unzstd(data: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """As the format is described: 16-bit values are zstd of the high bytes, then the low bytes."""
    numel = int(np.prod(shape))
    if dtype.itemsize != 2:
        plain = pa.Codec("zstd").decompress(data, numel * dtype.itemsize, asbytes=True)
    else:
        high = pa.Codec("zstd").decompress(data[:-numel], numel, asbytes=True)
        plain = bytes(byte for pair in zip(data[-numel:], high, strict=True) for byte in pair)
    return torch.frombuffer(bytearray(plain), dtype=dtype).reshape(shape)


# --- what is stored ---


@pytest.mark.parametrize("embeds", ["bf16", "fp8", "none"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("payload", ["shards", "inline"])
@pytest.mark.parametrize("kept", [1, 64 << 20], ids=["streamed", "kept"])
def test_every_layout_reads_back(tmp_path, monkeypatch, payload, codec, embeds, kept):
    monkeypatch.setattr(shards, "_KEPT_IN_MEMORY", kept)
    cache = load_cache(make(tmp_path, payload, embeds, codec))
    text = {"prompt_embeds", "txt_ids", "prompt_embeds_mask"}
    for row, sample in enumerate(samples()):
        sample["txt_ids"] = sample.pop("text_ids")
        read = cache[row]
        assert read.keys() == (sample.keys() - text if embeds == "none" else sample.keys())
        for name, value in read.items():
            if embeds == "fp8" and name == "prompt_embeds":
                continue
            assert value.dtype == sample[name].dtype and torch.equal(value, sample[name]), name
    assert cache.row_ids == [f"{row}.png" for row in range(ROWS)]
    assert cache.metadata["embeds"] == embeds and cache.metadata["family"] == "x"


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_fp8_is_e4m3_with_a_scale_per_token(tmp_path, payload):
    rows, draw = samples(), torch.Generator().manual_seed(0)
    for sample in rows:
        sample["prompt_embeds"] = torch.randn(sample["prompt_embeds"].shape, generator=draw).mul(3).bfloat16()
    rows[2]["prompt_embeds"][1] = 0
    rows[3]["prompt_embeds"][1, 2] = 1e30  # an outlier costs its own token alone
    write_block(tmp_path, "part00000", light(), rows, Layout(payload, "fp8"))
    cache = load_cache(tmp_path)
    for row, sample in enumerate(rows):
        exact, read = sample["prompt_embeds"].float(), cache[row]["prompt_embeds"].float()
        largest = exact.abs().amax(dim=1, keepdim=True)
        scaled = torch.where(largest > 0, exact / (largest / 448), 0.0)
        # The grid of e4m3: 3 bits of fraction, down to 2**-9.
        step = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=2**-6)))) / 8
        expected = torch.round(scaled / step) * step * (largest / 448)
        assert torch.allclose(read, expected, rtol=2**-8, atol=0)
        assert ((read - exact).norm(dim=1) <= 0.035 * exact.norm(dim=1))[largest[:, 0] < 1e29].all()


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("kept", [1, 64 << 20], ids=["streamed", "kept"])
def test_safetensors_reads_the_shards(tmp_path, monkeypatch, codec, kept):
    monkeypatch.setattr(shards, "_KEPT_IN_MEMORY", kept)
    file = data_file(make(tmp_path, "shards", codec=codec), "shards")
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for entry in json.loads(data[8:start]).values():
        assert "dtype" not in entry or (start + entry["data_offsets"][0]) % 8 == 0 or entry["dtype"] == "U8"
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["sciflow_hf"])
        for row, sample in enumerate(samples()):
            digest = prompt_hash(f"caption {row}", SETTINGS)
            sample["txt_ids"] = sample.pop("text_ids")
            for name, value in sample.items():
                text = name in ("prompt_embeds", "txt_ids", "prompt_embeds_mask")
                key = f"{name}.{digest}" if text else f"{name}.{row}"
                stored = opened.get_tensor(key)
                assert facts[key][3] == zlib.crc32(stored.contiguous().view(-1).view(torch.uint8).numpy())
                if codec == "zstd":
                    assert stored.dtype == torch.uint8
                    stored = unzstd(stored.numpy().tobytes(), value.dtype, facts[key][1])
                assert torch.equal(stored, value), key


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_parquet_readers_read_the_inline_files(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(inline, "ROW_GROUP_BYTES", 2000)
    make(tmp_path / "cache", "inline", codec=codec)
    file = data_file(tmp_path / "cache", "inline")
    import datasets

    table = pq.read_table(file)
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "hf"))
    for row, sample in enumerate(samples()):
        sample["txt_ids"] = sample.pop("text_ids")
        for name, value in sample.items():
            stored = table.column(name)[row].as_py()
            assert stored == rows[row][name]
            assert zlib.crc32(stored) == table.column(f"{name}_crc32")[row].as_py()
            if codec == "zstd":
                assert torch.equal(unzstd(stored, value.dtype, list(value.shape)), value)
            else:
                assert stored == value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert rows["caption"][:] == light().column("caption").to_pylist()
    metadata = pq.read_metadata(file)
    assert metadata.num_row_groups > 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        payload = [column for column in columns if column.path_in_schema in NAMES]
        assert columns[-len(NAMES) :] == payload, "the light columns come first"
        assert sum(column.total_compressed_size for column in payload) < 2400 or group.num_rows == 1
        for column in payload:
            assert column.compression == "UNCOMPRESSED" and not column.has_dictionary_page
            assert not column.is_stats_set


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_members_lead_to_the_bytes_of_the_index(tmp_path, payload, codec, monkeypatch):
    monkeypatch.setattr(inline, "ROW_GROUP_BYTES", 2000)
    make(tmp_path, payload, "fp8", codec)
    cache, table = load_cache(tmp_path), pq.read_table(tmp_path / "data_part00000.parquet")
    names = set(cache.metadata["payload"]["tensors"])
    assert names == {*NAMES, "prompt_embeds_scale"}
    for row in range(ROWS):
        members = cache.members(row)
        members["prompt_embeds_scale"] = members["prompt_embeds"].scale
        for name in names:
            member = members[name]
            data = Path(member.file).read_bytes()[member.offset : member.offset + member.nbytes]
            assert len(data) == member.nbytes and zlib.crc32(data) == table.column(f"{name}_crc32")[row].as_py(), name


def test_an_index_that_names_rows_of_inline_files(tmp_path, monkeypatch):
    """What `verify --repair` leaves: some rows of two files, in another order."""
    monkeypatch.setattr(inline, "ROW_GROUP_BYTES", 2000)
    folder = make(tmp_path / "cache", "inline")
    write_block(folder, "part00001", light(), reversed(samples()), Layout("inline"))
    chosen = [(1, 4), (0, 5), (1, 0), (0, 0)]
    tables = [pq.read_table(folder / f"data_part0000{n}.parquet").drop_columns(list(NAMES)) for n in (0, 1)]
    rows = [
        {"cache_path": f"data_part0000{n}.parquet", "inline_row": row} | tables[n].slice(row, 1).to_pylist()[0]
        for n, row in chosen
    ]
    index = pa.Table.from_pylist(rows).replace_schema_metadata(tables[0].schema.metadata)
    pq.write_table(index, tmp_path / "repaired.parquet")
    cache = load_cache(tmp_path / "repaired.parquet", payload_dir=folder)
    for i, (n, row) in enumerate(chosen):
        expected = samples()[ROWS - 1 - row if n else row]
        assert torch.equal(cache[i]["prompt_embeds"], expected["prompt_embeds"])
        assert torch.equal(cache[i]["latents"], expected["latents"])


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_remote(tmp_path, payload, monkeypatch):
    monkeypatch.setattr(inline, "ROW_GROUP_BYTES", 2000)
    make(tmp_path, payload, codec="zstd")
    root = f"memory://layouts-{payload}"
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/", root, recursive=True)
    here, there = load_cache(tmp_path), load_cache(root)
    for row in range(ROWS):
        for name, value in here[row].items():
            assert torch.equal(there[row][name], value)
    fs.rm(root, recursive=True)


# --- writing ---


def test_prompts_are_stored_once_and_found_in_other_blocks(tmp_path):
    """Block 1 refers to block 0; a copy of its own is kept apart."""
    rows, layout = samples(), Layout("shards")
    hashes = ["a" * 16, "b" * 16, "a" * 16]
    plain = {name: value for name, value in rows[2].items() if name in ("latents", "loss_mask", "time_ids")}
    write_block(tmp_path, "part00000", light(3), [*rows[:2], plain], layout, prompts=hashes)
    owners = dict.fromkeys(["a" * 16, "b" * 16], "part00000")
    hashes = ["b" * 16, "c" * 16, "a" * 16]
    plain = {name: value for name, value in rows[3].items() if name in ("latents", "loss_mask", "time_ids")}
    write_block(tmp_path, "part00001", light(3), [plain, *rows[4:]], layout, prompts=hashes, owners=owners)
    keys = [set(read_header(str(tmp_path / f"shards/part0000{n}.safetensors"))) for n in (0, 1)]
    embeds = [{key for key in found if key.startswith("prompt_embeds.")} for found in keys]
    assert embeds == [
        {f"prompt_embeds.{letter * 16}" for letter in "ab"},
        {f"prompt_embeds.{'c' * 16}", f"prompt_embeds.{'a' * 16}.2"},
    ]
    parts = [load_cache(tmp_path / f"data_part0000{n}.parquet") for n in (0, 1)]
    got = [part[row]["prompt_embeds"] for part in parts for row in range(3)]
    for found, row in zip(got, [0, 1, 0, 1, 4, 5], strict=True):
        assert torch.equal(found, rows[row]["prompt_embeds"])


def test_prompt_hash_depends_on_caption_and_encoder_alone():
    base = prompt_hash("a", SETTINGS)
    assert len(base) == 16 and int(base, 16) >= 0
    assert prompt_hash("a", SETTINGS | {"version": "9", "dtype": "fp16"}) == base
    assert base not in {prompt_hash("b", SETTINGS), prompt_hash("a", SETTINGS | {"max_sequence_length": 13})}


def test_rows_are_cut_into_blocks():
    assert cut_blocks([3, 3, 3, 10, 1, 1], 6) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut_blocks([], 6) == [] and cut_blocks([9], 1) == [range(1)]
    assert [len(block) for block in cut_blocks([0] * (blocks.MAX_ROWS + 1), 6)] == [blocks.MAX_ROWS, 1]


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_an_error_leaves_no_file(tmp_path, payload, monkeypatch):
    def broken():
        yield from samples()[:4]
        raise CacheError("row 4 is broken")

    monkeypatch.setattr(shards, "_KEPT_IN_MEMORY", 1)
    monkeypatch.setattr(inline, "ROW_GROUP_BYTES", 2000)
    with pytest.raises(CacheError, match="row 4 is broken"):
        write_block(tmp_path, "part00000", light(), broken(), Layout(payload))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SciflowError, match="full"):
        make(tmp_path, payload)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_rows_of_a_block_hold_the_same_tensors(tmp_path):
    rows = samples()
    del rows[4]["loss_mask"]
    for payload in ("shards", "inline"):
        with pytest.raises(CacheError, match="loss_mask"):
            write_block(tmp_path / payload, "part00000", light(), rows, Layout(payload))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"payload": "tar"}, "npz, shards, inline"),
        ({"embeds": "int8"}, "bf16, fp8, none"),
        ({"codec": "gzip"}, "none, zstd"),
        ({"payload": "npz", "embeds": "fp8"}, "shards or inline"),
        ({"payload": "npz", "codec": "zstd"}, "shards or inline"),
    ],
)
def test_layouts_that_do_not_exist(options, word):
    with pytest.raises(SciflowError, match=word):
        Layout(**options)


def test_a_second_writer_is_refused(tmp_path):
    with locked(tmp_path / "new"), pytest.raises(SciflowError, match="another"), locked(tmp_path / "new"):
        pass
    with locked(tmp_path / "new"):
        pass
