"""Texts in images, read by RapidOCR (the extra `ocr`): a reward for texts in quotes in the prompt, and error rates."""

import functools
import hashlib
import importlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...errors import SciflowError

_LONGEST_SIDE = 1536  # pixels of what is searched for text; found text is read at full size
_UPSIDE_DOWN = 0.98  # certainty at which a text is turned round: at 0.9 some upright words are, at 1 no axis label
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|「([^」]*)」')


def ocr(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[float | None]:
    """How well each image shows the texts in quotes of its prompt, as Flow-GRPO (2505.05470) scores it.

    Of several texts it is the mean of `text_score`; None for a prompt without quotes.

    Args:
        prompts: texts in quotes are those between "...", “...”, „...“, «...» or 「...」.
        images: in RGB.

    Raises:
        SciflowError: RapidOCR is not installed.
    """

    def score(prompt: str, image: Image.Image) -> float | None:
        texts = quoted_texts(prompt)
        if not texts:
            return None
        read = "".join(read_once(image))
        return sum(text_score(text, read) for text in texts) / len(texts)

    return [score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]


def quoted_texts(prompt: str) -> list[str]:
    """The texts in quotes, straight or typographic, that are not empty."""
    found = ("".join(groups).strip() for groups in _QUOTED.findall(prompt))
    return [text for text in found if text]


def read_texts(image: Image.Image) -> list[str]:
    """The lines of text that RapidOCR reads in an image in RGB, from the top.

    Raises:
        SciflowError: RapidOCR is not installed.
    """
    return list(_engine()(np.asarray(image.convert("RGB"))[:, :, ::-1]).txts or ())


class _Pixels:
    """An image that is told apart by its pixels."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image.convert("RGB")
        self.digest = hashlib.sha256(f"{image.size}".encode() + self.image.tobytes()).digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pixels) and self.digest == other.digest


def read_once(image: Image.Image) -> list[str]:
    """As `read_texts`, but an image that was read lately is not read again: several rewards ask of each."""
    return _read_once(_engine(), _Pixels(image))


@functools.lru_cache(maxsize=64)
def _read_once(engine: Any, pixels: _Pixels) -> list[str]:
    return read_texts(pixels.image)


def text_score(text: str, read: str) -> float:
    """1 - d / len(text): d is 0 if `read` contains the text, else their Levenshtein distance, at most len(text).

    Both in lower case and without spaces.
    """
    text, read = _bare(text), _bare(read)
    return 1.0 if text in read else 1 - min(levenshtein(text, read), len(text)) / len(text)


def word_accuracy(texts: Sequence[str], read: Sequence[str]) -> float:
    """Share of the words of `texts` that are among those of `read`, whatever their case; at least one is wanted.

    A word that is wanted twice has to be read twice.
    """
    wanted, found = (Counter(" ".join(lines).lower().split()) for lines in (texts, read))
    return (wanted & found).total() / wanted.total()


def character_error_rate(texts: Sequence[str], read: Sequence[str]) -> float:
    """Edits that each of `texts` needs to stand somewhere in `read`, over all their characters: 0 to 1.

    In lower case and without spaces. Further texts that were read, and their order, cost nothing. At least one
    character is wanted.
    """
    bare, found = [_bare(text) for text in texts], _bare("".join(read))
    return sum(levenshtein(text, found, anywhere=True) for text in bare) / sum(map(len, bare))


def levenshtein(text: str, read: str, *, anywhere: bool = False) -> int:
    """Least number of characters to insert, delete or replace; `anywhere`: to make it a part of `read`."""
    above = [0] * (len(read) + 1) if anywhere else list(range(len(read) + 1))
    for i, wanted in enumerate(text, 1):
        row = [i]
        for j, found in enumerate(read, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (wanted != found)))
        above = row
    return min(above) if anywhere else above[-1]


def _bare(text: str) -> str:
    return "".join(text.lower().split())


@functools.cache
def _engine() -> Any:
    """RapidOCR with the models of its wheel."""
    try:
        rapidocr = importlib.import_module("rapidocr")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise SciflowError(
            f"texts are read by RapidOCR, which cannot be imported ({error}): pip install 'sciflow_hf[ocr]', or "
            "pip install rapidocr onnxruntime."
        ) from error
    import torch

    params = {
        "Global.log_level": "error",
        # a small page is not enlarged until its shorter side has 736 pixels: as well read, and eight times faster
        "Det.limit_type": "max",
        "Det.limit_side_len": _LONGEST_SIDE,
        "Cls.cls_thresh": _UPSIDE_DOWN,
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
    }
    return rapidocr.RapidOCR(params=params)
