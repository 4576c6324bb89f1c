"""Folders of evaluations, as `sciflow-hf evaluate` writes them, with drawn images and made-up scores."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

HOSTILE = [
    '</script><script>alert("x")</script><!-- " & \' `${1}` \\u003c',
    "\u202eرسم بياني شريطي بثلاثة أعمدة زرقاء",
    "A flow chart whose caption never ends, " + "with another box and another arrow, " * 60,
    "Unbroken" + "x" * 400,
    "",
]
COLOURS = ["#3b6fa0", "#2aa876", "#c98f00", "#b0413e", "#7a4fa3"]
METRICS = ("ocr", "character_error_rate")


def write_evaluation(
    folder: Path,
    *,
    prompts: int = 6,
    models: tuple[str, ...] = ("base", "lora"),
    size: tuple[int, int] = (96, 64),
    given: bool = True,
    hostile: bool = True,
) -> list[dict[str, Any]]:
    """Writes images, scores and summary; `given`: with a source and a reference. Returns the rows of the scores."""
    luck, records = random.Random(0), []
    for row in range(prompts):
        bars = [luck.random() for _ in range(luck.randint(3, 6))]
        colour = luck.choice(COLOURS)
        prompt = f"A bar chart with {len(bars)} bars, number {row}"
        if hostile and row < len(HOSTILE):
            prompt = HOSTILE[row]
        if given:
            _draw(folder / f"sources/{row}.png", size, bars, "#9aa5b1")
            _draw(folder / f"references/{row}.png", size, bars, colour)
        for number, model in enumerate(models):
            right = min(1.0, 0.35 + 0.3 * number + 0.4 * luck.random())
            heights = [min(1, max(0.05, bar + (1 - right) * luck.uniform(-1, 1))) for bar in bars]
            _draw(folder / f"images/{model}/{row}.png", size, heights, colour)
            records.append(
                {
                    "row": row,
                    "model": model,
                    "prompt": prompt,
                    "image": f"images/{model}/{row}.png",
                    "reference": f"references/{row}.png" if given else None,
                    "sources": [f"sources/{row}.png"] if given else [],
                    "seed": row,
                    "width": size[0],
                    "height": size[1],
                    "ocr": right,
                    "character_error_rate": float("nan") if row == 1 else 1 - right**2,
                    "incomplete": row == 2,
                    "kind": "bar chart",
                    "training_image": "paper.png" if model == "lora" and row == 3 else None,
                }
            )
    pq.write_table(pa.Table.from_pylist(records), folder / "scores.parquet")
    means = {"mean": 0.5, "low": 0.4, "high": 0.6, "number": prompts}
    change = {"difference": 0.3, "low": 0.1, "high": 0.5}
    summary = {
        "models": list(models),
        "metrics": {metric: dict.fromkeys(models, means) for metric in METRICS},
        "paired": {metric: dict.fromkeys(models[1:], change) for metric in METRICS},
        "lower_is_better": ["character_error_rate"],
        "copies": {"lora": [{"image": "images/lora/3.png", "training_image": "paper.png", "similarity": 0.99}]},
        "incomplete": {"base": 1, "lora": 0},
        "options": {"num_inference_steps": 16, "seed": 0, "api_key": "hf_" + "x" * 30},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return records


def _draw(file: Path, size: tuple[int, int], heights: list[float], colour: str) -> None:
    image = Image.new("RGB", size, "white")
    pen, (width, height) = ImageDraw.Draw(image), size
    step = 0.84 * width / len(heights)
    for i, value in enumerate(heights):
        left = 0.1 * width + i * step
        pen.rectangle((left, height * (0.92 - 0.84 * value), left + 0.7 * step, height * 0.92), fill=colour)
    pen.line((0.07 * width, 0.05 * height, 0.07 * width, 0.92 * height, 0.97 * width, 0.92 * height), fill="black")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
