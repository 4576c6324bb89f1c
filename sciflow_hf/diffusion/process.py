"""How data becomes noise, for networks that are trained either way: rectified flow, or DDPM at integer timesteps."""

from dataclasses import dataclass, field

import torch

from .losses import flow_weight
from .objectives import alphas_cumprod, beta_schedule, convert_prediction, ddpm_weight, variational_bound

OBJECTIVES = ("flow", "ddpm")
PREDICTIONS = ("velocity", "v_prediction", "epsilon", "sample")


def current_name(prediction_type: str, objective: str) -> str:
    """`prediction_type`; ddpm's "v_prediction" (Salimans and Ho 2022) was called "velocity" in earlier versions."""
    return "v_prediction" if (objective, prediction_type) == ("ddpm", "velocity") else prediction_type


@dataclass
class NoiseProcess:
    """noisy = signal data + noise_scale noise, at levels that are sigmas in [0, 1] or timesteps.

    Args:
        objective: "flow": 1 - sigma and sigma; "ddpm": sqrt(alpha_bar) and sqrt(1 - alpha_bar).
        prediction_type: what the network predicts: "velocity" (noise - data) of a flow, "v_prediction" (signal noise -
            noise_scale data) of ddpm, "epsilon" or "sample". See `current_name` for older names.
        num_train_timesteps, schedule: of ddpm; see `beta_schedule`.
    """

    objective: str = "flow"
    prediction_type: str = "velocity"
    num_train_timesteps: int = 1000
    schedule: str = "linear"
    alpha_bar: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.prediction_type = current_name(self.prediction_type, self.objective)
        self.alpha_bar = alphas_cumprod(beta_schedule(self.schedule, self.num_train_timesteps))

    @property
    def level_range(self) -> float:
        """The level of pure noise."""
        return 1.0 if self.objective == "flow" else float(self.num_train_timesteps)

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
        if self.alpha_bar.device != levels.device:
            self.alpha_bar = self.alpha_bar.to(levels.device)
        alpha_bar = self.alpha_bar[levels]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def weight(
        self, levels: torch.Tensor, *, weighting_scheme: str = "none", min_snr_gamma: float | None = None
    ) -> torch.Tensor:
        """(B,). min-SNR is one loss on the data, whatever is predicted; the scheme's weight is of a flow's velocity."""
        if (self.objective, self.prediction_type) == ("flow", "velocity"):
            return flow_weight(levels, weighting_scheme=weighting_scheme, min_snr_gamma=min_snr_gamma)
        signal, noise_scale = self.mixture(levels)
        share = signal**2 / (signal**2 + noise_scale**2)
        return ddpm_weight(share, prediction_type=self.prediction_type, min_snr_gamma=min_snr_gamma)

    def clean(self, model_pred: torch.Tensor, noisy: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The data that a prediction means, (B, ...)."""
        signal, noise_scale = self.mixture(levels)
        return convert_prediction(
            model_pred, noisy, signal=signal, noise_scale=noise_scale, source=self.prediction_type, target="sample"
        )

    def variance_loss(
        self,
        latents: torch.Tensor,
        noisy: torch.Tensor,
        model_pred: torch.Tensor,
        fraction: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """What teaches the variance under ddpm, (B,): the bound with the mean held fast, times T / 1000.

        Beside the mean squared error this is L_hybrid of Nichol and Dhariwal 2021, lambda = 0.001.
        """
        predicted = self.clean(model_pred.detach(), noisy, timesteps)
        bound = variational_bound(latents, predicted, noisy, fraction, self.alpha_bar, timesteps)
        return bound * self.num_train_timesteps / 1000
