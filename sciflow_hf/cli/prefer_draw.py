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
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError, counted
from .devices import inference_dtype, named, named_parts, processes
from .models import add_model, call_of, load_network, pipeline_kind, text_family
from .prompts import prompts_of
from .sample import DIT_PIPELINE, RESTORATION_PIPELINE

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OPTIONS, TABLE, LATENTS = "draw.json", "metadata.jsonl", "latents"
OWN_COLUMNS = ("file_name", "caption", "group_id", "number", "seed", "latents_file")
_USED = ("prompt", "width", "height", "seed", "source_images")
_ENCODED_AT_ONCE = 64  # prompts, whose embeddings wait in memory; the text encoder is loaded anew for the next
_RANGES = {
    "num_candidates": "[2, inf)",
    "num_inference_steps": "[1, inf)",
    "height": "[1, inf)",
    "width": "[1, inf)",
    "max_sequence_length": "[1, inf)",
    "guidance_scale": "[0, inf)",
}


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
        call: arguments of `draw`: size, and sources of an edit.
        about: columns of all its candidates.
    """

    index: int
    row: dict[str, Any]
    seeds: Sequence[int]
    call: dict[str, Any]
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
    from ..options import check_range  # transformers, which the help does not need

    for name, within in _RANGES.items():
        if (value := getattr(args, name)) is not None:
            check_range(name, value, within)
    rows = prompts_of(args.prompts_file, split=args.split)
    kind = pipeline_kind(args.model_path)
    if kind in (DIT_PIPELINE, RESTORATION_PIPELINE):
        raise SciflowError(f"`model_path` {args.model_path!r} is a {kind}, which takes no prompts.")
    family: Any = text_family(args, kind)
    if args.max_sequence_length is not None:
        if "max_sequence_length" not in {field.name for field in fields(family)}:
            raise SciflowError(f"`max_sequence_length` is no option of the family {family.name!r}. Leave it out.")
        family = replace(family, max_sequence_length=args.max_sequence_length)
    groups, output = _groups(rows, args, family), Path(args.output_dir)
    with processes(args.device) as (device, ranks):
        rank, number = ranks.get("rank", 0), ranks.get("world_size", 1)
        dtype = inference_dtype(device)
        facts = _facts(args, family, kind, rows) | {"dtype": str(dtype).removeprefix("torch.")}
        barrier = ranks.get("barrier", lambda: None)
        _check_options(output, facts, write=rank == 0)
        if rank == 0:
            remove_temporaries(output)
        barrier()
        _draw_missing([g for g in groups if g.index % number == rank], args, family, kind, device, dtype, rank == 0)
        barrier()
        if rank == 0:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for group in groups for row in group.table()]
            _write(output / TABLE, "".join(lines).encode(), durable=True)
            sys.stdout.write(
                f"{counted(len(lines), 'candidate')} of {counted(len(groups), 'prompt')} in {args.output_dir}\n"
            )


def _groups(rows: Sequence[dict[str, Any]], args: argparse.Namespace, family: Any) -> list[_Group]:
    """The candidates to draw, checked: sizes, sources, columns."""
    from ..data.source_images import read_sources
    from ..diffusion.randomness import hash64

    left_out: Counter[str] = Counter()
    times: Counter[tuple[int, str]] = Counter()
    groups = []
    for index, row in enumerate(rows):
        prompt, where = row["prompt"], f"`prompts_file` {args.prompts_file!r}, row {index}"
        seed = row.get("seed", args.seed)
        key = [seed, prompt, times[seed, prompt]]  # a prompt that is there twice is drawn anew
        times[seed, prompt] += 1
        files = row.get("source_images", [])
        if not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
            raise SciflowError(f"{where}: `source_images` is {files!r:.60}, but must be paths of images.")
        try:
            images = read_sources([",".join(files)] if files else [], family, option="source_images")
            sized = argparse.Namespace(**vars(args) | {side: getattr(args, side) or row.get(side) for side in _SIDES})
            call = call_of(sized, family, images[0] if images else [])
        except SciflowError as error:
            raise SciflowError(f"{where}: {error}") from error
        about: dict[str, Any] = {"group_id": f"{hash64(*key, call['height'], call['width']):016x}"}
        if files:
            about["source_image"] = [os.path.abspath(file) for file in files]
        for name, value in row.items():
            if name not in _USED:
                if name in OWN_COLUMNS or not _is_plain(value):
                    left_out[name] += 1
                else:
                    about[name] = value
        seeds = [hash64(*key, "candidate", number) & 0xFFFFFFFF for number in range(args.num_candidates)]
        groups.append(_Group(index, row, seeds, call, about))
    for name in left_out:
        why = "candidates have a column of that name" if name in OWN_COLUMNS else "it holds neither texts nor numbers"
        logger.warning("The column `%s` of %s is left out: %s.", name, args.prompts_file, why)
    return groups


_SIDES = ("height", "width")


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _facts(args: argparse.Namespace, family: Any, kind: str | None, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that decides the candidates, for the folder that holds them."""
    import hashlib

    prompts = hashlib.sha256(json.dumps(rows, default=repr, sort_keys=True).encode()).hexdigest()[:16]
    model = {"model_path": _identity(args.model_path, family.component)}
    if kind is None:
        model["base_model"] = _identity(family.source, family.component)
    options = named(args, "num_candidates seed guidance_scale num_inference_steps height width")
    options |= {"max_sequence_length": vars(family).get("max_sequence_length")}
    return {"prompts_file": prompts, "family": family.name} | model | named_parts(args) | options


def _identity(path: str, component: str) -> str:
    """A model's name; of a folder a hash of its weights, which may be trained further under the same name."""
    from ..families.loading import Place, model_source

    folder = Path(model_source(path))
    if not folder.is_dir():
        return path
    files = sorted([*folder.glob("*.safetensors"), *folder.glob(f"{component}/*.safetensors")])
    return " ".join(Place("", str(file)).identity for file in files)


def _check_options(folder: Path, facts: dict[str, Any], *, write: bool) -> None:
    """Notes in `folder` what its candidates are drawn with; SciflowError where it holds others, or other files."""
    file = folder / OPTIONS
    if file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SciflowError(f"{file} is not JSON ({error}). Choose another `--output_dir`.") from error
        if wrong := [name for name in there.keys() | facts.keys() if there.get(name) != facts.get(name)]:
            name = min(wrong, key=[*facts, *there].index)
            was, now = (f"{values.get(name)!r:.80}" for values in (there, facts))
            raise SciflowError(
                f"`output_dir` {str(folder)!r} holds candidates of another run: its `{name}` was {was}, not {now}. "
                "Choose another folder, or give the options of that run."
            )
    elif folder.is_dir() and (found := [path.name for path in folder.iterdir() if not path.name.startswith(".")]):
        raise SciflowError(
            f"`output_dir` {str(folder)!r} holds other files, such as {min(found)!r}. Choose another folder."
        )
    elif write:
        _write(file, json.dumps(facts, indent=1).encode(), durable=True)


def _draw_missing(
    groups: Sequence[_Group],
    args: argparse.Namespace,
    family: Any,
    kind: str | None,
    device: Any,
    dtype: "torch.dtype",
    shows: bool,
) -> None:
    """Draws those groups that are not complete in the folder."""
    import torch
    from tqdm import tqdm

    output = Path(args.output_dir)
    there = {path.name for folder in (output, output / LATENTS) if folder.is_dir() for path in folder.iterdir()}
    missing = [g for g in groups if not there.issuperset([*g.images, Path(g.latents).name])]
    if not missing:
        return
    pipeline = family.load_pipeline(load_network(family, args, kind, dtype).to(device).eval(), device=device)
    pipeline.vae.enable_slicing()  # decodes one image at a time
    with tqdm(total=len(groups), initial=len(groups) - len(missing), desc="prompts", disable=not shows) as bar:
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            chunk = missing[start : start + _ENCODED_AT_ONCE]
            for group, encoded in zip(chunk, _encoded(chunk, family, device, dtype), strict=True):
                latents, images = family.draw(
                    pipeline,
                    encoded,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    generators=[torch.Generator().manual_seed(seed) for seed in group.seeds],
                    **group.call,
                )
                if not latents.isfinite().all():
                    raise SciflowError(
                        f"the candidates of {group.row['prompt']!r:.80} hold NaN or Inf: the network, or "
                        f"`num_inference_steps` {args.num_inference_steps}, cannot be drawn with in {dtype}."
                    )
                _save(output, group, latents, images)
                bar.update()


def _encoded(groups: Sequence[_Group], family: Any, device: Any, dtype: "torch.dtype") -> list[dict[str, Any]]:
    """The text inputs of each group, encoded one by one: batches would round them otherwise."""
    encoders = family.load_text_encoder(device=device, dtype=dtype)
    found = []
    for group in groups:
        images = group.call.get("source_images")
        read = {"source_images": [images]} if images and family.text_reads_sources else {}
        prompts = [group.row["prompt"]]
        found += family.encode_validation_prompts(prompts, device=device, dtype=dtype, encoders=encoders, **read)
    return found


def _save(output: Path, group: _Group, latents: "torch.Tensor", images: Sequence[Any]) -> None:
    """Images first, then their latents: a group with latents is complete."""
    from safetensors.torch import save

    from ..data.writing import sync_files
    from ..report.contact_sheet import png_bytes

    for row, image in zip(group.table(), images, strict=True):
        about = {name: str(row[name]) for name in ("caption", "group_id", "number", "seed")}
        _write(output / row["file_name"], png_bytes(image, about), durable=False)
    sync_files(output / name for name in group.images)
    _write(output / group.latents, save({"latents": latents.cpu().contiguous()}), durable=True)


def _write(file: Path, data: bytes, *, durable: bool) -> None:
    from ..data.writing import output_file

    with output_file(file, durable=durable) as handle:
        handle.write(data)
