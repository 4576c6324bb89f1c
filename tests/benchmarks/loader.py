"""Readers and loaders of cached latents against those of other libraries: `python -m tests.benchmarks.loader`."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .loader_costs import measure_build, measure_bytes, measure_memory, print_build, print_bytes, print_memory
from .loader_data import WRITERS, Data, hush, in_new_process, torch_threads
from .loader_loaders import LOADERS, measure_loaders, print_loaders
from .loader_readers import READERS, measure_readers, print_readers

PACKAGES = ("torch", "numpy", "pyarrow", "datasets", "safetensors", "webdataset", "litdata", "mosaicml-streaming")


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"cpu": names[0] if names else platform.processor(), "cpus": os.cpu_count(), "versions": versions}


@contextlib.contextmanager
def working_folder(named: str | None) -> Iterator[Path]:
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
        yield Path(named)
        return
    with tempfile.TemporaryDirectory(prefix="loader_benchmark_") as folder:
        yield Path(folder)


def run(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    load, facts = os.getloadavg(), machine()
    print(", ".join(f"{name} {value}" for name, value in facts["versions"].items()))
    print(f"{facts['cpus']} x {facts['cpu']}; load {load[0]:.1f} at the start")
    print(f"{data.samples} samples of {data.sample_bytes / 1e6:.1f} MB in 16 bit: {data.latents} and {data.text}")
    formats = [name for name in WRITERS if any(name in FORMATS[part] for part in options.only)]
    needed, free = 1.5 * len(formats) * data.samples * data.sample_bytes, shutil.disk_usage(data.folder.parent).free
    print(f"in {data.folder}: up to {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free", flush=True)
    data.write(formats)
    result: dict[str, Any] = {"machine": facts, "options": vars(options), "load_before": load}
    for part in PARTS:
        if part in options.only:
            print(f"\n{TITLES[part]}", flush=True)
            start = time.perf_counter()
            result[part] = PARTS[part](options, data)
            print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    return result | {"load_after": os.getloadavg()}


def readers(options: argparse.Namespace, data: Data) -> Any:
    rounds, reads = 4 * options.repeats, 2  # short turns: a busy moment hits all alike
    rows = in_new_process(measure_readers, data, rounds, reads)
    print_readers(rows)
    return rows


def loaders(options: argparse.Namespace, data: Data) -> Any:
    rounds = max(1, options.repeats // 2)
    # Short products on several threads wait for each other when any of their cores is taken.
    with torch_threads(1) if options.busy else contextlib.nullcontext():
        step, rows = measure_loaders(
            data, rounds=rounds, batch_size=options.batch_size, step_ms=options.step_ms, busy=options.busy
        )
    print_loaders(step, rows)
    return step | {"loaders": rows}


def memory(options: argparse.Namespace, data: Data) -> Any:
    found = measure_memory(data, batch_size=options.batch_size)
    print_memory(found)
    return found


def disk(options: argparse.Namespace, data: Data) -> Any:
    rows = measure_bytes(data)
    print_bytes(rows)
    return rows


def build(options: argparse.Namespace, data: Data) -> Any:
    found = measure_build(data, rounds=max(1, options.repeats // 2))
    print_build(found)
    return found


PARTS = {"readers": readers, "loaders": loaders, "memory": memory, "bytes": disk, "build": build}
TITLES = {
    "readers": "Readers: one thread, one sample into a row of a bfloat16 batch",
    "loaders": "Loaders: batches beside a training step, and flat out",
    "memory": "Memory: of the loader with 2 threads, and of a large index",
    "bytes": "Bytes a sample",
    "build": "Building on one and two processes",
}
FORMATS = {
    "readers": {reader.source for reader in READERS},
    "loaders": {source for loader in LOADERS for source in loader.sources},
    "memory": {"shards", "npz fp16"},
    "bytes": {"npz fp32"},
    "build": set(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs=3, default=(32, 128, 128), help="shape of a sample's latents")
    parser.add_argument("--text", type=int, nargs=2, default=(512, 12288), help="shape of its text embedding")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="alternating rounds: readers take 4 times, loaders and builds half as many",
    )
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--step_ms", type=float, default=40.0, help="of the training step beside the loaders")
    parser.add_argument("--busy", action="store_true", help="the step computes, on one core; by default it sleeps")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts to run")
    parser.add_argument("--folder", help="for the data; kept and used again. Default: a temporary one")
    parser.add_argument("--output", help="write the figures to this JSON file, too")
    options = parser.parse_args()
    if options.samples < 2 * options.batch_size:
        parser.error("`--samples` must be at least two batches")

    hush()
    with working_folder(options.folder) as root:
        shape = "x".join(map(str, (*options.latents, *options.text)))
        data = Data(root / f"{shape}_{options.samples}", tuple(options.latents), tuple(options.text), options.samples)
        result = run(options, data)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
