"""`sciflow-hf sample`: images of classes or prompts by a trained network, edits, or measured images restored by one.

Classes are drawn by a DiT; prompts by a pipeline, a LoRA or a network of a family, which may edit source images; a
microscopy UNet restores images.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError, counted
from ..files import atomic_file
from .devices import find_device, inference_dtype, named, named_parts
from .models import add_model, call_of, load_network, pipeline_kind, text_family

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Draw = Callable[[int, "list[torch.Generator]"], "list[Image]"]
"""(number of the first image, a generator for each) -> the images."""

DIT_PIPELINE = "DiTImagePipeline"
RESTORATION_PIPELINE = "MicroscopyRestorationPipeline"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf sample`, and its function as `run`."""
    add = parser.add_argument
    parser.set_defaults(run=_sample)
    add("--model_path", required=True, help="output of a recipe (a pipeline, a LoRA, a network), or a pipeline's name")
    add("--output_dir", required=True, help="folder for the images and their metadata.jsonl")
    add("--num_images", type=int, default=1, help="total number, cycling through the classes or prompts (default 1)")
    add("--seed", type=int, default=0, help="image i depends only on the seed and i (default 0)")
    add("--class_labels", nargs="+", default=[], help="numbers or names of classes (default: all, in turn)")
    add("--prompts", nargs="+", default=[], help="for networks that take text")
    add(
        "--source_images",
        nargs="+",
        default=[],
        help="what to edit: one entry for each prompt, or one for all; "
        'several images of one prompt joined by ",", none for a prompt without',
    )
    add("--guidance_scale", type=float, help="1 is none (default: 1 for classes, 3.5 for prompts)")
    add("--num_inference_steps", type=int, default=50, help="sampling steps (default 50)")
    add("--sampler", help="for classes: euler or heun of flows, ddpm, ddim or ancestral of ddpm")
    add("--height", type=int, help="pixels (default: the commonest of training; of an edit, that of its source)")
    add("--width", type=int, help="pixels (default: the commonest of training; of an edit, that of its source)")
    add("--batch_size", type=int, default=16, help="images of classes drawn at once (default 16)")
    add_model(add)
    add = parser.add_argument_group("microscopy, with --input_dir").add_argument
    add("--input_dir", help="folder of measured images, each restored in its own format and type")
    add("--num_samples", type=int, default=8, help="samples per image; their mean is written (default 8)")
    add("--save_std", action="store_true", help="also write their spread, <name>_std.tif in float32")
    add("--tile_size", type=int, help="pixels (default: that of the training)")
    add("--tile_overlap", type=int, help="pixels by which tiles overlap (default: a quarter)")
    add("--cascade", type=int, nargs="+", default=[1], help="block sizes from coarse to fine, such as 4 2 1")
    add("--data_consistency", type=float, default=0.0, help="1 pulls samples to the measurement, by the optics")
    add("--timestep_spacing", default="quadratic", help="quadratic (default: more steps at little noise) or trailing")
    add("--self_ensemble", action="store_true", help="draw samples in the eight orientations of the image in turn")


_COUNTS = ("num_images", "num_inference_steps", "batch_size", "num_samples", "height", "width", "tile_size")
_RANGES = dict.fromkeys(_COUNTS, "[1, inf)") | dict.fromkeys(("guidance_scale", "data_consistency"), "[0, inf)")


def _sample(args: argparse.Namespace) -> None:
    from ..options import check_range  # transformers, which the help does not need

    for name, within in _RANGES.items():
        if (value := getattr(args, name)) is not None:
            check_range(name, value, within)
    args.device = find_device(args.device)
    kind = pipeline_kind(args.model_path)
    if kind in (DIT_PIPELINE, RESTORATION_PIPELINE) and (parts := named_parts(args)):
        raise SciflowError(f"`{min(parts)}` is for pipelines that take prompts; {args.model_path!r} takes none.")
    if kind == RESTORATION_PIPELINE:
        return _restore(args)
    if args.input_dir:
        raise SciflowError(f"`input_dir` is for networks that restore images; {args.model_path!r} is none.")
    draw, subjects = _of_classes(args) if kind == DIT_PIPELINE else _of_prompts(args, kind)
    batch_size = args.batch_size if kind == DIT_PIPELINE else 1
    rows = list(_draw_all(draw, args, subjects, batch_size))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    with atomic_file(Path(args.output_dir) / "metadata.jsonl") as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"{counted(len(rows), 'image')} in {args.output_dir}\n")


def _draw_all(draw: Draw, args: argparse.Namespace, subjects: list[dict[str, Any]], batch_size: int) -> Any:
    """Writes the images; a row of metadata for each."""
    import torch
    from tqdm import tqdm

    from ..diffusion.randomness import hash64
    from ..report.contact_sheet import save_image

    output = Path(args.output_dir)
    for start in tqdm(range(0, args.num_images, batch_size), desc="batches", leave=False):
        numbers = range(start, min(start + batch_size, args.num_images))
        seeds = [hash64(args.seed, "sample", number) & 0xFFFFFFFF for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            images = draw(start, generators)
        except SciflowError:
            raise
        except ValueError as error:  # of a pipeline, which cannot know our error
            raise SciflowError(str(error)) from error
        for number, image in zip(numbers, images, strict=True):
            about = subjects[number % len(subjects)] | {"seed": args.seed, "number": number}
            name = f"{number:05d}.png"
            save_image(image, output / name, {key: str(value) for key, value in about.items()})
            yield {"file_name": name} | about


def _of_classes(args: argparse.Namespace) -> tuple[Draw, list[dict[str, Any]]]:
    """A DiT of ours, by the code of this package, not that in the folder."""
    import torch

    from ..families.dit import DiT
    from ..pipelines.dit import class_id

    for name in ("prompts", "source_images"):
        if getattr(args, name):
            raise SciflowError(f"`{name}`: this network takes classes; name them by `--class_labels`.")
    family = DiT(pretrained_model_name_or_path=args.model_path)
    pipeline = family.load_pipeline(family.load_model(dtype=torch.float32).eval(), device=args.device)
    config = pipeline.transformer.config
    names = list((config.id2label or {}).values())
    try:
        labels = [class_id(label, config.num_classes, names) for label in args.class_labels]
    except ValueError as error:
        raise SciflowError(str(error)) from error
    labels = labels or list(range(config.num_classes))
    subjects = [{"label": label, "class": names[label] if names else str(label)} for label in labels]
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale

    def draw(start: int, generators: "list[torch.Generator]") -> "list[Image]":
        chosen = [labels[(start + i) % len(labels)] for i in range(len(generators))] if labels else None
        given = named(args, "height width num_inference_steps sampler") | {"guidance_scale": scale}
        images: list[Image] = pipeline(chosen, num_images=len(generators), generator=generators, **given).images
        return images

    return draw, subjects or [{}]


def _of_prompts(args: argparse.Namespace, kind: str | None) -> tuple[Draw, list[dict[str, Any]]]:
    """A text-to-image family: its pipeline, with the trained network, or with the trained adapter on its own."""
    from ..data.source_images import read_sources

    for name in ("class_labels", "sampler"):
        if getattr(args, name):
            raise SciflowError(f"`{name}` is for networks of classes; {args.model_path!r} takes `--prompts`.")
    if not args.prompts:
        raise SciflowError(f"`prompts` is missing: {args.model_path!r} draws what a text says.")
    family = text_family(args, kind)
    entries, number = list(args.source_images), len(args.prompts)
    if len(entries) not in (0, 1, number):
        raise SciflowError(
            f"`source_images`: {len(entries)} for {number} `prompts`. Give one for each, or one for all."
        )
    given = read_sources(entries, family, option="source_images") or [[]]
    calls = [call_of(args, family, images) for images in (given * number if len(given) == 1 else given)]
    sources = [call.get("source_images", []) for call in calls]
    read = {"source_images": sources} if any(sources) and family.text_reads_sources else {}
    dtype = inference_dtype(args.device)
    network = load_network(family, args, kind, dtype).to(args.device).eval()
    encoded = family.encode_validation_prompts(args.prompts, device=args.device, dtype=dtype, **read)
    pipeline = family.load_pipeline(network, device=args.device)

    def draw(start: int, generators: "list[torch.Generator]") -> "list[Image]":
        return family.generate(
            pipeline,
            encoded[start % len(encoded)],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=3.5 if args.guidance_scale is None else args.guidance_scale,
            generator=generators[0],
            **calls[start % len(encoded)],
        )

    names = [[image.info["source_image"] for image in images] for images in sources]
    edited = [{"source_images": ", ".join(files)} if files else {} for files in names]
    return draw, [{"prompt": prompt} | more for prompt, more in zip(args.prompts, edited, strict=True)]


def _restore(args: argparse.Namespace) -> None:
    """Restores the images of `--input_dir` into `--output_dir`."""
    import torch

    from ..families.microscopy_unet import MicroscopyUNet

    if not args.input_dir:
        raise SciflowError(f"`input_dir` is missing: {args.model_path!r} restores a folder of measured images.")
    for name in ("class_labels", "prompts", "source_images", "guidance_scale", "height", "width"):
        if getattr(args, name):
            raise SciflowError(f"`{name}` does not go with a network that restores images: leave it out.")
    family = MicroscopyUNet(pretrained_model_name_or_path=args.model_path)
    pipeline = family.load_pipeline(family.load_model(dtype=torch.float32).eval(), device=args.device)
    pipeline.set_progress_bar_config(disable=False, desc="images")
    options = "num_samples save_std num_inference_steps seed batch_size tile_size tile_overlap cascade"
    options += " data_consistency self_ensemble timestep_spacing"
    given = named(args, options) | {"sampler": args.sampler or "ddpm"}
    written = pipeline.restore_folder(args.input_dir, args.output_dir, **given)
    sys.stdout.write(f"{counted(len(written), 'image')} in {args.output_dir}\n")
