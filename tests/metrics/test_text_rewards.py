"""Rewards for texts: where the wanted ones come from, error rates by hand, and one reading for all of them."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sciflow_hf.metrics.rewards import ocr, texts
from sciflow_hf.metrics.rewards.base import GROUPS, load_rewards, score_images

READ = {10: ["Loss curve", "Epoch"], 20: ["loss curve", "step 2"], 30: []}
"""Grey of a page -> the lines on it."""


def page(grey: int) -> Image.Image:
    return Image.new("RGB", (16, 8), (grey, grey, grey))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pages that the engine was shown."""
    found: list[int] = []

    def engine(pixels: np.ndarray) -> SimpleNamespace:
        found.append(int(pixels[0, 0, 0]))
        return SimpleNamespace(txts=READ[found[-1]] or None)

    monkeypatch.setattr(ocr, "_engine", lambda: engine)
    return found


def test_what_is_wanted(shown: list[int], tmp_path: Any) -> None:
    """A rubric goes before quotes, and quotes before the reference."""
    page(10).save(tmp_path / "reference.png")
    rubric = [{"text": "Encoder", "location": "left"}, "Decoder", {"text": " "}]
    for given in (rubric, json.dumps(rubric)):
        assert texts.wanted_texts('draw "x"', given, tmp_path / "reference.png") == ["Encoder", "Decoder"]
    for empty in (None, "", "[]", [], float("nan")):
        assert texts.wanted_texts('draw "x" and “y z”', empty, page(10)) == ["x", "y z"]
    assert not shown
    assert texts.wanted_texts("draw", None, str(tmp_path / "reference.png")) == ["Loss curve", "Epoch"] and shown == [
        10
    ]
    assert texts.wanted_texts("draw") == []


def test_scores_by_hand(shown: list[int]) -> None:
    """Wanted are "Loss curve" and "Epoch"; read is "loss curve" and "step 2"; each page is read once."""
    rewards = load_rewards(GROUPS["ocr"])
    prompts, images = ['"Loss curve" over "Epoch"', "no texts", '"Loss curve"'], [page(20), page(20), page(30)]
    found = score_images(rewards, prompts, images, {"reference": [None, None, None]}).columns
    assert found["ocr_word_accuracy"] == [2 / 3, None, 0]
    distance = ocr.levenshtein("epoch", "losscurvestep2", anywhere=True)
    assert found["ocr_character_error"] == [pytest.approx(distance / 14), None, 1] and 0 < distance < 5
    nearest = min(ocr.levenshtein("epoch", "losscurve") / 9, ocr.levenshtein("epoch", "step2") / 5)
    assert found["ocr_edit_distance"] == [pytest.approx((0 + nearest) / 2), None, 1] and nearest < 1
    assert found["ocr"][1:] == [None, 0] and shown == [20, 30]


def test_a_rubric_that_is_none_is_a_failure_of_its_row(shown: list[int]) -> None:
    cells = ["[1]", "{", None]
    scores = score_images(load_rewards(["ocr_word_accuracy"]), ['"a"'] * 3, [page(10)] * 3, {"rubric_text": cells})
    assert [failure.row for failure in scores.failures] == [0, 1] and scores.columns["ocr_word_accuracy"][2] == 0
    assert "`rubric_text` [1] is no list of texts" in scores.failures[0].reason
