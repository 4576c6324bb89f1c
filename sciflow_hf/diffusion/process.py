"""From data to noise: levels drawn by key and density, what is mixed at a level, what a network predicts of it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .arguments import LevelArguments
from .losses import flow_weight
from .objectives import alphas_cumprod, beta_schedule, convert_prediction, ddpm_weight, shift_snr, variational_bound
from .randomness import uniform

OBJECTIVES = ("flow", "ddpm")
PREDICTIONS = ("velocity", "v_prediction", "epsilon", "sample")


def current_name(prediction_type: str, objective: str) -> str:
    """`prediction_type`; ddpm's "v_prediction" (Salimans and Ho 2022) was called "velocity" in earlier versions."""
    return "v_prediction" if (objective, prediction_type) == ("ddpm", "velocity") else prediction_type


class Noised(NamedTuple):
    """A batch that a process mixed at levels (B,), and what the network is to predict of it: (B, ...) each."""

    latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    levels: torch.Tensor
    target: torch.Tensor


@dataclass
class NoiseProcess:
    """noisy = signal data + noise_scale noise, at levels that are sigmas in [0, 1] or timesteps.

    Raises ValueError for an unknown `prediction_type`.

    Args:
        objective: "flow": 1 - sigma and sigma (Liu et al. 2022; Esser et al. 2024, equation 13); "ddpm":
            sqrt(alpha_bar) and sqrt(1 - alpha_bar) (Ho et al. 2020, equation 4).
        prediction_type: what the network predicts: "velocity" (noise - data) of a flow, "v_prediction" (signal noise -
            noise_scale data) of ddpm, "epsilon" or "sample". See `current_name` for older names.
        num_train_timesteps, schedule: of ddpm; see `beta_schedule`.
    """

    objective: str = "flow"
    prediction_type: str = "velocity"
    num_train_timesteps: int = 1000
    schedule: str = "linear"

    def __post_init__(self) -> None:
        self.prediction_type = current_name(self.prediction_type, self.objective)
        if self.prediction_type not in PREDICTIONS:
            raise ValueError(f"`prediction_type` {self.prediction_type!r}: use one of {', '.join(PREDICTIONS)}.")
        flow = self.objective == "flow"
        self.level_range = 1.0 if flow else float(self.num_train_timesteps)  # the level of pure noise
        self.level_dtype = torch.float32 if flow else torch.int64

    @functools.cached_property
    def alpha_bar(self) -> torch.Tensor:
        """The schedule of ddpm, (num_train_timesteps,), float32."""
        return alphas_cumprod(beta_schedule(self.schedule, self.num_train_timesteps))

    def levels(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Sigmas as they are; under ddpm the timesteps at those shares of them: (B,) -> (B,)."""
        if self.objective == "flow":
            return sigmas
        return (sigmas * self.num_train_timesteps).long().clamp_max(self.num_train_timesteps - 1)

    def timestep(self, levels: torch.Tensor) -> torch.Tensor:
        """The network's input for a level: 1000 sigma, or the timestep."""
        return 1000 * levels if self.objective == "flow" else levels

    def mixture(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise scale: (B,) each."""
        if self.objective == "flow":
            return 1 - levels, levels
        alpha_bar = self.alpha_bar_at(levels)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def alpha_bar_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The signal's share of the variance at each timestep of ddpm: (B,) -> (B,), on their device."""
        if self.alpha_bar.device != timesteps.device:
            self.alpha_bar = self.alpha_bar.to(timesteps.device)
        return self.alpha_bar[timesteps]

    def mix(self, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The noisy latents, (B, ...)."""
        signal, noise_scale = (scale.view(-1, *[1] * (latents.ndim - 1)) for scale in self.mixture(levels))
        return signal * latents + noise_scale * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The target of the network, (B, ...): "v_prediction" as Salimans and Ho 2022, appendix D."""
        if self.prediction_type == "velocity":
            return noise - latents
        if self.prediction_type == "v_prediction":
            signal, noise_scale = (scale.view(-1, *[1] * (latents.ndim - 1)) for scale in self.mixture(levels))
            return signal * noise - noise_scale * latents
        return {"epsilon": noise, "sample": latents}[self.prediction_type]

    def weight(
        self, levels: torch.Tensor, *, weighting_scheme: str = "none", min_snr_gamma: float | None = None
    ) -> torch.Tensor:
        """(B,). min-SNR is one loss on the data, whatever is predicted; the scheme's weight is of a flow's velocity."""
        if (self.objective, self.prediction_type) == ("flow", "velocity"):
            return flow_weight(levels, weighting_scheme=weighting_scheme, min_snr_gamma=min_snr_gamma)
        share = self.signal_share(levels)
        return ddpm_weight(share, prediction_type=self.prediction_type, min_snr_gamma=min_snr_gamma)

    def signal_share(self, levels: torch.Tensor) -> torch.Tensor:
        """The signal's share of the variance, (B,)."""
        signal, noise_scale = self.mixture(levels)
        return signal**2 / (signal**2 + noise_scale**2)

    def clean(self, model_pred: torch.Tensor, noisy: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The data that a prediction means, (B, ...)."""
        signal, noise_scale = self.mixture(levels)
        return convert_prediction(
            model_pred, noisy, signal=signal, noise_scale=noise_scale, source=self.prediction_type, target="sample"
        )

    def variance_loss(
        self, noised: Noised, model_pred: torch.Tensor, fraction: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of the variance under ddpm, (B,): the bound with the mean held fixed, times T / 1000.

        Added to the mean squared error: L_hybrid of Nichol and Dhariwal 2021, lambda = 0.001. `mask` (B, ...) as
        in `sample_loss`.
        """
        latents, noisy, timesteps = noised.latents, noised.noisy_latents, noised.levels
        predicted = self.clean(model_pred.detach(), noisy, timesteps)
        bound = variational_bound(latents, predicted, noisy, fraction, self.alpha_bar, timesteps, mask=mask)
        return bound * self.num_train_timesteps / 1000


RECTIFIED_FLOW = NoiseProcess()


class GivenSchedule(NoiseProcess):
    """DDPM by the schedule of a checkpoint.

    Args:
        alpha_bar: of all its timesteps, (num_train_timesteps,), float32.
        prediction_type: as in `NoiseProcess`.
    """

    snr_factor = 1
    """How many times its signal-to-noise ratio the schedule has now, see `shift_snr`."""

    def __init__(self, alpha_bar: torch.Tensor, prediction_type: str) -> None:
        super().__init__("ddpm", prediction_type, len(alpha_bar))
        self.alpha_bar = alpha_bar

    def alpha_bar_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        return shift_snr(super().alpha_bar_at(timesteps), self.snr_factor)

    def signal_share(self, levels: torch.Tensor) -> torch.Tensor:
        return self.alpha_bar_at(levels)


# -- the levels -------------------------------------------------------------------------------------------------------

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
"""Densities of the noise level (see `density`) and weights of the loss (see `flow_weight`)."""


class NoiseLevels:
    """The noise levels that a family trains on and is measured at: those of its process."""

    @functools.cached_property
    def process(self) -> NoiseProcess:
        """How data becomes noise, and what the network is to predict of it: rectified flow unless a family says."""
        return RECTIFIED_FLOW

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
