"""Rewards for texts that a row names in quotes, lists in its rubric, or shows in its reference image."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from .ocr import character_error_rate, levenshtein, quoted_texts, read_once, word_accuracy
from .pictures import opened

Column = Sequence[Any] | None


def ocr_word_accuracy(
    prompts: Sequence[str], images: Sequence[Image.Image], rubric_text: Column = None, reference: Column = None
) -> list[float | None]:
    """Share of the wanted words that are read, see `word_accuracy`; None for a row without texts.

    Args:
        prompts: the texts in their quotes are wanted, unless the row has a rubric.
        images: in RGB.
        rubric_text: of each a list of {text, location} or of texts, or that as JSON: it goes before the quotes.
        reference: of each a picture, see `opened`; what is read in it is wanted where nothing else says.
    """
    return _compare(word_accuracy, prompts, images, rubric_text, reference)


def ocr_character_error(
    prompts: Sequence[str], images: Sequence[Image.Image], rubric_text: Column = None, reference: Column = None
) -> list[float | None]:
    """Character error rate of the wanted texts, see `character_error_rate`: 0 is best. Arguments as above."""
    return _compare(character_error_rate, prompts, images, rubric_text, reference)


def ocr_edit_distance(
    prompts: Sequence[str], images: Sequence[Image.Image], rubric_text: Column = None, reference: Column = None
) -> list[float | None]:
    """Normalised edit distance of the wanted texts, see `edit_distance`: 0 is best. Arguments as above."""
    return _compare(edit_distance, prompts, images, rubric_text, reference)


def edit_distance(texts: Sequence[str], read: Sequence[str]) -> float:
    """Levenshtein distance of each of `texts` to the nearest line of `read`, over the longer of both; their mean.

    0 to 1, in lower case and without spaces. Further lines cost nothing.
    """
    bare = [_bare(line) for line in read] or [""]
    found = [min(levenshtein(text, line) / max(len(text), len(line)) for line in bare) for text in map(_bare, texts)]
    return sum(found) / len(found)


def wanted_texts(prompt: str, rubric_text: Any = None, reference: Any = None) -> list[str]:
    """The texts that an image should show: of the rubric, else in the prompt's quotes, else read in the reference.

    Raises:
        ValueError: a rubric that is no list of texts.
    """
    if isinstance(rubric_text, str) and rubric_text.strip():
        rubric_text = json.loads(rubric_text)
    if rubric_text is not None and rubric_text == rubric_text and not isinstance(rubric_text, str):
        cells: list[Any] = [cell.get("text") if isinstance(cell, Mapping) else cell for cell in rubric_text]
        if not all(isinstance(cell, str) for cell in cells):
            raise ValueError(f'`rubric_text` {rubric_text!r:.80} is no list of texts or of {{"text": "..."}}')
        if texts := [cell for cell in cells if _bare(cell)]:
            return texts
    if texts := quoted_texts(prompt):
        return texts
    return [line for line in read_once(opened(reference)) if _bare(line)] if reference is not None else []


def _compare(
    score: Callable[[Sequence[str], Sequence[str]], float],
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    rubric_text: Column,
    reference: Column,
) -> list[float | None]:
    none = [None] * len(prompts)
    wanted = map(wanted_texts, prompts, rubric_text or none, reference or none)
    return [score(texts, read_once(image)) if texts else None for texts, image in zip(wanted, images, strict=True)]


def _bare(text: str) -> str:
    return "".join(text.lower().split())
