"""What preferences or rewards taught mini_klein: a house colour where a prompt names none, and the named colours kept.

    python -m tests.benchmarks.preferences [--lora RUN ...] [--prompts 150] [--guidance 4] [--only SET ...] [--work DIR]

Fresh prompts and seeds (not those that candidates were drawn for), drawn by the stock pipeline. The judge is the
classifier of `tests.benchmarks.mini_klein`, which has learnt from drawn figures alone and is no part of any reward.
For the base and each LoRA: prompts that name no colour, in the wording of pretraining, drawn in the house colour and
of the right kind; the same in other wordings; prompts that name a colour, drawn in it and of the right kind. Then how
far apart images of one prompt are (mean absolute difference of pixels, in 0 to 255), which falls where diversity is
lost; sharpness, the energy of gradients over that of drawn figures of the same prompts, which falls where images are
blurred; and the bar and flow charts that have as many bars and boxes as their prompt asks for, counted by
`sciflow_hf.metrics.charts`. Shares in per cent with Wilson's 95 % interval.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline

from sciflow_hf.demo.mini_figures import COLOURS, COUNTS, KINDS, MiniFigure
from sciflow_hf.demo.mini_klein import TEXT_LENGTH
from sciflow_hf.demo.mini_prompts import UNNAMED, house_prompts
from sciflow_hf.demo.mini_vae import pixels
from sciflow_hf.metrics.rewards.chart import chart_count
from tests.benchmarks.mini_klein import draw, share, sheet, train_classifier

PROMPTS_SEED = 2024
"""Other than those of candidates."""


SETS = {  # name -> seed, wordings, and whether a colour is named
    "no_colour_named": (PROMPTS_SEED, UNNAMED[:1], False),
    "the_same_in_other_words": (PROMPTS_SEED + 1, (UNNAMED[1], *UNNAMED[2:], UNNAMED[2]), False),
    "a_colour_named": (PROMPTS_SEED, UNNAMED[:1], True),
}
"""Sets of prompts, by what they test."""


def asked(name: str, number: int) -> list[dict[str, Any]]:
    """`number` rows of prompts of a set."""
    seed, wordings, named = SETS[name]
    return [row for row in house_prompts(2 * number, seed=seed, wordings=wordings) if row["names_colour"] == named]


def drawn(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Figures of the prompts in the wanted colours, drawn; with three things where the prompt names no count."""
    counts = [next((word for word in COUNTS if f" {word} " in row["prompt"]), "three") for row in rows]
    return pixels(
        [
            MiniFigure(row["kind"], row["colour"], count, row["height"], row["width"], seed=i)
            for i, (row, count) in enumerate(zip(rows, counts, strict=True))
        ]
    )


def spread(images: torch.Tensor, prompts: Sequence[str]) -> float:
    """Mean absolute difference between images of equal prompts; NaN where none are equal."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    pairs = [pair for same in rows.values() for pair in itertools.combinations(same[:6], 2)]
    return float(np.mean([(images[i] - images[j]).abs().mean() for i, j in pairs] or [np.nan])) * 127.5


def energy(images: torch.Tensor) -> float:
    """Mean square of the differences of neighbouring pixels of (B, 3, H, W)."""
    return sum(images.diff(dim=dim).square().mean().item() for dim in (2, 3))


def exact_counts(images: torch.Tensor, prompts: Sequence[str], kind: str) -> str:
    """The share of right counts of the charts of a kind whose prompts ask for one."""
    from PIL import Image

    pages = [Image.fromarray(page) for page in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    counts = [
        count for count, prompt in zip(chart_count(prompts, pages), prompts, strict=True)
        if count is not None and kind in prompt
    ]  # fmt: skip
    return f"{share([count == 1 for count in counts])} of {len(counts)}" if counts else "none asked for"


def measure(pipeline: Any, classifier: Any, args: argparse.Namespace, path: Path) -> None:
    for name in args.only:
        rows = asked(name, args.prompts)
        title, prompts = name.replace("_", " "), [row["prompt"] for row in rows]
        images = draw(
            pipeline, prompts, (64, 64), guidance=args.guidance, steps=args.steps, length=TEXT_LENGTH, seed=7000
        )
        with torch.no_grad():
            out = classifier(images)
        kinds, colours = list(KINDS), list(COLOURS)
        kind = out["kind"].argmax(1) == torch.tensor([kinds.index(row["kind"]) for row in rows])
        colour = out["colour"].argmax(1) == torch.tensor([colours.index(row["colour"]) for row in rows])
        print(
            f"  {title:24} n={len(rows)}  colour and kind {share(kind & colour)}  kind {share(kind)}  "
            f"colour {share(colour)}  spread {spread(images, prompts):.1f}  "
            f"sharpness {energy(images) / energy(drawn(rows)):.2f}  exact counts: "
            + ", ".join(f"{kind} {exact_counts(images, prompts, kind)}" for kind in ("bar chart", "flow chart")),
            flush=True,
        )
        sheet(path.with_name(f"{path.name}_{name}.png"), images[:50])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sciflow_hf/assets/mini_klein")
    parser.add_argument("--lora", nargs="*", default=[], help="runs; the base is measured before them")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--no_base", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help=", ".join(SETS))
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
        measure(pipeline, classifier, args, args.work / name)


if __name__ == "__main__":
    main()
