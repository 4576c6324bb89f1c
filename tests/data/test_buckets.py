"""The bucket sampler: nothing lost, one bucket a batch, the same steps for every split of the total batch."""

import itertools
import math
import random
from collections import Counter

import pytest

from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.sizes import aspect_ratio_buckets, fitting_bucket, ladder, nearest_bucket
from sciflow_hf.demo.figures import PAGE_SIZES
from sciflow_hf.demo.mini_figures import SIZES
from sciflow_hf.errors import SciflowError


def _random_case(number: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
    rng = random.Random(number)
    buckets = []
    for i in range(rng.randint(1, 6)):
        buckets += [(64 + i, 32)] * rng.choice([1, 2, 3, 7, 16, rng.randint(1, 90)])
    rng.shuffle(buckets)
    options = {
        "batch_size": rng.randint(1, 6),
        "num_replicas": rng.choice([1, 2, 4, 8]),
        "accumulation_steps": rng.randint(1, 4),
        "seed": number,
    }
    return buckets, options


def _ranks(buckets: list[tuple[int, int]], epoch: int = 0, **options: int) -> list[BucketBatchSampler]:
    samplers = [BucketBatchSampler(buckets, rank=rank, **options) for rank in range(options["num_replicas"])]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return samplers


@pytest.mark.promise("A17")
@pytest.mark.parametrize("block", range(10))
def test_every_epoch_is_whole(block: int) -> None:
    """240 random cases against the rules themselves, counted over all ranks."""
    for number in range(block * 24, block * 24 + 24):
        buckets, options = _random_case(number)
        epoch = number % 3
        samplers = _ranks(buckets, epoch, **options)
        size, ranks, accumulation = (options[k] for k in ("batch_size", "num_replicas", "accumulation_steps"))
        total = size * ranks * accumulation
        per_rank = [list(sampler) for sampler in samplers]

        assert {len(batches) for batches in per_rank} == {len(samplers[0])}, "equal micro-batches on all ranks"
        assert all(len(batch) == size for batches in per_rank for batch in batches)
        assert all(len({buckets[row] for row in batch}) == 1 for batches in per_rank for batch in batches)

        seen = Counter(row for batches in per_rank for batch in batches for row in batch)
        assert set(seen) == set(range(len(buckets))), "every row at least once"

        counts = Counter(buckets)
        full_groups = sum(count // total for count in counts.values())
        for group in range(full_groups):
            steps = range(group * accumulation, (group + 1) * accumulation)
            rows = [row for step in steps for batches in per_rank for row in batches[step]]
            assert len({buckets[row] for row in rows}) == 1, "a full group is one bucket over ranks and steps"
            assert len(set(rows)) == total, "and repeats nothing"

        tail = sum(-(-(count % total) // size) for count in counts.values())
        minimal = sum(-count % size for count in counts.values()) + size * (-tail % ranks)
        repeats = sum(seen.values()) - len(seen)
        assert repeats == minimal
        assert len(samplers[0]) == full_groups * accumulation + -(-tail // ranks)

        report = samplers[0].report()
        assert report == samplers[-1].report()
        assert sum(row.repeats for row in report) == repeats and not any(row.dropped for row in report)
        batches_of = Counter(buckets[batch[0]] for batches in per_rank for batch in batches)
        shown_of = Counter({b: sum(n for row, n in seen.items() if buckets[row] == b) for b in counts})
        for row in report:
            assert (row.samples, row.batches) == (counts[row.bucket], batches_of[row.bucket])
            assert row.repeats == shown_of[row.bucket] - counts[row.bucket]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    buckets, options = _random_case(5)
    buckets = buckets * 8

    def order(epoch: int, seed: int) -> list[list[int]]:
        sampler = BucketBatchSampler(buckets, **options | {"seed": seed})
        sampler.set_epoch(epoch)
        return sampler.batches()

    used = BucketBatchSampler(buckets, **options)
    for epoch in (4, 0, 2):  # what was drawn before does not matter
        used.set_epoch(epoch)
        assert list(used) == used.batches() == order(epoch, options["seed"])
    orders = {str(order(epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert order(0, 1) != order(1, 0)


def test_rows_are_shuffled_inside_their_bucket() -> None:
    sampler = BucketBatchSampler(["a"] * 60 + ["b"] * 60, batch_size=4)
    companions: set[frozenset[int]] = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        companions |= {frozenset(batch) for batch in sampler}
    assert len(companions) > 80, "rows meet other rows in every epoch"


@pytest.mark.promise("A17")
@pytest.mark.parametrize("split", [(1, 4, 1), (2, 2, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)])
def test_groups_do_not_depend_on_the_split(split: tuple[int, int, int]) -> None:
    """Total batch 4 as batch x ranks x accumulation: the same row at the same place of every full group."""
    buckets = [(h, 8) for h, count in ((1, 22), (2, 9), (3, 17)) for _ in range(count)]
    full = 22 // 4 + 9 // 4 + 17 // 4

    def by_position(batch_size: int, num_replicas: int, accumulation_steps: int) -> dict[int, int]:
        samplers = _ranks(
            buckets,
            3,
            batch_size=batch_size,
            num_replicas=num_replicas,
            accumulation_steps=accumulation_steps,
        )
        found: dict[int, int] = {}
        for sampler in samplers:
            for number, batch in enumerate(sampler):
                positions = sampler.positions(number)
                assert len(positions) == len(batch) and not found.keys() & set(positions)
                found.update(zip(positions, batch, strict=True))
        assert sorted(found) == list(range(len(found))), "positions count through the epoch without a gap"
        return found

    reference, other = by_position(4, 1, 1), by_position(*split)
    assert {p: reference[p] for p in range(4 * full)} == {p: other[p] for p in range(4 * full)}


def test_positions_follow_the_formula() -> None:
    sampler = BucketBatchSampler(["a"] * 100, batch_size=3, num_replicas=2, rank=1, accumulation_steps=4)
    # group 1, micro-step 2, rank 1: 1 * 24 + (2 * 2 + 1) * 3
    assert list(sampler.positions(6)) == [39, 40, 41]
    with pytest.raises(SciflowError, match="batch_index"):
        sampler.positions(len(sampler))


@pytest.mark.promise("E27")
def test_drop_last_drops_the_tail_and_counts_it() -> None:
    buckets = ["a"] * 21 + ["b"] * 7 + ["c"] * 9
    samplers = [
        BucketBatchSampler(buckets, batch_size=2, num_replicas=2, rank=rank, accumulation_steps=2, drop_last=True)
        for rank in range(2)
    ]
    seen = Counter(row for sampler in samplers for batch in sampler for row in batch)
    assert max(seen.values()) == 1 and len(seen) == 16 + 8
    assert [(r.bucket, r.samples, r.dropped, r.repeats) for r in samplers[0].report()] == [
        ("a", 21, 5, 0),
        ("b", 7, 7, 0),
        ("c", 9, 1, 0),
    ]
    with pytest.raises(SciflowError, match="dataloader_drop_last"):
        BucketBatchSampler(buckets, batch_size=22, drop_last=True)


def test_without_shuffling_rows_stay_in_order() -> None:
    sampler = BucketBatchSampler(list("abababab"), batch_size=2, shuffle=False)
    sampler.set_epoch(7)
    assert list(sampler) == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_padding_takes_other_rows_of_the_same_bucket() -> None:
    sampler = BucketBatchSampler(["a"] * 7 + ["b"], batch_size=3)
    tail_a, tail_b = sorted(sampler.batches()[2:], key=lambda batch: 7 in batch)
    assert len(set(tail_a)) == 3, "a bucket with enough rows repeats none within a batch"
    assert tail_b == [7, 7, 7], "a tiny one repeats its row"


def test_table_has_aligned_totals() -> None:
    sampler = BucketBatchSampler([(64, 48)] * 13 + [(48, 64)] * 3, batch_size=2, num_replicas=2)
    lines = sampler.table().splitlines()
    assert lines[0].split() == ["bucket", "samples", "batches", "repeats", "dropped"]
    assert lines[1].split() == ["64", "x", "48", "13", "8", "3", "0"]
    assert lines[-1].split() == ["total", "16", "10", "4", "0"]
    assert len(set(map(len, lines))) == 1
    many = BucketBatchSampler([(i, 1) for i in range(100)], batch_size=1).table(max_rows=10).splitlines()
    assert len(many) == 13 and many[-2].split()[:3] == ["90", "more", "90"]
    assert many[-1].split()[1] == "100"
    single = BucketBatchSampler([(64, 48)] * 3, batch_size=1).table().splitlines()
    assert len(single) == 2 and single[1].split()[:4] == ["64", "x", "48", "3"], "of one bucket no total"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5"),
        ({"num_replicas": 0}, "`num_replicas` is 0"),
        ({"accumulation_steps": -1}, "`accumulation_steps` is -1"),
        ({"num_replicas": 2, "rank": 2}, "`rank` is 2"),
        ({"rank": -1}, "`rank` is -1"),
        ({"seed": "x"}, "`seed` is 'x'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(SciflowError, match=message):
        BucketBatchSampler(["a"], **({"batch_size": 1} | options))  # type: ignore[arg-type]


def test_no_rows_is_an_error() -> None:
    with pytest.raises(SciflowError, match="no samples"):
        BucketBatchSampler([], batch_size=1)


def test_aspect_ratio_buckets_of_sdxl() -> None:
    """At 1024 px in steps of 64 the largest sizes of each shape are those that SDXL's table lists, too."""
    buckets = aspect_ratio_buckets(1024, 64)
    known = {(1408, 704), (1344, 768), (1216, 832), (1152, 896), (1088, 960), (1024, 1024)}
    assert set(buckets) == known | {(w, h) for h, w in known}


@pytest.mark.parametrize(("resolution", "step"), list(itertools.product([64, 100, 256, 1000], [4, 8, 16, 64])))
def test_aspect_ratio_buckets_keep_their_limits(resolution: int, step: int) -> None:
    buckets = aspect_ratio_buckets(resolution, step)
    square = resolution // step * step
    assert (square, square) in buckets and len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % step == 0 and width % step == 0 and height * width <= resolution**2
        assert max(height / width, width / height) <= 2 and (width, height) in buckets


def test_nearest_bucket_goes_by_aspect_ratio() -> None:
    buckets = [(1024, 1024), (768, 1344), (1344, 768), (896, 1152)]
    assert nearest_bucket(100, 175, buckets) == (768, 1344)
    assert nearest_bucket(3000, 1000, buckets) == (1344, 768)
    assert nearest_bucket(50, 51, buckets) == (1024, 1024)
    assert nearest_bucket(5, 5, [(64, 64), (128, 128)]) == (128, 128), "of equal ratios the largest"
    with pytest.raises(SciflowError, match="resolution"):
        aspect_ratio_buckets(32, 64)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 16), (512, 16), (80, 8), (100, 32)])
def test_small_images_come_to_a_ladder_of_areas(resolution: int, step: int) -> None:
    rungs = ladder(resolution, step)
    assert len(rungs) == 1 + math.floor(2 * math.log2(resolution / step)), "each of half the area, to a single step"
    assert rungs[0] == aspect_ratio_buckets(resolution, step * max(1, resolution // 16 // step))
    assert all(height * width <= resolution**2 / 2**k for k, rung in enumerate(rungs) for height, width in rung)
    assert rungs[-1] == [(step, step)]


@pytest.mark.parametrize(
    ("image", "bucket"),
    [
        ((3000, 2000), (1216, 832)),
        ((1024, 1024), (1024, 1024)),
        ((1000, 1000), (1024, 1024)),  # 2 % are not worth half of the area
        ((930, 930), (704, 704)),
        ((500, 500), (512, 512)),
        ((64, 64), (64, 64)),
        ((180, 1080), (176, 352)),  # a strip of 6:1 fills the widest bucket and is not enlarged
        ((5, 900), (16, 16)),  # nothing is smaller
    ],
)
def test_the_bucket_of_an_image_does_not_enlarge_it(image: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert fitting_bucket(*image, ladder(1024, 16)) == bucket


def test_figures_of_the_examples_keep_their_buckets() -> None:
    """Their published results were measured in buckets that enlarge nothing."""
    for sizes, resolution in ((SIZES[1:], 80), (SIZES, 64), (PAGE_SIZES, 128)):
        for step in (8, 16, 32):
            rungs = ladder(resolution, step)
            assert [fitting_bucket(*s, rungs) for s in sizes] == [nearest_bucket(*s, rungs[0]) for s in sizes]
