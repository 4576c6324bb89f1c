"""Rows that an epoch shows more than once: exact shares, nothing lost, no row twice in a step, fair over epochs."""

import hashlib
import itertools
import json
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch
from caches import write_cache

from sciflow_hf.data.arguments import DataArguments
from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.load import load_data
from sciflow_hf.errors import SciflowError


def _random_case(number):
    """Buckets, repeats of two or three caches, and options, without drop_last."""
    rng = random.Random(number)
    values = rng.choice([[1.0, 3.0], [1.0, 1.4], [2.25, 1.0, 7.1], [1.0, 1 / 3 + 1], [1.0]])
    rows = [
        ((64 + i, 32), value)
        for i in range(rng.randint(1, 5))
        for value in values
        for _ in range(rng.choice([1, 2, 7, rng.randint(1, 60)]))
    ]
    rng.shuffle(rows)
    options = {
        "batch_size": rng.randint(1, 4),
        "num_replicas": rng.choice([1, 2, 4]),
        "accumulation_steps": rng.randint(1, 3),
        "seed": number,
    }
    buckets, repeats = zip(*rows, strict=True)
    return list(buckets), list(repeats), options


def _all_ranks(buckets, repeats, epoch=0, **options):
    """[rank][micro-batch] -> rows."""
    samplers = [
        BucketBatchSampler(buckets, repeats=repeats, rank=rank, **options) for rank in range(options["num_replicas"])
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return samplers, [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("block", range(6))
def test_every_epoch_is_whole_and_has_the_shares(block):
    """120 random cases against the rules themselves, counted over all ranks."""
    for number in range(block * 20, block * 20 + 20):
        buckets, repeats, options = _random_case(number)
        size, ranks, accumulation = (options[k] for k in ("batch_size", "num_replicas", "accumulation_steps"))
        total = size * ranks * accumulation

        # One row at a time nothing is filled up: the shares themselves.
        single = BucketBatchSampler(buckets, repeats=repeats, batch_size=1, seed=options["seed"])
        single.set_epoch(number % 4)
        places = Counter(row for batch in single for row in batch)
        assert all(int(times) <= places[row] <= int(times) + 1 for row, times in enumerate(repeats))
        for value in set(repeats):
            rows = [row for row, times in enumerate(repeats) if times == value]
            assert abs(sum(places[row] for row in rows) - value * len(rows)) <= 0.5 + 1e-9
        counts = Counter({b: sum(n for row, n in places.items() if buckets[row] == b) for b in set(buckets)})

        samplers, per_rank = _all_ranks(buckets, repeats, number % 4, **options)
        batches = [batch for rank in per_rank for batch in rank]
        assert {len(rank) for rank in per_rank} == {len(samplers[0])}
        assert all(len(batch) == size and len({buckets[row] for row in batch}) == 1 for batch in batches)
        seen = Counter(row for batch in batches for row in batch)
        assert all(seen[row] >= n for row, n in places.items()), "no share is cut"
        tail = sum(-(-(count % total) // size) for count in counts.values())
        fill = sum(-count % size for count in counts.values()) + size * (-tail % ranks)
        assert sum(seen.values()) == sum(places.values()) + fill, "no longer than whole batches need"

        full = {bucket: count // total for bucket, count in counts.items()}
        for group in range(sum(full.values())):
            steps = slice(group * accumulation, (group + 1) * accumulation)
            rows = [row for rank in per_rank for batch in rank[steps] for row in batch]
            assert len({buckets[row] for row in rows}) == 1
            twice = [row for row, n in Counter(rows).items() if n > 1]
            assert all(places[row] > full[buckets[row]] for row in twice), "a row twice in a step without need"

        assert samplers[0].report() == samplers[-1].report()
        for row in samplers[0].report():
            shown = sum(n for r, n in seen.items() if buckets[r] == row.bucket)
            assert row.samples == buckets.count(row.bucket) and row.dropped == 0
            assert row.samples + row.repeats == shown == row.batches * size


def test_no_row_twice_in_a_step_even_where_copies_just_fit():
    """Each of 10 rows 6 times among 54 others: 114 places, 14 groups of 8. And as many copies as groups."""
    for repeats, count in (([6.0] * 10 + [1.0] * 54, 14), ([4.0] * 8, 4), ([7.0] * 3 + [1.0] * 7, 7)):
        size = sum(map(int, repeats)) // count
        for seed in range(30):
            sampler = BucketBatchSampler(["a"] * len(repeats), repeats=repeats, batch_size=size, seed=seed)
            batches = sampler.batches()[:count]
            assert all(len(set(batch)) == size for batch in batches)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_of_the_tail_hold_no_row_twice(shuffle):
    """12 rows twice in fives: 4 are left, and a fifth is added. 3 rows three times, all of them tail."""
    for seed in range(20):
        options = {"seed": seed, "shuffle": shuffle}
        batches = BucketBatchSampler(["a"] * 12, repeats=[2.0] * 12, batch_size=5, **options).batches()
        assert len(batches) == 5 and all(len(set(batch)) == 5 for batch in batches)
        batches = BucketBatchSampler(
            ["a"] * 3, repeats=[3.0] * 3, batch_size=2, accumulation_steps=8, **options
        ).batches()
        assert len(batches) == 5 and all(len(set(batch)) == 2 for batch in batches)


def test_rows_of_all_caches_are_mixed_in_every_part_of_the_epoch():
    """1000 rows once, 100 rows ten times: half of each tenth of the epoch is of either kind."""
    sampler = BucketBatchSampler(["a"] * 1100, repeats=[1.0] * 1000 + [10.0] * 100, batch_size=8, seed=3)
    order = np.concatenate(sampler.batches())
    shares = [(part >= 1000).mean() for part in np.array_split(order, 10)]
    assert max(abs(share - 0.5) for share in shares) < 0.15
    # Companions are drawn anew for every copy and epoch.
    pairs = Counter(frozenset(p) for b in sampler.batches() for p in itertools.pairwise(b) if min(p) >= 1000)
    assert pairs.most_common(1)[0][1] <= 3


@pytest.mark.parametrize("value", [1.4, 2.25, 1 + 1 / 3, 1.01])
def test_fractions_come_round_to_every_row(value):
    """After E epochs each row of a bucket has come floor or ceil of its share, and epochs are equally long."""
    buckets = ["a"] * 50 + ["b"] * 27 + ["c"] * 90
    repeats = [value] * 50 + [1.0] * 27 + [value] * 90
    sampler = BucketBatchSampler(buckets, repeats=repeats, batch_size=1, seed=5)
    seen, lengths = Counter(), set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        rows = [row for batch in sampler for row in batch]
        lengths.add((len(rows), len(sampler)))
        seen.update(rows)
        for bucket, first, count in (("a", 0, 50), ("c", 77, 90)):
            times = [seen[first + i] for i in range(count)]
            assert max(times) - min(times) <= 1, (bucket, epoch)
    assert len(lengths) == 1
    total = sum(seen[row] for row in range(167) if buckets[row] != "b")
    assert total == 40 * round(value * 140)
    assert {seen[row] for row in range(50, 77)} == {40}
    a = sum(seen[row] for row in range(50))
    assert abs(a - 40 * value * 50) <= 40 * 0.5


def test_shares_are_exact_where_buckets_are_tiny():
    """300 buckets of one row, 1.4 each: 420 places, not 300."""
    sampler = BucketBatchSampler(list(range(300)), repeats=[1.4] * 300, batch_size=1)
    assert len(sampler) == 420 and Counter(Counter(map(tuple, sampler)).values()) == {1: 180, 2: 120}


def test_order_is_a_function_of_seed_and_epoch():
    buckets, repeats, options = _random_case(7)
    used = BucketBatchSampler(buckets, repeats=repeats, **options)
    orders = []
    for epoch in (3, 0, 1, 3):
        used.set_epoch(epoch)
        fresh = BucketBatchSampler(buckets, repeats=np.array(repeats), **options)
        fresh.set_epoch(epoch)
        orders.append(used.batches())
        assert orders[-1] == fresh.batches() == list(used)
    assert orders[0] == orders[3] and orders[1] != orders[2]
    assert used.batches() != BucketBatchSampler(buckets, repeats=repeats, **(options | {"seed": 1})).batches()


def test_steps_do_not_depend_on_the_split():
    """Total batch 4 as batch x ranks x accumulation; any position is found without replaying what was before."""
    buckets = ["a"] * 22 + ["b"] * 9
    repeats = [2.5] * 15 + [1.0] * 16
    full = (37 + 1 + 7) // 4 + 9 // 4

    def by_position(batch_size, num_replicas, accumulation_steps):
        options = {
            "batch_size": batch_size, "num_replicas": num_replicas, "accumulation_steps": accumulation_steps
        }  # fmt: skip
        samplers, per_rank = _all_ranks(buckets, repeats, 2, **options)
        return {
            position: row
            for sampler, batches in zip(samplers, per_rank, strict=True)
            for number, batch in enumerate(batches)
            for position, row in zip(sampler.positions(number), batch, strict=True)
        }

    reference = by_position(4, 1, 1)
    assert sorted(reference) == list(range(len(reference)))
    for split in ((1, 4, 1), (2, 2, 1), (1, 1, 4), (1, 2, 2)):
        other = by_position(*split)
        assert {p: reference[p] for p in range(4 * full)} == {p: other[p] for p in range(4 * full)}


def test_without_repeats_the_order_is_what_it_was():
    """Frozen before `repeats` existed: a run that is resumed must find its order."""
    buckets = [(h, 8) for h, count in ((1, 22), (2, 9), (3, 17)) for _ in range(count)]
    sampler = BucketBatchSampler(buckets, batch_size=2, num_replicas=2, rank=1, accumulation_steps=2, seed=11)
    sampler.set_epoch(3)
    digest = hashlib.sha256(json.dumps(sampler.batches()).encode()).hexdigest()
    assert digest[:16] == "1aed28aa2a7165db"


def test_without_shuffling_copies_are_dealt_in_row_order():
    sampler = BucketBatchSampler(["a"] * 4, repeats=[2.0, 1.0, 2.0, 1.0], batch_size=2, shuffle=False)
    assert sampler.batches() == [[0, 2], [0, 2], [1, 3]]


def test_drop_last_counts_places():
    """7 rows twice and 5 once: 19 places, 4 groups of 4, 3 places dropped."""
    sampler = BucketBatchSampler(["a"] * 12, repeats=[2.0] * 7 + [1.0] * 5, batch_size=4, drop_last=True)
    (report,) = sampler.report()
    assert (report.samples, report.batches, report.repeats, report.dropped) == (12, 4, 7, 3)
    assert len(sampler.batches()) == 4
    assert sampler.table().splitlines()[-1].split() == ["a", "12", "4", "7", "3"]


@pytest.mark.parametrize(
    ("repeats", "words"),
    [
        ([1.0], "shape"),
        ([1.0, 0.5], "row 1 is 0.5"),
        ([1.0, float("nan")], "row 1 is nan"),
        ([float("inf"), 1], "inf"),
        ([1.0, 1e12], r"an epoch of 1e\+12 samples"),
    ],
)
def test_bad_repeats_are_named(repeats, words):
    with pytest.raises(SciflowError, match=f"`repeats`.*{words}"):
        BucketBatchSampler(["a", "a"], repeats=repeats, batch_size=1)


# ---- caches with weights ----


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """20 and 60 samples of the same two buckets."""
    folder = tmp_path_factory.mktemp("caches")
    first = write_cache(folder / "first", buckets={(32, 48): 12, (48, 32): 8}, year="2015")
    second = write_cache(folder / "second", buckets={(32, 48): 20, (48, 32): 40}, year="2016", seed=1)
    return str(first), str(second)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (1.0, 3.0), (1.0, 7.5)])
def test_caches_are_drawn_in_the_ratio_of_their_weights(caches, weights, caplog):
    args = DataArguments(dataset_dir=list(caches), dataset_weights=list(weights), eval_fraction=0)
    with caplog.at_level(logging.INFO):
        train, _ = load_data(args)
    sources = train.source_of_row
    sampler = BucketBatchSampler(train.batch_keys, repeats=train.repeats, batch_size=1)
    drawn = Counter(int(sources[row]) for batch in sampler for row in batch)
    assert abs(drawn[0] / drawn[1] - weights[0] / weights[1]) <= weights[0] / weights[1] / min(drawn.values())
    # As short as can be: one of the caches comes exactly once.
    assert drawn[0] == 20 or drawn[1] == 60
    assert set(row for batch in sampler for row in batch) == set(range(80))
    assert caches[0] in caplog.text and "20 samples" in caplog.text


@pytest.mark.promise("A13", "B02")
def test_weights_count_the_samples_that_are_trained_on(caches):
    """After the split and `--max_train_samples`: the ratio holds for what is left."""
    for options in ({"eval_fraction": 0.3}, {"eval_fraction": 0, "max_train_samples": 33}):
        args = DataArguments(dataset_dir=list(caches), dataset_weights=[2, 1], **options)
        train, held_out = load_data(args)
        shares = np.bincount(train.source_of_row, weights=train.repeats)
        assert shares[0] == pytest.approx(2 * shares[1]) and train.repeats.min() == 1
        assert len(train.repeats) == len(train) < 80
        assert held_out is None or held_out.repeats is None


def test_without_weights_nothing_is_repeated(caches):
    train, _ = load_data(DataArguments(dataset_dir=list(caches), eval_fraction=0))
    assert train.repeats is None


def test_streams_take_the_same_options(caches):
    """The same rows on either side of the split as in a map-style cache; weights and buffer reach the stream."""
    options = {"dataset_dir": list(caches), "eval_fraction": 0.3}
    stream, held_out = load_data(
        DataArguments(streaming=True, dataset_weights=[3.0, 1.0], shuffle_buffer=7, **options), dtype=torch.float32
    )
    train, expected = load_data(DataArguments(**options), dtype=torch.float32)
    assert sorted(held_out.row_ids) == sorted(expected.row_ids) and len(stream) == len(train)
    assert stream.shuffle_buffer == 7 and list(stream.weights) == [3.0, 1.0]
    assert stream.dtype == held_out.dtype == torch.float32
    _, alone = load_data(DataArguments(dataset_dir=list(caches), eval_fraction=1e-9, streaming=True))
    assert len(set(alone.groups)) == 1, "a group stands in where the hash selects none"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "1 numbers for 2 caches"),
        ([1.0, 2.0, 3.0], "3 numbers for 2 caches"),
        ([1.0, 0.0], "above 0"),
        ([1.0, -2.0], "above 0"),
        ([1.0, float("nan")], "above 0"),
        ([1.0, float("inf")], "above 0"),
    ],
)
def test_bad_weights_are_named(caches, weights, words):
    with pytest.raises(SciflowError, match=f"`dataset_weights`.*{words}"):
        DataArguments(dataset_dir=list(caches), dataset_weights=weights)


def test_a_cache_with_nothing_left_is_named(caches, tmp_path):
    tiny = write_cache(tmp_path / "tiny", buckets={(32, 48): 1}, year="2017")
    args = DataArguments(
        dataset_dir=[caches[1], str(tiny)], dataset_weights=[1, 1], eval_fraction=0, max_train_samples=2
    )
    with pytest.raises(SciflowError, match=r"tiny.*no sample to train on"):
        load_data(args)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_encoding": "later"}, "`text_encoding` 'later': use one of cached, online"),
        ({"payload": "tar"}, "`payload` 'tar': use one of npz, shards, inline"),
        ({"shuffle_buffer": -1}, "`shuffle_buffer` -1"),
        ({"remote_cache_gb": -1}, "`remote_cache_gb` -1"),
        ({"streaming": True, "max_train_samples": 3}, "`max_train_samples` does not go with `--streaming`"),
    ],
)
def test_options_that_cannot_work_are_named(options, words):
    with pytest.raises(SciflowError, match=words):
        DataArguments(dataset_dir=["x"], **options)
