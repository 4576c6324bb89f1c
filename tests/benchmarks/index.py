"""An index as large as SciForma's, of long captions: opening, filtering, buckets, the first batches, memory.

    python -m tests.benchmarks.index [--rows 661660] [--files 1 1324] [--folder DIR]

Writes the index of a cache without payload (text and images are encoded in training), once with each number of files:
1,324 of 500 rows are what `cache build` writes, one is what SciForma publishes. Captions are made of random words, 538
tokens of Qwen3's in the mean as theirs (4.5 characters a token); shapes are those of mini_klein, for which a run is
planned. Every step is timed in a new process; memory is the
most that this takes, less what it took before it opened the cache.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
CHARACTERS = 538 * 4.5
SIDES = [(1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344), (1344, 768), (704, 1472)]
STEPS = ["open", "filter", "split", "buckets", "plan", "captions"]
RUN = {"output_dir": "never_written", "use_cpu": True, "max_steps": 200_000, "per_device_train_batch_size": 16}
FILTER = ["quality_tier=High", "is_tikz=false"]
FACTS = {"family": "flux2_klein", "embeds": "none", "payload": {"layout": "inline", "tensors": {}, "latents": "none"}}


def write_index(folder: Path, rows: int, files: int) -> None:
    """`files` parquet files with `rows` rows together."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 11, 20_000)])
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        count, first = len(part), int(part[0])
        lengths = np.maximum(20, rng.normal(CHARACTERS / 7, CHARACTERS / 28, count)).astype(int)
        drawn = np.split(rng.integers(0, len(words), int(lengths.sum())), np.cumsum(lengths)[:-1])
        size = rng.integers(0, len(SIDES), count)
        sides = np.array(SIDES)[size]
        table = pa.table(
            {
                "paper_id": [f"24{i // 30000:02d}.{i % 30000 // 3:05d}" for i in range(first, first + count)],
                "quality_tier": np.array(["High", "Medium", "Low"])[rng.choice(3, count, p=[0.4, 0.4, 0.2])],
                "is_tikz": rng.random(count) < 0.1,
                "image_path": [f"images/{i:07d}.png" for i in range(first, first + count)],
                "caption": [" ".join(words[some]) for some in drawn],
                "bucket_w": sides[:, 1],
                "bucket_h": sides[:, 0],
                "latent_shape": [[8, int(h) // 4, int(w) // 4] for h, w in sides],
            }
        )
        table = table.replace_schema_metadata({"sciflow_hf": json.dumps(FACTS)})
        pq.write_table(table, folder / f"data_part{number:05d}.parquet")


def measure(step: str, folder: str) -> None:
    """Runs one step in this process; prints its seconds and what it found."""
    import pandas  # noqa: F401 - by pyarrow, when it is there; a training has imported it for transformers

    import sciflow_hf as sf
    from sciflow_hf.data.batches.buckets import BucketBatchSampler

    load, taken = sf.load_cache, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # imports, then memory
    before, start, busy = taken(), time.perf_counter(), time.process_time()
    cache: Any = load(folder, row_filter=FILTER if step == "filter" else ())
    found = f"{len(cache):,} rows"
    if step in STEPS[2:]:
        start, busy = time.perf_counter(), time.process_time()
    if step == "split":
        train, held_out = cache.split(0.05)
        found = f"{len(train):,} to train on, {len(held_out):,} held out"
    if step == "buckets":
        sampler = BucketBatchSampler(cache.batch_keys, batch_size=2, num_replicas=8)
        next(iter(sampler))
        found = f"{len(sampler):,} batches a rank of an epoch, in order"
    if step == "plan":
        cache.online_text = len  # encoded in training
        family, args = sf.Flux2Klein("mini_klein", max_sequence_length=1024), sf.DiffusionTrainingArguments(**RUN)
        network = family.load_model(dtype=args.weight_dtype, meta=True)
        plan = sf.plan(network.requires_grad_(True), family, args, cache)
        found = f"--dry_run; its last lines:\n{plan[plan.index('data: latents') :]}"
    if step == "captions":
        captions = [cache.caption(int(row)) for row in np.random.default_rng(0).integers(0, len(cache), 1000)]
        found = f"of 1,000 random rows, {sum(map(len, captions)) / 1000:,.0f} characters in the mean"
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    memory = (taken() - before) / 2**20
    print(f"  {step:<9}{seconds:7.2f} s ({busy:.2f} s of processors)  {memory:5.2f} GiB  {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=661_660)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 1324])
    parser.add_argument("--folder", help="keep the indexes here, and use those of an earlier call")
    parser.add_argument("--measure", nargs=2, metavar=("STEP", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    with tempfile.TemporaryDirectory() as temporary:
        for files in args.files:
            folder = Path(args.folder or temporary) / f"{args.rows}_{files}"
            if not folder.is_dir():
                folder.mkdir(parents=True)
                write_index(folder, args.rows, files)
            size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
            print(f"{args.rows:,} rows in {files:,} files, {size:.2f} GB on the disk")
            for step in STEPS:
                sys.stdout.flush()
                command = [sys.executable, "-m", "tests.benchmarks.index", "--measure", step, str(folder)]
                subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
