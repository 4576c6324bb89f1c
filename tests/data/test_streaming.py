"""Streams: an epoch shows what a map-style epoch shows, on any number of ranks, and goes on where it was left."""

import itertools
import json
import pickle
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import TINY_EMBED_DIM, write_cache

from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader
from sciflow_hf.data.batches.threads import release
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.data.stream.loader import StreamLoader
from sciflow_hf.data.stream.order import EpochRows
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.diffusion.randomness import hash64, noise_keys
from sciflow_hf.errors import CacheError, SciflowError

BUCKETS = {(32, 48): 23, (48, 32): 11, (24, 64): 5}
ROWS = sum(BUCKETS.values())


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """39 samples of three buckets and two text lengths, in four index files. Read only."""
    settings = {"family": "flux2_klein", "max_sequence_length": 12}
    folder = tmp_path_factory.mktemp("stream") / "npz"
    return write_cache(
        folder, buckets=BUCKETS, text_lengths=[12, 7], dtype="bfloat16", parts=4, settings=settings, figures_per_paper=3
    )


def index_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def take(loader: StreamLoader | BucketLoader, count: int) -> list[dict[str, Any]]:
    """The next batches, copied."""
    batches = []
    for batch in itertools.islice(iter(loader), count):
        batches.append({name: value.clone() for name, value in batch.items()})
        release(batch)
    loader.close()
    return batches


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def batches_of_epoch(ranks: list[list[dict[str, Any]]], epoch: int, seed: int) -> int:
    """How many micro-batches of the first rank are of that epoch, told by the keys."""
    return sum(
        torch.equal(batch["noise_key"], noise_keys(seed, epoch, batch["position"].tolist())) for batch in ranks[0]
    )


# -- an epoch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, batch_size, accumulation", [(1, 1, 1), (2, 1, 3), (4, 2, 1), (1, 3, 2), (3, 2, 2)])
@pytest.mark.parametrize("shuffle_buffer", [0, 7, 1000])
def test_an_epoch_shows_every_sample(npz: Path, ranks, batch_size, accumulation, shuffle_buffer: int) -> None:
    cache, total = load_cache(npz), ranks * batch_size * accumulation
    keys = np.array(cache.batch_keys)
    counts = Counter(map(tuple, keys.tolist()))
    tail = sum(-(-(count % total) // batch_size) for count in counts.values())
    steps = sum(count // total for count in counts.values()) + -(-tail // (ranks * accumulation))
    stream = StreamingCache(npz, shuffle_buffer=shuffle_buffer)
    loaders = [
        StreamLoader(
            stream, batch_size=batch_size, num_replicas=ranks, rank=rank, accumulation_steps=accumulation, seed=5
        )
        for rank in range(ranks)
    ]
    taken = [take(loader, 2 * steps * accumulation) for loader in loaders]
    for epoch in (0, 1):
        half = [batches[epoch * steps * accumulation :][: steps * accumulation] for batches in taken]
        rows = [row for batches in half for batch in batches for row in batch["row"].tolist()]
        assert set(rows) == set(range(ROWS))
        assert len(rows) == steps * total
        positions = [place for batches in half for batch in batches for place in batch["position"].tolist()]
        assert sorted(positions) == list(range(steps * total))
        assert batches_of_epoch(half, epoch, seed=5) == steps * accumulation
        full = sum(count // total for count in counts.values())
        for step in range(steps):
            group = [batches[step * accumulation :][:accumulation] for batches in half]
            for batch in itertools.chain(*group):
                assert len({tuple(keys[row]) for row in batch["row"]}) == 1
            if step < full:  # one bucket on all ranks, and no row twice
                members = [row for batch in itertools.chain(*group) for row in batch["row"].tolist()]
                assert len({tuple(keys[row]) for row in members}) == 1 and len(set(members)) == total
        for batch in half[0]:
            assert torch.equal(batch["latents"][0], cache[int(batch["row"][0])]["latents"])
    orders = [[batch["row"].tolist() for batch in taken[0][start::2]] for start in (0, 1)]
    assert orders[0] != orders[1]


def test_groups_do_not_depend_on_how_the_total_batch_splits(npz: Path) -> None:
    stream = StreamingCache(npz, shuffle_buffer=10)

    def positions(ranks: int, batch_size: int, accumulation: int) -> dict[int, tuple[int, int]]:
        found = {}
        for rank in range(ranks):
            sizes = {"batch_size": batch_size, "num_replicas": ranks, "accumulation_steps": accumulation}
            loader = StreamLoader(stream, rank=rank, seed=1, threads=0, **sizes)
            for batch in take(loader, 7 * accumulation):
                places = zip(
                    batch["position"].tolist(), batch["row"].tolist(), batch["noise_key"].tolist(), strict=True
                )
                found |= {place: (row, key) for place, row, key in places}
        return found

    one = positions(1, 4, 1)
    assert len(one) == 28 and one == positions(4, 1, 1) == positions(2, 1, 2) == positions(1, 1, 4)


@pytest.mark.parametrize("layout", ["shards", "inline"])
def test_layouts_stream_the_same_samples(npz: Path, tmp_path: Path, layout: str) -> None:
    converted = convert_cache(npz, tmp_path / "out", payload=layout).output_dir
    wanted = take(StreamLoader(StreamingCache(npz, shuffle_buffer=0), batch_size=2), 12)
    same(take(StreamLoader(StreamingCache(converted, shuffle_buffer=0), batch_size=2), 12), wanted)
    for one, other in zip(load_cache(npz), StreamingCache(converted, shuffle_buffer=0), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("latents", "prompt_embeds", "txt_ids"))


@pytest.mark.parametrize("ranks, batch_size, accumulation", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2)])
def test_a_stream_in_the_order_of_a_map_style_epoch_is_that_epoch(
    npz: Path, tmp_path: Path, ranks: int, batch_size: int, accumulation: int
) -> None:
    cache = load_cache(npz)
    sizes = {"batch_size": batch_size, "num_replicas": ranks, "accumulation_steps": accumulation}
    samplers = [BucketBatchSampler(cache.batch_keys, rank=rank, seed=9, **sizes) for rank in range(ranks)]
    places = {}
    for sampler in samplers:
        for number, rows in enumerate(sampler.batches()):
            places |= dict(zip(sampler.positions(number), rows, strict=True))
    order = list(dict.fromkeys(places[position] for position in sorted(places)))
    inline = convert_cache(cache.select(order), tmp_path / "inline", payload="inline").output_dir
    stream, fillers = StreamingCache(inline, shuffle_buffer=0), 0
    for rank, sampler in enumerate(samplers):
        wanted = take(BucketLoader(cache, sampler), len(sampler))
        found = take(StreamLoader(stream, rank=rank, seed=9, **sizes), len(sampler))
        for one, other in zip(found, wanted, strict=True):
            one["row"] = torch.tensor([order[row] for row in one["row"]])
            if torch.equal(one["row"], other["row"]):
                same([one], [other])
            else:  # batches of left-overs are filled up with rows shown before: here other ones
                assert torch.equal(one["noise_key"], other["noise_key"]) and one["row"][0] == other["row"][0]
                fillers += 1
    assert fillers <= (0 if batch_size == 1 else 6)  # one a bucket and text length


def test_drop_last(npz: Path) -> None:
    stream = StreamingCache(npz)
    counts = Counter(load_cache(npz).batch_keys)
    full = sum(count // 4 for count in counts.values())
    batches = take(StreamLoader(stream, batch_size=4, drop_last=True), full + 1)
    assert batches_of_epoch([batches], 0, seed=0) == full and batches_of_epoch([batches], 1, seed=0) == 1
    with pytest.raises(SciflowError, match=r"gives no batch.*100 rows of one bucket"):
        take(StreamLoader(stream, batch_size=100, drop_last=True), 1)


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_buffer", [0, 9, 1000])
@pytest.mark.parametrize("position", [0, 1, 8, 21, 22, 40, 57])
def test_resuming_is_exact(npz: Path, monkeypatch: pytest.MonkeyPatch, shuffle_buffer: int, position: int) -> None:
    monkeypatch.setattr("sciflow_hf.data.stream.loader._SNAPSHOT", 4)
    monkeypatch.setattr("sciflow_hf.data.stream.index._PIECE", 3)
    stream = StreamingCache(npz, shuffle_buffer=shuffle_buffer)
    sizes = {"batch_size": 1, "accumulation_steps": 2, "seed": 3}
    wanted = take(StreamLoader(stream, **sizes), 70)[position:]
    loader = StreamLoader(stream, **sizes)
    running = iter(loader)
    for _ in range(position):
        next(running)
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()

    fresh = StreamingCache(npz, shuffle_buffer=shuffle_buffer)
    loaded = StreamLoader(fresh, **sizes)
    loaded.load_state_dict(state)
    same(take(loaded, 70 - position), wanted)

    read: list[int] = []
    view = StreamingCache.view
    monkeypatch.setattr(StreamingCache, "view", lambda self, rows: read.append(len(rows)) or view(self, rows))
    replayed = StreamLoader(fresh, threads=0, **sizes).skip(position)
    replayed.set_epoch(0)  # as the Trainer does
    same(take(replayed, 70 - position), wanted)
    assert sum(read) == 70 - position  # nothing before was read but light rows


def test_a_state_saves_the_work_of_reading_again(npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sciflow_hf.data.stream.loader._SNAPSHOT", 1)
    stream = StreamingCache(npz, shuffle_buffer=3)
    loader = StreamLoader(stream, batch_size=1, threads=0)
    running = iter(loader)
    rows = [int(next(running)["row"]) for _ in range(35)]
    state = loader.state_dict()
    assert state["steps"] == 34 and len(state["snapshot"]["rows"]["buffer"]) == 3
    loaded = StreamLoader(stream, batch_size=1, threads=0)
    loaded.load_state_dict(state)
    read, opened = StreamingCache.read_rows, []
    monkeypatch.setattr(StreamingCache, "read_rows", lambda self, *place: opened.append(place) or read(self, *place))
    left = [int(batch["row"]) for batch in take(loaded, 4)]
    assert sorted(rows + left) == list(range(ROWS))
    assert len(opened) == 1  # of four files


@pytest.mark.parametrize("count", [0, 1, 5, 17, 38])
def test_a_place_of_an_older_checkpoint_is_read_up_to(npz: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """It was the number of a file, the first row of a piece of it, and how many rows of the piece were given."""
    monkeypatch.setattr("sciflow_hf.data.stream.index._PIECE", 3)
    stream = StreamingCache(npz, shuffle_buffer=4)
    rows = EpochRows(stream, 0, 0)
    taken = [next(rows) for _ in range(count)]
    state = json.loads(json.dumps(rows.state_dict()))
    ((passes, file, row, _),) = state["sources"]
    state["sources"] = [[passes, file, row - row % 2, row % 2]]
    assert taken + list(EpochRows(stream, 0, 0, state)) == list(EpochRows(stream, 0, 0))


def test_a_state_fits_another_split_of_the_same_total_batch_and_no_other(npz: Path) -> None:
    stream = StreamingCache(npz, shuffle_buffer=10)
    loader = StreamLoader(stream, batch_size=1, accumulation_steps=4)
    running = iter(loader)
    for _ in range(12):
        next(running)
    state = loader.state_dict()
    loader.close()
    wanted = take(StreamLoader(stream, batch_size=4), 6)[3:]
    other = StreamLoader(stream, batch_size=4)
    other.load_state_dict(state)
    same(take(other, 3), wanted)
    with pytest.raises(SciflowError, match=r"saved with 4 samples a step, and now a step takes 6 \(3 x 2 ranks x 1"):
        StreamLoader(stream, batch_size=3, num_replicas=2).load_state_dict(state)


def test_a_notebook_cell_goes_on_where_it_was(npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sciflow_hf.data.stream.index._PIECE", 3)
    stream = StreamingCache(npz, shuffle_buffer=8)
    stream.set_epoch(2)
    wanted = [sample["latents"] for sample in stream]
    assert len(wanted) == len(stream) == ROWS
    running = iter(stream)
    for _ in range(17):
        next(running)
    fresh = StreamingCache(npz, shuffle_buffer=8)
    fresh.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    rest = [sample["latents"] for sample in fresh]
    assert len(rest) == ROWS - 17 and all(torch.equal(a, b) for a, b in zip(rest, wanted[17:], strict=True))
    assert len(list(fresh)) == ROWS  # only the next iteration


# -- several caches ------------------------------------------------------------------------------------------------


def test_weights_mix_caches_in_proportion(tmp_path: Path) -> None:
    small = write_cache(tmp_path / "a", buckets={(32, 48): 40}, parts=2)
    large = write_cache(tmp_path / "b", buckets={(32, 48): 60}, seed=1)
    stream = StreamingCache([small, large], shuffle_buffer=5, weights=[3, 1])
    rows = Counter(stream.number(row) for row in EpochRows(stream, 0, 0))
    assert set(rows) == set(range(100)) and {rows[row] for row in range(40, 100)} == {1}
    first = sum(rows[row] for row in range(40))
    assert {rows[row] for row in range(40)} == {4, 5} and 160 < first < 200  # 4.5 times each in the mean
    early = [stream.number(row) < 40 for row in itertools.islice(EpochRows(stream, 0, 0), 120)]
    assert 0.6 < np.mean(early) < 0.9
    with pytest.raises(SciflowError, match=r"`weights` is \[1\].*each of 2 caches"):
        StreamingCache([small, large], weights=[1])


def test_files_come_in_another_order_each_epoch(npz: Path) -> None:
    stream = StreamingCache(npz, shuffle_buffer=1)
    orders = {tuple(dict.fromkeys(row.part for row in EpochRows(stream, 0, epoch))) for epoch in range(8)}
    assert len(orders) > 3
    stream.shuffle_buffer = 0
    assert [stream.number(row) for row in EpochRows(stream, 0, 5)] == list(range(ROWS))


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("shuffle_buffer", [1, 7, 1000])
def test_the_order_is_that_of_a_shuffle_buffer_over_shuffled_files(npz: Path, epoch: int, shuffle_buffer: int) -> None:
    """Written out: a run that is repeated in years sees the same order."""
    rows = np.split(np.arange(ROWS), np.cumsum([pq.read_metadata(file).num_rows for file in index_files(npz)])[:-1])
    random.Random(hash64(hash64(5, epoch, 0), 0, "files")).shuffle(rows)
    generator, coming, buffer, expected = random.Random(hash64(5, epoch, "stream")), [*np.concatenate(rows)], [], []
    for row in coming:
        buffer.append(row)
        if len(buffer) > shuffle_buffer:
            place = int(generator.random() * shuffle_buffer)
            expected.append(buffer[place])
            buffer[place] = buffer.pop()
    while buffer:
        place = int(generator.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        expected.append(buffer.pop())
    stream = StreamingCache(npz, shuffle_buffer=shuffle_buffer)
    assert [stream.number(row) for row in EpochRows(stream, 5, epoch)] == expected


def test_rows_of_one_file_come_in_another_order_each_epoch_and_seed(tmp_path: Path) -> None:
    stream = StreamingCache(write_cache(tmp_path), shuffle_buffer=50)
    orders = [[row.row for row in EpochRows(stream, *keys)] for keys in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(24)) for order in orders)


# -- the held-out part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["npz", "inline"])
def test_the_same_rows_are_held_out_as_map_style(npz: Path, tmp_path: Path, layout: str) -> None:
    folder = npz if layout == "npz" else convert_cache(npz, tmp_path / "out", payload=layout).output_dir
    train, held_out = load_cache(folder).split(0.3)
    everything = load_cache(folder, streaming=True)
    assert everything.fingerprint == load_cache(folder, streaming=True).fingerprint
    stream, kept = everything.split(0.3)
    assert kept is not None and 0 < len(kept) < ROWS
    assert kept.row_ids == held_out.row_ids and kept.groups == held_out.groups
    assert kept.batch_keys == held_out.batch_keys and kept.captions == held_out.captions
    assert kept.index["caption"] == held_out.index["caption"]
    for again in (kept, pickle.loads(pickle.dumps(kept))):
        assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(again, held_out, strict=True))
        assert again.describe(3) == held_out.describe(3)
        assert again.select([3]).describe(0) == held_out.describe(3)
    shown = [sample["latents"].double().sum().item() for sample in stream]
    assert sorted(shown) == sorted(sample["latents"].double().sum().item() for sample in train)
    assert len(stream) == len(train)
    assert stream.fingerprint != everything.fingerprint


def test_split_of_nothing_and_of_everything(npz: Path) -> None:
    stream, held_out = StreamingCache(npz).split(0)
    assert held_out is None and len(stream) == ROWS
    with pytest.raises(SciflowError, match="leaves nothing to train on"):
        StreamingCache(npz).split(0.999999)
    with pytest.raises(SciflowError, match=r"\[0, 1\)"):
        StreamingCache(npz).split(1)


# -- what else a cache does ----------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_index(tmp_path: Path) -> None:
    count = 60_000
    table = pa.table(
        {
            "image_path": [f"figures/{i}.png" for i in range(count)],
            "cache_path": [f"{i}.npz" for i in range(count)],
            "latent_shape": [[4, 8, 12]] * count,
            "prompt_embeds_shape": [[12, 48]] * count,
            "bucket_h": [32] * count,
            "bucket_w": [48] * count,
        }
    )
    pq.write_table(table, tmp_path / "index.parquet", row_group_size=5_000)
    (tmp_path / "0.npz").touch()
    del table
    tracemalloc.start()
    stream = StreamingCache(tmp_path, shuffle_buffer=100)
    assert sum(1 for _ in EpochRows(stream, 0, 0)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # all rows are about 50 MB


def test_online_text_is_encoded_from_the_captions(npz: Path) -> None:
    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.tensor([[[float(len(c)), float("figure 7 " in c.lower())]] for c in captions])}

    cache, stream = load_cache(npz), StreamingCache(npz, shuffle_buffer=6)
    stream.online_text = encode
    for batch in take(StreamLoader(stream, batch_size=2), 25):
        expected = encode([cache.captions[row] for row in batch["row"]])["prompt_embeds"]
        assert torch.equal(batch["prompt_embeds"], expected) and "captions" not in batch
    assert {sample["prompt_embeds"][0, 1].item() for sample in stream} == {0.0, 1.0}


def test_caption_dropout_is_as_map_style(npz: Path, tmp_path: Path) -> None:
    rows = load_cache(npz).select([i for i, n in enumerate(load_cache(npz).text_lengths) if n == 12])
    folder = convert_cache(rows, tmp_path / "out", payload="inline").output_dir
    with pytest.raises(SciflowError, match="does not hold the empty prompt"):
        StreamLoader(StreamingCache(folder), batch_size=1, caption_dropout=0.5)
    np.savez(folder / "empty_prompt.npz", prompt_embeds=np.full((12, TINY_EMBED_DIM), 7, np.float32))
    batches = take(StreamLoader(StreamingCache(folder), batch_size=2, caption_dropout=0.5, seed=4), 12)
    dropped = [bool((text == 7).all()) for batch in batches for text in batch["prompt_embeds"]]
    assert 4 < sum(dropped) < 20
    from sciflow_hf.diffusion.randomness import uniform

    keys = [int(key) for batch in batches for key in batch["noise_key"]]
    assert dropped == (uniform(keys, stream="caption_dropout") < 0.5).tolist()


def test_facts_and_words(npz: Path, tmp_path: Path) -> None:
    cache, stream = load_cache(npz), load_cache(npz, streaming=True)
    assert isinstance(stream, StreamingCache) and stream.metadata == cache.metadata
    assert [stream.describe(row) for row in (0, 17, 38)] == [cache.describe(row) for row in (0, 17, 38)]
    with pytest.raises(CacheError, match="`max_sequence_length` is 12 in the cache and 99 in this run"):
        stream.check_family({"max_sequence_length": 99})
    moved = tmp_path / "moved"
    npz.rename(moved)
    try:
        assert load_cache(moved, streaming=True).fingerprint == stream.fingerprint
    finally:
        moved.rename(npz)


@pytest.mark.parametrize("name", ["a[1]b", "a*", "a?[!x]{y,z}", "train%20#1 [", "a::b", ".hidden/__x__"])
def test_no_character_of_a_file_name_is_part_of_a_pattern(tmp_path: Path, name: str) -> None:
    folder = write_cache(tmp_path / name, parts=2)
    write_cache(tmp_path / "a1b", parts=2, seed=1)  # what some of the patterns match
    wanted = [sample["latents"] for sample in load_cache(folder)]
    found = [sample["latents"] for sample in StreamingCache(folder, shuffle_buffer=0)]
    assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(list(StreamingCache(folder).index)) == len(wanted)


def test_a_stream_leaves_nothing_behind_and_tells_nobody(npz: Path, tmp_path: Path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append(1))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(list(EpochRows(StreamingCache(npz), 0, 0))) == ROWS
    assert not list(tmp_path.iterdir()) and not asked


def test_datasets_streams_the_index_and_inline_payloads(npz: Path, tmp_path: Path) -> None:
    cache = load_cache(npz)
    assert [row["image_path"] for row in StreamingCache(npz).index] == cache.index["image_path"]
    inline = convert_cache(npz, tmp_path / "inline", payload="inline").output_dir
    plain = datasets.load_dataset("parquet", data_files=f"{inline}/*.parquet", split="train", streaming=True)
    for row, sample in zip(plain, cache, strict=True):
        values = torch.frombuffer(bytearray(row["latents"]), dtype=torch.bfloat16).view(row["latent_shape"])
        assert torch.equal(values, sample["latents"])
