"""From the sampler's order to batches: every sample gets its key, every batch its positions."""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...diffusion.randomness import generator, hash64, noise_keys, signed64, step_keys
from .buckets import BucketBatchSampler
from .samples import KeyedDataset, collate
from .threads import Index, ThreadedReader


def batch_keys_of(dataset: Any, *, pads_text: bool = False) -> list[Any]:
    """The batch key of every row: `batch_keys` of a cache, `buckets` of other data sets, else all alike.

    With `pads_text` always `buckets`: (height, width) without the length of the text.
    """
    for name in ("buckets",) if pads_text else ("batch_keys", "buckets"):
        keys = getattr(dataset, name, None)
        if keys is not None:
            return list(keys)
    return [None] * len(dataset)


def row_ids_of(dataset: Any) -> list[str]:
    """Stable names of the rows: `row_ids` of a cache, else their numbers."""
    ids = getattr(dataset, "row_ids", None)
    return [str(i) for i in range(len(dataset))] if ids is None else list(ids)


def training_sampler(dataset: Any, args: Any, *, pads_text: bool = False) -> BucketBatchSampler:
    """The order of training for this rank; `args` is the `DiffusionTrainingArguments`."""
    return BucketBatchSampler(
        batch_keys_of(dataset, pads_text=pads_text),
        batch_size=args.train_batch_size,
        num_replicas=args.world_size,
        rank=args.process_index,
        accumulation_steps=args.gradient_accumulation_steps,
        seed=args.order_seed,
        drop_last=args.dataloader_drop_last,
        repeats=getattr(dataset, "repeats", None),
    )


class BucketLoader:
    """Batches in the sampler's order, from any position on. It does its own sharding: accelerate must not touch it.

    A data set that can be read into place is read ahead by threads into `buffers` reused buffers: give batches back
    by `batch.release()` after use, or each costs new memory. Any other comes through a `torch.utils.data.DataLoader`.

    Args:
        dataset: map-style; a sample is a dict of tensors.
        sampler: of this rank.
        key_of: (epoch, row numbers, positions) -> int64 keys of a batch; by default from the sampler's seed.
        step_keys: batches have a `step_key` (B,), too, alike in all samples of an optimizer step.
        caption_dropout, pads_text, posterior: see `KeyedDataset`.
        collate_fn: another one than `collate` goes with the DataLoader.
        threads: that read ahead; 0 for the DataLoader.
        buffers: batches that are held at once (accumulation), and two to read into.
        num_workers: processes of the DataLoader; more than 0 wins over `threads`.
        pin_memory: batches in page-locked memory.
        loader_options: of the DataLoader.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: BucketBatchSampler,
        *,
        key_of: Callable[[int, Sequence[int], Sequence[int]], torch.Tensor] | None = None,
        step_keys: bool = False,
        caption_dropout: float = 0.0,
        pads_text: bool = False,
        posterior: bool = False,
        collate_fn: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]] = collate,
        threads: int = 2,
        buffers: int = 3,
        num_workers: int = 0,
        pin_memory: bool = False,
        **loader_options: Any,
    ) -> None:
        self.dataset, self.sampler, self.buffers, self.pin_memory = dataset, sampler, buffers, pin_memory
        self._key_of = key_of or (lambda epoch, rows, positions: noise_keys(sampler.seed, epoch, positions))
        self._step_keys = step_keys
        self._keyed = KeyedDataset(dataset, caption_dropout=caption_dropout, pads_text=pads_text, posterior=posterior)
        self.threads = threads if collate_fn is collate and self._keyed.reads_into_place and not num_workers else 0
        self.collate_fn = (
            functools.partial(collate, pads_text=True) if collate_fn is collate and pads_text else collate_fn
        )
        self.loader_options = loader_options | {"num_workers": num_workers, "pin_memory": pin_memory}
        self._readers: weakref.WeakSet[ThreadedReader] = weakref.WeakSet()
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
        batches = _IndexBatches(self.sampler, self._key_of, start, self._step_keys)
        if self.threads:
            reader = ThreadedReader(
                self._keyed, batches, threads=self.threads, buffers=self.buffers, pin_memory=self.pin_memory
            )
            self._readers.add(reader)
            return reader
        # Its own generator: workers or not, the random numbers of the training process stay the same.
        seeds = generator(hash64(self.sampler.seed, self.sampler.epoch), "workers")
        loader = DataLoader(
            self._keyed, batch_sampler=batches, collate_fn=self.collate_fn, generator=seeds, **self.loader_options
        )
        return self._completed(iter(loader))

    def _completed(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            self._keyed.complete(batch)
            yield batch

    def close(self) -> None:
        """Ends the threads of iterations that were left in the middle."""
        for reader in list(self._readers):
            reader.close()


class _IndexBatches:
    """The index of every sample, batch by batch, from micro-batch `start` of the sampler's epoch."""

    def __init__(
        self, sampler: BucketBatchSampler, key_of: Callable[..., torch.Tensor], start: int, with_step_keys: bool
    ) -> None:
        self.sampler, self.key_of, self.start, self.epoch = sampler, key_of, start, sampler.epoch
        self.with_step_keys = with_step_keys
        self.batches = sampler.epoch_batches()

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __iter__(self) -> Iterator[list[Index]]:
        for number in range(self.start, len(self.batches)):
            rows, positions = self.batches[number].tolist(), self.sampler.positions(number)
            columns = [rows, positions, self.key_of(self.epoch, rows, positions).tolist()]
            if self.with_step_keys:
                total = self.sampler.total_batch
                columns.append(step_keys(self.sampler.seed, self.epoch, positions, total).tolist())
            yield list(zip(*columns, strict=True))


def evaluation_keys(row_ids: Sequence[str]) -> Callable[[int, Sequence[int], Sequence[int]], torch.Tensor]:
    """Keys of evaluation: by the sample's name alone, so the same in every run, at every step, on every machine."""

    def key_of(epoch: int, rows: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return torch.tensor([signed64(hash64(row_ids[row], "evaluation")) for row in rows], dtype=torch.int64)

    return key_of
