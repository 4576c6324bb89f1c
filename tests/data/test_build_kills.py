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

import pyarrow.parquet as pq
import pytest
import torch
from builds import (
    PAYLOADS,
    Disk,
    Killed,
    RandomEncoders,
    StubEncoders,
    build,
    index_of,
    make_images,
    picture,
    samples_of,
    settled,
    write_notes,
)

from sciflow_hf.data.build import build as build_module
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
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.acceptance), 3])
def test_killed_at_any_file_a_build_is_finished_by_the_next(
    tmp_path: Path, payload: str, changed: bool, every: int
) -> None:
    """The n-th file does not appear, or not vanish, for every n or third: what a reader sees has no row twice."""
    images = make_images(tmp_path / "few", 8 if changed else 5)
    options = dict(samples_per_part=4 if changed else 2, payload=payload, batch_size=2)
    start = tmp_path / "start"
    if changed:
        build(images, start, **options)
        change(images)
    build(images, tmp_path / "straight", **options)
    expected = samples_of(tmp_path / "straight")
    for fail_at in range(1, 100, every):
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
            assert "disk is full" in str(error) and "continues" in str(error)
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


@payloads
@pytest.mark.parametrize("damage", ["empty", "half", "other bytes"])
def test_what_a_power_failure_left_incomplete_is_encoded_again(
    images: Path, tmp_path: Path, payload: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Finished samples are not on the disk before their part is."""
    output, options = tmp_path / "cache", dict(payload=payload, samples_per_part=8)
    with pytest.raises(RuntimeError):
        build(images, output, StubEncoders(stop_after=6), **options)
    for file in output.glob("*.parquet"):
        file.unlink()  # of npz, which an error makes readable: a power failure does not
    kept = [f for f in sorted(output.rglob("*")) if f.suffix == (".npz" if payload == "npz" else ".safetensors")]
    broken = [file for file in kept if file.name != "empty_prompt.npz" and "prompts" not in file.parts][2]
    data = broken.read_bytes()
    middle = len(data) - 20 if payload != "npz" else data.index(b"NUMPY") + 130
    changed = {"empty": b"", "half": data[: len(data) // 2], "other bytes": data[:middle] + b"\1" + data[middle + 1 :]}
    broken.write_bytes(changed[damage])
    assert changed[damage] != data
    encoders = StubEncoders()
    assert build(images, output, encoders, **options).samples == 12
    assert encoders.num_images == 7 and caplog.text.count("Encoded again") == 1
    build(images, tmp_path / "straight", **options)
    assert settled(output) == settled(tmp_path / "straight")


@payloads
def test_files_are_synced_by_the_part(
    images: Path, tmp_path: Path, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a power failure in a part nor one after it leaves an index that names what is not on the disk."""
    synced: set[str] = set()
    counts: list[int] = []

    def sync(descriptor: int) -> None:
        counts[-1] += 1
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    plain = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(".parquet"):
            named = (
                [row["cache_path"] for row in pq.read_table(source, columns=["cache_path"]).to_pylist()] if npz else []
            )
            assert synced >= {str(target.parent / name) for name in named}
            assert not npz or {str((target.parent / name).parent) for name in named} <= synced
        plain(source, target)

    npz = payload == "npz"
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    for number, count in enumerate((6, 12)):
        counts.append(0)
        build(make_images(tmp_path / f"images_{count}", count), tmp_path / f"cache_{number}", payload=payload)
    few, many = counts
    assert few <= 20 and many - few <= (8 if npz else 0), "one a file of npz, with its folders, else none a sample"


@payloads
def test_threads_change_nothing(
    images: Path, tmp_path: Path, payload: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "p0" / "fig_04.png").write_bytes((images / "p0" / "fig_04.png").read_bytes()[:90])
    options = dict(payload=payload, samples_per_part=5, batch_size=2, crops=1)
    reports, said = [], []
    for name in ("threads", "none"):
        caplog.clear()
        reports.append(build(images, tmp_path / name, RandomEncoders(), **options))
        said.append([r.getMessage() for r in caplog.records if "Skipped" in r.getMessage()])
        monkeypatch.setattr(build_module, "in_order", lambda work, items, ahead: ((i, work(i)) for i in items))
        monkeypatch.setattr(build_module.Behind, "put", lambda self, work: [call() for call in work()])
    assert settled(tmp_path / "threads") == settled(tmp_path / "none")
    assert said[0] == said[1] and reports[0].skipped == reports[1].skipped and len(reports[0].skipped) == 2


@payloads
def test_a_disk_that_is_full_for_the_thread_that_saves(
    images: Path, tmp_path: Path, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SciflowError, match="disk is full"):
        Disk(patch, 7, OSError(errno.ENOSPC, "No space left on device"))
        build(images, tmp_path / "cache", payload=payload)
    assert 12 > build(images, tmp_path / "cache", payload=payload).reused > 0


@payloads
def test_text_is_encoded_once_in_batches_of_about_one_length(images: Path, tmp_path: Path, payload: str) -> None:
    captions = [f"{'word ' * (5 * i % 7)}{i % 9}" for i in range(12)]
    rows = [{"file_name": f"p{i % 2}/fig_{i:02d}.png", "caption": caption} for i, caption in enumerate(captions)]
    write_notes(images, rows)
    calls: list[list[str]] = []

    class Encoders(StubEncoders):
        def texts(self, prompts: Any) -> dict[str, torch.Tensor]:
            calls.append(list(prompts))
            return super().texts(prompts)

    build(images, tmp_path / "cache", Encoders(), payload=payload, text_batch_size=4)
    assert calls[0] == [""] and sorted(text for call in calls[1:] for text in call) == sorted(set(captions))
    assert all(len(call) <= 4 for call in calls) and len(calls) <= 6  # the first sample's comes apart
    lengths = [len(prompt) for call in calls[-2:] for prompt in call]
    assert lengths == sorted(lengths, reverse=True)
