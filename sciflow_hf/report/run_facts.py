"""What a run knows of itself: identity for resuming, facts for the card, access to trackers and the Hub."""

import dataclasses
import importlib.metadata
import logging
import os
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..adapters.adapter import adapter_facts
from ..adapters.files import weight_name
from ..data.batches.loader import batch_keys_of, row_ids_of
from ..data.prior import without_prior
from ..data.stream.stream import StreamingCache
from ..diffusion.randomness import hash64
from ..engines.optimizers import effective_learning_rate
from ..errors import SciflowError
from .plots import PLOT_NAME, loss_names, plot_training

if TYPE_CHECKING:
    from ..training.arguments import DiffusionTrainingArguments
    from ..training.callbacks.validation import ValidationCallback
    from ..training.trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "diffusers", "peft", "datasets", "accelerate")


def identity(trainer: "DiffusionTrainer") -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from; plain JSON values."""
    family, args = trainer.family, trainer.args
    path = family.pretrained_model_name_or_path
    adapter = adapter_facts(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    return {
        "family": family.name,
        "network": dataclasses.asdict(family) if family.from_scratch else None,
        "pretrained_model_name_or_path": Path(path).name if os.path.isdir(path) else path,
        "revision": family.revision,
        "adapter": adapter,
        "data": _fingerprint(trainer.train_dataset),
        "total_train_batch_size": trainer.get_total_train_batch_size(args),
        "seed": args.order_seed,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "lora_plus_ratio": args.lora_plus_ratio,
        "text_encoder_learning_rate": args.text_encoder_learning_rate,
        "quantize_base": args.quantize_base,
    }


def _fingerprint(dataset: Any) -> str | None:
    """Identity of the rows and their order."""
    if dataset is None:
        return None
    own = getattr(dataset, "fingerprint", None)
    return own if isinstance(own, str) else f"{hash64(*row_ids_of(dataset), str(batch_keys_of(dataset))):016x}"


def _count_groups(datasets: list[Any]) -> int:
    return len({group for dataset in datasets for group in getattr(dataset, "groups", row_ids_of(dataset))})


def prepare_wandb(args: "DiffusionTrainingArguments") -> None:
    """Without a login W&B would stop the run and ask: log offline instead, and say so."""
    if "wandb" not in args.report_to or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    if not _has_wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning("No W&B login found: logging offline. Run `wandb login` before, or `wandb sync` afterwards.")


def _has_wandb_login() -> bool:
    """Where `wandb login` and its documentation put credentials; asking wandb itself would fix its settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [Path(os.environ.get("NETRC", "~/.netrc")).expanduser(), Path("~/_netrc").expanduser()]
    return any(file.is_file() and host in file.read_text(encoding="utf-8", errors="replace") for file in files)


def commonest_size(dataset: Any) -> tuple[int, int] | None:
    """Height and width of the bucket with most rows; None for data without buckets."""
    buckets = getattr(dataset, "buckets", None)
    if not buckets:
        return None
    height, width = Counter(tuple(b)[:2] for b in buckets).most_common(1)[0][0]
    return int(height), int(width)


def validation_callback(trainer: "DiffusionTrainer") -> "ValidationCallback":
    """Images of `args.validation_prompts` during training."""
    from ..training.callbacks.validation import ValidationCallback

    args = trainer.args
    size = tuple(args.validation_size) or commonest_size(without_prior(trainer.train_dataset))
    if size is None:
        raise SciflowError("`validation_size`: give height and width, the data has no buckets to take them from.")
    return ValidationCallback(
        family=trainer.family,
        prompts=args.validation_prompts or args.validation_class_labels,
        negative_prompts=args.validation_negative_prompt,
        seeds=args.validation_seeds,
        steps=args.validation_steps,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.validation_guidance_scale,
        size=(int(size[0]), int(size[1])),
        output_dir=args.output_dir,
        trackers=lambda: trainer.callback_handler.callbacks,
        weights=trainer.averaged_weights,
    )


def last_metrics(trainer: "DiffusionTrainer") -> dict[str, float]:
    """The newest value of every evaluation metric in the log."""
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            found = {k: v for k, v in entry.items() if k.startswith("eval_")}
    return found


def save_model_card(trainer: "DiffusionTrainer") -> None:
    """README.md, run_facts.json and training.png in the output folder."""
    from ..hub.upload import CardFacts, save_card
    from ..training.callbacks.validation import final_step, sample_images

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
    buckets = Counter(tuple(b)[:2] for b in getattr(train, "buckets", None) or [])
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
            "samples": len(train) if train is not None else 0,
            "eval_samples": len(held_out) if held_out is not None else 0,
            "groups": None if isinstance(train, StreamingCache) else _count_groups(sets),
            "buckets": dict(buckets),
            **({} if prior is None else {"prior_samples": int(prior.rows.sum()), "prior_weight": prior.loss_weight}),
        },
        non_default_args=args.changed_options(),
        metrics=metrics,
        interval_note="fewer than 10 held-out groups" if "eval_gain" in metrics else "",
        global_step=trainer.state.global_step,
        train_loss=losses[-1] if losses else None,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        sample_images=[path for path, _ in samples],
        sample_prompts=[prompt for _, prompt in samples],
        exports={done.file.name: done.readers for done in trainer.exported},
        plot=_save_plot(trainer),
    )
    save_card(facts, folder)


def _save_plot(trainer: "DiffusionTrainer") -> str | None:
    """`training.png` in the output folder, where something was logged: its name."""
    history = trainer.state.log_history
    if not loss_names(history):
        return None
    return plot_training(history, Path(trainer.args.output_dir) / PLOT_NAME).name


def check_hub(args: "DiffusionTrainingArguments", *, token: str | None, private: bool | None) -> str:
    """Full id of the repository to push to, which exists and may be written to."""
    from ..hub.upload import check_access

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    private = args.hub_private_repo if private is None else private
    return check_access(name, token=token or args.hub_token, private=private, revision=args.hub_revision)


def upload(
    trainer: "DiffusionTrainer",
    message: str | None,
    *,
    token: str | None,
    revision: str | None,
    blocking: bool,
) -> Any:
    """What a user needs of the output folder, in one commit."""
    from ..hub.upload import upload as upload_folder

    args = trainer.args
    return upload_folder(
        str(trainer.hub_model_id),
        args.output_dir,
        token=token or args.hub_token,
        revision=revision or args.hub_revision,
        commit_message=message or "End of training",
        run_as_future=not blocking,
    )


def push_checkpoint(trainer: "DiffusionTrainer", folder: Path) -> None:
    """`--hub_strategy`: weights and card so far in the background, and the checkpoint `folder` where that is asked for.

    On all ranks, since sharded weights are gathered. A push under way makes it pass, unless `--hub_always_push`, which
    waits for it: no file changes while it is read. A failure is logged, not fatal.
    """
    from accelerate.utils import broadcast_object_list
    from transformers.trainer_utils import HubStrategy, SaveStrategy

    from ..hub.upload import upload_checkpoint

    args, state = trainer.args, trainer.state
    busy = any(not push.done() for push in trainer.running_pushes)
    if args.hub_strategy == HubStrategy.END or broadcast_object_list([busy and not args.hub_always_push])[0]:
        return
    finish_push(trainer)
    trainer.callback_handler.on_push_begin(args, state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return
    trainer.create_model_card()
    steps = args.save_strategy == SaveStrategy.STEPS
    message = f"Training in progress, {f'step {state.global_step}' if steps else f'epoch {int(state.epoch or 0)}'}"
    trainer.running_pushes.append(upload(trainer, message, token=None, revision=None, blocking=False))
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
        trainer.running_pushes.append(
            upload_checkpoint(
                str(trainer.hub_model_id),
                folder,
                place,
                token=args.hub_token,
                revision=args.hub_revision,
                commit_message=f"{message}, checkpoint",
            )
        )
        trainer.pushed_checkpoint = folder


def checkpoint_in_push(trainer: "DiffusionTrainer") -> Path | None:
    """The checkpoint that a push under way still reads."""
    return trainer.pushed_checkpoint if any(not push.done() for push in trainer.running_pushes) else None


def finish_push(trainer: "DiffusionTrainer") -> None:
    """Waits for pushes under way, so that no file changes below them. Their failure was logged when it happened."""
    wait(trainer.running_pushes)
    trainer.running_pushes.clear()


def summary(trainer: "DiffusionTrainer") -> str:
    """A few plain lines for the end of a run: what was learnt, and where it lies."""
    metrics, folder = last_metrics(trainer), Path(trainer.args.output_dir)
    lines = [f"Trained {trainer.state.global_step} steps."]
    if "eval_gain" in metrics:
        base, loss, gain = metrics["eval_base_loss"], metrics["eval_loss"], metrics["eval_gain"]
        verdict = "fewer than 10 held-out groups: no interval"
        if "eval_gain_low" in metrics:
            low, high = metrics["eval_gain_low"], metrics["eval_gain_high"]
            verdict = f"95 % interval {low:.4f} to {high:.4f}: {'better' if low > 0 else 'not clearly better'}"
        lines.append(f"Held-out loss: {base:.4f} base model, {loss:.4f} now; gain {gain:.4f} ({verdict}).")
    elif "eval_loss" in metrics:
        lines.append(f"Held-out loss: {metrics['eval_loss']:.4f}.")
    rate = effective_learning_rate(trainer.optimizer.param_groups) if trainer.optimizer is not None else None
    if rate is not None:
        lines.append(f"Prodigy's step size at the end: {rate:.2e}; it starts at 1e-06 and grows for some 100 steps.")
    adapter = adapter_facts(trainer.model)
    weights = weight_name(adapter["type"]) if adapter else trainer.family.component
    for what, path in (
        ("Weights", weights),
        ("Model card", "README.md"),
        ("Plot", PLOT_NAME),
        ("Images", "validation/contact_sheet.png"),
    ):
        if (folder / path).exists():
            lines.append(f"{what}: {folder / path}")
    return "\n".join(lines)
