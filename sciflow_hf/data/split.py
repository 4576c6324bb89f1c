"""Which rows of a data set are trained on and which are held out: one rule for caches, streams and images."""

import functools
from collections.abc import Iterable

from ..diffusion.randomness import hash64
from ..errors import SciflowError


@functools.lru_cache(maxsize=1 << 16)
def is_held_out(group: str, eval_fraction: float) -> bool:
    """Whether the rows of a group are held out for evaluation.

    A hash of the group alone decides, so that rows of one group stay together and new data moves no old row. The
    fraction is of the groups, and is met in the mean.
    """
    return _hash(group) < int(eval_fraction * 2.0**64)


def held_out_groups(groups: Iterable[str], eval_fraction: float) -> set[str]:
    """Those of the groups that are held out: by hash, else the group of the smallest hash; of a single group none.

    The latter returns to training once the hash selects another, of data that were added; no other group ever moves.
    """
    distinct = set(groups)
    found = {group for group in distinct if is_held_out(group, eval_fraction)}
    return found or ({min(distinct, key=_hash)} if eval_fraction and len(distinct) > 1 else set())


def _hash(group: str) -> int:
    return hash64(group, "eval split")


def check_eval_fraction(eval_fraction: float) -> None:
    """Raises SciflowError outside of [0, 1)."""
    if not 0 <= eval_fraction < 1:
        raise SciflowError(f"`eval_fraction` is {eval_fraction}, but must lie in [0, 1). Use 0 for no evaluation.")


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rows, evenly."""
    return [int(i * (count / wanted)) for i in range(wanted)]
