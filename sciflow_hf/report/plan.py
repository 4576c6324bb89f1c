"""The plan of a run (`--dry_run`) and the contents of one batch (`--debug_batch`), as text."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..adapters.export import check_run
from ..adapters.layers import adapter_facts, network_of, title
from ..adapters.text_encoders import NetworkWithText
from ..data.batches.loader import batch_keys_of, is_stream, training_sampler
from ..data.batches.threads import release
from ..data.prior import without_prior
from ..data.writing import text_table
from ..engines.checkpointing import blocks_of, computed_again
from ..engines.memory import (
    USABLE,
    MemoryOptions,
    device_memory,
    estimate,
    extra_arithmetic,
    fitting,
    in_words,
    least_share,
    possible_shares,
)
from ..engines.optimizers import rates_of, state_bytes
from ..errors import SciflowError, counted
from ..families.base import ModelFamily, PipelineFamily
from .work import data_text, hours_text, step_flops

VALUES_OF_VAE = 5  # per pixel and channel of the first level, at the peak of FLUX's and SDXL's encoder, counted


def plan(
    model: torch.nn.Module,
    family: ModelFamily,
    args: TrainingArguments,
    train_dataset: Any,
    eval_dataset: Any = None,
) -> str:
    """Says what `--dry_run` prints: options, trained layers, buckets, steps, estimates of memory, disk and hours.

    Args:
        model: the network with its adapter; without weights (`load_model(..., meta=True)`) is enough.
        family: of the network.
        args: the options of the run.
        train_dataset: what would be trained on.
        eval_dataset: what would be held out.

    Raises:
        SciflowError: options that the run would refuse, or a stream of your own, which has no number of samples.
    """
    check_run(model, args.export_formats, family)
    if is_stream(train_dataset) and not hasattr(train_dataset, "__len__"):
        raise SciflowError("a stream of your own has no number of samples to plan with; `debug_batch` shows a batch.")
    rows = getattr(args, "rows_of_epoch", train_dataset)  # of a training by rewards those of a rollout
    sampler = training_sampler(rows, args, pads_text=family.pads_text)
    steps_per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    total_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    tokens, memory = tokens_of(train_dataset, family), device_memory(args)
    encoders = encoder_bytes(model, family, args, train_dataset)
    sections = {
        "Family": f"{family}",
        "Options that differ from the defaults": _lines(args.changed_options()),
        "Trained": _trained(model, args),
        "Buckets of an epoch": f"{sampler.table()}\n{image_tokens(train_dataset, family)}".rstrip(),
        "Steps": (
            f"{steps:,} steps ({steps_per_epoch:,} an epoch), {total_batch} samples a step "
            f"({args.train_batch_size} x {args.world_size} ranks x {args.gradient_accumulation_steps} accumulation); "
            f"{len(without_prior(train_dataset)):,} samples to train on{_edits(train_dataset)}, "
            f"{len(eval_dataset or []):,} held out{_groups(train_dataset)}{_prior(train_dataset)}"
            f"{_images(train_dataset)}"
        ),
        "Memory and disk, estimated": _needed(model, args, steps, steps_per_epoch, **tokens)
        + _frozen(encoders)
        + "".join(f"\n{text}" for text in [data_text(family, network_of(model), train_dataset)] if text),
    }
    flops = step_flops(family, args, train_dataset, trains_all=adapter_facts(model) is None)
    if flops is not None:
        sections["Time, estimated"] = hours_text(flops, args, steps)
    left = None if memory is None else memory - sum(encoders.values())
    if shares := _shares(model, args, left, **tokens):
        sections["Activation checkpointing by share, estimated"] = shares
    if memory is not None:
        fits = f"Options that fit into {memory / 1e9:.3g} GB, of which {USABLE:.0%} are counted on"
        sections[fits] = _fitting(model, args, memory - sum(encoders.values()), **tokens)
    return "\n\n".join(f"{name}\n{'-' * len(name)}\n{text}" for name, text in sections.items())


def _edits(train_dataset: Any) -> str:
    edits = sum(1 for sources in getattr(train_dataset, "source_shapes", ()) if sources)
    return f" ({counted(edits, 'edit')})" if edits else ""


def _groups(train_dataset: Any) -> str:
    size = getattr(train_dataset, "group_size", None)
    return f"; a sample is a group of up to {size} candidates" if size else ""


def _prior(train_dataset: Any) -> str:
    prior = getattr(train_dataset, "prior", None)
    if prior is None:
        return ""
    return f", {int(prior.rows.sum()):,} of prior preservation with weight {prior.loss_weight:g}"


def _images(train_dataset: Any) -> str:
    images = getattr(train_dataset, "online_images", None)
    return "" if images is None else f"; images are encoded in training: {images}"


def encoder_bytes(model: torch.nn.Module, family: ModelFamily, args: Any, train_dataset: Any) -> dict[str, float]:
    """About what frozen encoders that encode in training, and a frozen reference, take: bytes by part."""
    images, text = (getattr(train_dataset, name, None) for name in ("online_images", "online_text"))
    found: dict[str, float] = {}
    if getattr(train_dataset, "group_size", None) and (args.reference_model or adapter_facts(model) is None):
        found["reference"] = args.weight_dtype.itemsize * sum(p.numel() for p in network_of(model).parameters())
    if not isinstance(family, PipelineFamily) or (images is None and text is None):
        return found
    parts, size = ["vae"] if images is not None else [], args.weight_dtype.itemsize
    if text is not None:
        trained = family.trained_text_parts if isinstance(model, NetworkWithText) else ()
        left_out = (*trained, *family.unread_parts())
        parts += [part for part in family.text_parts if "tokenizer" not in part and part not in left_out]
    found |= {part: size * sum(p.numel() for p in family.empty_part(part).parameters()) for part in parts}
    if images is not None:
        vae, keys = family.config("vae"), [key for key in batch_keys_of(train_dataset) if isinstance(key, tuple)]
        widest = (vae.get("block_out_channels") or [vae.get("base_dim", 128)])[0]
        pixels = max((key[0] * key[1] for key in keys), default=0)
        found["encoding an image"] = size * VALUES_OF_VAE * widest * pixels * images.batch_size
    return found


def _frozen(encoders: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {in_words(size)}" for name, size in encoders.items())
    return f"\nfrozen next to the network, about: {told}" if encoders else ""


def _lines(options: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in options.items()) or "none"


def _trained(model: torch.nn.Module, args: TrainingArguments) -> str:
    rates = rates_of(model, args, learning_rate=args.learning_rate or 0.0)
    facts = adapter_facts(model)
    if facts is None:
        return f"the complete network, {sum(p.numel() for p in model.parameters()):,} parameters"
    layers = "\n".join(f"  {name}" for name in facts["layers"])
    groups = "".join(f"\n  learning rate {rate:g}: {group}" for group, (rate, _) in rates.items() if len(rates) > 1)
    return f"{title(facts)}:\n{layers}{groups}"


def tokens_of(train_dataset: Any, family: ModelFamily) -> dict[str, int]:
    """`tokens` of the largest sample with its text, and `image_tokens` of the largest image with its sources.

    Of a group of candidates those of all.
    """
    keys, tokens = _image_tokens(train_dataset, family)
    # of (height, width, perhaps the text length, and of edits the shape (C, h, w) of each source's latents)
    sources = [sum(math.prod(s[1:]) // family.patch**2 for s in key if isinstance(s, tuple)) for key in keys]
    image = [size + more for size, more in zip(tokens, sources, strict=True)]
    online = vars(family).get("max_sequence_length", 0)  # where the text is encoded in training
    texts = [next((n for n in key[2:] if isinstance(n, int)), online) for key in keys]
    both, each = [size + text for size, text in zip(image, texts, strict=True)], getattr(train_dataset, "group_size", 1)
    return {"tokens": each * max(both, default=0), "image_tokens": each * max(image, default=0)}


def _image_tokens(train_dataset: Any, family: ModelFamily) -> tuple[list[tuple[Any, ...]], list[int]]:
    """The distinct batch keys that begin with (height, width), and how many tokens an image of each has."""
    keys = [key for key in set(batch_keys_of(train_dataset)) if isinstance(key, tuple) and len(key) >= 2]
    step = family.bucket_step() if keys else 1
    return keys, [(key[0] // step) * (key[1] // step) for key in keys]


def image_tokens(train_dataset: Any, family: ModelFamily) -> str:
    """How many tokens the network makes of an image, in words; "" for data without sizes and for UNets."""
    counts = set(_image_tokens(train_dataset, family)[1]) if family.component == "transformer" else set()
    if len(counts) > 1:
        return f"{min(counts):,} to {max(counts):,} tokens an image, {len(counts)} different numbers"
    return f"{counts.pop():,} tokens an image, the same in all buckets" if counts else ""


def _described(values: Mapping[str, Any]) -> list[str]:
    """Shapes and dtypes of tensors; of a list its length and what it begins with."""
    lines = []
    for name, value in _flat(values).items():
        if isinstance(value, torch.Tensor):
            lines.append(f"  {name}: {tuple(value.shape)} {value.dtype}")
        elif isinstance(value, list) and value:
            first = value[0]
            told = f"{tuple(first.shape)} {first.dtype}" if isinstance(first, torch.Tensor) else repr(first)
            lines.append(f"  {name}: {len(value)}, the first {told}")
    return lines


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With what dictionaries in it hold, under `name.key`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}.{key}" if key else name: each for key, each in inner.items()}
    return flat


def _needed(model: torch.nn.Module, args: TrainingArguments, steps: int, steps_per_epoch: int, **tokens: Any) -> str:
    """Memory and disk."""
    options = MemoryOptions.of(args)
    found = estimate(model, network_of(model), args, options=options, **tokens)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_checkpoint = trained * (4 + state_bytes(args.optim))
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    every = steps_per_epoch if args.save_strategy.value == "epoch" else every
    saves = 0 if args.save_strategy.value == "no" else math.ceil(steps / every)  # the last step is also saved
    # One more than `save_total_limit` for a while: an old one goes when the new one is complete.
    copies = min(saves, args.save_total_limit + 1 if args.save_total_limit else saves)
    return (
        f"weights {in_words(found.weights)}, gradients and optimizer {in_words(found.optimizer)}, activations about "
        f"{in_words(found.activations)} for {tokens['tokens']:,} tokens x batch {options.per_device_train_batch_size}: "
        f"about {in_words(found.total)} per device"
        f"{f', and {in_words(found.host)} of weights on the host' if found.host else ''}\n"
        f"at most {copies} checkpoints of {in_words(per_checkpoint)} at once: "
        f"{in_words(copies * per_checkpoint)} of disk"
    )


def _shares(model: torch.nn.Module, args: TrainingArguments, memory: float | None, **tokens: Any) -> str:
    """Memory and extra arithmetic by share, and the least share that fits; "" for a network without blocks."""
    network, options = network_of(model), MemoryOptions.of(args)
    if len(shares := possible_shares(network)) <= 2:
        return ""
    rows = [("share", "blocks", "per device", "extra arithmetic")]
    blocks = len(blocks_of(network))
    for share in sorted({*shares, options.share}):
        found = estimate(model, network, args, options=options.with_share(share), **tokens)
        mark = " (this run)" if share == options.share else ""
        extra = extra_arithmetic(network, share, **tokens)
        again = f"{computed_again(blocks, share)} of {blocks}"
        rows.append((f"{share:g}{mark}", again, in_words(found.total), f"{extra:.0%}"))
    lines = [text_table(rows, right=[1, 2, 3])]
    if memory is not None:
        least = least_share(model, network, args, memory=memory, options=options, **tokens)
        size = f"{memory / 1e9:.3g} GB"
        fits = "no share" if least is None else f"--activation_checkpointing_share {least:g} is the least that"
        lines.append(f"{fits} fits into {USABLE:.0%} of {size}, all else as it is")
    return "\n".join(lines)


def _fitting(model: torch.nn.Module, args: TrainingArguments, memory: float, **tokens: Any) -> str:
    """The options that fit, the cheapest in time first, and why others are not among them."""
    ways, smallest, refused = fitting(model, network_of(model), args, memory=memory, **tokens)
    now = MemoryOptions.of(args)
    lines = [f"{n}. {way.options.flags(now)}: about {in_words(way.estimate.total)}" for n, way in enumerate(ways, 1)]
    if not ways:
        least = in_words(smallest.estimate.total)
        lines = [
            f"none; {smallest.options.flags(now)} takes least, about {least}. See docs/memory.md for what is left."
        ]
    return "\n".join([*lines, *(f"left out: {why}" for why in refused)])


def debug_batch(trainer: Trainer, *, largest: int = 20) -> str:
    """Says what `--debug_batch` prints: shapes, first position ids and gradient norms of one batch.

    Runs one forward and one backward pass; weights and generators stay as they are.

    Args:
        trainer: made, but not trained.
        largest: how many gradient norms are listed.
    """
    model, device = trainer.model.train(), trainer.args.device
    seen: dict[str, Any] = {}
    hook = network_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
            inputs = next(iter(trainer.get_train_dataloader()))
            batch = trainer._prepare_inputs(inputs)
            with trainer.accelerator.autocast():  # which training puts around `forward`
                mean, found = trainer.compute_loss(model, batch, return_outputs=True)
            mean.backward()
    finally:
        hook.remove()
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    release(inputs)
    lines = ["Batch", *_described(batch), "Network input", *_described(seen)]
    for name, ids in _flat(seen).items():
        if name.endswith("_ids") and isinstance(ids, torch.Tensor):
            lines.append(f"  {name}, first three: {ids.reshape(-1, ids.shape[-1])[:3].tolist()}")
    lines.append(f"Noise levels: {[round(float(x), 4) for x in found['levels']]}")
    lines.append(f"Loss per sample: {[round(float(x), 5) for x in found['loss'].detach()]}")
    zero = sum(value == 0 for value in norms.values())
    lines.append(f"Gradient norms: {len(norms)} trained parameters, {zero} exactly 0 (lora_A is, until lora_B moves), "
                 f"{len(without)} without a gradient")  # fmt: skip
    ordered = sorted(norms.items(), key=lambda item: -item[1])
    lines += [f"  {value:.3e}  {name}" for name, value in ordered[:largest]]
    if len(ordered) > largest:
        lines.append(f"  ... and {len(ordered) - largest} smaller ones, down to {ordered[-1][1]:.3e}")
    return "\n".join(lines)
