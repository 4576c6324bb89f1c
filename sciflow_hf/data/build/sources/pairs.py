"""Data sets of pairs: two images of a prompt in a row, of which one was preferred."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...preferences import AXIS, GROUP, LOSER, ROLE, WINNER

# Columns of (the preferred image, the other one) as trl names them, and of two images with a label, as on the Hub.
CHOSEN = ("chosen", "rejected")
LABELLED = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
TIE = "pairs without a winner (equal or missing labels)"


def pair_columns(columns: Collection[str]) -> tuple[str, ...]:
    """The columns with the two images of a pair; () where the rows are no pairs."""
    if "image" in columns:
        return ()
    if set(columns) >= set(CHOSEN):
        return CHOSEN
    return LABELLED if set(columns) >= {*LABELLED, LABELS[0]} else ()


def roles_of(row: Mapping[str, Any], columns: tuple[str, ...], group: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The image columns of a pair, the preferred first, each with its columns; nothing for a tie.

    Args:
        row: its plain columns.
        columns: of `pair_columns`.
        group: name of the pair, where the row has none.
    """
    first, second = columns
    if columns == LABELLED:
        label = row.get(LABELS[0])
        other = row.get(LABELS[1], None if label is None else 1 - label)
        if label is None or other is None or label == other or label != label:
            return
        if label < other:
            first, second = second, first
    rest = {name: value for name, value in row.items() if name not in LABELS}
    for column, role in ((first, WINNER), (second, LOSER)):
        yield column, {GROUP: group, AXIS: None} | rest | {ROLE: role}
