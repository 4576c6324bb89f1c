"""What a conversion does with a cache: which rows go into which block, and which block stores which prompt."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import CacheError, SciflowError
from ..cache import LatentCache
from ..index import CAPTION_COLUMNS
from ..layouts.members import Member, target_dtype
from ..layouts.stored import TEXT_TENSORS, payload_columns
from ..parquet import METADATA_KEY
from .blocks import Layout, cut_blocks, first_rows, prompt_hash

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


class ConvertPlan:
    """Which rows go into which block, and which block stores which prompt: from index and settings alone."""

    def __init__(self, source: LatentCache, layout: Layout, shard_bytes: int) -> None:
        self.source, self.layout = source, layout
        self.latent_shapes = source._index.latent_shapes[source._rows].astype(np.int64)  # (N, 3)
        self.text_shapes = source._index.text_shapes[source._rows].astype(np.int64)  # (N, 2)
        names = source.members(0)
        if layout.embeds != "none" and "prompt_embeds" not in names:
            raise SciflowError(
                f"`embeds` is {layout.embeds!r}, but the source stores no text embeddings (it was made with `embeds` "
                "none). Encode them by `sciflow-hf cache build`, or convert with `--embeds none`."
            )
        if layout.embeds == "fp8" and source.metadata.get("embeds") == "fp8":
            logger.warning("The source stores fp8 already: its rounding error is not in the error that is reported.")
        self.names = [name for name in names if layout.embeds != "none" or name not in TEXT_TENSORS]
        known = any(name in source.index.column_names for name in CAPTION_COLUMNS)
        # For embeds "none" a cache without captions raises an error that says so.
        captions = source.captions if known or layout.embeds == "none" else source.row_ids
        if layout.embeds == "none" and not any(captions):
            raise CacheError("`embeds` is 'none', but the captions of the source are empty: nothing could be encoded.")
        self.hashes = [prompt_hash(caption, source.metadata) for caption in captions]
        self.prompts = len(set(self.hashes))
        once = layout.payload == "shards" and layout.embeds != "none"
        self.first = first_rows(self.hashes) if once else list(range(len(source)))
        self.sizes = self._sizes(names)
        self.blocks = cut_blocks(self.sizes, shard_bytes)
        self.block_names = [f"part{number:05d}" for number in range(len(self.blocks))]
        starts = np.array([block.start for block in self.blocks])
        owners = np.searchsorted(starts, np.array(self.first), side="right") - 1
        self.owners = [self.block_names[number] for number in owners]
        self.rows = self._light_rows()
        cut = [[block.start, block.stop] for block in self.blocks]
        facts = json.loads(self.rows.schema.metadata[METADATA_KEY])
        text = json.dumps([cut, self.hashes, facts, self.rows.column_names], sort_keys=True)
        self.settings = {
            "payload": layout.payload, "embeds": layout.embeds, "codec": layout.codec, "shard_bytes": shard_bytes,
            "source": source.fingerprint, "plan": hashlib.sha256(text.encode()).hexdigest()[:16],
        }  # fmt: skip

    def _sizes(self, members: Mapping[str, Member]) -> list[int]:
        """Stored bytes of each row before compression; of what has no shape in the index, as in the first row."""
        text = self.text_shapes
        sizes = 2 * sum(name in ("latents", "latents_std") for name in members) * self.latent_shapes.prod(axis=1)
        prompts = text[:, 0] * (text[:, 1] + 4 if self.layout.embeds == "fp8" else 2 * text[:, 1])
        for name, member in members.items():
            if name not in ("latents", "latents_std", "prompt_embeds"):
                nbytes = member.numel * _itemsize(member)
                (prompts if name in TEXT_TENSORS else sizes)[:] += nbytes
        if self.layout.embeds != "none":
            sizes += np.where(np.array(self.first) == np.arange(len(sizes)), prompts, 0)
        return sizes.tolist()

    def _light_rows(self) -> "pa.Table":
        """The index without what says where the source's payloads are."""
        import pyarrow as pa

        table: pa.Table = self.source.index.with_format("arrow")[:]
        gone = {column for payload in self.source._index.payloads for column in payload_columns(payload)}
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
            table = table.append_column("cache_path", pa.array(self._npz_files(), pa.string()))
        return table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})

    def _npz_files(self) -> list[str]:
        files = []
        for row_id, group in zip(self.source.row_ids, self.source.groups, strict=True):
            digest = hashlib.sha256(row_id.encode()).hexdigest()[:16]
            paper = "" if group == row_id else re.sub(r"[^\w.-]+", "_", group).strip("._")[:80]
            files.append(f"{paper or digest[:2]}/{digest}_latents.npz")
        return files


def _itemsize(member: Member) -> int:
    """Bytes of a value once it is stored anew."""
    return target_dtype(member, torch.bfloat16).itemsize
