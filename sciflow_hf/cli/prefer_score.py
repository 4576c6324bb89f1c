"""`sciflow-hf prefer score`: columns of scores for the candidates of `prefer draw`, or for any table of images.

Each reward gives a column of its name, and `reward` is their weighted sum. Scores are kept by the content of the image,
its prompt and the reward: the same command continues after a kill, and a further reward scores nothing again.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SciflowError, counted, first_line
from ..files import write_json
from .judge import add_judge, judge_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..data.candidates import Candidates
    from ..metrics.rewards.base import Reward, Scores

logger = logging.getLogger(__name__)

_NAMES = (
    "file_name",
    "latents_file",
    "group_id",
    "number",
    "seed",
)  # columns that name a candidate, and decide no score


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer score`, and its function as `run`."""
    from ..metrics.rewards.base import BUILT_IN

    add = parser.add_argument
    parser.set_defaults(run=_score)
    add("--input_dir", help="folder of images with a metadata.jsonl (or .csv, .parquet), as `prefer draw` writes it")
    add("--table", help="a .jsonl, .csv or .parquet file instead, with columns file_name and caption")
    add(
        "--reward",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{', '.join(BUILT_IN)}, or the dotted path of a function of prompts and images, such as my_module.mine",
    )
    add("--reward_weights", nargs="+", type=float, default=[], metavar="W", help="of the sum, one a reward (default 1)")
    add("--output_file", help="table to write (default: the one that was read, complete or not at all)")
    add("--batch_size", type=int, default=16, help="images scored at once, and lost by a kill (default 16)")
    add_judge(parser)


def _score(args: argparse.Namespace) -> None:
    from ..data.candidates import SUFFIXES, read_candidates
    from ..metrics.rewards.base import load_rewards
    from ..options import check_range

    check_range("batch_size", args.batch_size, "[1, inf)")
    judge = judge_of(args, args.reward)
    rewards = load_rewards(args.reward, args.reward_weights, judge=judge)
    candidates = read_candidates(input_dir=args.input_dir, table=args.table)
    output = Path(args.output_file or candidates.file)
    if output.suffix not in SUFFIXES:
        raise SciflowError(f"`output_file` {str(output)!r}: give a file that ends with {', '.join(SUFFIXES)}.")
    taken = [reward.name for reward in rewards if reward.name in (candidates.key, candidates.caption, *_NAMES)]
    if taken:
        raise SciflowError(f"`reward` {taken[0]!r} has the name of a column that says what the image is. Rename it.")
    kept = _Kept(output)
    for reward in rewards:
        if reward.name not in kept.rewards and any(reward.name in row for row in candidates.rows):
            logger.warning("The column %s of %s is replaced by the scores.", reward.name, candidates.file)
    scoring = _Scoring(candidates, rewards, kept)
    if judge is not None:
        judge.announce(len(candidates.rows), scoring.columns)
    scores = scoring.run(args.batch_size)
    scores.check([row[candidates.key] for row in candidates.rows])
    columns = scores.table(rewards)
    candidates.with_columns(columns).write(output, list(columns))
    for name, column in columns.items():
        known = [score for score in column if score is not None]
        mean = f"mean {sum(known) / len(known):.4f}, {min(known):.4f} to {max(known):.4f}" if known else "no score"
        logger.info("%s: %s of %s, %s", name, f"{len(known):,}", counted(len(column), "image"), mean)
    logger.info("The scores are in %s.", output)


class _Kept:
    """Scores by key, on disk next to the table, a small file for each batch until the run ends."""

    def __init__(self, table: Path) -> None:
        self.folder = table.with_name(f".{table.name}.scores")
        self.scores: dict[str, float | None] = {}
        self.rewards: set[str] = set()
        for file in sorted(self.folder.glob("*.json")):
            try:
                held = json.loads(file.read_text(encoding="utf-8"))
                self.scores |= held["scores"]
                self.rewards |= set(held["rewards"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("%s cannot be read (%s): its images are scored again.", file, first_line(error))

    def add(self, rewards: Sequence[str], scores: Mapping[str, float | None]) -> None:
        self.scores |= scores
        self.rewards |= set(rewards)
        name = hashlib.sha256("".join(scores).encode()).hexdigest()[:16]
        write_json(self.folder / f"{name}.json", {"rewards": sorted(rewards), "scores": scores})

    def join(self) -> None:
        """Makes one file of all."""
        before = [file for file in self.folder.glob("*.json") if file.name != "all.json"]
        if before:
            write_json(self.folder / "all.json", {"rewards": sorted(self.rewards), "scores": self.scores})
        for file in before:
            file.unlink(missing_ok=True)


class _Scoring:
    """Scores of all rows, batch by batch, without those that are kept."""

    def __init__(self, candidates: "Candidates", rewards: "Sequence[Reward]", kept: _Kept) -> None:
        from ..metrics.rewards.base import REWARD, Scores

        self.candidates, self.rewards, self.kept = candidates, rewards, kept
        scored = {REWARD, candidates.caption, *(reward.name for reward in rewards), *kept.rewards}
        names = [name for name in dict.fromkeys(name for row in candidates.rows for name in row) if name not in scored]
        self.columns = {name: [row.get(name) for row in candidates.rows] for name in names}
        if "reference" in self.columns:  # a file's name begins at the table
            folder = candidates.file.parent
            cells = self.columns["reference"]
            self.columns["reference"] = [str(folder / cell) if isinstance(cell, str) else cell for cell in cells]
        self.prompts: list[str] = [row[candidates.caption] for row in candidates.rows]
        self.identities = {reward.name: reward.identity() for reward in rewards}
        self.found = Scores({reward.name: [None] * len(self.prompts) for reward in rewards})
        self.taken_from_disk = 0

    def run(self, batch_size: int) -> "Scores":
        from tqdm import tqdm

        number = len(self.prompts)
        for start in tqdm(range(0, number, batch_size), desc="scores", unit="batch", disable=None):
            self._batch(range(start, min(start + batch_size, number)))
        self.kept.join()
        if self.taken_from_disk:
            logger.info("%s known from an earlier run.", counted(self.taken_from_disk, "score"))
        return self.found

    def _batch(self, rows: Sequence[int]) -> None:
        from ..metrics.rewards.base import Failure, score_images

        contents = {row: hashlib.sha256(self.candidates.image(row).read_bytes()).hexdigest() for row in rows}
        images: dict[int, Image | str] = {}
        new: dict[str, float | None] = {}
        for reward in self.rewards:
            keys = {row: self._key(reward, row, contents[row]) for row in rows}
            known = [row for row in rows if keys[row] in self.kept.scores]
            for row in known:
                self.found.columns[reward.name][row] = self.kept.scores[keys[row]]
            self.taken_from_disk += len(known)
            wanted = [row for row in rows if row not in known]
            images |= {row: self._open(row) for row in wanted if row not in images}
            pictures = {row: image for row in wanted if not isinstance(image := images[row], str)}
            scores = score_images(
                [reward],
                [self.prompts[row] for row in pictures],
                list(pictures.values()),
                {name: [column[row] for row in pictures] for name, column in self.columns.items()},
            )
            of_row = dict(zip(pictures, scores.columns[reward.name], strict=True))
            failed = {[*pictures][failure.row]: failure.reason for failure in scores.failures}
            failed |= {row: reason for row in wanted if isinstance(reason := images[row], str)}
            for row, score in of_row.items():
                self.found.columns[reward.name][row] = score
            self.found.failures += [Failure(reward.name, row, reason) for row, reason in sorted(failed.items())]
            new |= {keys[row]: score for row, score in of_row.items() if row not in failed}
        if new:
            self.kept.add([reward.name for reward in self.rewards], new)

    def _key(self, reward: "Reward", row: int, content: str) -> str:
        """A hash of image, prompt, reward and the columns that it takes, which decide a score."""
        columns = {name: column[row] for name, column in reward.taken(self.columns).items() if name not in _NAMES}
        deciding = [self.identities[reward.name], content, self.prompts[row], columns]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()

    def _open(self, row: int) -> "Image | str":
        """The image in RGB, or why it cannot be read."""
        from PIL import Image

        from ..data.build.sources.pixels import to_rgb, unreadable

        try:
            with Image.open(self.candidates.image(row)) as image:
                return to_rgb(image)
        except Exception as error:
            return unreadable(error)
