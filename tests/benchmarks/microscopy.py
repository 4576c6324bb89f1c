"""Restoration of real images against classical methods, and what tiles cost: `python -m tests.benchmarks.microscopy`.

    restore --model_path outputs/microscopy_demo --output_dir results    table, calibration, contact sheet
    tiles --model_path outputs/microscopy_demo                           memory and seams of a 1024 x 1024 image

The model is that of `python recipes/train_microscopy.py --config recipes/configs/microscopy_demo.yaml`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

from sciflow_hf.demo.microscope_images import microscope_images
from sciflow_hf.families.microscopy_unet import MicroscopyUNet
from sciflow_hf.images.microscopes import MicroscopyDataArguments, MicroscopyTiles, load_microscopy_images
from sciflow_hf.images.optics import ForwardModel
from sciflow_hf.metrics.restoration import calibration, restoration_metrics

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "microscopy_demo.yaml"
WINDOW, MARGIN = 80, 8  # a window of 80 pixels is restored, its inner 64 are scored
DATA_RANGE = 255.0
LARGE, TILE, OVERLAP = 1024, 128, 32
Pair = tuple[np.ndarray, np.ndarray]
TITLES = (
    "measured",
    "Richardson-Lucy",
    "Wiener",
    "TV",
    "mean of samples",
    "a sample",
    "another",
    "3 x spread",
    "truth",
)
HEADS = (
    "| image | method | PSNR, dB | SSIM | power spectrum | histogram |",
    "| --- | --- | --- | --- | --- | --- |",
)


def held_out_windows(
    folder: Path, optics: ForwardModel, per_image: int
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Image -> sharp and measured windows (1, WINDOW, WINDOW), spread over what the recipe holds out."""
    options = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    names = ("split", "eval_fraction", "split_margin", "eval_specimens", "intensity_transform")
    chosen = {name: options[name] for name in names}
    args = MicroscopyDataArguments(input_dir=str(microscope_images(folder)), tile_size=WINDOW, **chosen)
    _, held_out = load_microscopy_images(args, optics)
    assert isinstance(held_out, MicroscopyTiles)
    windows: dict[str, list[Pair]] = {}
    for name in dict.fromkeys(held_out.groups):
        rows = [row for row, group in enumerate(held_out.groups) if group == name]
        rows = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, per_image).round().astype(int))]
        pairs = [held_out.intensities(row, held_out.key_of(row)) for row in rows]
        windows[name] = [(sharp.numpy(), measured.numpy()) for sharp, measured in pairs]
    return windows


def classical(optics: ForwardModel) -> dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], list[float]]]:
    """Method -> (measured (H, W), setting) -> image, and the settings that are tried."""
    from skimage import restoration

    psf = optics.kernel.numpy().astype(np.float64)
    offset = (optics.background + optics.read_noise**2) * optics.white / optics.photons  # keeps counts positive

    def richardson_lucy(image: np.ndarray, setting: float) -> np.ndarray:
        found = restoration.richardson_lucy(
            np.maximum(image + offset, 1e-3), psf, num_iter=int(setting), clip=False, filter_epsilon=1e-3
        )
        return np.asarray(found) - offset

    def wiener(image: np.ndarray, setting: float) -> np.ndarray:
        return np.asarray(restoration.wiener(image / DATA_RANGE, psf, setting, clip=False)) * DATA_RANGE

    def total_variation(image: np.ndarray, setting: float) -> np.ndarray:
        return np.asarray(restoration.denoise_tv_chambolle(image / DATA_RANGE, weight=setting)) * DATA_RANGE

    return {
        "measured": (lambda image, setting: image, [0]),
        "Richardson-Lucy": (richardson_lucy, [1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 30]),
        "Wiener": (wiener, [10**e for e in np.arange(-3, 2.1, 0.25)]),
        "total variation": (total_variation, [0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3]),
    }


def inner(image: np.ndarray) -> np.ndarray:
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def mean_metrics(images: list[np.ndarray], truths: list[np.ndarray]) -> dict[str, float]:
    rows = [restoration_metrics(inner(i), inner(t), data_range=DATA_RANGE) for i, t in zip(images, truths, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def restore(args: argparse.Namespace) -> None:
    """The table: each classical method at the setting that is best on the very windows that are scored."""
    output = Path(args.output_dir)
    family = MicroscopyUNet(pretrained_model_name_or_path=args.model_path)
    pipeline = family.load_pipeline()
    optics = ForwardModel(**pipeline.config.optics)
    windows = held_out_windows(output / "images", optics, args.windows)
    start, cpu = time.perf_counter(), time.process_time()
    results: dict[str, dict[str, Any]] = {}
    drawn: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}
    shown: list[tuple[str, list[np.ndarray]]] = []
    for name, pairs in windows.items():
        truths, measured = ([pair[side] for pair in pairs] for side in (0, 1))
        table: dict[str, Any] = {}
        best: dict[str, np.ndarray] = {}
        for method, (restore_one, settings) in classical(optics).items():
            tried = [[restore_one(image[0], setting)[None] for image in measured] for setting in settings]
            scores = [mean_metrics(images, truths) for images in tried]
            by_psnr = int(np.argmax([score["psnr"] for score in scores]))
            table[method] = scores[by_psnr] | {"setting": settings[by_psnr], "ssim": max(s["ssim"] for s in scores)}
            best[method] = tried[by_psnr][0]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            found = pipeline(
                np.stack(measured), num_samples=args.num_samples, num_inference_steps=args.num_inference_steps,
                sampler=args.sampler, tile_size=WINDOW, batch_size=16, self_ensemble=args.self_ensemble,
            ).samples.float().numpy()  # fmt: skip
        table[f"mean of {args.num_samples}"] = mean_metrics(list(found.mean(axis=0)), truths)
        table["one sample"] = mean_metrics(list(found[0]), truths)
        table["calibration"] = calibration(inner(found), inner(np.stack(truths)))
        drawn[name] = found, truths
        results[name] = {"windows": len(pairs)} | table
        views = [measured[0], *(best[m] for m in list(best)[1:]), found.mean(axis=0)[0], found[0][0], found[1][0]]
        shown.append((name, [*views, 3 * found.std(axis=0)[0], truths[0]]))
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    specimens = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["eval_specimens"]
    together = [name for name in windows if name not in specimens]
    samples = np.concatenate([drawn[name][0] for name in together], axis=1)
    truth = np.stack([t for name in together for t in drawn[name][1]])
    results["held-out regions together"] = {
        method: {
            metric: float(np.mean([results[name][method][metric] for name in together]))
            for metric in ("psnr", "ssim", "power_spectrum_error", "histogram_distance")
        }
        for method in results[together[0]]
        if method not in ("windows", "calibration")
    } | {"calibration": calibration(inner(samples), inner(truth))}
    results["seconds"] = {"wall": time.perf_counter() - start, "processor": time.process_time() - cpu}
    output.mkdir(parents=True, exist_ok=True)
    (output / "microscopy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "microscopy.md").write_text(markdown(results), encoding="utf-8")
    contact_sheet(shown).save(output / "microscopy.png")
    print(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/results.md."""
    lines = list(HEADS)
    ends = ["", "| image | MSE ratio (1.88) | rank correlation | 90 % interval covers |", "| --- | --- | --- | --- |"]
    for name, table in results.items():
        if name == "seconds":
            continue
        for method, score in table.items():
            if method not in ("windows", "calibration"):
                numbers = f"{score['psnr']:.2f} | {score['ssim']:.3f} | {score['power_spectrum_error']:.2f}"
                lines.append(f"| {name} | {method} | {numbers} | {score['histogram_distance']:.4f} |")
        honest = table["calibration"]
        numbers = f"{honest['ratio']:.2f} | {honest['rank_correlation']:.2f} | {honest['coverage']:.1%}"
        ends.append(f"| {name} | {numbers} |")
    return "\n".join([*lines, *ends]) + "\n"


def contact_sheet(rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    """A row an image: measured, classical, mean, two samples, 3 x spread, truth."""
    scale, top = 2, 18
    sheet = Image.new("L", (len(TITLES) * WINDOW * scale, top + len(rows) * WINDOW * scale), 255)
    for column, title in enumerate(TITLES):
        ImageDraw.Draw(sheet).text((column * WINDOW * scale + 4, 3), title, fill=0)
    for line, (_, images) in enumerate(rows):
        truth = images[-1]
        low, high = truth.min(), truth.max()
        for column, image in enumerate(images):
            shift = 0 if column == len(images) - 2 else low
            values = np.clip((image[0] - shift) / (high - low) * 255, 0, 255).astype(np.uint8)
            view = Image.fromarray(values).resize((WINDOW * scale, WINDOW * scale), Image.Resampling.NEAREST)
            sheet.paste(view, (column * WINDOW * scale, top + line * WINDOW * scale))
    return sheet


# -- tiles ---------------------------------------------------------------------------------------------------------


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_memory(args: argparse.Namespace) -> None:
    """In a process of its own: what sampling needs on top of the loaded pipeline, KiB."""
    pipeline = MicroscopyUNet(pretrained_model_name_or_path=args.model_path).load_pipeline()
    small = np.zeros((1, 1, 32, 32), np.float32)
    pipeline(small, num_inference_steps=2)  # libraries, caches
    before = peak_kib()
    options: dict[str, Any] = {"tile_size": TILE, "tile_overlap": OVERLAP, "batch_size": args.batch_size}
    images = (
        large_image(args.output_dir, pipeline) if args.large else np.zeros((args.batch_size, 1, TILE, TILE), np.float32)
    )
    pipeline(images, num_inference_steps=2, **options)
    print(json.dumps(peak_kib() - before))


def large_image(folder: str, pipeline: Any) -> np.ndarray:
    """1024 x 1024 of the retina, measured."""
    from sciflow_hf.images.files import read_image

    sharp = read_image(microscope_images(Path(folder) / "images") / "retina.tif").planes
    sharp = sharp[:, :, 200 : 200 + LARGE, 200 : 200 + LARGE]
    optics = ForwardModel(**pipeline.config.optics)
    return optics.measure(torch.from_numpy(sharp.astype(np.float32)), [0]).numpy()


def seam(image: np.ndarray, borders: set[int]) -> float:
    """Mean gradient across the tiles' borders over that elsewhere, along the last axis."""
    gradient = np.abs(np.diff(image, axis=-1)).mean(axis=tuple(range(image.ndim - 1)))
    inside = np.array([i + 1 in borders for i in range(len(gradient))])
    return float(gradient[inside].mean() / gradient[~inside].mean())


def tiles(args: argparse.Namespace) -> None:
    """Memory of a large image over that of one batch of tiles, and the gradient across borders of tiles."""
    from sciflow_hf.images.tiles import tile_starts

    base = [sys.executable, "-m", "tests.benchmarks.microscopy", "memory", "--model_path", args.model_path]
    base += ["--output_dir", args.output_dir, "--batch_size", str(args.batch_size)]
    peaks = {}
    for name, extra in (("one batch of tiles", []), (f"{LARGE} x {LARGE}", ["--large"])):
        done = subprocess.run([*base, *extra], capture_output=True, text=True, check=True, env=dict(os.environ))
        peaks[name] = int(done.stdout.split()[-1]) / 1024
    pipeline = MicroscopyUNet(pretrained_model_name_or_path=args.model_path).load_pipeline()
    measured = large_image(args.output_dir, pipeline)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        found = pipeline(
            measured, num_inference_steps=args.num_inference_steps, tile_size=TILE, tile_overlap=OVERLAP,
            batch_size=args.batch_size,
        ).samples[0, 0].float().numpy()  # fmt: skip
    starts = tile_starts(LARGE, TILE, OVERLAP)
    borders = {s for s in starts if s} | {s + TILE for s in starts if s + TILE < LARGE}
    low, high = peaks.values()
    report = {
        "memory_mib": peaks,
        "memory_ratio": high / low,
        "seam_columns": seam(found, borders),
        "seam_rows": seam(found.swapaxes(-1, -2), borders),
        "seam_of_the_input": seam(measured, borders),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("restore", restore), ("tiles", tiles), ("memory", measure_memory)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--model_path", required=True)
        command.add_argument("--output_dir", default="outputs/microscopy_results")
        command.add_argument("--num_samples", type=int, default=16)
        command.add_argument("--num_inference_steps", type=int, default=100)
        command.add_argument("--sampler", default="ddpm")
        command.add_argument("--windows", type=int, default=8, help="of each image")
        command.add_argument("--batch_size", type=int, default=16)
        command.add_argument("--self_ensemble", action="store_true")
        command.add_argument("--large", action="store_true")
        command.add_argument("--bf16", action="store_true", help="autocast, twice as fast where the CPU has AMX")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
