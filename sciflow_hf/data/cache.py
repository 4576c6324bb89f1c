"""Read a cache: an index in parquet, one row a sample, whose files are found, checked against each other and joined."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain, groupby
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types
import torch
from torch.utils.data import Dataset

from ..diffusion.sources import source_name, source_names_in
from ..errors import CacheError, SciflowError, counted, first_line
from . import storage
from .batches.sizes import FITS
from .layouts.base import (
    ATTENTION_MASK,
    BROKEN,
    DTYPES,
    INT32,
    METADATA_KEY,
    NO_LATENTS,
    REBUILD,
    Columns,
    Member,
    Reader,
    read_member,
    read_members,
    same_everywhere,
    target_dtype,
)  # fmt: skip
from .layouts.flux_h import FluxHReader, is_table_of_images
from .layouts.inline import InlineReader
from .layouts.npz import NpzReader, npz_members
from .layouts.planned import PlannedReader
from .layouts.shards import ShardReader
from .online import IMAGE_KEYS, OnlineImages
from .prior import Prior
from .split import check_eval_fraction, held_out_groups

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

FLUX_H = "flux_h"
"""Layout of the caches that SciForma's own scripts write."""
PLANNED = "planned"
"""Layout of a cache that a dry run does not build."""
READERS: dict[str, type[Reader]] = {
    "npz": NpzReader,
    "shards": ShardReader,
    "inline": InlineReader,
    FLUX_H: FluxHReader,
    PLANNED: PlannedReader,
}
EMPTY_PROMPT_FILE = "empty_prompt.npz"
CAPTION_COLUMNS = ("caption", "text")
NAME_COLUMNS = ("image_path", "paper_id", "variant")
REQUIRED_COLUMNS = ("cache_path", "latent_shape", "prompt_embeds_shape", "bucket_h", "bucket_w")
_SHAPES = {"latent_shape": "latents", "prompt_embeds_shape": "prompt_embeds"}
MEMBER_COLUMNS = ("cache_path", "inline_row", "latents_offset", "prompt_embeds_path", "prompt_embeds_offset")
_FILES_AT_ONCE = 8
_TOGETHER = 16  # files that a thread reads one after the other
_T = TypeVar("_T")
_R = TypeVar("_R")
_KEPT = (*NAME_COLUMNS, "cache_path", "inline_row")  # in memory; shapes and places become arrays
_PathLike = str | os.PathLike[str]
# What describes a build and not what was encoded: parts may differ in it, as caches of several resolutions do.
_OF_THE_BUILD = ("version", "payload", "embeds", "dtype", "resolution", "buckets", "max_aspect_ratio")
TEXT_PARTS = ("text_encoder_name_or_path", "text_encoder_2_name_or_path", "text_encoder_3_name_or_path")
PARTS = ("vae_name_or_path", *TEXT_PARTS)
"""Encoder settings that are noted where a part has a path of its own; else it is the pipeline's."""
# What decides which numbers an encoder gives; everything else in the metadata is for people.
ENCODER_KEYS = (
    "family",
    "pretrained_model_name_or_path",
    "vae_name_or_path",
    *TEXT_PARTS,
    "revision",
    "max_sequence_length",
    "text_encoder_layers",
    "padding_side",
)
BUILD = "`sciflow-hf cache build` makes a cache from a folder of captioned images"
TEXT_KEYS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask", "txt_ids")


@dataclass(frozen=True)
class IndexFile:
    """A file of an index, and what its footer says."""

    name: str
    folder: str  # the entry of `dataset_dir`
    source: int  # its number
    footer: pq.FileMetaData
    schema: pa.Schema
    payload: dict[str, Any]
    columns: list[str]  # that say of which shapes the members of a row are, and where they lie

    @property
    def holds_payload(self) -> bool:
        """Whether the samples of its rows lie in this file."""
        return self.payload.get("layout") == "inline" and "inline_row" not in self.columns

    @property
    def layout(self) -> str:
        """How its payload is organised."""
        return str(self.payload.get("layout", "npz"))

    def reader(self, columns: Columns, root: str, *shapes: np.ndarray) -> Reader:
        """Reader of the rows of `columns`; `shapes` are those of their latents and embeddings."""
        return READERS[self.layout](columns, root, self.payload, *shapes)

    def root(self, columns: Columns, payload_dir: _PathLike | None) -> str:
        """Where the paths of its rows are rooted; CacheError if a path leads outside or no payload is found."""
        file, folder = self.name, self.folder
        beside = file.rpartition("/")[0] if storage.is_url(file) else str(Path(file).parent)
        tried = [os.fspath(payload_dir)] if payload_dir is not None else [beside if folder == file else folder, beside]
        roots = list(dict.fromkeys(root if storage.is_url(root) else os.path.abspath(root) for root in tried))
        root: str | None = roots[0]
        if "cache_path" in columns.names:
            check_inside(columns, roots, ["cache_path"])
            paths = columns.column("cache_path")
            few = np.unique(
                np.linspace(0, len(paths) - 1, min(8, len(paths))).astype(int)
            ).tolist()  # spread over the file
            some = [paths[row].as_py() for row in few]
            found = (
                root
                for root in roots
                if any(storage.inside(p, root) is not None and storage.exists(storage.join(root, p)) for p in some)
            )
            root = next(found, None) if some else root
            if root is None:
                of_images = self.layout == FLUX_H
                named = "next to the image" if of_images else "column `cache_path`"
                images = " from the images (`--input_dir`)" * of_images
                raise CacheError(
                    f"The payloads of {file} are missing: no {some[0]!r} ({named} of its first row) under "
                    f"{' or '.join(roots)}. Name their folder by `--payload_dir`, or run `sciflow-hf cache build`"
                    f"{images}."
                )
        check_inside(columns, [str(root)])
        return str(root)


@dataclass(frozen=True)
class CacheIndex:
    """The files of an index, joined; N rows. Shared by all views of a cache.

    Only the columns that are needed to find, name and batch samples are in memory: 1,000,000 rows are about
    150 MB. `read_columns` reads the others when they are asked for.
    """

    table: pa.Table  # (N rows) of the names, and of what tells the members of a row from those of another
    readers: list[Reader]  # of each index file
    starts: np.ndarray  # (files + 1,) int64: first row of each
    sources: np.ndarray  # (files,) int32: number of the `dataset_dir` entry that each is of
    latent_shapes: np.ndarray  # (N, 3) int32
    text_shapes: np.ndarray  # (N, 2) int32; (0, 0) where no embeddings are stored
    sizes: np.ndarray  # (N, 2) int32: height, width in pixels
    source_shapes: np.ndarray  # (N,) of tuples: (C, h, w) of each of the row's sources
    metadata: dict[str, Any]
    empty_prompt_file: str | None
    _read: dict[str, pa.ChunkedArray | None] = field(default_factory=dict, repr=False, compare=False)

    def find(self, row: int) -> tuple[Reader, int]:
        """The reader of a row, and the row's number in its index file."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.readers[number], row - int(self.starts[number])

    def source(self, row: int) -> int:
        """The number of the `dataset_dir` entry that a row is of."""
        return int(self.sources[np.searchsorted(self.starts, row, side="right") - 1])

    def number(self, row: int) -> int:
        """Name of a row in messages: its number in the complete index."""
        return row

    def value(self, name: str, row: int) -> Any:
        """One value of a column in memory; None where there is no such column."""
        return self.table.column(name)[row].as_py() if name in self.table.column_names else None

    def payload_file(self, row: int) -> str:
        """The file that holds the latents of row `row`."""
        reader, path = self.find(row)[0], self.value("cache_path", row)
        return reader.file if path is None else storage.join(reader.root, path)

    def column(self, name: str) -> pa.ChunkedArray | None:
        """A column of all rows, read from the files where it is not in memory; None if no file has it."""
        if name in self.table.column_names:
            return self.table.column(name)
        if name not in self._read:
            table = self.table if name in _KEPT else self.read_columns([name])
            self._read[name] = table.column(name) if name in table.column_names else None
        return self._read[name]

    def read_columns(self, names: Sequence[str] | None = None) -> pa.Table:
        """Columns of all files, joined; all but the payloads' bytes where `names` is None."""
        tables = []
        for reader in self.readers:
            light = light_names([read_schema(reader.file)])
            # At least one column: a table without forgets its number of rows.
            needed = reader.columns(reader.payload) if reader.payload.get("layout") == FLUX_H else ["bucket_h"]
            wanted = [name for name in light if names is None or name in (*names, *needed)]
            tables.append(reader.completed(read_table(reader.file, wanted)).replace_schema_metadata(None))
        joined = pa.concat_tables(tables, promote_options="permissive")
        return joined if names is None else joined.select([name for name in joined.column_names if name in names])

    @cached_property
    def row_ids(self) -> list[str]:
        """A name of each row that stays the same wherever the cache lies: image and variant, else the payload.

        Raises:
            CacheError: two rows with the same image and the same payload.
        """
        ids: list[str] = []
        images, variants, paths = (_strings(self.column(n)) for n in ("image_path", "variant", "cache_path"))
        for row in range(len(self.sizes)):
            name = (images and images[row]) or (paths and paths[row]) or f"row {self.number(row)}"
            if os.path.isabs(name) and not (images and images[row]):  # so that such a cache may be moved
                name = storage.inside(name, self.find(row)[0].root) or name
            ids.append(f"{name}#{variants[row]}" if variants and variants[row] else name)
        return self._told_apart(ids) if len(set(ids)) < len(ids) else ids

    def _told_apart(self, ids: list[str]) -> list[str]:
        """Numbers the rows of one image (several captions, say); the same payload twice is an error."""
        roots = np.repeat([reader.root for reader in self.readers], np.diff(self.starts))  # caches may have equal names
        places = {name: column for name in MEMBER_COLUMNS if (column := self.column(name)) is not None}
        frame = pa.table({"id": ids, "root": roots, **places}).to_pandas()
        samples = frame.groupby(list(frame), dropna=False).ngroup()
        again = samples.duplicated() & frame[list(places)].notna().any(axis=1)
        if again.any():
            row = int(again.argmax())
            first = int((samples == samples[row]).argmax())
            raise CacheError(
                f"Rows {first} and {row} ({self.find(row)[0].file}) are the same sample twice: {ids[row]!r}, payload "
                f"{self.payload_file(row)}. Remove one of them, or run `sciflow-hf cache verify --repair`."
            )
        counts = frame.groupby("id").cumcount()
        return [f"{name}#{count}" if count else name for name, count in zip(ids, counts, strict=True)]


class LatentCache(Dataset[dict[str, torch.Tensor]]):
    """A map-style data set over the rows of a cache; made by `load_cache`.

    `cache[i]` reads one payload: `latents` (C, h, w) and `prompt_embeds` (L, D) in `dtype`, `txt_ids` (L, n)
    int64 where the payload has `text_ids`, and any other numeric array of the payload under its own name
    (floating ones in `dtype`). It raises `CacheError` with row, file and column if anything about the payload
    is wrong. Values are not scanned for NaN.

    Attributes:
        dtype: of the floating tensors.
        online_text: captions -> text tensors (B, ...); where it is set, stored embeddings are not read.
        online_images: where the images are, and what encodes them; where it is set, stored latents are not read.
        repeats: how often an epoch of training shows each row, at least 1; None for once.
        prior: which rows are there for prior preservation; None for none.
        row_filter: the conditions by which its rows were chosen (`load_cache`).
    """

    online_text: Callable[[list[str]], dict[str, torch.Tensor]] | None = None
    online_images: OnlineImages | None = None
    repeats: np.ndarray | None = None
    prior: Prior | None = None
    row_filter: tuple[str, ...] = ()

    def __init__(
        self, index: CacheIndex, *, dtype: torch.dtype = torch.bfloat16, rows: np.ndarray | None = None
    ) -> None:
        self._index = index
        self._rows = np.arange(len(index.sizes)) if rows is None else rows
        self.dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        # Cached properties are made again in the worker: cheaper than sending a million strings. Encoders stay in the
        # main process.
        return {name: self.__dict__[name] for name in ("_index", "_rows", "dtype")} | {
            "online_images": self.online_images
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        sample = self.read(i, self.members(i))
        if self.online_images is not None:
            image = {name: value[None] for name, value in self.image(i).items()}
            image |= self.online_images.encoded(image, self.dtype)
            sample |= {name: value[0] for name, value in image.items()}
        if self.online_text is not None:
            sample |= {name: value[0] for name, value in self.online_text([self.caption(i)]).items()}
        return sample

    def members(self, i: int) -> dict[str, Member]:
        """The arrays of row `i`: where they lie, their dtypes and shapes; without those that are encoded online.

        Raises:
            CacheError: if the payload is not there or not what the index says.
        """
        row = int(self._rows[i])
        reader, number = self._index.find(row)
        where = _Where(self, i)
        members = reader.members(number, where)
        if self.online_text is not None:
            members = {n: member for n, member in members.items() if n not in (*TEXT_KEYS, ATTENTION_MASK)}
        if self.online_images is not None:
            members = {name: member for name, member in members.items() if name not in IMAGE_KEYS}
        self._check(row, members, where)
        return members

    def image(self, i: int, key: int | None = None) -> dict[str, torch.Tensor]:
        """The image of row `i` from `online_images`: `pixel_values` (3, H, W) and the like; fixed without a key.

        Raises:
            CacheError: the image is missing or cannot be read.
        """
        row, images = int(self._rows[i]), self.online_images
        reader, _ = self._index.find(row)
        if images is None:
            raise SciflowError("`online_images` is not set: this cache knows no images.")
        name, variant = (self._index.value(column, row) or "" for column in ("image_path", "variant"))
        source, where = self._index.source(row), _Where(self, i)
        return images.read(name, variant, self.buckets[i], key, source=source, root=reader.root, where=where)

    def shapes(self, i: int) -> dict[str, torch.Tensor]:
        """The floating arrays of row `i` without their values: tensors on the `meta` device."""
        floats = {n: m.shape for n, m in self.members(i).items() if target_dtype(m, self.dtype) == self.dtype}
        if self.online_images is not None:
            floats |= dict.fromkeys(("latents", "latents_std"), tuple(self.latent_shapes[i].tolist()))
        return {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in floats.items()}

    def read(self, i: int, members: Mapping[str, Member]) -> dict[str, torch.Tensor]:
        """New tensors of some members of row `i`."""
        return read_members(members.values(), self.dtype, _Where(self, i))

    def read_into(self, i: int, out: Mapping[str, torch.Tensor], members: Mapping[str, Member] | None = None) -> None:
        """Reads row `i` (its `members`, if they are known already) into contiguous CPU tensors of their shapes."""
        where = _Where(self, i)
        members = self.members(i) if members is None else members
        for name, tensor in out.items():
            if name not in members:
                raise CacheError(f"{where}: the payload {self.payload_path(i)} lacks `{name}`. {REBUILD}.")
            read_member(members[name], tensor, where)

    def _check(self, row: int, members: Mapping[str, Member], where: object) -> None:
        index = self._index
        wanted = {}
        if self.online_images is None and index.find(row)[0].payload.get("latents") != NO_LATENTS:
            wanted = {"latents": ("latent_shape", index.latent_shapes[row].tolist())}
        if self.online_text is None and index.text_shapes[row, 0]:
            wanted["prompt_embeds"] = ("prompt_embeds_shape", index.text_shapes[row].tolist())
        sources = index.source_shapes[row]
        wanted |= {source_name(number): ("source_shapes", shape) for number, shape in enumerate(sources)}
        if len(sources) < len(found := source_names_in(members)):
            raise CacheError(
                f"{where}: the payload {index.payload_file(row)} holds the sources {found}, but column `source_shapes` "
                f"says {list(sources)}: give it the shape (C, h, w) of each. {REBUILD}."
            )
        ids = members.get("txt_ids")
        if ids is not None and (len(ids.shape) != 2 or ids.shape[0] != index.text_shapes[row, 0]):
            raise CacheError(
                f"{where}: `text_ids` in {ids.file} has shape {ids.shape}, but must be numbers of shape "
                f"({index.text_shapes[row, 0]}, n), one row per token of `prompt_embeds`. {REBUILD}."
            )
        mask = members.get(ATTENTION_MASK)
        if mask is not None and (len(mask.shape) != 1 or mask.shape[0] != index.text_shapes[row, 0]):
            raise CacheError(
                f"{where}: `{ATTENTION_MASK}` in {mask.file} has shape {mask.shape}, but must have one value for each "
                f"of the {index.text_shapes[row, 0]} tokens of `prompt_embeds`. {REBUILD}."
            )
        for name, (column, shape) in wanted.items():
            member, expected = members.get(name), tuple(shape)
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
                    f"{where}: `{name}` in {member.file} has shape {member.shape}, but "
                    f"{index.find(row)[0].told.format(column)} {expected}. {REBUILD}, or point `--payload_dir` to the "
                    "payloads of this index."
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
        view.online_text, view.online_images = cache.online_text, cache.online_images
        view.repeats = None if cache.repeats is None else cache.repeats[rows]
        view.prior = None if cache.prior is None else cache.prior.select(rows)
        view.row_filter = cache.row_filter
        return view

    def joined(self, other: "LatentCache") -> Self:
        """The rows of this view, then those of another view of the same cache; each comes once an epoch."""
        view = type(self)(self._index, dtype=self.dtype, rows=np.concatenate([self._rows, other._rows]))
        view.online_text, view.online_images = self.online_text, self.online_images
        view.row_filter = self.row_filter
        return view

    def split(self, eval_fraction: float) -> tuple["LatentCache", "LatentCache"]:
        """Training and evaluation part. Each group goes to one side, by a hash of the group alone.

        So figures of one paper never sit on both sides, and adding rows does not move old ones. The fraction
        is of groups and is met in the mean; of two groups or more one is held out at least (`stand_in`). Of a single
        one the evaluation part is empty, and a warning says so.

        Raises:
            SciflowError: if `eval_fraction` is not in [0, 1), or nothing is left to train on.
        """
        check_eval_fraction(eval_fraction)
        held_out = held_out_groups(self.groups, eval_fraction)
        mask = np.fromiter((group in held_out for group in self.groups), dtype=bool, count=len(self))
        if len(self) and mask.all():
            raise SciflowError(
                f"`eval_fraction` {eval_fraction} puts all {len(held_out)} groups into the evaluation part and "
                "leaves nothing to train on. Make it smaller or add data."
            )
        if eval_fraction and not held_out:
            logger.warning("`eval_fraction` %s: there is one group only, so none is held out.", eval_fraction)
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
        return [caption or "" for caption in self._captions.take(pa.array(self._rows)).to_pylist()]

    @cached_property
    def _captions(self) -> pa.ChunkedArray:
        """Those of all rows of the index, which views share."""
        found = next((column for column in map(self._index.column, CAPTION_COLUMNS) if column is not None), None)
        if found is None:
            raise CacheError(
                "the index has no captions (column `caption` or `text`), which online text encoding needs."
            )
        return found

    def caption(self, i: int) -> str:
        """The caption of row `i`, without a list of all."""
        return self._captions[int(self._rows[i])].as_py() or ""

    @property
    def source_of_row(self) -> np.ndarray:
        """(N,) number of the entry of `dataset_dir` that each row came from."""
        return self._index.sources[np.searchsorted(self._index.starts, self._rows, side="right") - 1]

    @property
    def file_sources(self) -> list[int]:
        """For each index file of the complete cache, the number of its entry of `dataset_dir`."""
        return self._index.sources.tolist()

    @property
    def readers(self) -> list[Reader]:
        """The reader of each index file of the complete cache, in the order of their rows."""
        return self._index.readers

    @property
    def index_files(self) -> list[str]:
        """The parquet files of the index."""
        return [reader.file for reader in self.readers]

    @property
    def column_names(self) -> list[str]:
        """The columns of the index, of all its caches, but the payloads' bytes."""
        _, first = np.unique(self._index.sources, return_index=True)  # the files of one cache have the same
        return light_names(read_schema(self.index_files[i]) for i in first.tolist())

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

    @property
    def source_shapes(self) -> np.ndarray:
        """(N,) of tuples: the shape (C, h, w) of each source of a row; () where it has none."""
        shapes: np.ndarray = self._index.source_shapes[self._rows]
        return shapes

    @cached_property
    def has_sources(self) -> bool:
        """Whether a row of this view has sources."""
        return any(self._index.source_shapes[self._rows])

    @property
    def kinds(self) -> list[str]:
        """ "edit" for each row that has sources, "generation" for the others."""
        return ["edit" if shapes else "generation" for shapes in self.source_shapes]

    def reader(self, i: int) -> Reader:
        """Settings noted in the index file of row `i`."""
        return self._index.find(int(self._rows[i]))[0]

    def column(self, name: str) -> pa.ChunkedArray | None:
        """A column of the index, not of a payload's bytes; None if there is none of that name."""
        column = self._index.column(name)
        return None if column is None else column.take(pa.array(self._rows))

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Those of these columns of the index that there are, read together; not of a payload's bytes."""
        return self._index.read_columns(names).take(pa.array(self._rows))

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of each row."""
        return [(h, w) for h, w in self._index.sizes[self._rows].tolist()]

    @cached_property
    def padded_batch_keys(self) -> list[tuple[Any, ...]]:
        """`batch_keys` without the text length, for batches whose text is padded."""
        return self._with_sources(self.buckets)

    def _with_sources(self, keys: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """`keys` of the rows, each followed by the shapes of the row's sources."""
        if not self.has_sources:
            return list(keys)
        return [(*key, *shapes) for key, shapes in zip(keys, self.source_shapes, strict=True)]

    @cached_property
    def batch_keys(self) -> list[tuple[Any, ...]]:
        """(height, width, text length, and of an edit the shape (C, h, w) of each source) of each row.

        Rows with equal keys stack into a batch without padding.

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
        return self._with_sources([(h, w, length) for h, w, length in keys.tolist()])

    @cached_property
    def row_ids(self) -> list[str]:
        """A stable name of each row, of which there are no two alike: image (and variant), else the payload."""
        ids = self._index.row_ids
        return [ids[row] for row in self._rows]

    @cached_property
    def groups(self) -> list[str]:
        """`paper_id` of each row where there is one, else its first source, its image, or the row id.

        So variants stay together, and so do the edits of one image.
        """
        papers, images, sources = self.strings("paper_id"), self.strings("image_path"), self.column("source_images")
        firsts = None if sources is None else [names[0] if names else None for names in sources.to_pylist()]
        columns = [column for column in (papers, firsts, images, self.row_ids) if column is not None]
        return [next(name for name in names if name) for names in zip(*columns, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over row ids, buckets, shapes and `repeats` in order; the same wherever the cache lies.

        Where rows have sources, their shapes are included.
        """
        digest = hashlib.sha256()
        for row_id in self.row_ids:
            data = row_id.encode()
            digest.update(b"%d:" % len(data) + data)
        for array in (self._index.sizes[self._rows], self.latent_shapes, self.text_shapes):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        if self.has_sources:
            digest.update(repr(self.source_shapes.tolist()).encode())
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
        row = int(self._rows[i])
        image, variant, path = (self._index.value(name, row) for name in ("image_path", "variant", "cache_path"))
        name = f"{image}#{variant}" if variant else image
        known = [name] if name else []
        known += [f"payload {path}"] if path else []
        number = self._index.number(row)
        return f"row {number} ({', '.join(known)})" if known else f"row {number}"

    def payload_path(self, i: int) -> str:
        """The file that holds the latents of row `i`."""
        return self._index.payload_file(int(self._rows[i]))

    def check_family(self, encoder_settings: Mapping[str, Any]) -> None:
        """Compare the encoders that made the cache with those of the family to train.

        Raises:
            CacheError: naming both values where family, model, revision, text length, layers or padding side
                differ.
        """
        both = encoder_settings.keys() & self.metadata.keys()
        known = [key for key in ENCODER_KEYS if key in both or (key in PARTS and "family" in both)]
        mine, now = ({key: settings.get(key) for key in known} for settings in (self.metadata, encoder_settings))
        differ = differences(mine, now, "`{}` is {!r} in the cache and {!r} in this run")
        if differ:
            raise CacheError(
                f"The cache was made with other encoders: {'; '.join(differ)}. Train with the cache's "
                "settings, or build a new cache by `sciflow-hf cache build` with those of this run."
            )

    def strings(self, name: str) -> list[str | None] | None:
        """A column of the index as strings, missing values as None; None if there is none of that name."""
        return _strings(self.column(name))


def _strings(column: pa.ChunkedArray | None) -> list[str | None] | None:
    return None if column is None else [None if value is None else str(value) for value in column.to_pylist()]


class _Where(NamedTuple):
    """A row in words, which are made when a message needs them."""

    cache: LatentCache
    row: int

    def __str__(self) -> str:
        return f"{self.cache.describe(self.row)} of {self.cache.reader(self.row).file}"


# -- the index -------------------------------------------------------------------------------------------------


def open_index(dataset_dir: _PathLike | Sequence[_PathLike], *, payload_dir: _PathLike | None = None) -> CacheIndex:
    """Reads and joins the index of one or more caches; see `load_cache` for the arguments and errors."""
    files, metadata = find_index(dataset_dir)
    tables = in_threads(lambda file: read_table(file.name, file.columns, file.footer), files)
    readers: list[Reader] = []
    kept: list[pa.Table] = []
    shapes, starts = [], [0]
    for file, columns in zip(files, _columns_of(files, tables), strict=True):
        table = columns.table
        root = file.root(columns, payload_dir)
        if file.layout == FLUX_H:
            shapes.append(FluxHReader.row_shapes(columns, root))
        else:
            columns = columns if "latent_shape" in columns.names else _with_shapes(columns, root)
            shapes.append(row_shapes(columns))
        readers.append(file.reader(columns, root, *shapes[-1][:3]))
        kept.append(table.select([n for n in _KEPT if n in columns.names]).replace_schema_metadata(None))
        starts.append(starts[-1] + table.num_rows)
    latent_shapes, text_shapes, source_shapes, sizes = (np.concatenate(parts) for parts in zip(*shapes, strict=True))
    pa.default_memory_pool().release_unused()  # of the columns that became arrays
    return CacheIndex(
        table=pa.concat_tables(kept, promote_options="permissive"),
        readers=readers,
        starts=np.array(starts),
        sources=np.array([file.source for file in files], dtype=np.int32),
        latent_shapes=latent_shapes,
        text_shapes=text_shapes,
        sizes=sizes,
        source_shapes=source_shapes if any(source_shapes) else same_everywhere((), starts[-1]),
        metadata=metadata,
        empty_prompt_file=find_empty_prompt([*(file.folder for file in files), *(reader.root for reader in readers)]),
    )


def _columns_of(files: Sequence[IndexFile], tables: Sequence[pa.Table]) -> Iterator[Columns]:
    """The columns of each file; neighbours whose columns have the same types are checked together."""
    start = 0
    alike = groupby(zip(files, tables, strict=True), lambda pair: (pair[0].layout, *pair[1].schema))
    for _, group in alike:
        names, parts = zip(*((file, READERS[file.layout].completed(table)) for file, table in group), strict=True)
        whole = Columns(pa.concat_tables([part.replace_schema_metadata(None) for part in parts]), names[0].name, start)
        for file, table in zip(names, parts, strict=True):
            yield whole.part(file.name, start, table)
            start += table.num_rows


def _with_shapes(columns: Columns, root: str) -> Columns:
    """The columns of a table without shapes, with those that the arrays in its npz files have."""
    reader, table = NpzReader(columns, root, {}), columns.table
    logger.info("%s says no shapes: they are read from its %s.", columns.file, counted(len(table), "file"))

    def shapes_of(row: int) -> list[list[int]]:
        where = f"Row {columns.start + row} (in {columns.file})"
        members = reader.members(row, where)
        if missing := [name for name in _SHAPES.values() if name not in members]:
            raise CacheError(f"{where}: its npz holds no `{missing[0]}`, but {', '.join(members)}. {BUILD}.")
        return [list(members[name].shape) for name in _SHAPES.values()]

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        found = list(pool.map(shapes_of, range(len(table))))
    for name, values in zip(_SHAPES, zip(*found, strict=True), strict=True):
        table = table.append_column(name, pa.array(list(values), pa.list_(pa.int64())))
    return Columns(table, columns.file, columns.start)


def row_shapes(columns: Columns) -> tuple[np.ndarray, ...]:
    """For each row the shapes of `latents` (N, 3), `prompt_embeds` (N, 2; 0: none) and sources, and the bucket (N, 2).

    int32, but sources: (N,) of tuples.
    """
    latents = columns.shapes("latent_shape", "(C, h, w)")
    with_text = "prompt_embeds_shape" in columns.names
    texts = columns.shapes("prompt_embeds_shape", "(L, D)") if with_text else np.zeros((len(latents), 2), np.int32)
    sides = [columns.numbers(name, least=1, most=INT32, unit=" of pixels") for name in ("bucket_h", "bucket_w")]
    return latents, texts, columns.source_shapes(), np.stack(sides, axis=1).astype(np.int32)


def find_empty_prompt(folders: Sequence[str]) -> str | None:
    """The file with the embedding of the empty prompt, in the first of the folders that has one."""
    files = (storage.join(folder, EMPTY_PROMPT_FILE) for folder in dict.fromkeys(folders))
    return next((file for file in files if storage.exists(file)), None)


def find_index(dataset_dir: _PathLike | Sequence[_PathLike]) -> tuple[list[IndexFile], dict[str, Any]]:
    """The index files of one or more caches, checked against each other, and their common metadata.

    Raises:
        CacheError: an entry that does not exist or holds none; a file that is named twice; files that do not fit
            together; no rows.
    """
    folders = [os.fspath(f) for f in ([dataset_dir] if isinstance(dataset_dir, str | os.PathLike) else dataset_dir)]
    if not folders:
        raise CacheError("`dataset_dir` is an empty list: name at least one cache.")
    names: list[tuple[int, str]] = []
    seen: set[str] = set()
    real_folder = cache(os.path.realpath)

    def real_path(file: str) -> str:
        beside, name = os.path.split(file)
        return os.path.realpath(file) if os.path.islink(file) else os.path.join(real_folder(beside), name)

    for source, folder in enumerate(folders):
        remote = storage.is_url(folder)
        if (remote and folder.endswith(".parquet")) or os.path.isfile(folder):
            found = [folder]
        elif not remote and not os.path.isdir(folder):
            raise CacheError(f"`dataset_dir` is {folder!r}, which does not exist. {BUILD}.")
        elif not (found := storage.find_files(folder, ".parquet")):
            raise CacheError(f"`dataset_dir` is {folder!r}, which holds no index (*.parquet). {BUILD}.")
        for file in found:
            if (real := file if remote else real_path(file)) in seen:
                raise CacheError(f"`dataset_dir` names {file} twice: give every cache once.")
            seen.add(real)
            names.append((source, file))
    footers = in_threads(read_footer, [file for _, file in names])
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    described = check_schemas(names, schemas)
    for schema, facts in zip(schemas, described, strict=True):
        if not facts and is_table_of_images(schema.names):
            facts["payload"] = {"layout": FLUX_H}
    metadata = common_metadata([file for _, file in names], described)
    files = [
        IndexFile(
            file, folders[source], source, footer, schema, facts.get("payload", {}), wanted_columns(file, schema, facts)
        )
        for (source, file), footer, schema, facts in zip(names, footers, schemas, described, strict=True)
    ]
    if not any(footer.num_rows for footer in footers):
        raise CacheError(f"The index {files[0].name} holds no samples. {BUILD}.")
    return files, metadata


def wanted_columns(file: str, schema: pa.Schema, facts: Mapping[str, Any]) -> list[str]:
    """The columns of an index file that are kept in memory or checked."""
    payload = facts.get("payload", {})
    layout = payload.get("layout", "npz")
    if layout not in READERS:
        raise CacheError(f"The index {file} says its payload layout is {layout!r}; known are npz, shards and inline.")
    if layout == FLUX_H:
        return [name for name in (*NAME_COLUMNS, *FluxHReader.columns(payload)) if name in schema.names]
    required = [
        name
        for name in REQUIRED_COLUMNS
        if not (name == "cache_path" and layout in ("inline", PLANNED))
        and not (name == "prompt_embeds_shape" and facts.get("embeds") == "none")
    ]
    missing = [name for name in required if name not in schema.names]
    if layout == "npz" and "group_id" in schema.names and missing == [*_SHAPES]:
        missing = []  # a published table of candidates: `open_index` reads them from the files
    if missing:
        raise CacheError(
            f"The index {file} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, schema.names))}. Is `dataset_dir` a cache? {BUILD}."
        )
    return [
        n
        for n in dict.fromkeys((*NAME_COLUMNS, *REQUIRED_COLUMNS, "source_shapes", *READERS[layout].columns(payload)))
        if n in schema.names
    ]


def check_inside(columns: Columns, roots: Sequence[str], names: Sequence[str] = ()) -> None:
    """Refuses a path of a payload that leads out of all roots. Only suspicious paths are looked at one by one."""
    for name in names or [n for n in columns.names if n.endswith("_path") and not n.endswith("image_path")]:
        for i in np.flatnonzero(columns.suspicious(name)).tolist():
            path = columns.column(name)[i].as_py()
            if all(storage.inside(path, root) is None for root in roots):
                raise CacheError(
                    f"Row {columns.start + i} (in {columns.file}): column `{name}` is {path!r}, which lies outside of "
                    f"{' and '.join(roots)}. If the payloads are there by intention, name their folder by "
                    "`--payload_dir`."
                )


# -- settings --------------------------------------------------------------------------------------------------


def is_binary(kind: pa.DataType) -> bool:

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def light_names(schemas: Iterable[pa.Schema]) -> list[str]:
    """The columns of some schemas, but the payloads' bytes."""
    return list(dict.fromkeys(field.name for schema in schemas for field in schema if not is_binary(field.type)))


def in_threads(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """The results of `function` for each of the items, in order; thousands of them cost no more than their calls."""
    size = max(1, min(_TOGETHER, len(items) // _FILES_AT_ONCE))
    pieces = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(chain.from_iterable(pool.map(lambda piece: [function(item) for item in piece], pieces)))


def read_schema(file: str) -> pa.Schema:
    return read_footer(file).schema.to_arrow_schema()


def read_footer(file: str) -> pq.FileMetaData:
    try:
        with storage.open_file(file) as handle:
            return pq.read_metadata(handle)
    except BROKEN as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def read_table(file: str, columns: Sequence[str], footer: pq.FileMetaData | None = None) -> pa.Table:
    """Columns of an index file, in one thread: several files are read at once."""
    remote = storage.is_url(file)  # where few large requests are worth their planning
    try:
        with storage.open_file(file) as handle, pq.ParquetFile(handle, metadata=footer, pre_buffer=remote) as part:
            return part.read(columns=list(columns), use_threads=False)
    except BROKEN as error:
        raise CacheError(f"The index {file} cannot be read as parquet ({first_line(error)}). {BUILD}.") from error


def check_schemas(files: Sequence[tuple[int, str]], schemas: Sequence[pa.Schema]) -> list[dict[str, Any]]:
    """Facts about the build in the schema of each index file, (number of its entry, name); {} if none.

    The files of one entry have the same columns; those of different entries, the same types where they share one.
    """
    first: dict[int, tuple[str, pa.Schema]] = {}
    described = []
    for (source, file), schema in zip(files, schemas, strict=True):
        other, columns = first.setdefault(source, (file, schema))
        if odd := sorted(set(columns.names) ^ set(schema.names)):
            raise CacheError(
                f"The index files {other} and {file} do not have the same columns: only one of them has "
                f"{', '.join(map(repr, odd))}. Add the column to the other, or train on one of them."
            )
        try:
            pa.unify_schemas([schemas[0], schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise CacheError(
                f"The index files {files[0][1]} and {file} have columns of other types ({first_line(error)}). {BUILD}."
            ) from error
        try:
            metadata = dict(json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")))
            dict(metadata.get("payload", {}))
        except (ValueError, TypeError) as error:
            raise CacheError(f"The schema metadata `sciflow_hf` of {file} is not JSON ({error}). {BUILD}.") from error
        described.append(metadata)
    return described


def common_metadata(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metadata of the first part; CacheError where another was made with other settings."""
    for name, metadata in zip(names[1:], found[1:], strict=True):
        one, other = (
            {"fit": FITS[0]} | {k: v for k, v in each.items() if k not in _OF_THE_BUILD}
            for each in (found[0], metadata)
        )
        differ = differences(one, other, "`{}` is {!r} and {!r}")
        if differ:
            raise CacheError(
                f"The index files {names[0]} and {name} were not made with the same settings: "
                f"{'; '.join(differ)}. Train on one of them, or build both by `sciflow-hf cache build` with "
                "the same settings."
            )
    if "family" not in found[0]:
        logger.warning("%s says nothing about the encoders that made it: they cannot be checked.", names[0])
    return dict(found[0])


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that stay the same when a model folder is moved: of one only the name is kept."""
    moves = [key for key in ("pretrained_model_name_or_path", *TEXT_PARTS) if _is_folder(settings.get(key, ""))]
    return {**settings} | {key: PurePath(str(settings[key])).name for key in moves}


def same_setting(key: str, one: Any, other: Any) -> bool:
    """Whether two encoder settings are equal. Of a model folder only the name counts: it may lie elsewhere here."""
    if key.endswith("_name_or_path") and (_is_folder(one) or _is_folder(other)):
        return PurePath(str(one)).name == PurePath(str(other)).name
    plain = [list(value) if isinstance(value, tuple) else value for value in (one, other)]
    return plain[0] == plain[1]


def differences(one: Mapping[str, Any], other: Mapping[str, Any], text: str) -> list[str]:
    """The settings that are not the same in both, each in words: `text` of its name and its two values."""
    names = sorted(one.keys() | other.keys())
    return [text.format(n, one.get(n), other.get(n)) for n in names if not same_setting(n, one.get(n), other.get(n))]


def _is_folder(model: Any) -> bool:
    """Whether `model` is (or was, on another machine) a folder and not the name of a Hub repository."""
    return os.path.isdir(str(model)) or os.path.isabs(str(model)) or len(PurePath(str(model)).parts) > 2
