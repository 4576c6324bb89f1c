"""SIGTERM and SIGUSR1: the step is finished, saved, and what comes after is as if nothing had happened."""

import signal
import threading

import pytest
import ranks
from caches import encoder_settings, write_cache
from faults import Signal, launch
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


class Later(TrainerCallback):
    """What takes long at the end and after a save must not stand between the save and the end."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        self.seen.append("on_save")

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("on_train_end")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_stopped_and_gone_on_with_equals_never_stopped(tmp_path, job, capsys, caplog, name):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert {s.name for s in SIGNALS} == {"SIGTERM", "SIGUSR1", "SIGHUP"}
    whole = ranks.make(output_dir=tmp_path / "whole", **job)
    whole.train()
    whole.save_model()

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
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


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
