"""Read a cache: an index in parquet, one row a sample, and one npz of latents and text embeddings per row."""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sciflow_hf.diffusion.randomness import hash64
from sciflow_hf.errors import CacheError, SciflowError

from .index import CacheIndex, inside, open_index, same_setting

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TEXT_KEYS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask", "txt_ids")
# What decides which numbers an encoder gives; everything else in the metadata is for people.
ENCODER_KEYS = (
    "family",
    "pretrained_model_name_or_path",
    "revision",
    "max_sequence_length",
    "text_encoder_layers",
    "padding_side",
)
_REBUILD = "Run `sciflow-hf cache build` again"
_CHUNK = 1 << 17  # values: what fits into the processor's cache while a dtype is changed
_PathLike = str | os.PathLike[str]


class LatentCache(Dataset[dict[str, torch.Tensor]]):
    """A map-style data set over the rows of a cache; made by `load_cache`.

    `cache[i]` reads one payload: `latents` (C, h, w) and `prompt_embeds` (L, D) in `dtype`, `txt_ids` (L, n)
    int64 where the payload has `text_ids`, and any other numeric array of the payload under its own name
    (floating ones in `dtype`). It raises `CacheError` with row, file and column if anything about the payload
    is wrong. Values are not scanned for NaN.
    """

    def __init__(
        self, index: CacheIndex, *, dtype: torch.dtype = torch.bfloat16, rows: np.ndarray | None = None
    ) -> None:
        self._index = index
        self._rows = np.arange(len(index.part_of_row)) if rows is None else rows
        self.dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        # Cached properties are made again in the worker: cheaper than sending a million strings.
        return {name: self.__dict__[name] for name in ("_index", "_rows", "dtype")}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self._row(i)
        where = f"{self.describe(i)} of {self._index.part_of(row)}"
        sample = read_payload(self.payload_path(i), where, self.dtype)
        for name, shapes in (
            ("latents", self._index.latent_shapes),
            ("prompt_embeds", self._index.text_shapes),
        ):
            expected, found = tuple(shapes[row].tolist()), tuple(sample[name].shape)
            if found != expected:
                column = "latent_shape" if name == "latents" else "prompt_embeds_shape"
                raise CacheError(
                    f"{where}: `{name}` in {self.payload_path(i)} has shape {found}, but column `{column}` "
                    f"says {expected}. {_REBUILD}, or point `--payload_dir` to the payloads of this index."
                )
        return sample

    def select(self, rows: Sequence[int] | np.ndarray) -> "LatentCache":
        """A view of some rows, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64).reshape(-1)
        if chosen.size and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise SciflowError(f"`rows` holds numbers outside of this cache, which has {len(self)} rows.")
        return type(self)(self._index, dtype=self.dtype, rows=self._rows[chosen])

    def split(self, eval_fraction: float) -> tuple["LatentCache", "LatentCache"]:
        """Training and evaluation part. Whole groups go to one side, by a hash of the group alone.

        So figures of one paper never sit on both sides, and adding rows does not move old ones. The fraction
        is of groups and is met in the mean; a small cache may get an empty evaluation part (a warning says
        so).

        Raises:
            SciflowError: if `eval_fraction` is not in [0, 1), or nothing is left to train on.
        """
        if not 0 <= eval_fraction < 1:
            raise SciflowError(f"`eval_fraction` is {eval_fraction}, but must lie in [0, 1). Use 0 for no evaluation.")
        limit = int(eval_fraction * 2.0**64)
        sides = {group: hash64(group, "eval split") < limit for group in set(self.groups)}
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
        """The index rows of this view as a `datasets.Dataset`, all columns."""
        import datasets
        import pyarrow as pa

        return datasets.Dataset(self._index.table.take(pa.array(self._rows)), fingerprint=self.fingerprint)

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
        lengths = self._index.text_shapes[self._rows, 0]
        keys = np.concatenate([self._index.sizes[self._rows], lengths[:, None]], axis=1)
        shapes = np.concatenate([self._index.latent_shapes, self._index.text_shapes], axis=1)[self._rows]
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        same_as = first[inverse.reshape(-1)]
        odd = np.flatnonzero((shapes != shapes[same_as]).any(axis=1))
        if odd.size:
            i, j = int(odd[0]), int(same_as[odd[0]])
            raise CacheError(
                f"{self.describe(i)} and {self.describe(j)} share the bucket {tuple(keys[i].tolist())} "
                "(height, width, text length), but their shapes (C, h, w, L, D) are "
                f"{tuple(shapes[i].tolist())} and {tuple(shapes[j].tolist())}. {_REBUILD}, all rows with the "
                "same encoders."
            )
        return [(h, w, length) for h, w, length in keys.tolist()]

    @cached_property
    def row_ids(self) -> list[str]:
        """A stable name of each row: `image_path`, else `cache_path`."""
        import pyarrow as pa

        paths: list[str] = self._index.cache_paths.take(pa.array(self._rows)).to_pylist()
        for n, row in enumerate(self._rows):
            if os.path.isabs(paths[n]):  # so that a cache with absolute paths may be moved
                paths[n] = inside(paths[n], self._index.root_of(row)) or paths[n]
        images = self._column("image_path")
        return [image or path for image, path in zip(images, paths, strict=True)] if images else paths

    @cached_property
    def groups(self) -> list[str]:
        """`paper_id` of each row where there is one, else the row id."""
        papers = self._column("paper_id")
        return [paper or row for paper, row in zip(papers, self.row_ids, strict=True)] if papers else self.row_ids

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over row ids, buckets and shapes in order; the same wherever the cache lies."""
        digest = hashlib.sha256()
        for row_id in self.row_ids:
            data = row_id.encode()
            digest.update(b"%d:" % len(data) + data)
        for array in (self._index.sizes, self._index.latent_shapes, self._index.text_shapes):
            digest.update(np.ascontiguousarray(array[self._rows], dtype="<i8").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def empty_prompt(self) -> dict[str, torch.Tensor] | None:
        """Text keys of the empty prompt, for caption dropout; None if the cache was built without."""
        file = self._index.empty_prompt_file
        if file is None:
            return None
        sample = read_payload(file, "the empty prompt", self.dtype, required=("prompt_embeds",))
        found, width = tuple(sample["prompt_embeds"].shape), int(self._index.text_shapes[0, 1])
        if len(found) != 2 or found[1] != width:
            raise CacheError(f"{file}: `prompt_embeds` has shape {found}, but the rows have (L, {width}). {_REBUILD}.")
        return {name: sample[name] for name in TEXT_KEYS if name in sample}

    @property
    def text_lengths(self) -> list[int]:
        """Number of text tokens of each row."""
        return self._index.text_shapes[self._rows, 0].tolist()

    def payload_bytes(self) -> tuple[int, int]:
        """Bytes of this view's payloads, and how many of the files are missing."""
        files = [self.payload_path(i) for i in range(len(self))]
        sizes = [os.path.getsize(file) for file in files if os.path.isfile(file)]
        return sum(sizes), len(files) - len(sizes)

    def describe(self, i: int) -> str:
        """Row `i` in words, for error messages: its number in the index, its image and its payload."""
        row = self._row(i)
        path = self._index.cache_paths[row].as_py()
        table = self._index.table
        image = table.column("image_path")[row].as_py() if "image_path" in table.column_names else None
        return f"row {row} ({image}, payload {path})" if image else f"row {row} (payload {path})"

    def payload_path(self, i: int) -> str:
        """The payload file of row `i`."""
        row = self._row(i)
        return os.path.normpath(os.path.join(self._index.root_of(row), self._index.cache_paths[row].as_py()))

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

    def _column(self, name: str) -> list[str | None] | None:
        """A column of this view as strings, missing values as None."""
        if name not in self._index.table.column_names:
            return None
        import pyarrow as pa

        column = self._index.table.column(name).take(pa.array(self._rows))
        return [None if value is None else str(value) for value in column.to_pylist()]


def load_cache(
    dataset_dir: _PathLike | Sequence[_PathLike],
    *,
    payload_dir: _PathLike | None = None,
    streaming: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> LatentCache:
    """Open a cache: every parquet file below `dataset_dir`, checked against each other.

    Args:
        dataset_dir: folder of a cache, a parquet file, or several of these (joined in the given order).
        payload_dir: where `cache_path` is rooted. By default, per index file, `dataset_dir` or else the
            index file's own folder, whichever holds the payloads.
        streaming: not offered yet.
        dtype: of the floating tensors that are read: bfloat16, float16 or float32.

    Raises:
        CacheError: for a missing or empty cache, parts that do not fit together, or a `cache_path` outside
            of its root.
        SciflowError: for `streaming` or another `dtype`.
    """
    if streaming:
        raise SciflowError("`streaming=True` is not offered yet. Copy the cache to a local disk and leave it False.")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SciflowError(f"`dtype` is {dtype}, but must be torch.bfloat16, torch.float16 or torch.float32.")
    return LatentCache(open_index(dataset_dir, payload_dir=payload_dir), dtype=dtype)


def read_payload(
    file: str, where: str, dtype: torch.dtype, *, required: Sequence[str] = ("latents", "prompt_embeds")
) -> dict[str, torch.Tensor]:
    """The numeric arrays of an npz as tensors; nothing is ever unpickled.

    Args:
        file: the npz.
        where: what it belongs to, for error messages.
        dtype: of the floating tensors. uint16 arrays hold the bits of bfloat16 (masks and ids apart).
        required: arrays that must be there, in float16, float32 or uint16.

    Raises:
        CacheError: if the file is missing or broken, lacks a required array, or holds pickled objects.
    """
    name = ""
    try:
        payload = np.load(file, allow_pickle=False)
        if not isinstance(payload, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not an npz")
        with payload:
            arrays = {}
            for name in payload.files:
                arrays[name] = payload[name]
    except FileNotFoundError as error:
        raise CacheError(
            f"{where}: the payload {file} (column `cache_path`) is missing. Say where the payloads are by "
            "`--payload_dir`, or run `sciflow-hf cache build` again."
        ) from error
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        member = f", array `{name}`," if name else ""
        if name and "pickle" in str(error):
            raise CacheError(
                f"{where}: the payload {file}{member} holds pickled objects. They are never loaded, since "
                "loading could run code. Store plain numbers: float16, float32, or uint16 with the bits of "
                f"bfloat16. {_REBUILD}."
            ) from error
        raise CacheError(
            f"{where}: the payload {file}{member} cannot be read: it is truncated or not an npz ({error}). "
            f"Delete it. {_REBUILD}, which makes what is missing."
        ) from error
    for name in required:
        if name not in arrays:
            raise CacheError(f"{where}: the payload {file} lacks `{name}`; it has {sorted(arrays)}. {_REBUILD}.")
        if arrays[name].dtype.newbyteorder("=") not in (np.float16, np.float32, np.uint16):
            raise CacheError(
                f"{where}: `{name}` in the payload {file} is {arrays[name].dtype}, but must be float16, "
                f"float32, or uint16 with the bits of bfloat16. {_REBUILD}."
            )
    sample = {
        name: _tensor(array, dtype, bits=not name.endswith(("_mask", "_ids")))
        for name, array in arrays.items()
        if name != "text_ids" and isinstance(array, np.ndarray) and array.dtype.kind in "fiub"
    }
    if "text_ids" in arrays:
        sample["txt_ids"] = _text_ids(
            arrays["text_ids"], len(sample["prompt_embeds"]), f"{where}: `text_ids` in {file}"
        )
    return sample


def to_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Change between floating dtypes. float16 to bfloat16 goes through float32: 3 times faster, equal."""
    if values.dtype != torch.float16 or dtype != torch.bfloat16:
        return values.to(dtype)
    result = torch.empty(values.shape, dtype=dtype)
    source, target = values.reshape(-1), result.view(-1)
    for start in range(0, source.numel(), _CHUNK):
        target[start : start + _CHUNK] = source[start : start + _CHUNK].float()
    return result


def _tensor(array: np.ndarray, dtype: torch.dtype, *, bits: bool) -> torch.Tensor:
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype.kind == "f":
        return to_dtype(torch.from_numpy(array), dtype)
    if array.dtype == np.uint16 and bits:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(array if array.dtype.kind == "b" else array.astype(np.int64))


def _text_ids(ids: np.ndarray, length: int, where: str) -> torch.Tensor:
    """Position ids of the text: (L, n), int64."""
    if ids.dtype.kind not in "fiu" or ids.ndim != 2 or len(ids) != length:
        raise CacheError(
            f"{where} is {ids.dtype} of shape {ids.shape}, but must be numbers of shape ({length}, n), one "
            f"row per token of `prompt_embeds`. {_REBUILD}."
        )
    whole = ids.astype(np.int64) if np.isfinite(ids).all() else None
    if whole is None or not (whole == ids).all():
        raise CacheError(f"{where} holds values that are not whole numbers. {_REBUILD}.")
    return torch.from_numpy(whole)
