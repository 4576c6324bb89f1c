"""Caches in shards and inline files: their rows as they were before they were stored."""

import json
from pathlib import Path

import pyarrow as pa
import torch

from sciflow_hf.data.build.blocks import prompt_hash, writer_of
from sciflow_hf.data.layouts.base import Block, Layout

ROWS = 6
NAMES = ("latents", "prompt_embeds", "txt_ids", "prompt_embeds_mask", "loss_mask", "time_ids")
SETTINGS = {"family": "x", "max_sequence_length": 12}


def write_block(folder, name, rows, tensors, layout, **prompts):
    """The payloads of some rows, then their index."""
    writer, block = writer_of(folder, layout), Block(name, rows, **prompts)
    writer.write_payload(block, tensors)
    writer.write_index(block)


def samples(rows: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Random bits (so every exponent, with infinities, but no NaN), ragged text, odd sizes."""
    draw = torch.Generator().manual_seed(3)

    def bits(*shape: int) -> torch.Tensor:
        values = torch.randint(-(2**15), 2**15, shape, generator=draw).to(torch.int16).view(torch.bfloat16)
        return torch.where(values.isnan(), torch.tensor(float("-inf")).bfloat16(), values)

    made = []
    for row in range(rows):
        length = 7 + row % 3
        made.append(
            {
                "latents": bits(4, 6, 9),
                "prompt_embeds": bits(length, 17),
                "text_ids": torch.arange(4 * length).reshape(length, 4),
                "prompt_embeds_mask": torch.arange(length) < 5,
                "loss_mask": torch.randint(0, 256, (6, 9), dtype=torch.uint8, generator=draw),
                "time_ids": torch.tensor([1.5, float(row)]).bfloat16(),
            }
        )
    return made


def light(rows: int = ROWS) -> pa.Table:
    table = pa.table(
        {
            "image_path": [f"{row}.png" for row in range(rows)],
            "caption": [f"caption {row}" for row in range(rows)],
            "bucket_h": [48] * rows,
            "bucket_w": [72 + 8 * (row % 3) for row in range(rows)],
        }
    )
    return table.replace_schema_metadata({b"sciflow_hf": json.dumps(SETTINGS).encode()})


def make(folder: Path, payload: str, embeds: str = "bf16", codec: str = "none") -> Path:
    hashes = [prompt_hash(f"caption {row}", SETTINGS) for row in range(ROWS)]
    write_block(folder, "part00000", light(), samples(), Layout(payload, embeds, codec), prompts=hashes)
    return folder


def data_file(folder: Path, payload: str) -> Path:
    return folder / ("shards/part00000.safetensors" if payload == "shards" else "data_part00000.parquet")
