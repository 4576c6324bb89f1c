"""Sizes of images, (height, width) in pixels: buckets of about one area, or of one number of tokens."""

import math
from collections.abc import Sequence
from numbers import Integral

from ...errors import SciflowError

TOLERANCE = 0.1
"""By how much of itself a side of an image may grow before a smaller bucket is taken."""
BUCKETS = ("resolution", "equal_tokens", "given")
"""Values of `--buckets`: of about one area, of one number of tokens, or what each row names."""
FITS = ("cut", "pad")
"""Values of `--fit`: an image covers its bucket and loses the excess, or fits into it and is padded."""
MAX_ASPECT_RATIO = 2.0
_LONGEST = 4.0  # largest `--max_aspect_ratio`
_FEWER = 1 / 32  # by which share of the square's tokens those of `equal_token_buckets` may be fewer


def aspect_ratio_buckets(
    resolution: int, step: int, *, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> list[tuple[int, int]]:
    """Image sizes of about `resolution`**2 pixels, in the manner of SDXL (Podell et al. 2023, appendix I).

    Args:
        resolution: side of the square bucket in pixels; no bucket has a larger area.
        step: sides are multiples of it (pixels).
        max_aspect_ratio: longest side over shortest, at least 1.

    Returns:
        (height, width) pairs from the tallest to the widest. A size is left out if one of its sides could
        grow by a step without passing a limit; the square is always there.
    """
    area = _check_sides(resolution, step, max_aspect_ratio) ** 2
    square = resolution // step * step
    found = {(square, square)}

    def longest(side: int) -> int:
        return int(min(area / side, side * max_aspect_ratio + 1e-6)) // step * step

    for width in range(step, int(resolution * math.sqrt(max_aspect_ratio)) + step, step):
        height = longest(width)
        if height and longest(height) == width:
            found.add((height, width))
    return sorted(found, key=lambda size: (size[1] / size[0], size[0]))


def equal_token_buckets(
    resolution: int, step: int, *, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> list[tuple[int, int]]:
    """Image sizes with one number of tokens, so that compiled blocks and memory see one length.

    That number is the one with most rectangles up to 4:1, of those that are at most 1/32 below the square's; of equals
    the largest. At 1024 pixels in steps of 16: 4,032 = 63 x 64 = 56 x 72 = 48 x 84 = 42 x 96 = 36 x 112 = 32 x 126.

    Args:
        resolution: side of a square in pixels; no bucket has a larger area.
        step: side of a token (pixels).
        max_aspect_ratio: longest side over shortest, at least 1; the bucket nearest to a square is always there.

    Returns:
        (height, width) pairs from the tallest to the widest.
    """
    side = _check_sides(resolution, step, max_aspect_ratio) // step
    counts = range(side**2, math.ceil(side**2 * (1 - _FEWER)) - 1, -1)
    rectangles = max((_rectangles(count, _LONGEST) for count in counts), key=len)
    shown = [pair for pair in rectangles if pair[1] <= pair[0] * max_aspect_ratio] or rectangles[-1:]
    return [(b * step, a * step) for a, b in shown] + [(a * step, b * step) for a, b in reversed(shown) if a < b]


def _rectangles(count: int, longest: float) -> list[tuple[int, int]]:
    """The (a, b) with a b = `count` and a <= b <= `longest` a, from the longest to the nearest to a square."""
    return [(a, count // a) for a in range(1, math.isqrt(count) + 1) if count % a == 0 and count // a <= longest * a]


def _check_sides(resolution: int, step: int, max_aspect_ratio: float) -> int:
    """`resolution`, if buckets can be made of these numbers."""
    check_ints(1, step=step, resolution=resolution)
    if resolution < step:
        raise SciflowError(
            f"`resolution` is {resolution}, but image sides are multiples of {step}: give at least {step}."
        )
    if not max_aspect_ratio >= 1:
        raise SciflowError(f"`max_aspect_ratio` is {max_aspect_ratio}, but must be at least 1.")
    return resolution


def ladder(
    resolution: int,
    bucket_step: int,
    *,
    buckets: str = BUCKETS[0],
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> list[list[tuple[int, int]]]:
    """Buckets of areas `resolution`**2 times 1, 1/2, 1/4, ..., down to a single step: for small figures.

    Args:
        resolution: side of the largest square in pixels.
        bucket_step: sides are multiples of it (pixels). On each rung of "resolution" they are multiples of about 1/16
            of its square's side, as in SDXL (64 at 1024): few enough buckets for full batches.
        buckets: "resolution" (`aspect_ratio_buckets`) or "equal_tokens" (`equal_token_buckets`: one number a rung).
        max_aspect_ratio: longest side over shortest, from 1 to 4.
    """
    check_ints(1, bucket_step=bucket_step, resolution=resolution)
    if buckets not in BUCKETS[:2]:
        raise SciflowError(f"`buckets` is {buckets!r}, but must be one of {', '.join(BUCKETS)}.")
    if not 1 <= max_aspect_ratio <= _LONGEST:
        raise SciflowError(f"`max_aspect_ratio` is {max_aspect_ratio}, but must lie in [1, {_LONGEST:g}].")
    rungs: list[list[tuple[int, int]]] = []
    area = resolution**2
    while not rungs or area >= bucket_step**2:
        side = math.isqrt(area)
        if buckets == "equal_tokens":
            rungs.append(equal_token_buckets(side, bucket_step, max_aspect_ratio=max_aspect_ratio))
        else:
            step = bucket_step * max(1, side // (16 * bucket_step))
            rungs.append(aspect_ratio_buckets(side, step, max_aspect_ratio=max_aspect_ratio))
        area //= 2
    return rungs


def fitting_bucket(
    height: int, width: int, rungs: Sequence[Sequence[tuple[int, int]]], fit: str = FITS[0]
) -> tuple[int, int]:
    """The nearest (height, width) on the first of `rungs` that does not enlarge an image; else that on the last.

    A side may grow by `TOLERANCE`, since buckets have few sizes: at resolution 1024 an image of 1000 x 1000 pixels is
    brought to 1024 x 1024, not to 704 x 704. With `fit` "pad" one side that does not grow is enough.
    """
    for buckets in rungs:
        found = nearest_bucket(height, width, buckets)
        stays = (side <= own * (1 + TOLERANCE) for side, own in zip(found, (height, width), strict=True))
        if any(stays) if fit == "pad" else all(stays):
            break
    return found


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `buckets` whose aspect ratio is nearest by logarithm; of equals, the largest."""
    if not buckets:
        raise SciflowError("`buckets` is empty: give at least one (height, width).")
    aspect = math.log(height / width)
    return min(buckets, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]))


def check_ints(low: float, **values: int) -> None:
    """SciflowError for a value that is not a whole number, or below `low`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise SciflowError(f"`{name}` is {value!r}, but must be a whole number.")
        if value < low:
            raise SciflowError(f"`{name}` is {value}, but must be at least {low}.")
