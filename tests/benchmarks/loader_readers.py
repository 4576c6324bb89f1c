"""Part 1 of the loader benchmark: one thread reads one sample into a row of a bfloat16 batch."""

import gc
import itertools
import json
import logging
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sciflow_hf.data.load import load_cache

from .loader_data import COMPRESSED_SAMPLES, NAMES, Data, Tensors, batch_row, installed, torch_threads

Read = Callable[[int, Tensors], None]
"""Fills a row of a batch with sample i. A stream ignores i and goes on with its next one."""
_BASE = "np.load fp16"


def from_bits(bits: Any, name: str, out: Tensors) -> None:
    """Copies bfloat16's bits, bytes or an array of uint16, into a row."""
    values = bits if isinstance(bits, np.ndarray) else np.frombuffer(bits, np.uint16)
    out[name].view(torch.uint16).view(-1).copy_(torch.from_numpy(values.reshape(-1)))


def np_load(data: Data, source: str) -> Read:
    folder = data.path(source) / "2015/p"

    def read(i: int, out: Tensors) -> None:
        with np.load(folder / f"{i}_flux_latents.npz") as payload:
            for name in NAMES:
                out[name].copy_(torch.from_numpy(payload[name]))

    return read


def ours(data: Data, source: str) -> Read:
    return load_cache(data.path(source)).read_into


def load_file(data: Data, source: str) -> Read:
    from safetensors.torch import load_file

    def read(i: int, out: Tensors) -> None:
        for name, value in load_file(data.path(source) / f"{i}.safetensors").items():
            out[name].copy_(value)

    return read


def safe_open(data: Data, source: str) -> Read:
    from safetensors import safe_open

    def read(i: int, out: Tensors) -> None:
        with safe_open(data.path(source) / f"{i}.safetensors", framework="pt") as file:
            for name in NAMES:
                out[name].copy_(file.get_tensor(name))

    return read


def tar_index(data: Data, source: str) -> Read:
    """Memory-mapped tar files and a list of offsets, as readers of indexed webdatasets do it."""
    places = json.loads((data.path(source) / "index.json").read_text())
    maps = {}
    for file in {file for place in places for file, _ in place.values()}:
        with open(data.path(source) / file, "rb") as handle:
            maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def read(i: int, out: Tensors) -> None:
        for name, (file, offset) in places[i].items():
            from_bits(np.frombuffer(maps[file], np.uint16, out[name].numel(), offset), name, out)

    return read


def webdataset(data: Data, source: str) -> Read:
    import webdataset

    urls = sorted(str(path) for path in data.path(source).glob("*.tar"))
    stream = iter(webdataset.WebDataset(urls, shardshuffle=False).decode())

    def read(i: int, out: Tensors) -> None:
        sample = next(stream)
        for name in NAMES:
            from_bits(sample[f"{name}.npy"], name, out)

    return read


def litdata(data: Data, source: str) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(data.path(source)))

    def read(i: int, out: Tensors) -> None:
        for name, value in dataset[i].items():
            out[name].view(torch.int16).copy_(value)

    return read


def mds(data: Data, source: str) -> Read:
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(data.path(source) / "mds"), batch_size=1)

    def read(i: int, out: Tensors) -> None:
        sample = dataset[i]
        for name in NAMES:
            from_bits(sample[name], name, out)

    return read


def arrow(data: Data, source: str) -> Read:
    import datasets

    dataset = datasets.load_from_disk(data.path(source) / "arrow").with_format("arrow")

    def read(i: int, out: Tensors) -> None:
        row = dataset[i]
        for name in NAMES:
            from_bits(row.column(name)[0].as_buffer(), name, out)

    return read


def row_groups(data: Data, source: str) -> Read:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(data.path(source) / "data.parquet", memory_map=True)

    def read(i: int, out: Tensors) -> None:
        row = file.read_row_group(i, use_threads=False)
        for name in NAMES:
            from_bits(row.column(name)[0].as_buffer(), name, out)

    return read


def parquet_stream(data: Data, source: str) -> Read:
    import datasets

    files = str(data.path(source) / "data.parquet")
    stream = iter(
        datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("arrow")
    )

    def read(i: int, out: Tensors) -> None:
        row = next(stream)
        for name in NAMES:
            from_bits(row.column(name)[0].as_buffer(), name, out)

    return read


@dataclass(frozen=True)
class Reader:
    title: str
    open: Callable[[Data, str], Read]
    source: str  # format
    stream: bool = False
    goal: float | None = None  # times the rate of np.load of the same numbers
    over: str = _BASE  # what the goal refers to

    @property
    def missing(self) -> bool:
        return not (installed(self.source) and installed(self.title))


READERS = (
    Reader(_BASE, np_load, "npz fp16"),
    Reader("np.load fp32", np_load, "npz fp32"),
    Reader("np.load compressed", np_load, "npz compressed"),
    Reader("ours: npz fp16", ours, "npz fp16", goal=4.5),
    Reader("ours: npz fp32", ours, "npz fp32", goal=4.5, over="np.load fp32"),
    Reader("ours: npz bf16", ours, "npz bf16", goal=12),
    Reader("ours: npz compressed", ours, "npz compressed"),
    Reader("ours: shards", ours, "shards", goal=12),
    Reader("ours: shards zstd", ours, "shards zstd"),
    Reader("ours: shards fp8", ours, "shards fp8"),
    Reader("ours: inline", ours, "inline", goal=5),
    Reader("safetensors load_file", load_file, "safetensors"),
    Reader("safetensors safe_open", safe_open, "safetensors"),
    Reader("tar + index", tar_index, "tar"),
    Reader("litdata", litdata, "litdata"),
    Reader("HF datasets, Arrow", arrow, "arrow"),
    Reader("mds", mds, "mds"),
    Reader("parquet row group of one", row_groups, "parquet"),
    Reader("webdataset", webdataset, "tar", stream=True),
    Reader("HF datasets, parquet stream", parquet_stream, "parquet", stream=True),
)


def opened(reader: Reader, data: Data) -> Iterator[Callable[[Tensors], int]]:
    """A function that reads the next sample and says which it was; opened anew at the end of a stream."""
    count = min(data.samples, COMPRESSED_SAMPLES) if reader.source == "npz compressed" else data.samples
    while True:
        # Its own order: another reader of the same files must not leave its next sample in the processor's cache.
        order = np.random.default_rng(READERS.index(reader)).permutation(count).tolist()
        order = range(count) if reader.stream else order
        read = reader.open(data, reader.source)
        for i in order:
            yield lambda out, i=i, read=read: (read(i, out), i)[1]
        if not reader.stream:
            yield from itertools.cycle([lambda out, i=i, read=read: (read(i, out), i)[1] for i in order])


def check(reader: Reader, data: Data) -> float:
    """Largest relative error of a token or channel over the first samples: 0, but for fp8. Raises if it is wrong."""
    out, worst = batch_row(data), 0.0
    for read in itertools.islice(opened(reader, data), 2):
        for value in out.values():
            value.fill_(float("nan"))
        wanted = data.tensors(read(out))
        for name, value in out.items():
            rows, right = (x.flatten(0, -2).float() for x in (value, wanted[name]))
            worst = max(worst, ((rows - right).norm(dim=1) / right.norm(dim=1)).max().item())
    limit = 0.05 if reader.source == "shards fp8" else 0.0
    if not worst <= limit:
        raise ValueError(f"{reader.title} reads other numbers: relative error {worst}")
    return worst


def measure_readers(data: Data, rounds: int, reads: int) -> list[dict[str, Any]]:
    """Every reader once a round, in an order that turns; ratios are taken round by round."""
    logging.getLogger("streaming").setLevel(logging.ERROR)
    found = [reader for reader in READERS if not reader.missing]
    for source in {reader.source for reader in found}:
        warm(data, source)
    with torch_threads(1):
        errors = {reader.title: check(reader, data) for reader in found}
        streams = {reader.title: opened(reader, data) for reader in found}
        out, runs = batch_row(data), {reader.title: [] for reader in found}
        for number in range(rounds):
            turn = number * len(found) // rounds
            for reader in found[turn:] + found[:turn]:
                runs[reader.title].append(time_reads(streams[reader.title], out, reads, again=not reader.stream))
        streams.clear()
        gc.collect()  # memory maps, which would keep the pages
        cold = {reader.title: measure_cold(reader, data) for reader in found}
    rows = []
    for reader in READERS:
        row: dict[str, Any] = {"reader": reader.title, "missing": reader.missing}
        rows.append(row)
        if reader.missing:
            continue
        row |= {"goal": reader.goal, "over": reader.over, "error": errors[reader.title], "cold_ms": cold[reader.title]}
        own, first, over = runs[reader.title], runs[_BASE], runs[reader.over]
        for name in own[0]:
            row[f"{name}_ms"] = statistics.median(run[name] for run in own)
            row[f"{name}_ratio"] = statistics.median(b[name] / t[name] for b, t in zip(first, own, strict=True))
            row[f"{name}_ratio_over"] = statistics.median(b[name] / t[name] for b, t in zip(over, own, strict=True))
    return rows


def time_reads(
    stream: Iterator[Callable[[Tensors], int]], out: Tensors, reads: int, *, again: bool
) -> dict[str, float]:
    """Median ms of a read from memory by the clock and of the processor, and (`again`) of the same read repeated.

    What was read just before still lies in the processor's cache, which no epoch of training finds.
    """
    taken: list[dict[str, float]] = []
    for read in itertools.islice(stream, reads):
        times = {}
        for name in ("memory", "", "hot") if again else ("memory",):
            start, processor = time.perf_counter(), time.process_time()
            read(out)
            times[name], used = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - processor)
            if name == "memory":
                times["processor"] = used
        times.pop("", None)
        taken.append(times)
    return {name: statistics.median(times[name] for times in taken) for name in taken[0]}


def measure_cold(reader: Reader, data: Data, reads: int = 4) -> float | None:
    """Milliseconds a sample with nothing of the files in the kernel's cache, opening included; None if it keeps them.

    A disk of a virtual machine has caches below, which nobody here can empty.
    """
    if reader.source == "npz compressed":
        return None
    evict(data, reader.source)
    out, before, start = batch_row(data), bytes_from_disk(), time.perf_counter()
    for read in itertools.islice(opened(reader, data), reads):
        read(out)
    taken = 1e3 * (time.perf_counter() - start) / reads
    stored = reads * data.sample_bytes / (2 if reader.source == "shards fp8" else 1.5)  # at the least
    return taken if bytes_from_disk() - before >= 0.9 * stored else None


def warm(data: Data, source: str) -> None:
    """Reads all files of a format, so that they lie in the kernel's cache."""
    for path in data.path(source).rglob("*"):
        if path.is_file():
            path.read_bytes()


def evict(data: Data, source: str) -> None:
    for path in data.path(source).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bytes_from_disk() -> int:
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["read_bytes"])


def print_readers(rows: Sequence[dict[str, Any]]) -> None:
    titles = f"{'memory':>8}{'x':>7}{'processor':>11}{'x':>7}{'hot':>8}{'x':>7}{'cold':>8}"
    print(f"  {'':<30}{titles}")
    for row in rows:
        if row["missing"]:
            print(f"  {row['reader']:<30}{'not installed':>16}")
            continue
        figures = ""
        for name, width in (("memory", 8), ("processor", 11), ("hot", 8)):
            known = f"{name}_ms" in row
            figures += f"{row[f'{name}_ms']:>{width}.2f}{row[f'{name}_ratio']:>7.2f}" if known else " " * (width + 7)
        figures += " " * 8 if row["cold_ms"] is None else f"{row['cold_ms']:>8.1f}"
        print(f"  {row['reader']:<30}{figures}{_note(row)}")
    print(
        f"""  ms a sample (median), and x: times the rate of {_BASE} in the same round. memory: from the kernel's cache,
  other samples and readers between; processor: the time of it that this process computed; hot: the same sample again,
  which still lies in the processor's cache; cold: from disk, opening included, empty where the kernel keeps the pages
  (the disk of a virtual machine may have caches below)."""
    )


def _note(row: dict[str, Any]) -> str:
    note = ""
    if row["goal"]:
        memory, hot = row["memory_ratio_over"], row["hot_ratio_over"]
        against = f" x {row['over']}" if row["over"] != _BASE else ""
        met = {True: "met", False: "missed"}
        note = f"   goal {row['goal']:g}{against}: {met[memory >= row['goal']]} ({memory:.1f}), hot "
        note += f"{met[hot >= row['goal']]} ({hot:.1f})"
    return note + (f"   largest relative error of a token {row['error']:.3f}" if row["error"] else "")
