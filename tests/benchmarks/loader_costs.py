"""Parts 3 to 5 of the loader benchmark: memory, bytes on disk, and building on two processes."""

import gc
import itertools
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader
from sciflow_hf.data.batches.sizes import ladder
from sciflow_hf.data.build.build import build_cache
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.build.jobs import find_jobs
from sciflow_hf.data.build.reading import read_views
from sciflow_hf.data.build.sources.find import find_records
from sciflow_hf.data.load import load_cache
from sciflow_hf.data.stream.order import EpochRows
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.demo.figures import make_figures

from .klein import quiet
from .loader_data import Data, disk_bytes, in_new_process, index_row, write_index

INDEX_ROWS = 1_000_000
MIB = 1 << 20
LOADER_MEMORY_GOAL, INDEX_SECONDS_GOAL, INDEX_MEMORY_GOAL, BUILD_GOAL = 50, 2.0, 300, 0.9  # MB, s, MB, share
BYTES_SAMPLES, ROWS_PER_PROMPT = 12, 3
IMAGES, IMAGE_SECONDS = 1000, (0.005, 0.02, 0.05)  # of the stub encoders
FEW_IMAGES = 100


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- memory ------------------------------------------------------------------------------------------------------


def training_buffers(accumulation: int) -> int:
    """As of `DiffusionTrainer`: a step keeps its batches until it is done, while those of the next are read."""
    return 2 * accumulation + 1


def loader_memory(folder: str, batch_size: int, accumulation: int, threads: int) -> tuple[int, int]:
    """Growth of a fresh process at its largest while it trains, and bytes of a batch."""
    cache = load_cache(folder)
    cache.read_into(0, {n: torch.empty(m.shape, dtype=torch.bfloat16) for n, m in cache.members(0).items()
                        if n in ("latents", "prompt_embeds")})  # fmt: skip
    sampler = BucketBatchSampler(cache.batch_keys, batch_size=batch_size, accumulation_steps=accumulation)
    gc.collect()
    before, largest, nbytes = resident(), 0, 0
    loader = BucketLoader(cache, sampler, threads=threads, buffers=training_buffers(accumulation))
    held: list[Any] = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = iter(loader)
        # As the Trainer does: all batches of a step at once, given back at its end.
        for _ in range(len(sampler) // accumulation):
            held = list(itertools.islice(batches, accumulation))
            nbytes = max(nbytes, sum(value.nbytes for value in held[0].values()))
            time.sleep(0.02 * accumulation)  # so that the threads fill what they may
            largest = max(largest, resident())
            for number in range(len(held)):
                held[number].release()
    return largest - before, nbytes


def open_index_process(folder: str) -> dict[str, float]:
    """Seconds and growth of a fresh process as it opens an index, and as it gets an epoch's order ready."""
    before, start = resident(), time.perf_counter()
    cache = load_cache(folder)
    opened = {"open_s": time.perf_counter() - start, "open_mb": (resident() - before) / 1e6}
    sampler = BucketBatchSampler(cache.batch_keys, batch_size=2)
    next(iter(sampler))
    return opened | {"ready_s": time.perf_counter() - start, "ready_mb": (resident() - before) / 1e6}


def stream_index_process(folder: str) -> dict[str, float]:
    """Growth of a fresh process as it streams an index, rows a second, and seconds to get to the last row of a file."""
    stream = StreamingCache(folder)
    before, largest, start = resident(), 0, time.perf_counter()
    for number, _ in enumerate(EpochRows(stream, 0, 0)):
        if number % 10_000 == 0:
            largest = max(largest, resident())
    rate, start = len(stream) / (time.perf_counter() - start), time.perf_counter()
    next(stream.read_rows(0, stream.files[0].footer.num_rows - 1))
    return {
        "stream_rows_s": rate, "stream_mb": (largest - before) / 1e6, "stream_resume_s": time.perf_counter() - start,
    }  # fmt: skip


def write_large_index(data: Data, folder: Path) -> None:
    """A million rows in the npz layout, and one (empty) payload a part, so that the folder is taken for a cache."""
    (folder / "2015").mkdir(parents=True, exist_ok=True)
    for part, rows in enumerate(np.array_split(np.arange(INDEX_ROWS), 4)):
        papers = [f"2015/15{row // 8 % 12 + 1:02d}.{row // 8:06d}" for row in rows]
        one = index_row(data, 0, "", "")
        columns = {name: pa.array([one[name]] * len(rows)) for name in one}
        columns["image_path"] = pa.array([f"{paper}/{row}.png" for paper, row in zip(papers, rows, strict=True)])
        columns["cache_path"] = pa.array([f"{p}/{row}_flux_latents.npz" for p, row in zip(papers, rows, strict=True)])
        columns["caption"] = pa.array([f"Figure {row}: an architecture with {row % 7} blocks." for row in rows])
        write_index(pa.table(columns), folder / f"2015/2015_rank0_part{part}.parquet")
        first = folder / columns["cache_path"][0].as_py()
        first.parent.mkdir(parents=True, exist_ok=True)
        first.touch()


def measure_memory(data: Data, *, batch_size: int) -> dict[str, Any]:
    result: dict[str, Any] = {"loader": [], "goal_mb": LOADER_MEMORY_GOAL}
    for source in ("shards", "npz fp16"):
        for accumulation in (n for n in (1, 4, 8) if n * batch_size <= data.samples):
            grown, nbytes = in_new_process(loader_memory, str(data.path(source)), batch_size, accumulation, 2)
            above = grown - training_buffers(accumulation) * nbytes
            result["loader"].append({
                "source": source, "accumulation": accumulation, "batch_mb": nbytes / 1e6,
                "grown_mb": grown / 1e6, "above_mb": above / 1e6,
            })  # fmt: skip
    folder = data.folder.parent / "index"
    if not folder.exists():
        partial = folder.with_name(".index")
        shutil.rmtree(partial, ignore_errors=True)
        write_large_index(data, partial)
        partial.rename(folder)
    result["index"] = {}
    for process in (open_index_process, stream_index_process):
        runs = [in_new_process(process, str(folder)) for _ in range(3)]
        result["index"] |= {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return result


def print_memory(result: dict[str, Any]) -> None:
    print(f"  {'':<12}{'accumulation':>13}{'batch MB':>10}{'grown MB':>10}{'above (2 accumulation + 1) batches':>36}")
    for row in result["loader"]:
        figures = f"{row['accumulation']:>13}{row['batch_mb']:>10.1f}{row['grown_mb']:>10.1f}{row['above_mb']:>36.1f}"
        print(f"  {row['source']:<12}{figures}")
    print(f"  goal: at most {LOADER_MEMORY_GOAL} MB above")
    found = result["index"]
    print(
        f"  an index of {INDEX_ROWS:,} rows: open in {found['open_s']:.2f} s and {found['open_mb']:.0f} MB (goals: "
        f"{INDEX_SECONDS_GOAL:g} s, {INDEX_MEMORY_GOAL} MB); with an epoch's order {found['ready_s']:.2f} s and "
        f"{found['ready_mb']:.0f} MB"
    )
    print(
        f"  as a stream: {found['stream_rows_s']:,.0f} rows/s and {found['stream_mb']:.0f} MB; to the last row "
        f"of one of its 4 files in {found['stream_resume_s']:.2f} s"
    )


# -- bytes -------------------------------------------------------------------------------------------------------


def measure_bytes(data: Data) -> list[dict[str, Any]]:
    """Payload bytes a sample of each way to store the same float32 npz files."""
    count = min(BYTES_SAMPLES, data.samples)
    folder = data.folder / "bytes"
    shutil.rmtree(folder, ignore_errors=True)
    whole = sum((data.path("npz fp32") / f"2015/p/{i}_flux_latents.npz").stat().st_size for i in range(count)) / count
    rows = [{"stored": "npz fp32", "bytes": whole, "times_smaller": 1.0, "over_bf16": None, "error": None}]
    plain = 0.0
    for title, per_prompt, options, goal in (
        ("bf16 shards, every prompt distinct", 1, {}, 2.0),
        (f"bf16 shards, 1 in {ROWS_PER_PROMPT} prompts distinct", ROWS_PER_PROMPT, {}, None),
        ("zstd shards", 1, {"codec": "zstd"}, 1.4),
        ("fp8 shards", 1, {"embeds": "fp8"}, 1.9),
        ("fp8 and zstd shards", 1, {"embeds": "fp8", "codec": "zstd"}, None),
        ("online: latents alone", 1, {"embeds": "none"}, 13.0),
    ):
        write_float_cache(data, folder, count, per_prompt)
        with quiet():
            report = convert_cache(folder / "in", folder / "out", **options)
        stored = disk_bytes(folder / "out") / count
        plain = plain or stored
        rows.append({
            "stored": title, "bytes": stored, "times_smaller": whole / stored, "over_bf16": plain / stored,
            "goal": goal, "error": report.fp8_error_mean, "error_max": report.fp8_error_max,
        })  # fmt: skip
        shutil.rmtree(folder)
    return rows


def write_float_cache(data: Data, folder: Path, count: int, per_prompt: int) -> None:
    """float32 npz files in which `per_prompt` rows share a caption and its embedding."""
    (folder / "in/2015").mkdir(parents=True)
    rows = []
    for i in range(count):
        first = i - i % per_prompt
        path = f"2015/{i}_flux_latents.npz"
        arrays = {"latents": data.halves(i)["latents"], "prompt_embeds": data.halves(first)["prompt_embeds"]}
        np.savez(folder / "in" / path, **{name: value.astype(np.float32) for name, value in arrays.items()})
        rows.append(index_row(data, i, path, f"caption {first}"))
    write_index(pa.Table.from_pylist(rows), folder / "in/2015/2015_rank0_part0.parquet")


def print_bytes(rows: list[dict[str, Any]]) -> None:
    print("  embeddings: normal values, log-normal scale per channel (deviation 0.7), so that exponents repeat as in")
    print("  a text encoder's output; all files of the cache count, per sample")
    print(f"  {'':<38}{'MB':>8}{'smaller than fp32':>19}{'than bf16':>11}")
    for row in rows:
        over = "" if row["over_bf16"] is None else f"{row['over_bf16']:.2f}"
        note = f"   goal {row['goal']:g}" if row.get("goal") else ""
        note += (
            f"   relative error of a token {row['error']:.3f}, at most {row['error_max']:.3f}" if row["error"] else ""
        )
        print(f"  {row['stored']:<38}{row['bytes'] / 1e6:>8.2f}{row['times_smaller']:>19.2f}{over:>11}{note}")


# -- building ----------------------------------------------------------------------------------------------------


class SleepyEncoders:
    """Take `seconds` for each image, and half of that for each call with prompts, as `alone` counts.

    They sleep, as a process does that waits for its GPU; what the stub computes is part of its time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.alone = seconds, 0.0

    def _sleep(self, seconds: float, start: float) -> None:
        time.sleep(max(0.0, start + seconds - time.perf_counter()))
        self.alone += seconds

    def images(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        latents = torch.nn.functional.avg_pool2d(pixels, 8)
        self._sleep(self.seconds * len(pixels), start)
        return {"latents": latents}

    def prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self._sleep(self.seconds / 2, time.perf_counter())
        return {"prompt_embeds": torch.ones(len(prompts), 64, 256)}


def build_rank(root: str, rounds: int, rank: int, barriers: Sequence[Barrier], taken: Any) -> None:
    """Builds of both layouts with every encoder: rank 0 alone, then both. First a small one, which imports all."""
    torch.set_num_threads(1)
    for number, payload, seconds, world_size in [(-1, "shards", 0.0, 2), *builds(rounds)]:
        barrier, encoders = barriers[world_size - 1], SleepyEncoders(seconds)
        barriers[1].wait()
        if rank >= world_size:
            continue
        start, computed = time.perf_counter(), time.process_time()
        with quiet():
            build_cache(
                f"{root}/{'few' if number < 0 else 'images'}", f"{root}/{payload}_{seconds}_{world_size}_{number}",
                encode_images=encoders.images, encode_prompts=encoders.prompts, payload=payload,
                settings={"family": "stub"}, bucket_step=8, resolution=256, rank=rank, world_size=world_size,
                barrier=barrier.wait,
            )  # fmt: skip
        if number >= 0:
            times = time.perf_counter() - start, encoders.alone, time.process_time() - computed
            taken.put((number, payload, seconds, world_size, times))


def builds(rounds: int) -> Iterator[tuple[int, str, float, int]]:
    return itertools.product(range(rounds), ("shards", "npz"), IMAGE_SECONDS, (1, 2))


def pixels_process(source: str) -> float:
    """Processor seconds that an image takes to become the encoder's input, and nothing else."""
    records, _ = find_records(source)
    jobs = list(find_jobs(records, ladder(256, 8), resolution=256, crops=0, flip=False, with_caption=False, skip=print))
    read_views(jobs[:1])
    start = time.process_time()
    for job in jobs:
        read_views([job])
    return (time.process_time() - start) / len(jobs)


def measure_build(data: Data, *, rounds: int) -> dict[str, Any]:
    """Images a second, the encoders' own time as a share of a build's in the best round, processor time an image."""
    folder, context = data.folder / "build", multiprocessing.get_context("spawn")
    shutil.rmtree(folder, ignore_errors=True)
    make_figures(folder / "images", num_figures=IMAGES)
    make_figures(folder / "few", num_figures=FEW_IMAGES)
    pixels = in_new_process(pixels_process, str(folder / "few"))
    barriers, taken = [context.Barrier(1), context.Barrier(2)], context.Queue()
    ranks = [context.Process(target=build_rank, args=(str(folder), rounds, rank, barriers, taken)) for rank in range(2)]
    for process in ranks:
        process.start()
    times: dict[tuple[str, float, int], list[tuple[float, ...]]] = {}
    for number, payload, seconds, world_size in builds(rounds):
        both = [taken.get() for _ in range(world_size)]
        total, alone, _ = max(b[4] for b in both)
        computed = sum(b[4][2] for b in both)
        times.setdefault((payload, seconds, world_size), []).append((total, alone, computed))
        samples = len(load_cache(folder / f"{payload}_{seconds}_{world_size}_{number}"))
        if samples != IMAGES or any(b[:4] != (number, payload, seconds, world_size) for b in both):
            raise ValueError(f"{world_size} processes built {samples} samples of {IMAGES}")
    for process in ranks:
        process.join()
    shutil.rmtree(folder)
    rows = [
        {
            "payload": payload, "encoder_ms": 1e3 * seconds, "processes": world_size,
            "images_a_second": max(IMAGES / total for total, _, _ in found),
            "encoder_share": max(alone / total for total, alone, _ in found),
            "processor_ms": min(1e3 * computed / IMAGES for _, _, computed in found),
        }
        for (payload, seconds, world_size), found in times.items()
    ]  # fmt: skip
    return {"pixels_ms": 1e3 * pixels, "builds": rows}


def print_build(found: dict[str, Any]) -> None:
    print(f"  {IMAGES} figures of about 320 x 240 pixels; goal: {BUILD_GOAL} of the time is the encoders' own")
    print(f"  to decode and resize an image takes {found['pixels_ms']:.1f} ms of a processor")
    print(f"  {'payload':<9}{'ms an image':>11}{'processes':>11}{'images a second':>17}{'encoders':>10}{'cpu ms':>9}")
    for row in found["builds"]:
        print(
            f"  {row['payload']:<9}{row['encoder_ms']:>11.0f}{row['processes']:>11}{row['images_a_second']:>17.1f}"
            f"{row['encoder_share']:>10.2f}{row['processor_ms']:>9.1f}"
        )
