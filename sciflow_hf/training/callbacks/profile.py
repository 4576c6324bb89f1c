"""Profiling: a trace of some optimizer steps, their dearest operators, memory, and where the time of a step goes."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch.profiler import profile, record_function
from transformers import TrainerCallback

from ...errors import SciflowError
from ...files import atomic_file
from ...options import arguments, option

logger = logging.getLogger(__name__)

PARTS = ("wait", "forward", "backward", "optimizer")
"""Parts of an optimizer step, each the sum over its micro-batches; `wait` is for their data."""
ROWS, SHORT_ROWS = 50, 5  # operators in the file, and in the log


def steps_of(value: str) -> tuple[int, int]:
    """ "10:15" -> (10, 15).

    Raises:
        SciflowError: it is something else, or the first step is after the last.
    """
    match = re.fullmatch(r"(\d+):(\d+)", value.strip())
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        quotes = " In a YAML file it needs quotes." if value.isdecimal() else ""  # YAML reads 10:15 as 10 * 60 + 15
        raise SciflowError(
            f"`profile_steps` {value!r}: FIRST:LAST, two optimizer steps counted from 1, the first not after the last, "
            f"such as 10:15.{quotes}"
        )
    return first, last


def _check(args: Any) -> None:
    steps_of(args.profile_steps)


@arguments
class ProfilingArguments:
    """A trace of some steps, see `ProfileCallback`."""

    heading: ClassVar[str] = "Profiling"

    profile_steps: str | None = option(
        None,
        "Optimizer steps FIRST:LAST, both included and counted as in the log, such as 10:15, to trace with "
        "torch.profiler into --output_dir/profile. Nothing is traced when not given.",
        check=_check,
    )


class ProfileCallback(TrainerCallback):
    """Traces optimizer steps, from the wait for their data to the end of the step; on the process that has it.

    For steps 10 to 15 it writes `steps_10-15.json`, for chrome://tracing or https://ui.perfetto.dev, and
    `steps_10-15.txt`: the mean time of each of `PARTS`, memory, and the dearest operators. On a GPU the times are
    those of its stream, and nothing waits for them. Evaluations and saves between the steps are in the trace and
    among the operators, not in the parts.

    Args:
        steps: first and last, counted from 1 over all calls of a run.
        folder: for the files.
    """

    def __init__(self, steps: tuple[int, int], folder: Path) -> None:
        self.first, self.last = steps
        self.folder = folder
        self._profiler: Any = None

    @contextmanager
    def watching(self, trainer: Any) -> Iterator[None]:
        """Inside, the parts of the trainer's steps are seen; at the end it says what was not traced, and why."""
        self._trainer, self._clock = trainer, _Clock(trainer.args.device)
        self._spans: list[tuple[str, Any, Any]] = []  # part, beginning, end
        self._of_step: list[tuple[str, Any, Any]] = []  # those of the step under way
        self._traced: list[int] = []
        self._begun: int | None = None  # global steps done when training begins
        owners = {"get_batch_samples": trainer, "compute_loss": trainer, "backward": trainer.accelerator}
        parts = dict(zip(owners, PARTS, strict=False))
        for name, owner in owners.items():
            setattr(owner, name, self._timed(parts[name], getattr(owner, name)))
        try:
            yield
        finally:
            for name, owner in owners.items():
                vars(owner).pop(name)
            if self._profiler is not None:
                self._finish()
            if not self._traced:
                done, begun = trainer.state.global_step, self._begun
                trained = "no step" if begun is None or begun == done else f"steps {begun + 1} to {done}"
                logger.warning(
                    "`profile_steps` %d:%d: nothing was traced, because this run trained %s.",
                    self.first, self.last, trained,
                )  # fmt: skip

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part == "wait":
                self._begin_step(self._trainer.state.global_step)
            if self._profiler is None:
                return call(*args, **kwargs)
            with self._part(part):
                return call(*args, **kwargs)

        return timed

    def _begin_step(self, done: int) -> None:
        if self._begun is None:
            self._begun = done
        if self._profiler is None and not self._traced and self.first <= done + 1 <= self.last:
            self._clock.reset_peak()
            self._profiler = profile(profile_memory=True)
            self._profiler.start()
        if self._profiler is not None:
            self._step_began, self._of_step = self._clock.now(), []

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        began = self._clock.now()
        with record_function(name):
            yield
        self._of_step.append((name, began, self._clock.now()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None:
            self._optimizer = ExitStack()
            self._optimizer.enter_context(self._part("optimizer"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None:
            self._optimizer.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is None:
            return
        self._spans += [*self._of_step, ("step", self._step_began, self._clock.now())]
        self._traced.append(state.global_step)
        if state.global_step >= self.last:
            self._finish()

    def _finish(self) -> None:
        """Ends the trace and writes what it holds."""
        self._clock.wait()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if not self._traced:
            return
        name = f"steps_{self._traced[0]}-{self._traced[-1]}"
        operators = profiler.key_averages()
        by = "self_cpu_time_total" if self._clock.on_cpu else "self_device_time_total"
        split = self._split()
        dearest = sorted((o for o in operators if o.key not in PARTS), key=lambda o: -getattr(o, by))[:SHORT_ROWS]
        steps = len(self._traced)
        lines = [
            f"  {getattr(o, by) / 1e3 / steps:10.2f} ms in {o.count / steps:,.0f} calls a step: {o.key}"
            for o in dearest
        ]
        try:
            with atomic_file(self.folder / f"{name}.json", durable=False) as file:
                profiler.export_chrome_trace(str(file))
            with atomic_file(self.folder / f"{name}.txt", durable=False) as file:
                table = operators.table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
                file.write_text(f"{split}\n\n{table}\n", encoding="utf-8")
        except OSError as error:
            logger.warning("`profile_steps`: the trace cannot be written (%s).", error)
            return
        logger.info("%s\n%s\nThe trace is %s.", split, "\n".join(lines), self.folder / f"{name}.json")

    def _split(self) -> str:
        """Where the time of a step goes, and memory."""
        seconds = dict.fromkeys((*PARTS, "step"), 0.0)
        for name, began, ended in self._spans:
            seconds[name] += self._clock.seconds(began, ended)
        whole = seconds.pop("step")
        seconds["other"] = whole - sum(seconds.values())
        steps = len(self._traced)
        lines = [f"Steps {self._traced[0]} to {self._traced[-1]}, {1e3 * whole / steps:.2f} ms a step:"]
        lines += [f"  {1e3 * t / steps:10.2f} ms  {t / whole:6.1%}  {name}" for name, t in seconds.items()]
        return "\n".join([*lines, f"Memory: {self._clock.memory()}"])


class _Clock:
    """Time and memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_cpu = device, device.type == "cpu"
        self._counts_peak = device.type not in ("cpu", "mps")  # those take the memory of the host
        self._process, self._resident = psutil.Process(), 0

    def now(self) -> Any:
        """A moment: on a CPU seconds, else an event of the current stream."""
        if not self._counts_peak:
            self._resident = max(self._resident, self._process.memory_info().rss)
        if self.on_cpu:
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def seconds(self, began: Any, ended: Any) -> float:
        return float(ended - began if self.on_cpu else began.elapsed_time(ended) / 1e3)

    def wait(self) -> None:
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)

    def reset_peak(self) -> None:
        self._resident = 0
        if self._counts_peak:
            torch.accelerator.reset_peak_memory_stats(self.device)

    def memory(self) -> str:
        if not self._counts_peak:
            return f"resident set of the process at most {self._resident / 2**30:.2f} GiB between the parts"
        peak = torch.accelerator.max_memory_allocated(self.device)
        return f"at most {peak / 2**30:.2f} GiB allocated on {self.device}"
