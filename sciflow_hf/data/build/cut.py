"""Captions that are longer than the text encoder reads: how many, the longest, the first; noted with the cache."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .. import storage
from .blocks import BUILD_FILE, CONVERT_FILE

logger = logging.getLogger(__name__)

CUT = "cut_captions"
"""Key of the note, and of the line in the table of a build."""
CountTokens = Callable[[Sequence[str]], tuple[list[int], int] | None]
"""Prompts -> the tokens of each, and how many are read; None: unknown. See `ModelFamily.count_tokens`."""
_AT_ONCE = 1000
_FEWEST = 64  # tokens, the first class of lengths


def find_cut(captions: Iterable[tuple[str, str]], count_tokens: CountTokens) -> dict[str, Any] | None:
    """Notes on the captions, (name, text) each; each text is counted once. None: unknown."""
    names: dict[str, list[str]] = {}
    for name, text in captions:
        names.setdefault(text, []).append(name)
    lengths: Counter[int] = Counter()
    found: dict[str, Any] = {"count": 0, "longest": 0, "kept": 0, "first": ""}
    texts = list(names)
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        counted = count_tokens(some)
        if counted is None:
            return None
        tokens, found["kept"] = counted
        for text, length in zip(some, tokens, strict=True):
            lengths[max(_FEWEST, 1 << (length - 1).bit_length())] += len(names[text])
            if length > counted[1]:
                found["count"] += len(names[text])
                found["longest"] = max(found["longest"], length)
                found["first"] = found["first"] or names[text][0]
    return found | {"lengths": {f"{most}": lengths[most] for most in sorted(lengths)}}


def cut_text(found: dict[str, Any]) -> str:
    """For tables and messages."""
    if not found["count"]:
        return "none"
    more = ", ..." * (found["count"] > 1)
    return f"{found['count']} after {found['kept']} tokens, the longest has {found['longest']}: {found['first']}{more}"


def lengths_text(found: dict[str, Any]) -> str:
    """How many captions have up to 64, 128, 256, ... tokens, in words; "" in notes of earlier versions."""
    return ", ".join(f"{count:,} up to {int(most):,}" for most, count in found.get("lengths", {}).items())


def warn_of_cut(found: dict[str, Any] | None, captions: int) -> None:
    """Says so if any of that many captions is cut."""
    if found and found["count"]:
        text = "Captions that are cut, of %d: %s. The rest of each is not read; `--max_sequence_length` is the limit.%s"
        lengths = lengths_text(found)
        logger.warning(text, captions, cut_text(found), f" Captions by their tokens: {lengths}." * bool(lengths))


def noted_cut(folders: Iterable[str]) -> dict[str, Any] | None:
    """Notes on the captions of several caches together; None if one of them has no notes."""
    notes: list[dict[str, Any] | None] = []
    for folder in folders:
        for file in (storage.join(folder, name) for name in (BUILD_FILE, CONVERT_FILE)):
            if storage.exists(file):
                with storage.open_file(file) as handle:
                    notes.append(json.load(handle).get(CUT))
                break
        else:
            return None
    known = [note for note in notes if note is not None]
    if not known or len(known) < len(notes):
        return None
    found = max(known, key=lambda note: note["longest"]) | {"count": sum(note["count"] for note in known)}
    lengths = sum((Counter(note.get("lengths", {})) for note in known), Counter[str]())
    return found | {"lengths": {most: lengths[most] for most in sorted(lengths, key=int)}}


def folders_of(files: Iterable[str]) -> list[str]:
    """The folders that hold these index files."""
    return list(dict.fromkeys(os.path.dirname(file) for file in files))
