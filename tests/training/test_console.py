"""What a training says while it runs: a bar or lines, one line an evaluation, and nothing twice."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainings import make_trainer
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import sciflow_hf as sf
from sciflow_hf.data.batches.buckets import BucketBatchSampler, BucketReport
from sciflow_hf.training.callbacks import console
from sciflow_hf.training.callbacks.console import ConsoleCallback

EVALUATED = {"eval_loss": 0.25, "eval_base_loss": 0.5, "eval_gain": 0.25, "eval_gain_low": 0.1, "eval_gain_high": 0.4}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a test moves on."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def told(stream: io.StringIO) -> list[str]:
    return [line.rpartition("\r")[2] for line in stream.getvalue().splitlines() if "Step" in line]


def run(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, clock: list[float], *, steps: int, seconds: float
) -> None:
    """`steps` logged steps, and an evaluation of two batches after the last."""
    monkeypatch.setattr(sys, "stderr", stream)
    args, state, control = SimpleNamespace(), TrainerState(max_steps=steps), TrainerControl()
    callback = ConsoleCallback()
    callback.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        clock[0] += seconds
        state.global_step = step
        callback.on_step_end(args, state, control)
        callback.on_log(args, state, control, logs={"loss": 1 / step, "learning_rate": 1e-4, "epoch": 1.0})
    for _ in range(2):
        callback.on_prediction_step(args, state, control, eval_dataloader=[0, 1])
    callback.on_log(args, state, control, logs={**EVALUATED, "eval_runtime": 1.0, "eval_loss_q1": 0.1})
    callback.on_evaluate(args, state, control)
    callback.on_train_end(args, state, control)


def test_a_log_file_gets_twenty_lines_a_run(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = io.StringIO()
    run(monkeypatch, stream, clock, steps=100, seconds=1.0)
    lines = told(stream)
    assert len(lines) == 20 + 1 and stream.getvalue().count("\n") == 21 and "\r" not in stream.getvalue()
    assert lines[0] == "Step 5 of 100: loss 0.2, rate 0.0001; 00:05, 01:35 left"
    assert lines[-1] == (
        "Step 100. Held-out loss: 0.5000 base model, 0.2500 now; gain 0.2500 (95 % interval 0.1000 to 0.4000: better)."
    )


def test_a_slow_run_is_not_silent(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = io.StringIO()
    run(monkeypatch, stream, clock, steps=100, seconds=40.0)
    assert [line.split()[1] for line in told(stream)[:3]] == ["2", "4", "6"]


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    stream = Terminal()
    run(monkeypatch, stream, clock, steps=10, seconds=1.0)
    assert len(told(stream)) == 1, "the evaluation alone"
    assert "loss=0.1" in stream.getvalue() and "rate=0.0001" in stream.getvalue() and "gain=0.25" in stream.getvalue()
    assert "evaluating, batch 2" in stream.getvalue() and "0/2" not in stream.getvalue()


def test_every_held_out_set_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    callback, state = ConsoleCallback(), TrainerState(max_steps=3, global_step=3)
    callback.on_train_begin(SimpleNamespace(), state, TrainerControl())
    for name in ("plots", "base_plots"):
        logs = {key.replace("eval", f"eval_{name}"): value for key, value in EVALUATED.items()}
        callback.on_log(SimpleNamespace(), state, TrainerControl(), logs=logs | {f"eval_{name}_runtime": 1.0})
    assert [line.split(".")[0] for line in told(stream)] == ["Step 3 of plots", "Step 3 of base_plots"]


def test_the_trainer_has_it_where_the_stock_one_has_its_bar(
    tmp_path: Path, tiny_klein: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = sf.Flux2Klein(str(tiny_klein), max_sequence_length=12)
    kinds = lambda trainer: [type(c) for c in trainer.callback_handler.callbacks]  # noqa: E731
    shown = kinds(make_trainer(tmp_path / "a", family, tiny_cache, disable_tqdm=False))
    assert shown.count(ConsoleCallback) == 1 and ProgressCallback not in shown
    assert PrinterCallback in kinds(make_trainer(tmp_path / "b", family, tiny_cache, disable_tqdm=True))

    class Notebook(ProgressCallback):
        """As transformers.utils.notebook has one."""

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", Notebook)
    shown = kinds(make_trainer(tmp_path / "c", family, tiny_cache, disable_tqdm=False))
    assert Notebook in shown and ConsoleCallback not in shown


def test_buckets_are_folded(
    tmp_path: Path,
    tiny_klein: Path,
    tiny_cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twelve first of many buckets, one line for the others, and the total."""
    caplog.set_level("INFO")
    trainer = make_trainer(tmp_path, sf.Flux2Klein(str(tiny_klein), max_sequence_length=12), tiny_cache, max_steps=1)
    many = [BucketReport((32, 32 + 16 * i), 2, 1, 0, 0) for i in range(20)]
    monkeypatch.setattr(BucketBatchSampler, "report", lambda self: many)
    trainer.train()
    table = next(text for text in caplog.messages if text.startswith("Buckets of an epoch")).splitlines()
    assert len(table) == 2 + 12 + 2 and table[13].startswith("32 x 208 ")
    assert re.fullmatch(r"8 more +16 +8 +0 +0", table[14]) and re.fullmatch(r"total +40 +20 +0 +0", table[15])
