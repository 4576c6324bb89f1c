"""Where in the noise range a family trains: drawn by key, mapped by a density, shifted by the resolution."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from .arguments import LevelArguments
from .process import NoiseProcess
from .randomness import uniform

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
"""Densities of the noise level (see `density`) and weights of the loss (see `flow_weight`)."""


class NoiseLevels:
    """The noise levels that a family trains on and is measured at: those of its process."""

    @functools.cached_property
    def process(self) -> NoiseProcess:
        """How data becomes noise, and what the network is to predict of it: rectified flow unless a family says."""
        return NoiseProcess()

    def resolution_mu(self, image_seq_len: int) -> float:
        """Logarithm of the resolution-dependent shift for that many image tokens; 0 where a family has none."""
        return 0.0

    def level_quantiles(
        self, keys: torch.Tensor, args: LevelArguments, batch: Mapping[str, Any] | None
    ) -> torch.Tensor:
        """Uniform numbers that become noise levels: (B,), float64, on the CPU.

        Independent, by the samples' keys; with `--stratified_levels` spread over the optimizer step, by the
        `position` and `step_key` of the batch. Only the trainer's loader gives a `step_key`; without, independent.
        """
        u = uniform(keys, stream="level")
        if not args.stratified_levels or batch is None or "step_key" not in batch:
            return u
        return stratify(u, batch["position"], batch["step_key"], args.total_batch)

    def sample_levels(
        self,
        keys: torch.Tensor,
        args: LevelArguments,
        image_seq_len: int,
        batch: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Noise levels of a batch, after the shift: (B,), sigmas in [0, 1], float32, or int64 timesteps; on the CPU."""
        options = {"logit_mean": args.logit_mean, "logit_std": args.logit_std, "mode_scale": args.mode_scale}
        sigmas = density(self.level_quantiles(keys, args, batch), args.weighting_scheme, **options)
        return self.process.levels(shift_sigmas(sigmas, self.shift_mu(args, image_seq_len)).float())

    def shift_mu(self, args: LevelArguments, image_seq_len: int) -> float:
        """mu of `--timestep_shift`: "resolution" asks the family, "none" is 0, a number is the shift e^mu."""
        if args.timestep_shift == "resolution":
            return self.resolution_mu(image_seq_len)
        return 0.0 if args.timestep_shift == "none" else math.log(float(args.timestep_shift))

    def level_range(self) -> float:
        """The level of pure noise, by which logs divide levels: 1 for sigmas, the timesteps for DDPM."""
        return self.process.level_range

    def evaluation_levels(self, num_levels: int) -> torch.Tensor:
        """The fixed grid of `eval_loss`, (num_levels,); the same in every run."""
        return self.process.levels(level_grid(num_levels))


class TimestepLevels(NoiseLevels):
    """Integer timesteps drawn uniformly, without the densities and shifts of flow matching."""

    def sample_levels(
        self,
        keys: torch.Tensor,
        args: LevelArguments,
        image_seq_len: int,
        batch: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Timesteps of a batch, uniform in [0, num_train_timesteps): (B,), int64, on the CPU."""
        return self.process.levels(self.level_quantiles(keys, args, batch))


def stratify(jitter: torch.Tensor, positions: torch.Tensor, step_keys: torch.Tensor, total_batch: int) -> torch.Tensor:
    """u = frac((position + turn + jitter) / total_batch): (B,), float64, in [0, 1); the `u` of the densities below.

    The `total_batch` samples of an optimizer step get one number in each of `total_batch` equal parts of [0, 1). The
    turn, an integer that they share, makes each number alone uniform: a sample that comes at the same place of a
    step every epoch sees all levels, and so does a step of fewer samples. (One jitter for all of the step, as in
    Kingma et al. 2021, appendix I.1, does the same, but leaves more variance: of order T^-2, and not T^-3.)

    Args:
        jitter: independent uniform numbers in [0, 1), (B,), float64.
        positions: in the order of the epoch, whose steps begin at multiples of `total_batch`, (B,).
        step_keys: random 64-bit integers, alike in all samples of a step, (B,).
    """
    part = (positions % total_batch + step_keys % total_batch) % total_batch
    return ((part + jitter) / total_batch).clamp_max(1 - 2.0**-53)


def uniform_density(u: torch.Tensor) -> torch.Tensor:
    """sigma = u: every noise level equally often."""
    return u


def logit_normal_density(u: torch.Tensor, *, logit_mean: float = 0.0, logit_std: float = 1.0) -> torch.Tensor:
    """sigma = sigmoid(logit_mean + logit_std * z), z standard normal (Esser et al. 2024, section 3.1).

    A positive `logit_mean` moves training towards noise, as in the paper. diffusers' example scripts look the
    density up in a descending list of timesteps, so that there a positive mean moves towards the data.

    Args:
        u: uniform numbers in [0, 1), any shape; z is their normal quantile.
    """
    return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)))


def mode_density(u: torch.Tensor, *, mode_scale: float = 1.29) -> torch.Tensor:
    """Heavy in the middle (s > 0) or at the ends (s < 0): equation 20 of Esser et al. 2024, with s = `mode_scale`."""
    return 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def density(
    u: torch.Tensor, weighting_scheme: str, *, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> torch.Tensor:
    """sigma of uniform numbers: "logit_normal", "mode", or uniform for any other `weighting_scheme` (a weight then)."""
    if weighting_scheme == "logit_normal":
        return logit_normal_density(u, logit_mean=logit_mean, logit_std=logit_std)
    return mode_density(u, mode_scale=mode_scale) if weighting_scheme == "mode" else uniform_density(u)


def shift_sigmas(sigmas: torch.Tensor, mu: float) -> torch.Tensor:
    """sigma' = e^mu sigma / (1 + (e^mu - 1) sigma): more noise for more tokens (Esser et al. 2024, equation 23).

    Args:
        mu: logarithm of the shift; 0 changes nothing, ln 3 is SD3's shift of 3.
    """
    return math.exp(mu) * sigmas / (1 + math.expm1(mu) * sigmas)


def level_grid(num_levels: int) -> torch.Tensor:
    """The fixed noise levels of evaluation: midpoints of `num_levels` equal parts of [0, 1], float32."""
    return (torch.arange(num_levels, dtype=torch.float32) + 0.5) / num_levels
