"""Rollouts: images of some prompts, drawn by the policy, scored, and kept on disk until they have been learnt from."""

import functools
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file

from ..data.batches.loader import text_rows
from ..errors import SciflowError, counted, first_line
from ..families.base import PipelineFamily
from ..files import atomic_file, disk_full_named, write_json
from ..metrics.rewards.base import REWARD, Failure, Reward, Scores, score_images
from .reward_prompts import Prompts

if TYPE_CHECKING:
    from PIL.Image import Image

_FACTS = "rollout.json"


@dataclass(frozen=True)
class Draw:
    """Images of some prompts of one size, drawn in one call: so they do not depend on the number of ranks.

    Attributes:
        rows: of the prompts.
        seeds: of each prompt, one for each of its images.
        size: height and width in pixels.
    """

    rows: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...]
    size: tuple[int, int]

    @property
    def images(self) -> list[tuple[int, int]]:
        """(row, seed) of every image, prompt by prompt."""
        return [(row, seed) for row, seeds in zip(self.rows, self.seeds, strict=True) for seed in seeds]


def plan_draws(prompts: Prompts, rows: Sequence[int], seeds: Sequence[Sequence[int]], *, at_once: int) -> list[Draw]:
    """The draws of some prompts: at most `at_once` prompts in each, and at least one."""
    sizes, by_size = prompts.buckets, dict[tuple[int, int], list[int]]()
    for place, row in enumerate(rows):
        by_size.setdefault(sizes[row], []).append(place)
    return [
        Draw(tuple(rows[i] for i in some), tuple(tuple(seeds[i]) for i in some), size)
        for size, places in by_size.items()
        for some in (places[start : start + at_once] for start in range(0, len(places), at_once))
    ]


class Painter:
    """Draws with the network that is being trained; text encoder and VAE are loaded once, at first use.

    Args:
        family: of the network.
        network: bare, in evaluation mode while it draws.
        dtype: of the text encoder.
    """

    def __init__(self, family: PipelineFamily, network: torch.nn.Module, *, dtype: torch.dtype) -> None:
        self.family, self.network, self.dtype = family, network, dtype
        self.device = next(network.parameters()).device

    @functools.cached_property
    def encoders(self) -> Any:
        return self.family.load_text_encoder(device=self.device, dtype=self.dtype)

    @functools.cached_property
    def pipeline(self) -> Any:
        return self.family.load_pipeline(self.network, device=self.device)

    def texts(self, prompts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """The text of each prompt as training needs it, encoded one by one: a batch would round otherwise."""
        return [text_rows(self.family.encode_prompts([prompt], self.encoders))[0] for prompt in prompts]

    def draw(self, prompts: Sequence[str], draw: Draw, *, steps: int, guidance: float) -> tuple[torch.Tensor, Any]:
        """The latents, (n, C, h, w), as a cache holds them, and the n images of a draw."""
        encode = functools.partial(self.family.encode_validation_prompts, device=self.device, dtype=self.dtype)
        texts = [encode([prompt], encoders=self.encoders)[0] for prompt in prompts]
        latents, images = self.family.draw(
            self.pipeline,
            [text for text, seeds in zip(texts, draw.seeds, strict=True) for _ in seeds],
            height=draw.size[0],
            width=draw.size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generators=[torch.Generator().manual_seed(seed) for _, seed in draw.images],
        )
        if not latents.isfinite().all():
            raise SciflowError(
                f"the images of {prompts[0]!r:.80} hold NaN or Inf: the weights are spoilt. Checkpoints of earlier "
                "steps are complete: resume from one with a lower `--learning_rate`."
            )
        return latents, images


def score(
    rewards: Sequence[Reward], prompts: Prompts, draw: Draw, images: "Sequence[Image]", *, timeout: float
) -> Scores:
    """The scores of the images of a draw.

    Raises:
        SciflowError: not within `timeout` seconds; 0 waits for ever.
    """
    rows = [row for row, _ in draw.images]
    texts = [prompts[row]["prompt"] for row in rows]
    call = functools.partial(score_images, rewards, texts, list(images), prompts.columns(rows))
    if not timeout:
        return call()
    names, number = ", ".join(reward.name for reward in rewards), counted(len(images), "image")
    return _within(
        timeout,
        call,
        f"`reward_timeout`: {names} took longer than {timeout:g} s for {number}, the first of {texts[0]!r:.80}. All "
        "images are kept: the same command scores them again. Raise the time, or look at what the rewards wait for.",
    )


def _within(seconds: float, call: Callable[[], Any], message: str) -> Any:
    """The result of `call`; SciflowError if it takes longer. Its thread ends with the process."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.extend([call(), None])
        except BaseException as error:  # raised again by the thread that waits
            found.extend([None, error])

    thread = threading.Thread(target=run, daemon=True, name="rewards")
    thread.start()
    thread.join(seconds)
    if not found:
        raise SciflowError(message)
    result, error = found
    if error is not None:
        raise error
    return result


class Rollout:
    """The draws of a rollout in a folder: each is a file with latents, images and texts, and one with its scores.

    Args:
        folder: of this rollout.
        prompts: of which it draws some.
        draws: all of them.
        rewards: that train.
        facts: all that decides the images: where a folder holds images of others, they are drawn anew.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Prompts,
        draws: Sequence[Draw],
        rewards: Sequence[Reward],
        facts: Mapping[str, Any],
    ) -> None:
        self.folder, self.prompts, self.draws, self.rewards = folder, prompts, draws, rewards
        self.facts: dict[str, Any] = json.loads(json.dumps(dict(facts)))

    def open(self) -> None:
        """Empties a folder that holds images of other facts; by one rank, before the others look."""
        try:
            there = json.loads((self.folder / _FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if there != self.facts:
            shutil.rmtree(self.folder, ignore_errors=True)
            with disk_full_named(self.folder):
                write_json(self.folder / _FACTS, self.facts)

    def draw(self, number: int, painter: Painter, **options: Any) -> None:
        """Draws one of the draws, if it is not there; `options` of `Painter.draw`."""
        draw, file = self.draws[number], self._drawn(number)
        if file.is_file():
            return
        texts = [self.prompts[row]["prompt"] for row in draw.rows]
        latents, images = painter.draw(texts, draw, **options)
        tensors = {"latents": latents, "images": torch.from_numpy(np.stack([np.asarray(i) for i in images]))}
        for place, text in enumerate(painter.texts(texts)):
            tensors |= {f"{place}.{name}": value for name, value in text.items()}
        with disk_full_named(self.folder), atomic_file(file) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)

    def score(self, number: int, *, timeout: float) -> None:
        """Scores one of the draws, if that is not done."""
        file, names = self._scored(number), [reward.name for reward in self.rewards]
        if file.is_file() and list(json.loads(file.read_text(encoding="utf-8"))["scores"]) == sorted(names):
            return
        found = score(self.rewards, self.prompts, self.draws[number], self.images(number), timeout=timeout)
        failures = [[failure.reward, failure.row, failure.reason] for failure in found.failures]
        with disk_full_named(self.folder):
            write_json(file, {"scores": found.columns, "failures": failures})

    def images(self, number: int) -> "list[Image]":
        """Those of one of the draws."""
        from PIL import Image

        with self._file(number) as file:
            return [Image.fromarray(pixels) for pixels in file.get_tensor("images").numpy()]

    def scores(self) -> Scores:
        """The scores of all images, in the order of the draws."""
        found = Scores({reward.name: [] for reward in self.rewards})
        for number in range(len(self.draws)):
            held = json.loads(self._there(self._scored(number)).read_text(encoding="utf-8"))
            before = len(found.columns[self.rewards[0].name])
            found.failures += [Failure(name, before + row, reason) for name, row, reason in held["failures"]]
            for name, column in found.columns.items():
                column += held["scores"][name]
        return found

    def check(self, scores: Scores) -> None:
        """Warns of failures; SciflowError where a reward has failed on all images, which are then scored anew."""
        try:
            scores.check([f"an image of {self.prompts[row]['prompt']!r:.80}" for row, _, _, _ in self.places])
        except SciflowError:
            for number in range(len(self.draws)):
                self._scored(number).unlink(missing_ok=True)
            raise

    @functools.cached_property
    def places(self) -> list[tuple[int, int, int, int]]:
        """The row of the prompt, the draw, the prompt in the draw, and the number of the group of every image."""
        found, group = [], -1
        for number, draw in enumerate(self.draws):
            for place, (row, seeds) in enumerate(zip(draw.rows, draw.seeds, strict=True)):
                group += 1
                found += [(row, number, place, group)] * len(seeds)
        return found

    def sample(self, image: int) -> dict[str, torch.Tensor]:
        """Latents and text of an image, as of a cache."""
        _, number, place, _ = self.places[image]
        with self._file(number) as file:
            texts = [name for name in file.keys() if name.startswith(f"{place}.")]  # noqa: SIM118
            sample = {name.partition(".")[2]: file.get_tensor(name) for name in texts}
            return sample | {"latents": file.get_slice("latents")[image - self.starts[number]]}

    def best_and_worst(self, total: torch.Tensor, number: int) -> "dict[str, list[tuple[Image, str]]]":
        """The images of the highest and of the lowest rewards, at most `number` each, with reward and prompt."""
        known = [i for i in total.argsort(descending=True, stable=True).tolist() if not total[i].isnan()]
        number = min(number, (len(known) + 1) // 2)

        def shown(image: int) -> "tuple[Image, str]":
            row, draw, *_ = self.places[image]
            return self.images(draw)[image - self.starts[draw]], f"{total[image]:.3g}: {self.prompts[row]['prompt']}"

        rows = {"best": known[:number], "worst": known[::-1][:number]}
        return {name: [shown(image) for image in images] for name, images in rows.items()}

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of the first image of each draw."""
        return [0, *itertools.accumulate(len(draw.images) for draw in self.draws)]

    def _file(self, number: int) -> Any:
        return safe_open(self._there(self._drawn(number)), framework="pt")

    def _drawn(self, number: int) -> Path:
        return self.folder / f"draw_{number:04d}.safetensors"

    def _scored(self, number: int) -> Path:
        return self.folder / f"scores_{number:04d}.json"

    @staticmethod
    def _there(file: Path) -> Path:
        if not file.is_file():
            raise SciflowError(
                f"{file} of another rank is not here: `--output_dir` must be on a file system that all machines share."
            )
        return file


def totals(scores: Scores, rewards: Sequence[Reward]) -> torch.Tensor:
    """The weighted sum of the rewards of each image, (N,), float64; NaN where there is none."""
    return _known(scores.table(rewards)[REWARD])


def rollout_metrics(scores: Scores, total: torch.Tensor, groups: torch.Tensor) -> dict[str, float]:
    """Mean and spread of the sum, `reward` and `reward_std`, and of each of several rewards, `reward_NAME`.

    Also `groups_without_spread`, the share of groups in which all known sums are the same.

    Args:
        scores: of N images.
        total: (N,), see `totals`.
        groups: (N,), number of the group of each.
    """
    columns = {"reward": total}
    if len(scores.columns) > 1:
        columns |= {f"reward_{name}": _known(column) for name, column in scores.columns.items()}
    metrics: dict[str, float] = {}
    for name, column in columns.items():
        known = column[~column.isnan()]
        if len(known):
            metrics |= {name: known.mean().item(), f"{name}_std": known.std(correction=0).item()}
    of_groups = [column[~column.isnan()] for column in total.split(groups.bincount().tolist())]
    flat = [bool((known == known[:1]).all()) for known in of_groups]
    return metrics | {"groups_without_spread": sum(flat) / len(flat)}


def _known(column: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([np.nan if value is None else value for value in column], dtype=torch.float64)


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Waits for all ranks at its end; an error on one of them ends all, which would wait for it otherwise."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # raised again once the other ranks know
        error = caught
    if accelerator.num_processes > 1:
        every = gather_object([None if error is None else first_line(error)])
        other = next((found for found in every if found is not None), None)
        if error is None and other is not None:
            raise SciflowError(f"another rank has stopped: {other}")
    if error is not None:
        raise error
