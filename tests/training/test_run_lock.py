"""One run a folder, and what a run asks of its folder before it starts."""

import errno
import json
import logging
import os
import shutil
import signal
import socket

import forked
import pytest
from recipe_runs import environment
from trainings import make_args, make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.cli.run import run
from sciflow_hf.training import run_lock
from sciflow_hf.training.checkpoints import check_output_dir, check_room, list_checkpoints
from sciflow_hf.training.run_lock import FACTS, LOCK, RunLock

HOLD = """
import sys, signal
from sciflow_hf.training.run_lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    reader, writer = os.pipe()
    job = (["-c", HOLD, str(tmp_path)], environment())
    process = forked.start(job, stdout=writer, stderr=writer)
    os.close(writer)
    with os.fdopen(reader) as output:
        assert output.readline() == "held\n"
        yield process
        forked.kill([process])


def test_a_second_run_is_refused_and_names_the_first(tmp_path, holder, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, max_steps=1)
    with pytest.raises(
        sf.SciflowError, match=f"on {socket.gethostname()} .process {holder.pid}, since 20.*trains there"
    ):
        trainer.train()
    facts = json.loads((tmp_path / FACTS).read_text())
    assert facts["pid"] == holder.pid, "the first goes on"
    forked.kill([holder])
    trainer.train()  # the lock of a dead process
    assert not (tmp_path / FACTS).exists() and not (tmp_path / LOCK).exists()
    trainer.train()


def held(folder):
    try:
        RunLock(folder).acquire()
    except sf.SciflowError:
        return True
    return False


def test_a_folder_is_held_from_the_data_to_the_result(tmp_path, family, even_cache, monkeypatch):
    """A second run that began between training and the result would lose one of them."""
    data = sf.DataArguments(dataset_dir=[str(even_cache)], eval_fraction=0.3)
    parts, seen = sf.prepare_data(data, family, make_args(tmp_path)), []
    assert held(tmp_path)
    trainer = make_trainer(tmp_path, family, *parts, max_steps=1)
    trainer.train()
    assert held(tmp_path)
    for name in ("evaluate", "save_model", "create_model_card"):
        step = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda step=step: (step(), seen.append(held(tmp_path))))
    sf.finish(trainer)
    assert seen == [True] * 3 and not (tmp_path / FACTS).exists()
    trainer.create_model_card = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sf.finish(trainer)
    assert not (tmp_path / FACTS).exists() and not held(tmp_path)


def test_a_process_that_ends_gives_its_folder_free(tmp_path):
    code = "import sys; from sciflow_hf.training.run_lock import hold; hold(sys.argv[1]); sys.exit(2)"
    assert forked.run((["-c", code, tmp_path], environment())).returncode == 2
    assert not (tmp_path / FACTS).exists() and not (tmp_path / LOCK).exists()


def test_checkpoints_of_a_run_are_not_removed_by_another(tmp_path, holder):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(sf.SciflowError, match="trains there"):
        check_output_dir(tmp_path, resume=None, overwrite=True)
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("age", [0.0, 10 * run_lock.BEAT])
@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"machine": 1}])
def test_on_another_host_the_heartbeat_decides(tmp_path, caplog, age, elsewhere):
    facts = {"host": socket.gethostname(), "pid": 7, "since": "then"} | elsewhere
    (tmp_path / FACTS).write_text(json.dumps(facts))
    written = (tmp_path / FACTS).stat().st_mtime
    os.utime(tmp_path / FACTS, (written - age, written - age))
    lock = RunLock(tmp_path)
    if age:
        with caplog.at_level(logging.WARNING):
            lock.acquire()
        assert "(process 7, since then), which has ended without a word" in caplog.text
        lock.release()
    else:
        with pytest.raises(sf.SciflowError, match=r"process 7, since then. trains there"):
            lock.acquire()
        assert json.loads((tmp_path / FACTS).read_text()) == facts


@pytest.mark.parametrize("facts", ["", "[]", "null", "{", '{"host": 3}'])
def test_facts_that_are_none_stop_nobody(tmp_path, facts):
    (tmp_path / FACTS).write_text(facts)
    os.utime(tmp_path / FACTS, (0, 0))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / FACTS).read_text())["pid"] == os.getpid()
    lock.release()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.001)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / FACTS, (0, 0))
    while (tmp_path / FACTS).stat().st_mtime == 0:
        pass
    lock.release()


def test_a_run_that_was_taken_over_saves_nothing_more(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, save_strategy="steps", save_steps=2, max_steps=4)
    step = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        if trainer.state.global_step == 2:
            (tmp_path / FACTS).write_text(json.dumps({"host": "node7", "pid": 7, "since": "then"}))
        return step(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(sf.SciflowError, match="taken over by a run on node7"):
        trainer.train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert json.loads((tmp_path / FACTS).read_text())["host"] == "node7"


NAMES = {
    **dict.fromkeys(("checkpoint-3", ".saving", "validation"), "is a file where a folder of the run would go"),
    **dict.fromkeys(
        ("README.md", "adapter_config.json", "run.json", ".run.lock"), "is a folder where a file of the run"
    ),
    "pytorch_lora_weights.safetensors": "is a folder where a file of the run would go",
}


@pytest.mark.parametrize("fault", ["a file", "too long", "not writable", *NAMES])
def test_a_folder_that_cannot_hold_a_run_is_said_at_the_start(tmp_path, monkeypatch, fault):
    folder = tmp_path / ("x" * 300 if fault == "too long" else "out")
    words = "cannot be written"
    if fault == "a file":
        folder.write_text("")
    elif fault == "not writable":  # root may write anywhere

        def refuse(**options):
            raise OSError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    elif fault in NAMES:
        words = f"{fault} {NAMES[fault]}"
        if "is a file" in words:
            folder.mkdir()
            (folder / fault).write_text("")
        else:
            (folder / fault).mkdir(parents=True)
    with pytest.raises(sf.SciflowError, match=words) as caught:
        check_output_dir(folder, resume="latest", overwrite=False)
    assert "`output_dir`" in str(caught.value)


def test_a_disk_smaller_than_a_checkpoint(tmp_path, family, even_cache, monkeypatch):
    check_room(tmp_path, 1.0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 50_000}))
    trainer = make_trainer(tmp_path, family, even_cache, save_strategy="steps")
    with pytest.raises(sf.SciflowError, match="a checkpoint takes about 0 MiB, and 0 MiB are free"):
        trainer.train()
    make_trainer(tmp_path, family, even_cache, max_steps=1).train()  # saves none


BEST = dict(
    eval_fraction=0.3, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1,
    load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, max_steps=3,
    resume_from_checkpoint="latest",
)  # fmt: skip


def test_a_moved_run_keeps_its_best_checkpoint(tmp_path, family, even_cache):
    first = make_trainer(tmp_path / "first", family, even_cache, **BEST)
    first.train()
    best = first.state.best_model_checkpoint
    assert best.endswith("checkpoint-1"), "the largest loss is the first"
    (tmp_path / "first").rename(tmp_path / "second")
    again = make_trainer(tmp_path / "second", family, even_cache, **BEST | {"max_steps": 5})
    again.train()
    assert again.state.best_model_checkpoint == str(tmp_path / "second" / "checkpoint-1")
    assert (tmp_path / "second" / "checkpoint-1").is_dir()


def test_the_newest_checkpoint_stays_where_another_is_the_best(tmp_path, family, even_cache):
    """Started again, a finished run has nothing to train, and its result is that of the best."""
    first = make_trainer(tmp_path, family, even_cache, **BEST)
    first.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-1"]
    again, steps = make_trainer(tmp_path, family, even_cache, **BEST), []
    again.training_step = steps.append
    again.train()
    assert steps == [] and same(trained(again), trained(first))


def test_a_run_goes_on_from_the_checkpoint_of_another_folder(tmp_path, family, even_cache):
    """Its own are kept, though the best is there; where the best is gone, the best of what follows is taken."""
    make_trainer(tmp_path / "first", family, even_cache, **BEST).train()
    options = BEST | dict(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"), max_steps=5)
    second = make_trainer(tmp_path / "second", family, even_cache, **options)
    second.train()
    assert second.state.best_model_checkpoint == str(tmp_path / "first" / "checkpoint-1")
    assert [path.name for path in list_checkpoints(tmp_path / "second")] == ["checkpoint-5"]
    shutil.rmtree(tmp_path / "first" / "checkpoint-1")
    third = make_trainer(tmp_path / "third", family, even_cache, **options)
    third.train()
    assert third.state.best_model_checkpoint == str(tmp_path / "third" / "checkpoint-4")


TALK = """
import sys
from sciflow_hf.cli.run import run

def main():
    for line in range(20000):
        print("a line of output", line)
        sys.stderr.write("an error\\n")
    open(sys.argv[1], "w").write("done")

run(main)
"""


def test_a_reader_that_leaves_does_not_end_a_run(tmp_path):
    """As `| head -1`: the pipe is closed after a line."""
    reader, writer = os.pipe()
    process = forked.start((["-c", TALK, tmp_path / "end"], environment()), stdout=writer, stderr=writer)
    os.close(writer)
    with os.fdopen(reader) as output:
        assert any(line == "a line of output 0\n" for line in iter(output.readline, ""))
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "end").read_text() == "done"


def ended(words, output):
    """The exit status of a process that writes to the file descriptor `output`, which is closed here."""
    process = forked.start((words, environment()), stdout=output, stderr=output)
    os.close(output)
    process.join(60)
    return process.exitcode


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("output", [closed_pipe, lambda: os.open("/dev/full", os.O_WRONLY)], ids=["closed", "full"])
def test_output_that_nobody_takes_ends_no_command(tmp_path, tiny_cache, output):
    """`sciflow-hf ... | true`, and a log on a disk that is full: the work is done, the status is that of the work."""
    assert ended(["-c", TALK, tmp_path / "end"], output()) == 0 and (tmp_path / "end").read_text() == "done"
    command = ["-c", "import sys; from sciflow_hf.cli import main; sys.exit(main())", "cache", "convert"]
    cache = tmp_path / "cache"
    assert ended([*command, "--input_dir", tiny_cache, "--output_dir", cache], output()) == 0
    assert len(sf.load_cache(cache)) == 24
    for words, status in ((["info"], 0), (["verify"], 0), (["verify", "--payload_dir", tmp_path], 2)):
        assert ended([*command[:3], *words, "--dataset_dir", cache], output()) == status, words
    assert ended([*command[:2], "--help"], output()) == 0


def test_a_process_lost_at_the_very_end_is_a_message(monkeypatch, capsys):
    """This one is done and waits for the others; in a run the soak kills one at any moment."""

    def leave(*, together=True):
        if together:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr("sciflow_hf.cli.run.leave_process_group", leave)
    with pytest.raises(SystemExit) as caught:
        run(lambda: None)
    said = capsys.readouterr().err
    assert (
        caught.value.code == 2 and "another process of this run ended" in said and "Connection closed by peer" in said
    )
    assert "--resume_from_checkpoint latest" in said


def test_an_ascii_terminal_shows_what_it_can(tmp_path):
    code = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
    code += "from sciflow_hf.cli.run import run\nrun(lambda: print('50 \u00b5m'))"
    done = forked.run((["-c", code], environment()))
    assert done.returncode == 0 and done.stdout == "50 \\xb5m\n", done.stderr


def test_sighup_is_heard_unless_nohup_ignores_it():
    from sciflow_hf.training.callbacks.preemption import PreemptionCallback

    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, heard in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)):
            signal.signal(signal.SIGHUP, handler)
            callback = PreemptionCallback()
            with callback.listening():
                signal.raise_signal(signal.SIGHUP)
                assert callback.received == heard
            assert callback.received is None and signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hub_that_never_answers(monkeypatch):
    """It takes the connection: without a limit the client would wait for ever."""
    from sciflow_hf.hub import upload

    monkeypatch.setattr(upload, "SILENCE", 0.05)
    monkeypatch.setattr(upload, "RETRY_WAITS", (0.0,))
    monkeypatch.setattr(upload.huggingface_hub.get_session(), "timeout", None)
    port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
    words = r"no connection to the Hub.*tried 2 times.*without `--push_to_hub`"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(sf.SciflowError, match=words):
        upload.check_access("user/figures", token="dummy")
