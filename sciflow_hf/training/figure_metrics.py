"""Scores of the validation images in every evaluation: `--figure_metrics`."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import EvalPrediction, TrainingArguments

from ..errors import SciflowError, counted
from ..metrics.rewards.base import BUILT_IN, GROUPS, load_rewards, score_images, try_packages
from .callbacks.validation import ValidationCallback

logger = logging.getLogger(__name__)


class FigureMetrics:
    """Draws the prompts and seeds of a `ValidationCallback` with the weights of now, and scores them.

    Called like `compute_metrics` on all ranks, each of which draws and scores a share.

    Args:
        names: metrics of `sciflow-hf evaluate`, or dotted paths of reward functions.
        validation: draws.
        args: of the training.
        model: returns the model and the optimizer step.
        others: further metrics, whose values are kept.

    Raises:
        SciflowError: an unknown metric; when called, one that applies to no image, or fails on all.
    """

    def __init__(
        self,
        names: Sequence[str],
        validation: ValidationCallback,
        args: TrainingArguments,
        model: Callable[[], tuple[torch.nn.Module, int]],
        others: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ) -> None:
        self.groups = {name: GROUPS.get(name, (name,)) for name in names}
        self.rewards = load_rewards(list(dict.fromkeys(name for group in self.groups.values() for name in group)))
        try_packages(self.rewards)
        self.validation, self.args, self.model, self.others = validation, args, model, others

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        found = {} if self.others is None else self.others(prediction)
        return found | self.measure()

    def measure(self) -> dict[str, float]:
        """Name -> mean over the images; of a group those that apply to any."""
        model, step = self.model()
        drawn = list(self.validation.images(self.args, model, step))
        own = self._scores([(prompt, image) for prompt, _, image in drawn])
        rows: list[dict[str, float | str | None]] = gather_object(own)
        means = {}
        for reward in self.rewards:
            known = [score for row in rows if isinstance(score := row[reward.name], float)]
            failed = [reason for row in rows if isinstance(reason := row[reward.name], str)]
            if failed:
                of_all = counted(len(rows), "validation image")
                logger.warning(
                    "`figure_metrics` %s failed on %d of %s (%s).", reward.name, len(failed), of_all, failed[0]
                )
            if known:
                means[reward.name] = sum(known) / len(known)
        for group, members in self.groups.items():
            if not any(name.rpartition(".")[2] in means for name in members):
                needs = f": it needs {BUILT_IN[members[-1]][1]}" if members[-1] in BUILT_IN else ""
                raise SciflowError(
                    f"`figure_metrics` {group} has a score on none of {counted(len(rows), 'validation image')}{needs}. "
                    "Leave it out, or give `--validation_prompts` that it applies to."
                )
        return means

    def _scores(self, drawn: Sequence[tuple[int, Any]]) -> list[dict[str, float | str | None]]:
        """A dict for each image: reward -> score, None, or why it failed."""
        of, numbers = self.validation, [prompt for prompt, _ in drawn]
        targets = of.targets or [None] * len(of.prompts)
        columns: dict[str, list[Any]] = {
            "reference": [targets[prompt] for prompt in numbers],
            "sources": [of.sources[prompt] for prompt in numbers],
            "height": [of.sizes[prompt][0] for prompt in numbers],
            "width": [of.sizes[prompt][1] for prompt in numbers],
        }
        scores = score_images(
            self.rewards, [of.prompts[prompt] for prompt in numbers], [image for _, image in drawn], columns
        )
        rows: list[dict[str, float | str | None]] = [
            {name: column[i] for name, column in scores.columns.items()} for i in range(len(drawn))
        ]
        for failure in scores.failures:
            rows[failure.row][failure.reward] = failure.reason
        return rows
