"""`sciflow-hf init`: inspects a folder of images and this machine, and writes a commented YAML that trains on it.

It asks at most four questions; a flag answers one, `--yes` takes what is suggested for the rest.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError
from ..files import atomic_file

if TYPE_CHECKING:
    from ..data.inspect.figures import Figures


@dataclass(frozen=True)
class Choice:
    """A way to train captioned figures.

    Attributes:
        family, config: of `sciflow-hf train`.
        memory: of a GPU that it is for, GB: estimated for 1024 x 1024 pixels, but of "klein" what its config asks
            for; None for a CPU.
        options: on top of the config.
        pixel_bytes, text_bytes: of a cache, for each pixel of an image and for each distinct caption.
        why: a comment.
        english: whether its text encoders know little else.
    """

    family: str
    config: str
    memory: float | None
    options: dict[str, Any]
    pixel_bytes: float
    text_bytes: float
    why: str
    english: bool = False


_SMALL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "activation_checkpointing": True}
_LORA_16 = {"rank": 16, "lora_alpha": 16}
CHOICES = {
    "klein": Choice("flux2_klein", "flux2klein_9b_lora", 78, {}, 1.0, 12.6e6, "FLUX.2 klein base 9B, rank 128"),
    "klein_small": Choice(
        "flux2_klein", "flux2klein_9b_lora", 21, _SMALL | _LORA_16, 1.0, 12.6e6,
        "FLUX.2 klein base 9B, rank 16, one image at a time",
    ),
    "qwen_image": Choice("qwen_image", "qwen_image_lora", 48, _SMALL, 1.0, 1.0e6, "Qwen-Image, one image at a time"),
    "z_image": Choice("z_image", "z_image_24gb_lora", 16, {}, 0.5, 1.0e6, "Z-Image, one image at a time"),
    "flux": Choice("flux", "flux_lora", 30, _SMALL, 1.0, 4.2e6, "FLUX.1 [dev], one image at a time", english=True),
    "sd3": Choice("sd3", "sd3_lora", 21, _SMALL, 1.0, 2.7e6, "Stable Diffusion 3.5 large", english=True),
    "sdxl": Choice("sdxl", "sdxl_lora", 7, _SMALL, 0.25, 0.3e6, "Stable Diffusion XL", english=True),
    "mini_klein": Choice(
        "flux2_klein", "flux2klein_demo", None, {"max_sequence_length": 64}, 1.0, 0.1e6,
        "mini_klein, the small klein of the demo: it draws 64 x 96 pixels, to see every step before renting a GPU",
    ),
}  # fmt: skip
"""Name -> a way to train. Memory is that of docs/families.md, and of "klein" a card of 80 GB as its config says."""
PREFERRED = ("klein", "klein_small", "sdxl")
_LONG = 0.05  # share of long figures from which on there are buckets for them
_DEMO_SECONDS = 60 / 300  # of a step of four figures on two cores, as the demo took


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf init`, and its function as `run`."""
    add = parser.add_argument
    parser.set_defaults(run=_init)
    add("folder", metavar="FOLDER", type=Path, help="images: with captions, in one folder per class, or measured")
    add("--output_file", type=Path, help="YAML to write (default: FOLDER's name with .yaml, here); never overwritten")
    add("--model", choices=[*CHOICES], help="for captioned figures (default: what fits the memory)")
    add("--memory_gb", type=float, help="memory of the GPU that will train (default: this machine's; 0 is a CPU)")
    add("--max_steps", type=int, help="number of steps (default: from the number of images)")
    add("--output_dir", help="output folder of the training (default: outputs/ and FOLDER's name)")
    add("--yes", action="store_true", help="accept all suggestions")


def _init(args: argparse.Namespace) -> None:
    from ..data.inspect.figures import look_at
    from ..options import check_range

    for name, within in (("memory_gb", "[0, inf)"), ("max_steps", "[1, inf)")):
        if (value := getattr(args, name)) is not None:
            check_range(name, value, within)
    target = args.output_file or Path(f"{args.folder.resolve().name}.yaml")
    if target.exists():
        raise SciflowError(f"`output_file` {target} exists: delete it, or name another one.")
    figures = look_at(args.folder)
    sys.stdout.write("\n".join(figures.describe()) + "\n")
    ask = _ask if not args.yes and sys.stdin is not None and sys.stdin.isatty() else lambda question, answer: answer
    family, lines = _propose(figures, args, ask)
    command = f"sciflow-hf train {family} --config {target}"
    head = [f"Written by `sciflow-hf init` for {args.folder}:", *(f"  {line}" for line in figures.describe())]
    head += [f"First: {command} --dry_run", f"Then:  {command}"]
    with atomic_file(target) as file:
        file.write_text("\n".join([*(f"# {line}" for line in head), "", *lines, ""]), encoding="utf-8")
    sys.stdout.write(f"Wrote {target}.\nNext:\n  {command} --dry_run\n  {command}\n")


def _ask(question: str, answer: str) -> str:
    """The user's answer; `answer` for a line without a word, or the end of the input."""
    sys.stdout.write(f"{question} [{answer}] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip() or answer


def _number(text: str, name: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise SciflowError(f"`{name}` {text!r}: a whole number, at least 1.")
    return int(text)


def _memory(args: argparse.Namespace) -> float:
    """GB of the GPU with the least memory; 0 without one."""
    import torch

    if args.memory_gb is not None:
        return float(args.memory_gb)
    cards = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(i).total_memory / 1e9 for i in cards), default=0.0)


def _propose(figures: "Figures", args: argparse.Namespace, ask: Any) -> tuple[str, list[str]]:
    """The family, and the lines of the YAML: option, value, and why."""
    memory = _memory(args)
    kinds = {"captioned": _captioned, "classes": _classes, "measured": _measured}
    if args.model and figures.kind != "captioned":
        raise SciflowError(f"`model` {args.model}: {figures.folder} has no captions, which it needs.")
    family, steps, options = kinds[figures.kind](figures, args, ask, memory)
    output = args.output_dir or ask("Where shall the results go?", f"outputs/{figures.folder.resolve().name}")
    every = max(1, steps // 5)
    held_out = 0 if figures.groups < 2 else max(0.02, min(0.2, 20 / figures.groups))
    why = "one image: nothing can be held out" if not held_out else f"about {max(1, round(held_out * figures.groups))}"
    options |= {
        "input_dir": (str(figures.folder.resolve()), ""),
        "output_dir": (output, f"{options.pop('cache', ('', ''))[1]}{_free(Path(output))} free"),
        "eval_fraction": (round(held_out, 3), why + " held out, which tell whether it learns" * bool(held_out)),
        "max_steps": (steps, options.pop("max_steps")[1]),
        "eval_strategy": ("steps" if held_out else "no", ""),
        "eval_steps": (every, ""),
        "save_steps": (every, "steps between checkpoints"),
        "save_total_limit": (2, ""),
        "resume_from_checkpoint": ("latest", "the same command continues a run that was stopped"),
        "overwrite_output_dir": (False, ""),
        "logging_steps": (max(1, min(50, steps // 20)), ""),
        "report_to": ("none", "or wandb, tensorboard"),
    }
    return family, list(_lines(options))


def _captioned(figures: "Figures", args: argparse.Namespace, ask: Any, memory: float) -> tuple[str, int, dict]:
    from ..data.writing import readable_bytes

    suggested = next((name for name in PREFERRED if (CHOICES[name].memory or 0) <= memory), "mini_klein")
    name = args.model or ask(f"Which model? {_offers(memory)}", suggested)
    if name not in CHOICES:
        raise SciflowError(f"`model` {name!r}: use one of {', '.join(CHOICES)}.")
    choice = CHOICES[name]
    mini = choice.memory is None
    batch = 2 if name == "klein" else 4
    count = len(figures.captions)
    guess = max(300 if mini else 500, math.ceil((100 if count <= 2000 else 2) * count / batch))
    guess = min(guess, 1000) if mini else guess
    steps = args.max_steps or _number(ask("How many steps?", str(guess)), "max_steps")
    resolution = 80 if mini else min(1024, max(256, round(math.sqrt(figures.area) / 64) * 64))
    size = count * resolution**2 * choice.pixel_bytes + len(set(figures.captions)) * choice.text_bytes
    small = figures.smaller_than(resolution)
    time = f"about {steps * _DEMO_SECONDS / 60:.0f} minutes on 2 cores" if mini else "time on GPUs: not measured"
    room = f"for a card with {choice.memory:g} GB or more; here {memory:.0f}" if choice.memory else "a CPU is enough"
    if choice.memory and choice.memory > memory:
        room = f"{choice.memory:g} GB or more; this machine has {memory:.0f}: train it on another one"
    options: dict[str, tuple[Any, str]] = {
        "base": (choice.config, f"{choice.why}; {room}"),
        "resolution": (
            resolution, f"{small:.0%} of the figures are smaller and keep their size" if small and not mini else "",
        ),
        "max_steps": (steps, f"each figure {steps * batch / count:.3g} times; a starting point; {time}"),
        "validation_prompts": (_some(figures.captions), "drawn before and after; yours are better"),
        "validation_steps": (max(1, steps // 2), ""),
    }  # fmt: skip
    if not mini and (long := figures.longer_than(2)) > _LONG:
        why = f"{long:.0%} of the figures are longer than 2:1, and would lose much at two edges; `fit: pad` cuts none"
        options["max_aspect_ratio"] = (4, why)
    options |= {key: (value, "") for key, value in choice.options.items()}
    options["cache"] = (None, f"with the cache of latents and embeddings, about {readable_bytes(size)}; ")
    if not mini and size > shutil.disk_usage(Path()).free:
        options["text_encoding"] = ("online", "captions are encoded in training: the disk has too little room")
    if choice.english and (script := [line for line in figures.describe() if "letters" in line]):
        options["base"] = (choice.config, f"{options['base'][1]}. Its text encoders read English: {script[0]}")
    return choice.family, steps, options


def _classes(figures: "Figures", args: argparse.Namespace, ask: Any, memory: float) -> tuple[str, int, dict]:
    side = min(64 if memory else 32, max(8, figures.shortest_side // 8 * 8))
    steps = args.max_steps or _number(ask("How many steps?", "100000" if memory else "2000"), "max_steps")
    shape: dict[str, tuple[Any, str]] = {"preset": ("S", "33 M parameters")}
    if not memory:
        shape = {"hidden_size": (128, "a small network, for a CPU"), "num_hidden_layers": (4, ""),
                 "num_attention_heads": (4, "")}  # fmt: skip
    return "dit", steps, {
        **shape,
        "image_size": (side, "pixels; images are resized and cropped to squares"),
        "patch_size": (2, ""),
        "learning_rate": (1e-4 if memory else 1e-3, ""),
        "per_device_train_batch_size": (128 if memory else 32, ""),
        "ema_decay": (0.9999 if memory else 0.999, ""),
        "max_steps": (steps, "a starting point; time: not measured"),
        **({"bf16": (True, "")} if memory else {}),
    }  # fmt: skip


def _measured(figures: "Figures", args: argparse.Namespace, ask: Any, memory: float) -> tuple[str, int, dict]:
    tile = min(128 if memory else 48, figures.shortest_side // 16 * 16)
    if tile < 16:
        raise SciflowError(f"{str(figures.folder)!r}: its images have sides of {figures.shortest_side}, less than 16.")
    steps = args.max_steps or _number(ask("How many steps?", "50000" if memory else "1000"), "max_steps")
    split = "specimen" if figures.groups > 4 else "region"
    small = {
        "block_out_channels": ([32, 64, 96, 128], "a small network, for a CPU"), "layers_per_block": (1, ""),
        "per_device_train_batch_size": (16, ""), "per_device_eval_batch_size": (16, ""), "warmup_steps": (50, ""),
        "bf16": (False, ""),
    }  # fmt: skip
    return "microscopy_unet", steps, {
        "base": ("microscopy_2p", "two-photon optics: change psf, wavelength, numerical_aperture, pixel_size, photons"),
        "tile_size": (tile, "pixels"),
        "split": (split, "complete images are held out" if split == "specimen" else "a strip of each is held out"),
        **({} if split == "specimen" else {"split_margin": (16, "pixels between it and the rest")}),
        "max_steps": (steps, "a starting point; time: not measured"),
        **({} if memory else small),
    }  # fmt: skip


def _offers(memory: float) -> str:
    """The models with what they need."""
    return ", ".join(f"{n} ({f'{c.memory:g} GB' if c.memory else 'CPU'})" for n, c in CHOICES.items()) + (
        f"; this machine has {memory:.0f} GB" if memory else "; this machine has no GPU"
    )


def _some(captions: list[str]) -> list[str]:
    """Two of them, apart."""
    return list(dict.fromkeys([captions[0], captions[len(captions) // 2]]))


def _free(path: Path) -> str:
    there = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.0f} GB"


def _lines(options: dict[str, tuple[Any, str]]) -> Iterator[str]:
    """YAML, as which JSON is read; a comment that is long stands above."""
    order = ("base", "input_dir", "dataset_dir", "output_dir")
    for name in sorted(options, key=lambda name: order.index(name) if name in order else len(order)):
        value, why = options[name]
        line, comment = f"{name}: {json.dumps(value, ensure_ascii=False)}", f"# {' '.join(why.split())}" * bool(why)
        if comment and len(line) + len(comment) > 100:
            yield from (comment, line)
        else:
            yield f"{line:<36}  {comment}".rstrip()
