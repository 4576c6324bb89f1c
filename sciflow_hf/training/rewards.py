"""`DiffusionRewardTrainer`: learns from rewards of the images that it draws itself."""

import functools
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from ..adapters.layers import adapter_layers, adapter_parameters
from ..adapters.text_encoders import NetworkWithText
from ..adapters.values import Values, at_start, copies, digest, starting_values, with_values
from ..data.batches.loader import BucketLoader, collate, training_sampler
from ..diffusion.randomness import hash64
from ..diffusion.rewards import advantages, nft_loss, old_policy_decay, optimality, rft_loss
from ..errors import SciflowError, counted, first_line
from ..families.base import ModelFamily, PipelineFamily
from ..files import disk_full_named, write_json
from ..metrics.rewards.base import RewardFunction, Scores, load_rewards, try_packages
from ..report.contact_sheet import write_reward_sheet
from .callbacks.validation import at_rest, log_images
from .loss_log import LossLog
from .out_of_memory import is_out_of_memory
from .reward_arguments import RewardTrainingArguments, RolloutRows
from .reward_evaluation import held_out_draws, held_out_metrics, held_out_scores, held_out_settings, of_all_ranks
from .reward_prompts import Prompts, prompts_for
from .rollouts import Draw, Painter, Rollout, plan_draws, rollout_metrics, together, totals
from .trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
OLD_POLICY, STATE = "old_policy.safetensors", "rewards.json"
_NOTED = ("policy_loss", "kl", "old_distance")
_SHOWN = 6  # best and worst images of a rollout
_FEWEST = 10  # prompts of an interval


class DiffusionRewardTrainer(DiffusionTrainer):
    """Learns online from rewards of its own images: DiffusionNFT (Zheng et al. 2025, 2509.16117).

    An epoch is a rollout: the old policy draws `num_generations` images of each of `prompts_per_rollout` prompts, the
    rewards score them, and `updates_per_rollout` optimizer steps follow on fresh noise. Then the old policy follows the
    trained one. An image depends on the seed, the rollout, its prompt and its number, and not on the number of ranks.

    Latents, texts and scores of a rollout lie in `output_dir/rollouts` until a checkpoint after its last step is
    written: the same command continues in the middle of drawing, of scoring or of the updates, bit for bit.

    The old policy is a second set of values of the adapter; the reference is what training begins with: the network
    without its adapter, or with the one that was loaded.

    Args:
        model, args, options: as of `DiffusionTrainer`; `args` are `RewardTrainingArguments`. Data sets are `Prompts`
            (`prepare_prompts`), or lists of dicts with `prompt`, `height`, `width`, and columns for the rewards; the
            held-out ones are drawn with `validation_seeds` as validation images are.
        reward_funcs: instead of those that `args` name: names, dotted paths or functions, with `args.reward_weights`.
        watch_rewards: likewise.

    Raises:
        SciflowError: options that do not go with rewards; no adapter; a family without prompts or without flow; no
            rewards, or prompts fewer than ranks.
    """

    args: RewardTrainingArguments

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: RewardTrainingArguments | None = None,
        *,
        family: ModelFamily,
        train_dataset: Any,
        eval_dataset: Any = None,
        reward_funcs: Sequence[str | RewardFunction] = (),
        watch_rewards: Sequence[str | RewardFunction] = (),
        **options: Any,
    ) -> None:
        if not isinstance(args, RewardTrainingArguments):
            raise SciflowError(
                f"`args` is a `{type(args).__name__}`: give `sciflow_hf.RewardTrainingArguments`, which has the "
                "options of rewards."
            )
        _check_options(args)
        _warn_of_distilled(_with_prompts(family))
        funcs, watched = list(reward_funcs or args.reward_funcs), list(watch_rewards or args.watch_rewards)
        if not funcs:
            raise SciflowError("`reward_funcs` is empty: name what is to grow, such as ocr or chart.")
        weights = args.reward_weights or [1.0] * len(funcs)
        if len(weights) != len(funcs):
            given = counted(len(weights), "value")
            raise SciflowError(f"`reward_weights` has {given} for {counted(len(funcs), 'reward')}: give one each.")
        every = load_rewards([*funcs, *watched], [*weights, *[0.0] * len(watched)])
        try_packages(every)
        self.rewards, self.watched = every[: len(funcs)], every[len(funcs) :]
        self._start: Values = {}
        self._forget()
        prompts, held_out = (_as_prompts(data, family) for data in (train_dataset, eval_dataset))
        if args.stop_if_watched_falls and not (watched and held_out):
            what = "held-out prompts: hold some out by `--eval_fraction`" if watched else "`watch_rewards`: give some"
            raise SciflowError(f"`stop_if_watched_falls` stops nothing without {what}, or leave it out.")
        if (
            args.stop_if_watched_falls
            and held_out
            and (texts := len({row["prompt"] for row in held_out.rows})) < _FEWEST
        ):
            raise SciflowError(
                f"`stop_if_watched_falls`: {counted(texts, 'held-out prompt')}, and a fall is judged by an interval, "
                f"for which at least {_FEWEST} are needed. Hold more out (`--eval_fraction`), or leave it out."
            )
        self._images = _Images(self, args.rows_of_epoch)
        if args.figure_metrics or options.get("compute_metrics"):
            name = "figure_metrics" if args.figure_metrics else "compute_metrics"
            raise SciflowError(f"`{name}`: evaluations draw the held-out prompts and score them by `watch_rewards`.")
        super().__init__(
            model, args, family=family, train_dataset=prompts, eval_dataset=held_out or None,
            **{"data_collator": _samples} | options,
        )  # fmt: skip
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SciflowError(
                "rewards do not go with FSDP or DeepSpeed, since every rank draws its own images. Use `accelerate "
                "launch` without sharding, and `--quantize_base nf4` where the network is too large."
            )
        if args.world_size > args.prompts_per_rollout:
            raise SciflowError(
                f"`prompts_per_rollout` {args.prompts_per_rollout}: fewer than the {args.world_size} processes, of "
                "which each draws the images of its own prompts. Raise it, or start fewer."
            )
        self._losses = LossLog(names=_NOTED)

    def _check_model(self, model: Any, args: Any) -> None:
        super()._check_model(model, args)
        if not adapter_layers(model):
            raise SciflowError(
                "`no_adapter`: training all weights by rewards would need three networks, the trained one, the one "
                "that draws, and the reference. Add an adapter, whose values are enough."
            )
        if isinstance(model, NetworkWithText):
            raise SciflowError(
                "`train_text_encoder` does not go with rewards: texts are encoded once a rollout. Leave it out."
            )
        self._start = starting_values(model)

    def _check_data(self, dataset: Any) -> None:
        """Nothing more: prompts are checked when they are made."""

    def _forget(self) -> None:
        """Begins anew."""
        self._old: Values = {}
        self._followed = 0  # rollouts after which the old policy has followed the trained one
        self._saved_in = 0  # the rollout of the newest checkpoint
        self._rollout: Rollout | None = None
        self._advantages = torch.empty(0)
        self._started: dict[str, Any] = {}  # scores of the held-out prompts at the start, and what they depend on

    # -- the step ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a batch of images; with `return_outputs` also `loss` and `levels` of each image."""
        parts = [self._losses_of(model, batch) for batch in self._of_one_shape(inputs)]
        rows, *columns = (torch.cat(column) for column in zip(*parts, strict=True))
        loss, levels, numbers = (column[rows.argsort().to(column.device)] for column in columns)
        found = {"loss": loss, "levels": levels, "numbers": numbers}
        return (loss.mean(), found) if return_outputs else loss.mean()

    def _losses_of(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Places in the batch, losses, levels and the numbers of `_NOTED`, of images of one shape."""
        family, args, places = self.family, self.args, batch.pop("place")
        batch, noised = family.noised(batch, args, training=model.training)
        noisy, levels, target, advantage = noised.noisy_latents, noised.levels, noised.target, batch["advantage"]

        def frozen(weights: AbstractContextManager[None]) -> torch.Tensor:
            with torch.no_grad(), weights:
                return family.predict(model, batch, noisy, levels)

        reference = frozen(at_start(self.model, self._start)) if args.kl_weight else None
        old = frozen(with_values(self.model, self._old)) if args.reward_algorithm == "nft" else None

        velocity = family.predict(model, batch, noisy, levels)

        if old is not None:
            loss = nft_loss(velocity, old, target, levels, optimality(advantage), beta=args.nft_beta)
        else:
            loss = rft_loss(velocity, target, advantage, threshold=args.rft_threshold)
        far = [torch.zeros_like(loss) if other is None else _squared(velocity, other) for other in (reference, old)]
        numbers = torch.stack([loss, *far], dim=1).detach()
        return places, loss + args.kl_weight * far[0], levels.float(), numbers

    def _of_one_shape(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A batch in parts whose images, and texts where the family does not pad them, have one shape."""
        samples, pads = inputs["samples"], self.family.pads_text
        free = ("prompt_embeds", "prompt_embeds_mask") if pads else ()
        kinds: dict[Any, list[int]] = {}
        for place, sample in enumerate(samples):
            kind = tuple((n, tuple(value.shape)) for n, value in sorted(sample.items()) if n not in free)
            kinds.setdefault(kind, []).append(place)
        for rows in kinds.values():
            some = {name: inputs[name][rows] for name in ("noise_key", "step_key", "position") if name in inputs}
            yield collate([samples[i] for i in rows], pads_text=pads) | some | {"place": torch.tensor(rows)}

    # -- rollouts ------------------------------------------------------------------------------------------------

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            self.begin_rollout(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    def begin_rollout(self, number: int) -> None:
        """Draws and scores the images of rollout `number`, or what of it is not on disk. All ranks call it.

        Raises:
            SciflowError: a reward that fails on all images or takes too long, a full disk, or no spread in any group
                of the first rollout; on all ranks.
            Preempted: a signal has come to any rank. It is answered after the draw or the score under way, which are
                kept, and the run is saved.
        """
        self._follow(number)
        args, folder = self.args, Path(str(self.args.output_dir)) / ROLLOUTS
        rollout = Rollout(
            folder / f"{number:06d}", self.train_dataset, self._draws(number), self.rewards, self._facts()
        )
        with together(self.accelerator):
            if self.is_world_process_zero():
                saves = self.args.save_strategy != SaveStrategy.NO
                _remove(folder, before=self._saved_in if saves else number)
                rollout.open()
        draws = rollout.draws
        if len(draws) < args.world_size and number == self._followed == 0:
            logger.warning(
                "`rollout_batch_size` %d: a rollout is %s, so only that many of %d processes draw. Lower it.",
                args.rollout_batch_size, counted(len(draws), "draw"), args.world_size,
            )  # fmt: skip
        mine = range(len(draws))[args.process_index :: args.world_size]
        with together(self.accelerator):
            with at_rest(self.model), with_values(self.model, self._old):
                for i in self._until_signal(mine):
                    with _memory_explained(args):
                        rollout.draw(i, self._painter, steps=args.rollout_steps, guidance=self._guidance)
            if not self._preemption.received:
                logger.info("Rollout %d is drawn: scoring %s.", number, counted(args.images_per_rollout, "image"))
            for i in self._until_signal(mine):
                rollout.score(i, timeout=args.reward_timeout)
        self._answer_signal()
        with together(self.accelerator):
            scores = rollout.scores()
            if self.is_world_process_zero():
                rollout.check(scores)
        total, groups = totals(scores, self.rewards), torch.tensor([group for *_, group in rollout.places])
        self._advantages = advantages(total, groups, spread=args.advantage_spread).float()
        self._rollout = rollout
        with together(self.accelerator):
            self._tell(number, scores, total, groups)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # sampling leaves blocks of other sizes than training's

    def _until_signal(self, draws: Sequence[int]) -> Iterator[int]:
        return itertools.takewhile(lambda _: self._preemption.received is None, draws)

    def _answer_signal(self) -> None:
        """Where a signal has come to any rank the run is saved, if it has moved since it was, and ends.

        In the first rollout of a call it stands where it began, or was saved: its random state is not yet back.
        """
        if not self._preemption.any_rank_now(self.args):
            return
        saved = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self._rollout is not None and not saved.is_dir():
            self._save_checkpoint(self.model, None)
        self._preemption.stop(self.state)

    def _follow(self, number: int) -> None:
        """Moves the old policy to where it is after `number` rollouts."""
        self._to_average()
        now = adapter_parameters(self.model)
        self._old = self._old or copies(now)
        while self._followed < number:
            self._followed += 1
            keep = old_policy_decay(self._followed, self.args.old_policy_decay)
            with torch.no_grad():
                self._old = {
                    name: value.mul(keep).add(now[name].to(value.device), alpha=1 - keep) if keep else
                    now[name].detach().clone() for name, value in self._old.items()
                }  # fmt: skip

    def _draws(self, number: int) -> list[Draw]:
        """Those of a rollout; the seed of an image follows from (seed, rollout, place, prompt, number)."""
        args, prompts = self.args, self.train_dataset
        rows = prompts.of_rollout(args.order_seed, number, args.prompts_per_rollout)
        keys = [(args.order_seed, number, place, prompts[row]["prompt"]) for place, row in enumerate(rows)]
        seeds = [[hash64(*key, "image", i) & 0xFFFFFFFF for i in range(args.num_generations)] for key in keys]
        return plan_draws(prompts, rows, seeds, at_once=self._prompts_at_once(args.num_generations))

    def _prompts_at_once(self, images: int) -> int:
        """Prompts of one call; texts that are not padded to one length share none."""
        return 1 if self.family.pads_text else max(1, self.args.rollout_batch_size // images)

    def _facts(self) -> dict[str, Any]:
        """All that decides the images of a rollout, next to its draws."""
        args, names = self.args, ("rollout_steps", "rollout_guidance", "rollout_batch_size", "num_generations")
        facts = super()._identity() | {name: getattr(args, name) for name in names}
        return facts | {"dtype": str(args.weight_dtype), "policy": digest(self._old)}

    @property
    def _guidance(self) -> float:
        """The guidance of rollouts: none unless it is given."""
        given = self.args.rollout_guidance
        return _with_prompts(self.family).no_guidance if given is None else given

    @functools.cached_property
    def _painter(self) -> Painter:
        network = extract_model_from_parallel(self.model, keep_torch_compile=False)
        return Painter(_with_prompts(self.family), network, dtype=self.args.weight_dtype)

    def _tell(self, number: int, scores: Scores, total: torch.Tensor, groups: torch.Tensor) -> None:
        """Logs a rollout, once, and shows its best and worst images; stops where rewards tell no images apart."""
        logs = {"rollout": float(number)} | rollout_metrics(scores, total, groups)
        if any(entry.get("rollout") == number for entry in self.state.log_history):
            return
        if logs["groups_without_spread"] == 1:
            told = (
                f"in rollout {number} the rewards give all images of a prompt the same score, for each of "
                f"{counted(self.args.prompts_per_rollout, 'prompt')} (mean {logs['reward']:.4g})"
            )
            if number == 0:
                raise SciflowError(
                    f"`reward_funcs`: {told}, so there is nothing to learn from. Give a reward that tells them apart, "
                    "or more images of each prompt (`--num_generations`)."
                )
            logger.warning("`reward_funcs`: %s: nothing is learnt from it.", told)
        self.log(logs)
        if self.is_world_process_zero() and self._rollout is not None:
            rows = self._rollout.best_and_worst(total, _SHOWN)
            file = Path(str(self.args.output_dir)) / ROLLOUTS / f"rollout_{number:06d}.png"
            with disk_full_named(file):
                write_reward_sheet(file, rows, title=f"Rollout {number}: the highest and the lowest rewards")
            tags = {f"rollout/{name}_{i}": shown for name, row in rows.items() for i, shown in enumerate(row)}
            log_images(self.callback_handler.callbacks, tags, step=self.state.global_step)

    # -- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> BucketLoader:
        """The images of the rollout in an order of their own; the rows of an epoch are those that its steps take."""
        if self.args.dataloader_num_workers:
            raise SciflowError(
                "`dataloader_num_workers` does not go with rewards, whose images are at hand: leave it out."
            )
        options = self._loader_options() | {"num_workers": 0, "prefetch_factor": None, "posterior": False}
        options["step_keys"], options["caption_dropout"] = self.args.stratified_levels, self.caption_dropout
        options["buffers"] = 2 * self.args.gradient_accumulation_steps + 1
        return BucketLoader(self._images, training_sampler(self._images, self.args), **options)

    def image_of(self, row: int) -> dict[str, Any]:
        """The sample of a row of the rollout, with its `advantage`, and the row of its `prompt`."""
        if self._rollout is None:  # a look at a batch
            self.begin_rollout(0)
        rollout: Any = self._rollout
        image = row % len(rollout.places)
        sample: dict[str, Any] = rollout.sample(image)
        return sample | {"advantage": self._advantages[image], "prompt": rollout.places[image][0]}

    def _identity(self) -> dict[str, Any]:
        args = self.args
        rollout = f"{args.prompts_per_rollout} prompts x {args.num_generations} images"
        return super()._identity() | {
            "rewards": {reward.name: reward.weight for reward in self.rewards},
            "reward_algorithm": args.reward_algorithm,
            "rollout": f"{rollout}, {counted(len(self._images) // args.total_batch, 'step')}",
            "reference": f"adapter {digest(self._start)}" if self._start else "as training begins",
        }

    def method_facts(self) -> dict[str, Any]:
        """Algorithm, beta and rewards, for the model card."""
        args = self.args
        facts = {
            "algorithm": args.reward_algorithm,
            "beta": args.nft_beta,
            "rewards": {reward.name: reward.weight for reward in self.rewards},
            "watched": [reward.name for reward in self.watched],
        }
        return {"rewards": facts}

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _base_is_at_hand(self) -> bool:
        return False

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The held-out prompts."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        if prompts is None:
            raise SciflowError("`eval_dataset` is missing: hold some prompts out with `--eval_fraction`.")
        return _as_prompts(prompts, self.family)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Rewards of the held-out prompts, now and as training began, on the same seeds, with 95 % intervals.

        `reward` is the weighted sum, `reward_NAME` one of several, `watched_NAME` one that does not train; each as it
        is now (with `_low` and `_high`), before (`base_...`), and the difference (`..._gain`, `_gain_low`,
        `_gain_high`), by image, over prompts.

        Raises:
            SciflowError: with `stop_if_watched_falls` where one that is watched has fallen.
        """
        prompts: Prompts = dataloader
        with self.averaged_weights():
            now = self._measured(prompts)
        settings = held_out_settings(self.args, prompts, [*self.rewards, *self.watched])
        if self._started.get("settings") != settings:
            with at_start(self.model, self._start):
                self._started = {"settings": settings, "scores": self._measured(prompts)}
        found = held_out_metrics(now, self._started["scores"], prompts)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self._check_watched(metrics, metric_key_prefix)
        number = len(prompts) * len(self.args.validation_seeds)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=number)

    def _measured(self, prompts: Prompts) -> dict[str, dict[str, float | None]]:
        """The scores of the held-out images with the weights of now, on all ranks."""
        args = self.args
        draws = held_out_draws(args, prompts, at_once=self._prompts_at_once(len(args.validation_seeds)))
        with together(self.accelerator), at_rest(self.model), _memory_explained(args):
            found = held_out_scores(args, prompts, draws, self._painter, self.rewards, self.watched)
        return of_all_ranks(found)

    def _check_watched(self, metrics: Mapping[str, float], prefix: str) -> None:
        for reward in self.watched:
            name = f"{prefix}_watched_{reward.name}"
            if metrics.get(f"{name}_gain_high", 0.0) >= 0:
                continue
            told = (
                f"`watch_rewards` {reward.name} has fallen from {metrics[f'{prefix}_base_watched_{reward.name}']:.4g} "
                f"to {metrics[name]:.4g} on the held-out prompts at step {self.state.global_step} (difference "
                f"{metrics[f'{name}_gain_low']:.4g} to {metrics[f'{name}_gain_high']:.4g} with 95 % confidence)"
            )
            if self.args.stop_if_watched_falls:
                raise SciflowError(
                    f"{told}: the rewards that train are being hacked. Checkpoints of earlier steps are complete. Look "
                    f"at the images in {Path(str(self.args.output_dir)) / ROLLOUTS}, and add what they lack to "
                    "`--reward_funcs`, or raise `--kl_weight`."
                )
            logger.warning("%s. `--stop_if_watched_falls` would stop here.", told)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super()._train(*args, **kwargs)

    def _checkpoint_bytes(self) -> float:
        values = adapter_parameters(self.model).values() if self.model is not None else ()
        return super()._checkpoint_bytes() + 4 * sum(value.numel() for value in values)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """In a checkpoint also the old policy, and what was measured of the held-out prompts at the start."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save and folder.name.startswith("checkpoint-"):
            save_file({name: value.cpu().contiguous() for name, value in self._old.items()}, folder / OLD_POLICY)
            write_json(folder / STATE, {"followed": self._followed, "start": self._started})

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Then earlier rollouts are no longer needed."""
        super()._save_checkpoint(model, trial)
        if self._preemption.saved:
            self._saved_in = int(self.state.epoch or 0)
            if self.is_world_process_zero():
                _remove(Path(str(self.args.output_dir)) / ROLLOUTS, before=self._saved_in)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._followed, self._started = state["followed"], state["start"]
        parameters = adapter_parameters(self.model)
        self._old = {name: value.to(parameters[name].device) for name, value in load_file(folder / OLD_POLICY).items()}
        self._saved_in = self._followed


class _Images(Dataset[dict[str, Any]]):
    """The images of the rollout of now, as often as its steps take them."""

    def __init__(self, trainer: DiffusionRewardTrainer, rows: RolloutRows) -> None:
        self.trainer, self.buckets = trainer, rows.buckets

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.trainer.image_of(row)


def _samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples that may have several shapes; `row` is that of the prompt."""
    keys = {name: torch.tensor([sample.pop(name) for sample in samples])
            for name in ("position", "noise_key", "step_key") if name in samples[0]}  # fmt: skip
    rows = torch.tensor([sample.pop("prompt") for sample in samples])
    return keys | {"row": rows, "samples": [{n: v for n, v in sample.items() if n != "row"} for sample in samples]}


def _remove(folder: Path, *, before: int) -> None:
    """Takes away the images of earlier rollouts."""
    for path in folder.glob("[0-9]" * 6):
        if int(path.name) < before:
            shutil.rmtree(path, ignore_errors=True)


def _as_prompts(data: Any, family: ModelFamily) -> Prompts | None:
    if data is None or isinstance(data, Prompts):
        return data
    return prompts_for(list(data), family, (1024, 1024))


def _squared(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).square().flatten(1).mean(dim=1)


@contextmanager
def _memory_explained(args: RewardTrainingArguments) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SciflowError(
            f"there is no memory to draw {max(args.rollout_batch_size, args.num_generations)} images at once "
            f"({first_line(error)}): lower `--rollout_batch_size`, or `--num_generations`, which are never divided."
        ) from error


def _with_prompts(family: ModelFamily) -> PipelineFamily:
    """The family; SciflowError for one that does not draw from prompts by a flow."""
    if not isinstance(family, PipelineFamily) or family.process.objective != "flow":
        why = "takes no prompts" if not isinstance(family, PipelineFamily) else "is trained by DDPM"
        raise SciflowError(
            f"`family` {family.name} {why}: DiffusionNFT is for flow models that draw from prompts (flux2_klein, "
            "qwen_image, sd3, flux)."
        )
    return family


def _check_options(args: RewardTrainingArguments) -> None:
    """SciflowError for options of plain training that rewards have no formula for."""
    refused = {
        f"`loss_type` {args.loss_type}": args.loss_type != "mse",
        f"`weighting_scheme` {args.weighting_scheme}": args.weighting_scheme in ("sigma_sqrt", "cosmap"),
        f"`min_snr_gamma` {args.min_snr_gamma}": args.min_snr_gamma is not None,
        f"`edit_loss` {args.edit_loss}": args.edit_loss != "uniform",
    }
    for what, is_given in refused.items():
        if is_given:
            raise SciflowError(f"{what} does not go with rewards, whose loss has a weight of its own. Leave it out.")


def _warn_of_distilled(family: PipelineFamily) -> None:
    if family.config().get("is_distilled") or family.config(family.component).get("guidance_embeds"):
        logger.warning(
            "`%s` is distilled: rewards of distilled weights are outside the theory of DiffusionNFT. Train the base "
            "weights where there are some.", family.pretrained_model_name_or_path,
        )  # fmt: skip
