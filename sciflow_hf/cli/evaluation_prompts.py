"""Prompts of `sciflow-hf evaluate`: what decides their images, and drawing those that are missing."""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError, first_line
from ..training.prompts import prompts_of
from .devices import named
from .drawing import ENCODED_AT_ONCE, call_of_row, encoded_each, facts_of_model, write_file
from .models import load_network, pipeline_kind

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BASE = "base"
"""Name of the model that adapters are compared with."""
REFERENCES = ("reference", "target_image", "image", "file_name")
"""Columns that may hold the picture that a row should look like, the first of them that there is; the last is that of
an image folder's metadata."""
OWN = ("row", "model", "prompt", "image", "reference", "sources", "seed", "width", "height", "incomplete")
"""Columns of scores.parquet that describe an image."""
_USED = ("prompt", "width", "height", "seed", "source_images", "num_inference_steps", "guidance_scale", *REFERENCES)
_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 3.5}


@dataclass(frozen=True)
class Prompt:
    """A prompt with all that decides its images.

    Attributes:
        index: of its row.
        prompt: the text.
        seeds: of its images.
        call: arguments of `draw`: size, steps, guidance, and sources of an edit.
        reference: the picture it should look like, see `opened`, or None.
        columns: further ones, for metrics.
    """

    index: int
    prompt: str
    seeds: Sequence[int]
    call: dict[str, Any]
    reference: Any
    columns: dict[str, Any]

    @property
    def sources(self) -> list[str]:
        return [f"sources/{self.index:05d}_{k}.png" for k in range(len(self.call.get("source_images", [])))]

    @property
    def reference_file(self) -> str | None:
        return None if self.reference is None else f"references/{self.index:05d}.png"

    def images(self, model: str) -> dict[str, int]:
        """Name of each image -> its seed."""
        first = self.index * len(self.seeds)
        return {f"images/{model}/{first + k:05d}.png": seed for k, seed in enumerate(self.seeds)}

    def table(self, models: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A row for each image, those of one seed together."""
        given = {"reference": self.reference_file, "sources": self.sources or None}
        size = {"width": self.call["width"], "height": self.call["height"]}
        for k, seed in enumerate(self.seeds):
            for model in models:
                row, image = self.index * len(self.seeds) + k, [*self.images(model)][k]
                own = {"row": row, "model": model, "prompt": self.prompt, "image": image}
                yield own | given | {"seed": seed} | size | self.columns


def models_of(args: argparse.Namespace) -> dict[str, str | None]:
    """Name -> path of the adapter; the base comes first, without one."""
    found: dict[str, str | None] = {BASE: None}
    for entry in args.adapters:
        name, given, path = entry.partition("=")
        if not given or "/" in name:
            name, path = Path(entry.rstrip("/")).resolve().name, entry
        if not name or name.startswith(".") or any(letter in name for letter in '/\\:*?"<>|'):
            raise SciflowError(f"`adapters` {entry!r}: {name!r} cannot be the name of a folder. Give NAME=RUN.")
        if name in found:
            raise SciflowError(f"`adapters` {entry!r}: the name {name!r} is taken. Give another one, NAME=RUN.")
        if pipeline_kind(path):
            raise SciflowError(
                f"`adapters` {path!r} is a complete pipeline: evaluate it as `--model_path`, in a folder of its own."
            )
        found[name] = path
    return found


def read_rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str, Path]:
    """The rows, where they come from in words, and the folder that names of files in them start from."""
    from ..data.benchmarks import load_benchmark

    given = named(args, "prompts dataset benchmark")
    sources = {name: value for name, value in given.items() if value is not None}
    if len(sources) != 1:
        raise SciflowError(f"give one of {', '.join(f'`--{name}`' for name in given)}: what to draw.")
    [(option, source)] = sources.items()
    if option == "benchmark":
        rows = load_benchmark(source, **({"split": args.split} if args.split else {}))
    else:
        rows = prompts_of(source, split=args.split, option=option)
    return rows, f"`{option}` {source!r}", Path(source).parent if Path(source).is_file() else Path(source)


def plan_prompts(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    folder: Path,
    args: argparse.Namespace,
    family: Any,
    models: Mapping[str, str | None],
) -> list[Prompt]:
    """The prompts, checked: sizes, sources, references, columns."""
    from ..diffusion.randomness import hash64

    trained = next((path for path in models.values() if path is not None), args.model_path)
    sized = argparse.Namespace(**vars(args) | {"model_path": trained})  # its run says what was trained on
    plain = _plain_columns(rows, where)
    times: Counter[tuple[str, str]] = Counter()
    found = []
    for index, row in enumerate(rows):
        prompt, place = row["prompt"], f"{where}, row {index}"
        call = call_of_row(row, sized, family, place)
        for name, default in _DEFAULTS.items():
            call[name] = next(v for v in (getattr(args, name), row.get(name), default) if v is not None)
        sources = repr(row.get("source_images"))
        time = times[prompt, sources]
        times[prompt, sources] += 1
        if not 0 <= (seed := row.get("seed", 0)) < 2**63:
            raise SciflowError(f"{place}: `seed` is {seed}, but must be in [0, 2**63).")
        key: list[Any] = [args.seed, prompt, time] if "seed" not in row else [seed]
        seeds = [hash64(*key, "evaluation", k) & 0xFFFFFFFF for k in range(args.num_images_per_prompt)]
        if "seed" in row:
            seeds[0] = seed  # the generator's own, as benchmarks give it
        columns = {name: column[index] for name, column in plain.items()}
        found.append(Prompt(index, prompt, seeds, call, _reference(row, folder, place), columns))
    return found


def _plain_columns(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, list[Any]]:
    """The further columns that a table can hold; the others are named."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in _USED):
        try:
            column = [_plain(row.get(name)) for row in rows]
        except TypeError:
            column = []
        kinds = {float if type(value) is int else type(value) for value in column}
        if name in OWN or not column or len(kinds - {type(None)}) > 1:
            why = "scores have a column of that name" if name in OWN else "it does not hold texts or numbers alone"
            logger.warning("The column `%s` of %s is left out: %s.", name, where, why)
        else:
            found[name] = column
    return found


def _plain(value: Any) -> str | int | float | bool | None:
    """A cell as it is, or a list or object as JSON; TypeError where JSON cannot hold it."""
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)


def _reference(row: Mapping[str, Any], folder: Path, where: str) -> Any:
    """The picture of the first of `REFERENCES` that the row has, checked."""
    from ..metrics.rewards.pictures import opened

    name = next((name for name in REFERENCES if row.get(name) is not None), None)
    if name is None:
        return None
    cell = str(folder / row[name]) if isinstance(row[name], str) else row[name]
    try:
        opened(cell)
    except Exception as error:  # PIL lets through whatever its decoders raise
        raise SciflowError(f"{where}: `{name}` {cell!r:.80} cannot be read ({first_line(error)}).") from error
    return cell


def facts_of(
    args: argparse.Namespace, family: Any, kind: str | None, prompts: Sequence[Prompt], dtype: "torch.dtype"
) -> dict[str, Any]:
    """All that decides the images, for the folder that holds them."""
    import hashlib

    from ..metrics.rewards.pictures import opened

    digest = hashlib.sha256()
    for prompt in prompts:
        pictures = [*prompt.call.get("source_images", []), *([opened(prompt.reference)] if prompt.reference else [])]
        numbers = {name: value for name, value in prompt.call.items() if name != "source_images"}
        digest.update(json.dumps([prompt.prompt, prompt.seeds, numbers]).encode())
        digest.update(b"".join(hashlib.sha256(picture.tobytes()).digest() for picture in pictures))
    own = {"dtype": str(dtype).removeprefix("torch."), "prompts": digest.hexdigest()[:16]}
    return facts_of_model(args, family, kind, "num_images_per_prompt") | own


def draw_missing(
    prompts: Sequence[Prompt],
    models: Mapping[str, str | None],
    args: argparse.Namespace,
    family: Any,
    kind: str | None,
    device: Any,
    dtype: "torch.dtype",
    *,
    shows: bool,
) -> None:
    """Draws the images that are not in the folder, one model after the other."""
    from tqdm import tqdm

    output = Path(args.output_dir)
    for prompt in prompts:
        _save_given(output, prompt)
    for name, path in models.items():
        missing = [prompt for prompt in prompts if not all((output / image).is_file() for image in prompt.images(name))]
        if not missing:
            continue
        own = args if path is None else argparse.Namespace(**vars(args) | {"model_path": path})
        network = load_network(family, own, kind if path is None else None, dtype)
        pipeline = family.load_pipeline(network.to(device).eval(), device=device)
        with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc=name, disable=not shows) as bar:
            for start in range(0, len(missing), ENCODED_AT_ONCE):
                chunk = missing[start : start + ENCODED_AT_ONCE]
                pairs = [(prompt.prompt, prompt.call) for prompt in chunk]
                for prompt, encoded in zip(chunk, encoded_each(pairs, family, device, dtype), strict=True):
                    _draw(output, prompt, name, family, pipeline, encoded)
                    bar.update()
        del network, pipeline


def _draw(output: Path, prompt: Prompt, model: str, family: Any, pipeline: Any, encoded: Any) -> None:
    """The images of a prompt that are not there, one by one: a batch would round them otherwise."""
    import torch

    from ..report.contact_sheet import png_bytes

    for name, seed in prompt.images(model).items():
        if (output / name).is_file():
            continue
        generators = [torch.Generator().manual_seed(seed)]
        latents, images = family.draw(pipeline, encoded, generators=generators, **prompt.call)
        if not latents.isfinite().all():
            raise SciflowError(
                f"`{model}` draws NaN or Inf for {prompt.prompt!r:.80}: its weights, or `num_inference_steps` "
                f"{prompt.call['num_inference_steps']}, cannot be drawn with in {latents.dtype}."
            )
        about = {"prompt": prompt.prompt, "seed": str(seed), "model": model}
        write_file(output / name, png_bytes(images[0], about), durable=True)


def _save_given(output: Path, prompt: Prompt) -> None:
    """Copies of sources and reference, for the metrics and the page."""
    from ..metrics.rewards.pictures import opened
    from ..report.contact_sheet import png_bytes

    given = dict(zip(prompt.sources, prompt.call.get("source_images", []), strict=True))
    if prompt.reference_file is not None:
        given[prompt.reference_file] = prompt.reference
    for name, picture in given.items():
        if not (output / name).is_file():
            write_file(output / name, png_bytes(opened(picture), {}), durable=False)
