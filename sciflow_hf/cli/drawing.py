"""Shared by commands that draw many images and continue after a kill: models, sizes, texts, folders."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError
from .devices import named, named_parts
from .models import call_of, pipeline_kind, text_family
from .sample import DIT_PIPELINE, RESTORATION_PIPELINE

if TYPE_CHECKING:
    import torch

ENCODED_AT_ONCE = 64  # prompts, whose embeddings wait in memory; the text encoder is loaded anew for the next
RANGES = dict.fromkeys(("num_inference_steps", "height", "width", "max_sequence_length"), "[1, inf)") | {
    "guidance_scale": "[0, inf)"
}


def check_ranges(args: argparse.Namespace, ranges: Mapping[str, str]) -> None:
    """SciflowError where an option that is given is out of its range."""
    from ..options import check_range  # transformers, which the help does not need

    for name, within in ranges.items():
        if (value := getattr(args, name)) is not None:
            check_range(name, value, within)


def prompt_family(args: argparse.Namespace) -> tuple[str | None, Any]:
    """The kind of `--model_path`, see `pipeline_kind`, and its family, with `--max_sequence_length`."""
    kind = pipeline_kind(args.model_path)
    if kind in (DIT_PIPELINE, RESTORATION_PIPELINE):
        raise SciflowError(f"`model_path` {args.model_path!r} is a {kind}, which takes no prompts.")
    family: Any = text_family(args, kind)
    if args.max_sequence_length is not None:
        if "max_sequence_length" not in {field.name for field in fields(family)}:
            raise SciflowError(f"`max_sequence_length` is no option of the family {family.name!r}. Leave it out.")
        family = replace(family, max_sequence_length=args.max_sequence_length)
    return kind, family


def call_of_row(row: Mapping[str, Any], args: argparse.Namespace, family: Any, where: str) -> dict[str, Any]:
    """Size and sources of a row of `read_prompts` as arguments of `draw`; options go before the row's columns."""
    from ..data.source_images import read_sources

    files = row.get("source_images", row.get("source_image", []))
    if not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
        raise SciflowError(f"{where}: `source_images` is {files!r:.60}, but must be paths of images.")
    sides = {side: getattr(args, side) or row.get(side) for side in ("height", "width")}
    try:
        images = read_sources([",".join(files)] if files else [], family, option="source_images")
        return call_of(argparse.Namespace(**vars(args) | sides), family, images[0] if images else [])
    except SciflowError as error:
        raise SciflowError(f"{where}: {error}") from error


def encoded_each(
    prompts: Sequence[tuple[str, Mapping[str, Any]]], family: Any, device: Any, dtype: "torch.dtype"
) -> list[dict[str, Any]]:
    """The text inputs of prompts with their calls, encoded one by one: batches would round them otherwise."""
    encoders = family.load_text_encoder(device=device, dtype=dtype)
    found = []
    for prompt, call in prompts:
        images = call.get("source_images")
        read = {"source_images": [images]} if images and family.text_reads_sources else {}
        found += family.encode_validation_prompts([prompt], device=device, dtype=dtype, encoders=encoders, **read)
    return found


def identity_of(path: str, component: str) -> str:
    """A model's name; of a folder a hash of its weights, which may be trained further under the same name."""
    from ..families.loading import Place, model_source

    folder = Path(model_source(path))
    if not folder.is_dir():
        return path
    files = sorted([*folder.glob("*.safetensors"), *folder.glob(f"{component}/*.safetensors")])
    return " ".join(Place("", str(file)).identity for file in files)


def facts_of_model(args: argparse.Namespace, family: Any, kind: str | None, number: str) -> dict[str, Any]:
    """Model and options that decide images, `number` being the option that says how many a prompt has."""
    facts = {"model_path": identity_of(args.model_path, family.component)}
    if kind is None:
        facts["base_model"] = identity_of(family.source, family.component)
    options = named(args, f"seed {number} guidance_scale num_inference_steps height width")
    length = {"max_sequence_length": vars(family).get("max_sequence_length")}
    return facts | {"family": family.name} | named_parts(args) | options | length


def check_folder(folder: Path, name: str, facts: Mapping[str, Any], *, holds: str, write: bool) -> None:
    """Notes in a file of `folder` what its images are drawn with; SciflowError where it holds others, or other files.

    Args:
        folder: of the images.
        name: of the file.
        facts: all that decides the images.
        holds: what the folder of other facts holds, for the message.
        write: whether this process makes the file.
    """
    file = folder / name
    if file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SciflowError(f"{file} is not JSON ({error}). Choose another `--output_dir`.") from error
        if wrong := [name for name in there.keys() | facts.keys() if there.get(name) != facts.get(name)]:
            name = min(wrong, key=[*facts, *there].index)
            was, now = (f"{values.get(name)!r:.80}" for values in (there, facts))
            raise SciflowError(
                f"`output_dir` {str(folder)!r} holds {holds}: its `{name}` was {was}, not {now}. "
                "Choose another folder, or give the options of that run."
            )
    elif folder.is_dir() and (found := [path.name for path in folder.iterdir() if not path.name.startswith(".")]):
        raise SciflowError(
            f"`output_dir` {str(folder)!r} holds other files, such as {min(found)!r}. Choose another folder."
        )
    elif write:
        write_file(file, json.dumps(facts, indent=1).encode(), durable=True)


def write_file(file: Path, data: bytes, *, durable: bool) -> None:
    """Writes a file, complete or not at all, see `output_file`."""
    from ..data.writing import output_file

    with output_file(file, durable=durable) as handle:
        handle.write(data)


def is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
