"""How data becomes noise and what a network predicts of it: rectified flow, or DDPM at integer timesteps."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .losses import flow_weight
from .objectives import alphas_cumprod, beta_schedule, convert_prediction, ddpm_weight, shift_snr, variational_bound

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
        """What the network is told of a level: 1000 sigma, or the timestep."""
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
        """What the network is to predict, (B, ...): "v_prediction" as Salimans and Ho 2022, appendix D."""
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
        """What teaches the variance under ddpm, (B,): the bound with the mean held fast, times T / 1000.

        Beside the mean squared error this is L_hybrid of Nichol and Dhariwal 2021, lambda = 0.001. `mask` (B, ...) as
        in `sample_loss`.
        """
        latents, noisy, timesteps = noised.latents, noised.noisy_latents, noised.levels
        predicted = self.clean(model_pred.detach(), noisy, timesteps)
        bound = variational_bound(latents, predicted, noisy, fraction, self.alpha_bar, timesteps, mask=mask)
        return bound * self.num_train_timesteps / 1000


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
