"""Shards and inline files that are broken, or whose index is: an error that names the file, or the right tensor."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stored_blocks import ROWS, data_file, make

from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError


def change_index(folder: Path, **columns: Any) -> None:
    """Replaces columns of the index of a shards cache; None removes one."""
    file = folder / "data_part00000.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.remove_column(at) if values is None else table.set_column(at, name, [values])
    pq.write_table(table, file)


def broken(folder: Path, *words: str) -> None:
    with pytest.raises(CacheError) as caught:
        load_cache(folder)[1]
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_a_file_cut_short_or_missing(tmp_path, payload):
    file = data_file(make(tmp_path, payload), payload)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    broken(tmp_path, str(file))
    file.unlink()
    broken(tmp_path, str(tmp_path))


def test_a_length_inside_an_inline_file_that_is_wrong(tmp_path):
    file = data_file(make(tmp_path, "inline"), "inline")
    member, data = load_cache(tmp_path).members(1)["latents"], bytearray(file.read_bytes())
    data[member.offset - 4] ^= 1
    file.write_bytes(data)
    broken(tmp_path, "row 1", "1.png", str(file), "`latents`")


def test_an_inline_file_written_by_others(tmp_path):
    """Compressed pages cannot be read by offset: said so, not misread."""
    file = data_file(make(tmp_path, "inline"), "inline")
    pq.write_table(pq.read_table(file), file, compression="snappy", use_dictionary=False)
    broken(tmp_path, str(file), "not one plain page")


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"latents_offset": None}, ["lacks", "latents_offset"]),
        ({"latents_offset": pa.array([0, None, 1, 1, 1, 1])}, ["latents_offset", "1"]),
        ({"latents_offset": pa.array([0, -8, 1, 1, 1, 1])}, ["latents_offset", "-8"]),
        ({"latents_nbytes": pa.array(["x"] * ROWS)}, ["latents_nbytes", "whole"]),
        ({"latents_nbytes": pa.array([16] * ROWS)}, ["row 1", "latents"]),
        ({"latents_offset": pa.array([2**62] * ROWS)}, ["row 1", "latents"]),
        ({"time_ids_shape": pa.array([[-1]] * ROWS)}, ["time_ids_shape"]),
        ({"time_ids_shape": pa.array([1] * ROWS)}, ["time_ids_shape"]),
        ({"time_ids_shape": pa.array([[2], [2, 1]] * 3)}, ["time_ids_shape"]),
        ({"prompt_embeds_path": pa.array(["../x"] * ROWS)}, ["prompt_embeds_path", "../x"]),
        ({"prompt_embeds_path": pa.array(["/etc/passwd"] * ROWS)}, ["prompt_embeds_path", "/etc/passwd"]),
        ({"prompt_embeds_path": pa.array(["shards/gone.safetensors"] * ROWS)}, ["gone.safetensors", "missing"]),
    ],
)
def test_an_index_that_is_wrong(tmp_path, columns, words):
    change_index(make(tmp_path, "shards"), **columns)
    broken(tmp_path, *words)


@pytest.mark.parametrize(
    "change", [{"tensors": {}}, {"tensors": {"latents": {"dtype": "F4", "codec": "none"}}}, {"layout": "tar"}]
)
def test_metadata_that_is_wrong(tmp_path, change):
    file = make(tmp_path, "shards") / "data_part00000.parquet"
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"sciflow_hf"])
    facts["payload"] |= change
    pq.write_table(table.replace_schema_metadata({b"sciflow_hf": json.dumps(facts).encode()}), file)
    broken(tmp_path, str(file))


def mutate(data: bytes, rng: random.Random, first: int, last: int) -> bytes:
    """Changes, inserts or removes bytes somewhere in [first, last), or cuts the file there."""
    at, kind = rng.randrange(first, last), rng.randrange(4)
    some = rng.randbytes(rng.choice([1, 1, 2, 8]))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + some + data[at:]
    if kind == 2:
        return data[:at] + data[min(at + len(some), last) :]
    return data[:at] + some[: last - at] + data[min(at + len(some), last) :]


@pytest.mark.parametrize("codec, embeds", [("none", "bf16"), ("zstd", "bf16"), ("none", "fp8"), ("zstd", "fp8")])
def test_mutated_shards(tmp_path, codec, embeds):
    """Outside of the data: the right tensor, or an error with the file. Inside: a tensor of its shape, or an error."""
    file = data_file(make(tmp_path, "shards", embeds, codec), "shards")
    data, rng = file.read_bytes(), random.Random(f"{codec} {embeds}")
    header = 8 + int.from_bytes(data[:8], "little")
    whole = [load_cache(tmp_path)[row] for row in range(ROWS)]
    wrong = {"same": 0, "refused": 0, "other values": 0}
    for number in range(400):
        inside = number % 2 == 0
        changed = mutate(data, rng, *((header, len(data)) if inside else (0, header)))
        file.write_bytes(changed)
        row = rng.randrange(ROWS)
        try:
            read = load_cache(tmp_path)[row]
        except CacheError as error:
            assert str(file) in str(error)
            wrong["refused"] += 1
            continue
        assert {k: (v.shape, v.dtype) for k, v in read.items()} == {
            k: (v.shape, v.dtype) for k, v in whole[row].items()
        }
        same = all(torch.equal(value, whole[row][name]) for name, value in read.items() if not value.isnan().any())
        wrong["same" if same else "other values"] += 1
        assert same or inside, f"mutation {number} of the header gave other values"
    assert all(wrong.values()), wrong


def test_mutated_inline_files(tmp_path):
    """As of shards; what a changed index says is what counts, so values are compared where shapes are the same."""
    file = data_file(make(tmp_path, "inline"), "inline")
    data, rng = file.read_bytes(), random.Random(4)
    for _ in range(300):
        file.write_bytes(mutate(data, rng, 0, len(data)))
        try:
            read = load_cache(tmp_path)[rng.randrange(ROWS)]
        except CacheError as error:
            assert str(tmp_path) in str(error)
        else:
            assert read["latents"].dtype == torch.bfloat16 and read["latents"].ndim == 3
