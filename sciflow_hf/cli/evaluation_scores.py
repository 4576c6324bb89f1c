"""Scores of `sciflow-hf evaluate`: metrics by name, what is kept of them, and their summary."""

import argparse
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError, counted, first_line
from ..files import write_json
from .evaluation_prompts import OWN, REFERENCES, Prompt
from .judge import judge_of
from .scoring import Kept, Scoring

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from ..data.build.sources.record import Stored
    from ..data.candidates import Candidates
    from ..metrics.copies import Copy
    from ..metrics.rewards.base import Reward

logger = logging.getLogger(__name__)

SCORES, SUMMARY = "scores.parquet", "summary.json"
SETS = ("fid", "kid")
"""Metrics of all images of a model together."""
LOWER_IS_BETTER = ("ocr_character_error", "ocr_edit_distance", "training_similarity", *SETS)
_SCORED_AT_ONCE, _FEATURES_AT_ONCE = 16, 32


class Metrics:
    """The metrics that `--metrics` names, checked before anything is drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ..data.pictures import find_pictures
        from ..metrics.rewards.base import GROUPS, asks_judge, load_rewards, try_packages
        from ..metrics.samples import made

        groups = {name: GROUPS.get(name, (name,)) for name in args.metrics if name not in SETS}
        names = list(dict.fromkeys(name for members in groups.values() for name in members))
        self.judge = judge_of(args, names)
        self.rewards: Sequence[Reward] = load_rewards(names, judge=self.judge)
        self.groups = {name: [member.rpartition(".")[2] for member in members] for name, members in groups.items()}
        taken = [reward.name for reward in self.rewards if reward.name in (*OWN, *REFERENCES)]
        if taken:
            raise SciflowError(f"`metrics` {taken[0]!r} has the name of a column that describes the image. Rename it.")
        self.unjudged = [r for r in self.rewards if not asks_judge(r.name)]
        if self.judge is not None:
            self.judge.check()
        try_packages(self.rewards)
        self.sets = [name for name in SETS if name in args.metrics]
        if self.sets and args.metric_network is None:
            raise SciflowError(f"`metrics` {self.sets[0]} needs a feature network: name one by `--metric_network`.")
        if args.metric_network is not None and not self.sets:
            raise SciflowError(f"`metric_network` is for {' and '.join(SETS)}, which `--metrics` does not name.")
        self.network = made(args.metric_network)
        self.training = None if args.training_images is None else find_pictures(args.training_images)

    def score_share(self, output: Path, prompts: Sequence[Prompt], models: Sequence[str]) -> None:
        """Scores the images of one of several processes; the judge is asked by the first process alone."""
        if prompts and self.unjudged:
            candidates = _candidates(output, prompts, models)
            Scoring(candidates, self.unjudged, Kept(candidates.file)).run(_SCORED_AT_ONCE, join=False)

    def write(
        self, output: Path, prompts: Sequence[Prompt], models: Sequence[str], args: argparse.Namespace
    ) -> dict[str, Any]:
        """Writes scores.parquet and summary.json; returns the summary."""
        from ..metrics.comparison import compare

        candidates = _candidates(output, prompts, models)
        scoring = Scoring(candidates, self.rewards, Kept(candidates.file))
        if self.judge is not None:
            self.judge.announce(len(candidates.rows), scoring.columns)
        found = scoring.run(_SCORED_AT_ONCE)
        failures: dict[int, dict[str, str]] = {}
        for failure in found.failures:
            failures.setdefault(failure.row, {})[failure.reward] = failure.reason
        columns = self._columns(found.columns, failures, [row["image"] for row in candidates.rows])
        added: list[dict[str, Any]] = [{"incomplete": i in failures} for i in range(len(candidates.rows))]
        if self.training is not None:
            copies = _copies(output, candidates.rows, self.training)
            columns["training_similarity"] = [copy.similarity for copy in copies]
            added = [new | {"training_image": copy.name} for new, copy in zip(added, copies, strict=True)]
        rows = [row | new for row, new in zip(candidates.rows, added, strict=True)]
        replace(candidates, rows=rows).with_columns(columns).write(output / SCORES, list(columns))
        scores = {metric: _by_model(rows, column, models) for metric, column in columns.items()}
        summary: dict[str, Any] = {"models": models, **compare(scores, _groups(prompts))}
        self._add_sets(summary, output, prompts, models)
        summary["lower_is_better"] = [name for name in summary["metrics"] if name in LOWER_IS_BETTER]
        summary |= {"prompts": len(prompts), "images": len(rows)}
        summary["incomplete"] = {m: sum(r["incomplete"] for r in rows if r["model"] == m) for m in models}
        if "blank" in columns:
            summary["blank_share"] = {model: 1 - found["mean"] for model, found in summary["metrics"]["blank"].items()}
        if self.training is not None:
            summary["copies"] = _named_copies(rows, columns["training_similarity"], models)
        skipped = ("run", "device", "output_dir", "verbose", "card", "trust_remote_code", "judge_url")
        summary["options"] = {name: v for name, v in vars(args).items() if name not in skipped and v not in (None, [])}
        write_json(output / SUMMARY, summary)
        return summary

    def _columns(
        self, found: Mapping[str, list[float | None]], failures: Mapping[int, Mapping[str, str]], names: Sequence[str]
    ) -> dict[str, list[float | None]]:
        """The columns that apply to any image; SciflowError for a metric of which none does."""
        from ..metrics.rewards.base import BUILT_IN

        for group, members in self.groups.items():
            if any(score is not None for name in members for score in found[name]):
                continue
            failed = [(row, reasons[name]) for row, reasons in failures.items() for name in members if name in reasons]
            number = counted(len(names), "image")
            if failed:
                first = f"{names[failed[0][0]]} ({failed[0][1]})"
                raise SciflowError(f"`metrics` {group} failed on all of {number}, first on {first}.")
            needs = [BUILT_IN[name][1] for name in members[-1:] if name in BUILT_IN]
            raise SciflowError(
                f"`metrics` {group} applies to none of {number}{f': it needs {needs[0]}' if needs else ''}. Leave it "
                "out, or evaluate prompts that it applies to. The images are kept."
            )
        for name in found:
            rows = [row for row, reasons in failures.items() if name in reasons]
            if rows:
                logger.warning(
                    "`metrics` %s failed on %s, first on %s (%s): left out of its mean. The same command tries again.",
                    name, counted(len(rows), "image"), names[rows[0]], failures[rows[0]][name],
                )  # fmt: skip
        return {name: column for name, column in found.items() if any(score is not None for score in column)}

    def _add_sets(
        self, summary: dict[str, Any], output: Path, prompts: Sequence[Prompt], models: Sequence[str]
    ) -> None:
        """Distances of the images of each model to the references."""
        if not self.sets:
            return
        from ..metrics.frechet import frechet_distance, image_features, kernel_distance

        paired = [prompt for prompt in prompts if prompt.reference_file is not None]
        if len(paired) < 2:
            raise SciflowError(
                f"`metrics` {self.sets[0]}: {counted(len(paired), 'row')} with a reference, but a set has at least 2. "
                f"References are in a column {', '.join(REFERENCES[:-1])} or {REFERENCES[-1]}. The images are kept."
            )
        if len(paired) < len(prompts):
            without = counted(len(prompts) - len(paired), "row")
            logger.warning("%s without a reference left out of %s.", without, " and ".join(self.sets))
        real = image_features(self.network, _tensors(output, [str(prompt.reference_file) for prompt in paired]))
        for model in models:
            drawn = [name for prompt in paired for name in prompt.images(model)]
            features = image_features(self.network, _tensors(output, drawn))
            of_model: dict[str, dict[str, float]] = {}
            if "fid" in self.sets:
                of_model["fid"] = {"mean": frechet_distance(features, real)}
            if "kid" in self.sets:
                mean, deviation = kernel_distance(features, real)
                of_model["kid"] = {"mean": mean, "deviation": deviation}
            for name, values in of_model.items():
                summary["metrics"].setdefault(name, {})[model] = values | {"number": len(drawn)}
                base = summary["metrics"][name][models[0]]["mean"]
                if model != models[0]:
                    summary["paired"].setdefault(name, {})[model] = {"difference": values["mean"] - base}


def _candidates(output: Path, prompts: Sequence[Prompt], models: Sequence[str]) -> "Candidates":
    """The images as a table."""
    from ..data.candidates import Candidates

    return Candidates(output / SCORES, [row for p in prompts for row in p.table(models)], "image", "prompt")


def _groups(prompts: Sequence[Prompt]) -> dict[int, str]:
    """Row -> its prompt, with the sources of an edit: rows of one prompt resemble each other."""
    names = {
        p.index: f"{p.prompt} {[image.info.get('source_image') for image in p.call.get('source_images', [])]}"
        for p in prompts
    }
    return {p.index * len(p.seeds) + k: names[p.index] for p in prompts for k in range(len(p.seeds))}


def _tensors(output: Path, names: Sequence[str]) -> Iterator["torch.Tensor"]:
    """Images (B, 3, H, W) in [-1, 1], those of one size that follow each other in one batch."""

    import numpy as np
    import torch

    from ..metrics.rewards.pictures import opened

    pictures = (np.asarray(opened(output / name), np.float32) for name in names)
    for _, alike in itertools.groupby(pictures, key=np.shape):
        while batch := list(itertools.islice(alike, _FEATURES_AT_ONCE)):
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 127.5 - 1


def _copies(output: Path, rows: Sequence[Mapping[str, Any]], training: "Mapping[str, Stored]") -> "list[Copy]":
    """The training figure that each image is most like."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from tqdm import tqdm

    from ..metrics.copies import Figures, nearest_copy, perceptual_hash
    from ..metrics.rewards.pictures import opened

    def picture(name: str) -> "Image":
        return opened(training[name].read())

    def hashed(name: str) -> "np.uint64 | str":
        try:
            return perceptual_hash(picture(name))
        except Exception as error:  # PIL lets through whatever its decoders raise
            return first_line(error)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(training, tqdm(pool.map(hashed, training), total=len(training), disable=None), strict=True))
    broken = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    if len(broken) == len(found):
        name, reason = next(iter(broken.items()))
        number = counted(len(found), "image")
        raise SciflowError(f"`training_images`: none of {number} can be read, first {name} ({reason}).")
    if broken:
        name, reason = next(iter(broken.items()))
        logger.warning("`training_images`: %s left out, such as %s (%s).", counted(len(broken), "image"), name, reason)
    names = [name for name in found if name not in broken]
    hashes = np.array([found[name] for name in names], np.uint64)
    pictures = [functools.partial(picture, name) for name in names]
    figures = Figures(names, pictures, hashes)
    return [nearest_copy(opened(output / row["image"]), figures) for row in rows]


def _named_copies(
    rows: Sequence[Mapping[str, Any]], similarities: Sequence[float | None], models: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Model -> its images that copy a training figure."""
    from ..metrics.copies import COPY

    found: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    for row, similarity in zip(rows, similarities, strict=True):
        if similarity is not None and similarity >= COPY:
            about = {"image": row["image"], "training_image": row["training_image"], "similarity": similarity}
            found[row["model"]].append(about)
    return found


def _by_model(
    rows: Sequence[Mapping[str, Any]], column: Sequence[float | None], models: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Model -> row -> score."""
    found: dict[str, dict[int, float]] = {model: {} for model in models}
    for row, score in zip(rows, column, strict=True):
        if score is not None:
            found[row["model"]][row["row"]] = score
    return found
