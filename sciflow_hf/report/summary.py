"""Reports of a finished run: its model card, and a few lines for the console."""

import importlib.metadata
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments

from ..adapters.export import other_formats
from ..adapters.files import weight_name
from ..adapters.layers import adapter_facts
from ..data.batches.buckets import image_sizes
from ..data.batches.loader import groups_of, is_stream
from ..data.batches.sizes import FITS
from ..data.prior import without_prior
from ..data.source_images import EditViews
from ..engines.optimizers import effective_learning_rate
from ..errors import counted
from ..families.base import ModelFamily, PipelineFamily
from .contact_sheet import sample_images, source_paths
from .model_card import KINDS, PROGRAMS, CardFacts, own_reader, save_card
from .page import PAGE_NAME
from .plots import PLOT_NAME, loss_names, plot_training

NO_INTERVAL = "fewer than 10 held-out groups of like size"
NOT_FINITE = "losses of held-out rows are not finite"
PACKAGES = ("torch", "transformers", "diffusers", "peft", "datasets", "accelerate")


def save_model_card(trainer: Trainer) -> None:
    """README.md, run_facts.json and training.png in the output folder."""
    args, family, held_out = trainer.args, trainer.family, trainer.eval_dataset
    train, prior = without_prior(trainer.train_dataset), getattr(trainer.train_dataset, "prior", None)
    images = getattr(trainer.train_dataset, "online_images", None)
    metrics = last_metrics(trainer)
    folder = Path(args.output_dir)
    samples = sample_images(folder, step=final_step(args, trainer.state))
    samples += [
        (p.relative_to(folder).as_posix(), "over training") for p in folder.glob("validation/contact_sheet.png")
    ]
    losses = [e["train_loss"] for e in trainer.state.log_history if "train_loss" in e]
    adapter = adapter_facts(trainer.model)
    sets = [d for d in (train, held_out) if d is not None and not isinstance(d, dict)]
    facts = CardFacts(
        repo_name=trainer.hub_model_id or args.hub_model_id or folder.resolve().name,
        family=family.name,
        base_model=family.pretrained_model_name_or_path,
        revision=family.revision,
        parts=family.part_facts(),
        pipeline_class=family.pipeline_class().__name__,
        weight_name=weight_name(adapter["type"]) if adapter else None,
        component=family.component,
        size_arguments=_size_arguments(family, train),
        call_arguments=family.call_arguments(args),
        task=family.task,
        whole_pipeline=family.whole_pipeline and not adapter,
        adapter=adapter,
        dataset={
            "names": trainer.dataset_names,
            "samples": _count_rows(train),
            "eval_samples": _count_rows(held_out),
            "groups": None if any(map(is_stream, sets)) else _count_groups(sets),
            "buckets": dict(image_sizes(train)),
            **({} if prior is None else {"prior_samples": int(prior.rows.sum()), "prior_weight": prior.loss_weight}),
            **({} if images is None else {"shown": str(images)}),
            **_edits(trainer, train, metrics),
        },
        non_default_args=args.changed_options(),
        metrics=metrics,
        interval_note=_no_interval(metrics) if "eval_gain" in metrics else "",
        global_step=trainer.state.global_step,
        train_loss=losses[-1] if losses else None,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        sample_images=[path for path, _ in samples],
        sample_prompts=[prompt for _, prompt in samples],
        sample_sources=[_sources_of(folder, Path(path)) for path, _ in samples],
        exports={done.file.name: done.readers for done in trainer.exported},
        other_formats=other_formats(trainer.model, family) if adapter else [],
        plot=_save_plot(trainer),
        **trainer.method_facts(),
    )
    save_card(facts, folder)


def _size_arguments(family: ModelFamily, train: Any) -> dict[str, int]:
    """Arguments of the pipeline's call that draw an image of the commonest size."""
    size = next((size for size, _ in image_sizes(train).most_common(1)), None)
    return family.size_options(*size) if size is not None and isinstance(family, PipelineFamily) else {}


def _edits(trainer: Trainer, train: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Facts of edits for the card, {} where there are none; those of data without `source_shapes` are not counted."""
    family, shapes = trainer.family, getattr(train, "source_shapes", None)
    seen = trainer.args.validation_source_images or "eval_loss_edit" in metrics
    edits = bool(seen) if shapes is None else sum(1 for sources in shapes if len(sources))
    if not edits:
        return {}
    views = EditViews.of(train, family)
    size = next((size for size, _ in image_sizes(train).most_common(1)), None)
    shown = None if size is None else views.resized(size, family)
    return {
        "edits": edits,
        "sources": 1 if shapes is None else max(map(len, shapes)),
        "as_targets": views.as_targets,
        **({} if views.fit == FITS[0] else {"fit": views.fit}),
        **({} if shown is None else {"source_size": shown}),
    }


def _sources_of(folder: Path, image: Path) -> list[str]:
    """The images that a validation image edits."""
    found = re.fullmatch(r"p(\d+)_seed.*", image.stem)
    paths = source_paths(folder / "validation", int(found[1])) if found else []
    return [path.relative_to(folder).as_posix() for path in paths]


def _save_plot(trainer: Trainer) -> str | None:
    """`training.png` in the output folder, where something was logged: its name."""
    history = trainer.state.log_history
    if not loss_names(history):
        return None
    return plot_training(history, Path(trainer.args.output_dir) / PLOT_NAME).name


def _count_groups(datasets: list[Any]) -> int:
    return len({group for dataset in datasets for group in groups_of(dataset)})


def _count_rows(dataset: Any) -> int | None:
    """None for a stream that does not say it."""
    return 0 if dataset is None else len(dataset) if hasattr(dataset, "__len__") else None


def final_step(args: TrainingArguments, state: TrainerState) -> int:
    """The step whose weights a finished run has: the best with `--load_best_model_at_end`, or the last."""
    if args.load_best_model_at_end and state.best_model_checkpoint is not None and state.best_global_step:
        return state.best_global_step
    return state.global_step


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """The newest value of every evaluation metric in the log."""
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry or "eval_reward" in entry:
            found = {k: v for k, v in entry.items() if k.startswith("eval_")}
    return found


def _no_interval(metrics: dict[str, float]) -> str:
    """Why there is no interval of the gain, where there is none."""
    return NO_INTERVAL if math.isfinite(metrics["eval_gain"]) else NOT_FINITE


def held_out_words(metrics: Mapping[str, float], prefix: str = "eval") -> str:
    """ "Held-out loss: 0.6055 base model, 0.2340 now; gain 0.3715 (95 % interval 0.0992 to 0.5917: better)".

    Where there are edits and other rows, the gain of each kind follows. Of a training by rewards it is the reward.
    """
    if f"{prefix}_reward" in metrics:
        before, now = (metrics.get(f"{prefix}_{name}", math.nan) for name in ("base_reward", "reward"))
        gain = _gain(metrics, prefix, "_reward_gain") if f"{prefix}_reward_gain" in metrics else "unknown"
        return f"Held-out reward: {before:.4f} as training began, {now:.4f} now; gain {gain}"
    loss = f"{metrics[f'{prefix}_loss']:.4f}"
    if f"{prefix}_gain" not in metrics:
        return f"Held-out loss: {loss}"
    told = f"Held-out loss: {metrics[f'{prefix}_base_loss']:.4f} base model, {loss} now; gain {_gain(metrics, prefix)}"
    kinds = {name.removeprefix("eval"): kind for name, kind in KINDS.items()}
    if all(f"{prefix}{name}" in metrics for name in kinds):
        told += "".join(f"; {kind} {_gain(metrics, prefix, name)}" for name, kind in kinds.items())
    return told


def _gain(metrics: Mapping[str, float], prefix: str, name: str = "_gain") -> str:
    """ "0.3715 (95 % interval 0.0992 to 0.5917: better)"; why there is no interval only where no kind is named."""
    gain, low = metrics[f"{prefix}{name}"], metrics.get(f"{prefix}{name}_low")
    verdict = "no interval"
    if name in ("_gain", "_reward_gain"):
        verdict = f"{NO_INTERVAL if math.isfinite(gain) else NOT_FINITE}: no interval"
    if low is not None and math.isfinite(gain):
        high = metrics[f"{prefix}{name}_high"]
        better = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        verdict = f"95 % interval {low:.4f} to {high:.4f}: {better}"
    return f"{gain:.4f} ({verdict})"


def summary(trainer: Trainer) -> str:
    """Says in a few lines what a finished run learned, where its files are, and the next commands.

    Args:
        trainer: after training.
    """
    metrics, folder = last_metrics(trainer), Path(trainer.args.output_dir)
    lines = [f"Trained {counted(trainer.state.global_step, 'step')}."]
    if metrics:
        lines[0] += f" {held_out_words(metrics)}."
    if "eval_right_orders" in metrics:
        lines.append(f"{_orders(metrics)}.")
    rate = effective_learning_rate(trainer.optimizer.param_groups) if trainer.optimizer is not None else None
    if rate is not None:
        lines.append(f"Prodigy's step size at the end: {rate:.2e}; it starts at 1e-06 and grows for some 100 steps.")
    adapter = adapter_facts(trainer.model)
    weights = weight_name(adapter["type"]) if adapter else trainer.family.component
    reader = f", for {own_reader(adapter['type'])}" if adapter else ""
    for what, path in (
        ("Weights", weights),
        ("Model card", "README.md"),
        ("Plot", PLOT_NAME),
        ("Images", "validation/contact_sheet.png"),
        ("Page", PAGE_NAME),
    ):
        if (folder / path).exists():
            lines.append(f"{what}: {folder / path}{reader if path == weights else ''}")
    others: list[str] = []
    if adapter and (folder / weights).exists():
        lines += [f"For {done.readers}: {done.file}" for done in trainer.exported]
        there = {done.format for done in trainer.exported}
        others = [name for name in other_formats(trainer.model, trainer.family) if name not in there]
    return "\n".join([*lines, "Next:", *(f"  {command}" for command in _next_commands(trainer, others))])


def _orders(metrics: Mapping[str, float]) -> str:
    """ "Held-out groups: right orders 71 % (95 % interval 60 to 80), winners' loss 1.02 times the reference's"."""
    low, high = (metrics.get(f"eval_right_orders_{end}") for end in ("low", "high"))
    spread = "no interval" if low is None or high is None else f"95 % interval {100 * low:.0f} to {100 * high:.0f}"
    told = f"Held-out groups: right orders {100 * metrics['eval_right_orders']:.0f} % ({spread})"
    return f"{told}, winners' loss {metrics['eval_winner_ratio']:.3g} times the reference's"


def _next_commands(trainer: Trainer, other_formats: Sequence[str]) -> Iterator[str]:
    """Next steps after a run: use it, convert it, publish it."""
    args, here = trainer.args, shlex.quote(str(trainer.args.output_dir))
    prompt = shlex.quote((args.validation_prompts or ["..."])[0])
    task, takes_sources = trainer.family.task, trainer.family.max_sources > 0
    what = {"text-to-image": f"--prompts {prompt} ", "image-to-image": "--input_dir measured "}.get(task, "")
    source = next(iter(args.validation_source_images), "figure.png" if task == "image-to-image" else "")
    if takes_sources and source:
        what = f"--prompts {prompt} --source_images {shlex.quote(source)} "
    yield f"sciflow-hf sample --model_path {here} {what}--output_dir {'restored' if 'input' in what else 'drawn'}"
    if other_formats:
        *others, name = other_formats
        readers = "; ".join(
            [f"for {PROGRAMS[name]}", *(f"--format {other}: for {PROGRAMS[other]}" for other in others)]
        )
        to = f"--format {name} --output_file lora_{name}.safetensors"
        yield f"sciflow-hf export --adapter_path {here} {to}  # {readers}"
    if not args.push_to_hub:
        yield f"sciflow-hf push {here}"
