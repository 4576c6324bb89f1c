"""Objectives of DDPM training (Ho et al. 2020): beta schedules, mixing, targets, signal-to-noise ratio."""

import math

import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def beta_schedule(name: str, num_timesteps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> torch.Tensor:
    """The variances beta_t added at each step: (num_timesteps,), float32.

    Names, defaults and numbers are those of diffusers' schedulers, which sample with them.

    Args:
        name: "linear" (Ho et al. 2020); "scaled_linear", linear in the square root (Stable Diffusion takes it from
            0.00085 to 0.012); "squaredcos_cap_v2", the cosine schedule of Nichol and Dhariwal 2021, equation 17,
            with s = 0.008 and beta below 0.999, whatever start and end; "sigmoid", over [-6, 6].
        num_timesteps: at least 1.
        beta_start, beta_end: first and last beta.

    Raises:
        ValueError: unknown name, or no timesteps.
    """
    if num_timesteps < 1:
        raise ValueError(f"`num_timesteps` {num_timesteps}: at least 1.")
    if name == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps)
    if name == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    if name == "squaredcos_cap_v2":
        bars = [math.cos((t / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(num_timesteps + 1)]
        return torch.tensor([min(1 - bars[t + 1] / bars[t], 0.999) for t in range(num_timesteps)])
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, num_timesteps)) * (beta_end - beta_start) + beta_start
    raise ValueError(f"`beta_schedule` {name!r}: use one of {', '.join(BETA_SCHEDULES)}.")


def alphas_cumprod(betas: torch.Tensor, *, zero_terminal_snr: bool = False) -> torch.Tensor:
    """alpha_bar_t, the share of the signal in the variance after step t: product of 1 - beta, (T,) -> (T,).

    Args:
        zero_terminal_snr: move and scale sqrt(alpha_bar) so that the last step is pure noise and the first stays as
            it was (Lin et al. 2024, algorithm 1).
    """
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return alpha_bar
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise (Ho et al. 2020, equation 4).

    Args:
        latents, noise: (B, ...).
        alpha_bar: (B,).
    """
    alpha_bar = _like(alpha_bar, latents)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def ddpm_target(
    latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor, *, prediction_type: str
) -> torch.Tensor:
    """What the network is to predict, (B, ...).

    Args:
        latents, noise: (B, ...).
        alpha_bar: (B,).
        prediction_type: "epsilon": the noise; "sample": the latents; "v_prediction":
            sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents (Salimans and Ho 2022, appendix D).

    Raises:
        ValueError: unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        alpha_bar = _like(alpha_bar, latents)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    if prediction_type == "sample":
        return latents
    raise ValueError(f"`prediction_type` {prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}.")


def signal_to_noise(alpha_bar: torch.Tensor) -> torch.Tensor:
    """SNR = alpha_bar / (1 - alpha_bar), any shape."""
    return alpha_bar / (1 - alpha_bar)


def ddpm_weight(alpha_bar: torch.Tensor, *, prediction_type: str, min_snr_gamma: float | None = None) -> torch.Tensor:
    """Weight of the loss on each target: (B,) -> (B,); 1 without `min_snr_gamma`.

    Args:
        min_snr_gamma: min-SNR (Hang et al. 2023, section 3.4) weights the loss on the latents by min(SNR, gamma).
            With squared errors e of the noise and v of the velocity, the latents' are e / SNR and v / (SNR + 1), so
            that the weights are min(SNR, gamma) / SNR for epsilon (1 at SNR 0) and min(SNR, gamma) / (SNR + 1) for v.
    """
    if min_snr_gamma is None:
        return torch.ones_like(alpha_bar)
    snr = signal_to_noise(alpha_bar)
    if prediction_type == "epsilon":
        return (min_snr_gamma / snr).clamp_max(1)
    weight = snr.clamp_max(min_snr_gamma)
    return weight / (snr + 1) if prediction_type == "v_prediction" else weight


def _like(alpha_bar: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ...), to multiply `latents` by."""
    return alpha_bar.view(-1, *[1] * (latents.ndim - 1))
