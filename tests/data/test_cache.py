"""Reading caches: all dtypes of the npz layout, views, splits, and the check against a family."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from caches import edit, encoder_settings, index_files, payload_of, resave, write_cache
from torch.utils.data import DataLoader

from sciflow_hf.data.cache import LatentCache
from sciflow_hf.data.layouts.base import read_members
from sciflow_hf.data.layouts.npz import npz_members
from sciflow_hf.data.load import load_cache
from sciflow_hf.diffusion.randomness import hash64
from sciflow_hf.errors import CacheError, SciflowError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache", settings={"family": "x"})


# --- what is read ---


@pytest.mark.promise("A16")
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32])
def test_every_stored_dtype_reads_as_every_dtype(tmp_path: Path, stored: str, wanted: torch.dtype) -> None:
    folder = write_cache(tmp_path, dtype=stored, buckets={(32, 48): 2, (48, 32): 1})
    cache = load_cache(folder, dtype=wanted)
    for i, path in enumerate(pq.read_table(index_files(folder)[0]).column("cache_path").to_pylist()):
        sample = cache[i]
        assert sorted(sample) == ["latents", "prompt_embeds", "txt_ids"]
        with np.load(folder / path) as arrays:
            for name in ("latents", "prompt_embeds"):
                values = arrays[name]
                if stored == "bfloat16":  # the upper half of a float32
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                expected = torch.from_numpy(values.astype(np.float32)).to(wanted)
                assert sample[name].dtype == wanted and torch.equal(sample[name], expected)
            assert sample["txt_ids"].dtype == torch.int64
            assert torch.equal(sample["txt_ids"], torch.from_numpy(arrays["text_ids"]))


def test_float16_to_bfloat16_equals_the_direct_cast(tmp_path: Path) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    many = every.repeat(5)[: 3 * (1 << 16) + 7].reshape(-1, 1)  # longer than a chunk, not a multiple of it
    np.savez(tmp_path / "x.npz", values=many.numpy())
    result = read_members(npz_members(str(tmp_path / "x.npz"), "x").values(), torch.bfloat16, "x")["values"]
    expected = many.to(torch.bfloat16)
    assert result.shape == expected.shape and result.dtype == torch.bfloat16
    finite = many.isfinite()
    assert torch.equal(result[finite], expected[finite])
    assert torch.equal(result.isnan(), many.isnan())


@pytest.mark.parametrize(
    "write",
    [
        str,
        lambda s: str(tuple(s)),
        lambda s: ",".join(map(str, s)),
        lambda s: f" [ {s[0]} {' '.join(map(str, s[1:]))} ]",
    ],
)
def test_shapes_may_be_strings(tmp_path: Path, write: Callable[[list[int]], str]) -> None:
    lists = load_cache(write_cache(tmp_path / "lists"))
    folder = write_cache(tmp_path / "strings")
    change = {name: lambda shapes: list(map(write, shapes)) for name in ("latent_shape", "prompt_embeds_shape")}
    edit(index_files(folder)[0], **change)
    strings = load_cache(folder)
    assert strings.batch_keys == lists.batch_keys and strings.fingerprint == lists.fingerprint
    assert strings[5]["latents"].shape == lists[5]["latents"].shape


def test_extra_arrays_pass_through(folder: Path) -> None:
    extras = {
        "pooled_prompt_embeds": np.array([0.5, -2.0], np.float16),
        "pooled_bits": np.array([0x3F80], np.uint16),  # 1.0 in bfloat16
        "prompt_embeds_mask": np.array([1, 0], np.uint8),
        "flags": np.array([True, False]),
        "note": np.array("a text is not a tensor"),
    }
    resave(payload_of(folder), **extras)
    sample = load_cache(folder, dtype=torch.float32)[0]
    assert torch.equal(sample["pooled_prompt_embeds"], torch.tensor([0.5, -2.0]))
    assert torch.equal(sample["pooled_bits"], torch.tensor([1.0]))
    assert torch.equal(sample["prompt_embeds_mask"], torch.tensor([1, 0]))
    assert torch.equal(sample["flags"], torch.tensor([True, False])) and "note" not in sample


def test_big_endian_and_fortran_arrays_read_alike(folder: Path) -> None:
    before = load_cache(folder, dtype=torch.float32)[0]
    with np.load(payload_of(folder)) as stored:
        latents = np.asfortranarray(stored["latents"].astype(">f4"))
    resave(payload_of(folder), latents=latents)
    assert torch.equal(load_cache(folder, dtype=torch.float32)[0]["latents"], before["latents"])


@pytest.mark.promise("A15")
def test_parts_are_joined_and_described(tmp_path: Path) -> None:
    whole = load_cache(write_cache(tmp_path / "one", settings={"family": "x", "max_sequence_length": 12}))
    parts = load_cache(write_cache(tmp_path / "three", settings={"family": "x", "max_sequence_length": 12}, parts=3))
    assert len(whole) == len(parts) == 24 and parts.metadata == {"family": "x", "max_sequence_length": 12}
    assert parts.row_ids == whole.row_ids and parts.fingerprint == whole.fingerprint
    assert parts.index.num_rows == 24 and parts.index[20]["image_path"] == parts.row_ids[20]
    assert parts.buckets[:3] == [(32, 48), (48, 32), (24, 64)]
    assert parts.batch_keys[1] == (48, 32, 12)
    assert parts.describe(3).startswith("row 3 (1501.00001/1501.00001_1.png, payload 2015/1501.00001/")
    size, missing = parts.payload_bytes()
    assert missing == 0 and size == sum(file.stat().st_size for file in (tmp_path / "three").rglob("*.npz"))


@pytest.mark.promise("A02")
def test_several_caches_are_one(tmp_path: Path) -> None:
    folders = [
        write_cache(tmp_path / year, settings={"a": 1}, year=year, seed=n) for n, year in enumerate(("2015", "2016"))
    ]
    cache = load_cache(folders, dtype=torch.float32)
    assert len(cache) == 48
    for n, folder in enumerate(folders):
        assert torch.equal(cache[24 * n + 5]["latents"], load_cache(folder, dtype=torch.float32)[5]["latents"])
    with pytest.raises(CacheError, match="twice"):
        load_cache([folders[0], folders[0]])


def test_select_is_a_view_in_the_given_order(folder: Path) -> None:
    cache = load_cache(folder)
    view = cache.select([7, 3, -1]).select([1, 2])
    assert isinstance(view, LatentCache) and len(view) == 2
    assert view.row_ids == [cache.row_ids[3], cache.row_ids[23]] and view.buckets[0] == cache.buckets[3]
    assert view.index["image_path"] == view.row_ids
    assert torch.equal(view[1]["latents"], cache[23]["latents"]) and view.describe(0) == cache.describe(3)
    assert view.fingerprint != cache.fingerprint
    assert len(cache.select([])) == 0
    with pytest.raises(SciflowError, match="24 rows"):
        cache.select([24])
    with pytest.raises(IndexError):
        view[2]


def test_fingerprint_follows_the_content_not_the_place(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    before = load_cache(folder).fingerprint
    assert load_cache(moved).fingerprint == before and len(before) == 16
    edit(index_files(moved)[0], image_path=lambda names: [None] * len(names))
    relative = load_cache(moved).fingerprint
    assert relative != before
    edit(index_files(moved)[0], cache_path=lambda paths: [str(moved / path) for path in paths])
    assert load_cache(moved).fingerprint == relative, "absolute paths count as relative to the cache"
    edit(index_files(folder)[0], bucket_h=lambda heights: [heights[0] + 8, *heights[1:]])
    assert load_cache(folder).fingerprint != before


def test_a_cache_goes_to_worker_processes(folder: Path) -> None:
    cache = load_cache(folder).select(range(4))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.row_ids == cache.row_ids and torch.equal(copy[1]["latents"], cache[1]["latents"])
    loader = DataLoader(cache, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [sample["latents"].shape for sample in loader] == [cache[i]["latents"].shape for i in range(4)]


# --- the split ---


def test_split_keeps_groups_together_and_old_rows_in_place(tmp_path: Path) -> None:
    small = load_cache(write_cache(tmp_path / "small", buckets={(32, 48): 60, (48, 32): 60}, figures_per_paper=3))
    large = load_cache(write_cache(tmp_path / "large", buckets={(32, 48): 90, (48, 32): 90}, figures_per_paper=3))
    assert large.row_ids[:120] == small.row_ids
    parts = [cache.split(0.3) for cache in (small, large)]
    for cache, (train, held_out) in zip((small, large), parts, strict=True):
        assert sorted(train.row_ids + held_out.row_ids) == sorted(cache.row_ids)
        assert not set(train.groups) & set(held_out.groups)
        assert 0.1 < len(held_out) / len(cache) < 0.5
    sides = [dict.fromkeys(train.row_ids, 0) | dict.fromkeys(held.row_ids, 1) for train, held in parts]
    assert sides[0].items() <= sides[1].items(), "adding rows moves none of the old ones"
    assert set(small.split(0.1)[1].groups) < set(parts[0][1].groups), "a larger fraction keeps what was held out"


def test_split_takes_the_image_where_there_is_no_paper(folder: Path) -> None:
    papers = load_cache(folder).groups
    edit(index_files(folder)[0], paper_id=lambda ids: [None, "", *ids[2:]])
    cache = load_cache(folder)
    assert cache.groups == [*cache.row_ids[:2], *papers[2:]]
    edit(index_files(folder)[0], image_path=lambda names: [None, *names[1:]])
    assert load_cache(folder).groups[0] == payload_of(folder).relative_to(folder).as_posix()


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_split_refuses_other_fractions(folder: Path, fraction: float) -> None:
    with pytest.raises(SciflowError, match="`eval_fraction` is"):
        load_cache(folder).split(fraction)


def test_split_of_nothing_takes_a_stand_in_and_of_all_refuses(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = load_cache(folder)
    train, held_out = cache.split(1e-9)
    (group,) = set(held_out.groups)
    assert group == min(cache.groups, key=lambda name: hash64(name, "eval split")) and group not in train.groups
    assert len(train) + len(held_out) == 24
    alone = cache.select([i for i, name in enumerate(cache.groups) if name == group])
    train, held_out = alone.split(1e-9)
    assert (len(train), len(held_out)) == (len(alone), 0) and "there is one group only" in caplog.text
    with pytest.raises(SciflowError, match="nothing to train on"):
        load_cache(folder).split(1 - 1e-9)


# --- the family ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("family", "qwen_image"),
        ("pretrained_model_name_or_path", "user/other"),
        ("revision", "v2"),
        ("max_sequence_length", 256),
        ("text_encoder_layers", [10, 20, 30]),
        ("padding_side", "left"),
    ],
)
def test_another_encoder_is_refused_naming_both(tmp_path: Path, key: str, value: Any) -> None:
    settings = encoder_settings("user/klein")
    cache = load_cache(write_cache(tmp_path, settings=settings))
    cache.check_family(settings | {"text_encoder_layers": (9, 18, 27)})
    with pytest.raises(CacheError) as caught:
        cache.check_family(settings | {key: value})
    assert repr(settings[key]) in str(caught.value) and repr(value) in str(caught.value)
    assert str(caught.value).count(" in the cache and ") == 1


def test_a_local_model_may_be_named_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "klein").mkdir()
    cache = load_cache(write_cache(tmp_path / "cache", settings=encoder_settings(tmp_path / "klein")))
    monkeypatch.chdir(tmp_path)
    cache.check_family(encoder_settings("klein"))
    os.mkdir("other")
    with pytest.raises(CacheError, match="'other'"):
        cache.check_family(encoder_settings("other"))


def test_the_empty_prompt_is_read_with_the_same_checks(folder: Path) -> None:
    assert load_cache(folder).empty_prompt is None
    embeds = np.arange(12 * 48, dtype=np.float32).reshape(12, 48)
    np.savez(
        folder / "empty_prompt.npz",
        prompt_embeds=embeds,
        text_ids=np.zeros((12, 4), int),
        latents=np.zeros(3),
    )
    empty = load_cache(folder, dtype=torch.float32).select([3]).empty_prompt
    assert empty is not None and sorted(empty) == ["prompt_embeds", "txt_ids"]
    assert torch.equal(empty["prompt_embeds"], torch.from_numpy(embeds))
    np.savez(folder / "empty_prompt.npz", prompt_embeds=embeds[:, :40])
    with pytest.raises(CacheError, match=r"empty_prompt.npz.*48"):
        _ = load_cache(folder).empty_prompt
    np.savez(folder / "empty_prompt.npz", prompt_embeds=np.array([None]))
    with pytest.raises(CacheError, match="pickled"):
        _ = load_cache(folder).empty_prompt
