"""`DiffusionDPOTrainer`: learns from comparisons which of two figures is better."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..adapters.layers import adapter_layers, network_of
from ..adapters.text_encoders import NetworkWithText, use_captions
from ..adapters.values import at_start, digest, starting_values
from ..data.batches.loader import collate
from ..data.batches.threads import release
from ..data.preference_groups import CANDIDATE_KEYS, PreferenceGroups
from ..data.preferences import WORST
from ..data.prior import loss_weights
from ..diffusion.preferences import loser_weights, preference_loss, preference_margins
from ..diffusion.randomness import hash64, signed64
from ..diffusion.sources import source_name
from ..errors import SciflowError
from ..families.base import ModelFamily
from ..metrics.intervals import mean_interval
from .evaluation import NUM_QUARTERS, summarise
from .loss_log import LossLog
from .preference_arguments import PreferenceTrainingArguments
from .trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

_NOTED = ("margin", "right_orders", "winner", "winner_reference", "loser", "loser_reference")
_FEWEST = 16  # groups by which a drift is judged


class DiffusionDPOTrainer(DiffusionTrainer):
    """Trains on groups of a winner and its losers: Diffusion-DPO (Wallace et al. 2023) and M-DPO (SciForma 2026).

    Noise and level are drawn once a group and are the same for all of its candidates, for the trained network and for
    the reference, so that their losses can be compared. `per_device_train_batch_size` counts groups.

    The reference is what training begins with: the network with its adapter switched off; where the adapter was loaded,
    the adapter as it was then; or `reference_model`.

    Args:
        model, args, options: as of `DiffusionTrainer`; `args` are `PreferenceTrainingArguments`. Data sets are
            `PreferenceGroups`, or others whose samples have `latents` (1 + losers, C, h, w), the winner first.
        reference_model: a frozen network of the same shapes (`load_reference`); needed where all weights are trained.

    Raises:
        SciflowError: options that do not go with preferences; no reference, or one of other shapes; data without
            groups.
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
                "options of preferences."
            )
        _check_options(args, options["family"], options.get("train_dataset"))
        self.reference_model = reference_model
        self._start: dict[str, torch.Tensor] = {}  # of a loaded adapter
        self._losers = 1  # of the largest group
        self._recent = np.empty((0, 2))  # losses of the last winners, and those of the reference
        super().__init__(model, args, **options)
        self._losses = LossLog(names=_NOTED)
        if self._start and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise SciflowError(
                "`adapter_path`: under FSDP or DeepSpeed a loaded adapter cannot be its own reference. Merge it into "
                "the network and name that by `--pretrained_model_name_or_path`, or train without sharding."
            )
        if reference_model is not None:
            reference_model.requires_grad_(False).eval()
            self.reference_model = self.accelerator.prepare_model(reference_model, evaluation_mode=True)

    def _check_model(self, model: Any, args: Any) -> None:
        super()._check_model(model, args)
        if self.reference_model is not None:
            _check_reference(self.reference_model, self.family)
            self._set_attention(network_of(self.reference_model), args)
        elif not adapter_layers(model):
            raise SciflowError(
                "`reference_model` is missing: all weights are trained, so the network that training begins with is "
                "needed next to it. Give `sciflow_hf.load_reference(...)`, or add an adapter."
            )
        else:
            self._start = starting_values(model)

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
        loss = self.group_losses(policy, reference, inputs.get("with_worst"))
        found = {"loss": loss, "levels": levels, "numbers": _noted(policy.detach(), reference)}
        return (loss.mean(), found) if return_outputs else loss.mean()

    def group_losses(
        self, policy: torch.Tensor, reference: torch.Tensor, with_worst: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of each group from those of its candidates: (B, 1 + K) and (B, 1 + K), the winner first -> (B,).

        Args:
            with_worst: (B,) bool, whether the last loser is the worst of all, next to those of axes.
        """
        args = self.args
        weights = None
        if args.preference_loss == "mdpo_mean":
            hard = args.preference_weights == "hard"
            weights = loser_weights(policy, with_worst, hard=hard, worst_weight=args.worst_weight)
        margins = preference_margins(policy, reference)
        loss = preference_loss(margins, loss=args.preference_loss, beta=args.preference_beta, weights=weights)
        return loss + args.sft_weight * args.preference_beta / 4 * policy[:, 0] if args.sft_weight else loss

    def candidate_losses(
        self, model: torch.nn.Module, inputs: dict[str, Any], levels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of every candidate under policy and reference, (B, 1 + K) each, and the levels (B,).

        Noise and levels are those of the winners, whatever mode either network is in.
        """
        family, args = self.family, self.args
        batch, size = candidates(inputs)
        groups = len(inputs["latents"])

        winners = family.prepare({name: value[:groups] for name, value in batch.items()}, training=model.training)
        latents = family.clean_latents(winners)
        noise = family.draw_noise(winners["noise_key"], latents, training=model.training)
        if levels is None:
            levels = family.sample_levels(winners["noise_key"], args, family.image_seq_len(latents), winners)

        batch["noise_key"] = torch.as_tensor(winners["noise_key"]).repeat(size)
        shared = {"noise": noise.repeat(size, *[1] * (noise.ndim - 1)), "levels": levels.repeat(size)}
        with torch.no_grad(), self._as_reference():
            network = model if self.reference_model is None else self.reference_model
            reference, _ = family.compute_loss(network, batch, args, **shared)
        policy, noise_levels = family.compute_loss(model, batch, args, **shared)

        policy, reference = (losses.unflatten(0, (size, groups)).T for losses in (policy, reference))
        return policy, reference, noise_levels[:groups]

    def _as_reference(self) -> AbstractContextManager[Any]:
        """The network as training began with it, where it is its own reference."""
        if self.reference_model is not None:
            return nullcontext()
        return at_start(self.model, self._start)

    # -- data ----------------------------------------------------------------------------------------------------

    def _check_data(self, dataset: Any) -> None:
        if not isinstance(dataset, PreferenceGroups):
            super()._check_data(dataset)
            return
        if isinstance(self.model, NetworkWithText):
            use_captions(dataset)
        self._losers = max(self._losers, dataset.group_size - 1)
        super()._check_data(dataset.winners() if self.data_collator is collate else dataset)

    def _check_batch(self, batch: dict[str, Any], dataset: Any = None) -> None:
        winners = dataset.winners() if isinstance(dataset, PreferenceGroups) else dataset
        super()._check_batch(self._first_group(batch), winners)

    def _first_group(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of groups as one of candidates, for a look at its shapes."""
        latents = batch.get("latents")
        if not isinstance(latents, torch.Tensor) or latents.ndim < 5 or latents.shape[1] < 2:
            shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else None
            raise SciflowError(
                f"the data has no groups of candidates: `latents` of a batch are {shape}, and must be (B, 1 + losers, "
                "C, h, w). `sciflow_hf.load_groups(cache)` makes them of a cache."
            )
        self._losers = max(self._losers, latents.shape[1] - 1)
        return candidates(batch)[0]

    def _identity(self) -> dict[str, Any]:
        path = self.args.reference_model
        start = "as training begins" if path is None else Path(path).name if Path(path).is_dir() else path
        if self._start:
            start = f"adapter {digest(self._start)}"
        rules = getattr(self.train_dataset, "rules", None)
        return super()._identity() | {"reference": start, "tuples": rules}

    def method_facts(self) -> dict[str, Any]:
        """Loss, beta and axes, for the model card."""
        args, tuples = self.args, getattr(self.train_dataset, "tuples", ())
        axes = list(dict.fromkeys(axis for item in tuples for axis in item.axes))
        return {"preferences": {"loss": args.preference_loss, "beta": args.preference_beta, "axes": axes}}

    # -- logs ----------------------------------------------------------------------------------------------------

    def _step_metrics(self) -> dict[str, float]:
        """Also margin, share of right orders, and the losses of winners and losers over those of the reference."""
        means = super()._step_metrics()
        for name in ("winner", "loser"):
            if f"{name}_reference" in means:
                means[f"{name}_ratio"] = means.pop(name) / means.pop(f"{name}_reference")
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what `_step_metrics` says; stops where the winners drift."""
        recent = self._winners() if "loss" in logs else self._recent
        super().log(logs, start_time)
        if "loss" in logs:
            self._recent = recent
            self._check_drift(recent)

    def _winners(self) -> np.ndarray:
        """Losses of the winners since the last log, and those of the reference: (N, 2); at least the last few."""
        if not self._losses.notes:
            return self._recent
        noted = self._losses.table(self.accelerator)[:, -len(_NOTED) :]
        now = noted[:, [_NOTED.index("winner"), _NOTED.index("winner_reference")]]
        return now if len(now) >= _FEWEST else np.concatenate([self._recent, now])[-_FEWEST:]

    def _check_drift(self, winners: np.ndarray) -> None:
        limit = self.args.max_winner_drift
        policy, reference = winners.astype(np.float64).sum(axis=0).tolist()
        if limit and len(winners) >= _FEWEST and policy > limit * reference:
            raise SciflowError(
                f"the winners' loss is {policy / reference:.3f} times that of the reference at step "
                f"{self.state.global_step}, and `max_winner_drift` is {limit:g}: the network moves away from the "
                "figures that it should prefer. Checkpoints of earlier steps are complete. Lower `--learning_rate` or "
                "`--preference_beta`, or anchor the winner by `--sft_weight 1`."
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """No checkpoint is written, and none removed for it, once the winners have drifted."""
        self._check_drift(self._winners())
        super()._save_checkpoint(model, trial)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _base_is_at_hand(self) -> bool:
        return False  # the reference is measured with the policy, each time

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Losses on the fixed grid, and the row numbers (B,).

        (B, levels * (1 + K) * 2 + 1): of each candidate those of policy and reference, NaN where there is none, then
        1 for edits and 0 for groups without sources.
        """
        batch = self._prepare_inputs(inputs)
        columns = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for number, level in enumerate(self.family.evaluation_levels(self.args.eval_levels)):
                keys = torch.tensor([signed64(hash64(int(key), number)) for key in batch["noise_key"]])
                policy, base, _ = self.candidate_losses(model, batch | {"noise_key": keys}, level.expand(len(keys)))
                both = torch.stack([policy, base], dim=2).float()  # (B, 1 + K, 2)
                missing = both.new_full((len(both), 1 + self._losers - both.shape[1], 2), torch.nan)
                columns.append(torch.cat([both, missing], dim=1).flatten(1))
        columns.append(torch.full_like(columns[0][:, :1], float(source_name(0) in batch)))
        release(inputs)
        return None, torch.cat(columns, dim=1), batch["row"].to(columns[0].device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's; remembers which losers each group has."""
        loader = super().get_eval_dataloader(eval_dataset)
        tuples = getattr(loader.dataset, "tuples", ())
        self._eval_axes = {item.group: item.axes for item in tuples}
        return loader

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        """Loss and gain of the preference, where `base_loss` is that of the reference; and `preference_metrics`."""
        rows = [self._eval_rows[int(row)] for row in prediction.label_ids]
        first = {row: i for i, row in reversed(list(enumerate(rows)))}
        names = sorted(first)
        measured = torch.from_numpy(np.asarray(prediction.predictions))[[first[name] for name in names]].double()
        table = measured[:, :-1].unflatten(1, (self.args.eval_levels, 1 + self._losers, 2))
        bad = [name for name, group in zip(names, table, strict=True) if not torch.isfinite(group[:, :2]).all()]
        if bad:
            logger.warning("The loss of %d of %d evaluated groups is not finite: %s.", len(bad), len(names), bad[:5])
        levels = self.family.evaluation_levels(self.args.eval_levels).numpy() / self.family.level_range()
        axes = [self._eval_axes.get(name, ()) for name in names]
        loss, base = (self._table_losses(table, axes, kind).numpy() for kind in (0, 1))
        known = dict(zip(names, base.tolist(), strict=True))
        edits = measured[:, -1].numpy().astype(bool)
        metrics = summarise(loss, levels, names, self._eval_groups, known, edits)
        metrics |= preference_metrics(table.numpy(), levels, [self._eval_groups[name] for name in names], axes)
        if self._user_metrics is not None:
            metrics |= self._user_metrics(EvalPrediction(predictions=loss, label_ids=prediction.label_ids))
        return metrics

    def _table_losses(self, table: torch.Tensor, axes: Sequence[Sequence[str]], kind: int) -> torch.Tensor:
        """Group losses (N, levels) of a table (N, levels, 1 + K, 2); kind 1: as if the policy were the reference."""
        found = torch.empty(table.shape[:2], dtype=table.dtype)
        sizes = (~table[:, 0, :, 1].isnan()).sum(dim=1)
        worst = torch.tensor([len(each) > 1 and each[-1] == WORST for each in axes])
        for size in sizes.unique().tolist():
            chosen = sizes == size
            some = table[chosen][:, :, :size]
            policy, reference = some[..., kind].flatten(0, 1), some[..., 1].flatten(0, 1)
            with_worst = worst[chosen].repeat_interleave(table.shape[1])
            found[chosen] = self.group_losses(policy, reference, with_worst).unflatten(0, some.shape[:2])
        return found


def preference_metrics(
    table: np.ndarray, levels: np.ndarray, groups: Sequence[str], axes: Sequence[Sequence[str]]
) -> dict[str, float]:
    """How held-out groups are ordered, with 95 % intervals (`_low`, `_high`) where `mean_interval` gives one.

    - `right_orders`: share of losers over which the policy has gained on its winner, in the mean over the levels (a tie
      counts half); `right_orders_q1` to `_q4` by noise range, and where losers stand for several axes, of each axis.
    - `margin`: how much, in units of the loss; likewise of each axis.
    - `winner_ratio`, `loser_ratio`: the loss over that of the reference, sums over all.

    Args:
        table: (N, levels, 1 + K, 2): losses of winner and losers under policy and reference; NaN for no loser.
        levels: (levels,), in [0, 1].
        groups: (N,) for the intervals.
        axes: of each group the axis of each loser.
    """
    gained = table[..., 1] - table[..., 0]
    margins = gained[:, :, :1] - gained[:, :, 1:]  # (N, levels, K)
    mean, metrics = margins.mean(axis=1), dict[str, float]()

    def told(name: str, values: np.ndarray, center: float | None = None) -> None:
        """The mean of values (N, K), NaN for none, and its interval."""
        there = ~np.isnan(values).all(axis=1)
        each = np.nanmean(values[there], axis=1)
        metrics[name] = float(each.mean()) if center is None else center
        interval = mean_interval(each, [group for group, one in zip(groups, there, strict=True) if one])
        if interval is not None:
            metrics[f"{name}_low"], metrics[f"{name}_high"] = interval

    def right(values: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(values), np.nan, (np.sign(values) + 1) / 2)

    told("right_orders", right(mean))
    told("margin", mean)
    quarter = np.minimum((levels * NUM_QUARTERS).astype(int), NUM_QUARTERS - 1)
    for q in np.unique(quarter).tolist():
        told(f"right_orders_q{q + 1}", right(margins[:, quarter == q].mean(axis=1)))
    named = np.full(mean.shape, "", dtype=object)
    for i, names in enumerate(axes):
        named[i, : len(names)] = names
    several = sorted({name for names in axes for name in names})
    for axis in several if len(several) > 1 else ():
        told(f"right_orders_{axis}", np.where(named == axis, right(mean), np.nan))
        told(f"margin_{axis}", np.where(named == axis, mean, np.nan))
    for name, losses in (("winner", table[:, :, :1]), ("loser", table[:, :, 1:])):
        policy, reference = (np.nanmean(losses[..., kind], axis=(1, 2))[:, None] for kind in (0, 1))
        ratio = float(policy.mean() / reference.mean())
        told(f"{name}_ratio", ratio + (policy - ratio * reference) / reference.mean(), ratio)  # linear in both
    return metrics


def candidates(batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A batch of B groups as one of candidates: first all winners, then each group's first loser, ...; and 1 + K."""
    size, flat = batch["latents"].shape[1], dict[str, Any]()
    for name, value in batch.items():
        if name in CANDIDATE_KEYS:
            flat[name] = value.transpose(0, 1).flatten(0, 1)
        elif isinstance(value, torch.Tensor):
            flat[name] = value.repeat(size, *[1] * (value.ndim - 1))
        elif name != "with_worst":
            flat[name] = list(value) * size
    flat.pop("with_worst", None)
    return flat, size


def load_reference(
    family: ModelFamily, args: PreferenceTrainingArguments, *, trained: bool, meta: bool = False
) -> torch.nn.Module | None:
    """The frozen reference of `DiffusionDPOTrainer`; None where the network without its adapter is the reference.

    Where all weights are trained, it computes as the trained network does under autocast, bit for bit, so that no
    rounding is taken for a gain: with `--bf16` or `--fp16` its matrices are kept in 16 bit, the rest in float32. Next
    to an adapter it has the dtype of the frozen network.

    Args:
        family: of the network.
        args: `reference_model` says where another one is.
        trained: whether all weights are trained (`--no_adapter`), so that a second copy is needed.
        meta: without weights, for `--dry_run`.

    Raises:
        SciflowError: as `family.load_model`.
    """
    place = args.reference_model
    if place is None and not trained:
        return None
    if place is not None:
        inside = Path(place) / family.component  # of a pipeline, or of a run that trained all weights
        path = str(inside if (inside / "config.json").is_file() else place)
        family = dataclasses.replace(family, network_name_or_path=path, init_weights=None)  # type: ignore[call-arg]
    try:
        network = family.load_model(dtype=torch.float32 if trained else args.weight_dtype, meta=meta)
    except SciflowError as error:
        raise error if place is None else SciflowError(f"`reference_model` {place!r}: {error}") from error
    if trained:
        _matrices_to(network, args.weight_dtype)
    return network.requires_grad_(False).eval()


def _matrices_to(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Changes the weights that autocast would round to `dtype`; but the first, by which inputs have their dtype."""
    first = next(network.parameters())
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight is not first:
            module.weight.data = module.weight.data.to(dtype)


def _check_reference(reference: torch.nn.Module, family: ModelFamily) -> None:
    """SciflowError where a reference is not of the shapes of the family's network."""
    network = family.load_model(dtype=torch.float32, meta=True)
    expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
    found = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        name = odd[0]
        raise SciflowError(
            f"`reference_model`: {name} has the shape {found.get(name)} there and {expected.get(name)} in the network "
            f"that is trained ({len(odd)} differ). Give a reference of the same network."
        )


def _noted(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The numbers that `_NOTED` names, of each group: (B, 6)."""
    margins = preference_margins(policy, reference)
    columns = [margins.mean(1), ((margins.sign() + 1) / 2).mean(1)]
    for kind in (slice(1), slice(1, None)):
        columns += [losses[:, kind].mean(1) for losses in (policy, reference)]
    return torch.stack([column.float() for column in columns], dim=1)


def _check_options(args: PreferenceTrainingArguments, family: Any, dataset: Any) -> None:
    """SciflowError for options of plain training that preferences have no formula for."""
    refused = {
        f"`loss_type` {args.loss_type}": args.loss_type != "mse",
        "`precondition_outputs`": bool(getattr(family, "precondition_outputs", False)),
        "`learn_sigma`": bool(getattr(family, "learn_sigma", False)),
        "data for prior preservation": loss_weights(dataset) is not None,
    }
    for what, is_given in refused.items():
        if is_given:
            raise SciflowError(f"{what} does not go with preferences: they compare squared errors. Leave it out.")
