"""What a finished run tells people: its model card, and a few lines for the console."""

import importlib.metadata
import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments

from ..adapters.export import other_formats
from ..adapters.files import weight_name
from ..adapters.layers import adapter_facts
from ..data.batches.buckets import image_sizes
from ..data.batches.loader import groups_of, is_stream
from ..data.prior import without_prior
from ..engines.optimizers import effective_learning_rate
from .contact_sheet import sample_images
from .model_card import CardFacts, conversion, own_reader, save_card
from .plots import PLOT_NAME, loss_names, plot_training

NO_INTERVAL = "fewer than 10 held-out groups of like size"
PACKAGES = ("torch", "transformers", "diffusers", "peft", "datasets", "accelerate")


def save_model_card(trainer: Trainer) -> None:
    """README.md, run_facts.json and training.png in the output folder."""
    args, family, held_out = trainer.args, trainer.family, trainer.eval_dataset
    train, prior = without_prior(trainer.train_dataset), getattr(trainer.train_dataset, "prior", None)
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
        pipeline_class=family.pipeline_class().__name__,
        weight_name=weight_name(adapter["type"]) if adapter else None,
        component=family.component,
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
        },
        non_default_args=args.changed_options(),
        metrics=metrics,
        interval_note=_no_interval(metrics) if "eval_gain" in metrics else "",
        global_step=trainer.state.global_step,
        train_loss=losses[-1] if losses else None,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        sample_images=[path for path, _ in samples],
        sample_prompts=[prompt for _, prompt in samples],
        exports={done.file.name: done.readers for done in trainer.exported},
        other_formats=other_formats(trainer.model, family) if adapter else [],
        plot=_save_plot(trainer),
    )
    save_card(facts, folder)


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
        if "eval_loss" in entry:
            found = {k: v for k, v in entry.items() if k.startswith("eval_")}
    return found


def _no_interval(metrics: dict[str, float]) -> str:
    """Why there is no interval of the gain, where there is none."""
    return NO_INTERVAL if math.isfinite(metrics["eval_gain"]) else "losses of held-out rows are not finite"


def summary(trainer: Trainer) -> str:
    """A few plain lines for the end of a run: what was learnt, and where it lies."""
    metrics, folder = last_metrics(trainer), Path(trainer.args.output_dir)
    lines = [f"Trained {trainer.state.global_step} steps."]
    if "eval_gain" in metrics:
        base, loss, gain = metrics["eval_base_loss"], metrics["eval_loss"], metrics["eval_gain"]
        verdict = f"{_no_interval(metrics)}: no interval"
        if "eval_gain_low" in metrics and math.isfinite(gain):
            low, high = metrics["eval_gain_low"], metrics["eval_gain_high"]
            words = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
            verdict = f"95 % interval {low:.4f} to {high:.4f}: {words}"
        lines.append(f"Held-out loss: {base:.4f} base model, {loss:.4f} now; gain {gain:.4f} ({verdict}).")
    elif "eval_loss" in metrics:
        lines.append(f"Held-out loss: {metrics['eval_loss']:.4f}.")
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
    ):
        if (folder / path).exists():
            lines.append(f"{what}: {folder / path}{reader if path == weights else ''}")
    if adapter and (folder / weights).exists():
        lines += [f"For {done.readers}: {done.file}" for done in trainer.exported]
        there = {done.format for done in trainer.exported}
        others = [name for name in other_formats(trainer.model, trainer.family) if name not in there]
        lines += filter(None, [conversion(str(folder), others)])
    return "\n".join(lines)
