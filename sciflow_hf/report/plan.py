"""What a run would do (`--dry_run`) and what one batch looks like (`--debug_batch`), as text."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..adapters.export import check_run
from ..adapters.layers import adapter_facts, network_of, title
from ..data.batches.loader import batch_keys_of, is_stream, training_sampler
from ..data.batches.threads import release
from ..data.prior import without_prior
from ..engines.offload import held_bytes
from ..engines.optimizers import rates_of, state_bytes
from ..engines.quantisation import saved_bytes
from ..errors import SciflowError
from ..families.base import ModelFamily

GIB = 2**30
ACTIVATIONS_PER_BLOCK = 27  # 16-bit values kept per token and hidden unit; fits klein 9B's 51 GB at 1024 px
ACTIVATIONS_PER_RESNET = 3  # per pixel and channel, in and out: two group norms and what they feed


def plan(
    model: torch.nn.Module,
    family: ModelFamily,
    args: TrainingArguments,
    train_dataset: Any,
    eval_dataset: Any = None,
) -> str:
    """Resolved options, matched layers, buckets, steps, and a paper estimate of memory and disk. Loads no weights."""
    check_run(model, args.export_formats, family)
    if is_stream(train_dataset) and not hasattr(train_dataset, "__len__"):
        raise SciflowError("a stream of your own has no number of samples to plan with; `debug_batch` shows a batch.")
    sampler = training_sampler(train_dataset, args, pads_text=family.pads_text)
    steps_per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    total_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    keys = set(batch_keys_of(train_dataset))
    tokens = max((_tokens(key, family) for key in keys), default=0)
    image_tokens = max((_tokens(key[:2], family) for key in keys if isinstance(key, tuple)), default=0)
    sections = {
        "Family": f"{family}",
        "Options that differ from the defaults": _lines(args.changed_options()),
        "Trained": _trained(model, args),
        "Buckets of an epoch": sampler.table(),
        "Steps": (
            f"{steps:,} steps ({steps_per_epoch:,} an epoch), {total_batch} samples a step "
            f"({args.train_batch_size} x {args.world_size} ranks x {args.gradient_accumulation_steps} accumulation); "
            f"{len(without_prior(train_dataset)):,} samples to train on, {len(eval_dataset or []):,} held out"
            f"{_prior(train_dataset)}{_images(train_dataset)}"
        ),
        "Memory and disk, on paper": _estimate(model, args, tokens, image_tokens, steps, steps_per_epoch),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items())


def _prior(train_dataset: Any) -> str:
    prior = getattr(train_dataset, "prior", None)
    if prior is None:
        return ""
    return f", {int(prior.rows.sum()):,} of prior preservation with weight {prior.loss_weight:g}"


def _images(train_dataset: Any) -> str:
    images = getattr(train_dataset, "online_images", None)
    return "" if images is None else f"; images are encoded in training: {images}"


def _lines(options: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in options.items()) or "none"


def _trained(model: torch.nn.Module, args: TrainingArguments) -> str:
    rates = rates_of(model, args, learning_rate=args.learning_rate or 0.0)
    facts = adapter_facts(model)
    if facts is None:
        return f"the whole network, {sum(p.numel() for p in model.parameters()):,} parameters"
    layers = "\n".join(f"  {name}" for name in facts["layers"])
    groups = "".join(f"\n  learning rate {rate:g}: {group}" for group, (rate, _) in rates.items() if len(rates) > 1)
    return f"{title(facts)}:\n{layers}{groups}"


def _tokens(key: Any, family: ModelFamily) -> int:
    """Image and text tokens of a batch key (height, width, text length)."""
    if not isinstance(key, tuple) or len(key) < 2:
        return 0
    step = family.bucket_step()
    return (key[0] // step) * (key[1] // step) + (key[2] if len(key) > 2 else 0)


def _described(values: Mapping[str, Any]) -> list[str]:
    """Shapes and dtypes of tensors; of a list its length and what it begins with."""
    lines = []
    for name, value in _flat(values).items():
        if isinstance(value, torch.Tensor):
            lines.append(f"  {name}: {tuple(value.shape)} {value.dtype}")
        elif isinstance(value, list) and value:
            lines.append(f"  {name}: {len(value)}, the first {value[0]!r}")
    return lines


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With what dictionaries in it hold, under `name.key`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}.{key}" if key else name: each for key, each in inner.items()}
    return flat


def _estimate(
    model: torch.nn.Module,
    args: TrainingArguments,
    tokens: int,
    image_tokens: int,
    steps: int,
    steps_per_epoch: int,
) -> str:
    network = network_of(model)
    held, block = held_bytes(network) if args.offload else (0, 0)
    weights: float = sum(p.numel() * p.element_size() for p in model.parameters()) - (held - block)
    weights -= saved_bytes(network, args.quantize_base) if args.quantize_base else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = trained * (4 + state_bytes(args.optim))  # gradients in float32, and states
    blocks = _blocks(network, tokens, image_tokens) or [(0, 0)]
    needed = sum(inner for _, inner in blocks)
    if args.activation_checkpointing:  # what comes into each block, and one of them at a time
        needed = sum(taken for taken, _ in blocks) + max(inner for _, inner in blocks)
    kept = 2 * args.train_batch_size * needed
    per_checkpoint = trained * (4 + state_bytes(args.optim))
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    every = steps_per_epoch if args.save_strategy.value == "epoch" else every
    saves = 0 if args.save_strategy.value == "no" else math.ceil(steps / every)  # the last step is saved, too
    # One more than `save_total_limit` for a while: an old one goes when the new one is whole.
    copies = min(saves, args.save_total_limit + 1 if args.save_total_limit else saves)
    return (
        f"weights {_size(weights)}, gradients and optimizer {_size(optimizer)}, activations about "
        f"{_size(kept)} for {tokens:,} tokens x batch {args.train_batch_size}: "
        f"about {_size(weights + optimizer + kept)} per device"
        f"{f', and {_size(held)} of weights on the host' if held else ''}\n"
        f"at most {copies} checkpoints of {_size(per_checkpoint)} at once: {_size(copies * per_checkpoint)} of disk"
    )


def _blocks(network: Any, tokens: int, deepest: int) -> list[tuple[int, int]]:
    """Of each block, how many numbers of a sample come in, and how many its backward pass needs.

    Args:
        tokens: of image and text.
        deepest: of the image where a UNet is narrowest; each level above has four times as many.
    """
    unet = [
        (n, m) for n, m in network.named_modules() if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")
    ]
    if not unet:
        names = getattr(network, "_no_split_modules", None) or []
        inputs = [
            m.out_features
            for n, m in network.named_modules()
            if n.endswith(("x_embedder", "context_embedder", "img_in"))
        ]
        taken = tokens * max(inputs, default=0)
        return [(taken, ACTIVATIONS_PER_BLOCK * taken) for m in network.modules() if type(m).__name__ in names]
    found, levels = [], len(network.down_blocks)
    for name, block in unet:
        part, number = name.split(".")[:2]  # down_blocks.0 and up_blocks.2 are the widest of three levels
        above = int(number) if part == "up_blocks" else levels - 1 - int(number) if part == "down_blocks" else 0
        size = deepest * 4**above
        if type(block).__name__ == "ResnetBlock2D":
            channels = block.in_channels + block.out_channels
            found.append((size * block.in_channels, ACTIVATIONS_PER_RESNET * size * channels))
        else:
            found.append((size * block.dim, ACTIVATIONS_PER_BLOCK * size * block.dim))
    return found


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def debug_batch(trainer: Trainer, *, largest: int = 20) -> str:
    """Shapes, first position ids and gradient norms of one batch; weights and generators stay as they are."""
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
                loss, levels = trainer.family.compute_loss(model, batch, trainer.args)
            trainer.mean_loss(loss, batch.get("row")).backward()
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
    lines.append(f"Noise levels: {[round(float(x), 4) for x in levels]}")
    lines.append(f"Loss per sample: {[round(float(x), 5) for x in loss.detach()]}")
    zero = sum(value == 0 for value in norms.values())
    lines.append(f"Gradient norms: {len(norms)} trained parameters, {zero} exactly 0 (lora_A is, until lora_B moves), "
                 f"{len(without)} without a gradient")  # fmt: skip
    ordered = sorted(norms.items(), key=lambda item: -item[1])
    lines += [f"  {value:.3e}  {name}" for name, value in ordered[:largest]]
    if len(ordered) > largest:
        lines.append(f"  ... and {len(ordered) - largest} smaller ones, down to {ordered[-1][1]:.3e}")
    return "\n".join(lines)
