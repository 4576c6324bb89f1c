"""The judge as rewards: `judge`, and `judge_component`, `judge_arrow` and `judge_text` from the same answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..judge.answers import NoAnswerError
from ..judge.judge import Judge, Judgement


@dataclass(frozen=True)
class JudgeReward:
    """A score of the judge for each image.

    An image on which the judge gives no answer is a failure, which is named and asked again by the next run: a score
    from the other axes would not compare with those of complete candidates.

    Attributes:
        judge: is asked once for all rewards that share it.
        column: the score: of `Judgement.columns`.
    """

    judge: Judge
    column: str = "judge"

    @property
    def identity(self) -> str:
        return f"{self.column} {self.judge.identity}"

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        reference: Sequence[Any] | None = None,
        rubric_components: Sequence[Any] | None = None,
        rubric_arrows: Sequence[Any] | None = None,
        rubric_text: Sequence[Any] | None = None,
    ) -> list[float | NoAnswerError | None]:
        """Scores of N images, None where there is nothing to judge by.

        Args:
            prompts: N texts.
            images: N, in RGB.
            reference: pictures that the images should match, None where there is none.
            rubric_components: elements that they should have: see `elements_of`.
            rubric_arrows: as `rubric_components`.
            rubric_text: as `rubric_components`.
        """
        columns = {
            "reference": reference,
            "rubric_components": rubric_components,
            "rubric_arrows": rubric_arrows,
            "rubric_text": rubric_text,
        }
        given = {name: cells for name, cells in columns.items() if cells is not None}
        return [self._score(found) for found in self.judge.judge(prompts, images, **given)]

    def _score(self, found: Judgement) -> float | NoAnswerError | None:
        failed = [axis for axis in found.score.failed if self.column in ("judge", f"judge_{axis}")]
        if failed and self.judge.args.scoring != "published":
            return NoAnswerError(found.reason)
        score: float | None = found.columns()[self.column]
        return score
