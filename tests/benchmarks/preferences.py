"""What a preference taught mini_klein: a house colour where a prompt names none, and the named colours kept.

    python -m tests.benchmarks.preferences [--lora RUN ...] [--prompts 150] [--guidance 4] [--work DIR]

Fresh prompts and seeds (not those that candidates were drawn for), drawn by the stock pipeline. The judge is the
classifier of `tests.benchmarks.mini_klein`, which has learnt from drawn figures alone and is no part of any reward.
For the base and each LoRA: prompts that name no colour, in the wording of pretraining, drawn in the house colour and
of the right kind; the same in other wordings; prompts that name a colour, drawn in it and of the right kind. Then how
far apart images of one prompt are (mean absolute difference of pixels, in 0 to 255), which falls where diversity is
lost. Shares in per cent with Wilson's 95 % interval.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline

from sciflow_hf.demo.mini_figures import COLOURS, KINDS
from sciflow_hf.demo.mini_klein import TEXT_LENGTH
from sciflow_hf.demo.mini_prompts import UNNAMED, house_prompts
from tests.benchmarks.mini_klein import draw, share, sheet, train_classifier

PROMPTS_SEED = 2024
"""Other than those of candidates."""


def asked(number: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of prompts by what they test, `number` each."""
    known = house_prompts(2 * number, seed=PROMPTS_SEED, wordings=UNNAMED[:1])
    others = house_prompts(2 * number, seed=PROMPTS_SEED + 1, wordings=(UNNAMED[1], *UNNAMED[2:], UNNAMED[2]))
    return {
        "no colour named": [row for row in known if not row["names_colour"]],
        "the same in other words": [row for row in others if not row["names_colour"]],
        "a colour named": [row for row in known if row["names_colour"]],
    }


def spread(images: torch.Tensor, prompts: Sequence[str]) -> float:
    """Mean absolute difference between images of equal prompts; NaN where none are equal."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    pairs = [pair for same in rows.values() for pair in itertools.combinations(same[:6], 2)]
    return float(np.mean([(images[i] - images[j]).abs().mean() for i, j in pairs] or [np.nan])) * 127.5


def measure(pipeline: Any, classifier: Any, number: int, guidance: float, steps: int, path: Path) -> None:
    for title, rows in asked(number).items():
        prompts = [row["prompt"] for row in rows]
        images = draw(pipeline, prompts, (64, 64), guidance=guidance, steps=steps, length=TEXT_LENGTH, seed=7000)
        with torch.no_grad():
            out = classifier(images)
        kinds, colours = list(KINDS), list(COLOURS)
        kind = out["kind"].argmax(1) == torch.tensor([kinds.index(row["kind"]) for row in rows])
        colour = out["colour"].argmax(1) == torch.tensor([colours.index(row["colour"]) for row in rows])
        print(
            f"  {title:24} n={len(rows)}  colour and kind {share(kind & colour)}  kind {share(kind)}  "
            f"colour {share(colour)}  spread {spread(images, prompts):.1f}",
            flush=True,
        )
        sheet(path.with_name(f"{path.name}_{title.replace(' ', '_')}.png"), images[:50])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sciflow_hf/assets/mini_klein")
    parser.add_argument("--lora", nargs="*", default=[], help="runs; the base is measured before them")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--no_base", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("outputs/preferences_benchmark"))
    args = parser.parse_args()
    classifier = train_classifier(args.work / "classifier.pt")
    for run in [*([] if args.no_base else [None]), *args.lora]:
        pipeline = Flux2KleinPipeline.from_pretrained(args.model, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if run is not None:
            pipeline.load_lora_weights(run)
        print(run or "base", flush=True)
        name = "base" if run is None else Path(run).name
        measure(pipeline, classifier, args.prompts, args.guidance, args.steps, args.work / name)


if __name__ == "__main__":
    main()
