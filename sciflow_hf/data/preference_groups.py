"""Groups of a cache as samples: a winner with its losers, which are trained on at the same noise."""

import dataclasses
import hashlib
import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import torch

from ..errors import CacheError, SciflowError
from ..options import given_options
from .cache import CAPTION_COLUMNS, LatentCache, read_schema
from .layouts.base import MASKS, Member, read_member, target_dtype
from .preferences import (
    AXIS,
    GROUP,
    REWARD,
    ROLE,
    WORST,
    PreferenceTuple,
    TupleArguments,
    choose_tuples,
    given_tuples,
)

logger = logging.getLogger(__name__)

CANDIDATE_KEYS = ("latents", "latents_std", "time_ids", *MASKS)
"""Arrays that each candidate of a group has of its own; text and sources are the group's."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Stacked(Member):
    """`each`: the arrays of the winner and of its losers, None for a mask that is not there."""

    each: tuple[Member | None, ...] = ()


class PreferenceGroups(LatentCache):
    """A map-style data set of groups: `groups[i]` has `latents` (1 + K, C, h, w), the winner first, and its text once.

    It is the cache of the winners, whose samples also hold what is the losers' own.

    Args:
        cache: of all candidates.
        tuples: winners and losers, rows of `cache`.
        rules: by which they were chosen, for the checks of a resumed run.

    Raises:
        SciflowError: candidates of a group that do not stack (other sizes or sources).
    """

    def __init__(
        self, cache: LatentCache, tuples: Sequence[PreferenceTuple], *, rules: Mapping[str, Any] | None = None
    ) -> None:
        self.cache, self.tuples, self.rules = cache, list(tuples), dict(rules or {})
        winners = np.array([item.winner for item in self.tuples], dtype=np.int64)
        super().__init__(cache._index, dtype=cache.dtype, rows=cache._rows[winners])
        self.online_text, self.row_filter = cache.online_text, cache.row_filter
        keys = cache.batch_keys
        for item in self.tuples:
            odd = next((row for row in item.losers if keys[row] != keys[item.winner]), None)
            if odd is not None:
                raise SciflowError(
                    f"the group {item.group!r}: {cache.describe(item.winner)} and {cache.describe(odd)} have the "
                    f"buckets {keys[item.winner]} and {keys[odd]}, but are trained on together. Leave one of them out."
                )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {n: getattr(self, n) for n in ("cache", "tuples", "rules")}

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        members = self.members(i)
        sample = {n: torch.empty(m.shape, dtype=target_dtype(m, self.dtype)) for n, m in members.items()}
        self.read_into(i, sample, members)
        if self.online_text is not None:
            sample |= {name: value[0] for name, value in self.online_text([self.caption(i)]).items()}
        return sample

    def members(self, i: int) -> dict[str, Member]:
        """As of a cache; arrays of `CANDIDATE_KEYS` have a leading dimension, the winner first."""
        found = super().members(i)
        every = [found, *(self.cache.members(row) for row in self.tuples[i].losers)]
        for name in CANDIDATE_KEYS:
            each = tuple(members.get(name) for members in every)
            there = [member for member in each if member is not None]
            if not there:
                continue
            if len({member.shape for member in there}) > 1 or (len(there) < len(each) and name not in MASKS):
                shapes = [None if member is None else member.shape for member in each]
                raise CacheError(
                    f"{self.describe(i)}: `{name}` of winner and losers have the shapes {shapes}, but are trained on "
                    "together. Build their cache again, or leave the group out."
                )
            first = there[0]
            found[name] = _Stacked(name, first.file, 0, 0, first.dtype, (len(each), *first.shape), each=each)
        return found

    def read_into(self, i: int, out: Mapping[str, torch.Tensor], members: Mapping[str, Member] | None = None) -> None:
        """As of a cache."""
        members = self.members(i) if members is None else members
        own = {name: tensor for name, tensor in out.items() if not isinstance(members.get(name), _Stacked)}
        super().read_into(i, own, members)
        for name in out.keys() - own.keys():
            stacked: Any = members[name]
            for member, part in zip(stacked.each, out[name], strict=True):
                if member is None:
                    part.fill_(255 if part.dtype == torch.uint8 else 1)
                else:
                    read_member(member, part, self.describe(i))
        if "latents" in out and (out["latents"][1:] == out["latents"][:1]).flatten(1).all(1).any():
            logger.warning("%s: a loser has the winner's latents, and nothing is learnt from it.", self.describe(i))

    def describe(self, i: int) -> str:
        """Group `i` in words."""
        return f"group {self.tuples[i].group!r} (winner {super().describe(i)})"

    def winners(self) -> LatentCache:
        """The winners alone, as samples of a cache."""
        return LatentCache.of(self)

    @property
    def group_size(self) -> int:
        """Candidates of the largest group."""
        return 1 + max((len(item.losers) for item in self.tuples), default=1)

    @cached_property
    def with_worst(self) -> torch.Tensor:
        """(N,) bool: whether the last loser of a group is the worst of all, next to those of axes."""
        return torch.tensor([len(t.axes) > 1 and t.axes[-1] == WORST for t in self.tuples], dtype=torch.bool)

    @cached_property
    def batch_keys(self) -> list[tuple[Any, ...]]:
        """That of the winner, and which losers there are."""
        return self._with_losers(super().batch_keys)

    @cached_property
    def padded_batch_keys(self) -> list[tuple[Any, ...]]:
        """The same without the length of the text."""
        return self._with_losers(super().padded_batch_keys)

    def _with_losers(self, keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        counts = [f"{len(item.losers)} loser{'s' * (len(item.losers) > 1)}" for item in self.tuples]
        words = zip(keys, counts, self.with_worst.tolist(), strict=True)
        return [(*key, count + " with the worst" * worst) for key, count, worst in words]

    @cached_property
    def row_ids(self) -> list[str]:
        """The groups' names."""
        return [item.group for item in self.tuples]

    @cached_property
    def groups(self) -> list[str]:
        """The paper of each winner, where there is one, else the group: both stay on one side of a split."""
        papers, names = (self.strings(name) or [None] * len(self) for name in ("paper_id", GROUP))
        return [paper or name or t.group for paper, name, t in zip(papers, names, self.tuples, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the cache and the tuples; the same wherever the cache lies."""
        names = self.cache.row_ids
        told = [(t.group, names[t.winner], [names[row] for row in t.losers], t.axes) for t in self.tuples]
        return hashlib.sha256(f"{super().fingerprint} {told}".encode()).hexdigest()[:16]

    def split(self, eval_fraction: float) -> tuple[Self, Self]:
        """As of a cache: by papers, else by groups, so that neither is on both sides."""
        train, held_out = super().split(eval_fraction)
        return cast(Self, train), cast(Self, held_out)

    def select(self, rows: Sequence[int] | np.ndarray) -> Self:
        """The groups of these numbers."""
        return type(self)(self.cache, [self.tuples[int(i)] for i in rows], rules=self.rules)


def load_groups(cache: LatentCache, rules: TupleArguments | None = None) -> PreferenceGroups:
    """The groups of a cache, chosen by reward and scores, or as its column `role` gives them.

    Columns of the index: `group_id`; `reward` and a column for each axis (or `<axis>_score`), or `role`, "winner" or
    "loser", and perhaps `axis`, which a loser is worse at. Candidates of a group have the same caption, size and
    sources: others than most of their group are left out. The log says which were left out, and why.

    Args:
        cache: a row a candidate.
        rules: thresholds; only where there is no `role`.

    Raises:
        SciflowError: a column that is not there, or holds no numbers; rules next to `role`; no group has a winner and
            its losers.
    """
    given = cache.strings(ROLE)
    names, kinds, contents = _group_names(cache), _kinds(cache), _contents(cache)
    if given is not None:
        if rules is not None and given_options(rules):
            changed = sorted(given_options(rules))
            raise SciflowError(
                f"`{changed[0]}` chooses winners and losers, but the data says them itself (column `{ROLE}`): leave it "
                "out, or take the column away."
            )
        tuples, report = given_tuples(names, given, cache.strings(AXIS), kinds=kinds, contents=contents)
        told: dict[str, Any] = {"given": True}
    else:
        rules = rules or TupleArguments()
        reward = _numbers(cache, REWARD)
        scores = {axis: _numbers(cache, axis) for axis in rules.axes}
        tuples, report = choose_tuples(names, reward, scores, rules, kinds=kinds, contents=contents)
        told = dataclasses.asdict(rules)
    logger.info("Groups of candidates:\n%s", report)
    return PreferenceGroups(cache, tuples, rules=told)


def _columns(cache: LatentCache) -> list[str]:
    return list(dict.fromkeys(name for file in cache.index_files for name in read_schema(file).names))


def _group_names(cache: LatentCache) -> list[str | None]:
    """The group of each row; groups of equal names in several caches are told apart."""
    names = cache.strings(GROUP)
    if names is None:
        raise SciflowError(
            f"the index has no column `{GROUP}`, which says which candidates are of one prompt, but "
            f"{', '.join(_columns(cache))}. `sciflow-hf prefer draw` writes it; or add it to your table."
        )
    owner: dict[str, int] = {}
    sources = cache.source_of_row.tolist()
    same = [not name or owner.setdefault(name, source) == source for name, source in zip(names, sources, strict=True)]
    return [n if one else f"{n}#{source}" for n, one, source in zip(names, same, sources, strict=True)]


def _numbers(cache: LatentCache, name: str) -> np.ndarray:
    """A column of numbers, NaN where there is none: (N,) float64; that of an axis may end with `_score`."""
    column = cache.column(name)
    column = cache.column(f"{name}_score") if column is None and name != REWARD else column
    if column is None:
        raise SciflowError(
            f"there is no score column {name!r} in the index, but {', '.join(_columns(cache))}. Score the candidates "
            "first (`sciflow-hf prefer score`) and build their cache from that table, or name other `--axes`."
        )
    try:
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    except pa.ArrowInvalid as error:
        raise SciflowError(f"the score column {name!r} does not hold numbers alone ({error}).") from error


def _kinds(cache: LatentCache) -> list[Hashable]:
    """The bucket with its shapes, the caption and the sources of each row; candidates of a group share all."""
    captions = next((found for found in map(cache.strings, CAPTION_COLUMNS) if found is not None), None)
    columns = [cache.batch_keys, captions, cache.strings("source_images")]
    return list(zip(*(column for column in columns if column is not None), strict=True))


def _contents(cache: LatentCache) -> list[Hashable]:
    """Where the latents of each row lie: rows of one place are the same figure."""
    paths = cache.strings("cache_path")
    if paths is None:
        return list(range(len(cache)))
    others = [found for name in ("inline_row", "latents_offset") if (found := cache.strings(name)) is not None]
    return list(zip(cache.source_of_row.tolist(), paths, *others, strict=True))
