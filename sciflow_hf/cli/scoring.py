"""Shared by commands that score many images and continue after a kill: scores are kept by content."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import counted, first_line
from ..files import write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..data.candidates import Candidates
    from ..metrics.rewards.base import Reward, Scores

logger = logging.getLogger(__name__)

NAMES = ("file_name", "latents_file", "group_id", "number", "seed")
"""Columns that name a candidate, and decide no score."""


class Kept:
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


class Scoring:
    """Scores of all rows, batch by batch, without those that are kept."""

    def __init__(self, candidates: "Candidates", rewards: "Sequence[Reward]", kept: Kept) -> None:
        from ..metrics.rewards.base import REWARD, Scores

        self.candidates, self.rewards, self.kept = candidates, rewards, kept
        scored = {REWARD, candidates.caption, *(reward.name for reward in rewards), *kept.rewards}
        names = [name for name in dict.fromkeys(name for row in candidates.rows for name in row) if name not in scored]
        self.columns = {name: [row.get(name) for row in candidates.rows] for name in names}
        for name in {"reference", "sources"} & self.columns.keys():  # a file's name begins at the table
            self.columns[name] = [_below(candidates.file.parent, cell) for cell in self.columns[name]]
        self.prompts: list[str] = [row[candidates.caption] for row in candidates.rows]
        self.identities = {reward.name: reward.identity() for reward in rewards}
        self.found = Scores({reward.name: [None] * len(self.prompts) for reward in rewards})
        self.taken_from_disk = 0

    def run(self, batch_size: int, *, join: bool = True) -> "Scores":
        """Scores of all rows.

        Args:
            batch_size: images scored at once, and lost by a kill.
            join: whether what is kept becomes one file; leave that to the first of several processes.
        """
        from tqdm import tqdm

        number = len(self.prompts)
        for start in tqdm(range(0, number, batch_size), desc="scores", unit="batch", disable=None):
            self._batch(range(start, min(start + batch_size, number)))
        if join:
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
        columns = {name: column[row] for name, column in reward.taken(self.columns).items() if name not in NAMES}
        deciding = [self.identities[reward.name], content, self.prompts[row], columns]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()

    def _open(self, row: int) -> "Image | str":
        """The image in RGB, or why it cannot be read."""
        from PIL import Image

        from ..data.build.sources.pixels import to_rgb, unreadable

        try:
            with Image.open(self.candidates.image(row)) as image:
                return to_rgb(image)
        except Exception as error:  # PIL lets through whatever its decoders raise; the image is named
            return unreadable(error)


def _below(folder: Path, cell: Any) -> Any:
    """Names of files in a cell, one or a list, below `folder`; any other cell as it is."""
    if isinstance(cell, list):
        return [_below(folder, each) for each in cell]
    return str(folder / cell) if isinstance(cell, str) else cell
