"""Where in the noise range a family trains: drawn by key, mapped by a density, shifted by the resolution."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import timesteps
from .randomness import uniform

if TYPE_CHECKING:
    from ..training.arguments import DiffusionTrainingArguments

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
"""Densities of the noise level (see `density`) and weights of the loss (see `flow_weight`)."""


class NoiseLevels:
    """The noise levels of flow matching, sigmas in [0, 1]; families with others override what differs."""

    def resolution_mu(self, image_seq_len: int) -> float:
        """Logarithm of the resolution-dependent shift for that many image tokens; 0 where a family has none."""
        return 0.0

    def level_quantiles(
        self, keys: torch.Tensor, args: "DiffusionTrainingArguments", batch: Mapping[str, Any] | None
    ) -> torch.Tensor:
        """Uniform numbers that become noise levels: (B,), float64, on the CPU.

        Independent, by the samples' keys; with `--stratified_levels` spread over the optimizer step, by the
        `position` and `step_key` of the batch. Only the trainer's loader gives a `step_key`; without, independent.
        """
        u = uniform(keys, stream="level")
        if not args.stratified_levels or batch is None or "step_key" not in batch:
            return u
        return timesteps.stratify(u, batch["position"], batch["step_key"], args.total_batch)

    def sample_levels(
        self,
        keys: torch.Tensor,
        args: "DiffusionTrainingArguments",
        image_seq_len: int,
        batch: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Noise levels of a batch, after the shift: sigmas in [0, 1], (B,), float32, on the CPU."""
        options = {"logit_mean": args.logit_mean, "logit_std": args.logit_std, "mode_scale": args.mode_scale}
        sigmas = timesteps.density(self.level_quantiles(keys, args, batch), args.weighting_scheme, **options)
        return timesteps.shift_sigmas(sigmas, self.shift_mu(args, image_seq_len)).float()

    def shift_mu(self, args: "DiffusionTrainingArguments", image_seq_len: int) -> float:
        """mu of `--timestep_shift`: "resolution" asks the family, "none" is 0, a number is the shift e^mu."""
        if args.timestep_shift == "resolution":
            return self.resolution_mu(image_seq_len)
        return 0.0 if args.timestep_shift == "none" else math.log(float(args.timestep_shift))

    def level_range(self) -> float:
        """The level of pure noise, by which logs divide levels: 1 for sigmas, the timesteps for DDPM."""
        return 1.0

    def evaluation_levels(self, num_levels: int) -> torch.Tensor:
        """The fixed grid of `eval_loss`, (num_levels,); the same in every run."""
        return timesteps.level_grid(num_levels)


class TimestepLevels(NoiseLevels):
    """The noise levels of DDPM: whole timesteps, drawn uniformly."""

    _alpha_bar: Any  # a cached property of the family: (num_train_timesteps,), float32

    def sample_levels(
        self,
        keys: torch.Tensor,
        args: "DiffusionTrainingArguments",
        image_seq_len: int,
        batch: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Timesteps of a batch, uniform in [0, num_train_timesteps): (B,), int64, on the CPU."""
        return (self.level_quantiles(keys, args, batch) * len(self._alpha_bar)).long()

    def evaluation_levels(self, num_levels: int) -> torch.Tensor:
        """Midpoints of `num_levels` equal parts of the timesteps, (num_levels,), int64."""
        return (super().evaluation_levels(num_levels) * len(self._alpha_bar)).long()

    def level_range(self) -> float:
        """Timesteps, by which logs divide levels."""
        return float(len(self._alpha_bar))

    def alpha_bar_on(self, device: torch.device) -> torch.Tensor:
        """The signal's share of the variance at each timestep, (num_train_timesteps,), float32, kept on `device`."""
        if self._alpha_bar.device != device:
            self.__dict__["_alpha_bar"] = self._alpha_bar.to(device)
        return self._alpha_bar
