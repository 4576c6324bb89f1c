"""`--row_filter`: which rows of an input or a cache are used, by the values of their columns."""

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import SciflowError, first_line
from .build.sources.edits import is_none

logger = logging.getLogger(__name__)

LEFT_OUT = "left out by `--row_filter`"
_FORM = re.compile(r"\s*([^=<>!]+?)\s*(>=|<=|=)(.*)", re.DOTALL)
_NONE = "none"
_SHOWN = 8  # values of a column, in messages
_EXAMPLE = "Write COLUMN=VALUE, COLUMN=VALUE,VALUE, COLUMN>=NUMBER or COLUMN<=NUMBER, such as quality_tier=High."


@dataclass(frozen=True)
class _Condition:
    """`text` as it was given: a column, an operator, and what it is compared with."""

    text: str
    column: str
    operator: str
    values: tuple[str, ...]

    def holds(self, value: Any) -> list[str]:
        """Those of `values` for which the condition holds."""
        if is_none(value):
            return [text for text in self.values if self.operator == "=" and text == _NONE]
        if self.operator == "=":
            return [text for text in self.values if _equal(value, text)]
        try:
            number, bound = float(value), float(self.values[0])
        except (TypeError, ValueError) as error:
            raise SciflowError(
                f"`row_filter` {self.text!r}: the column {self.column!r} holds {value!r:.80}, which is no number."
            ) from error
        return list(self.values) if (number >= bound if self.operator == ">=" else number <= bound) else []


def _parsed(text: str) -> _Condition:
    found = _FORM.fullmatch(text)
    values = next(csv.reader([found[3]], skipinitialspace=True), []) if found else []
    if found is None or not all(value.strip() for value in values or [""]):
        raise SciflowError(f"`row_filter` {text!r} is no condition. {_EXAMPLE}")
    values = [value.strip() for value in values]
    if found[2] != "=" and (len(values) > 1 or not _is_number(values[0])):
        raise SciflowError(f"`row_filter` {text!r}: {found[2]} takes one number. {_EXAMPLE}")
    return _Condition(text, found[1], found[2], tuple(values))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, int | float):
        return _is_number(text) and float(text) == value
    # A CSV holds truth values as texts, "False" if pandas wrote it.
    return str(value) == text or (text.lower() in ("true", "false") and str(value).lower() == text.lower())


class RowFilter:
    """Conditions that a row must meet, all of them; counts the rows of one data set as it is shown them.

    A condition is `column=value`, `column=value,other` (one of them), `column>=number` or `column<=number`. Texts are
    compared exactly, numbers as numbers, truth values as true and false. The value `none` stands for rows without a
    value: null, NaN, an empty text, or no such column in this part of the data.

    Args:
        conditions: texts.

    Raises:
        SciflowError: a text that is no condition.
    """

    def __init__(self, conditions: Sequence[str]) -> None:
        self.texts = tuple(conditions)
        self.conditions = [_parsed(text) for text in conditions]
        self.rows = self.kept = 0
        self._values: dict[str, Counter[str]] = {c.text: Counter() for c in self.conditions if c.operator == "="}
        self._met: set[tuple[str, str]] = set()

    @property
    def columns(self) -> list[str]:
        """Names of the columns that decide."""
        return list(dict.fromkeys(condition.column for condition in self.conditions))

    def mask(self, columns: Mapping[str, Sequence[Any] | pa.ChunkedArray | None], count: int) -> np.ndarray:
        """Which of some rows are kept: (count,) bool.

        Args:
            columns: of these rows, by name; one that is missing, or None, has no value in any row.
            count: rows.

        Raises:
            SciflowError: a column that holds no single values, or is to be compared with a number and holds others.
        """
        kept = np.ones(count, dtype=bool)
        for condition in self.conditions:
            column = columns.get(condition.column)
            distinct, which = ([None], np.zeros(count, int)) if column is None else _distinct(column, condition)
            met = [condition.holds(value) for value in distinct]
            self._met |= {(condition.text, text) for texts in met for text in texts}
            if condition.text in self._values and count:
                numbers = np.bincount(which, minlength=len(distinct)).tolist()
                shown = (_NONE if is_none(value) else f"{value}" for value in distinct)
                self._values[condition.text].update(dict(zip(shown, numbers, strict=True)))
            kept &= np.array([bool(texts) for texts in met], dtype=bool)[which]
        self.rows, self.kept = self.rows + count, self.kept + int(kept.sum())
        return kept

    def close(self, where: str, names: Iterable[str]) -> None:
        """Says how many of the rows that were shown are left out.

        Args:
            where: option and value that name the data, for messages.
            names: the columns that the data has.

        Raises:
            SciflowError: a column that the data does not have, a value that no row has, or no row that is kept.
        """
        there = list(dict.fromkeys(names))
        for condition in self.conditions:
            if condition.column not in there:
                raise SciflowError(
                    f"`row_filter` {condition.text!r}: {where} has no column {condition.column!r}, but "
                    f"{', '.join(map(repr, there)) or 'no columns'}."
                )
            for value in condition.values if condition.operator == "=" else ():
                if (condition.text, value) not in self._met:
                    common = self._values[condition.text].most_common()
                    more = ", ..." * (len(common) > _SHOWN)
                    listed = ", ".join(f"{text} ({number})" for text, number in common[:_SHOWN])
                    raise SciflowError(
                        f"`row_filter` {condition.text!r}: no row of {where} has {value!r} in {condition.column!r}. "
                        f"Its values (and rows): {listed}{more}."
                    )
        if not self.kept:
            raise SciflowError(f"`row_filter` {' '.join(self.texts)} leaves none of the {self.rows} rows of {where}.")
        told = "`row_filter` %s: %d of %d rows of %s are used, %d are left out."
        logger.info(told, " ".join(self.texts), self.kept, self.rows, where, self.rows - self.kept)


def _distinct(column: Any, condition: _Condition) -> tuple[list[Any], np.ndarray]:
    """The distinct values of a column, and which of them each row has."""
    try:
        if isinstance(column, pa.ChunkedArray):
            encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
            encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
            return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)
        distinct = list(dict.fromkeys((type(value), value) for value in column))
        keys = {key: number for number, key in enumerate(distinct)}
        return [value for _, value in distinct], np.array([keys[type(value), value] for value in column], dtype=int)
    except (TypeError, pa.ArrowException) as error:
        raise SciflowError(
            f"`row_filter` {condition.text!r}: the column {condition.column!r} holds no single texts, numbers or truth "
            f"values ({first_line(error)}). Filter by another column."
        ) from error
