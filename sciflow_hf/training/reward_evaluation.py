"""Rewards of held-out prompts, drawn with the same seeds now and as training began."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object

from ..metrics.comparison import compare
from ..metrics.rewards.base import REWARD, Reward
from .reward_arguments import RewardTrainingArguments
from .reward_prompts import Prompts
from .rollouts import Draw, Painter, plan_draws, score

logger = logging.getLogger(__name__)

Column = Sequence[float | None]
_ENDS = {"low": "_low", "high": "_high"}


def held_out_settings(args: RewardTrainingArguments, prompts: Prompts, rewards: Sequence[Reward]) -> dict[str, Any]:
    """The options that decide the scores of held-out images, next to the weights; plain JSON values."""
    names = ("validation_seeds", "num_inference_steps", "validation_guidance_scale", "rollout_batch_size")
    facts = {name: getattr(args, name) for name in names}
    return facts | {"prompts": prompts.fingerprint, "rewards": [reward.name for reward in rewards]}


def held_out_draws(args: RewardTrainingArguments, prompts: Prompts, *, at_once: int) -> list[Draw]:
    """Every prompt with each of `validation_seeds`."""
    return plan_draws(prompts, range(len(prompts)), [args.validation_seeds] * len(prompts), at_once=at_once)


def held_out_scores(
    args: RewardTrainingArguments,
    prompts: Prompts,
    draws: Sequence[Draw],
    painter: Painter,
    rewards: Sequence[Reward],
    watched: Sequence[Reward],
) -> dict[str, dict[str, float | None]]:
    """The metrics of the images that this rank draws: "row seed" -> metric -> score, None where there is none."""
    found: dict[str, dict[str, float | None]] = {}
    for draw in draws[args.process_index :: args.world_size]:
        texts = [prompts[row]["prompt"] for row in draw.rows]
        _, images = painter.draw(texts, draw, steps=args.num_inference_steps, guidance=args.validation_guidance_scale)
        table: dict[str, list[float | None]] = {}
        for some, prefix in ((rewards, "reward"), (watched, "watched")):
            scores = score(some, prompts, draw, images, timeout=args.reward_timeout)
            for failure in scores.failures[:1]:
                text = prompts[draw.images[failure.row][0]]["prompt"]
                logger.warning(
                    "`reward` %s failed on a held-out image of %.80r (%s): it does not count.",
                    failure.reward, text, failure.reason,
                )  # fmt: skip
            if some is rewards:
                table["reward"] = scores.table(some)[REWARD]
            if some is watched or len(some) > 1:
                table |= {f"{prefix}_{name}": column for name, column in scores.columns.items()}
        for (row, seed), values in zip(draw.images, zip(*table.values(), strict=True), strict=True):
            found[f"{row} {seed}"] = dict(zip(table, values, strict=True))
    return found


def of_all_ranks(found: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """The scores of all held-out images: metric -> "row seed" -> score. All ranks call it."""
    every = {key: scores for part in gather_object([dict(found)]) for key, scores in part.items()}
    names = next(iter(every.values()))
    return {name: {key: every[key][name] for key in sorted(every)} for name in names}


def held_out_metrics(
    now: Mapping[str, Mapping[str, float | None]], before: Mapping[str, Mapping[str, float | None]], prompts: Prompts
) -> dict[str, float]:
    """Each metric with its 95 % interval, its value before (`base_NAME`), and the gain, paired by image.

    Intervals are over prompts, and there are none for fewer than 10.
    """
    keys = list(next(iter(now.values())))
    groups = {image: prompts[int(key.split()[0])]["prompt"] for image, key in enumerate(keys)}

    def known(column: Mapping[str, float | None]) -> dict[int, float]:
        return {image: value for image, key in enumerate(keys) if (value := column[key]) is not None}

    found = compare({name: {"base": known(before[name]), "now": known(now[name])} for name in now}, groups)
    metrics: dict[str, float] = {}
    for name, models in found["metrics"].items():
        gain = found["paired"].get(name, {}).get("now", {})
        if "base" in models:
            metrics[f"base_{name}"] = models["base"]["mean"]
        for key, values, middle in ((name, models.get("now", {}), "mean"), (f"{name}_gain", gain, "difference")):
            metrics |= {key + end: values[of] for of, end in ({middle: ""} | _ENDS).items() if of in values}
    return metrics
