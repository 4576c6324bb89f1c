"""Console output during a training: one bar, and one line per evaluation."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback

from ...report.summary import held_out_words
from ..arguments import DiffusionTrainingArguments

LINES, SECONDS = 20, 60
_SHORT = {"loss": "loss", "reward": "reward", "eval_gain": "gain", "learning_rate": "rate"}


class ConsoleCallback(ProgressCallback):
    """The stock bar, with loss, gain and learning rate in it; evaluations are counted in it, and told in a line.

    Where the error stream is no terminal (a file, a job's log) there is no bar: a line is written at the logging steps,
    `LINES` of them a run, and more where a run would be silent for more than `SECONDS`.
    """

    def on_train_begin(
        self, args: DiffusionTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = 0
        if state.is_world_process_zero:
            self.shown: dict[str, str] = {}
            self.evaluated = 0
            self.begun, self.first = time.monotonic(), state.global_step
            self.told = self.begun, self.first
            self.training_bar = tqdm(
                total=state.max_steps, dynamic_ncols=True, unit="step", disable=not sys.stderr.isatty()
            )

    def on_prediction_step(
        self, args: DiffusionTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is None and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)
        elif self.training_bar is not None:
            self.evaluated += 1
            self.training_bar.set_description(f"evaluating, batch {self.evaluated}")

    def on_evaluate(
        self, args: DiffusionTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.evaluated = 0
            self.training_bar.set_description("")

    def on_log(
        self,
        args: DiffusionTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs or not state.is_world_process_zero:
            return
        for name, short in _SHORT.items():
            if name in logs:
                self.shown[short] = f"{logs[name]:.3g}"
        self.training_bar.set_postfix(self.shown)
        for name in logs:
            prefix = name.removesuffix("_loss").removesuffix("_reward")
            if name.startswith("eval_") and f"{prefix}_runtime" in logs:
                of = f" of {prefix.removeprefix('eval_')}" if prefix != "eval" else ""
                self.training_bar.write(f"Step {state.global_step}{of}. {held_out_words(logs, prefix)}.", sys.stderr)
        if "loss" in logs and self.training_bar.disable:
            self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        now, done = time.monotonic(), state.global_step - self.first
        if state.global_step - self.told[1] < state.max_steps / LINES and now - self.told[0] < SECONDS:
            return
        self.told = now, state.global_step
        left = (now - self.begun) / max(done, 1) * (state.max_steps - state.global_step)
        values = ", ".join(f"{name} {value}" for name, value in self.shown.items())
        past, left = (tqdm.format_interval(seconds) for seconds in (now - self.begun, left))
        self.training_bar.write(
            f"Step {state.global_step} of {state.max_steps}: {values}; {past}, {left} left", sys.stderr
        )
