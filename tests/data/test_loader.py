"""The loader: its batches against samples stacked by hand, on every path, and what training makes of them."""

import collections
import threading

import numpy as np
import pytest
import torch
from caches import write_cache
from memory_cache import BFLOAT16, PATHS, Rows, assert_same, make_rows, make_sampler, released
from trainings import losses, make_args, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader
from sciflow_hf.diffusion.randomness import noise_keys
from sciflow_hf.errors import CacheError, SciflowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def no_thread_survives():
    before = {t for t in threading.enumerate() if t.name == "reader"}
    yield
    assert {t for t in threading.enumerate() if t.name == "reader"} <= before


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def by_hand(rows, sampler, epoch):
    """An epoch, stacked by torch."""
    sampler.set_epoch(epoch)
    for number, chosen in enumerate(sampler):
        samples = [rows.samples[row] for row in chosen]
        names = [n for n in samples[0] if n != "txt_ids" and all(n in sample for sample in samples)]
        positions = sampler.positions(number)
        yield {n: torch.stack([sample[n] for sample in samples]) for n in names} | {
            "row": torch.tensor(chosen),
            "position": torch.tensor(list(positions)),
            "noise_key": noise_keys(sampler.seed, epoch, positions),
        }


def test_batches_are_the_samples_stacked(path):
    """Bit for bit over two epochs; names that only some rows have are left out, position ids always."""
    rows = make_rows()
    loader, names = BucketLoader(rows, make_sampler(rows), **path), set()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = list(released(loader))
        expected = list(by_hand(rows, make_sampler(rows), epoch))
        assert len(batches) == len(expected) == len(loader) == 12
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same(batch, wanted)
            names.add("pooled_prompt_embeds" in batch)
    assert names == {True, False}


def test_resume_reads_nothing_before(path):
    rows = make_rows()
    loader = BucketLoader(rows, make_sampler(rows, rank=1, num_replicas=2, accumulation_steps=2), **path)
    loader.set_epoch(3)
    whole = list(released(loader))
    for start in range(len(whole) + 1):
        rows.read.clear()
        rest = list(released(loader.skip(start)))
        assert len(rest) == len(whole) - start
        for batch, wanted in zip(rest, whole[start:], strict=True):
            assert_same(batch, wanted)
        if not path.get("num_workers"):
            counts = collections.Counter(row for batch in rest for row in batch["row"].tolist())
            assert collections.Counter(row for row, _ in rows.read) == counts
    assert len(list(loader)) == len(whole)  # once


def test_a_notebook_may_keep_batches_and_have_two_loops():
    rows = make_rows()
    loader = BucketLoader(rows, make_sampler(rows))
    kept = list(loader)
    for batch, wanted in zip(kept, by_hand(rows, make_sampler(rows), 0), strict=True):
        assert_same(batch, wanted)
    pairs = list(zip(loader, loader, strict=True))
    for (one, other), wanted in zip(pairs, kept, strict=True):
        assert_same(one, dict(wanted))
        assert_same(other, dict(wanted))
    for batch in loader:
        if torch.equal(batch["row"], kept[3]["row"]):
            break
    assert_same(batch, dict(kept[3]))
    loader.close()
    assert_same(next(iter(loader)), dict(kept[0]))


def test_the_order_is_made_as_it_is_read():
    """A million rows: keys of no more batches than are read ahead."""
    sampler = BucketBatchSampler(np.zeros(1_000_000, dtype=np.int64), batch_size=1)
    asked = []

    def key_of(epoch, rows, positions):
        asked.append(rows)
        return torch.tensor([1])

    rows = make_rows(1)
    rows.members = lambda row: Rows.members(rows, 0)
    rows.read_into = lambda row, out, members: Rows.read_into(rows, 0, out, members)
    loader = BucketLoader(rows, sampler, key_of=key_of, threads=2, buffers=3).skip(999_000)
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(4)]
    loader.close()
    assert len(taken) <= len(asked) <= 4 + 3


def test_random_numbers_of_the_process_stay_as_they_are(path):
    rows = make_rows()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(BucketLoader(rows, make_sampler(rows), posterior=True, **path))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_data_sets_take_the_ordinary_way():
    """A list of dicts, or a collator of one's own: no threads, no buffers."""
    samples = [{"latents": torch.full((2, 3), row), "class_labels": row} for row in range(6)]
    sampler = BucketBatchSampler([0] * 6, batch_size=3, shuffle=False)
    batches = list(BucketLoader(samples, sampler))
    assert [type(batch) for batch in batches] == [dict, dict]
    assert batches[1]["class_labels"].tolist() == batches[1]["row"].tolist() == [3, 4, 5]
    rows = make_rows(6)
    own = list(BucketLoader(rows, make_sampler(rows), collate_fn=lambda samples: {"rows": len(samples)}))
    assert [type(batch) for batch in own] == [dict] * 3 and [batch["rows"] for batch in own] == [2] * 3


def test_rows_that_do_not_stack_are_named():
    rows = make_rows(6)
    rows.samples[3]["time_ids"] = torch.zeros(7, dtype=BFLOAT16)
    for threads in (0, 2):
        with pytest.raises(SciflowError, match=r"row.*0.*3.*`time_ids`.*\(6,\).*\(7,\)"):
            list(BucketLoader(rows, make_sampler(rows, shuffle=False), threads=threads))


def test_a_broken_payload_is_named_where_it_would_have_come(tmp_path):
    folder = write_cache(tmp_path, buckets={(32, 48): 9})
    broken = sorted(folder.rglob("*.npz"))[5]
    broken.write_bytes(broken.read_bytes()[:2000])
    cache = sf.load_cache(folder)
    loader = BucketLoader(cache, BucketBatchSampler(cache.batch_keys, batch_size=1, shuffle=False), threads=3)
    seen = []
    with pytest.raises(CacheError, match=broken.name) as caught:
        for batch in loader:
            assert_same({"latents": batch["latents"][0]}, {"latents": cache[len(seen)]["latents"]})
            seen += batch["row"].tolist()
    assert seen == list(range(5)) and "row 5" in str(caught.value)


# -- in training ---------------------------------------------------------------------------------------------


@pytest.mark.promise("E27")
def test_a_run_does_not_depend_on_who_reads(tmp_path, family, tiny_cache):
    """Losses, weights and evaluation, the generator that dropout draws from, accumulation 8 and a tail."""
    runs, drawn = [], []
    for options in ({"threads": 0}, {"threads": 1}, {"threads": 2}, {"threads": 4}, {"num_workers": 1}):
        trainer = make_trainer(
            tmp_path / str(len(runs)), family, tiny_cache, eval_fraction=0.3, gradient_accumulation_steps=8,
            per_device_train_batch_size=1, max_steps=5, eval_strategy="steps", eval_steps=2,
            **{f"dataloader_{name}": value for name, value in options.items()},
        )  # fmt: skip
        trainer.model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(()).item()))  # as dropout does
        trainer.train()
        evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        runs.append((losses(trainer), evaluated, trained(trainer)))
    logged, evaluated, weights = runs[0]
    assert len(logged) == 5 and len(evaluated) == 3
    assert drawn == drawn[: len(drawn) // 5] * 5
    for other in runs[1:]:
        assert other[:2] == (logged, evaluated)
        assert all(torch.equal(other[2][name], weights[name]) for name in weights)


def test_a_step_holds_all_its_batches_unharmed(tmp_path, family, tiny_cache):
    """Accumulation 8: every batch is what the cache holds, when its own step comes, seven backwards later."""
    trainer = make_trainer(
        tmp_path, family, tiny_cache, gradient_accumulation_steps=8, per_device_train_batch_size=1, max_steps=6
    )
    seen, step = [], trainer.compute_loss

    def look(model, inputs, *args, **kwargs):
        row = int(inputs["row"])
        for name in ("latents", "prompt_embeds"):
            assert torch.equal(inputs[name][0], trainer.train_dataset[row][name])
        seen.append(row)
        return step(model, inputs, *args, **kwargs)

    trainer.compute_loss = look
    trainer.train()
    assert len(seen) == 48


@pytest.mark.parametrize("threads", [-1, 5])
def test_the_number_of_threads_is_checked(tmp_path, threads):
    with pytest.raises(SciflowError, match="`dataloader_threads`"):
        make_args(tmp_path, dataloader_threads=threads)
