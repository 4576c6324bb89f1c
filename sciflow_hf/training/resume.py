"""Resuming: what must be the same as in the run of a checkpoint, and its place in the epoch, on any number of ranks."""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR

from .. import __version__
from ..data.batches.loader import BucketLoader, batch_keys_of, is_stream, row_ids_of
from ..diffusion.randomness import hash64
from ..errors import SciflowError
from .arguments import DiffusionTrainingArguments

logger = logging.getLogger(__name__)

IDENTITY_NAME = "run.json"
"""File of a checkpoint that holds the identity of its run, its `Place`, its format and the versions that wrote it."""
FORMAT = 1
"""Format of a checkpoint. This version cannot read a larger one; checkpoints without a number are older."""


def saved_facts(folder: Path) -> dict[str, Any]:
    """Content of the file `IDENTITY_NAME` of a checkpoint."""
    facts: dict[str, Any] = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
    return facts


@functools.cache  # parses the whole description of each package
def versions() -> dict[str, str]:
    """The versions of the libraries on which the numbers of a run depend, and ours."""
    names = ("torch", "transformers", "diffusers", "peft")
    return {name: importlib.metadata.version(name) for name in names} | {"sciflow_hf": __version__}


def check_format(folder: Path) -> None:
    """Refuses a checkpoint that a later version wrote in a format of its own; says which versions have changed."""
    saved, now = saved_facts(folder), versions()
    before = saved.get("versions", {})
    if saved.get("format", 0) > FORMAT:
        writer = before.get("sciflow_hf", "a later version")
        raise SciflowError(
            f"`resume_from_checkpoint` {folder} has format {saved['format']}, written by sciflow_hf {writer}; this is "
            f"{__version__}, which reads formats up to {FORMAT}. `pip install 'sciflow_hf>={writer}'`, or resume from "
            "a checkpoint of this version."
        )
    changed = [f"{name} {before[name]} -> {new}" for name, new in now.items() if before.get(name, new) != new]
    if changed:
        logger.warning(
            "%s was written with other versions: %s. The run continues; its bits may differ from those of an "
            "uninterrupted one.", folder.name, ", ".join(changed),
        )  # fmt: skip


def data_fingerprint(dataset: Any) -> str | None:
    """Identity of the rows of a data set and of their order."""
    if dataset is None:
        return None
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str) or is_stream(dataset):
        return own if isinstance(own, str) else "stream"
    return f"{hash64(*row_ids_of(dataset), str(batch_keys_of(dataset))):016x}"


def check_identity(
    folder: Path,
    now: dict[str, Any],
    advice: Mapping[str, Callable[[Any], str]] | None = None,
    *,
    renamed_options: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Refuses to resume a run of another family, model, adapter, data or batch; says what differs.

    Args:
        now: identity of this run.
        advice: for some of its keys, from the value then to what to do.
        renamed_options: of the family, for a checkpoint that calls an option of the network by an earlier name.
    """
    before = saved_facts(folder)
    if before.get("network"):
        before["network"] = renamed_options(before["network"])
    before, now = _flat({k: before.get(k) for k in now}), _flat(json.loads(json.dumps(now)))
    names = sorted(k for k in now | before if now.get(k) != before.get(k))
    differs = [f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in names]
    if differs:
        todo = [tell(before[name]) for name, tell in (advice or {}).items() if name in names and before.get(name)]
        raise SciflowError(
            f"`resume_from_checkpoint` {folder} belongs to another run: {'; '.join(differs)}. "
            f"{' '.join([*todo, 'Use the same options'])}, or start a new run from its weights with `--adapter_path`."
        )


MEASURED = (
    *("loss_type", "huber_delta", "min_snr_gamma", "weighting_scheme", "eval_levels", "bf16", "fp16", "tf32"),
    *("image_encoding", "edit_loss", "edit_weight", "edit_balance", "attention_backend"),
)
"""Options that change `eval_loss`, and with it the losses of the base model; those of the family also do."""
_ELSEWHERE = (
    *("output_dir", "logging_dir", "run_name", "hub_", "push_to_hub", "report_to", "resume_from_checkpoint"),
    *("overwrite_output_dir", "disable_tqdm", "log_level", "local_rank", "dry_run", "debug_batch", "ddp_timeout"),
    *("gradient_checkpointing", "deepspeed", "do_", "use_cpu", "profile_steps", "memory_gb", "device_tflops"),
)
"""Beginnings of the names of options that say where, not what, a run trains."""


def options_of(args: DiffusionTrainingArguments, family: Any) -> dict[str, Any]:
    """The options that a checkpoint remembers, as plain JSON values; those of the family as `family.NAME`."""
    options = {name: value for name, value in args.to_dict().items() if not name.startswith(_ELSEWHERE)}
    own = {field.name for field in dataclasses.fields(family)} - {"pretrained_model_name_or_path", "revision"}
    own -= {place.option for place in family.own_places.values()}
    named = {f"family.{name}": getattr(family, name) for name in own - {"trust_remote_code"}}
    return json.loads(json.dumps(options | named, default=str))


def changed_options(folder: Path, now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (value in the checkpoint, value now) of the options that differ; {} for a checkpoint without options."""
    before = saved_facts(folder).get("options", {})
    return {name: (value, now[name]) for name, value in before.items() if name in now and now[name] != value}


def check_states(changed: Mapping[str, tuple[Any, Any]], schedule: str) -> None:
    """Refuses options that are part of a state in the checkpoint: of the optimizer, and of a schedule that has one.

    Args:
        schedule: the `lr_scheduler_type` now.
    """
    kinds = {schedule, *changed.get("lr_scheduler_type", ())}
    of_schedule = ("lr_scheduler_type", "lr_scheduler_kwargs") if {"reduce_lr_on_plateau", "greedy"} & kinds else ()
    for name in ("optim_args", *of_schedule):
        if name in changed:
            before, now = changed[name]
            raise SciflowError(
                f"`{name}` {before} then, {now} now: their states differ. Keep {before}, or start a new run from these "
                "weights with `--adapter_path`."
            )


def rates(optimizer: Any) -> list[dict[str, Any]]:
    """Learning rate, weight decay and the like of each group, as the options ask for."""
    names = ("lr", "initial_lr", "weight_decay", "betas", "eps")
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def apply_rates(optimizer: Any, scheduler: Any, asked: Sequence[Mapping[str, Any]], *, new_rate: bool) -> None:
    """Puts in place what was asked for, once a checkpoint has put in its own; the schedule continues at its step.

    Args:
        asked: from `rates`, before.
        new_rate: whether the learning rate has changed; otherwise a schedule without a formula keeps its own.
    """
    for group, now in zip(optimizer.param_groups, asked, strict=True):
        group.update({name: value for name, value in now.items() if name != "lr" or new_rate})
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [now["initial_lr"] for now in asked]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate


def check_ranks(facts: Mapping[str, Any]) -> None:
    """Refuses ranks that were started with other data or options. All ranks call it.

    Raises:
        SciflowError: on every rank; names what differs, and where.
    """
    everywhere = gather_object([dict(facts)])
    for name in facts:
        values = [other.get(name) for other in everywhere]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise SciflowError(
                f"the processes do not train the same: `{name}` is {values[0]!r} on rank 0 and {values[odd]!r} on rank "
                f"{odd}. Start all of them with the same options, on the same data."
            )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """{"adapter": {"rank": 4}} -> {"adapter.rank": 4}."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


class Place(NamedTuple):
    """Where a run is: full epochs, optimizer steps in the one that has begun, and optimizer steps in all.

    The first two do not follow from the third: how many steps the left-over samples of an epoch make depends on how a
    step is divided into device batches.
    """

    epoch: int
    step: int
    global_step: int

    @classmethod
    def of(cls, state: Any, loader: BucketLoader, accumulation_steps: int) -> "Place":
        """The place of a `TrainerState` after a step."""
        epoch, part = divmod(state.epoch or 0.0, 1)  # the Trainer counts micro-batches of `len(loader)`
        return cls(int(epoch), math.ceil(round(part * len(loader)) / accumulation_steps), state.global_step)

    @classmethod
    def saved_in(cls, folder: Path) -> "Place | None":
        """The result of `of` when a checkpoint was written."""
        saved = saved_facts(folder).get("place")
        return saved and cls(*saved)

    def in_steps(self, per_epoch: int) -> tuple[int, int]:
        """Full epochs and steps in the next, where an epoch now has `per_epoch` steps."""
        return (self.epoch, self.step) if self.step < per_epoch else (self.epoch + 1, 0)

    def length_of_run(self, epochs: int, max_steps: int, per_epoch: int, *, by_steps: bool) -> tuple[int, int]:
        """(epochs, steps) of a run of `max_steps` steps or so many epochs, where an epoch now has `per_epoch` steps."""
        epoch, step = self.in_steps(per_epoch)
        ahead = self.global_step - epoch * per_epoch - step  # steps more than it would have taken to come here
        return (math.ceil((max_steps - ahead) / per_epoch), max_steps) if by_steps else (epochs, max_steps + ahead)


def same_total_batch(before: int, args: DiffusionTrainingArguments) -> str:
    """Which options make steps of `before` samples on as many processes as there are now."""
    ranks = args.world_size
    now = f"{args.train_batch_size} per device x {ranks} processes x {args.gradient_accumulation_steps} accumulation"
    if before % ranks:
        fitting = ", ".join(str(n) for n in range(1, before + 1) if before % n == 0)
        return f"A step takes {now} samples; {before} go with {fitting} processes, not with {ranks}."
    each = math.gcd(before // ranks, args.train_batch_size)
    return (
        f"A step takes {now} samples; `--per_device_train_batch_size {each} --gradient_accumulation_steps "
        f"{before // ranks // each}` makes it {before}."
    )
