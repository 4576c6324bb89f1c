"""Resuming: what must be the same as in the run of a checkpoint, and its place in the epoch, on any number of ranks."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..data.batches.loader import BucketLoader, batch_keys_of, row_ids_of
from ..diffusion.randomness import hash64
from ..errors import SciflowError
from .arguments import DiffusionTrainingArguments

IDENTITY_NAME = "run.json"
"""File of a checkpoint that holds the identity of its run and its `Place`."""


def data_fingerprint(dataset: Any) -> str | None:
    """Identity of the rows of a data set and of their order."""
    if dataset is None:
        return None
    own = getattr(dataset, "fingerprint", None)
    return own if isinstance(own, str) else f"{hash64(*row_ids_of(dataset), str(batch_keys_of(dataset))):016x}"


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
    before = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
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
        """What `of` gave when a checkpoint was written."""
        saved = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8")).get("place")
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
