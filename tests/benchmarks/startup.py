"""Time until `import sciflow_hf` and a recipe's `--help` are there, against importing transformers' options.

    python -m tests.benchmarks.startup [--rounds 5]

Rounds alternate between the commands, so that a slow minute of the machine hits all of them. Targets: `--help`
within 1.25x of the stock import, `import sciflow_hf` under a tenth of it.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

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


def seconds(args: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds, after one that warms the disk.")
    rounds = parser.parse_args().rounds

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
