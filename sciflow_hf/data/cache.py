"""Read a cache: an index in parquet, one row a sample, and payloads of latents and text embeddings."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from ..errors import CacheError, SciflowError
from . import storage
from .index import CAPTION_COLUMNS, ENCODER_KEYS, CacheIndex, same_setting
from .layouts.base import DTYPES, REBUILD, Member, Reader, read_member, read_members, target_dtype
from .layouts.npz import npz_members
from .prior import Prior
from .split import check_eval_fraction, is_held_out

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TEXT_KEYS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask", "txt_ids")


class LatentCache(Dataset[dict[str, torch.Tensor]]):
    """A map-style data set over the rows of a cache; made by `load_cache`.

    `cache[i]` reads one payload: `latents` (C, h, w) and `prompt_embeds` (L, D) in `dtype`, `txt_ids` (L, n)
    int64 where the payload has `text_ids`, and any other numeric array of the payload under its own name
    (floating ones in `dtype`). It raises `CacheError` with row, file and column if anything about the payload
    is wrong. Values are not scanned for NaN.

    Attributes:
        dtype: of the floating tensors.
        online_text: captions -> text tensors (B, ...); where it is set, stored embeddings are not read.
        repeats: how often an epoch of training shows each row, at least 1; None for once.
        prior: which rows are there for prior preservation; None for none.
    """

    online_text: Callable[[list[str]], dict[str, torch.Tensor]] | None = None
    repeats: np.ndarray | None = None
    prior: Prior | None = None

    def __init__(
        self, index: CacheIndex, *, dtype: torch.dtype = torch.bfloat16, rows: np.ndarray | None = None
    ) -> None:
        self._index = index
        self._rows = np.arange(len(index.sizes)) if rows is None else rows
        self.dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        # Cached properties are made again in the worker: cheaper than sending a million strings. A text encoder
        # stays in the main process.
        return {name: self.__dict__[name] for name in ("_index", "_rows", "dtype")}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        members = self.members(i)
        sample = {n: torch.empty(m.shape, dtype=target_dtype(m, self.dtype)) for n, m in members.items()}
        self._read(i, members, sample)
        if self.online_text is not None:
            sample |= {name: value[0] for name, value in self.online_text([self.caption(i)]).items()}
        return sample

    def members(self, i: int) -> dict[str, Member]:
        """The arrays of row `i`: where they lie, their dtypes and shapes. Text ones are left out with `online_text`.

        Raises:
            CacheError: if the payload is not there or not what the index says.
        """
        row = self._row(i)
        where = f"{self.describe(i)} of {self._index.file_of(row)}"
        reader, number = self._index.find(row)
        members = reader.members(number, where)
        if self.online_text is not None:
            members = {name: member for name, member in members.items() if name not in TEXT_KEYS}
        self._check(row, members, where)
        return members

    def shapes(self, i: int) -> dict[str, torch.Tensor]:
        """The floating arrays of row `i` without their values: tensors on the `meta` device."""
        floats = {n: m.shape for n, m in self.members(i).items() if target_dtype(m, self.dtype) == self.dtype}
        return {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in floats.items()}

    def read_into(self, i: int, out: Mapping[str, torch.Tensor], members: Mapping[str, Member] | None = None) -> None:
        """Reads arrays of row `i` (`members`, if they are known already) into contiguous CPU tensors of their shape."""
        self._read(i, self.members(i) if members is None else members, out)

    def _read(self, i: int, members: Mapping[str, Member], out: Mapping[str, torch.Tensor]) -> None:
        where = f"{self.describe(i)} of {self._index.file_of(self._row(i))}"
        for name, tensor in out.items():
            if name not in members:
                raise CacheError(f"{where}: the payload {self.payload_path(i)} lacks `{name}`. {REBUILD}.")
            member = members[name]
            if name == "txt_ids":
                _read_text_ids(member, tensor, where)
            else:
                read_member(member, tensor, where)

    def _check(self, row: int, members: Mapping[str, Member], where: str) -> None:
        index = self._index
        wanted = {"latents": ("latent_shape", index.latent_shapes[row])}
        if self.online_text is None and index.text_shapes[row, 0]:
            wanted["prompt_embeds"] = ("prompt_embeds_shape", index.text_shapes[row])
        ids = members.get("txt_ids")
        if ids is not None and (len(ids.shape) != 2 or ids.shape[0] != index.text_shapes[row, 0]):
            raise CacheError(
                f"{where}: `text_ids` in {ids.file} has shape {ids.shape}, but must be numbers of shape "
                f"({index.text_shapes[row, 0]}, n), one row per token of `prompt_embeds`. {REBUILD}."
            )
        for name, (column, shape) in wanted.items():
            member, expected = members.get(name), tuple(shape.tolist())
            if member is None:
                raise CacheError(
                    f"{where}: the payload {index.payload_file(row)} lacks `{name}`; it has {sorted(members)}. "
                    f"{REBUILD}."
                )
            if member.dtype not in ("F16", "F32", "BF16", "F8_E4M3"):
                raise CacheError(
                    f"{where}: `{name}` in the payload {member.file} is {str(DTYPES[member.dtype])[6:]}, but must be "
                    f"float16, float32, or uint16 with the bits of bfloat16. {REBUILD}."
                )
            if member.shape != expected:
                raise CacheError(
                    f"{where}: `{name}` in {member.file} has shape {member.shape}, but column `{column}` "
                    f"says {expected}. {REBUILD}, or point `--payload_dir` to the payloads of this index."
                )

    def select(self, rows: Sequence[int] | np.ndarray) -> "LatentCache":
        """A view of some rows, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64).reshape(-1)
        if chosen.size and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise SciflowError(f"`rows` holds numbers outside of this cache, which has {len(self)} rows.")
        return self.of(self, chosen)

    @classmethod
    def of(cls, cache: "LatentCache", rows: np.ndarray | None = None) -> Self:
        """The same rows (or those of them numbered `rows`) as a data set of this class."""
        rows = np.arange(len(cache)) if rows is None else rows
        view = cls(cache._index, dtype=cache.dtype, rows=cache._rows[rows])
        view.online_text = cache.online_text
        view.repeats = None if cache.repeats is None else cache.repeats[rows]
        view.prior = None if cache.prior is None else cache.prior.select(rows)
        return view

    def joined(self, other: "LatentCache") -> Self:
        """The rows of this view, then those of another view of the same cache; each comes once an epoch."""
        view = type(self)(self._index, dtype=self.dtype, rows=np.concatenate([self._rows, other._rows]))
        view.online_text = self.online_text
        return view

    def split(self, eval_fraction: float) -> tuple["LatentCache", "LatentCache"]:
        """Training and evaluation part. Whole groups go to one side, by a hash of the group alone.

        So figures of one paper never sit on both sides, and adding rows does not move old ones. The fraction
        is of groups and is met in the mean; a small cache may get an empty evaluation part (a warning says
        so).

        Raises:
            SciflowError: if `eval_fraction` is not in [0, 1), or nothing is left to train on.
        """
        check_eval_fraction(eval_fraction)
        sides = {group: is_held_out(group, eval_fraction) for group in set(self.groups)}
        mask = np.fromiter((sides[group] for group in self.groups), dtype=bool, count=len(self))
        if len(self) and mask.all():
            raise SciflowError(
                f"`eval_fraction` {eval_fraction} puts all {len(sides)} groups into the evaluation part and "
                "leaves nothing to train on. Make it smaller or add data."
            )
        if eval_fraction and not mask.any():
            logger.warning(
                "`eval_fraction` %s of %d groups selects none of them: no evaluation.",
                eval_fraction,
                len(sides),
            )
        return self.select(np.flatnonzero(~mask)), self.select(np.flatnonzero(mask))

    @property
    def metadata(self) -> dict[str, Any]:
        """Encoder settings and facts of the build; {} for a cache without metadata."""
        return self._index.metadata

    @cached_property
    def index(self) -> "datasets.Dataset":
        """The index rows of this view as a `datasets.Dataset`, all columns but the payloads' bytes."""
        import datasets

        table = self._index.read_columns().take(pa.array(self._rows))
        return datasets.Dataset(table, fingerprint=self.fingerprint)

    @cached_property
    def captions(self) -> list[str]:
        """The caption of each row. CacheError if the index has none."""
        found = next((column for column in map(self.column, CAPTION_COLUMNS) if column is not None), None)
        if found is None:
            raise CacheError(
                "the index has no captions (column `caption` or `text`), which online text encoding needs."
            )
        return [caption or "" for caption in found.to_pylist()]

    def caption(self, i: int) -> str:
        """The caption of row `i`."""
        return self.captions[i]

    @property
    def source_of_row(self) -> np.ndarray:
        """(N,) number of the entry of `dataset_dir` that each row came from."""
        return self._index.sources[np.searchsorted(self._index.starts, self._rows, side="right") - 1]

    @property
    def readers(self) -> list[Reader]:
        """Of each index file of the complete cache, in the order of their rows."""
        return self._index.readers

    @property
    def part_files(self) -> list[str]:
        """The parquet files of the index."""
        return [reader.file for reader in self.readers]

    @property
    def is_complete(self) -> bool:
        """Whether this view has all rows."""
        return len(self) == len(self._index.sizes)

    @property
    def empty_prompt_file(self) -> str | None:
        """Where `empty_prompt` is stored."""
        return self._index.empty_prompt_file

    @property
    def latent_shapes(self) -> np.ndarray:
        """(N, 3): channels, height, width of the latents of each row."""
        return self._index.latent_shapes[self._rows].astype(np.int64)

    @property
    def text_shapes(self) -> np.ndarray:
        """(N, 2): length and width of the text of each row; 0 where none is stored."""
        return self._index.text_shapes[self._rows].astype(np.int64)

    def reader(self, i: int) -> Reader:
        """Of the index file of row `i`."""
        return self._index.find(self._row(i))[0]

    def column(self, name: str) -> pa.ChunkedArray | None:
        """A column of the index, not of a payload's bytes; None if there is none of that name."""
        column = self._index.column(name)
        return None if column is None else column.take(pa.array(self._rows))

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of each row."""
        return [(h, w) for h, w in self._index.sizes[self._rows].tolist()]

    @cached_property
    def batch_keys(self) -> list[tuple[int, int, int]]:
        """(height, width, text length) of each row: rows with equal keys stack into a batch without padding.

        Raises:
            CacheError: if two rows of one key have other latent or embedding shapes.
        """
        keys = np.concatenate([self._index.sizes[self._rows], self.text_shapes[:, :1]], axis=1)
        shapes = np.concatenate([self.latent_shapes, self.text_shapes], axis=1)
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        same_as = first[inverse.reshape(-1)]
        odd = np.flatnonzero((shapes != shapes[same_as]).any(axis=1))
        if odd.size:
            i, j = int(odd[0]), int(same_as[odd[0]])
            raise CacheError(
                f"{self.describe(i)} and {self.describe(j)} share the bucket {tuple(keys[i].tolist())} "
                "(height, width, text length), but their shapes (C, h, w, L, D) are "
                f"{tuple(shapes[i].tolist())} and {tuple(shapes[j].tolist())}. {REBUILD}, all rows with the "
                "same encoders."
            )
        return [(h, w, length) for h, w, length in keys.tolist()]

    @cached_property
    def row_ids(self) -> list[str]:
        """A stable name of each row, of which there are no two alike: image (and variant), else the payload."""
        ids = self._index.row_ids
        return [ids[row] for row in self._rows]

    @cached_property
    def groups(self) -> list[str]:
        """`paper_id` of each row where there is one, else its image, else the row id: variants stay together."""
        papers, images = self.strings("paper_id"), self.strings("image_path")
        groups = (
            list(self.row_ids) if images is None else [i or row for i, row in zip(images, self.row_ids, strict=True)]
        )
        return groups if papers is None else [paper or group for paper, group in zip(papers, groups, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over row ids, buckets, shapes and `repeats` in order; the same wherever the cache lies."""
        digest = hashlib.sha256()
        for row_id in self.row_ids:
            data = row_id.encode()
            digest.update(b"%d:" % len(data) + data)
        for array in (self._index.sizes[self._rows], self.latent_shapes, self.text_shapes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        if self.repeats is not None:
            digest.update(np.ascontiguousarray(self.repeats, dtype="<f8").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor] | None:
        """Text keys of the empty prompt, for caption dropout; None if the cache was built without."""
        file = self.empty_prompt_file
        if file is None:
            return None
        members = {name: m for name, m in npz_members(file, "the empty prompt").items() if name in TEXT_KEYS}
        found = members["prompt_embeds"].shape if "prompt_embeds" in members else None
        width = int(self._index.text_shapes[self._rows[0], 1])
        if found is None or len(found) != 2 or (width and found[1] != width):
            raise CacheError(f"{file}: `prompt_embeds` has shape {found}, but the rows have (L, {width}). {REBUILD}.")
        return read_members(members.values(), self.dtype, "the empty prompt")

    @property
    def text_lengths(self) -> list[int]:
        """Number of text tokens of each row."""
        return self.text_shapes[:, 0].tolist()

    def payload_bytes(self) -> tuple[int, int]:
        """Bytes of the files that hold this view's latents, and how many of the files are missing."""
        total = missing = 0
        for file in dict.fromkeys(self.payload_path(i) for i in range(len(self))):
            try:
                total += storage.size(file)
            except FileNotFoundError:
                missing += 1
        return total, missing

    def describe(self, i: int) -> str:
        """Row `i` in words, for error messages: its number in the index, its image and its payload."""
        row = self._row(i)
        image, variant, path = (self._index.value(name, row) for name in ("image_path", "variant", "cache_path"))
        name = f"{image}#{variant}" if variant else image
        known = [name] if name else []
        known += [f"payload {path}"] if path else []
        number = self._index.number(row)
        return f"row {number} ({', '.join(known)})" if known else f"row {number}"

    def payload_path(self, i: int) -> str:
        """The file that holds the latents of row `i`."""
        return self._index.payload_file(self._row(i))

    def check_family(self, encoder_settings: Mapping[str, Any]) -> None:
        """Compare the encoders that made the cache with those of the family to train.

        Raises:
            CacheError: naming both values where family, model, revision, text length, layers or padding side
            differ.
        """
        differ = [
            f"`{key}` is {self.metadata[key]!r} in the cache and {encoder_settings[key]!r} in this run"
            for key in ENCODER_KEYS
            if key in self.metadata
            and key in encoder_settings
            and not same_setting(key, self.metadata[key], encoder_settings[key])
        ]
        if differ:
            raise CacheError(
                f"The cache was made with other encoders: {'; '.join(differ)}. Train with the cache's "
                "settings, or build a new cache by `sciflow-hf cache build` with those of this run."
            )

    def _row(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a cache with {len(self)} rows")
        return int(self._rows[i])

    def strings(self, name: str) -> list[str | None] | None:
        """A column of the index as strings, missing values as None; None if there is none of that name."""
        column = self.column(name)
        return None if column is None else [None if v is None else str(v) for v in column.to_pylist()]


def _read_text_ids(member: Member, out: torch.Tensor, where: str) -> None:
    """Position ids of the text: (L, n), int64."""
    ids = torch.empty(member.shape, dtype=torch.float64)
    read_member(member, ids, where)
    if not torch.isfinite(ids).all() or (ids != ids.round()).any():
        raise CacheError(f"{where}: `text_ids` in {member.file} holds values that are not whole numbers. {REBUILD}.")
    out.copy_(ids)
