"""Rewards by name, dotted path or as functions, and images scored by several of them.

A reward is a function `reward(prompts, images, **columns)`, as in trl: lists of N prompts, of N PIL images in RGB and,
by name, of N values of each further column; it returns N numbers, higher is better, None where it does not apply.
"""

import hashlib
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import SciflowError, counted, first_line

if TYPE_CHECKING:
    from PIL import Image

    from ..judge.judge import Judge

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | Exception | None]]
REWARD = "reward"
"""Name of the weighted sum among the score columns."""
_JUDGE = "judge.JudgeReward"
_TEXTS = "texts in quotes in the prompt, in a column `rubric_text`, or in the picture in a column `reference`"
_EDITS = "columns `reference` and `sources`"
BUILT_IN = {
    "ocr": ("ocr.ocr", "texts in quotes in the prompt"),
    "chart": ("chart.chart", "a kind, colour or count in the prompt, or columns of these names"),
    "chart_kind": ("chart.chart_kind", "a kind of chart in the prompt, or a column `kind`"),
    "chart_colour": ("chart.chart_colour", "one colour in the prompt, or a column `colour`"),
    "chart_look": ("chart.chart_look", "a kind of chart and one colour in the prompt, or columns `kind` and `colour`"),
    "chart_count": ("chart.chart_count", "a kind and a number of things in the prompt, or columns `kind` and `count`"),
    "chart_right": ("chart.chart_right", "a kind or one colour in the prompt, or columns `kind` and `colour`"),
    "aspect": ("guards.aspect", "columns `width` and `height`"),
    "blank": ("guards.blank", "nothing else"),
    "judge": (_JUDGE, "a column `reference`, or elements in columns `rubric_...`"),
    "judge_component": (_JUDGE, "elements in a column `rubric_components`"),
    "judge_arrow": (_JUDGE, "elements in a column `rubric_arrows`"),
    "judge_text": (_JUDGE, "elements in a column `rubric_text`"),
    "ocr_word_accuracy": ("texts.ocr_word_accuracy", _TEXTS),
    "ocr_character_error": ("texts.ocr_character_error", _TEXTS),
    "ocr_edit_distance": ("texts.ocr_edit_distance", _TEXTS),
    "psnr": ("edits.psnr", "a column `reference`"),
    "ssim": ("edits.ssim", "a column `reference`"),
    "changed_psnr": ("edits.changed_psnr", _EDITS),
    "kept_psnr": ("edits.kept_psnr", _EDITS),
}
"""Name -> function below `sciflow_hf.metrics.rewards`, or `JudgeReward`, and what it needs."""
GROUPS = {
    "ocr": ("ocr", "ocr_word_accuracy", "ocr_character_error", "ocr_edit_distance"),
    "chart": ("chart", "chart_kind", "chart_colour", "chart_count"),
    "judge": ("judge", "judge_component", "judge_arrow", "judge_text"),
    "edits": ("psnr", "ssim", "changed_psnr", "kept_psnr"),
}
"""Name of a metric -> rewards that it stands for; one that applies to no image has no column."""


@dataclass(frozen=True)
class Reward:
    """A reward function with its name, which its score column has, and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0

    def taken(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """The columns that the function takes: those it names, or all if it has `**columns`."""
        parameters = inspect.signature(self.function).parameters
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return {n: c for n, c in columns.items() if (every or n in parameters) and n not in ("prompts", "images")}

    def identity(self) -> str:
        """Changes with the file that holds the function; of an object also with its attribute `identity`."""
        function = inspect.unwrap(self.function)
        if not (known := inspect.isroutine(function)):
            function = type(function)
        try:
            source = Path(inspect.getfile(function)).read_bytes()
        except (TypeError, OSError):  # typed into an interpreter
            source = b""
        own = "" if known else str(getattr(self.function, "identity", ""))
        return f"{function.__module__}.{function.__qualname__} {hashlib.sha256(source).hexdigest()} {own}"


@dataclass(frozen=True)
class Failure:
    """A score that could not be had: of which image, by which reward, and why."""

    reward: str
    row: int
    reason: str


@dataclass
class Scores:
    """Scores of N images.

    Attributes:
        columns: name of a reward -> N scores, None where it does not apply or failed.
        failures: what failed.
    """

    columns: dict[str, list[float | None]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def table(self, rewards: Sequence[Reward]) -> dict[str, list[float | None]]:
        """The columns with `reward`, their weighted sum.

        A reward that does not apply to an image adds nothing to its sum, as in trl. There is no sum where none
        applies, or where one failed: the sum of the others would be of another scale.
        """
        failed = {failure.row for failure in self.failures}
        number = len(next(iter(self.columns.values()), []))

        def total(row: int) -> float | None:
            scores = [(r.weight, self.columns[r.name][row]) for r in rewards]
            known = [weight * score for weight, score in scores if score is not None]
            return math.fsum(known) if known and row not in failed else None

        return self.columns | {REWARD: [total(row) for row in range(number)]}

    def check(self, names: Sequence[str]) -> None:
        """Warns of failures, each reward's first by name; `names` are those of the images.

        Raises:
            SciflowError: a reward failed on all images, or applies to none.
        """
        for reward, column in self.columns.items():
            failures = [failure for failure in self.failures if failure.reward == reward]
            if not failures and any(score is not None for score in column):
                continue
            if not failures:
                needs = f": it needs {BUILT_IN[reward][1]}" if reward in BUILT_IN else ""
                raise SciflowError(
                    f"`reward` {reward} applies to none of {counted(len(column), 'image')}{needs}. Leave it out, or "
                    "score prompts that it applies to."
                )
            first, images = f"{names[failures[0].row]} ({failures[0].reason})", counted(len(failures), "image")
            if all(score is None for score in column):
                raise SciflowError(f"`reward` {reward} failed on all of {images} it applies to, first on {first}.")
            others = f", and on {len(failures) - 1} more" if len(failures) > 1 else ""
            logger.warning("`reward` %s failed on %s%s; these have no `%s`.", reward, first, others, REWARD)


def load_reward(reward: str | RewardFunction, *, judge: "Judge | None" = None) -> RewardFunction:
    """The function of a reward.

    Args:
        reward: a built-in name, the dotted path of a function (`my_module.my_reward`), or the function itself.
        judge: of the rewards that ask one; by default what the environment says.

    Raises:
        SciflowError: an unknown name, or a path that does not lead to a function.
    """
    found: Any = reward
    if asks_judge(reward):
        from ..judge.judge import Judge
        from .judge import JudgeReward

        return JudgeReward(judge or Judge(), str(reward))
    if isinstance(reward, str):
        module, _, attribute = reward.rpartition(".")
        if reward in BUILT_IN:
            module, _, attribute = f"{__package__}.{BUILT_IN[reward][0]}".rpartition(".")
        elif not module:
            raise SciflowError(
                f"`reward` {reward!r} is unknown: use {', '.join(BUILT_IN)}, or the dotted path of a function."
            )
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise SciflowError(
                f"`reward` {reward!r} cannot be imported: {error}. Of a module in this folder, Python has to be told "
                "by PYTHONPATH=."
            ) from error
    if not callable(found) or isinstance(found, type):
        raise SciflowError(f"`reward` {reward!r} is {found!r:.80}, not a function of prompts and images.")
    return found


def asks_judge(reward: str | RewardFunction) -> bool:
    """Whether it is the name of a reward that asks the judge."""
    return isinstance(reward, str) and reward in BUILT_IN and BUILT_IN[reward][0] == _JUDGE


def load_rewards(
    rewards: Sequence[str | RewardFunction], weights: Sequence[float] = (), *, judge: "Judge | None" = None
) -> list[Reward]:
    """Rewards with their weights, named by the last part of their path.

    Args:
        rewards: as `load_reward` takes them.
        weights: one for each; 1 by default.
        judge: of the rewards that ask one.

    Raises:
        SciflowError: an unknown reward, two of one name, another number of weights, or a weight that is not finite.
    """
    weights = list(weights) or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        given = counted(len(weights), "value")
        raise SciflowError(f"`reward_weights` has {given} for {counted(len(rewards), 'reward')}: give one each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise SciflowError(f"`reward_weights` {weights}: finite numbers are needed.")
    if judge is None and any(map(asks_judge, rewards)):
        from ..judge.judge import Judge

        judge = Judge()  # one for all, which asks each question once
    found = []
    for reward, weight in zip(rewards, weights, strict=True):
        function = load_reward(reward, judge=judge)
        own = getattr(function, "__name__", type(function).__name__)
        found.append(Reward(reward.rpartition(".")[2] if isinstance(reward, str) else own, function, float(weight)))
    names = [reward.name for reward in found]
    if REWARD in names or len(set(names)) < len(names):
        raise SciflowError(f"`reward` {', '.join(names)}: each needs a name of its own, and none is `{REWARD}`.")
    return found


def score_images(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images: "Sequence[Image.Image]",
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Scores:
    """Scores of N images by several rewards.

    A reward that raises, or returns another number of scores, is asked for one image at a time; what then fails, and
    scores that are no finite number, are in `Scores.failures`. A `SciflowError` of a reward is a mistake in the
    setting, such as a missing package, and is passed on.

    Args:
        rewards: of `load_rewards`.
        prompts: N texts.
        images: N, in RGB.
        columns: further columns of N values, for the rewards that take them.
    """
    scores = Scores()
    for reward in rewards:
        taken = {name: list(column) for name, column in reward.taken(columns or {}).items()}
        found = _ask(reward.function, prompts, images, taken) if images else []
        if isinstance(found, str):
            each = [({n: [c[i]] for n, c in taken.items()}, i) for i in range(len(images))]
            alone = [_ask(reward.function, [prompts[i]], [images[i]], own) for own, i in each] if each[1:] else [found]
            found = [one if isinstance(one, str) else one[0] for one in alone]
        scores.columns[reward.name] = [None if isinstance(score, str) else score for score in found]
        scores.failures += [Failure(reward.name, i, s) for i, s in enumerate(found) if isinstance(s, str)]
    return scores


def _ask(
    function: RewardFunction, prompts: Sequence[str], images: "Sequence[Image.Image]", columns: dict[str, list[Any]]
) -> list[float | str | None] | str:
    """A score of each image, None, or a text that says why there is none; one text if the call failed.

    A reward may return an error as a score.
    """
    try:
        found = list(function(prompts=list(prompts), images=list(images), **columns))
    except SciflowError:
        raise
    except Exception as error:  # code of the user's own, a service: counted and named with the images
        return f"{type(error).__name__}: {first_line(error)}"
    if len(found) != len(images):
        return f"it returned {counted(len(found), 'score')} for {counted(len(images), 'image')}"
    return [_number(score) for score in found]


def _number(score: Any) -> float | str | None:
    if score is None:
        return None
    if isinstance(score, Exception):
        return first_line(score)
    try:
        number = float(score)
    except (TypeError, ValueError):
        return f"it returned {score!r:.60}, not a number"
    return number if math.isfinite(number) else f"it returned {number}"


def try_packages(rewards: Sequence[Reward]) -> None:
    """SciflowError where a package that a built-in reward needs is missing: before hours of drawing."""
    from PIL import Image

    white, black = Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32))
    own = [r for r in rewards if r.name in BUILT_IN and not asks_judge(r.name) and inspect.isfunction(r.function)]
    own = [reward for reward in own if reward.function.__module__.startswith(f"{__package__}.")]
    score_images(own, ['"a"'], [white], {"reference": [black], "sources": [[white]]})
