"""A cache in memory, and the paths by which a loader may read it."""

import torch

from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import batch_keys_of
from sciflow_hf.data.batches.threads import release
from sciflow_hf.data.layouts.base import Member

PATHS = {"1 thread": {"threads": 1}, "3 threads": {"threads": 3}, "main": {"threads": 0}, "worker": {"num_workers": 1}}
BFLOAT16, DIM = torch.bfloat16, 6


class Rows:
    """A cache in memory. Notes what was read: (row, names)."""

    dtype = BFLOAT16
    online_text = None

    def __init__(self, samples, buckets=None, empty_prompt=None):
        self.samples, self.buckets, self.empty_prompt = samples, buckets, empty_prompt
        self.captions = [f"caption {row}" for row in range(len(samples))]
        self.read = []

    def __len__(self):
        return len(self.samples)

    def members(self, row):
        names = {torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}
        return {
            n: Member(n, "memory", 0, v.nbytes, names[v.dtype], tuple(v.shape)) for n, v in self.samples[row].items()
        }

    def read_into(self, row, out, members):
        self.read.append((row, set(out)))
        assert members == self.members(row)
        for name, target in out.items():
            value = self.samples[row][name]
            assert target.is_contiguous() and target.shape == value.shape and target.dtype == value.dtype
            target.copy_(value)

    def describe(self, row):
        return f"row {row} of memory.parquet"


def make_rows(count=24, *, lengths=(5,), extras=True, **kwargs):
    rng, samples, buckets = torch.Generator().manual_seed(7), [], []
    for row in range(count):
        height, width = ((3, 5), (4, 2), (2, 7))[row % 3]
        sample = {
            "latents": torch.randn(4, height, width, generator=rng).to(BFLOAT16),
            "prompt_embeds": torch.randn(lengths[row % len(lengths)], DIM, generator=rng).to(BFLOAT16),
        }
        if extras:
            sample["time_ids"] = torch.randn(6, generator=rng).to(BFLOAT16)
            sample["loss_mask"] = torch.randint(0, 256, (height, width), generator=rng, dtype=torch.uint8)
            sample["txt_ids"] = torch.arange(20).reshape(5, 4)
            if row % 2:
                sample["pooled_prompt_embeds"] = torch.randn(2, generator=rng).to(BFLOAT16)
        samples.append(sample)
        buckets.append((height, width))
    return Rows(samples, buckets, **kwargs)


def make_sampler(rows, **options):
    return BucketBatchSampler(batch_keys_of(rows, pads_text=True), **({"batch_size": 2, "seed": 5} | options))


def released(loader):
    """Copies of the batches of an epoch, each given back before the next."""
    for batch in loader:
        copy = {name: value.clone() for name, value in batch.items()}
        release(batch)
        yield copy


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype and torch.equal(batch[name], value), name
