"""Texts in images: quotes of a prompt, the score of Flow-GRPO, error rates; the engine reads what the test says."""

import functools
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from words import WORDS, page_of_words

from sciflow_hf.errors import SciflowError
from sciflow_hf.metrics.rewards import ocr
from sciflow_hf.metrics.rewards.base import load_rewards, score_images

PAGE = Image.new("RGB", (32, 32), (10, 20, 30))
Reads = Callable[..., list[np.ndarray]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Makes the engine read these lines; returns the arrays that it is shown."""

    def read(*lines: str) -> list[np.ndarray]:
        shown: list[np.ndarray] = []

        def engine(pixels: np.ndarray) -> SimpleNamespace:
            shown.append(pixels)
            return SimpleNamespace(txts=lines or None)

        monkeypatch.setattr(ocr, "_engine", lambda: engine)
        return shown

    return read


def edits(text: str, read: str) -> int:
    """By definition."""

    @functools.cache
    def least(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        return min(least(i - 1, j) + 1, least(i, j - 1) + 1, least(i - 1, j - 1) + (text[i - 1] != read[j - 1]))

    return least(len(text), len(read))


def test_edits() -> None:
    rng = random.Random(0)
    for _ in range(150):
        text, read = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        assert ocr.levenshtein(text, read) == edits(text, read)
        parts = [read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)]
        assert ocr.levenshtein(text, read, anywhere=True) == min(edits(text, part) for part in parts)


def test_score_of_flow_grpo() -> None:
    rng = random.Random(1)
    for _ in range(100):
        text, read = ("".join(rng.choices("aB c", k=rng.randrange(1, 9))) for _ in range(2))
        wanted, found = (s.replace(" ", "").lower() for s in (text, read))
        if wanted:
            distance = 0 if wanted in found else edits(wanted, found)
            assert ocr.text_score(text, read) == 1 - min(distance, len(wanted)) / len(wanted)
    assert ocr.text_score("Loss Curve", "the LOSSCURVE of") == 1 and ocr.text_score("ab", "xyzuvw") == 0


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('A box "Encoder" and a box "Decoder 2"', ["Encoder", "Decoder 2"]),
        ("Ein Kasten „Regler“, a box “Plant”, «Capteur» and „Mixed”", ["Regler", "Plant", "Capteur", "Mixed"]),
        ("「センサ」", ["センサ"]),
        ("It's 5\" wide", []),
        ('An empty "" and a " " one', []),
        ('"say “hi” here"', ["say “hi” here"]),
        ("no quotes at all, 'single' ones apart", []),
    ],
)
def test_quotes(prompt: str, texts: list[str]) -> None:
    assert ocr.quoted_texts(prompt) == texts


def test_the_reward(reads: Reads) -> None:
    """The mean over the texts in quotes; None without any, whose image is not read; an image is read once, as BGR."""
    shown = reads("Encoder", "decodr")
    scores = ocr.ocr(['"encoder" to "DECODER"', "no quotes", '"xyz"'], [PAGE] * 3)
    decoder = 1 - min(7, edits("decoder", "encoderdecodr")) / 7
    assert scores == [pytest.approx((1 + decoder) / 2), None, 0.0]
    assert [tuple(pixels[0, 0]) for pixels in shown] == [(30, 20, 10)]
    reads()
    assert ocr.read_texts(PAGE) == [] and ocr.ocr(['"a"'], [PAGE]) == [0.0]


def test_no_prompt_with_quotes_is_an_error(reads: Reads) -> None:
    reads("a")
    rewards = load_rewards(["ocr"])
    some = score_images(rewards, ['"a"', "none"], [PAGE] * 2)
    some.check(["a.png", "b.png"])
    assert some.table(rewards) == {"ocr": [1.0, None], "reward": [1.0, None]}
    with pytest.raises(SciflowError, match="`reward` ocr applies to none of 2 images: it needs texts in quotes"):
        score_images(rewards, ["no", "none"], [PAGE] * 2).check(["a.png", "b.png"])


def test_error_rates() -> None:
    texts = ["Loss curve", "Epoch"]
    assert ocr.word_accuracy(texts, ["epoch loss", "Curves"]) == pytest.approx(2 / 3)
    assert ocr.word_accuracy(["a a b"], ["a b b"]) == pytest.approx(2 / 3)
    assert ocr.character_error_rate(texts, ["EPOCH", "other words", "Losscurve"]) == 0
    assert ocr.character_error_rate(texts, ["Epch", "lass curve"]) == pytest.approx(2 / 14)
    assert ocr.character_error_rate(texts, []) == 1


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call tells how to install it, and the run ends at once."""
    ocr._engine.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(SciflowError, match=r"cannot be imported .*: pip install 'sciflow_hf\[ocr\]'"):
        score_images(load_rewards(["ocr"]), ['"a"'], [PAGE])


@pytest.mark.acceptance
def test_drawn_words_are_read() -> None:
    """By RapidOCR itself: of 36 words a size at most one in fifty wrong, and nothing where nothing is left to read."""
    sizes = (16, 24)
    right = [ocr.word_accuracy(WORDS, ocr.read_texts(page_of_words(size))) for size in sizes]
    assert sum(right) / len(sizes) >= 0.98
    assert ocr.word_accuracy(WORDS, ocr.read_texts(page_of_words(8, blur=2))) < 0.2
    assert ocr.read_texts(Image.new("RGB", (96, 64), "white")) == []
    up = page_of_words(16).rotate(90, expand=True)  # as labels of y axes are written
    assert ocr.word_accuracy(WORDS, ocr.read_texts(up)) > 0.8
