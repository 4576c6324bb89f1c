"""From an order of rows to batches: what a sample is made of, and who reads it when."""

import functools
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...diffusion.randomness import generator, hash64, noise_keys, randn, signed64, step_keys, uniform
from ...diffusion.sources import source_names_in
from ...errors import CacheError, SciflowError, printable
from ..cache import TEXT_KEYS
from ..layouts.base import ATTENTION_MASK, MASKS, Member, target_dtype
from .buckets import BucketBatchSampler
from .threads import Carve, Index, Layout, Samples, ThreadedReader

MASK = "prompt_embeds_mask"
IDS = ("txt_ids", "text_ids")
INDEX = ("row", "position", "noise_key", "step_key")
"""Names of the fields of an `Index` in a batch."""
BATCHED = (*INDEX, "latents", "latents_std", *MASKS, "pixel_values", "class_labels", *sorted({*TEXT_KEYS} - {*IDS}))
"""Entries of a batch that have one row for each sample, like its sources."""
Collate = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]
KeyOf = Callable[[int, Sequence[int], Sequence[int]], torch.Tensor]
"""(epoch, row numbers, positions) -> int64 keys of a batch."""


def collate(samples: Sequence[dict[str, Any]], *, pads_text: bool = False) -> dict[str, torch.Tensor]:
    """Stacks samples: {name: (...)} x B -> {name: (B, ...)}; names that only some samples have are left out.

    But of masks, that of a sample without one is 255 everywhere.

    Args:
        pads_text: pad `prompt_embeds` (L, D) with zeros to the longest, and add a `prompt_embeds_mask` (B, L), bool,
            where lengths differ or a sample has one.

    Raises:
        SciflowError: only some samples have a source, or arrays of one name have several shapes.
    """
    if (odd := _odd_sources(samples)) is not None:
        one, other = (_sources_of(f"row {samples[i].get('row')}", samples[i]) for i in (0, odd))
        raise SciflowError(f"{one} and {other}: they cannot share a batch. Give them different buckets.")
    for name in MASKS:
        if (known := next((sample[name] for sample in samples if name in sample), None)) is not None:
            full = torch.full_like(_tensor(name, {name: known}), _counts(_tensor(name, {name: known}).dtype))
            samples = [sample if name in sample else {**sample, name: full} for sample in samples]
    names = [name for name in samples[0] if all(name in sample for sample in samples)]
    padded: dict[str, torch.Tensor] = {}
    if pads_text and "prompt_embeds" in names:
        embeds = [sample["prompt_embeds"] for sample in samples]
        padded["prompt_embeds"] = pad_sequence(embeds, batch_first=True)
        padded |= _text_mask([len(text) for text in embeds], [sample.get(MASK) for sample in samples])
        names = [name for name in names if name not in ("prompt_embeds", MASK)]
    return {name: _stack(name, samples) for name in names} | padded


def _odd_sources(samples: Sequence[Mapping[str, Any]]) -> int | None:
    """The first sample with other sources than the first has; None where all have the same."""
    names = [source_names_in(sample) for sample in samples]
    return next((i for i, found in enumerate(names) if found != names[0]), None)


def _sources_of(row: str, sample: Mapping[str, Any]) -> str:
    """A row and its sources in words."""
    return f"{row} has {', '.join(f'`{name}`' for name in source_names_in(sample)) or 'no source'}"


def _counts(dtype: torch.dtype) -> int:
    """The value of a mask where all counts."""
    return 255 if dtype == torch.uint8 else 1


def text_rows(texts: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Encoded prompts, {name: (B, ...)}, one by one and without their padding.

    `prompt_embeds` end with the last token that `prompt_embeds_mask` lets through; a mask that is then all ones is
    left out, so that a row looks the same whatever prompts it was encoded with.
    """
    rows = [{name: value[i] for name, value in texts.items()} for i in range(len(texts["prompt_embeds"]))]
    for row in rows:
        if MASK in row:
            mask = row.pop(MASK).bool()
            length = int(mask.nonzero()[-1]) + 1 if mask.any() else len(mask)
            row["prompt_embeds"] = row["prompt_embeds"][:length]
            row |= {} if mask[:length].all() else {MASK: mask[:length]}
    return rows


def _stack(name: str, samples: Sequence[dict[str, Any]]) -> torch.Tensor:
    values = [_tensor(name, sample) for sample in samples]
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1:
        raise SciflowError(
            f"the rows {[sample.get('row') for sample in samples]} are to share a batch, but their `{name}` have the "
            f"shapes {shapes}. Give them different buckets."
        )
    return torch.stack(values)


def _tensor(name: str, sample: Mapping[str, Any]) -> torch.Tensor:
    try:
        return torch.as_tensor(sample[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise SciflowError(
            f"`{name}` of row {sample.get('row')} is a {type(sample[name]).__name__}, and batches are made by stacking "
            "tensors. Leave it out of the samples, or give a `data_collator` that encodes it (docs/own_data.md)."
        ) from error


def _text_mask(lengths: Sequence[int], stored: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """(B, longest) bool, under its name; nothing where no text is padded and no mask stored."""
    if len(set(lengths)) == 1 and all(own is None for own in stored):
        return {}
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, length, own in zip(mask, lengths, stored, strict=True):
        row[:length] = True if own is None else own.bool()
    return {MASK: mask}


def describe_row(dataset: Any, row: int) -> str:
    """A row in words, for messages."""
    describe = getattr(dataset, "describe", None)
    return printable(describe(row)) if callable(describe) else f"row {row}"


@dataclass(frozen=True, slots=True)
class _Plan:
    """The parts of a sample: arrays to read, and the empty prompt's instead of some of them."""

    row: int
    key: int
    members: Mapping[str, Member]
    empty_text: Mapping[str, torch.Tensor]
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class KeyedDataset(Dataset[dict[str, Any]]):
    """Batches by the (row, position, key) of their samples.

    Captions and sources are dropped, posteriors drawn, position ids left out.

    Random draws in `dataset[row]` and in another `collate_fn`, by the global generators of Python, NumPy and torch,
    follow from the keys.

    Args:
        dataset: of dicts. One that has `members(row)`, `read_into(row, out, members)` and `dtype`, as
            `LatentCache`, is read into place, and only what is needed. Where its `online_text` is set, no text is
            read: `complete` makes it of `captions[row]`.
            One that has `keyed(row, key)`, as `MicroscopyTiles`, is asked for the sample of a key.
        caption_dropout: probability of the empty prompt, by key.
        source_dropout: probability that an optimizer step trains without its sources and `edit_mask`, by its
            `step_key`: then all of its samples do, so that no batch mixes kinds.
        pads_text: a batch may hold texts of different lengths; see `collate`.
        posterior: draw latents, by key, from the normal distribution of mean `latents` and deviation `latents_std`,
            where there is one.
        collate_fn: of samples; with another one than `collate` nothing is read into place.

    Raises:
        SciflowError: `caption_dropout` without an empty prompt in the cache, `source_dropout` without sources, either
            of them where the text encoder has read the sources.
        CacheError: (while reading) an empty prompt, or rows of a batch, whose shapes do not fit together.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        caption_dropout: float = 0.0,
        source_dropout: float = 0.0,
        pads_text: bool = False,
        posterior: bool = False,
        collate_fn: Collate = collate,
    ) -> None:
        self.dataset, self.caption_dropout, self.pads_text = dataset, caption_dropout, pads_text
        self.source_dropout = source_dropout
        _check_dropouts(dataset, caption_dropout=caption_dropout, source_dropout=source_dropout)
        self.collate_fn = (
            functools.partial(collate, pads_text=True) if collate_fn is collate and pads_text else collate_fn
        )
        self.stacks = collate_fn is collate
        self.online = getattr(dataset, "online_text", None) is not None
        self.images, self.posterior = getattr(dataset, "online_images", None), posterior
        self.empty_prompt = getattr(dataset, "empty_prompt", None) if caption_dropout and not self.online else None
        if caption_dropout and not self.online and self.empty_prompt is None:
            raise SciflowError(
                f"`caption_dropout` {caption_dropout}: this data does not hold the empty prompt. `sciflow-hf cache "
                "build` stores it, and older caches must be built again; a data set of your own has it as "
                "`empty_prompt`, {name: tensor}. Or train without dropout."
            )
        if self.empty_prompt is not None and pads_text:  # for rows that have a mask
            everywhere = torch.ones(len(self.empty_prompt["prompt_embeds"]), dtype=torch.bool)
            self.empty_prompt = {MASK: everywhere} | self.empty_prompt
        self.left_out = {*IDS, *(TEXT_KEYS if self.online else ()), *(() if posterior else ("latents_std",))}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[Index]) -> dict[str, torch.Tensor]:
        """A batch, of whatever data set and by whatever `collate_fn`."""
        if self.stacks and hasattr(self.dataset, "read_into"):
            return self.read_batch(indices, new_tensors)
        return self.drawn(self.collated([self._stored(index) for index in indices], indices))

    def _stored(self, index: Index) -> Any:
        """The data set's sample for a row."""
        row, _, key, *_ = index
        if hasattr(self.dataset, "read_into"):
            return {name: values[0] for name, values in self.read_batch([index], new_tensors).items()}
        if hasattr(self.dataset, "keyed"):
            return self.dataset.keyed(row, key)
        with seeded(key):
            return self.dataset[row]

    def collated(self, stored: Sequence[Any], indices: Sequence[Index]) -> dict[str, Any]:
        """Samples as a batch by `collate_fn`, with the keys of the loader where that leaves them out.

        Raises:
            SciflowError: a sample or the batch is no dict, or holds another number of samples than its keys.
        """
        samples = [self._sample(sample, index) for sample, index in zip(stored, indices, strict=True)]
        if self._loses_sources(indices):
            samples = [without_sources(sample) for sample in samples]
        with seeded(indices[0][2]):
            batch = self.collate_fn(samples)
        if not isinstance(batch, Mapping):
            raise SciflowError(
                f"`data_collator` gave a {type(batch).__name__}, but must return a dict of tensors (B, ...)."
            )
        batch = {name: value for name, value in batch.items() if name not in self.left_out}
        for name, column in zip(INDEX, zip(*indices, strict=True), strict=False):
            batch.setdefault(name, torch.tensor(column))
        size, tensors = len(batch["noise_key"]), {n: v for n, v in batch.items() if isinstance(v, torch.Tensor)}
        batched = {*BATCHED, *source_names_in(tensors)}
        odd = {n: tuple(v.shape) for n, v in tensors.items() if n in batched and v.shape[:1] != (size,)}
        if odd:
            told = ", ".join(f"`{name}` {shape}" for name, shape in odd.items())
            raise SciflowError(
                f"`data_collator` made {told} of the {len(indices)} rows {[index[0] for index in indices]}: the first "
                f"dimension must be {size}, one entry a sample. One that leaves samples out returns `noise_key` and "
                "`row` of the others."
            )
        return batch

    def _sample(self, stored: Any, index: Index) -> dict[str, Any]:
        """A sample as `collate_fn` gets it: without its caption where that is dropped, with its keys."""
        row, _, key, *_ = index
        if not isinstance(stored, Mapping):
            raise SciflowError(
                f"row {row} of the data set is a {type(stored).__name__}, but must be a dict such as "
                '{"latents": ..., "prompt_embeds": ...} (docs/own_data.md).'
            )
        sample = {name: value for name, value in stored.items() if name not in self.left_out}
        if not hasattr(self.dataset, "read_into"):
            text = self._empty_text(row, key, sample)
            sample |= {name: value.to(torch.as_tensor(sample[name]).dtype) for name, value in text.items()}
        return sample | dict(zip(INDEX, index, strict=False))

    def drawn(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same batch, its latents drawn by key where it holds their deviation."""
        if "latents_std" in batch:
            rows = zip(batch["latents"], batch.pop("latents_std"), batch["noise_key"].tolist(), strict=True)
            batch["latents"] = torch.stack([_draw(mean, std, key) for mean, std, key in rows])
        return batch

    def read_batch(self, indices: Sequence[Index], carve: Carve) -> dict[str, torch.Tensor]:
        """As `collate` of the samples, but read into tensors that `carve` makes of {name: (shape, dtype)}."""
        drops = self._loses_sources(indices)
        plans = [self._plan(row, key, drops) for row, _, key, *_ in indices]
        if (odd := _odd_sources([plan.layout for plan in plans])) is not None:
            one, other = (_sources_of(describe_row(self.dataset, plans[i].row), plans[i].layout) for i in (0, odd))
            raise CacheError(f"{one} and {other}: they cannot share a batch. Give them different buckets.")
        apart = {"latents_std", MASK} if self.pads_text else {"latents_std"}
        names = [n for n in plans[0].layout if n not in apart and all(n in plan.layout for plan in plans)]
        names += [n for n in MASKS if n not in names and any(n in plan.layout for plan in plans)]
        stacked = {name: self._stacked(name, plans) for name in names}
        batch = carve({name: ((len(plans), *shape), dtype) for name, (shape, dtype) in stacked.items()})
        pads, masks = self.pads_text and "prompt_embeds" in names, []
        for number, plan in enumerate(plans):
            out = {name: batch[name][number] for name in names}
            for name in [name for name in names if name not in plan.layout]:
                out.pop(name).fill_(_counts(batch[name].dtype))
            out |= new_tensors({name: where for name, where in plan.layout.items() if name in apart})
            if pads:
                length = plan.layout["prompt_embeds"][0][0]
                out["prompt_embeds"][length:] = 0
                out["prompt_embeds"] = out["prompt_embeds"][:length]
            stored = {n: tensor for n, tensor in out.items() if n in plan.members and n not in plan.empty_text}
            self.dataset.read_into(plan.row, stored, plan.members)
            if self.images is not None:
                for name, value in self.dataset.image(plan.row, plan.key).items():
                    out[name].copy_(value)
            for name in out.keys() & plan.empty_text.keys():
                out[name].copy_(plan.empty_text[name])
            if "latents_std" in out:
                out["latents"].copy_(_draw(out["latents"], out["latents_std"], plan.key))
            masks.append(out.get(MASK))
        if pads:
            batch |= _text_mask([plan.layout["prompt_embeds"][0][0] for plan in plans], masks)
        columns = (torch.tensor(column) for column in zip(*indices, strict=True))
        return batch | dict(zip(INDEX, columns, strict=False))

    def complete(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adds the classes of a batch of latents, and what is encoded online of it; the same batch."""
        if (labels := getattr(self.dataset, "class_labels", None)) is not None:
            batch["class_labels"] = labels[batch["row"]]
        if (worst := getattr(self.dataset, "with_worst", None)) is not None:
            batch["with_worst"] = worst[batch["row"]]
        if self.images is not None:
            encoded = self.images.encoded(batch, self.dataset.dtype)
            batch.update({n: v for n, v in encoded.items() if self.posterior or n != "latents_std"})
            self.drawn(batch)
        if self.online:
            dropped = (uniform(batch["noise_key"], stream="caption_dropout") < self.caption_dropout).tolist()
            rows = batch["row"].tolist()
            captions = batch.pop("captions", None) or self._captions(rows)  # the former of a stream
            captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
            batch.update({n: v for n, v in self.dataset.online_text(captions).items() if n not in IDS})
        return batch

    def _captions(self, rows: Sequence[int]) -> list[str]:
        """The captions of some rows; a cache reads them one by one."""
        if callable(one := getattr(self.dataset, "caption", None)):
            return [one(row) for row in rows]
        return [self.dataset.captions[row] for row in rows]

    def _loses_sources(self, indices: Sequence[Index]) -> bool:
        """Whether the optimizer step that a batch is of trains without its sources."""
        share = self.source_dropout
        return share > 0 and uniform([indices[0][3]], stream="source_dropout").item() < share

    def _plan(self, row: int, key: int, drops_sources: bool) -> _Plan:
        members = self.dataset.members(row)
        left_out = {ATTENTION_MASK, *self.left_out}  # of SciForma's caches: klein's network takes none
        wanted = {name: member for name, member in members.items() if name not in left_out}
        wanted = without_sources(wanted) if drops_sources else wanted
        text = {} if self.empty_prompt is None else self._empty_text(row, key, wanted)
        layout = {n: (tuple(text.get(n, m).shape), target_dtype(m, self.dataset.dtype)) for n, m in wanted.items()}
        layout |= {} if self.images is None else self.images.layout(self.dataset.buckets[row])
        return _Plan(row, key, members, text, layout)

    def _empty_text(self, row: int, key: int, stored: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Replacements for arrays of a sample whose caption is dropped; empty otherwise."""
        if self.empty_prompt is None or uniform([key], stream="caption_dropout").item() >= self.caption_dropout:
            return {}
        text = {name: value for name, value in self.empty_prompt.items() if name in stored}
        for name, value in text.items():
            if not self.pads_text and value.shape != stored[name].shape:
                raise CacheError(
                    f"{describe_row(self.dataset, row)}: `{name}` has shape {tuple(stored[name].shape)}, that of the "
                    f"empty prompt {tuple(value.shape)}, but this network takes texts of one length. Build the cache "
                    "again with one `--max_sequence_length`, or train without `--caption_dropout`."
                )
        return text

    def _stacked(self, name: str, plans: Sequence[_Plan]) -> tuple[tuple[int, ...], torch.dtype]:
        free = 1 if self.pads_text and name == "prompt_embeds" else 0  # dimensions in which rows may differ
        plans = [plan for plan in plans if name in plan.layout]
        shapes = [plan.layout[name][0] for plan in plans]
        odd = next((i for i, shape in enumerate(shapes) if shape[free:] != shapes[0][free:]), None)
        if odd is not None:
            first, other = (describe_row(self.dataset, plans[i].row) for i in (0, odd))
            raise CacheError(
                f"{first} and {other} are to share a batch, but their `{name}` have the shapes {shapes[0]} and "
                f"{shapes[odd]}. Give them different buckets, or build the cache again with one set of encoders."
            )
        return max(shapes), plans[0].layout[name][1]


def without_sources(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample (or names of one) as one of text-to-image."""
    gone = {*source_names_in(sample), "edit_mask"}
    return {name: value for name, value in sample.items() if name not in gone}


def _check_dropouts(dataset: Any, **shares: float) -> None:
    """SciflowError where captions or sources cannot be dropped."""
    has_sources, metadata = (getattr(dataset, name, None) for name in ("has_sources", "metadata"))
    if shares["source_dropout"] and has_sources is False:
        raise SciflowError(
            f"`source_dropout` {shares['source_dropout']}: no row of this data has a source. Leave it out, or add "
            "edits."
        )
    if has_sources and (metadata or {}).get("text_reads_sources"):
        for name, share in shares.items():
            if share:
                raise SciflowError(
                    f"`{name}` {share}: the text encoder of this cache has read the sources with the captions, and the "
                    "cache does not hold the texts without them. Train without it."
                )


def _draw(mean: torch.Tensor, std: torch.Tensor, key: int) -> torch.Tensor:
    """A posterior sample of one row."""
    noise = randn([key], (1, *mean.shape), stream="posterior")[0].to(mean.device)
    return (mean.float() + std.float() * noise).to(mean.dtype)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Draws of the global generators of Python, NumPy and torch follow from `key`; then they are as before."""
    python, numpy, seed = random.getstate(), np.random.get_state(), hash64(key, "sample")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def new_tensors(layout: Layout) -> dict[str, torch.Tensor]:
    """A `Carve` that always takes new memory."""
    return {name: torch.empty(tuple(shape), dtype=dtype) for name, (shape, dtype) in layout.items()}


# -- loaders ----------------------------------------------------------------------------------------------------


def is_stream(dataset: Any) -> bool:
    """Whether a data set is read one sample after another, and not by row numbers."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def batch_keys_of(dataset: Any, *, pads_text: bool = False) -> list[Any]:
    """The batch key of every row: `batch_keys` of a cache, `buckets` of other data sets, else all alike.

    With `pads_text` `padded_batch_keys`, without the length of the text, or `buckets`.
    """
    keys = getattr(dataset, "padded_batch_keys" if pads_text else "batch_keys", None)
    if keys is None:
        keys = _per_row(dataset, "buckets")
    if keys is None:
        return [None] * len(dataset)
    return [tuple(key) if isinstance(key, list) else key for key in keys]


def row_ids_of(dataset: Any) -> list[str]:
    """Stable names of the rows: `row_ids` of a cache, else their numbers."""
    ids = _per_row(dataset, "row_ids")
    if ids is None:
        return [str(i) for i in range(len(dataset))]
    ids = [str(name) for name in ids]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise SciflowError(f"`row_ids` holds {twice!r} twice: give each row of the data set a name of its own.")
    return ids


def groups_of(dataset: Any) -> list[str]:
    """The group of every row: `groups`, else each row is its own."""
    groups = _per_row(dataset, "groups")
    return row_ids_of(dataset) if groups is None else [str(name) for name in groups]


def _per_row(dataset: Any, name: str) -> Sequence[Any] | None:
    values = getattr(dataset, name, None)
    if values is not None and len(values) != len(dataset):
        raise SciflowError(
            f"`{name}` of the data set has {len(values)} entries for {len(dataset)} rows: it needs one for each row."
        )
    return values


def first_batch(
    dataset: Any, *, batch_size: int, collate_fn: Collate, pads_text: bool, posterior: bool, **_: Any
) -> dict[str, Any]:
    """A batch as training would make it, for a look at it: with position ids and deviations, which training drops."""
    keys = batch_keys_of(dataset, pads_text=pads_text)
    rows = [row for row, key in enumerate(keys) if key == keys[0]][:batch_size]
    keyed = KeyedDataset(dataset, pads_text=pads_text, posterior=posterior, collate_fn=collate_fn)
    keyed.left_out -= {*IDS, "latents_std"}
    indices = list(zip(rows, rows, noise_keys(0, 0, rows).tolist(), strict=True))
    return keyed.complete(keyed.collated([keyed._stored(index) for index in indices], indices))


def training_sampler(dataset: Any, args: Any, *, pads_text: bool = False) -> BucketBatchSampler:
    """The order of training for this rank; `args` is the `DiffusionTrainingArguments`."""
    return BucketBatchSampler(
        batch_keys_of(dataset, pads_text=pads_text),
        batch_size=args.train_batch_size,
        num_replicas=args.world_size,
        rank=args.process_index,
        accumulation_steps=args.gradient_accumulation_steps,
        seed=args.order_seed,
        shuffle=args.train_sampling_strategy != "sequential",
        drop_last=args.dataloader_drop_last,
        repeats=getattr(dataset, "repeats", None),
    )


class BatchLoader:
    """Batches read in an order. It does its own sharding: accelerate must not touch it.

    A data set that can be read into place is read ahead by threads into `buffers` reused buffers: give batches back
    by `batch.release()` after use, or each costs new memory. Any other comes through a `torch.utils.data.DataLoader`.

    Args:
        dataset: a sample is a dict of tensors.
        seed: of the keys.
        total_batch: samples of an optimizer step.
        key_of: by default keys follow from the seed.
        step_keys: batches also have a `step_key` (B,), equal for all samples of an optimizer step; with
            `source_dropout` always.
        caption_dropout, source_dropout, pads_text, posterior, collate_fn: see `KeyedDataset`.
        threads: that read ahead; 0 reads as batches are asked for.
        buffers: batches that are held at once (accumulation), and those to read into.
        num_workers: processes of the DataLoader; more than 0 wins over `threads`.
        pin_memory: batches in page-locked memory.
        loader_options: of the DataLoader.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        seed: int,
        total_batch: int,
        key_of: KeyOf | None = None,
        step_keys: bool = False,
        caption_dropout: float = 0.0,
        source_dropout: float = 0.0,
        pads_text: bool = False,
        posterior: bool = False,
        collate_fn: Collate = collate,
        threads: int = 2,
        buffers: int = 3,
        num_workers: int = 0,
        pin_memory: bool = False,
        **loader_options: Any,
    ) -> None:
        self.dataset, self.seed, self.total_batch, self.pads_text = dataset, seed, total_batch, pads_text
        self.buffers, self.pin_memory = buffers, pin_memory
        self.threads = threads if collate_fn is collate and not num_workers else 0
        # What a `collate_fn` encodes on a GPU cannot be pinned; in worker processes it cannot be there.
        pin_memory = pin_memory and (collate_fn is collate or num_workers > 0)
        self.loader_options = loader_options | {"num_workers": num_workers, "pin_memory": pin_memory}
        self._key_of = key_of or (lambda epoch, rows, positions: noise_keys(seed, epoch, positions))
        self._step_keys, self._start = step_keys or source_dropout > 0, 0
        self._keyed = KeyedDataset(
            dataset, caption_dropout=caption_dropout, source_dropout=source_dropout, pads_text=pads_text,
            posterior=posterior, collate_fn=collate_fn,
        )  # fmt: skip
        self._readers: weakref.WeakSet[ThreadedReader] = weakref.WeakSet()

    def skip(self, num_batches: int) -> Self:
        """The next iteration starts at that micro-batch. No sample before it is read; a stream reads its light rows."""
        self._start = num_batches
        return self

    def close(self) -> None:
        """Ends the threads of iterations that were left in the middle."""
        for reader in list(self._readers):
            reader.close()

    def _indices(self, epoch: int, rows: Sequence[Any], positions: Sequence[int]) -> list[Index]:
        columns = [rows, positions, self._key_of(epoch, rows, positions).tolist()]
        if self._step_keys:
            columns.append(step_keys(self.seed, epoch, positions, self.total_batch).tolist())
        return list(zip(*columns, strict=True))

    def _read(self, samples: Samples, batches: Iterator[list[Index]], epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        if self.threads:
            reader = ThreadedReader(
                samples, batches, threads=self.threads, buffers=self.buffers, pin_memory=self.pin_memory
            )
            self._readers.add(reader)
            return reader
        # Its own generator: workers or not, the random numbers of the training process stay the same.
        seeds = generator(hash64(self.seed, epoch), "workers")
        data: Any = samples
        loader = DataLoader(data, batch_size=None, sampler=batches, generator=seeds, **self.loader_options)
        return map(samples.complete, loader)


class BucketLoader(BatchLoader):
    """Batches of a map-style data set in the order of a sampler, from any position on.

    Args:
        dataset, key_of, options: as of `BatchLoader`.
        sampler: of this rank.
    """

    def __init__(self, dataset: Any, sampler: BucketBatchSampler, **options: Any) -> None:
        super().__init__(dataset, seed=sampler.seed, total_batch=sampler.total_batch, **options)
        self.sampler = sampler
        self.threads = self.threads if hasattr(dataset, "read_into") else 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start, self._start = self._start, 0
        epoch, rows, positions = self.sampler.epoch, self.sampler.epoch_batches(), self.sampler.positions
        batches = (self._indices(epoch, rows[i].tolist(), positions(i)) for i in range(start, len(rows)))
        return self._read(self._keyed, batches, epoch)


def evaluation_keys(row_ids: Sequence[str]) -> KeyOf:
    """Keys of evaluation: by the sample's name alone, so the same in every run, at every step, on every machine."""

    def key_of(epoch: int, rows: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return torch.tensor([signed64(hash64(row_ids[row], "evaluation")) for row in rows], dtype=torch.int64)

    return key_of
