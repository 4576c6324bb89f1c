"""Time until `import sciflow_hf` and a recipe's `--help` are there, against importing transformers' options.

    python -m tests.benchmarks.startup [--rounds 5]
    python -m tests.benchmarks.startup --to_first_step    # processor time of a first step on mini_klein, by part

Rounds alternate between the commands, so that a slow minute of the machine hits all of them. Targets: `--help`
within 1.25x of the stock import, `import sciflow_hf` under a tenth of it.
"""

import argparse
import collections
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STOCK = "from transformers import TrainingArguments, HfArgumentParser"
COMMANDS = {
    STOCK: ["-c", STOCK],
    "import torch, transformers": ["-c", "import torch, transformers"],
    "import sciflow_hf": ["-c", "import sciflow_hf"],
    "sciflow-hf --help": ["-m", "sciflow_hf.cli", "--help"],
    **{f"recipes/{path.name} --help": [str(path), "--help"] for path in sorted((ROOT / "recipes").glob("train_*.py"))},
}
TARGETS = {"import sciflow_hf": 0.1, "recipes/": 1.25}


FIRST_STEP = [
    *("-m", "sciflow_hf.cli", "train", "flux2_klein", "--config", "flux2klein_demo", "--max_steps", "1"),
    *("--validation_prompts", "--eval_strategy", "no", "--eval_fraction", "0", "--save_strategy", "no", "--use_cpu"),
]
"""The demo's LoRA: one step, without held-out data, images and checkpoints."""


def to_first_step(rounds: int) -> None:
    """Prints the processor time of a run of one step with its cache there, and which packages' imports take it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *FIRST_STEP, "--output_dir", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        quiet: Any = {"cwd": folder, "check": True, "env": environment, "capture_output": True, "text": True}
        subprocess.run(command, **quiet)  # which builds the cache
        times = []
        for _ in range(rounds):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, **quiet)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        traced = subprocess.run([command[0], "-X", "importtime", *command[1:]], **quiet).stderr
    print(f"processor seconds to the end of a run of one step: {min(times):.2f} to {max(times):.2f} in {rounds} runs")
    parts: collections.Counter[str] = collections.Counter()
    for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", traced):
        parts[name.split(".")[0]] += int(own)
    print(f"imports, when traced (which slows them): {sum(parts.values()) / 1e6:.2f} s, of which")
    for name, microseconds in parts.most_common(15):
        print(f"  {name:24} {microseconds / 1e6:5.2f}")


def seconds(args: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds, after one that warms the disk.")
    parser.add_argument("--to_first_step", action="store_true", help="Time a first step instead, by part.")
    args = parser.parse_args()
    rounds = args.rounds
    if args.to_first_step:
        return to_first_step(rounds)

    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for measured in range(-1, rounds):
        for name, args in COMMANDS.items():
            taken = seconds(args)
            if measured >= 0:
                times[name].append(taken)

    print(f"{rounds} alternating rounds, Python {sys.version.split()[0]}; seconds and ratio to the first line")
    print(f"{'command':64} {'median':>7} {'min':>7} {'max':>7} {'ratio':>7} {'target':>7}")
    for name, values in times.items():
        # Per round, because both numbers of a round saw the same machine.
        ratio = statistics.median(value / stock for value, stock in zip(values, times[STOCK], strict=True))
        target = next((f"{t:.2f}" for prefix, t in TARGETS.items() if name.startswith(prefix)), "")
        print(
            f"{name:64} {statistics.median(values):7.3f} {min(values):7.3f} {max(values):7.3f} {ratio:7.3f} {target:>7}"
        )


if __name__ == "__main__":
    main()
