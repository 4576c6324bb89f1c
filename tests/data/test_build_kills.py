"""Builds that are killed, or that fill the disk, at any file: the next one finishes them, and nothing is doubled."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import PAYLOADS, StubEncoders, build, index_of, make_images, picture, samples_of, settled, write_notes

from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import SciflowError

payloads = pytest.mark.parametrize("payload", PAYLOADS)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from builds import StubEncoders, build
calls = 0
replace = os.replace
def replace_or_die(source, target):
    global calls
    calls += 1
    if calls == {die_at}:  # the temporary file is complete, the real one not there yet
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
build({images!r}, __import__("pathlib").Path({output!r}), samples_per_part=5, payload={payload!r})
"""


@pytest.mark.parametrize("die_at", [6, 9])  # build.json, empty prompt, 5 payloads, index part, payloads ...
def test_sigkill_loses_nothing_that_was_finished(images: Path, tmp_path: Path, die_at: int) -> None:
    output = tmp_path / "cache"
    names = {
        "tests": str(Path(__file__).parents[1] / "support"),
        "images": str(images),
        "output": str(output),
        "payload": "npz",
    }
    code = _KILLED.format(die_at=die_at, **names)
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    finished = list(output.rglob("*_latents.npz"))
    assert len(finished) == {6: 3, 9: 5}[die_at] and len(list(output.rglob(".*.tmp"))) == 1
    encoders = StubEncoders()
    report = build(images, output, encoders, samples_per_part=5, payload="npz")
    assert report.reused == len(finished) and encoders.num_images == 12 - len(finished)
    build(images, tmp_path / "straight", samples_per_part=5, payload="npz")
    assert settled(output) == settled(tmp_path / "straight")


class Killed(BaseException):
    """What no part of the library expects."""


class Disk:
    """Fails at the n-th file that is about to appear or vanish."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, plain: Any) -> Any:
        def call(path: Any, *args: Any, **options: Any) -> None:
            if not str(path).endswith(".tmp") or args:  # a temporary file that is tidied away does not count
                self.calls += 1
                if self.calls == self.fail_at:
                    raise self.error
            plain(path, *args, **options)

        return call


def change(images: Path) -> None:
    """A new image that comes first, another picture, a better caption, an image less, and a column more."""
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    picture(60, 40).save(images / "aaa.png")
    picture(50, 50, (1, 2, 3)).resize((55, 55)).save(images / "p0" / "fig_02.png")
    rows[5]["caption"] = "a better caption"
    (images / rows[7]["file_name"]).unlink()
    rows[7] = {"file_name": "aaa.png", "caption": "figure 3", "licence": "cc-by"}
    write_notes(images, rows)


@payloads
@pytest.mark.parametrize("changed", [False, True])
def test_killed_at_any_file_a_build_is_finished_by_the_next(
    images: Path, tmp_path: Path, payload: str, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th file does not appear, or not vanish, for every n: what a reader sees meanwhile has no row twice."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a process dies, not the machine
    options = dict(samples_per_part=5 if changed else 2, payload=payload, batch_size=2)
    start = tmp_path / "start"
    if not changed:  # every file is new: fewer will do
        images = make_images(tmp_path / "few", 5)
    if changed:
        build(images, start, **options)
        change(images)
    build(images, tmp_path / "straight", **options)
    expected = samples_of(tmp_path / "straight")
    for fail_at in range(1, 100):
        output = tmp_path / f"killed_{fail_at}"
        if changed:
            shutil.copytree(start, output)
        first, second = StubEncoders(), StubEncoders()
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            disk = Disk(patch, fail_at, Killed())
            build(images, output, first, **options)
        ids = [(row["image_path"], row["variant"]) for row in index_of(output)]
        assert len(set(ids)) == len(ids)
        report = build(images, output, second, **options)
        assert report.samples == len(expected) and not (output / ".staging").exists()
        assert first.num_images + second.num_images <= (3 if changed else 5) + 2, "a batch at most is encoded twice"
        found = samples_of(output)
        assert found.keys() == expected.keys()
        for name, sample in found.items():
            assert all(torch.equal(value, expected[name][key]) for key, value in sample.items())
        if not changed:
            assert settled(output) == settled(tmp_path / "straight")
        assert verify_cache(load_cache(output), threads=1, progress=False).clean
        if disk.calls < fail_at:
            break
    else:
        raise AssertionError("the build writes more files than were tried")
    assert fail_at > 8


@payloads
def test_a_full_disk_is_said_and_nothing_half_is_taken_for_whole(
    images: Path, tmp_path: Path, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(samples_per_part=5, payload=payload)
    build(images, tmp_path / "straight", **options)
    expected = settled(tmp_path / "straight")
    output = tmp_path / "cache"
    room: list[int] = []

    def sync(descriptor: int) -> None:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room.pop()

    monkeypatch.setattr(os, "fsync", sync)
    for syncs in (1, 2, 3, 3, 7, 5, 20, 100):  # of files and folders, until there is no room; run after run
        room[:] = [1] * syncs
        try:
            build(images, output, **options)
        except SciflowError as error:
            assert "disk is full" in str(error) and "goes on" in str(error)
            assert not list(output.rglob("*.tmp"))
            assert all(expected.get(name) == data for name, data in settled(output).items() if "npz" in name)
        else:
            break
    assert syncs > 3 and settled(output) == expected


def test_two_builders_on_one_folder(images: Path, tmp_path: Path) -> None:
    """The second says so, whatever the first is doing; once the first is dead, it goes on."""
    output = tmp_path / "cache"

    class Second(StubEncoders):
        def images(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            with pytest.raises(SciflowError, match=rf"{output}.*another"):
                build(images, output, StubEncoders(stop_after=0))
            return super().images(pixel_values)

    assert build(images, output, Second()).samples == 12
    assert build(images, output, StubEncoders(stop_after=0)).reused == 12
