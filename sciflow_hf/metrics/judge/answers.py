"""Answers of a judge: their schema, found in whatever text stands around them, and a folder that keeps them."""

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...files import write_json
from .scoring import WEIGHTS, Answer, Error

logger = logging.getLogger(__name__)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"d": {"type": "string"}, "s": {"type": "string", "enum": list(WEIGHTS)}},
                "required": ["d", "s"],
                "additionalProperties": False,
            },
        },
        "broken": {"type": "boolean"},
    },
    "required": ["errors", "broken"],
    "additionalProperties": False,
}


class NoAnswerError(Exception):
    """A call that failed, or whose text holds no answer: costs one axis of one image. The message says why."""


@dataclass(frozen=True)
class Question:
    """One call: an axis of one drawn image.

    Attributes:
        axis: component, arrow or text.
        system: what the judge is told for every axis.
        request: what it is asked on this one, with the prompt and the elements.
        pictures: the reference, if there is one, and the drawn image: see `picture`.
        digest: of their pixels.
        tokens: that the call will take, roughly.
    """

    axis: str
    system: str
    request: str
    pictures: Sequence[Any]
    digest: str = ""
    tokens: int = 0

    def images(self) -> list[Image.Image]:
        """The pictures in RGB."""
        return [picture(one) for one in self.pictures]

    def key(self, model: str, version: str) -> str:
        """Names the answer by all that decides it: pixels, words, model, and the version of the rubric."""
        parts = [self.digest, self.axis, self.system, self.request, model, version]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def picture(source: Any) -> Image.Image:
    """An image in RGB, on white where it is transparent.

    Args:
        source: of PIL, the name or the bytes of an image file, or a cell of `datasets` with either.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source["path"]
    if not isinstance(source, Image.Image):
        source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if not source.has_transparency_data:
        return source.convert("RGB")
    drawn = source.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def read_answer(text: str) -> Answer:
    """The last JSON object in `text` that is an answer: {"errors": [{"d": ..., "s": ...}], "broken": false}.

    Prose and code fences around it do not matter. If an object after it does not end, the text was cut off, and is
    refused, not mended.

    Raises:
        NoAnswerError: there is none.
    """
    if not text.strip():
        raise NoAnswerError("the answer is empty")
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found = _answer_of(value) or found
        except (ValueError, RecursionError):
            found, end = None, at + 1
        at = text.find("{", end)
    if found is None:
        raise NoAnswerError(f"the answer holds no complete list of errors in JSON: {' '.join(text.split())[:120]!r}")
    return found


def _answer_of(value: Any) -> Answer | None:
    errors, broken = value.get("errors"), value.get("broken", False)
    if not isinstance(errors, list) or not isinstance(broken, bool):
        return None
    if not all(isinstance(e, dict) and isinstance(e.get("d"), str) and isinstance(e.get("s"), str) for e in errors):
        return None
    return Answer(tuple(Error(error["d"], error["s"]) for error in errors), broken)


@dataclass(frozen=True)
class AnswerCache:
    """Answers on disk, a file each, so that a question is paid for once."""

    folder: Path

    def get(self, key: str) -> Answer | None:
        """The kept answer; None where there is none that can be read, which is then asked for again."""
        file = self._file(key)
        try:
            answer = _answer_of(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            logger.warning("%s: cannot be read (%s); the judge is asked again.", file, error)
            return None
        if answer is None:
            logger.warning("%s: is no answer of a judge; the judge is asked again.", file)
        return answer

    def put(self, key: str, answer: Answer) -> None:
        errors = [{"d": error.description, "s": error.severity} for error in answer.errors]
        write_json(self._file(key), {"errors": errors, "broken": answer.broken})

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
