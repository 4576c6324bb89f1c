"""`sciflow-hf prefer draw`: several candidates for each prompt of a file, and their latents.

A candidate depends only on `--seed`, its prompt and its number, with the other options: on no other prompt, and not on
the number of processes. Run the same command again after a kill. The folder is an `--input_dir` of `cache build`.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError, counted
from ..training.prompts import prompts_of
from .devices import inference_dtype, processes
from .drawing import (
    ENCODED_AT_ONCE,
    RANGES,
    call_of_row,
    check_folder,
    check_ranges,
    encoded_each,
    facts_of_model,
    is_plain,
    prompt_family,
    write_file,
)
from .models import add_model, load_network

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OPTIONS, TABLE, LATENTS = "draw.json", "metadata.jsonl", "latents"
OWN_COLUMNS = ("file_name", "caption", "group_id", "number", "seed", "latents_file")
_USED = ("prompt", "width", "height", "seed", "source_images")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer draw`, and its function as `run`."""
    add = parser.add_argument
    parser.set_defaults(run=_draw)
    add("--model_path", required=True, help="output of a recipe (a pipeline, a LoRA, a network), or a pipeline's name")
    add(
        "--prompts_file",
        required=True,
        help=".txt with a prompt a line; .jsonl, .csv, .parquet or a data set with a column prompt (else caption, "
        "text), and perhaps width, height, seed, source_images; further columns are kept",
    )
    add("--split", help="split of a data set of prompts, where it has several")
    add("--output_dir", required=True, help="folder for the images, their latents and metadata.jsonl")
    add("--num_candidates", type=int, default=8, help="images of each prompt, drawn in one batch (default 8)")
    add("--seed", type=int, default=0, help="with the prompt and the number it decides an image (default 0)")
    add("--guidance_scale", type=float, default=3.5, help="1 is none (default 3.5)")
    add("--num_inference_steps", type=int, default=50, help="sampling steps (default 50)")
    add("--height", type=int, help="pixels (default: the prompt's; the commonest of training; of an edit its source's)")
    add("--width", type=int, help="pixels (default: the prompt's; the commonest of training; of an edit its source's)")
    add("--max_sequence_length", type=int, help="text tokens per prompt (default: the family's)")
    add_model(add)


@dataclass(frozen=True)
class _Group:
    """The candidates of one prompt.

    Attributes:
        index: of its row in the prompts file.
        row: of `read_prompts`.
        seeds: of each candidate, for its generator.
        about: columns of all its candidates.
    """

    index: int
    row: dict[str, Any]
    seeds: Sequence[int]
    about: dict[str, Any]

    @property
    def images(self) -> list[str]:
        return [f"{self.index:05d}_{number:02d}.png" for number in range(len(self.seeds))]

    @property
    def latents(self) -> str:
        return f"{LATENTS}/{self.index:05d}.safetensors"

    def table(self) -> Iterator[dict[str, Any]]:
        """A row of metadata for each candidate."""
        for number, (name, seed) in enumerate(zip(self.images, self.seeds, strict=True)):
            own = {"file_name": name, "caption": self.row["prompt"], "group_id": self.about["group_id"]}
            yield own | {"number": number, "seed": seed, "latents_file": self.latents} | self.about


def _draw(args: argparse.Namespace) -> None:
    from ..data.build.blocks import remove_temporaries

    check_ranges(args, RANGES | {"num_candidates": "[2, inf)"})
    rows = prompts_of(args.prompts_file, split=args.split)
    kind, family = prompt_family(args)
    groups, output = _groups(rows, args, family), Path(args.output_dir)
    with processes(args.device) as (device, ranks):
        rank, number = ranks.get("rank", 0), ranks.get("world_size", 1)
        dtype = inference_dtype(device)
        facts = _facts(args, family, kind, rows) | {"dtype": str(dtype).removeprefix("torch.")}
        barrier = ranks.get("barrier", lambda: None)
        check_folder(output, OPTIONS, facts, holds="candidates of another run", write=rank == 0)
        if rank == 0:
            remove_temporaries(output)
        missing = _missing(groups, output)
        barrier()
        own, absent = ([g for g in some if g.index % number == rank] for some in (groups, missing))
        _draw_missing(own, absent, args, family, kind, device, dtype, rank == 0)
        barrier()
        if rank == 0:
            rows = _with_scores(groups, missing, output / TABLE)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_file(output / TABLE, "".join(lines).encode(), durable=True)
            sys.stdout.write(
                f"{counted(len(lines), 'candidate')} of {counted(len(groups), 'prompt')} in {args.output_dir}\n"
            )


def _groups(rows: Sequence[dict[str, Any]], args: argparse.Namespace, family: Any) -> list[_Group]:
    """The candidates to draw, checked: sizes, sources, columns."""
    from ..diffusion.randomness import hash64

    left_out: Counter[str] = Counter()
    times: Counter[tuple[int, str]] = Counter()
    groups = []
    for index, row in enumerate(rows):
        prompt = row["prompt"]
        seed = row.get("seed", args.seed)
        key = [seed, prompt, times[seed, prompt]]  # a prompt that is there twice is drawn anew
        times[seed, prompt] += 1
        call = _call(index, row, args, family)
        about: dict[str, Any] = {"group_id": f"{hash64(*key, call['height'], call['width']):016x}"}
        if files := row.get("source_images"):
            about["source_image"] = [os.path.abspath(file) for file in files]
        for name, value in row.items():
            if name not in _USED:
                if name in OWN_COLUMNS or not is_plain(value):
                    left_out[name] += 1
                else:
                    about[name] = value
        seeds = [hash64(*key, "candidate", number) & 0xFFFFFFFF for number in range(args.num_candidates)]
        groups.append(_Group(index, row, seeds, about))
    for name in left_out:
        why = "candidates have a column of that name" if name in OWN_COLUMNS else "it holds neither texts nor numbers"
        logger.warning("The column `%s` of %s is left out: %s.", name, args.prompts_file, why)
    return groups


def _call(index: int, row: dict[str, Any], args: argparse.Namespace, family: Any) -> dict[str, Any]:
    """Arguments of `draw` for a prompt; the sources of an edit are read for it, and not kept."""
    return call_of_row(row, args, family, f"`prompts_file` {args.prompts_file!r}, row {index}")


def _facts(args: argparse.Namespace, family: Any, kind: str | None, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that decides the candidates, for the folder that holds them."""
    import hashlib

    prompts = hashlib.sha256(json.dumps(rows, default=repr, sort_keys=True).encode()).hexdigest()[:16]
    return {"prompts_file": prompts} | facts_of_model(args, family, kind, "num_candidates")


def _missing(groups: Sequence[_Group], output: Path) -> list[_Group]:
    """Those groups that are not complete in the folder."""
    there = {path.name for folder in (output, output / LATENTS) if folder.is_dir() for path in folder.iterdir()}
    return [g for g in groups if not there.issuperset([*g.images, Path(g.latents).name])]


def _with_scores(groups: Sequence[_Group], drawn: Sequence[_Group], table: Path) -> list[dict[str, Any]]:
    """The rows of metadata, with the columns that were added to those of images that are as they were."""
    before: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    if table.is_file():
        with table.open(encoding="utf-8") as lines:
            before = {row["file_name"]: row for row in map(json.loads, lines)}
    again, lost = {group.index for group in drawn}, 0
    for group in groups:
        for row in group.table():
            added = {name: value for name, value in before.get(row["file_name"], {}).items() if name not in row}
            if group.index in again:
                lost += any(value is not None for value in added.values())
                added = dict.fromkeys(added)
            rows.append(row | added)
    if lost:
        logger.warning(
            "%s of images that were drawn again: their scores are taken out; score them by the command of before.",
            counted(lost, "row"),
        )
    return rows


def _draw_missing(
    groups: Sequence[_Group],
    missing: Sequence[_Group],
    args: argparse.Namespace,
    family: Any,
    kind: str | None,
    device: Any,
    dtype: "torch.dtype",
    shows: bool,
) -> None:
    """Draws those of the groups that are missing."""
    import torch
    from tqdm import tqdm

    output = Path(args.output_dir)
    if not missing:
        return
    pipeline = family.load_pipeline(load_network(family, args, kind, dtype).to(device).eval(), device=device)
    pipeline.vae.enable_slicing()  # decodes one image at a time
    with tqdm(total=len(groups), initial=len(groups) - len(missing), desc="prompts", disable=not shows) as bar:
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            chunk = missing[start : start + ENCODED_AT_ONCE]
            pairs = [(group.row["prompt"], _call(group.index, group.row, args, family)) for group in chunk]
            texts = encoded_each(pairs, family, device, dtype)
            for group, (_, call), encoded in zip(chunk, pairs, texts, strict=True):
                latents, images = family.draw(
                    pipeline,
                    encoded,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    generators=[torch.Generator().manual_seed(seed) for seed in group.seeds],
                    **call,
                )
                if not latents.isfinite().all():
                    raise SciflowError(
                        f"the candidates of {group.row['prompt']!r:.80} hold NaN or Inf: the network, or "
                        f"`num_inference_steps` {args.num_inference_steps}, cannot be drawn with in {dtype}."
                    )
                _save(output, group, latents, images)
                bar.update()


def _save(output: Path, group: _Group, latents: "torch.Tensor", images: Sequence[Any]) -> None:
    """Images first, then their latents: a group with latents is complete."""
    from safetensors.torch import save

    from ..data.writing import sync_files
    from ..report.contact_sheet import png_bytes

    for row, image in zip(group.table(), images, strict=True):
        about = {name: str(row[name]) for name in ("caption", "group_id", "number", "seed")}
        write_file(output / row["file_name"], png_bytes(image, about), durable=False)
    sync_files(output / name for name in group.images)
    write_file(output / group.latents, save({"latents": latents.cpu().contiguous()}), durable=True)
