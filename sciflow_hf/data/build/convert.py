"""Convert a cache to another layout: block by block, by several processes, from where the last run stopped."""

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from ... import __version__
from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError, SciflowError
from .. import storage
from ..cache import CAPTION_COLUMNS, EMPTY_PROMPT_FILE, LatentCache, open_index
from ..layouts.base import (
    ATTENTION_MASK,
    METADATA_KEY,
    TEXT_TENSORS,
    Block,
    Layout,
    Member,
    payload_columns,
    target_dtype,
)
from ..layouts.codecs import quantise
from ..layouts.shards import read_header
from ..writing import output_file, readable_bytes
from .blocks import (
    CONVERT_FILE,
    cut_blocks,
    locked,
    noted_settings,
    npz_name,
    prompt_hash,
    remove_temporaries,
    write_settings,
    writer_of,
)  # fmt: skip
from .cut import CUT, folders_of, noted_cut
from .jobs import text_key

logger = logging.getLogger(__name__)

# Two encodings of one prompt in 16 bit differ by less than this, relative to their length; different ones by more.
_SAME_PROMPT = 1e-2
_PathLike = str | os.PathLike[str]


@dataclass
class ConvertReport:
    """Report of a conversion.

    Attributes:
        output_dir: the new cache.
        samples: its rows.
        blocks: its blocks; `written` of them by this run, `waiting` for other ranks.
        bytes_before, bytes_after: size of the payloads (after: of all files).
        prompts: distinct captions; their embeddings are stored once (shards).
        sources: distinct reference images; stored once (shards).
        own_copies: rows whose embeddings differ from those of the first row with the same caption, and are
            stored next to them.
        fp8_error_mean, fp8_error_max: relative error (L2) of a token's embedding, over what this run wrote;
            None without fp8.
    """

    output_dir: Path
    samples: int = 0
    blocks: int = 0
    written: int = 0
    waiting: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    prompts: int = 0
    sources: int = 0
    own_copies: int = 0
    fp8_error_mean: float | None = None
    fp8_error_max: float | None = None


def convert_cache(
    input_dir: "_PathLike | Sequence[_PathLike] | LatentCache",
    output_dir: _PathLike,
    *,
    payload: str = "shards",
    embeds: str = "bf16",
    codec: str = "none",
    payload_dir: _PathLike | None = None,
    shard_bytes: int = 1 << 30,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> ConvertReport:
    """Write a cache anew in another layout, or continue a conversion that was interrupted.

    The rows keep their order, so that training on either cache sees the same batches. Floating arrays become
    bfloat16. The source is only read. Every file appears complete or not at all; what is there is kept.

    Args:
        input_dir: cache(s) as for `load_cache`, or an open cache (a view keeps its order).
        output_dir: a local folder outside of the source.
        payload: "npz", "shards" (embeddings once per distinct caption) or "inline".
        embeds: "bf16", "fp8" (`prompt_embeds` in 8 bits with a scale per token) or "none" (captions only).
        codec: "none", or "zstd" (lossless).
        payload_dir: where the payloads of `input_dir` are rooted, as for `load_cache`.
        shard_bytes: of one shard or inline file, about (before compression).
        rank: number of this process: it writes the blocks rank, rank + world_size, ...
        world_size: how many processes share the work.
        barrier: waits for the other processes.

    Raises:
        SciflowError: for options that do not go together, an `output_dir` that holds something else or is being
            written by another process, or a full disk.
        CacheError: for a source that cannot be read, naming row and file. Written files are kept.
    """
    layout = Layout(payload, embeds, codec)
    if shard_bytes < 1:
        raise SciflowError(f"`shard_bytes` is {shard_bytes}, but must be at least 1.")
    if not 0 <= rank < world_size:
        raise SciflowError(f"`rank` is {rank}, but must lie in [0, world_size) = [0, {world_size}).")
    if storage.is_url(output_dir):
        raise SciflowError(f"`output_dir` is {str(output_dir)!r}, but must be a local folder. Upload the result.")
    output = Path(output_dir)
    source, folders = _open(input_dir, payload_dir)
    _check_apart(output, source, folders)
    conversion = _Conversion(source, folders or source.index_files, output, layout, shard_bytes)
    with locked(output) if rank == 0 else nullcontext():
        if rank == 0:
            conversion.claim()
            remove_temporaries(output)
        barrier()
        conversion.claim()
        return conversion.run(rank, world_size, barrier)


class _Conversion:
    """Which rows go into which block, and which block stores which prompt: from index and settings alone."""

    def __init__(
        self, source: LatentCache, folders: Sequence[str], output: Path, layout: Layout, shard_bytes: int
    ) -> None:
        layout = replace(layout, sources=max(map(len, source.source_shapes)))
        self.source, self.folders, self.output, self.layout = source, folders, output, layout
        self.writer = writer_of(output, layout)
        self.owned = lru_cache(maxsize=8)(self._read_owned)
        self.latent_shapes, self.text_shapes = source.latent_shapes, source.text_shapes
        names = source.members(0)
        if names.pop(ATTENTION_MASK, None) is not None:
            logger.info("`%s` of the source is left out: klein's network takes no mask.", ATTENTION_MASK)
        if layout.embeds != "none" and "prompt_embeds" not in names:
            raise SciflowError(
                f"`embeds` is {layout.embeds!r}, but the source stores no text embeddings (it was made with `embeds` "
                "none). Encode them by `sciflow-hf cache build`, or convert with `--embeds none`."
            )
        if layout.embeds == "fp8" and source.metadata.get("embeds") == "fp8":
            logger.warning("The source stores fp8 already: its rounding error is not in the error that is reported.")
        if layout.payload == "npz" and "latents" not in names:
            raise SciflowError(
                "`payload` is npz, which always stores latents, but the source holds none: its images are encoded in "
                "training. Choose shards or inline."
            )
        self.names = sorted(self._kept(names).keys() - source_names_in(names))
        known = any(name in source.index.column_names for name in CAPTION_COLUMNS)
        # For embeds "none" a cache without captions raises an error that says so.
        captions = source.captions if known or layout.embeds == "none" else source.row_ids
        if layout.embeds == "none" and not any(captions):
            raise CacheError("`embeds` is 'none', but the captions of the source are empty: nothing could be encoded.")
        self.source_ids = self._source_ids()
        reads = bool(source.metadata.get("text_reads_sources"))
        if reads and layout.embeds == "none":
            raise SciflowError(
                "`embeds` is 'none', but the text encoder of the source also reads the reference images: text is not "
                "encoded in training. Keep the embeddings."
            )
        keys = [text_key(*both) for both in zip(captions, self.source_ids, strict=True)] if reads else captions
        hashes = [prompt_hash(key, source.metadata) for key in keys]
        shards, rows = layout.payload == "shards", range(len(source))
        # Of each row, what others may share: a prompt, sources, each with the names of its tensors there.
        self.items: list[dict[str, list[str]]] = [{} for _ in rows]
        text = [name for name in names if name in TEXT_TENSORS]
        for row in rows if shards else ():
            if layout.embeds != "none":
                self.items[row][hashes[row]] = text
            for number, i in enumerate(self.source_ids[row]):
                self.items[row].setdefault(i, []).append(source_name(number))
        first: dict[str, int] = {}
        for row in rows:
            for item in self.items[row]:
                first.setdefault(item, row)
        self.first = first
        self.sizes = self._sizes(names)
        self.ranges = cut_blocks(self.sizes, shard_bytes)
        starts = [some.start for some in self.ranges]
        homes = dict(zip(first, np.searchsorted(starts, list(first.values()), side="right") - 1, strict=True))
        table = self._light_rows()
        self.blocks = [
            Block(
                f"part{number:05d}", table.slice(some.start, len(some)), hashes[some.start : some.stop],
                self.source_ids[some.start : some.stop],
                {item: f"part{homes[item]:05d}" for row in some for item in self.items[row] if homes[item] != number},
            )
            for number, some in enumerate(self.ranges)
        ]  # fmt: skip
        cut = [[some.start, some.stop] for some in self.ranges]
        facts = json.loads(table.schema.metadata[METADATA_KEY])
        plan = [cut, hashes, facts, table.column_names, *([self.source_ids] if layout.sources else [])]
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
        self.settings = {
            "payload": layout.payload, "embeds": layout.embeds, "codec": layout.codec, "shard_bytes": shard_bytes,
            "source": source.fingerprint, "plan": digest,
        }  # fmt: skip
        self.report = ConvertReport(output, len(source), len(self.blocks), prompts=len(set(hashes)))
        self.report.sources = len({i for ids in self.source_ids for i in ids})
        self.fp8_tokens, self.fp8_total = 0, 0.0  # tokens seen so far, and the sum of their relative errors

    def claim(self) -> None:
        """Writes the settings of the conversion, or compares them with the existing ones."""
        file = self.output / CONVERT_FILE
        noted = noted_settings(file, self.settings, {})
        if noted is None:
            cut = noted_cut(folders_of(self.source.index_files))
            more = {} if cut is None else {CUT: cut}
            write_settings(file, self.settings, source=list(self.folders), version=__version__, **more)
        elif noted["differ"]:
            before = ", ".join(noted.get("source", []))
            raise SciflowError(
                f"`output_dir` is {str(self.output)!r}, which holds the conversion of {before}; the source is now "
                f"{', '.join(self.folders)}, and {noted['differ']}. Use the same source and settings, or name another "
                "folder."
            )

    def _sizes(self, members: Mapping[str, Member]) -> list[int]:
        """Stored bytes of each row before compression; of what has no shape in the index, as in the first row."""
        text = self.text_shapes
        sizes = 2 * sum(name in ("latents", "latents_std") for name in members) * self.latent_shapes.prod(axis=1)
        prompts = text[:, 0] * (text[:, 1] + 4 if self.layout.embeds == "fp8" else 2 * text[:, 1])
        for name, member in members.items():
            if name not in ("latents", "latents_std", "prompt_embeds"):
                nbytes = member.numel * target_dtype(member, torch.bfloat16).itemsize
                (prompts if name in TEXT_TENSORS else sizes)[:] += nbytes
        for row, shapes in enumerate(self.source.source_shapes if self.layout.sources else ()):
            own = (not self.items[row] or self.first[i] == row for i in self.source_ids[row])
            sizes[row] += 2 * sum(math.prod(shape) for shape, here in zip(shapes, own, strict=True) if here)
        if self.layout.embeds != "none":
            here = [not items or self.first[next(iter(items))] == row for row, items in enumerate(self.items)]
            sizes += np.where(here, prompts, 0)
        return sizes.tolist()

    def _kept(self, members: Mapping[str, Member]) -> dict[str, Member]:
        """The members of a row that are stored."""
        kept = {name: m for name, m in members.items() if self.layout.embeds != "none" or name not in TEXT_TENSORS}
        kept.pop(ATTENTION_MASK, None)  # which no family reads
        return kept

    def _source_ids(self) -> list[list[str]]:
        """The ids of each row's sources: those of the index, where it has some; else all are told apart."""
        shapes, column = self.source.source_shapes, self.source.column("source_ids")
        known = [None] * len(shapes) if column is None else column.to_pylist()
        found = []
        for row, own in enumerate(known):
            ids = own if own is not None and len(own) == len(shapes[row]) else None
            if ids is None:
                names = [f"{self.source.row_ids[row]} {number}" for number in range(len(shapes[row]))]
                ids = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in names]
            found.append(ids)
        return found

    def _light_rows(self) -> pa.Table:
        """The index without what says where the source's payloads are."""
        table: pa.Table = self.source.index.with_format("arrow")[:]
        gone = {column for reader in self.source.readers for column in payload_columns(reader.payload)}
        table = table.drop_columns([name for name in table.column_names if name in gone])
        metadata = {k: v for k, v in self.source.metadata.items() if k not in ("payload", "embeds")}
        if "dtype" in metadata:
            metadata["dtype"] = "bf16"
        if self.layout.payload == "npz":
            shapes = {"latent_shape": self.latent_shapes}
            if self.layout.embeds != "none":
                shapes["prompt_embeds_shape"] = self.text_shapes
            for name, values in shapes.items():
                table = table.append_column(name, pa.array(values.tolist(), pa.list_(pa.int64())))
            for name, array in self.writer.source_columns(self.source.source_shapes).items():
                table = table.append_column(name, array)
            table = table.append_column("cache_path", pa.array(self._npz_files(), pa.string()))
        return table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})

    def _npz_files(self) -> list[str]:
        rows = zip(self.source.row_ids, self.source.groups, strict=True)
        return [npz_name("" if g == i else g, hashlib.sha256(i.encode()).hexdigest()[:16]) for i, g in rows]

    def run(self, rank: int, world_size: int, barrier: Callable[[], None]) -> ConvertReport:
        mine = range(rank, len(self.blocks), world_size)
        self._write_payloads([number for number in mine if not self._is_there(self.blocks[number])])
        if rank == 0:
            self._copy_empty_prompt()
        barrier()
        # Those of its own first; then what other ranks left, which is nothing where they run at the same time.
        for block in [*self.blocks[rank::world_size], *self.blocks]:
            if self.writer.is_ready(block):
                self.writer.write_index(block)
        return self._finish()

    def _is_there(self, block: Block) -> bool:
        """Whether the payload of a block exists; names a broken one."""
        try:
            return self.writer.has_payload(block)
        except CacheError as error:
            logger.warning("Written again: %s", error)
            return False

    def _write_payloads(self, numbers: Sequence[int]) -> None:
        need = sum(self.sizes[row] for number in numbers for row in self.ranges[number])
        free = shutil.disk_usage(self.output).free
        if need > free:
            text = "About %s are to be written, but %s has %s free. Free more space; finished files are kept."
            logger.warning(text, readable_bytes(need), self.output, readable_bytes(free))
        samples = sum(len(self.ranges[number]) for number in numbers)
        with tqdm(total=samples, unit="sample", desc="Converting", disable=not samples) as bar:
            for number in numbers:
                block, rows = self.blocks[number], self.ranges[number]
                for other in self.blocks:  # whose index refers to a shard that is about to be made anew
                    if block.name in (other.name, *other.owners.values()):
                        (self.output / other.index_file).unlink(missing_ok=True)
                missing = self.writer.missing(block)
                block = replace(block, rows=block.rows.take(missing))
                self.writer.write_payload(block, self._samples([rows[i] for i in missing], bar))
                self.report.written += 1

    def _samples(self, rows: Sequence[int], bar: "tqdm[Any]") -> Iterator[dict[str, torch.Tensor]]:
        for row in rows:
            try:
                sample = self._sample(row)
            except CacheError as error:
                raise CacheError(
                    f"{error} Rows converted so far are kept: repair that payload, or leave its row out by `sciflow-hf "
                    "cache verify --repair`, and repeat."
                ) from error
            if self.layout.embeds == "fp8" and "prompt_embeds" in sample:
                self._add_error(sample["prompt_embeds"])
            yield sample
            bar.update()

    def _sample(self, row: int) -> dict[str, torch.Tensor]:
        """The tensors of a row; without its text and sources where these are stored for another row already."""
        source = self.source
        members = source.members(row)
        kept = self._kept(members)
        sources = source_names_in(kept)
        if sorted(kept.keys() - sources) != self.names:
            raise CacheError(
                f"{source.describe(row)} holds {sorted(kept.keys() - sources)}, but row 0 {self.names}: all rows of a "
                "cache must hold the same tensors, but for sources."
            )
        elsewhere = {item: names for item, names in self.items[row].items() if self.first[item] != row}
        for item, names in elsewhere.items():
            first = self.first[item]
            others = itertools.cycle(source.members(first)[name] for name in self.items[first][item])
            if all(_place(members[name]) == _place(other) for name, other in zip(names, others, strict=False)):
                kept = {name: member for name, member in kept.items() if name not in names}
        sample = source.read(row, kept)
        for item, names in elsewhere.items():
            owned = itertools.cycle(self.owned(item)) if names[0] in sample else ()
            if owned and all(_same(sample[name], other) for name, other in zip(names, owned, strict=False)):
                sample = {name: value for name, value in sample.items() if name not in names}
        return sample

    def _read_owned(self, item: str) -> list[torch.Tensor]:
        """The tensors of a prompt or source, as the first row with it has them."""
        row = self.first[item]
        names, members = self.items[row][item], self.source.members(row)
        return list(self.source.read(row, {name: members[name] for name in names}).values())

    def _copy_empty_prompt(self) -> None:
        source, target = self.source.empty_prompt_file, self.output / EMPTY_PROMPT_FILE
        if source is not None and self.layout.embeds != "none" and not target.is_file():
            data = storage.read(source, 0, storage.size(source))
            with output_file(target) as handle:
                handle.write(data)

    def _add_error(self, embeds: torch.Tensor) -> None:
        codes, scale = quantise(embeds)
        exact = embeds.float()
        norms = exact.norm(dim=-1)
        errors = (codes.float() * scale[:, None] - exact).norm(dim=-1)[norms > 0] / norms[norms > 0]
        self.fp8_tokens += len(norms)
        self.fp8_total += float(errors.sum())
        self.report.fp8_error_mean = self.fp8_total / self.fp8_tokens
        self.report.fp8_error_max = max(self.report.fp8_error_max or 0.0, *errors.tolist(), 0.0)

    def _finish(self) -> ConvertReport:
        report = self.report
        report.waiting = sum(not (self.output / block.index_file).is_file() for block in self.blocks)
        report.bytes_before = self.source.payload_bytes()[0]
        files = [file for file in self.output.rglob("*") if file.is_file() and not file.name.startswith(".")]
        report.bytes_after = sum(file.stat().st_size for file in files if file.name != CONVERT_FILE)
        if self.layout.payload == "shards":
            shards = [file for file in files if file.suffix == ".safetensors"]
            keys = [key for file in shards for key in read_header(str(file)) if key.startswith("prompt_embeds.")]
            report.own_copies = sum(key.count(".") == 2 for key in keys)
        if report.waiting:
            logger.info("%s: %d of %d blocks wait for other ranks.", self.output, report.waiting, report.blocks)
        return report


def _open(
    input_dir: "_PathLike | Sequence[_PathLike] | LatentCache", payload_dir: _PathLike | None
) -> tuple[LatentCache, list[str]]:
    """The source without an online encoder, and the folders it was named by."""
    folders: list[str] = []
    if isinstance(input_dir, LatentCache):
        cache = input_dir
    else:
        folders = [os.fspath(f) for f in ([input_dir] if isinstance(input_dir, str | os.PathLike) else input_dir)]
        cache = LatentCache(open_index(folders, payload_dir=payload_dir))
    if not len(cache):
        raise SciflowError("`input_dir` is a view without rows.")
    source = cache.select(range(len(cache)))
    source.online_text, source.dtype = None, torch.bfloat16
    return source, folders


def _check_apart(output: Path, source: LatentCache, folders: Sequence[str]) -> None:
    """Refuses an output folder inside the source, or a source inside the output folder."""
    new = os.path.realpath(output)
    known = [*folders, *map(os.path.dirname, source.index_files)] + (
        [reader.root for reader in source.readers] if not folders else []
    )
    for folder in dict.fromkeys(os.path.realpath(f) for f in known if not storage.is_url(f) and os.path.isdir(f)):
        if os.path.commonpath([new, folder]) in (new, folder):
            raise SciflowError(
                f"`output_dir` is {str(output)!r}, but the source lies in {folder}: one must not be in the other. "
                "Name a folder of its own."
            )


def _place(member: Member) -> tuple[str, int, int]:
    return member.file, member.offset, member.nbytes


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two encodings of a prompt are the same up to rounding in 16 bit."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one, other) or bool((one.float() - other.float()).norm() <= _SAME_PROMPT * other.float().norm())
