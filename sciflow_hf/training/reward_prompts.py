"""The prompts of a training by rewards: which are trained on, which are held out, and which a rollout has."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..diffusion.randomness import hash64
from ..errors import SciflowError
from ..families.base import ModelFamily
from ..options import Options, arguments, option


def _check_size(args: Any) -> None:
    if len(args.rollout_size) != 2:
        raise SciflowError(f"`rollout_size` {args.rollout_size}: height and width, two numbers.")


@arguments
class PromptArguments(Options):
    """The prompts of a training by rewards."""

    heading: ClassVar[str] = "Prompts"

    prompts_file: str | None = option(
        None,
        ".txt with a prompt a line; .jsonl, .csv, .parquet or a data set with a column prompt (else caption, "
        "text), and perhaps width and height; further columns are given to the rewards. demo_preferences: those of "
        "the demo.",
    )
    prompts_split: str | None = option(None, "Split of a data set of prompts, where it has several.")
    rollout_size: list[int] = option(
        [1024, 1024],
        "Height and width in pixels of images whose prompt does not say it.",
        within="[1, inf)",
        check=_check_size,
    )
    eval_fraction: float = option(
        0.1, "Share of the prompts that is held out, chosen by their text; 0 for none.", within="[0, 1)"
    )


@dataclass(frozen=True)
class Prompts:
    """Prompts to learn from: a data set of rows with `prompt`, `height`, `width`, and columns for the rewards."""

    rows: Sequence[dict[str, Any]]

    online_text: ClassVar[bool] = True
    """Texts are encoded in training."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each."""
        return [(row["height"], row["width"]) for row in self.rows]

    @property
    def fingerprint(self) -> str:
        """Changes with any row, and with their order."""
        return f"{hash64(json.dumps(list(self.rows), sort_keys=True, default=repr)):016x}"

    def describe(self, row: int) -> str:
        """A row in words, for messages."""
        return f"prompt {self.rows[row]['prompt']!r:.80}"

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The columns of these rows for the rewards: name -> a value of each, None where it has none."""
        names = dict.fromkeys(name for row in self.rows for name in row if name != "prompt")
        return {name: [self.rows[row].get(name) for row in rows] for name in names}

    def of_rollout(self, seed: int, rollout: int, number: int) -> list[int]:
        """The rows of a rollout: `number` of an endless order in which all come before one comes again."""
        places = range(rollout * number, (rollout + 1) * number)
        orders = {
            turn: np.random.Generator(np.random.PCG64(hash64(seed, turn, "prompts"))).permutation(len(self.rows))
            for turn in {place // len(self.rows) for place in places}
        }
        return [int(orders[place // len(self.rows)][place % len(self.rows)]) for place in places]

    def split(self, fraction: float) -> tuple["Prompts", "Prompts"]:
        """Those to train on, and the held-out share, at least one; equal texts stay together."""
        texts = sorted({row["prompt"] for row in self.rows}, key=lambda text: hash64(text, "held out"))
        held_out = set(texts[: max(1, round(fraction * len(texts)))] if fraction else ())
        if len(held_out) == len(texts):
            raise SciflowError(
                f"`eval_fraction` {fraction:g} holds out all of {len(texts)} prompts: lower it, or give more prompts."
            )
        parts = ([r for r in self.rows if (r["prompt"] in held_out) == out] for out in (False, True))
        train, out = map(Prompts, parts)
        return train, out


def prompts_for(rows: Sequence[dict[str, Any]], family: ModelFamily, size: Sequence[int]) -> Prompts:
    """The prompts of `rows`, each with its size or `size`.

    Raises:
        SciflowError: none, one to edit images with, or a size that the family does not draw.
    """
    if not rows:
        raise SciflowError("`prompts_file` holds no prompts.")
    found, step = [], family.bucket_step()
    for number, row in enumerate(rows):
        if row.get("source_images") or row.get("source_image"):
            raise SciflowError(
                f"`prompts_file`, row {number}: `source_images` of an edit. Rewards are learnt from images of text "
                "alone: leave these prompts out."
            )
        height, width = row.get("height") or size[0], row.get("width") or size[1]
        if any(side < step or side % step for side in (height, width)):
            raise SciflowError(
                f"`prompts_file`, row {number}: {height}x{width} pixels (height x width): both must be multiples of "
                f"{step} for `{family.name}`. Change its columns, or `--rollout_size`."
            )
        found.append(row | {"height": height, "width": width})
    return Prompts(found)
