"""A run that goes on with another number of processes: the same samples a step, from the same place in the epoch."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.batches.loader import BucketLoader
from .checkpoints import RUN_FACTS

if TYPE_CHECKING:
    from .arguments import DiffusionTrainingArguments


class Place(NamedTuple):
    """Where a run is: full epochs, optimizer steps in the one that has begun, and optimizer steps in all.

    The first two do not follow from the third: how many steps the left-over samples of an epoch make depends on how a
    step is divided into device batches.
    """

    epoch: int
    step: int
    global_step: int

    @classmethod
    def of(cls, state: Any, loader: Any, accumulation_steps: int) -> "Place | None":
        """The place of a `TrainerState` after a step; None in a stream, which keeps its own."""
        if not isinstance(loader, BucketLoader):
            return None
        epoch, part = divmod(state.epoch or 0.0, 1)  # the Trainer counts micro-batches of `len(loader)`
        return cls(int(epoch), math.ceil(round(part * len(loader)) / accumulation_steps), state.global_step)

    @classmethod
    def saved_in(cls, folder: Path) -> "Place | None":
        """What `of` gave when a checkpoint was written."""
        saved = json.loads((folder / RUN_FACTS).read_text(encoding="utf-8")).get("place")
        return saved and cls(*saved)

    def in_steps(self, per_epoch: int) -> tuple[int, int]:
        """Full epochs and steps in the next, where an epoch now has `per_epoch` steps."""
        return (self.epoch, self.step) if self.step < per_epoch else (self.epoch + 1, 0)

    def length_of_run(self, epochs: int, max_steps: int, per_epoch: int, *, by_steps: bool) -> tuple[int, int]:
        """(epochs, steps) of a run of `max_steps` steps or so many epochs, where an epoch now has `per_epoch` steps."""
        epoch, step = self.in_steps(per_epoch)
        ahead = self.global_step - epoch * per_epoch - step  # steps more than it would have taken to come here
        return (math.ceil((max_steps - ahead) / per_epoch), max_steps) if by_steps else (epochs, max_steps + ahead)


def same_total_batch(before: int, args: "DiffusionTrainingArguments") -> str:
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
