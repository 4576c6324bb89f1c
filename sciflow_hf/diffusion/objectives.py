"""Objectives of DDPM training (Ho et al. 2020): beta schedules, predictions, signal-to-noise ratio, variances."""

import math
from typing import TypeVar

import torch

from .losses import sample_mean

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid", "exponential")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Number = TypeVar("Number", float, torch.Tensor)
MIN_SCALE = 1e-4  # of what `convert_prediction` divides by


def beta_schedule(name: str, num_timesteps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> torch.Tensor:
    """The variances beta_t added at each step: (num_timesteps,), float32.

    Defaults and numbers are those of diffusers' schedulers, which sample with them, and so are the names but two.

    Args:
        name: "linear" (Ho et al. 2020); "scaled_linear", linear in the square root (Stable Diffusion takes it from
            0.00085 to 0.012); "squaredcos_cap_v2" or "cosine", the schedule of Nichol and Dhariwal 2021, equation
            17, with s = 0.008 and beta at most 0.999, whatever start and end; "sigmoid", over [-6, 6];
            "exponential", alpha_bar = exp(-12 t / num_timesteps), whatever start and end.
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
    if name in ("squaredcos_cap_v2", "cosine"):
        bars = [math.cos((t / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(num_timesteps + 1)]
        return torch.tensor([min(1 - bars[t + 1] / bars[t], 0.999) for t in range(num_timesteps)])
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, num_timesteps)) * (beta_end - beta_start) + beta_start
    if name == "exponential":
        return torch.full((num_timesteps,), 1 - math.exp(-12 / num_timesteps))
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


def convert_prediction(
    model_pred: torch.Tensor,
    noisy: torch.Tensor,
    *,
    signal: torch.Tensor,
    noise_scale: torch.Tensor,
    source: str,
    target: str,
) -> torch.Tensor:
    """Converts a prediction for `noisy = signal latents + noise_scale noise` to another type: (B, ...) -> (B, ...).

    "epsilon" is the noise and "sample" the latents; "v_prediction" = signal noise - noise_scale latents;
    "velocity" = noise - latents, of flow matching. Where the mix has nothing of what is asked for (the latents at
    pure noise), no prediction of the other part tells it: what is divided by is at least 1e-4.

    Args:
        model_pred, noisy: (B, ...).
        signal, noise_scale: (B,): sqrt(alpha_bar) and sqrt(1 - alpha_bar), or 1 - sigma and sigma.
        source, target: of the four above.

    Raises:
        ValueError: an unknown one.
    """
    for name in (source, target):
        if name not in (*PREDICTION_TYPES, "velocity"):
            raise ValueError(f"`prediction_type` {name!r}: use one of {', '.join(PREDICTION_TYPES)}, velocity.")
    if source == target:
        return model_pred
    a, b = _like(signal, noisy), _like(noise_scale, noisy)
    latents, epsilon = model_pred, model_pred
    if source == "epsilon":
        latents = (noisy - b * epsilon) / a.clamp_min(MIN_SCALE)
    elif source == "sample":
        epsilon = (noisy - a * latents) / b.clamp_min(MIN_SCALE)
    elif source == "v_prediction":
        latents, epsilon = ((a * noisy - b * model_pred), (b * noisy + a * model_pred))
        latents, epsilon = latents / (a**2 + b**2), epsilon / (a**2 + b**2)
    else:
        latents, epsilon = (noisy - b * model_pred) / (a + b), (noisy + a * model_pred) / (a + b)
    return {"epsilon": epsilon, "sample": latents, "v_prediction": a * epsilon - b * latents,
            "velocity": epsilon - latents}[target]  # fmt: skip


def signal_to_noise(alpha_bar: torch.Tensor) -> torch.Tensor:
    """SNR = alpha_bar / (1 - alpha_bar), any shape."""
    return alpha_bar / (1 - alpha_bar)


def shift_snr(alpha_bar: torch.Tensor, factor: float) -> torch.Tensor:
    """The schedule whose signal-to-noise ratio is `factor` times as large at every timestep, any shape.

    Averaging blocks of s x s pixels divides the noise's variance by s^2 and keeps the coarse image: with the factor
    s^2 a timestep hides as much of the coarse image at both resolutions (Hoogeboom et al. 2023, equation 3).
    """
    return factor * alpha_bar / (1 + (factor - 1) * alpha_bar)


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


def ddpm_mean(noisy: torch.Tensor, latents: torch.Tensor, alpha_bar: Number, next_alpha_bar: Number) -> torch.Tensor:
    """Mean of the posterior q(x_next | x_now, x_0) of DDPM (Ho et al. 2020, equation 7), (B, ...)."""
    alpha = alpha_bar / next_alpha_bar  # of this step, or of the several that it takes at once
    of_latents = next_alpha_bar**0.5 * (1 - alpha) / (1 - alpha_bar)
    return of_latents * latents + alpha**0.5 * (1 - next_alpha_bar) / (1 - alpha_bar) * noisy


def posterior_variance(alpha_bar: Number, next_alpha_bar: Number) -> Number:
    """Variance of that posterior: (1 - next) / (1 - now) (1 - now / next)."""
    return (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)


def ddpm_log_variance(
    fraction: torch.Tensor, alpha_bar: Number, next_alpha_bar: Number, *, least: float = 1e-20
) -> torch.Tensor:
    """Learned log-variance, between the posterior's (fraction -1) and beta (1): Nichol and Dhariwal 2021, equation 15.

    Where the posterior has none, at the last step, its logarithm is that of `least`.
    """
    low = torch.as_tensor(posterior_variance(alpha_bar, next_alpha_bar)).clamp_min(least).log()
    high = torch.as_tensor(1 - alpha_bar / next_alpha_bar).log()
    return low + (fraction + 1) / 2 * (high - low)


def variational_bound(
    latents: torch.Tensor,
    predicted: torch.Tensor,
    noisy: torch.Tensor,
    fraction: torch.Tensor,
    alpha_bar: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """A term of the bound on -log2 p(latents) for each element: (B, ...) -> (B,), bits, float32.

    The divergence of the network's step from the posterior's (Nichol and Dhariwal 2021, equations 4 to 8). At
    timestep 0, where the posterior has no width, minus the logarithm of the step's density, for data in steps of
    2 / 255 (their equation 5 integrates it over the step).

    Args:
        latents, predicted: true and predicted clean latents, (B, ...).
        noisy: (B, ...), at `timesteps` (B,), int64.
        fraction: of `ddpm_log_variance`, (B, ...).
        alpha_bar: of all timesteps.
        mask: weights of the elements, (B, ...), as in `sample_loss`.
    """
    now, after = alpha_bar[timesteps], torch.where(timesteps > 0, alpha_bar[(timesteps - 1).clamp_min(0)], 1.0)
    first = alpha_bar[:2].tolist()
    least = posterior_variance(first[1], first[0])  # instead of 0 at timestep 0
    now, after = _like(now, latents), _like(after, latents)
    true_log = posterior_variance(now, after).clamp_min(least).log()
    log_variance = ddpm_log_variance(fraction, now, after, least=least)
    squared = (ddpm_mean(noisy, latents, now, after) - ddpm_mean(noisy, predicted, now, after)) ** 2
    divergence = 0.5 * (log_variance - true_log - 1 + ((true_log - log_variance).exp() + squared / log_variance.exp()))
    density = 0.5 * (math.log(2 * math.pi) + log_variance + squared / log_variance.exp()) - math.log(2 / 255)
    bound = torch.where(_like(timesteps, latents) == 0, density, divergence)
    return sample_mean(bound, mask) / math.log(2)


def _like(alpha_bar: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ...), to multiply `latents` (B, ...) by."""
    return alpha_bar.view(-1, *[1] * (latents.ndim - 1))
