"""What edits mini_klein has learned: held-out pairs by the stock pipeline, against their true targets.

    python -m tests.benchmarks.edits --run outputs/flux2klein_edit_demo [--pairs 150] [--size 64x64]

For every kind of edit: PSNR to the true target and IoU of the coloured areas. Of recoloured charts also whether the
colour is the one that was asked for, at guidance 4 and 1, and the IoU with the target where another figure was the
source. Then text-to-image, before and after training: kind and colour by the classifier of
`tests.benchmarks.mini_klein`. Shares in per cent with Wilson's 95 % interval.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from sciflow_hf.demo.mini_edits import EDITS, EditPair, edit_pairs
from sciflow_hf.demo.mini_figures import COLOURS, mini_figures
from sciflow_hf.demo.mini_klein import TEXT_LENGTH
from sciflow_hf.metrics.charts import colour_of, coloured
from tests.benchmarks.mini_klein import draw, judge, share, train_classifier

AREAS = ("bar chart", "pie chart", "flow chart")
"""Kinds whose coloured area is large: of lines and points one pixel of shift halves an IoU."""


def load_pipeline(model: str, run: Path | None) -> Any:
    """That of the base, with the LoRA or the network of a training."""
    pipeline: Any = Flux2KleinPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if run is not None and (run / "transformer").is_dir():
        pipeline.transformer = Flux2Transformer2DModel.from_pretrained(run / "transformer", dtype=torch.float32)
    elif run is not None:
        pipeline.load_lora_weights(run)
    return pipeline


def edited(pipeline: Any, pair: EditPair, source: Any, *, guidance: float, steps: int, seed: int) -> np.ndarray:
    """(H, W, 3), uint8."""
    image = pipeline(
        image=source, prompt=pair.instruction, height=pair.target.height, width=pair.target.width,
        guidance_scale=guidance, num_inference_steps=steps, max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    return np.asarray(image)


def psnr(drawn: np.ndarray, target: np.ndarray) -> float:
    error = np.square((drawn.astype(float) - target) / 255).mean()
    return float(-10 * np.log10(error))


def iou(drawn: np.ndarray, target: np.ndarray) -> float:
    one, other = coloured(drawn), coloured(target)
    return float((one & other).sum() / max(1, (one | other).sum()))


def measure(pipeline: Any, pairs: Sequence[EditPair], *, guidance: float, steps: int, work: Path) -> None:
    """One line for each kind of edit, and of recoloured charts one more."""
    drawn = [edited(pipeline, p, p.source.image(), guidance=guidance, steps=steps, seed=i) for i, p in enumerate(pairs)]
    targets = [np.asarray(pair.target.image()) for pair in pairs]
    quality = [psnr(*both) for both in zip(drawn, targets, strict=True)]
    print(f"guidance {guidance:g}: PSNR over all {len(pairs)} pairs {np.mean(quality):.2f} dB", flush=True)
    for edit in EDITS:
        rows = [i for i, pair in enumerate(pairs) if pair.edit == edit]
        areas = [iou(drawn[i], targets[i]) for i in rows if pairs[i].target.kind in AREAS]
        right = [colour_of(drawn[i], COLOURS) == pairs[i].target.colour for i in rows]
        print(
            f"  {edit:9} n={len(rows):4}  PSNR {np.mean([quality[i] for i in rows]):5.2f} dB  colour {share(right)}  "
            f"IoU of areas {np.mean(areas):.3f}, at least .8 in {share([a >= 0.8 for a in areas])}",
            flush=True,
        )
    tiles = [np.concatenate([np.asarray(p.source.image()), d], axis=1) for p, d in zip(pairs, drawn, strict=True)]
    _sheet(work / f"edits_{pairs[0].target.height}_guidance{guidance:g}.png", tiles[:40])


def measure_swapped(pipeline: Any, pairs: Sequence[EditPair], *, steps: int) -> None:
    """How often the result fits the target although another figure was the source."""
    chosen = [p for p in pairs if p.edit == "recolour" and p.target.kind in AREAS]
    fits = []
    for i, (pair, other) in enumerate(zip(chosen, [*chosen[1:], chosen[0]], strict=True)):
        image = edited(pipeline, pair, other.source.image(), guidance=4.0, steps=steps, seed=i)
        fits.append(iou(image, np.asarray(pair.target.image())) >= 0.8)
    print(f"  with another figure as source: IoU at least .8 in {share(fits)} of {len(fits)}", flush=True)


def measure_drawing(pipelines: dict[str, Any], work: Path, number: int, size: tuple[int, int], steps: int) -> None:
    """Kind and colour of images from text alone, of each pipeline at the same seeds."""
    classifier = train_classifier(work / "classifier.pt")
    figures = list(mini_figures(number, seed=21, sizes=[size], held_out=None))
    for name, pipeline in pipelines.items():
        prompts = [f.caption() for f in figures]
        x = draw(pipeline, prompts, size, guidance=4.0, steps=steps, length=TEXT_LENGTH, seed=500)
        right = judge(classifier, x, figures)
        print(
            f"text-to-image, {name}: kind and colour {share(right['kind'] & right['colour'])} of {number}", flush=True
        )


def _sheet(path: Path, tiles: Sequence[np.ndarray], columns: int = 5) -> None:
    from PIL import Image

    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles) // columns * columns, columns)]
    image = Image.fromarray(np.concatenate(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sciflow_hf/assets/mini_klein")
    parser.add_argument("--run", type=Path, required=True, help="A training on edits: of a LoRA, or of all weights.")
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--size", default="64x64", help="Height x width in pixels.")
    parser.add_argument("--images", type=int, default=300, help="From text alone; 0 leaves that out.")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("outputs/mini_klein_benchmark"))
    options = parser.parse_args()
    start, (height, width) = time.time(), map(int, options.size.split("x"))
    size = (height, width)
    base, pipeline = (load_pipeline(options.model, run) for run in (None, options.run))
    pairs = list(edit_pairs(options.pairs, seed=77, sizes=[size]))
    for guidance in (4.0, 1.0):
        measure(pipeline, pairs, guidance=guidance, steps=options.steps, work=options.work)
    measure_swapped(pipeline, pairs, steps=options.steps)
    if options.images:
        both = {"base": base, "trained": pipeline}
        measure_drawing(both, options.work, options.images, size, options.steps)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
