"""Splits of a data set, as `datasets` tells them from names of files and folders; train alone unless asked."""

import re
from collections.abc import Collection, Sequence
from pathlib import PurePath

from ....errors import SciflowError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(\w+(?:[.-]\w+)*?)-\d{5}-of-\d{5}\.parquet")
ALL = "all"


def split_of_table(path: PurePath) -> str | None:
    """The split in the name of a parquet file or else of a folder it lies in; None if there is none."""
    if match := _SHARD.fullmatch(path.name):
        return _SPLIT_OF.get(match[1], match[1])
    for name in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[-._ 0-9]+", name):
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return None


def split_of_image(path: PurePath) -> str | None:
    """The split whose name a folder has that an image lies in."""
    return next((_SPLIT_OF[name] for name in path.parts[:-1] if name in _SPLIT_OF), None)


def choose_splits(there: Sequence[str], wanted: str | None, source: str) -> Collection[str]:
    """Which of the splits that are `there` to read.

    Args:
        there: their names; none where the data has no splits.
        wanted: a name, several joined by "+", or "all"; None: train, or the only one.
        source: for messages.

    Raises:
        SciflowError: there is no such split, or no train among several.
    """
    if wanted is None:
        if "train" not in there and len(there) > 1:
            raise SciflowError(f"`input_dir` is {source!r}, with {_listed(there)}. Choose one by `--split`.")
        return ["train"] if "train" in there else there
    if wanted == ALL or (wanted == "train" and not there):
        return there
    chosen = [name if name in there else _SPLIT_OF.get(name, name) for name in wanted.split("+")]
    if not set(chosen) <= set(there):
        raise SciflowError(
            f"`split` is {wanted!r}, but `input_dir` {source!r} has {_listed(there)}. Name one, several as in "
            f"train+validation, or {ALL}."
        )
    return chosen


def _listed(splits: Sequence[str]) -> str:
    return f"the splits {', '.join(splits)}" if splits else "no splits"
