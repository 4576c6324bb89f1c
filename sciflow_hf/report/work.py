"""The arithmetic of a run, counted by torch on a network without weights, and the bytes of its data."""

import copy
import math
from collections import Counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..data.batches.loader import batch_keys_of, is_stream
from ..data.cache import LatentCache
from ..data.writing import readable_bytes
from ..engines.checkpointing import share_of
from ..families.base import PipelineFamily

USUAL_TFLOPS = 400.0
"""TFLOP/s that a device is taken to reach: about half of the dense bfloat16 rate in the data sheet of an H100."""
_KINDS = 8  # of batches that are counted, the commonest
_STORED = 2  # bytes of a number in a cache


def step_flops(family: Any, args: Any, train_dataset: Any, *, trains_all: bool) -> float | None:
    """About how many floating point operations an optimizer step takes on all devices together.

    The forward pass of the commonest kinds of batches is counted; the backward pass takes as many again for the
    activations, and for the weights where all are trained, checkpointed blocks their forward pass once more. A group of
    candidates is all of them, and their reference's forward pass. None: a family or data set that shows no shapes.
    """
    rows = _rows_with_shapes(train_dataset)
    if rows is None or not isinstance(family, PipelineFamily):
        return None
    counts = Counter(batch_keys_of(rows)).most_common(_KINDS)
    first = {key: row for row, key in reversed(list(enumerate(batch_keys_of(rows))))}
    network = PipelineFamily.load_model(family, dtype=args.weight_dtype, meta=True)
    forward = sum(_forward_flops(family, network, rows, first[key]) * count for key, count in counts)
    passes = (3 if trains_all else 2) + share_of(args)
    candidates = getattr(train_dataset, "group_size", None)
    passes = passes if candidates is None else candidates * (passes + 1)
    samples = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return float(forward / sum(count for _, count in counts) * passes * samples)


def _rows_with_shapes(train_dataset: Any) -> LatentCache | None:
    """Samples of the network whose shapes are known; of groups all candidates, of a stream its first row."""
    rows = train_dataset.first() if is_stream(train_dataset) else getattr(train_dataset, "cache", train_dataset)
    return rows if isinstance(rows, LatentCache) else None


def _forward_flops(family: PipelineFamily, network: Any, rows: LatentCache, row: int) -> int:
    """The operations of a forward pass with the sample of a row."""
    family = copy.copy(family)  # keeps statistics on the device that they were used on last
    sample = {"latents": torch.empty(rows.latent_shapes[row].tolist(), device="meta")} | rows.shapes(row)
    length = vars(family).get("max_sequence_length", 0)
    for name, width in family.widths(network.config).items():
        shape = (length, width) if name == "prompt_embeds" else (width,)
        sample.setdefault(name, torch.empty(shape, device="meta"))  # text that is encoded in training
    if family.stores_time_ids:
        sample.setdefault("time_ids", torch.empty(6, device="meta"))
    family.check_sample(network, sample)
    batch = {name: value[None] for name, value in sample.items()}
    latents = family.clean_latents(batch)
    levels = torch.zeros(1, device="meta", dtype=family.process.level_dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.predict(network, batch, latents, levels)
    return counter.get_total_flops()


def hours_text(flops: float, args: Any, steps: int) -> str:
    """The arithmetic of a step and the hours of a run, in words."""
    rate, devices = args.device_tflops or USUAL_TFLOPS, args.world_size
    hours = flops * steps / (devices * rate * 1e12) / 3600
    told = "" if args.device_tflops else ", which is assumed: --device_tflops says what yours reaches"
    return (
        f"{flops / 1e12:,.3g} TFLOP a step, {steps:,} steps: about {hours:,.3g} hours on {devices} device"
        f"{'s' * (devices > 1)} at {rate:g} TFLOP/s each{told}; not counted are evaluations, images and encoders"
    )


def data_text(family: Any, network: Any, train_dataset: Any) -> str:
    """The bytes of latents, with those of sources, and of text, which an epoch reads; "" where shapes are unknown."""
    rows = _rows_with_shapes(train_dataset)
    if rows is None:
        return ""
    times = len(train_dataset) / len(rows) if is_stream(train_dataset) else 1
    latents = float(rows.latent_shapes.prod(axis=1).sum())
    latents += sum(math.prod(shape) for shapes in (rows.source_shapes if rows.has_sources else ()) for shape in shapes)
    latents *= _STORED * times
    text = float(rows.text_shapes.prod(axis=1).sum()) * _STORED * times
    told = f"text {readable_bytes(text)}"
    if rows.online_text is not None and isinstance(family, PipelineFamily):
        width = family.widths(network.config).get("prompt_embeds", 0)
        text = len(rows) * times * vars(family).get("max_sequence_length", 0) * width * _STORED
        told = f"text encoded in training (stored, {readable_bytes(text)})"
    images = " encoded in training" * (rows.online_images is not None)
    return f"data: latents {readable_bytes(latents)}{images}, {told}"
