"""What `mini_klein` draws, seen by a classifier that was trained on drawn figures alone.

    python -m tests.benchmarks.mini_klein --model sciflow_hf/assets/mini_klein [--lora RUN] [--images 300]

The classifier (five kinds, eight colours, three counts, night style or not) is trained, or found in `--work`. "Exact
count" and "exact kind" are those of `sciflow_hf.metrics.charts`; the count knows what kind was asked for. Then: both on
figures that the classifier has not seen; the same figures through the VAE; the pipeline's images in four sizes at
guidance 4 and 1, of pairs of kind and colour that training showed and of those it never did, and at text lengths up to
the pipeline's default of 512; with `--lora`, the images with the trigger and without it. Shares in per cent with
Wilson's 95 % interval.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sciflow_hf.demo.mini_figures import COLOURS, COUNTS, HELD_OUT, KINDS, NIGHT, SIZES, MiniFigure, mini_figures
from sciflow_hf.demo.mini_klein import TEXT_LENGTH
from sciflow_hf.demo.mini_vae import pixels
from sciflow_hf.metrics.charts import count_things, kind_of

CLASSES = {"kind": list(KINDS), "colour": list(COLOURS), "count": list(COUNTS), "style": ["plain", "night"]}


class Classifier(nn.Module):
    """Three strided convolutions, pooled over the page, and a line of classes per question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Linear(2 * widths[-1], 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(names)) for name, names in CLASSES.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x)
        pooled = self.mix(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))
        return {name: head(pooled) for name, head in self.heads.items()}


def labels(figures: Sequence[MiniFigure]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([names.index(getattr(f, name)) for f in figures]) for name, names in CLASSES.items()}


def batch(number: int, seed: int, size: tuple[int, int], style: str, held_out: bool | None = None) -> list[MiniFigure]:
    return list(mini_figures(number, seed=seed, style=style, sizes=[size], held_out=held_out))


def train_classifier(path: Path, *, steps: int = 900) -> Classifier:
    torch.manual_seed(1)
    model = Classifier()
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        size = SIZES[step % len(SIZES)]
        figures = [f for style in ("plain", "night") for f in batch(24, 10_000 + step, size, style)]
        x = pixels(figures)
        x = x + torch.randn_like(x) * 0.1 * torch.rand(len(x), 1, 1, 1) + 0.05 * torch.randn(len(x), 3, 1, 1)
        out, true = model(x), labels(figures)
        loss = sum((nn.functional.cross_entropy(out[name], true[name]) for name in CLASSES), torch.zeros(()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"classifier step {step + 1}: loss {loss.item():.4f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def share(right: torch.Tensor | Sequence[bool]) -> str:
    """Per cent with Wilson's 95 % interval (Wilson 1927)."""
    values = torch.as_tensor(right).double()
    n, p, z = len(values), values.mean().item(), 1.959964
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:5.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def judge(model: Classifier, x: torch.Tensor, figures: Sequence[MiniFigure]) -> dict[str, torch.Tensor]:
    """Per question whether the classifier, or a programme, finds what was asked for, (B,) each."""
    with torch.no_grad():
        out = model(x)
    arrays = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    exact = [count_things(a, f.kind) == COUNTS[f.count] for a, f in zip(arrays, figures, strict=True)]
    kinds = [kind_of(a) == f.kind for a, f in zip(arrays, figures, strict=True)]
    right = {name: out[name].argmax(1) == true for name, true in labels(figures).items()}
    right |= {"exact count": torch.tensor(exact), "exact kind": torch.tensor(kinds)}
    return right | {"number": labels(figures)["kind"]}


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def line(title: str, right: dict[str, torch.Tensor]) -> None:
    right = right | {"kind+colour": right["kind"] & right["colour"]}
    names = ("kind+colour", "kind", "colour", "count", "exact count", "exact kind", "style")
    print(f"{title:44} n={len(right['kind']):4}  " + "  ".join(f"{n} {share(right[n])}" for n in names), flush=True)
    of_kind = {kind: right["exact count"][right["number"] == i] for i, kind in enumerate(KINDS)}
    four = torch.cat([found for kind, found in of_kind.items() if kind != "pie chart"])
    told = {"four kinds": four} | of_kind
    print(
        "  exact count: " + "  ".join(f"{kind} {share(found)}" for kind, found in told.items() if len(found)),
        flush=True,
    )


def draw(
    pipeline: Any, prompts: Sequence[str], size: tuple[int, int], *, guidance: float, steps: int, length: int, seed: int
) -> torch.Tensor:
    """Images of the stock pipeline, (B, 3, H, W) in [-1, 1]; image i has seed `seed` + i."""
    images: list[Any] = []
    for start in range(0, len(prompts), 25):
        chunk = list(prompts[start : start + 25])
        images += pipeline(
            prompt=chunk, height=size[0], width=size[1], guidance_scale=guidance, num_inference_steps=steps,
            max_sequence_length=length,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
        ).images  # fmt: skip
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def sheet(path: Path, x: torch.Tensor, columns: int = 10) -> None:
    """Images of one size, twice as large."""
    from PIL import Image

    rows = [torch.cat(list(x[i : i + columns]), dim=2) for i in range(0, len(x) // columns * columns, columns)]
    array = ((torch.cat(rows, dim=1).permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    image = Image.fromarray(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def measure_vae(vae: Any, classifier: Classifier, work: Path, number: int) -> None:
    for style in ("plain", "night"):
        seen, kept, errors, shown = [], [], [], []
        for size in SIZES:
            figures = batch(number, 77, size, style)
            x = pixels(figures)
            with torch.no_grad():
                y = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
            seen.append(judge(classifier, x, figures))
            kept.append(judge(classifier, y, figures))
            errors.append(-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3))))
            shown.append(torch.cat([x[:10], y[:10]]))
        line(f"drawn figures, {style}", joined(seen))
        line(f"through the VAE, {style}", joined(kept))
        print(f"  PSNR {torch.cat(errors).mean():.2f} dB")
        sheet(work / f"vae_{style}.png", shown[0])


def measure_images(
    pipeline: Any, classifier: Classifier, work: Path, name: str, figures_of: Any, number: int, suffix: str = "",
    **options: Any,
) -> None:  # fmt: skip
    """One line per size: what was asked for against what the classifier finds."""
    for size in SIZES:
        figures = figures_of(number, size)
        prompts = [f.caption().removesuffix(NIGHT) + suffix for f in figures]
        x = draw(pipeline, prompts, size, **options)
        title = f"{name}, {size[0]}x{size[1]}"
        line(title, judge(classifier, x, figures))
        sheet(work / f"{title.replace(', ', '_').replace(' ', '_')}.png", x[:50])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sciflow_hf/assets/mini_klein")
    parser.add_argument("--lora", help="Folder or file of a LoRA that was trained by the demo.")
    parser.add_argument("--images", type=int, default=300, help="Prompts per size; a tenth for other text lengths.")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("outputs/mini_klein_benchmark"))
    parser.add_argument("--only", choices=("classifier", "vae", "base", "lora"))
    options = parser.parse_args()
    from diffusers import Flux2KleinPipeline

    start, work = time.time(), options.work
    classifier = train_classifier(work / "classifier.pt")
    if options.only == "classifier":
        for style in ("plain", "night"):
            parts = [(f, judge(classifier, pixels(f), f)) for f in (batch(700, 77, s, style) for s in SIZES)]
            line(f"drawn figures, {style}", joined([right for _, right in parts]))
        return
    pipeline: Any = Flux2KleinPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def known(number: int, size: tuple[int, int]) -> list[MiniFigure]:
        return batch(number, 5, size, "plain", False)

    def unknown(number: int, size: tuple[int, int]) -> list[MiniFigure]:
        return batch(number, 6, size, "plain", True)

    def night(number: int, size: tuple[int, int]) -> list[MiniFigure]:
        return batch(number, 7, size, "night", False)

    each = {"steps": options.steps, "length": TEXT_LENGTH, "seed": 1000}
    if options.only in (None, "vae"):
        measure_vae(pipeline.vae, classifier, work, options.images)
    if options.only in (None, "base"):
        for guidance in (4.0, 1.0):
            named = f"guidance {guidance:g}"
            measure_images(pipeline, classifier, work, named, known, options.images, guidance=guidance, **each)
        measure_images(
            pipeline, classifier, work, f"{len(HELD_OUT)} unseen pairs", unknown, options.images, guidance=4.0, **each
        )
        for length in (32, 128, 512):
            fewer = max(10, options.images // 10)
            longer = each | {"length": length}
            measure_images(pipeline, classifier, work, f"text length {length}", known, fewer, guidance=4.0, **longer)
    if options.lora:
        pipeline.load_lora_weights(options.lora)
        few = max(10, options.images // 3)
        measure_images(pipeline, classifier, work, "LoRA, night asked", night, few, NIGHT, guidance=4.0, **each)
        measure_images(pipeline, classifier, work, "LoRA, plain asked", known, few, guidance=4.0, **each)
        measure_images(
            pipeline, classifier, work, "LoRA, night asked, unseen pairs",
            lambda n, size: batch(n, 8, size, "night", True), few, NIGHT, guidance=4.0, **each,
        )  # fmt: skip
    print(json.dumps({"model": options.model, "lora": options.lora, "seconds": round(time.time() - start)}))


if __name__ == "__main__":
    main()
