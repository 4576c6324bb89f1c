"""Groups of a cache as samples: a winner with its losers, which are trained on at the same noise."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import SciflowError
from .cache import LatentCache
from .preferences import PreferenceTuple
from .split import check_eval_fraction, held_out_groups

CANDIDATE_KEYS = ("latents", "latents_std", "time_ids", "loss_mask")
"""Arrays that each candidate of a group has of its own; text and sources are the group's."""


class PreferenceGroups(Dataset[dict[str, torch.Tensor]]):
    """A map-style data set of groups: `groups[i]` has `latents` (1 + K, C, h, w), the winner first, and its text once.

    Args:
        cache: of all candidates.
        tuples: of `choose_tuples`, rows of `cache`.

    Raises:
        SciflowError: candidates of a group that do not stack (other sizes or sources).
    """

    def __init__(self, cache: LatentCache, tuples: Sequence[PreferenceTuple]) -> None:
        self.cache, self.tuples = cache, list(tuples)
        self.dtype, self.metadata = cache.dtype, cache.metadata
        keys = cache.batch_keys
        for item in self.tuples:
            odd = next((row for row in item.losers if keys[row] != keys[item.winner]), None)
            if odd is not None:
                raise SciflowError(
                    f"the group {item.group!r}: {cache.describe(item.winner)} and {cache.describe(odd)} have the "
                    f"buckets {keys[item.winner]} and {keys[odd]}, but are trained on together. Leave one of them out."
                )

    def __len__(self) -> int:
        return len(self.tuples)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        item = self.tuples[i]
        winner, *losers = [self.cache[row] for row in (item.winner, *item.losers)]
        stacked = {n: torch.stack([winner[n], *(loser[n] for loser in losers)]) for n in CANDIDATE_KEYS if n in winner}
        return winner | stacked

    def describe(self, i: int) -> str:
        """Group `i` in words."""
        item = self.tuples[i]
        return f"group {item.group!r} (winner {self.cache.describe(item.winner)})"

    def check_family(self, encoder_settings: Mapping[str, Any]) -> None:
        """As `LatentCache.check_family`."""
        self.cache.check_family(encoder_settings)

    @property
    def empty_prompt(self) -> dict[str, torch.Tensor] | None:
        """As of the cache, for caption dropout."""
        return self.cache.empty_prompt

    @property
    def has_sources(self) -> bool:
        """Whether some groups are edits."""
        return self.cache.has_sources

    @cached_property
    def batch_keys(self) -> list[tuple[Any, ...]]:
        """That of the winner, and how many losers there are."""
        return [self._key(self.cache.batch_keys[item.winner], item) for item in self.tuples]

    @cached_property
    def padded_batch_keys(self) -> list[tuple[Any, ...]]:
        """The same without the length of the text."""
        return [self._key(self.cache.padded_batch_keys[item.winner], item) for item in self.tuples]

    @staticmethod
    def _key(key: Sequence[Any], item: PreferenceTuple) -> tuple[Any, ...]:
        return (*key, f"{len(item.losers)} losers")

    @property
    def row_ids(self) -> list[str]:
        """The groups' names."""
        return [item.group for item in self.tuples]

    @cached_property
    def groups(self) -> list[str]:
        """The paper of each winner, where there is one, else the group: both stay on one side of a split."""
        papers = self.cache.strings("paper_id")
        return [item.group if papers is None else papers[item.winner] or item.group for item in self.tuples]

    @cached_property
    def fingerprint(self) -> str:
        """Of the cache and the tuples."""
        told = [(t.group, t.winner, t.losers, t.axes) for t in self.tuples]
        return hashlib.sha256(f"{self.cache.fingerprint} {told}".encode()).hexdigest()[:16]

    def select(self, numbers: Sequence[int] | np.ndarray) -> Self:
        """The groups of these numbers."""
        return type(self)(self.cache, [self.tuples[int(i)] for i in numbers])

    def split(self, eval_fraction: float) -> tuple[Self, Self]:
        """Training and evaluation part, as `LatentCache.split`: by papers, else by groups.

        Raises:
            SciflowError: `eval_fraction` is not in [0, 1), or nothing is left to train on.
        """
        check_eval_fraction(eval_fraction)
        held_out = held_out_groups(self.groups, eval_fraction)
        chosen = np.array([group in held_out for group in self.groups], dtype=bool)
        if len(self) and chosen.all():
            raise SciflowError(f"`eval_fraction` {eval_fraction} leaves no group to train on. Make it smaller.")
        return self.select(np.flatnonzero(~chosen)), self.select(np.flatnonzero(chosen))
