"""A disk that fills while a checkpoint is written: that save is lost, by name, and nothing else."""

import errno
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from caches import encoder_settings, write_cache
from faults import FullDisk, launch
from recipe_runs import environment, weights
from trainings import same

import sciflow_hf as sf
from sciflow_hf.cli.run import run
from sciflow_hf.errors import DiskFullError
from sciflow_hf.files import disk_full_named
from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_klein):
    cache = write_cache(tmp_path_factory.mktemp("cache"), settings=encoder_settings(tiny_klein))
    return dict(
        pipeline=str(tiny_klein), cache=str(cache), max_steps=6, save_steps=2, resume_from_checkpoint="latest",
        held_out=4, eval_strategy="steps", eval_steps=2, eval_levels=1, metric_for_best_model="eval_loss",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, job):
    folder = tmp_path_factory.mktemp("whole")
    trainer = ranks.make(output_dir=folder, **job)
    trainer.train()
    trainer.save_model()
    return weights(folder)


@pytest.mark.parametrize("at", ["weights", "optimizer", "rng", "state", "manifest"])
def test_one_save_is_lost_and_the_next_works(tmp_path, job, whole, caplog, monkeypatch, at):
    trainer = ranks.make(output_dir=tmp_path, save_total_limit=2, **job)
    disk = FullDisk(trainer, at, step=4, patch=monkeypatch.setattr)
    with caplog.at_level(logging.WARNING, logger="sciflow_hf"):
        trainer.train()
    assert disk.failed == [4] and trainer.state.global_step == 6
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-2"]
    assert all(checkpoint_fault(folder) is None for folder in list_checkpoints(tmp_path))
    assert not (tmp_path / ".saving").exists()
    said = [r.getMessage() for r in caplog.records if "No checkpoint of step" in r.getMessage()]
    assert len(said) == 1 and "checkpoint-4 could not be written" in said[0]
    assert "MiB free" in said[0] and "`--save_total_limit`" in said[0] and "The next save tries again" in said[0]
    best = trainer.state.best_model_checkpoint
    assert best in {str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-6")}  # where it can be found
    trainer.save_model()
    assert same(weights(tmp_path), whole)


def test_a_run_killed_after_a_lost_save_goes_on_from_the_one_before(tmp_path, job, whole):
    trainer = ranks.make(output_dir=tmp_path, **(job | {"max_steps": 4}))
    FullDisk(trainer, "optimizer", step=4)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # step 4 was better, but is not there
    again, steps = ranks.make(output_dir=tmp_path, **job), []
    step = again.training_step
    again.training_step = lambda *args: steps.append(again.state.global_step) or step(*args)
    again.train()
    again.save_model()
    assert steps[0] == 2 and same(weights(tmp_path), whole)


def test_the_result_of_a_run_is_no_save_to_lose(tmp_path, job, capsys):
    """At the end it is an error: one message, exit status 2, and the torn file is named."""
    trainer = ranks.make(output_dir=tmp_path, **(job | {"max_steps": 1}))
    trainer.train()
    FullDisk(trainer, "weights", step=1)
    with pytest.raises(SystemExit) as caught:
        run(trainer.save_model)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in said and f"{tmp_path} could not be written" in said
    with pytest.raises(SystemExit) as caught:
        run(lambda: Path("/dev/full").write_text("x"))
    assert caught.value.code == 2 and "No space left on device" in capsys.readouterr().err


def test_two_ranks_lose_the_same_save(tmp_path, job):
    """Rank 1's own file, or rank 0's weights, while the other rank is far ahead in the same save."""
    job = job | {"max_steps": 4}
    first, second = launch(
        tmp_path,
        {**job, "output_dir": tmp_path / "rank_1", "disk_full": {"at": "rng", "step": 2}, "rank": 1},
        {**job, "output_dir": tmp_path / "rank_0", "disk_full": {"at": "weights", "step": 2}, "rank": 0},
    )
    assert first == second and len(first[0]["losses"]) == 4
    for folder in (tmp_path / "rank_1", tmp_path / "rank_0"):
        assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-4"]
        assert checkpoint_fault(folder / "checkpoint-4") is None and not (folder / ".saving").exists()
    assert same(weights(tmp_path / "rank_1"), weights(tmp_path / "rank_0"))


def test_which_errors_mean_a_full_disk(tmp_path):
    full = [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]
    for error in full:
        with pytest.raises(DiskFullError) as caught, disk_full_named(tmp_path / "not" / "there"):
            raise error
        assert caught.value.__cause__ is error
    for error in (PermissionError(errno.EACCES, "no"), RuntimeError("shape"), sf.SciflowError("x")):
        with pytest.raises(type(error)) as caught, disk_full_named(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.acceptance
def test_a_disk_of_20_mb(tmp_path, job, tiny_klein):
    """A real one, in a mount namespace of its own: filled before step 4 is saved, emptied before step 6 is."""
    faults = f"{sys.executable} tests/support/faults.py --disk {tmp_path} "
    script = f"mount -t tmpfs -o size=20m tmpfs {tmp_path} && exec {faults}"
    words = [job["pipeline"], job["cache"]]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script + " ".join(words)],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "No checkpoint of step 4" in done.stderr and "(0 MiB free" in done.stderr
    assert done.stdout.split()[-5:] == ["checkpoint-6", "whole", "checkpoint-2", "whole", "0"]
