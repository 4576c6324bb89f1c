"""`DiffusionDPOTrainer`: learns from comparisons which of two figures is better."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import EvalPrediction

from ..adapters.layers import adapter_disabled, adapter_layers
from ..data.batches.threads import release
from ..data.preference_groups import CANDIDATE_KEYS
from ..data.prior import loss_weights
from ..diffusion.preferences import PREFERENCE_LOSSES, hard_weights, preference_loss, preference_margins
from ..diffusion.randomness import hash64
from ..errors import SciflowError
from ..options import arguments, option
from .arguments import DiffusionTrainingArguments
from .evaluation import NUM_QUARTERS, mean_interval, summarise
from .trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

_NAMES = ("margin", "right_orders", "winner_ratio", "loser_ratio")


@arguments
class PreferenceTrainingArguments(DiffusionTrainingArguments):
    """Options of `DiffusionTrainingArguments`, and how preferences are learned."""

    heading: ClassVar[str] = "Preferences"

    preference_loss: str = option(
        "dpo",
        "dpo; of groups with a loser for each axis also mdpo_contrastive, mdpo_adaptive or mdpo_mean.",
        choices=PREFERENCE_LOSSES,
    )
    preference_beta: float = option(
        2000.0, "How strongly a margin between two losses counts; of losses that are means.", within="(0, inf)"
    )
    preference_weights: str = option(
        "uniform",
        "Of mdpo_mean: uniform, or hard, which favours losers with a large loss.",
        choices=("uniform", "hard"),
    )
    sft_weight: float = option(
        0.0,
        "Weight of the winner's own loss beside the preference, in units of beta/4: it keeps the winner from drifting.",
        within="[0, inf)",
    )
    max_winner_drift: float = option(
        1.2,
        "Stop where the winners' loss, between two logs, exceeds this many times that of the reference; 0 never does.",
        within="[0, inf)",
    )


class DiffusionDPOTrainer(DiffusionTrainer):
    """Trains on groups of a winner and its losers (`PreferenceGroups`): Diffusion-DPO and M-DPO.

    The reference is the network with its adapter switched off, or `reference_model`. Noise and level are drawn once a
    group and are the same for all of its candidates, for the policy and the reference. `per_device_train_batch_size`
    counts groups.

    Args:
        model, args, options: as of `DiffusionTrainer`; `args` are `PreferenceTrainingArguments`.
        reference_model: of full fine-tuning, a frozen network of the same shapes.

    Raises:
        SciflowError: options that do not go with preferences; no reference; data without groups.
    """

    args: PreferenceTrainingArguments

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: PreferenceTrainingArguments | None = None,
        *,
        reference_model: torch.nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(args, PreferenceTrainingArguments):
            raise SciflowError(
                f"`args` is a `{type(args).__name__}`: give `sciflow_hf.PreferenceTrainingArguments`, which has the "
                "options of preferences, too."
            )
        self.reference_model = reference_model
        self._told: list[torch.Tensor] = []  # of each batch since the last log (B, 4)
        self._losers = 1
        _check_options(args, options["family"], options.get("train_dataset"))
        super().__init__(model, args, **options)
        if reference_model is not None:
            self.reference_model = reference_model.requires_grad_(False).eval().to(self.args.device)
        elif model is not None and not adapter_layers(model):
            raise SciflowError(
                "`reference_model` is missing: all weights are trained, so the network that training begins with is "
                "needed beside it. Give a frozen copy, or add an adapter."
            )

    # -- the step ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean preference loss of a batch of groups; with `return_outputs` also `loss` and `levels` of each group."""
        policy, reference, levels = self.candidate_losses(model, inputs)
        loss = self.group_losses(policy, reference)
        self._told.append(_told(policy.detach(), reference))
        return (loss.mean(), {"loss": loss, "levels": levels}) if return_outputs else loss.mean()

    def group_losses(self, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The loss of each group from those of its candidates, winner first: (B, 1 + K) and (B, 1 + K) -> (B,)."""
        args = self.args
        weights = hard_weights(policy) if args.preference_weights == "hard" else None
        margins = preference_margins(policy, reference)
        loss = preference_loss(margins, loss=args.preference_loss, beta=args.preference_beta, weights=weights)
        return loss + args.sft_weight * args.preference_beta / 4 * policy[:, 0] if args.sft_weight else loss

    def candidate_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], levels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of every candidate under the policy and the reference, (B, 1 + K) each, and the levels (B,)."""
        family, args = self.family, self.args
        batch, size = candidates(inputs)
        groups = len(inputs["latents"])
        winners = family.prepare({name: value[:groups] for name, value in batch.items()}, training=model.training)
        latents = family.clean_latents(winners)
        noise = family.draw_noise(winners["noise_key"], latents, training=model.training)
        if levels is None:
            levels = family.sample_levels(winners["noise_key"], args, family.image_seq_len(latents), winners)
        shared = {"noise": noise.repeat(size, *[1] * (noise.ndim - 1)), "levels": levels.repeat(size)}
        policy, _ = family.compute_loss(model, batch, args, **shared)
        with torch.no_grad(), self._as_reference(model):
            reference, _ = family.compute_loss(self.reference_model or model, batch, args, **shared)
        by_group = (losses.unflatten(0, (size, groups)).T for losses in (policy, reference))
        return *by_group, levels.to(policy.device)  # type: ignore[return-value]

    def _as_reference(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        return adapter_disabled(self.model) if self.reference_model is None else nullcontext()

    def _check_batch(self, batch: dict[str, Any], dataset: Any = None) -> None:
        if "latents" not in batch or batch["latents"].ndim < 5:
            raise SciflowError(
                "the data has no groups of candidates: `latents` must be (B, 1 + losers, C, h, w). Make it by "
                "`PreferenceGroups(cache, tuples)`."
            )
        self._losers = max(self._losers, batch["latents"].shape[1] - 1)
        super()._check_batch(candidates(batch)[0])

    # -- logs ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds margin, share of right orders and drifts since the last log; stops where the winners drift."""
        if "loss" in logs and self._told:
            table = self.accelerator.gather(torch.cat(self._told))
            self._told.clear()
            logs.update(zip(_NAMES, table.double().mean(0).tolist(), strict=True))
        super().log(logs, start_time)
        limit = self.args.max_winner_drift
        if limit and logs.get("winner_ratio", 0.0) > limit:
            raise SciflowError(
                f"the winners' loss is {logs['winner_ratio']:.2f} times that of the reference at step "
                f"{self.state.global_step}, more than `max_winner_drift` {limit:g}: the network moves away from the "
                "figures it should learn. Checkpoints of earlier steps are complete. Lower `--learning_rate` or "
                "`--preference_beta`, or add `--sft_weight 1`."
            )

    # -- evaluation ----------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Losses of the candidates on the fixed grid, (B, levels * (1 + K) * 2), NaN for losers that are not there."""
        batch = self._prepare_inputs(inputs)
        columns = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for number, level in enumerate(self.family.evaluation_levels(self.args.eval_levels)):
                keys = [hash64(int(key), number) for key in batch["noise_key"]]
                policy, base, _ = self.candidate_losses(model, batch | {"noise_key": keys}, level.expand(len(keys)))
                both = torch.stack([policy, base], dim=2).float()  # (B, 1 + K, 2)
                missing = both.new_full((len(both), 1 + self._losers - both.shape[1], 2), torch.nan)
                columns.append(torch.cat([both, missing], dim=1))
        release(inputs)
        return None, torch.stack(columns, dim=1).flatten(1), batch["row"].to(columns[0].device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's; remembers the axes of each group."""
        loader = super().get_eval_dataloader(eval_dataset)
        tuples = getattr(loader.dataset, "tuples", [])
        self._eval_axes = dict(zip(self._eval_rows, (item.axes for item in tuples), strict=False))
        return loader

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of the groups: see `preference_metrics`."""
        first = {self._eval_rows[int(row)]: i for i, row in reversed(list(enumerate(prediction.label_ids)))}
        names = sorted(first)
        table = torch.from_numpy(np.asarray(prediction.predictions))[[first[name] for name in names]].double()
        table = table.unflatten(1, (self.args.eval_levels, 1 + self._losers, 2))
        levels = (self.family.evaluation_levels(self.args.eval_levels) / self.family.level_range()).numpy()
        loss, base = (self._table_losses(table, kind).numpy() for kind in (0, 1))
        groups = {name: self._eval_groups[name] for name in names}
        known = dict(zip(names, base.tolist(), strict=True))
        axes = [self._eval_axes.get(name, ()) for name in names]
        metrics = summarise(loss, levels, names, groups, known)
        metrics |= preference_metrics(table.numpy(), levels, [groups[name] for name in names], axes)
        if self._user_metrics is not None:
            metrics |= self._user_metrics(EvalPrediction(predictions=loss, label_ids=prediction.label_ids))
        return metrics

    def _table_losses(self, table: torch.Tensor, kind: int) -> torch.Tensor:
        """Group losses (N, levels) of a table (N, levels, 1 + K, 2); kind 1: as if the policy were the reference."""
        found = torch.empty(table.shape[:2], dtype=table.dtype)
        there = (~table[:, 0, :, 0].isnan()).sum(dim=1)
        for size in there.unique().tolist():
            some = table[there == size][:, :, :size]
            policy, reference = some[..., kind].flatten(0, 1), some[..., 1].flatten(0, 1)
            found[there == size] = self.group_losses(policy, reference).unflatten(0, some.shape[:2])
        return found


def preference_metrics(
    table: np.ndarray, levels: np.ndarray, groups: Sequence[str], axes: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Of held-out groups: right_orders (with _low, _high, and _q1 to _q4 by noise range), margin, winner_ratio,
    loser_ratio; where losers stand for axes right_orders and margin of each axis, too.

    An order is right where the winner has gained more than the loser in the mean over the levels. A ratio is the loss
    over that of the reference, of all.

    Args:
        table: (N, levels, 1 + K, 2): losses of winner and losers under policy and reference; NaN for no loser.
        levels: (levels,), in [0, 1].
        groups: (N,) for the interval.
        axes: of each group the axis of each loser.
    """
    gained = table[..., 1] - table[..., 0]
    margins = gained[:, :, :1] - gained[:, :, 1:]  # (N, levels, K)
    mean = margins.mean(axis=1)
    there = ~np.isnan(mean)
    right = _row_means(mean > 0, there)
    metrics = {"right_orders": float(right.mean()), "margin": float(_row_means(np.nan_to_num(mean), there).mean())}
    if (interval := mean_interval(right, groups)) is not None:
        low, high = interval
        metrics |= {"right_orders_low": max(0.0, low), "right_orders_high": min(1.0, high)}
    quarter = np.minimum((levels * NUM_QUARTERS).astype(int), NUM_QUARTERS - 1)
    for q in range(NUM_QUARTERS):
        if (quarter == q).any():
            some = margins[:, quarter == q].mean(axis=1)
            metrics[f"right_orders_q{q + 1}"] = float(_row_means(some > 0, there).mean())
    named = np.full(mean.shape, "", dtype=object)
    for i, names in enumerate(axes):
        named[i, : len(names)] = names
    several = sorted({name for names in axes for name in names})
    for axis in several if len(several) > 1 else ():
        values = mean[(named == axis) & there]
        metrics |= {f"right_orders_{axis}": float((values > 0).mean()), f"margin_{axis}": float(values.mean())}
    winners, losers = table[:, :, 0], table[:, :, 1:]
    metrics["winner_ratio"] = float(winners[..., 0].sum() / winners[..., 1].sum())
    metrics["loser_ratio"] = float(np.nansum(losers[..., 0]) / np.nansum(losers[..., 1]))
    return metrics


def _row_means(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Means over the columns that are there: (N, K), (N, K) -> (N,)."""
    return np.asarray((values * there).sum(axis=1) / there.sum(axis=1))


def candidates(batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A batch of B groups as one of candidates: first all winners, then each group's first loser, ...; and 1 + K."""
    size, flat = batch["latents"].shape[1], dict[str, Any]()
    for name, value in batch.items():
        if name in CANDIDATE_KEYS:
            flat[name] = value.transpose(0, 1).flatten(0, 1)
        elif isinstance(value, torch.Tensor):
            flat[name] = value.repeat(size, *[1] * (value.ndim - 1))
        else:
            flat[name] = list(value) * size
    return flat, size


def _told(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Margin, share of right orders, and the losses of winner and losers over the reference's: (B, 4)."""
    margins, ratio = preference_margins(policy, reference), policy / reference
    columns = [margins.mean(1), (margins > 0).float().mean(1), ratio[:, 0], ratio[:, 1:].mean(1)]
    return torch.stack([column.float() for column in columns], dim=1)


def _check_options(args: PreferenceTrainingArguments, family: Any, dataset: Any) -> None:
    """SciflowError for options of plain training that preferences have no formula for."""
    fields = vars(family)
    refused = {
        f"`loss_type` {args.loss_type}": args.loss_type != "mse",
        "`precondition_outputs`": bool(fields.get("precondition_outputs")),
        "`learn_sigma`": bool(fields.get("learn_sigma")),
        "data for prior preservation": loss_weights(dataset) is not None,
    }
    for what, is_given in refused.items():
        if is_given:
            raise SciflowError(f"{what} does not go with preferences: they compare squared errors. Leave it out.")
