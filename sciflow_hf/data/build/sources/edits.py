"""Columns of edits: their reference images ("sources") and their changed regions."""

import json
from collections.abc import Sequence
from typing import Any

from ....errors import SciflowError
from .record import Box

SOURCE_COLUMNS = ("source_image", "source_image_path")  # of the second the published metadata
EDIT_MASKS = ("given", "computed")
"""Where changed regions come from: from the data alone, or else from what differs between source and image."""
EDIT_MASK, EDIT_BOXES = "edit_mask", "edit_bboxes"


def source_columns(columns: Sequence[str], wanted: Sequence[str], where: str) -> list[str]:
    """The columns with the sources: those that are wanted, or the first of `SOURCE_COLUMNS`.

    Raises:
        SciflowError: one that is wanted is not there.
    """
    for name in wanted:
        if name not in columns:
            raise SciflowError(
                f"`source_column` is {name!r}, but {where} has {', '.join(map(repr, columns)) or 'no metadata'}. Name "
                "columns that hold reference images."
            )
    return list(wanted) or [name for name in SOURCE_COLUMNS if name in columns][:1]


def is_none(value: Any) -> bool:
    """Whether a field of a table holds nothing: null, NaN (as pandas writes it), or an empty text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def source_paths(value: Any, column: str) -> list[str]:
    """The paths in a field: one, a list of them, or a list as JSON; none where it is empty.

    Raises:
        ValueError: it is something else.
    """
    if is_none(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{column}` is {value!r:.80}, which is not JSON ({error})") from error
    paths = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(path, str) and path.strip() for path in paths):
        raise ValueError(f"`{column}` is {value!r:.80}, but must be the path of an image, or a list of paths")
    return list(paths)


def boxes_of(value: Any) -> tuple[Box, ...] | None:
    """The boxes in a field `edit_bboxes`, as a list or as JSON; None where it is empty.

    Raises:
        ValueError: it is something else.
    """
    if is_none(value):
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
        boxes = tuple((float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in found)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`{EDIT_BOXES}` is {value!r:.80}, but must be a list (or its JSON) of boxes [x0, y0, x1, y1] in pixels"
        ) from error
    for box in boxes:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"`{EDIT_BOXES}` has the box {list(box)}, but x0 must be less than x1, and y0 than y1")
    return boxes
