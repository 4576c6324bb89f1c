"""Rubrics: what a judge is told on each axis, from a YAML file, and the elements of a prompt in words."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import SciflowError
from .scoring import AXES

COLUMNS = {"component": "rubric_components", "arrow": "rubric_arrows", "text": "rubric_text"}
SHIPPED = Path(__file__).parents[2] / "assets" / "judge_rubric.yaml"
_EXAMPLES = {
    "component": '{"name": "encoder", "description": "two stacked boxes"}',
    "arrow": '{"source": "encoder", "target": "decoder", "label": "features"}',
    "text": '{"text": "Encoder", "location": "in the left box"}',
}
PROMPT_LENGTH = 300  # characters of the prompt that a judge is shown, as published

_FIELDS = ("prompt", "images", "elements", "number")
_IMAGES = {
    True: "The first image is the reference, the second is the drawn image. Judge the drawn one.",
    False: "The image is the drawn one; there is no reference.",
}


@dataclass(frozen=True)
class Rubric:
    """The texts of a rubric.

    Attributes:
        system: what holds for every axis.
        listed: axis -> request for prompts that come with elements of the axis.
        unlisted: axis -> request for those without.
        version: of these texts; changes with any of them.
    """

    system: str
    listed: Mapping[str, str]
    unlisted: Mapping[str, str]
    version: str

    def request(self, axis: str, prompt: str, elements: Sequence[str], *, reference: bool) -> str:
        """The request on one axis, about the drawn image and perhaps a reference."""
        template = (self.listed if elements else self.unlisted)[axis]
        values = {
            "prompt": prompt[:PROMPT_LENGTH],
            "images": _IMAGES[reference],
            "elements": "\n".join(f"{number}. {element}" for number, element in enumerate(elements, 1)),
            "number": str(len(elements)),
        }
        return re.sub(rf"{{({'|'.join(_FIELDS)})}}", lambda found: values[found[1]], template)


def read_rubric(file: str | Path | None = None) -> Rubric:
    """The rubric of a YAML file; the one that comes with the package if none is named.

    Raises:
        SciflowError: the file cannot be read, or lacks a text.
    """
    path = Path(file or SHIPPED)
    try:
        found = yaml.safe_load(text := path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SciflowError(f"`rubric` {path}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    found = found if isinstance(found, dict) else {}
    texts = {axis: found[axis] if isinstance(found.get(axis), dict) else {} for axis in AXES}
    places = {"system": found.get("system")}
    places |= {f"{axis}.{kind}": texts[axis].get(kind) for axis in AXES for kind in ("listed", "unlisted")}
    if lacking := [place for place, value in places.items() if not isinstance(value, str) or not value.strip()]:
        raise SciflowError(f"`rubric` {path}: no text for {', '.join(lacking)}. Start from a copy of {SHIPPED}.")
    if surplus := [f"{key}" for key in found if key not in ("system", *AXES)]:
        raise SciflowError(f"`rubric` {path}: unknown {', '.join(surplus)}; a rubric has system, {', '.join(AXES)}.")
    for axis in AXES:
        if "{elements}" not in texts[axis]["listed"]:
            raise SciflowError(f"`rubric` {path}: {axis}.listed has no {{elements}}, so the judge would not see them.")
    listed, unlisted = ({axis: texts[axis][kind] for axis in AXES} for kind in ("listed", "unlisted"))
    return Rubric(found["system"], listed, unlisted, hashlib.sha256(text.encode()).hexdigest()[:16])


def elements_of(value: Any, axis: str, where: str) -> list[str]:
    """The elements of one axis in words, from a cell of its column: a list or its JSON text; none for an empty cell.

    Components are {name, description}, arrows {source, target, label}, texts {text, location}; any may be a string.

    Raises:
        SciflowError: the cell holds something else; names `where` and the column.
    """
    fault = f"{where}: `{COLUMNS[axis]}` {str(value)!r:.80}"
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SciflowError(f"{fault} is no JSON ({error}).") from error
    if value is None or value == "" or value != value:  # NaN is the empty cell of a table
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | Mapping) for item in value):
        raise SciflowError(f"{fault} is no list of objects such as {_EXAMPLES[axis]}.")
    return [item if isinstance(item, str) else _in_words(item, axis) for item in value]


def _in_words(item: Mapping[str, Any], axis: str) -> str:
    """A missing name is "?", so that the element counts."""

    def part(key: str) -> str:
        return str(item.get(key) or "?")

    if axis == "arrow":
        return f"{part('source')} -> {part('target')}" + (f" ({item['label']})" if item.get("label") else "")
    if axis == "text":
        return f'"{part("text")}"' + (f" ({item['location']})" if item.get("location") else "")
    return part("name") + (f": {item['description']}" if item.get("description") else "")
