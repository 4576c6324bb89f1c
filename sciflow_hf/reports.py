"""What a run would do (`--dry_run`) and what one batch looks like (`--debug_batch`), as text."""

import math
from typing import TYPE_CHECKING, Any

import torch

from .adapters import adapter_facts
from .data.loader import batch_keys_of, training_sampler
from .data.threads import release
from .families.base import ModelFamily

if TYPE_CHECKING:
    from .trainer import DiffusionTrainer
    from .training_args import DiffusionTrainingArguments

GIB = 2**30
ACTIVATIONS_PER_BLOCK = 27  # 16-bit values kept per token and hidden unit; fits klein 9B's 51 GB at 1024 px


def plan(
    model: torch.nn.Module,
    family: ModelFamily,
    args: "DiffusionTrainingArguments",
    train_dataset: Any,
    eval_dataset: Any = None,
) -> str:
    """Resolved options, matched layers, buckets, steps, and a paper estimate of memory and disk. Loads no weights."""
    sampler = training_sampler(train_dataset, args, pads_text=family.pads_text)
    steps_per_epoch = math.ceil(len(sampler) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    total_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    tokens = max((_tokens(sample_key, family) for sample_key in set(batch_keys_of(train_dataset))), default=0)
    sections = {
        "Family": f"{family}",
        "Options that differ from the defaults": _lines(args.changed_options()),
        "Trained": _trained(model),
        "Buckets of an epoch": sampler.table(),
        "Steps": (
            f"{steps:,} steps ({steps_per_epoch:,} an epoch), {total_batch} samples a step "
            f"({args.train_batch_size} x {args.world_size} ranks x {args.gradient_accumulation_steps} accumulation); "
            f"{len(train_dataset):,} samples to train on, {len(eval_dataset or []):,} held out"
        ),
        "Memory and disk, on paper": _estimate(model, args, tokens, steps, steps_per_epoch),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items())


def _lines(options: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in options.items()) or "none"


def _trained(model: torch.nn.Module) -> str:
    facts = adapter_facts(model)
    if facts is None:
        return f"the whole network, {sum(p.numel() for p in model.parameters()):,} parameters"
    layers = "\n".join(f"  {name}" for name in facts["layers"])
    return (
        f"{facts['type']} rank {facts['rank']} alpha {facts['alpha']} on {facts['matched']} layers, "
        f"{facts['trainable_parameters']:,} parameters in float32:\n{layers}"
    )


def _tokens(key: Any, family: ModelFamily) -> int:
    """Image and text tokens of a batch key (height, width, text length)."""
    if not isinstance(key, tuple) or len(key) < 2:
        return 0
    step = family.bucket_step()
    return (key[0] // step) * (key[1] // step) + (key[2] if len(key) > 2 else 0)


def _estimate(
    model: torch.nn.Module, args: "DiffusionTrainingArguments", tokens: int, steps: int, steps_per_epoch: int
) -> str:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = 4 if args.optim == "prodigy" else 2  # Prodigy keeps two more copies than Adam
    optimizer = trained * 4 * (1 + states)  # gradients and states, float32
    blocks = getattr(model, "_no_split_modules", None) or []
    depth = sum(type(m).__name__ in blocks for m in model.modules())
    width = max(
        (m.out_features for n, m in model.named_modules() if n.endswith(("x_embedder", "context_embedder", "img_in"))),
        default=0,
    )
    per_block = tokens * width * 2 * args.train_batch_size
    kept = per_block * (
        depth + ACTIVATIONS_PER_BLOCK if args.activation_checkpointing else depth * ACTIVATIONS_PER_BLOCK
    )
    per_checkpoint = trained * 4 * (1 + states)
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    every = steps_per_epoch if args.save_strategy.value == "epoch" else every
    saves = 0 if args.save_strategy.value == "no" else math.ceil(steps / every)  # the last step is saved, too
    # One more than `save_total_limit` for a while: an old one goes when the new one is whole.
    copies = min(saves, args.save_total_limit + 1 if args.save_total_limit else saves)
    return (
        f"weights {_size(weights)}, gradients and optimizer {_size(optimizer)}, activations about "
        f"{_size(kept)} for {tokens:,} tokens x batch {args.train_batch_size}: "
        f"about {_size(weights + optimizer + kept)} per device\n"
        f"at most {copies} checkpoints of {_size(per_checkpoint)} at once: {_size(copies * per_checkpoint)} of disk"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def debug_batch(trainer: "DiffusionTrainer", *, largest: int = 20) -> str:
    """Shapes, first position ids and gradient norms of one batch; weights and generators stay as they are."""
    model, device = trainer.model.train(), trainer.args.device
    seen: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
            inputs = next(iter(trainer.get_train_dataloader()))
            batch = trainer._prepare_inputs(inputs)
            with trainer.accelerator.autocast():  # which training puts around `forward`
                loss, levels = trainer.family.compute_loss(model, batch, trainer.args)
            loss.mean().backward()
    finally:
        hook.remove()
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    release(inputs)
    lines = ["Batch"] + [f"  {k}: {tuple(v.shape)} {v.dtype}" for k, v in batch.items()]
    lines += ["Network input"]
    lines += [f"  {k}: {tuple(v.shape)} {v.dtype}" for k, v in seen.items() if isinstance(v, torch.Tensor)]
    for name in ("img_ids", "txt_ids"):
        if isinstance(seen.get(name), torch.Tensor):
            lines.append(f"  {name}, first three: {seen[name].reshape(-1, seen[name].shape[-1])[:3].tolist()}")
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
