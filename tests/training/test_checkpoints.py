"""Checkpoints: whole or not used, whatever was cut, lost or killed; and only gone on from by the run they belong to."""

import builtins
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from caches import encoder_settings, write_cache
from safetensors.torch import load_file
from trainings import make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.files import write_json
from sciflow_hf.training.checkpoints import (
    MANIFEST,
    check_output_dir,
    checkpoint_fault,
    list_checkpoints,
    resolve_checkpoint,
    rotate,
    write_manifest,
)
from sciflow_hf.training.resume import check_identity

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def run_dir(tmp_path):
    """Three whole checkpoints of two files each."""
    for step in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "transformer").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes(range(step)))
        (folder / "transformer" / "config.json").write_text(f'{{"step": {step}}}')
        write_manifest(folder)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200.txt").write_text("no folder of ours")
    return tmp_path


# -- the manifest --------------------------------------------------------------------------------------------


def test_the_manifest_names_every_file(run_dir):
    folder = run_dir / "checkpoint-9"
    entries = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(entries) == ["transformer/config.json", "weights.bin"]
    assert entries["weights.bin"]["size"] == 9
    assert entries["weights.bin"]["sha256"] == hashlib.sha256(bytes(range(9))).hexdigest()
    assert checkpoint_fault(folder) is None
    write_manifest(folder)  # itself is not in it
    assert checkpoint_fault(folder) is None and json.loads((folder / MANIFEST).read_text())["files"] == entries
    (folder / "notes.txt").write_text("what somebody adds does no harm")
    assert checkpoint_fault(folder) is None


DAMAGE = {
    "a file is missing": (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
    "a file is cut": (lambda f: os.truncate(f / "weights.bin", 5), "weights.bin is damaged"),
    "a file is empty": (lambda f: (f / "weights.bin").write_bytes(b""), "weights.bin is damaged"),
    "a file is longer": (lambda f: (f / "weights.bin").open("ab").write(b"x"), "weights.bin is damaged"),
    "a byte is another": (lambda f: flip(f / "weights.bin"), "weights.bin is damaged"),
    "below a folder": (lambda f: flip(f / "transformer" / "config.json"), "transformer/config.json is damaged"),
    "a folder is missing": (lambda f: shutil.rmtree(f / "transformer"), "transformer/config.json is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"it has no {MANIFEST}, so its save did not finish"),
    "manifest is cut": (lambda f: os.truncate(f / MANIFEST, 60), f"its {MANIFEST} is damaged"),
    "manifest is empty": (lambda f: (f / MANIFEST).write_text(""), f"its {MANIFEST} is damaged"),
    "manifest is a list": (lambda f: (f / MANIFEST).write_text("[1]"), f"its {MANIFEST} is damaged"),
    "manifest says nothing": (lambda f: (f / MANIFEST).write_text('{"files": 3}'), f"its {MANIFEST} is damaged"),
    "manifest is half": (lambda f: (f / MANIFEST).write_text('{"files": {"a": {}}}'), f"its {MANIFEST} is damaged"),
    "manifest is no text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), f"its {MANIFEST} is damaged"),
}


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_named_and_passed_over(run_dir, caplog, damage):
    newest, (do, words) = run_dir / "checkpoint-100", DAMAGE[damage]
    do(newest)
    assert checkpoint_fault(newest) == words
    with caplog.at_level(logging.INFO, logger="sciflow_hf"):
        assert resolve_checkpoint("latest", run_dir) == run_dir / "checkpoint-10"
    assert [r.getMessage() for r in caplog.records] == [f"{newest} is passed over: {words}."]
    for named in ("checkpoint-100", str(newest)):
        with pytest.raises(sf.SciflowError, match="`resume_from_checkpoint`") as caught:
            resolve_checkpoint(named, run_dir)
        assert words in str(caught.value) and "`latest`" in str(caught.value)


# -- the choice ----------------------------------------------------------------------------------------------


@pytest.mark.promise("B14")
def test_what_to_resume_from(run_dir, tmp_path_factory, monkeypatch):
    assert [p.name for p in list_checkpoints(run_dir)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    for nothing in (None, False, "", "false", "False"):
        assert resolve_checkpoint(nothing, run_dir) is None
    for newest in ("latest", True, "True", "true"):
        assert resolve_checkpoint(newest, run_dir) == run_dir / "checkpoint-100"
    assert resolve_checkpoint("checkpoint-9", run_dir) == run_dir / "checkpoint-9"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert resolve_checkpoint(str(run_dir / "checkpoint-9"), elsewhere) == run_dir / "checkpoint-9"
    monkeypatch.chdir(run_dir)
    assert resolve_checkpoint("checkpoint-10", elsewhere) == Path("checkpoint-10")


def test_latest_without_a_checkpoint_begins_with_one_line(tmp_path, caplog):
    for folder in (tmp_path, tmp_path / "not_there"):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="sciflow_hf"):
            assert resolve_checkpoint("latest", folder) is None
        assert [r.getMessage() for r in caplog.records] == [
            f"No checkpoint to resume from in {folder}: starting at the beginning."
        ]


def test_latest_begins_anew_where_none_is_whole(run_dir):
    for folder in list_checkpoints(run_dir):
        (folder / MANIFEST).unlink()
    assert resolve_checkpoint("latest", run_dir) is None


def test_a_named_one_must_exist(run_dir):
    with pytest.raises(sf.SciflowError) as caught:
        resolve_checkpoint("checkpoint-11", run_dir)
    said = str(caught.value)
    assert "`resume_from_checkpoint` 'checkpoint-11' does not exist" in said
    assert "checkpoint-100, checkpoint-10, checkpoint-9" in said and "`latest`" in said


def test_an_output_folder_with_checkpoints_needs_a_word(run_dir):
    with pytest.raises(sf.SciflowError) as caught:
        check_output_dir(run_dir, resume=None, overwrite=False)
    said = str(caught.value)
    for words in ("holds checkpoint-100", "--resume_from_checkpoint latest", "--overwrite_output_dir"):
        assert words in said
    with pytest.raises(sf.SciflowError):
        check_output_dir(run_dir, resume="false", overwrite=False)  # says: not to resume
    for resume, overwrite in (("latest", False), ("checkpoint-9", True), (True, True)):
        check_output_dir(run_dir, resume=resume, overwrite=overwrite)
        assert len(list_checkpoints(run_dir)) == 3  # resuming never removes
    check_output_dir(run_dir, resume=None, overwrite=True)
    assert list_checkpoints(run_dir) == [] and (run_dir / "checkpoint-200.txt").exists()
    check_output_dir(run_dir, resume=None, overwrite=False)
    check_output_dir(run_dir / "not_there", resume=None, overwrite=False)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"b": 1, "a": [None, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": 1, "a": [None, "ü"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": 1, "b": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["b"] == 1


# -- another run ---------------------------------------------------------------------------------------------


def test_what_differs_is_named(tmp_path):
    facts = {"family": "a", "adapter": {"rank": 4, "alpha": 4}, "data": "x", "layers": ("to_q",)}
    write_json(tmp_path / "run.json", facts)
    check_identity(tmp_path, facts)
    for changes, words in (
        ({"family": "b"}, ["family: 'a' then, 'b' now"]),
        ({"adapter": {"rank": 8, "alpha": 4}}, ["adapter.rank: 4 then, 8 now"]),
        ({"adapter": None}, ["adapter.rank: 4 then, None now"]),
        ({"data": "y", "layers": ["to_k"]}, ["data: 'x' then, 'y' now", "layers: ['to_q'] then, ['to_k'] now"]),
        ({"new": 1}, ["new: None then, 1 now"]),
    ):
        with pytest.raises(sf.SciflowError, match="`resume_from_checkpoint`") as caught:
            check_identity(tmp_path, facts | changes)
        assert all(word in str(caught.value) for word in words)
        assert str(caught.value).count(" then, ") == len(words) + ("adapter" in changes and changes["adapter"] is None)


class OtherFamily(sf.Flux2Klein):
    """Takes klein's caches, which would be refused before the checkpoint is looked at."""

    name = "another_family"

    def encoder_settings(self):
        return super().encoder_settings() | {"family": "flux2_klein"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, family, tiny_cache):
    """A run of two steps with one checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, family, tiny_cache, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder


OTHER_RUNS = {
    "family": (lambda f, c: (OtherFamily(**dataclasses.asdict(f)), c, {}), "family: 'flux2_klein' then, 'another"),
    "rank": (lambda f, c: (f, c, {"rank": 2}), "adapter.rank: 4 then, 2 now"),
    "whole network": (lambda f, c: (f, c, {"no_adapter": True}), "adapter.rank: 4 then, None now"),
    "data": (lambda f, c: (f, c, {"eval_fraction": 0.3}), "data: '"),
    "batch": (lambda f, c: (f, c, {"per_device_train_batch_size": 4}), "total_train_batch_size: 2 then, 4 now"),
    "accumulation": (lambda f, c: (f, c, {"gradient_accumulation_steps": 3}), "total_train_batch_size: 2 then, 6 now"),
    "optimizer": (lambda f, c: (f, c, {"optim": "prodigy"}), "optim: 'adamw_torch_fused' then, 'prodigy' now"),
    "seed": (lambda f, c: (f, c, {"data_seed": 5}), "seed: 3 then, 5 now"),
}


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_another_run_is_refused_and_told_why(tmp_path, finished, family, tiny_cache, other):
    change, words = OTHER_RUNS[other]
    its_family, cache, options = change(family, tiny_cache)
    folder = shutil.copytree(finished, tmp_path / "run")
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    trainer = make_trainer(folder, its_family, cache, max_steps=4, resume_from_checkpoint="latest", **options)
    with pytest.raises(sf.SciflowError, match="belongs to another run") as caught:
        trainer.train()
    assert words in str(caught.value) and trainer.state.global_step == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == kept


def test_other_rows_are_refused_and_the_same_rows_elsewhere_are_not(tmp_path, finished, family, tiny_klein, tiny_cache):
    settings = encoder_settings(tiny_klein)
    other = write_cache(tmp_path / "other", settings=settings, buckets={(32, 48): 11, (48, 32): 8, (24, 64): 5})
    moved = shutil.copytree(tiny_cache, tmp_path / "moved")
    for cache, fits in ((other, False), (moved, True)):
        folder = shutil.copytree(finished, tmp_path / f"run_{fits}")
        trainer = make_trainer(folder, family, cache, max_steps=3, resume_from_checkpoint="latest")
        if fits:
            trainer.train()
            assert trainer.state.global_step == 3
        else:
            with pytest.raises(sf.SciflowError, match="another run: data: "):
                trainer.train()


def test_a_second_run_in_the_same_folder_needs_a_word(tmp_path, finished, family, tiny_cache):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(sf.SciflowError, match="holds checkpoint-2"):
        make_trainer(folder, family, tiny_cache).train()
    with pytest.raises(sf.SciflowError, match="'checkpoint-7' does not exist"):
        make_trainer(folder, family, tiny_cache, resume_from_checkpoint="checkpoint-7").train()
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-2"]
    anew = make_trainer(folder, family, tiny_cache, max_steps=1, overwrite_output_dir=True)
    anew.train()
    assert anew.state.global_step == 1 and list_checkpoints(folder) == []


# -- cut and killed ------------------------------------------------------------------------------------------

OPTIONS = dict(max_steps=3, save_strategy="steps", save_steps=2, save_total_limit=1)
FILES = (WEIGHT_NAME, "run.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, family, tiny_cache):
    """Weights after three steps, never stopped."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), family, tiny_cache, max_steps=3)
    trainer.train()
    return trained(trainer)


def resumes_from(folder, step, family, cache, uninterrupted):
    """Going on by `latest` starts at `step` and ends, bit for bit, as if nothing had happened."""
    trainer = make_trainer(folder, family, cache, resume_from_checkpoint="latest", **OPTIONS)
    seen = []
    step_of = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: seen.append(trainer.state.global_step) or step_of(*args, **kwargs)
    trainer.train()
    return seen[0] == step and same(trained(trainer), uninterrupted)


def test_each_file_of_the_newest_lost_or_cut(tmp_path, family, tiny_cache, uninterrupted):
    options = OPTIONS | {"save_steps": 1, "save_total_limit": None}
    make_trainer(tmp_path / "run", family, tiny_cache, **options).train()
    newest = tmp_path / "run" / "checkpoint-3"
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    assert {*FILES, MANIFEST} <= {str(file) for file in files}
    pristine = shutil.copytree(newest, tmp_path / "pristine")
    for file in files:
        for damage in (Path.unlink, lambda p: os.truncate(p, p.stat().st_size // 2), flip):
            shutil.rmtree(newest)
            shutil.copytree(pristine, newest)
            assert resolve_checkpoint("latest", tmp_path / "run") == newest
            damage(newest / file)
            if file.name == MANIFEST and checkpoint_fault(newest) is None:
                continue  # the flipped bit was in a key that nobody reads
            assert file.name in checkpoint_fault(newest) or file.name == MANIFEST
            assert resolve_checkpoint("latest", tmp_path / "run") == newest.with_name("checkpoint-2")
    assert resumes_from(tmp_path / "run", 2, family, tiny_cache, uninterrupted)
    assert checkpoint_fault(newest) is None  # written anew over the damaged one


class Killed(BaseException):
    """Nobody handles it, as nobody handles a kill."""


class LeftBehind:
    """A temporary folder that stays where its process is killed."""

    def __init__(self, **options):
        self.name = tempfile.mkdtemp(**options)

    def __enter__(self):
        return self.name

    def __exit__(self, kind, *_):
        if kind is None:
            shutil.rmtree(self.name)


class WriteKiller:
    """Counts the writes below `folder` and dies at number `at`, leaving half a file there."""

    def __init__(self, monkeypatch, folder, at):
        self.folder, self.at, self.writes = str(folder), at, []
        saved = {"open": builtins.open, "save": torch.save, "save_file": safetensors.torch.save_file}
        replace, unlink, rmtree = os.replace, os.unlink, shutil.rmtree

        def writes_open(file, mode="r", *args, **kwargs):
            if isinstance(file, str | os.PathLike) and set(mode) & set("wax+"):
                self.about_to("open", file)
            return saved["open"](file, mode, *args, **kwargs)

        def writes(name, position):
            def write(*args, **kwargs):
                self.about_to(name, args[position])
                return saved[name](*args, **kwargs)

            return write

        def replaces(source, target, **kwargs):
            self.about_to("replace", target, torn=False)
            return replace(source, target, **kwargs)

        def removes(folder, *args, **kwargs):
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    self.about_to("remove", file, torn=False)
                    unlink(file)
            return rmtree(folder, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", writes_open)
        monkeypatch.setattr(io, "open", writes_open)
        monkeypatch.setattr(torch, "save", writes("save", 1))
        monkeypatch.setattr(safetensors.torch, "save_file", writes("save_file", 1))
        monkeypatch.setattr(os, "replace", replaces)
        monkeypatch.setattr(shutil, "rmtree", removes)
        monkeypatch.setattr(tempfile, "TemporaryDirectory", LeftBehind)

    def about_to(self, what, target, torn=True):
        if not isinstance(target, str | os.PathLike) or not str(target).startswith(self.folder):
            return
        self.writes.append((what, Path(target).name))
        if len(self.writes) == self.at:
            if torn:
                Path(os.fspath(target)).unlink(missing_ok=True)
                descriptor = os.open(target, os.O_CREAT | os.O_WRONLY)
                os.write(descriptor, b'{"half a fi')
                os.close(descriptor)
            raise Killed


def test_killed_at_every_write_of_a_save(tmp_path, monkeypatch, family, tiny_cache, uninterrupted):
    """With `save_total_limit=1` the old checkpoint must last until the new one is whole."""
    folder = tmp_path / "run"
    trainer = make_trainer(folder, family, tiny_cache, **(OPTIONS | {"max_steps": 2}))
    trainer.train()
    pristine = shutil.copytree(folder, tmp_path / "pristine")
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-2"]
    trainer.state.global_step = 3  # what is saved next; its content does not matter here

    def save(at):
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        with monkeypatch.context() as patches:
            killer = WriteKiller(patches, folder, at)
            try:
                trainer._save_checkpoint(trainer.model, None)
            except Killed:
                assert len(killer.writes) == at
        return killer.writes

    writes = save(at=None)
    names = [name for _, name in writes]
    assert set(FILES) <= set(names)
    whole = writes.index(("replace", "checkpoint-3")) + 1
    assert writes.index(("replace", MANIFEST)) == whole - 2  # of the files the last
    assert {what for what, _ in writes[whole:]} == {"remove"}
    assert len(writes) - whole >= 7  # the old checkpoint is removed after that, file by file
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-3"]
    assert checkpoint_fault(folder / "checkpoint-3") is None

    for at in range(1, len(writes) + 1):
        assert len(save(at)) == at  # it was killed
        newest = resolve_checkpoint("latest", folder)
        if at > whole:
            assert newest == folder / "checkpoint-3"
            continue
        assert newest == folder / "checkpoint-2" and checkpoint_fault(newest) is None
        assert checkpoint_fault(folder / "checkpoint-3") is not None
        if at in (1, whole // 2, whole):
            assert resumes_from(folder, 2, family, tiny_cache, uninterrupted)
            left = {p.name for p in list_checkpoints(folder)}
            assert left == {"checkpoint-3"} and not checkpoint_fault(folder / "checkpoint-3")


@pytest.mark.promise("E20")
def test_which_checkpoints_go(tmp_path):
    def left(steps, unfinished=(), *, newest, limit, best=None):
        for folder in list_checkpoints(tmp_path):
            shutil.rmtree(folder)
        for step in (*steps, *unfinished):
            (tmp_path / f"checkpoint-{step}").mkdir()
            if step in steps:
                write_manifest(tmp_path / f"checkpoint-{step}")
        best = best and str(tmp_path / f"checkpoint-{best}")
        rotate(tmp_path, limit=limit, newest=tmp_path / f"checkpoint-{newest}", best=best)
        return [int(p.name.split("-")[1]) for p in reversed(list_checkpoints(tmp_path))]

    assert left([2, 4, 6, 10], newest=10, limit=2) == [6, 10]
    assert left([2, 4, 6, 10], newest=10, limit=1) == [10]
    assert left([2, 4, 6, 10], newest=10, limit=None) == left([2, 4, 6, 10], newest=10, limit=0) == [2, 4, 6, 10]
    assert left([2, 4, 6, 10], newest=10, limit=2, best=4) == [4, 10]
    assert left([2, 4, 6, 10], newest=10, limit=1, best=4) == [4, 10]  # as in transformers
    assert left([2, 4, 6, 10], newest=10, limit=3, best=4) == [4, 6, 10]
    assert left([2, 3], [4], newest=3, limit=1) == [3]  # a torn later one does not displace the new one
    assert left([2, 3], [4], newest=3, limit=2) == [2, 3]
    assert left([2, 3, 8], [9], newest=3, limit=2) == [2, 3]  # the run went back to 2
    assert left([3], newest=3, limit=5) == [3]


def test_a_torn_later_checkpoint_does_not_displace_a_new_one(tmp_path, family, tiny_cache):
    """Killed while saving step 4; the second run saves at step 3 (other `save_steps`), `save_total_limit=1`."""
    trainer = make_trainer(tmp_path, family, tiny_cache, **OPTIONS)
    trainer.train()
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / MANIFEST).unlink()
    again = make_trainer(tmp_path, family, tiny_cache, **(OPTIONS | {"save_steps": 1, "max_steps": 4}))
    again.state.global_step = 3
    again.create_optimizer_and_scheduler(4)
    again._save_checkpoint(again.model, None)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert checkpoint_fault(tmp_path / "checkpoint-3") is None


def test_what_a_killed_save_left_is_replaced(tmp_path, family, tiny_cache):
    """A half-written folder of the same step, temporary files included, is not mixed with the new one."""
    trainer = make_trainer(tmp_path, family, tiny_cache, **OPTIONS)
    left = tmp_path / "checkpoint-2"
    (left / ".saving-xyz").mkdir(parents=True)
    (left / "optimizer.pt").write_bytes(b"half")
    (left / "stale.bin").write_bytes(b"of another run")
    with pytest.raises(sf.SciflowError, match="holds checkpoint-2"):  # it counts as an earlier run all the same
        trainer.train()
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 3 and [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    # With the same step again:
    again = make_trainer(tmp_path / "again", family, tiny_cache, **(OPTIONS | {"max_steps": 2}))
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "again" / "checkpoint-2")
    (tmp_path / "again" / "checkpoint-2" / "stale.bin").write_bytes(b"of another run")
    (tmp_path / "again" / "checkpoint-2" / MANIFEST).unlink()
    again.train(resume_from_checkpoint="latest")
    folder = tmp_path / "again" / "checkpoint-2"
    assert checkpoint_fault(folder) is None and not (folder / "stale.bin").exists()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    ours = {f"transformer.{name}".replace(".default", ""): p for name, p in trained(again).items()}
    assert same(load_file(folder / WEIGHT_NAME), ours)


# -- power that fails ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, family, tiny_cache, monkeypatch):
    """Every file, weights, optimizer and manifest, and every folder; and an older checkpoint goes only afterwards."""
    events, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree

    def synced(descriptor):
        fsync(descriptor)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renamed(source, target):
        files = [p.relative_to(source) for p in Path(source).rglob("*")] if Path(source).is_dir() else None
        replace(source, target)
        events.append(("rename", Path(source), Path(target), files))

    def removed(folder, *args, **options):
        events.append(("remove", Path(folder)))
        rmtree(folder, *args, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    make_trainer(tmp_path, family, tiny_cache, **(OPTIONS | {"save_steps": 1, "save_total_limit": 1})).train()
    published = [i for i, (kind, *paths) in enumerate(events) if kind == "rename" and "checkpoint-" in paths[1].name]
    assert [events[i][2].name for i in published] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for i in published:
        _, source, target, files = events[i]
        assert {WEIGHT_NAME, "optimizer.pt", "trainer_state.json", MANIFEST} <= {path.name for path in files}
        written = max(n for n, event in enumerate(events[:i]) if event[0] == "rename" and event[2] == source / MANIFEST)
        before = {path for kind, path, *_ in events[written:i] if kind == "sync"}
        assert before >= {source, *(source / path for path in files)}
        assert events[i + 1] == ("sync", target.parent)  # its name, too
        older = target.with_name(f"checkpoint-{int(target.name[-1]) - 1}")
        assert ("remove", older) not in events[: i + 2] and (("remove", older) in events or target.name[-1] == "1")
