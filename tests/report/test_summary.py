"""What the console says at the end of a run."""

import math
from types import SimpleNamespace

import pytest
import torch

from sciflow_hf.report.summary import summary


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.09, "0.0100 to 0.0900: better)"),
        (0.0, 0.09, "no clear difference)"),
        (-0.01, 0.09, "-0.0100 to 0.0900: no clear difference)"),
        (-0.09, -0.01, "-0.0900 to -0.0100: worse)"),
    ],
)
def test_better_or_worse_is_said_only_where_the_interval_excludes_zero(tmp_path, low, high, words):
    metrics = {"eval_loss": 0.35, "eval_base_loss": 0.4, "eval_gain": 0.05}
    history = [metrics | {"eval_gain_low": low, "eval_gain_high": high}]
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            output_dir=str(tmp_path), push_to_hub=False, validation_prompts=[], validation_source_images=[]
        ),
        state=SimpleNamespace(global_step=7, log_history=history),
        optimizer=None,
        model=torch.nn.Linear(1, 1),
        family=SimpleNamespace(component="transformer", task="text-to-image", max_sources=0),
    )
    line = summary(trainer).splitlines()[0].partition(". ")[2]
    assert line.startswith("Held-out loss: 0.4000 base model, 0.3500 now; gain 0.0500 (95 % interval") and words in line
    history[0] = metrics
    assert "(fewer than 10 held-out groups of like size: no interval)" in summary(trainer)
    kinds = {
        "eval_gain_edit": 0.07,
        "eval_gain_edit_low": 0.01,
        "eval_gain_edit_high": 0.1,
        "eval_gain_generation": 0.02,
    }
    history[0] = metrics | kinds
    told = "; edits 0.0700 (95 % interval 0.0100 to 0.1000: better); figures drawn from text 0.0200 (no interval)"
    assert told in summary(trainer)
    for gain in (math.nan, math.inf):
        history[0] = metrics | {"eval_gain": gain, "eval_gain_low": math.nan, "eval_gain_high": math.nan}
        assert f"gain {gain} (losses of held-out rows are not finite: no interval)" in summary(trainer)
