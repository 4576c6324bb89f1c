"""How often the 95 % interval of `eval_gain` holds the truth, and how often it says "better" where nothing is gained.

    python -m tests.benchmarks.coverage [--data_sets 4000]

Simulated: gains of rows in groups, true mean 0. A gain is sqrt(r) of its group's draw + sqrt(1 - r) of its own.
"""

import argparse
from collections.abc import Callable

import numpy as np

from sciflow_hf.metrics.intervals import mean_interval

DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "minus exponential": lambda rng, n: 1 - rng.exponential(size=n),
}


def sizes(rng: np.random.Generator, kind: str, effective: int) -> np.ndarray:
    """Rows of the groups: 5 each, or lognormal with deviation 1 until they are in effect so many equal ones."""
    if kind == "equal":
        return np.full(effective, 5)
    drawn = np.zeros(0, dtype=int)
    while drawn.sum() ** 2 < effective * (drawn**2).sum() or not drawn.size:
        drawn = np.append(drawn, max(1, round(5 * np.exp(rng.standard_normal()))))
    return drawn


def coverage(draw: str, kind: str, effective: int, r: float, data_sets: int) -> tuple[float, float]:
    """Shares of intervals that hold 0, and that lie above it."""
    rng, held, above = np.random.default_rng(effective), 0, 0
    for _ in range(data_sets):
        counts = sizes(rng, kind, effective)
        index = np.repeat(np.arange(len(counts)), counts)
        shared, own = DRAWS[draw](rng, len(counts)), DRAWS[draw](rng, len(index))
        interval = mean_interval(np.sqrt(r) * shared[index] + np.sqrt(1 - r) * own, index)  # type: ignore[arg-type]
        assert interval is not None
        held, above = held + (interval[0] <= 0 <= interval[1]), above + (interval[0] > 0)
    return held / data_sets, above / data_sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_sets", type=int, default=4000)
    number = parser.parse_args().data_sets
    print('coverage / false "better" in %, effective number of groups 10, 20, 50, 200')
    for draw in DRAWS:
        for kind in ("equal", "lognormal"):
            for r in (0.0, 0.5, 1.0):
                found = [coverage(draw, kind, effective, r, number) for effective in (10, 20, 50, 200)]
                cells = " | ".join(f"{100 * held:.1f} / {100 * above:.1f}" for held, above in found)
                print(f"| {draw}, {kind} sizes, r = {r:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
