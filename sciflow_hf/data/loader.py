"""From the sampler's order to batches: every sample gets its key, every batch its positions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sciflow_hf.diffusion.randomness import hash64, noise_keys, signed64, uniform
from sciflow_hf.errors import SciflowError

from .buckets import BucketBatchSampler


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks samples: {name: (...)} x B -> {name: (B, ...)}; names that only some samples have are left out."""
    names = [name for name in samples[0] if all(name in sample for sample in samples)]
    return {name: _stack([sample[name] for sample in samples]) for name in names}


def _stack(values: list[Any]) -> torch.Tensor:
    if isinstance(values[0], int | float):
        return torch.tensor(values)
    return torch.stack([torch.as_tensor(value) for value in values])


def batch_keys_of(dataset: Any) -> list[Any]:
    """The batch key of every row: `batch_keys` of a cache, `buckets` of other data sets, else all alike."""
    for name in ("batch_keys", "buckets"):
        keys = getattr(dataset, name, None)
        if keys is not None:
            return list(keys)
    return [None] * len(dataset)


def row_ids_of(dataset: Any) -> list[str]:
    """Stable names of the rows: `row_ids` of a cache, else their numbers."""
    ids = getattr(dataset, "row_ids", None)
    return [str(i) for i in range(len(dataset))] if ids is None else list(ids)


def training_sampler(dataset: Any, args: Any) -> BucketBatchSampler:
    """The order of training for this rank; `args` is the `DiffusionTrainingArguments`."""
    return BucketBatchSampler(
        batch_keys_of(dataset),
        batch_size=args.train_batch_size,
        num_replicas=args.world_size,
        rank=args.process_index,
        accumulation_steps=args.gradient_accumulation_steps,
        seed=args.order_seed,
        drop_last=args.dataloader_drop_last,
    )


class KeyedDataset(Dataset[dict[str, Any]]):
    """Adds `row`, `position` and `noise_key` to samples, and drops captions. Indexed by (row, position, key)."""

    def __init__(self, dataset: Any, *, caption_dropout: float = 0.0) -> None:
        self.dataset, self.caption_dropout = dataset, caption_dropout
        self.empty_prompt = getattr(dataset, "empty_prompt", None) if caption_dropout else None
        if caption_dropout and self.empty_prompt is None:
            raise SciflowError(
                f"`caption_dropout` {caption_dropout}: this cache does not hold the empty prompt. "
                "`sciflow-hf cache build` stores it; older caches must be built again, or train without dropout."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int, int]) -> dict[str, Any]:
        row, position, key = index
        sample = dict(self.dataset[row])
        if self.empty_prompt is not None and uniform([key], stream="caption_dropout").item() < self.caption_dropout:
            sample.update({k: v.to(sample[k].dtype) for k, v in self.empty_prompt.items() if k in sample})
        return sample | {"row": row, "position": position, "noise_key": key}


class BucketLoader:
    """Batches in the sampler's order, from any position on. It does its own sharding: accelerate must not touch it.

    Args:
        dataset: map-style; a sample is a dict of tensors.
        sampler: of this rank.
        key_of: (epoch, row numbers, positions) -> int64 keys of a batch; by default from the sampler's seed.
        caption_dropout: probability, by sample key.
        num_workers, pin_memory, ...: of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: BucketBatchSampler,
        *,
        key_of: Callable[[int, Sequence[int], Sequence[int]], torch.Tensor] | None = None,
        caption_dropout: float = 0.0,
        collate_fn: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]] = collate,
        **loader_options: Any,
    ) -> None:
        self.dataset, self.sampler, self.collate_fn, self.loader_options = (
            dataset,
            sampler,
            collate_fn,
            loader_options,
        )
        self._key_of = key_of or (lambda epoch, rows, positions: noise_keys(sampler.seed, epoch, positions))
        self._keyed = KeyedDataset(dataset, caption_dropout=caption_dropout)
        self._start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def skip(self, num_batches: int) -> "BucketLoader":
        """The next iteration starts at that micro-batch; nothing before it is read."""
        self._start = num_batches
        return self

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start, self._start = self._start, 0
        batches = _IndexBatches(self.sampler, self._key_of, start)
        return iter(DataLoader(self._keyed, batch_sampler=batches, collate_fn=self.collate_fn, **self.loader_options))


class _IndexBatches:
    """(row, position, key) of every sample, batch by batch, from micro-batch `start` of the sampler's epoch."""

    def __init__(self, sampler: BucketBatchSampler, key_of: Callable[..., torch.Tensor], start: int) -> None:
        self.sampler, self.key_of, self.start, self.epoch = sampler, key_of, start, sampler.epoch
        self.batches = sampler.batches()

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for number in range(self.start, len(self.batches)):
            rows, positions = self.batches[number], self.sampler.positions(number)
            yield list(zip(rows, positions, self.key_of(self.epoch, rows, positions).tolist(), strict=True))


def evaluation_keys(row_ids: Sequence[str]) -> Callable[[int, Sequence[int], Sequence[int]], torch.Tensor]:
    """Keys of evaluation: by the sample's name alone, so the same in every run, at every step, on every machine."""

    def key_of(epoch: int, rows: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return torch.tensor([signed64(hash64(row_ids[row], "evaluation")) for row in rows], dtype=torch.int64)

    return key_of
