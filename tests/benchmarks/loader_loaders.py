"""Part 2 of the loader benchmark: batches beside a training step, and flat out."""

import contextlib
import functools
import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader
from sciflow_hf.data.load import load_cache
from sciflow_hf.data.stream.loader import StreamLoader

from .loader_data import NAMES, Data, Tensors, batch_row, installed
from .loader_readers import arrow, np_load

WARMUP = 4  # batches at the start of each epoch that do not count: workers start, queues fill
WAIT_GOAL, EXTRA_GOAL = 0.5, 1.0  # ms
_Batches = Iterable[dict[str, torch.Tensor]]


class Rows(Dataset[Tensors]):
    """A map-style data set over a reader; the reader is opened in the process that reads."""

    def __init__(self, data: Data, source: str, opener: Callable[[Data, str], Any]) -> None:
        self.data, self.source, self.opener = data, source, opener

    @functools.cached_property
    def read(self) -> Callable[[int, Tensors], None]:
        return self.opener(self.data, self.source)

    def __len__(self) -> int:
        return self.data.samples

    def __getitem__(self, i: int) -> Tensors:
        out = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in self.data.shapes.items()}
        self.read(i, out)
        return out


class NpLoad(Rows):
    """What a plain reader does: arrays from np.load, cast."""

    def __getitem__(self, i: int) -> Tensors:
        with np.load(self.data.path(self.source) / f"2015/p/{i}_flux_latents.npz") as payload:
            return {name: torch.from_numpy(payload[name]).to(torch.bfloat16) for name in NAMES}


def as_bfloat16(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Stacked bits of bfloat16, under their names."""
    return {name: torch.as_tensor(batch[name]).view(torch.bfloat16) for name in NAMES}


def stack_bits(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return as_bfloat16({name: torch.stack([torch.from_numpy(sample[name]) for sample in samples]) for name in NAMES})


def ours(data: Data, batch_size: int, source: str, threads: int) -> _Batches:
    cache = load_cache(data.path(source))
    sampler = BucketBatchSampler(cache.batch_keys, batch_size=batch_size)
    return BucketLoader(cache, sampler, threads=threads)


class ours_stream:
    """One epoch of a stream of the inline files."""

    def __init__(self, data: Data, batch_size: int, threads: int) -> None:
        stream = load_cache(data.path("inline"), streaming=True)
        self.loader, self.batches = (
            StreamLoader(stream, batch_size=batch_size, threads=threads),
            data.samples // batch_size,
        )

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.batches)

    def close(self) -> None:
        self.loader.close()


def worker_options(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}


def torch_np_load(data: Data, batch_size: int, workers: int) -> _Batches:
    return DataLoader(NpLoad(data, "npz fp16", np_load), batch_size, shuffle=True, **worker_options(workers))


def hf_datasets(data: Data, batch_size: int, workers: int) -> _Batches:
    return DataLoader(Rows(data, "arrow", arrow), batch_size, shuffle=True, **worker_options(workers))


def webdataset_loader(data: Data, batch_size: int, workers: int) -> _Batches:
    import webdataset

    urls = sorted(str(path) for path in data.path("tar").glob("*.tar"))
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    named = stream.map(lambda sample: {name: sample[f"{name}.npy"] for name in NAMES})
    batches = named.batched(batch_size, collation_fn=stack_bits, partial=False)
    return webdataset.WebLoader(batches, batch_size=None, **worker_options(workers))


def litdata_loader(data: Data, batch_size: int, workers: int) -> _Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(data.path("litdata")), shuffle=True)
    return map_batches(StreamingDataLoader(dataset, batch_size=batch_size, **worker_options(workers)))


def mds_loader(data: Data, batch_size: int, workers: int) -> _Batches:
    import streaming

    logging.getLogger("streaming").setLevel(logging.ERROR)
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(data.path("mds") / "mds"), batch_size=batch_size, shuffle=True)
    return DataLoader(dataset, batch_size, collate_fn=stack_bits, **worker_options(workers))


class map_batches:
    """An iterable of batches with their bits as bfloat16."""

    def __init__(self, batches: Iterable[dict[str, Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return map(as_bfloat16, self.batches)


@dataclass(frozen=True)
class Loader:
    title: str
    open: Callable[..., _Batches]
    sources: tuple[str, ...]  # formats
    args: tuple[Any, ...]

    @property
    def missing(self) -> bool:
        return not all(installed(name) for name in (self.title.partition(",")[0], *self.sources))


def library(title: str, opener: Callable[..., _Batches], source: str, workers: Sequence[int]) -> list[Loader]:
    return [Loader(f"{title}, {n} worker{'s' * (n != 1)}", opener, (source,), (n,)) for n in workers]


LOADERS = [
    *(Loader(f"ours: shards, {n} thread{'s' * (n > 1)}", ours, ("shards",), ("shards", n)) for n in (1, 2, 4)),
    *(Loader(f"ours: {s}, 2 threads", ours, (s,), (s, 2)) for s in ("npz fp16", "npz bf16", "inline")),
    Loader("ours: stream of inline, 2 threads", ours_stream, ("inline",), (2,)),
    *library("np.load + DataLoader", torch_np_load, "npz fp16", (0, 1, 2)),
    *library("webdataset", webdataset_loader, "tar", (1, 2)),
    *library("litdata", litdata_loader, "litdata", (1, 2)),
    *library("mds", mds_loader, "mds", (1, 2)),
    *library("HF datasets + DataLoader", hf_datasets, "arrow", (1, 2)),
]


def busy_step(milliseconds: float) -> Callable[[], None]:
    """Matrix products for about that long, in torch, which leaves the interpreter to others meanwhile."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    times = []
    for _ in range(400):
        start = time.perf_counter()
        a @ b
        times.append(1e3 * (time.perf_counter() - start))
    count = max(1, round(milliseconds / statistics.median(times)))

    def step() -> None:
        for _ in range(count):
            a @ b

    return step


def run_epoch(batches: _Batches, step: Callable[[], None]) -> tuple[list[float], list[float], float]:
    """Of each batch after the first ones, in ms: wait for it, and all of its step; and flat out ms a batch."""
    waits: list[float] = []
    totals: list[float] = []
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            break
        got = time.perf_counter()
        step()
        give_back(batch)
        waits.append(1e3 * (got - start))
        totals.append(1e3 * (time.perf_counter() - start))
        del batch
    iterator, times = iter(batches), []
    for batch in iterator:
        times.append(time.perf_counter())
        give_back(batch)
        del batch
    counted = slice(min(WARMUP, len(waits) // 4), None)
    return waits[counted], totals[counted], 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def give_back(batch: Any) -> None:
    if callable(release := getattr(batch, "release", None)):
        release()


def check(loader: Loader, batches: _Batches, data: Data, batch_size: int) -> None:
    """Every sample comes once, whole: by a number that differs between samples."""
    wanted = sorted(data.tensors(i)["latents"].double().sum().item() for i in range(data.samples))
    found: list[float] = []
    for batch in batches:
        shapes = {name: tuple(batch[name].shape) for name in NAMES}
        if shapes != {name: (batch_size, *shape) for name, shape in data.shapes.items()}:
            raise ValueError(f"{loader.title} gives batches of {shapes}")
        found += batch["latents"].flatten(1).double().sum(dim=1).tolist()
        give_back(batch)
    if not np.allclose(sorted(set(found)), wanted):
        raise ValueError(f"{loader.title} gives {len(found)} samples, of which {len(set(found))} differ")


def measure_loaders(
    data: Data, *, rounds: int, batch_size: int, step_ms: float, busy: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The step alone, and every loader beside it, once a round in an order that turns."""
    step = busy_step(step_ms) if busy else functools.partial(time.sleep, step_ms / 1e3)
    found = [loader for loader in LOADERS if not loader.missing]
    alone, runs = [], {loader.title: [] for loader in found}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", flush=True)
        steps = run_epoch([dict(batch_row(data))] * (data.samples // batch_size), step)[1]
        alone.append(statistics.fmean(steps))
        for loader in found[number % len(found) :] + found[: number % len(found)]:
            batches = loader.open(data, batch_size, *loader.args)
            if number == 0:
                check(loader, batches, data, batch_size)
            waits, totals, flat = run_epoch(batches, step)
            runs[loader.title].append((waits, statistics.fmean(totals) - alone[-1], flat))
            with contextlib.suppress(AttributeError):
                batches.close()
            del batches
            gc.collect()  # worker processes
    rows = []
    for loader in LOADERS:
        if loader.missing:
            rows.append({"loader": loader.title, "missing": True})
            continue
        waits, extra, flat = zip(*runs[loader.title], strict=True)
        joined = np.concatenate(waits)
        rows.append({
            "loader": loader.title, "wait_ms": float(np.median(joined)),
            "wait_p95_ms": float(np.quantile(joined, 0.95)),
            "extra_ms": statistics.median(extra), "flat_ms": statistics.median(flat),
            "samples_per_s": 1e3 * batch_size / statistics.median(flat),
        })  # fmt: skip
    return {"step_ms": statistics.median(alone)}, rows


def print_loaders(step: dict[str, float], rows: Sequence[dict[str, Any]]) -> None:
    print(f"  {'':<34}{'wait':>8}{'95 %':>8}{'extra a step':>14}{'flat out':>10}{'samples/s':>11}")
    for row in rows:
        if "missing" in row:
            print(f"  {row['loader']:<34}{'not installed':>16}")
            continue
        figures = f"{row['wait_ms']:>8.2f}{row['wait_p95_ms']:>8.2f}{row['extra_ms']:>14.2f}{row['flat_ms']:>10.2f}"
        print(f"  {row['loader']:<34}{figures}{row['samples_per_s']:>11.0f}")
    print(f"  ms a batch; the step alone: {step['step_ms']:.2f}. Goals: wait {WAIT_GOAL}, extra {EXTRA_GOAL}, or less")
