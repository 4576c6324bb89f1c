"""The judge as a reward: from prompts and drawn images to a score each, and one for each axis."""

import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ...errors import SciflowError, counted, first_line
from .answers import AnswerCache, NoAnswerError, Question, picture
from .arguments import JudgeArguments
from .endpoint import Endpoint, jpeg_size
from .local import LocalModel
from .rubric import COLUMNS, elements_of, read_rubric
from .scoring import AXES, Answer, Score, score

logger = logging.getLogger(__name__)

REFERENCE = "reference"
_PATCH, _LETTERS, _ANSWER = 32 * 32, 4, 150  # pixels and letters a token, and tokens an answer: roughly; models differ


@dataclass(frozen=True)
class Judgement:
    """The finding on one image.

    Attributes:
        score: of the figure and of its axes.
        answers: axis -> answer, None where the call failed; of the axes asked.
        reason: why axes have no answer, or why none was asked; else "".
    """

    score: Score
    answers: Mapping[str, Answer | None]
    reason: str = ""

    def columns(self) -> dict[str, Any]:
        """Cells of a table: judge, one for each axis, judge_incomplete, and the errors as JSON in judge_errors."""
        errors = {axis: [list(error) for error in answer.errors] for axis, answer in self.answers.items() if answer}
        return {
            "judge": self.score.overall,
            **{f"judge_{axis}": value for axis, value in self.score.axes.items()},
            "judge_incomplete": self.score.incomplete,
            "judge_errors": json.dumps(errors, ensure_ascii=False),
        }


@dataclass
class _Row:
    """The questions about one image; `reason` says why there are none."""

    elements: dict[str, list[str]]
    questions: dict[str, Question] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    reason: str = ""


class Judge:
    """Scores drawn figures by the errors that an image-text model lists, one call an axis.

    Rows may bring `reference`, the picture that the figure should match, and the elements that it should have,
    `rubric_components`, `rubric_arrows` and `rubric_text`. Axes without elements are not asked; a row without any
    elements is asked for all three axes, and scores 1 or 0.5. A call that failed is not repeated by the same object.

    Args:
        args: which model, and within what limits; by default what the environment says.
        ask: question -> answer, instead of the model that `args` name.
    """

    def __init__(self, args: JudgeArguments | None = None, *, ask: Callable[[Question], Answer] | None = None) -> None:
        self.__name__ = "judge"  # of its column, as with a function
        self.args = args or JudgeArguments()
        self.rubric = read_rubric(self.args.rubric)
        self.model = self.args.judge_model or os.environ.get("SCIFLOW_JUDGE_MODEL", "")
        self.calls = 0
        self.announced = False
        self._cache = AnswerCache(Path(self.args.judge_cache_dir or _default_folder()))
        self._ask = ask
        self._failed: dict[str, NoAnswerError] = {}

    @property
    def identity(self) -> str:
        """Changes with all that decides a score besides the row."""
        return f"{self.model} {self.rubric.version} {self.args.scoring}"

    def __call__(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[float | None]:
        """The score of each image, 0 to 1; None where there is none. See `judge`."""
        return [found.score.overall for found in self.judge(prompts, images, **columns)]

    def judge(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[Judgement]:
        """A finding on each image.

        Args:
            prompts: what was asked for.
            images: what was drawn: see `picture`.
            columns: lists as long as `prompts`, of which `reference` and those of the rubric are used.

        Raises:
            SciflowError: none of these columns, or a cell that cannot be read; more calls than `max_calls`; a server
                that lets no call in.
        """
        used = (REFERENCE, *COLUMNS.values())
        if not columns.keys() & set(used):
            raise SciflowError(
                f"The judge needs one of the columns {', '.join(used)}, to know what an image should show; there "
                f"{'are ' + ', '.join(columns) if columns else 'is none besides the prompts'}."
            )
        rows = [
            self._row(i, prompt, image, {name: columns[name][i] for name in used if name in columns})
            for i, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        ]
        questions = {row.keys[axis]: question for row in rows for axis, question in row.questions.items()}
        answers = self._answers(questions)
        found = [self._judgement(row, answers) for row in rows]
        reasons = Counter(one.reason for one in found if one.reason and not self.announced)
        for reason, number in reasons.most_common():
            logger.warning("Judge: %s without an answer on every axis: %s", counted(number, "image"), reason)
        return found

    def check(self) -> None:
        """SciflowError where the options name no model, before anything is asked; a local one is not loaded yet."""
        if self.args.judge_backend != "local" or not self.model:
            self._ask = self._ask or self._model()

    def announce(self, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Says what judging `number` images in several calls will cost at most, which are silent then."""
        cells = [columns[name] for name in COLUMNS.values() if name in columns]
        listed = [sum(column[i] not in (None, "", "[]") for column in cells) for i in range(number)]
        calls = len(AXES) * number if self.args.scoring == "published" else sum(n or len(AXES) for n in listed)
        words = len(self.rubric.system + max(self.rubric.listed.values(), key=len)) // _LETTERS
        each = 2 * jpeg_size(1024, 1024)[0] ** 2 // _PATCH + words + _ANSWER
        logger.info(
            "Judge: at most %s for %s, about %s tokens at 1024 x 1024 pixels; answers kept from before cost nothing.",
            counted(calls, "call"),
            counted(number, "image"),
            f"{calls * each:,}",
        )
        self.announced = True

    def _row(self, i: int, prompt: str, image: Any, cells: Mapping[str, Any]) -> _Row:
        """Reads the cells of row `i`, and makes its questions."""
        elements = {axis: elements_of(cells.get(column), axis, f"judge, row {i}") for axis, column in COLUMNS.items()}
        listed, reference = [axis for axis in AXES if elements[axis]], cells.get(REFERENCE)
        if image is None or (reference is None and not listed):
            return _Row(elements, reason="no image" if image is None else f"no `{REFERENCE}`, no elements in a rubric")
        pictures, tokens, digest = [one for one in (reference, image) if one is not None], _ANSWER, hashlib.sha256()
        for one in pictures:
            try:
                pixels = picture(one)
            except (OSError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
                name = "image" if one is image else f"`{REFERENCE}`"
                raise SciflowError(f"judge, row {i}: its {name} cannot be read ({first_line(error)}).") from error
            width, height = jpeg_size(*pixels.size)
            tokens += width * height // _PATCH
            digest.update(f"{pixels.size}".encode() + pixels.tobytes())
        row, system = _Row(elements), self.rubric.system
        for axis in listed if listed and self.args.scoring != "published" else AXES:
            request = self.rubric.request(axis, prompt, elements[axis], reference=reference is not None)
            words = len(system + request) // _LETTERS
            row.questions[axis] = Question(axis, system, request, pictures, digest.hexdigest(), tokens + words)
            row.keys[axis] = row.questions[axis].key(self.model, self.rubric.version)
        return row

    def _answers(self, questions: Mapping[str, Question]) -> dict[str, Answer | NoAnswerError]:
        """Key -> answer, from the cache or the model, or why there is none."""
        answers: dict[str, Answer | NoAnswerError] = {
            key: kept for key in questions if (kept := self._cache.get(key)) is not None
        }
        known = counted(len(answers), "answer")
        answers |= {key: self._failed[key] for key in questions.keys() & self._failed.keys()}
        open_ones = {key: question for key, question in questions.items() if key not in answers}
        if not self.announced:
            logger.info("Judge: %s, %s kept from before.", estimate(open_ones.values()), known)
        limit = self.args.max_calls
        if limit is not None and self.calls + len(open_ones) > limit:
            raise SciflowError(
                f"`max_calls` {limit}: {self.calls} made, {len(open_ones)} more needed. Raise it, or judge fewer "
                f"images; answers so far are kept in {self._cache.folder}."
            )
        if not open_ones:
            return answers
        ask = self._ask = self._ask or self._model()
        stopped = getattr(ask, "stopped", threading.Event())
        stopped.clear()

        def answer(key: str) -> Answer | NoAnswerError:
            if stopped.is_set():
                return NoAnswerError("not asked")
            try:
                found = ask(open_ones[key])
            except NoAnswerError as error:
                if not stopped.is_set():
                    self._failed[key] = error
                return error
            except SciflowError:  # every further call would meet it
                stopped.set()
                raise
            self._cache.put(key, found)
            return found

        workers = 1 if self.args.judge_backend == "local" else self.args.judge_parallel
        pool = ThreadPoolExecutor(min(workers, len(open_ones)))
        try:
            futures = {pool.submit(answer, key): key for key in open_ones}
            hidden = True if self.announced else None  # on a terminal alone
            for future in tqdm(as_completed(futures), total=len(futures), desc="Judge", unit="call", disable=hidden):
                answers[futures[future]] = future.result()
        finally:  # after an error or Ctrl-C calls under way end, and their answers are kept
            stopped.set()
            pool.shutdown(cancel_futures=True)
            self.calls = getattr(ask, "calls", self.calls + len(open_ones))
        return answers

    def _judgement(self, row: _Row, answers: Mapping[str, Answer | NoAnswerError]) -> Judgement:
        given = {axis: answers[key] for axis, key in row.keys.items()}
        reasons = dict.fromkeys(str(answer) for answer in given.values() if isinstance(answer, NoAnswerError))
        read = {axis: None if isinstance(answer, NoAnswerError) else answer for axis, answer in given.items()}
        numbers = {axis: len(row.elements[axis]) for axis in AXES}
        result = score(read, numbers, published=self.args.scoring == "published")
        return Judgement(result, read, row.reason or "; ".join(reasons))

    def _model(self) -> Callable[[Question], Answer]:
        """The model that the options name."""
        args, url = self.args, self.args.judge_url or os.environ.get("SCIFLOW_JUDGE_URL")
        if not self.model:
            raise SciflowError("The judge needs a model: give `--judge_model`, or set SCIFLOW_JUDGE_MODEL.")
        if args.judge_backend == "local":
            return LocalModel(self.model)
        if not url:
            raise SciflowError(
                "The judge needs a server: give `--judge_url`, or set SCIFLOW_JUDGE_URL. A model on this machine "
                "judges by `--judge_backend local`."
            )
        key = os.environ.get(args.judge_key_env, "")
        return Endpoint(url, self.model, key, timeout=args.judge_timeout, max_calls=args.max_calls)


def estimate(questions: Iterable[Question]) -> str:
    """The cost of questions, repeated calls aside: "6 calls with 12 images, about 9,000 tokens"."""
    asked = list(questions)
    calls, images = counted(len(asked), "call"), counted(sum(len(one.pictures) for one in asked), "image")
    return f"{calls} with {images}, about {sum(one.tokens for one in asked):,} tokens"


def _default_folder() -> str:
    from huggingface_hub import constants

    return os.path.join(constants.HF_HOME, "sciflow_hf", "judge")
