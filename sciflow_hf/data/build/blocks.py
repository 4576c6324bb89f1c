"""Write blocks of rows in any layout: what `build` and `convert` share. A block is a shard or a file, and its index."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SciflowError
from ..layouts import CODECS, EMBEDS, PAYLOADS
from ..layouts.members import Stored, encode_member
from ..layouts.npz import write_npz
from ..layouts.shards import shard_columns, shard_file, write_shard
from ..layouts.stored import TEXT_TENSORS
from ..parquet import ENCODER_KEYS, METADATA_KEY, portable
from ..writing import output_file

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 10_000  # of a block
_PLACES = ("cache_path", "inline_row", "latent_shape", "prompt_embeds_shape")


@dataclass(frozen=True)
class Layout:
    """How tensors are stored.

    Attributes:
        payload: "npz" (a file per sample), "shards" or "inline".
        embeds: `prompt_embeds` as they are ("bf16"), in 8 bits with a scale per token ("fp8"), or no text tensors
            at all ("none", for online encoding).
        codec: "none", or "zstd" (lossless).
        dtype: of floating tensors.

    Raises:
        SciflowError: for other values, and for fp8 or zstd in npz files.
    """

    payload: str = "shards"
    embeds: str = "bf16"
    codec: str = "none"
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name, allowed in {"payload": PAYLOADS, "embeds": EMBEDS, "codec": CODECS}.items():
            if (value := getattr(self, name)) not in allowed:
                raise SciflowError(f"`{name}` is {value!r}, but must be one of {', '.join(allowed)}.")
        if self.payload == "npz" and (self.embeds == "fp8" or self.codec != "none"):
            raise SciflowError(
                f"`payload` npz stores neither fp8 nor zstd (`embeds` is {self.embeds!r}, `codec` {self.codec!r}). "
                "Choose shards or inline."
            )

    def tensors(self, sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that are stored, in the dtypes they are stored in (before fp8)."""
        kept = {}
        for name, value in sample.items():
            name = "txt_ids" if name == "text_ids" else name
            if name in TEXT_TENSORS and self.embeds == "none":
                continue
            if value.is_floating_point():
                value = value.to(self.dtype)
            elif value.dtype != torch.bool and name != "loss_mask":
                value = value.to(torch.int64)
            kept[name] = value
        return kept

    def encode(self, sample: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
        """Stored form of a sample, by tensor."""
        stored = {}
        for name, value in self.tensors(sample).items():
            fp8 = self.embeds == "fp8" and name == "prompt_embeds"
            for part in encode_member(value, codec=self.codec, fp8=fp8):
                stored[name + part.suffix] = part
        return stored


def write_payloads(
    output: Path,
    name: str,
    rows: "pa.Table",
    samples: Iterable[Mapping[str, torch.Tensor]],
    layout: Layout,
    *,
    prompts: Sequence[str] | None = None,
    owners: Sequence[str] | None = None,
) -> None:
    """Writes the tensors of a block of rows; each file appears complete or not at all.

    Shards become `shards/<name>.safetensors`; inline files `data_<name>.parquet`, complete with their index. Of the
    npz layout each row's `cache_path` is written. Memory does not grow with the block (inline: with 64 MiB).

    Args:
        output: the cache.
        name: of the block, as "part00000"; sorts like the rows.
        rows: light columns (`image_path`, `caption`, `bucket_h`, ...), one row a sample; the schema metadata under
            `b"sciflow_hf"` holds the encoder settings. Columns that say where and how large tensors are (and, but
            for npz, `cache_path`) are left out here and made.
        samples: the tensors of each row, unbatched: `latents` (C, h, w), `prompt_embeds` (L, D), ...; fresh ones, no
            buffers that are filled again. Shards: a sample without text tensors refers to those of its prompt's
            owner; one with them, whose prompt is stored already, gets a copy of its own.
        layout: how they are stored.
        prompts: for shards: `prompt_hash` of each row; None: every row stores its own.
        owners: for shards: name of the block that stores each row's prompt (`first_rows` tells which row is the
            first with its prompt); None: this one.

    Raises:
        SciflowError: the files cannot be written.
    """
    if layout.payload == "npz":
        for path, sample in zip(rows.column("cache_path").to_pylist(), samples, strict=True):
            tensors = {"text_ids" if k == "txt_ids" else k: v for k, v in layout.tensors(sample).items()}
            write_npz(output / path, tensors, layout.dtype)
        return
    encoded = (layout.encode(sample) for sample in samples)
    if layout.payload == "inline":
        from ..layouts.inline import write_inline

        light = _light(rows)
        write_inline(
            output / index_file(name), light, encoded, layout.codec, lambda tensors: _facts(light, layout, tensors)
        )
    else:
        prompts, owners = _prompts(rows, name, prompts, owners)
        owned = [owner == name for owner in owners]
        write_shard(output / shard_file(name), encoded, prompts, owned, layout.codec)


def write_part(
    output: Path,
    name: str,
    rows: "pa.Table",
    layout: Layout,
    *,
    prompts: Sequence[str] | None = None,
    owners: Sequence[str] | None = None,
) -> None:
    """Writes the index `data_<name>.parquet` of a block whose payloads (for shards: its owners', too) are there.

    Arguments as in `write_payloads`. Of npz `rows` must have `cache_path`, `latent_shape` and, with embeddings,
    `prompt_embeds_shape`. An inline file is its own index: nothing is done.

    Raises:
        CacheError: a shard that is missing or broken.
    """
    import pyarrow.parquet as pq

    if layout.payload == "inline":
        return
    if layout.payload == "npz":
        table = rows.replace_schema_metadata(_facts(rows, layout, None))
    else:
        prompts, owners = _prompts(rows, name, prompts, owners)
        columns, tensors = shard_columns(output, name, prompts, owners)
        table = _light(rows)
        for column, array in columns.items():
            table = table.append_column(column, array)
        table = table.replace_schema_metadata(_facts(rows, layout, tensors))
    with output_file(output / index_file(name)) as handle:
        pq.write_table(table, handle)


def index_file(name: str) -> str:
    """The index of block `name`, relative to the cache."""
    return f"data_{name}.parquet"


def prompt_hash(caption: str, settings: Mapping[str, Any]) -> str:
    """16 hex digits: equal where caption and encoders are, so that the embeddings are."""
    encoder = portable({key: settings[key] for key in ENCODER_KEYS if key in settings})
    text = json.dumps([caption, encoder], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_rows(prompts: Sequence[str]) -> list[int]:
    """For each row the first one with the same prompt: the row whose block stores its embeddings."""
    first: dict[str, int] = {}
    return [first.setdefault(prompt, row) for row, prompt in enumerate(prompts)]


def cut_blocks(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive rows of at most `limit` bytes together (one row, if it is larger), and at most `MAX_ROWS`."""
    blocks, start, total = [], 0, 0
    for row, size in enumerate(sizes):
        if row > start and (total + size > limit or row - start == MAX_ROWS):
            blocks.append(range(start, row))
            start, total = row, 0
        total += size
    return [*blocks, range(start, len(sizes))] if len(sizes) else []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; the lock ends with it, however it ends.

    Raises:
        SciflowError: if another process has it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise SciflowError(
            f"`output_dir` is {str(folder)!r}, into which another `cache build` or `cache convert` is writing. Wait "
            "for it, or name another folder."
        ) from error
    except OSError as error:
        raise SciflowError(
            f"`output_dir` is {str(folder)!r}, which cannot be written ({error}). Name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _light(rows: "pa.Table") -> "pa.Table":
    return rows.drop_columns([name for name in _PLACES if name in rows.column_names])


def _prompts(
    rows: "pa.Table", name: str, prompts: Sequence[str] | None, owners: Sequence[str] | None
) -> tuple[Sequence[str], Sequence[str]]:
    if prompts is None:
        prompts = [f"{row:016x}" for row in range(rows.num_rows)]
    return prompts, [name] * rows.num_rows if owners is None else owners


def _facts(rows: "pa.Table", layout: Layout, tensors: Mapping[str, Any] | None) -> dict[bytes, bytes]:
    """Schema metadata: the encoder settings, and how the payload is stored."""
    facts = json.loads((rows.schema.metadata or {}).get(METADATA_KEY, b"{}")) | {"embeds": layout.embeds}
    facts.pop("payload", None)
    if tensors is not None:
        facts["payload"] = {"layout": layout.payload, "tensors": tensors}
    return {METADATA_KEY: json.dumps(facts).encode()}
