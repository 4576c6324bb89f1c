"""Files behind URLs: retries, the disk cache, and caches in a Hub data set repository by name."""

import io
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from caches import write_cache
from fsspec.implementations.memory import MemoryFileSystem
from hub_server import HubServer

from sciflow_hf.data import storage
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.disk_cache import DiskCache
from sciflow_hf.data.load import load_cache
from sciflow_hf.data.stream.order import EpochRows
from sciflow_hf.errors import CacheError


class Unavailable(Exception):
    """What an HTTP library raises for an answer 503."""

    status = 503


class Refused(Exception):
    status = 403


class FlakyFileSystem(MemoryFileSystem):
    """A remote that fails on demand. `failures` are raised one by one, `calls` counts reads."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures: ClassVar[list[BaseException]] = []
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _maybe_fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def cat_file(self, path, start=None, end=None, **kwargs):
        type(self).calls += 1
        self._maybe_fail()
        return super().cat_file(path, start=start, end=end, **kwargs)

    def info(self, path, **kwargs):
        self._maybe_fail()
        return super().info(path, **kwargs)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
CONTENT = bytes(random.Random(0).randbytes(10_000))


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    """The flaky remote with one file, flaky://box/file; no pauses."""
    monkeypatch.setattr(storage, "PAUSE", 0)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.failures.clear()
    fs = fsspec.filesystem("flaky")
    fs.pipe_file("/box/file", CONTENT)
    FlakyFileSystem.calls = 0
    yield FlakyFileSystem
    storage.use_disk_cache(None)
    FlakyFileSystem.failures.clear()


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[str]:
    """URL of an empty folder in memory."""
    fs = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}"
    yield url
    fs.rm(url.removeprefix("memory:/"), recursive=True)


def upload(folder: Path, url: str) -> None:
    fs, name = fsspec.core.url_to_fs(url)
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())


# -- retries -------------------------------------------------------------------------------------------------------


def test_a_remote_that_answers_503_twice_then_works(remote, caplog) -> None:
    remote.failures += [Unavailable("503 Service Unavailable")] * 2
    assert storage.read("flaky://box/file", 100, 50) == CONTENT[100:150]
    assert remote.calls == 3
    assert caplog.text.count("503 Service Unavailable") == 2


def test_a_remote_that_never_works(remote) -> None:
    remote.failures += [Unavailable("503 Service Unavailable\nmore")] * 100
    with pytest.raises(CacheError, match=r"flaky://box/file could not be read in 4 tries.*503 Service Un[^\n]*copy"):
        storage.read("flaky://box/file", 0, 10)
    assert remote.calls == 4


def test_pauses_double(remote, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage, "PAUSE", 1.0)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    remote.failures += [ConnectionResetError("reset")] * 3
    assert storage.read("flaky://box/file", 0, 3) == CONTENT[:3]
    assert pauses == [1, 2, 4]


def test_what_will_not_pass_is_not_tried_again(remote) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("flaky://box/other", 0, 10)
    assert remote.calls == 1
    for failure in (PermissionError("not yours"), Refused("403 Forbidden: not yours")):
        remote.failures += [failure]
        with pytest.raises(CacheError, match=r"flaky://box/file: no access .*not yours.*hf auth login"):
            storage.read("flaky://box/file", 0, 10)
    assert remote.calls == 3
    with pytest.raises(EOFError, match="5 bytes early"):
        storage.read("flaky://box/file", len(CONTENT) - 5, 10)
    assert remote.calls == 4


def test_a_remote_that_is_down_is_not_a_file_that_is_missing(remote) -> None:
    assert storage.exists("flaky://box/file") and not storage.exists("flaky://box/other")
    assert not storage.exists("flaky://box")
    remote.failures += [Unavailable("503")] * 2
    assert storage.exists("flaky://box/file")
    remote.failures += [Unavailable("503")] * 4
    with pytest.raises(CacheError, match="4 tries"):
        storage.exists("flaky://box/file")


def test_unknown_protocol() -> None:
    with pytest.raises(CacheError, match=r"nowhere://x cannot be opened"):
        load_cache("nowhere://x")


def test_open_file_reads_like_a_local_one(remote) -> None:
    numbers, local = random.Random(1), io.BytesIO(CONTENT)
    with storage.open_file("flaky://box/file") as file:
        for _ in range(200):
            where, count = numbers.randrange(len(CONTENT) + 10), numbers.randrange(3_000)
            assert file.seek(where) == local.seek(where)
            assert file.read(count) == local.read(count)
        assert file.seek(-7, io.SEEK_END) == len(CONTENT) - 7 and file.read() == CONTENT[-7:]


# -- the disk cache ------------------------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again(remote, tmp_path: Path) -> None:
    storage.use_disk_cache(tmp_path / "kept", 1 << 20)
    for _ in range(3):
        assert storage.read("flaky://box/file", 10, 100) == CONTENT[10:110]
    assert remote.calls == 1
    assert storage.read("flaky://box/file", 10, 101) == CONTENT[10:111]
    assert storage.read("flaky://box/file", 11, 100) == CONTENT[11:111]
    assert remote.calls == 3
    storage.use_disk_cache(None)
    assert storage.read("flaky://box/file", 10, 100) == CONTENT[10:110]
    assert remote.calls == 4


def test_a_file_that_changed_is_read_again(remote, tmp_path: Path) -> None:
    storage.use_disk_cache(tmp_path, 1 << 20)
    storage.read("flaky://box/file", 0, 10)
    fsspec.filesystem("flaky").pipe_file("/box/file", CONTENT[::-1] + b"more")
    storage._version.cache_clear()  # as in the next run
    assert storage.read("flaky://box/file", 0, 10) == CONTENT[::-1][:10]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_a_damaged_copy_is_noticed(remote, tmp_path: Path, damage: str) -> None:
    storage.use_disk_cache(tmp_path, 1 << 20)
    storage.read("flaky://box/file", 0, 100)
    (copy,) = tmp_path.iterdir()
    kept = bytearray(copy.read_bytes())
    kept[50] ^= 1 if damage == "flip" else 0
    copy.write_bytes({"flip": kept, "cut": kept[:-1], "longer": kept + b"x", "empty": b""}[damage])
    assert storage.read("flaky://box/file", 0, 100) == CONTENT[:100]
    assert remote.calls == 2
    assert storage.read("flaky://box/file", 0, 100) == CONTENT[:100]
    assert remote.calls == 2


def test_size_is_bounded_and_what_was_not_used_goes_first(tmp_path: Path) -> None:
    def size() -> int:
        return sum(file.stat().st_size for file in tmp_path.iterdir())

    kept = DiskCache(tmp_path, 10_000)
    for number in range(9):
        kept.put(str(number), bytes([number]) * 1000)
        file = kept._file(str(number))
        stamp = 1_000_000_000 + number  # as if they were written a second apart
        os.utime(file, (stamp, stamp))
    assert kept.get("0", 1000) == bytes(1000)  # used just now
    for number in range(9, 13):
        kept.put(str(number), bytes([number]) * 1000)
    assert size() <= 10_000
    there = [number for number in range(13) if kept.get(str(number), 1000)]
    assert there == [0, 5, 6, 7, 8, 9, 10, 11, 12]
    kept.put("large", bytes(20_000))
    assert kept.get("large", 20_000) is None and size() <= 10_000


def test_many_threads_in_two_caches_of_one_folder(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, 40_000), DiskCache(tmp_path, 40_000)]  # as in two processes
    wrong: list[object] = []

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(300):
            key, cache = numbers.randrange(80), numbers.choice(caches)
            try:
                found = cache.get(str(key), 1000)
                if found is None:
                    cache.put(str(key), bytes([key]) * 1000)
                elif found != bytes([key]) * 1000:
                    wrong.append(key)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 44_000
    assert not list(tmp_path.glob("*.half"))


def test_a_full_disk_only_costs_the_copy(remote, tmp_path: Path, monkeypatch, caplog) -> None:
    storage.use_disk_cache(tmp_path, 1 << 20)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert storage.read("flaky://box/file", 0, 100) == CONTENT[:100]
    assert "No space left" in caplog.text and not list(tmp_path.iterdir())


# -- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["npz", "shards", "inline"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cache_in_memory_is_as_the_local_one(tmp_path: Path, in_memory: str, layout: str, streaming: bool) -> None:
    folder = local = write_cache(tmp_path / "npz", dtype="bfloat16", parts=2)
    if layout != "npz":
        folder = convert_cache(local, tmp_path / layout, payload=layout).output_dir
    upload(folder, in_memory)
    wanted, found = load_cache(local), load_cache(in_memory, streaming=streaming)
    if streaming:
        found.shuffle_buffer = 0
    assert len(found) == len(wanted)
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one["latents"], other["latents"])
        assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_remote_that_goes_down_while_a_sample_is_read(remote, tmp_path: Path, streaming: bool) -> None:
    upload(write_cache(tmp_path), "flaky://cache")
    cache = load_cache("flaky://cache", streaming=streaming)
    remote.failures += [Unavailable("503")] * 2
    sample = next(iter(cache)) if streaming else cache[0]
    assert torch.isfinite(sample["latents"]).all()
    remote.failures += [Unavailable("503")] * 1000
    with pytest.raises(CacheError, match=r"flaky://cache/\S+ could not be read in 4 tries"):
        next(iter(cache)) if streaming else cache[0]


def test_a_stream_reads_no_payload_for_its_order(remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz = write_cache(tmp_path / "npz", text_lengths=900)
    upload(convert_cache(npz, tmp_path / "inline", payload="inline").output_dir, "flaky://cache")
    monkeypatch.setattr(storage, "_READ_AHEAD", 64)
    parts: list[int] = []
    cat_file = remote.cat_file
    monkeypatch.setattr(
        remote,
        "cat_file",
        lambda fs, path, start, end, **_: parts.append(end - start) or cat_file(fs, path, start, end),
    )
    stream = load_cache("flaky://cache", streaming=True)
    assert len(list(EpochRows(stream, 0, 0))) == len(stream) == 24
    assert sum(parts) < 0.1 * fsspec.filesystem("flaky").du("/cache")


def test_the_disk_cache_keeps_the_index_of_a_stream(remote, tmp_path: Path) -> None:
    upload(write_cache(tmp_path / "npz", parts=2), "flaky://cache")
    storage.use_disk_cache(tmp_path / "kept", 1 << 24)
    stream = load_cache("flaky://cache", streaming=True)
    wanted = list(EpochRows(stream, 0, 0))
    calls = remote.calls
    assert list(EpochRows(stream, 0, 0)) == wanted and remote.calls == calls


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_there(in_memory: str, streaming: bool) -> None:
    fsspec.filesystem("memory").pipe_file(in_memory.removeprefix("memory:/") + "/readme.txt", b"x")
    for url in (in_memory, f"{in_memory}/nothing"):
        with pytest.raises(CacheError, match=r"`dataset_dir` is 'memory://.*holds no index"):
            load_cache(url, streaming=streaming)


CLIENT = """
import sys, time
time.sleep = lambda seconds: None
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError
from sciflow_hf.data.stream.loader import StreamLoader

def total(samples):
    return sum(sample["latents"].double().sum().item() for sample in samples)

for name in ("npz", "inline"):
    cache = load_cache(f"hf://datasets/lab/{name}")
    stream = load_cache(f"hf://datasets/lab/{name}", streaming=True)
    loader = iter(StreamLoader(stream, batch_size=1))
    print(len(cache), total(cache), total(stream), total(next(loader) for _ in range(len(stream))))
for name in ("private", "gated", "missing"):
    for streaming in (False, True):
        try:
            load_cache(f"hf://datasets/lab/{name}", streaming=streaming)
        except CacheError as error:
            print(name, error)
"""


def test_a_hub_repository_by_name(hub: HubServer, tmp_path: Path) -> None:
    local = write_cache(tmp_path / "npz", buckets={(32, 48): 4, (48, 32): 2}, parts=2)
    inline = convert_cache(local, tmp_path / "inline", payload="inline").output_dir
    hub.add_dataset("lab/npz", local)
    hub.add_dataset("lab/inline", inline)
    hub.add_dataset("lab/private", inline, private=True)
    hub.add_dataset("lab/gated", inline, gated=True)
    hub.fail("resolve", 503, times=2)
    lines = hub.run(CLIENT, tmp_path / "home", token=None).splitlines()
    assert sum(status == 503 for _, _, status in hub.requests) == 2

    for line, cache in zip(lines, (load_cache(local), load_cache(inline)), strict=False):
        expected = sum(sample["latents"].double().sum().item() for sample in cache)
        count, *sums = line.split()
        assert int(count) == 6
        assert [float(value) for value in sums] == pytest.approx([expected] * 3, rel=1e-12)
    refusals = lines[2:]
    assert [line.split()[0] for line in refusals] == ["private"] * 2 + ["gated"] * 2 + ["missing"] * 2
    for line in refusals:
        assert "hf://datasets/lab/" in line and "no access" in line and "`hf auth login`" in line
    assert "may not see it" in refusals[-1]
