"""SIGTERM and SIGUSR1: the step is finished, saved, and what comes after is as if nothing had happened."""

import signal
import threading

import pytest
import ranks
from caches import encoder_settings, write_cache
from faults import FullDisk, Signal, launch
from recipe_runs import weights
from trainings import same
from transformers import TrainerCallback

from sciflow_hf.cli.run import run
from sciflow_hf.errors import Preempted
from sciflow_hf.training.callbacks.preemption import SIGNALS
from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_klein):
    buckets = {(32, 48): 9, (48, 32): 5}  # tails
    cache = write_cache(tmp_path_factory.mktemp("cache"), settings=encoder_settings(tiny_klein), buckets=buckets)
    return dict(
        pipeline=str(tiny_klein), cache=str(cache), max_steps=8, save_steps=100, resume_from_checkpoint="latest",
        gradient_accumulation_steps=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, job):
    """Weights of the run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = ranks.make(output_dir=folder, **job)
    trainer.train()
    trainer.save_model()
    return weights(folder)


class Later(TrainerCallback):
    """What takes long at the end and after a save must not stand between the save and the end."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append("on_save")

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("on_train_end")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_stopped_and_gone_on_with_equals_never_stopped(tmp_path, job, whole, capsys, caplog, name):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert {s.name for s in SIGNALS} == {"SIGTERM", "SIGUSR1", "SIGHUP"}
    trainer, later = ranks.make(output_dir=tmp_path / "stopped", save_strategy="no", **job), Later()
    trainer.add_callback(Signal(3, name))
    trainer.add_callback(later)
    with pytest.raises(SystemExit) as caught:
        run(trainer.train)
    assert caught.value.code == 75 and trainer.state.global_step == 3 and later.seen == []
    assert f"{name}: saved and stopped after step 3" in caplog.text
    assert [p.name for p in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]  # though none were asked for
    assert checkpoint_fault(tmp_path / "stopped" / "checkpoint-3") is None
    assert {number: signal.getsignal(number) for number in SIGNALS} == before

    again = ranks.make(output_dir=tmp_path / "stopped", **job)
    again.train()
    again.save_model()
    assert again.state.global_step == 8
    assert same(weights(tmp_path / "stopped"), whole)


def test_a_second_signal_changes_nothing(tmp_path, job):
    trainer = ranks.make(output_dir=tmp_path, **job)
    trainer.add_callback(Signal(2, "SIGTERM"))
    trainer.add_callback(Signal(2, "SIGUSR1"))
    with pytest.raises(Preempted):
        trainer.train()
    assert trainer.state.global_step == 2 and checkpoint_fault(tmp_path / "checkpoint-2") is None
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, Signal)]
    trainer.train()  # the signals of the first time are forgotten
    assert trainer.state.global_step == 8


def test_an_evaluation_that_is_due_is_not_lost(tmp_path, job):
    trainer = ranks.make(output_dir=tmp_path, held_out=4, eval_strategy="steps", eval_steps=2, eval_levels=1, **job)
    trainer.add_callback(Signal(2, "SIGTERM"))
    with pytest.raises(Preempted):
        trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [2]


@pytest.mark.parametrize("step", [1, 4])
def test_an_evaluation_at_the_end_of_an_epoch_is_not_lost(tmp_path, job, step):
    """An epoch has 4 steps here; the last step that is trained ends one, too. Without it another one is the best."""
    epochs = dict(
        held_out=4, eval_strategy="epoch", eval_levels=1, save_strategy="epoch", load_best_model_at_end=True,
        max_steps=7, metric_for_best_model="eval_loss", greater_is_better=False, learning_rate=1e-2,
    )  # fmt: skip
    whole = ranks.make(output_dir=tmp_path / "whole", **job | epochs)
    whole.train()
    whole.save_model()
    for number in (step, step + 3):
        trainer = ranks.make(output_dir=tmp_path / "again", **job | epochs)
        trainer.add_callback(Signal(number, "SIGTERM"))
        with pytest.raises(Preempted):
            trainer.train()
        assert trainer.state.global_step == number
    again = ranks.make(output_dir=tmp_path / "again", **job | epochs)
    again.train()
    again.save_model()
    evaluated = [[(e["step"], e["eval_loss"]) for e in t.state.log_history if "eval_loss" in e] for t in (whole, again)]
    assert evaluated[0] == evaluated[1] and [step for step, _ in evaluated[0]] == [4, 7]
    assert same(weights(tmp_path / "again"), weights(tmp_path / "whole"))


def test_a_signal_while_the_last_checkpoint_is_written(tmp_path, job, caplog):
    trainer = ranks.make(output_dir=tmp_path, **job)
    save = trainer._save_rng_state
    trainer._save_rng_state = lambda folder: (signal.raise_signal(signal.SIGTERM), save(folder))
    with pytest.raises(Preempted):
        trainer.train()
    assert trainer.state.global_step == 8 and "SIGTERM: saved and stopped after step 8" in caplog.text


def test_a_signal_when_the_disk_is_full_says_that_nothing_is_saved(tmp_path, job, caplog, monkeypatch):
    trainer = ranks.make(output_dir=tmp_path, **job)
    trainer.add_callback(Signal(3, "SIGTERM"))
    FullDisk(trainer, "rng", step=3, patch=monkeypatch.setattr)
    with pytest.raises(Preempted):
        trainer.train()
    assert "SIGTERM: stopped without the checkpoint that could not be written after step 3" in caplog.text


def test_it_comes_first_and_transformers_own_way_is_off(tmp_path, job):
    trainer = ranks.make(output_dir=tmp_path, enable_jit_checkpoint=True, ema_decay=0.9, **job)
    names = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    assert not any("JIT" in name for name in names)
    assert names.index("PreemptionCallback") < names.index("EMACallback")


def test_a_run_in_another_thread_gets_no_signals(tmp_path, job):
    trainer, before = ranks.make(output_dir=tmp_path, **(job | {"max_steps": 1})), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and signal.getsignal(signal.SIGTERM) is before


def test_two_ranks_of_which_one_gets_the_signal(tmp_path, job):
    """Both stop at the same step, the one after; the same command goes on to the same bits."""
    stopped = tmp_path / "stopped"
    job = job | {"max_steps": 7}
    whole, stop, _ = launch(
        tmp_path,
        {**job, "output_dir": tmp_path / "whole"},
        {**job, "output_dir": stopped, "preempted": {"step": 3, "name": "SIGUSR1"}, "rank": 1},
        {**job, "output_dir": stopped},
    )
    assert stop == [{"stopped": 4, "status": 75}] * 2 and len(whole[0]["losses"]) == 7
    assert checkpoint_fault(stopped / "checkpoint-4") is None
    assert same(weights(stopped), weights(tmp_path / "whole"))
