"""`--figure_metrics`: scores of validation images in evaluations, against the files that validation writes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.errors import SciflowError

OPTIONS: dict[str, Any] = dict(
    validation_prompts=["a chart", "a plot"], validation_seeds=[1, 2], num_inference_steps=1, validation_size=[16, 32],
    eval_strategy="steps", eval_steps=2, validation_steps=2, max_steps=4, learning_rate=0.05,
)  # fmt: skip


def light(prompts: Sequence[str], images: Sequence[Image.Image], width: Sequence[int]) -> list[float]:
    assert set(width) == {32}
    return [float(np.asarray(image).mean()) for image in images]


def picky(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    if "a plot" in prompts:
        raise RuntimeError("no plots")
    return [2.0] * len(prompts)


def test_means_of_what_validation_draws(family: Any, tiny_cache: Path, tmp_path: Path) -> None:
    metrics = [f"{__name__}.light", f"{__name__}.picky", "blank"]
    trainer = make_trainer(
        tmp_path, family, tiny_cache, eval_fraction=0.3, figure_metrics=metrics, compute_metrics=lambda _: {"own": 3.0},
        save_strategy="steps", save_steps=2, metric_for_best_model="eval_light", greater_is_better=False, **OPTIONS,
    )  # fmt: skip
    trainer.train()
    found = {entry["step"]: entry for entry in trainer.state.log_history if "eval_light" in entry}
    assert {2, 4} <= found.keys()
    for step in (2, 4):
        files = sorted((tmp_path / "validation" / f"step-{step:06d}").glob("*.png"))
        assert len(files) == 4
        assert found[step]["eval_light"] == pytest.approx(np.mean([np.asarray(Image.open(f)).mean() for f in files]))
        assert found[step]["eval_picky"] == 2 and found[step]["eval_blank"] == 1 and found[step]["eval_own"] == 3
    assert found[2]["eval_light"] != found[4]["eval_light"]
    assert trainer.state.best_metric == min(found[step]["eval_light"] for step in (2, 4))


@pytest.mark.parametrize(
    ("metrics", "held_out", "said"),
    [
        (["chart_count"], 0.3, "`figure_metrics` chart_count has a score on none of 4 validation images"),
        (["nothing"], 0.3, "`reward` 'nothing' is unknown"),
        (["blank"], 0, "`figure_metrics` are measured in evaluations, for which there is no held-out data"),
    ],
)
def test_mistakes(
    family: Any, tiny_cache: Path, tmp_path: Path, metrics: list[str], held_out: float, said: str
) -> None:
    options = OPTIONS if held_out else OPTIONS | {"eval_strategy": "no"}
    with pytest.raises(SciflowError, match=said):
        make_trainer(tmp_path, family, tiny_cache, eval_fraction=held_out, figure_metrics=metrics, **options).evaluate()


def test_without_prompts_or_packages(family: Any, tiny_cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(SciflowError, match="`figure_metrics` are scores of `validation_prompts`"):
        sf.DiffusionTrainingArguments(output_dir=str(tmp_path), figure_metrics=["blank"], use_cpu=True)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(SciflowError, match="SSIM needs scikit-image"):
        make_trainer(tmp_path, family, tiny_cache, eval_fraction=0.3, figure_metrics=["edits"], **OPTIONS)
