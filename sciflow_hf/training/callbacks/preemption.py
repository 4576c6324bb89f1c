"""Preemption: at SIGTERM, SIGUSR1 or SIGHUP the step is finished and saved, and the run ends ready to be resumed."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import Preempted

logger = logging.getLogger(__name__)

_NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP")
SIGNALS = [s for s in signal.valid_signals() if isinstance(s, signal.Signals) and s.name in _NAMES]
"""SIGTERM comes from schedulers, clouds and torchrun; SIGUSR1 as an early warning (Slurm: `--signal=USR1@120`); SIGHUP
from a terminal that was closed."""


class PreemptionCallback(TrainerCallback):
    """Saves and ends the run once a signal has come to any rank.

    The step under way is finished, and what is due after it (an evaluation) done, that of an epoch which it ends
    included; then all ranks save at the same step and leave by `Preempted`, exit status 75. With several ranks this is
    one step later: they ask each other after a step, and read the answer after the next, so that no device waits;
    after a save, and at the end of an epoch, they wait for it. A second signal changes nothing, as torchrun passes on
    what the scheduler has sent to every process already.

    It replaces transformers' just-in-time checkpoint (`--enable_jit_checkpoint`), which listens to SIGTERM alone and
    stops each rank for itself.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.saved = True
        """Whether the last save succeeded: the trainer says where a full disk has cost it."""
        self._stopping = self._epoch_ends = False
        self._question: _Question | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals; afterwards they do again what they did before. Under `nohup` SIGHUP stays ignored."""
        heard = [n for n in SIGNALS if not (n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN)]
        try:
            before = {number: signal.signal(number, self._note) for number in heard}
        except ValueError:  # not the main thread, to which signals belong
            before = {}
        try:
            yield
            if self.received:
                logger.warning("%s came when the training was over: the result is still written.", self.received)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.received, self._stopping, self._epoch_ends, self._question = None, False, False, None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._epoch_ends = state.global_step >= state.max_steps or not (state.epoch or 0.0) % 1
        if self._any_rank(args):
            self._stopping = control.should_training_stop = True
            if not self._epoch_ends:
                control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_ends = False
        if self._stopping or self.any_rank_now(args):
            self._stopping = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before other callbacks, which would draw the last images."""
        if not self._epoch_ends and (self._stopping or self.any_rank_now(args)):
            self.stop(state)

    def stop(self, state: TrainerState) -> NoReturn:
        """Ends a run that is saved."""
        logger.warning(
            "%s: %s after step %d. The same command resumes with --resume_from_checkpoint latest.",
            self.received or "A signal to another rank",
            "saved and stopped" if self.saved else "stopped without the checkpoint that could not be written",
            state.global_step,
        )
        raise Preempted

    def _any_rank(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.received is not None
        before, self._question = self._question, _Question(self.received is not None, args.device)
        return before is not None and before.answer()

    def any_rank_now(self, args: TrainingArguments) -> bool:
        """Whether a signal has come to any rank; all ranks ask, and wait for each other."""
        received = self.received is not None
        return received if args.world_size == 1 else _Question(received, args.device).answer()


class _Question:
    """Whether any rank says yes. All ranks ask alike, and read the answer later, when it is long there."""

    def __init__(self, yes: bool, device: torch.device) -> None:
        flag = torch.full((1,), float(yes), device=device)
        self._work: Any = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        self._flag, self._copied = flag, None
        if device.type == "cuda":
            self._work.wait()  # of the stream, not of this process
            self._flag = torch.empty(1, pin_memory=True).copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def answer(self) -> bool:
        if self._copied is None:
            self._work.wait()
        else:
            self._copied.synchronize()
        return bool(self._flag.item())
