"""From noise to images: Euler and Heun for flows; DDPM, DDIM and ancestral steps; guidance. Noise is passed in.

A network enters as a function. Levels run from noise to data: sigmas from 1 to 0, or timesteps downwards.
"""

from collections.abc import Callable, Sequence

import torch

from .objectives import ddpm_log_variance, ddpm_mean, posterior_variance

FLOW_SAMPLERS = ("euler", "heun")
TIMESTEP_SPACINGS = ("trailing", "quadratic")
DDPM_SAMPLERS = ("ddpm", "ddim", "ancestral")

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latents (B, ...), sigmas (B,)) -> velocity noise - latents, (B, ...)."""
Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
"""(noisy latents (B, ...), timesteps (B,), int64) -> the clean latents, (B, ...). If the network also predicts the
variance: a pair with the fraction v in [-1, 1] (B, ...) of `ddpm_log_variance`."""


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale (conditional - unconditional).

    Of noise, velocities and clean latents alike: at one noise level each is a linear function of the other.
    """
    return unconditional + scale * (conditional - unconditional)


# -- flow matching -----------------------------------------------------------------------------------------------------


def flow_sigmas(num_steps: int) -> torch.Tensor:
    """Noise levels of `num_steps` equal steps from 1 to 0: (num_steps + 1,), float32.

    Raises:
        ValueError: no steps.
    """
    if num_steps < 1:
        raise ValueError(f"`num_inference_steps` {num_steps}: at least 1.")
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).float()


def sample_flow(
    velocity: Velocity, noise: torch.Tensor, sigmas: torch.Tensor, *, sampler: str = "euler"
) -> torch.Tensor:
    """Integrates dx/dsigma = velocity(x, sigma) from noise to data: (B, ...) -> (B, ...).

    Args:
        velocity: noise - latents, our sign (see `opposite_velocity` for the other).
        noise: x at `sigmas[0]`.
        sigmas: (n + 1,), descending; ends at 0.
        sampler: "euler"; "heun": the mean of the velocities at both ends of a step (Karras et al. 2022, algorithm 1),
            two calls a step, one in the last.

    Raises:
        ValueError: unknown sampler.
    """
    if sampler not in FLOW_SAMPLERS:
        raise ValueError(f"`sampler` {sampler!r}: use one of {', '.join(FLOW_SAMPLERS)}.")
    x = noise
    for sigma, next_sigma in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        slope = velocity(x, x.new_full((len(x),), sigma, dtype=torch.float32))
        step = next_sigma - sigma
        if sampler == "heun" and next_sigma > 0:
            ahead = velocity(x + step * slope, x.new_full((len(x),), next_sigma, dtype=torch.float32))
            slope = (slope + ahead) / 2
        x = x + step * slope
    return x


def opposite_velocity(velocity: Velocity) -> Velocity:
    """A network of the opposite convention, x_t = (1 - t) noise + t data and v = data - noise, in ours.

    t = 1 - sigma, and the sign of the velocity turns (Liu et al. 2022 write it that way).
    """
    return lambda noisy, sigmas: -velocity(noisy, 1 - sigmas)


# -- DDPM --------------------------------------------------------------------------------------------------------------


def ddpm_timesteps(num_train_timesteps: int, num_steps: int, *, spacing: str = "trailing") -> torch.Tensor:
    """`num_steps` timesteps, descending from the last: (num_steps,), int64.

    Args:
        spacing: "trailing" (even, Lin et al. 2024), or "quadratic" (Song et al. 2021, appendix D.2): more of them at
            little noise, where samples differ that must agree with a measurement.

    Raises:
        ValueError: fewer than 1 or more than all, unknown spacing.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"`num_inference_steps` {num_steps}: 1 to {num_train_timesteps}, the timesteps of training.")
    if spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"`timestep_spacing` {spacing!r}: use one of {', '.join(TIMESTEP_SPACINGS)}.")
    number = torch.arange(num_steps, 0, -1, dtype=torch.float64)
    share = number / num_steps if spacing == "trailing" else (number / num_steps) ** 2
    return torch.maximum((share * num_train_timesteps).round(), number).long() - 1


def ddim_step(
    noisy: torch.Tensor,
    latents: torch.Tensor,
    alpha_bar: float,
    next_alpha_bar: float,
    *,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of DDIM (Song et al. 2021, equation 12), (B, ...).

    Args:
        noisy: at `alpha_bar`.
        latents: the clean ones, as the network sees them in `noisy`.
        alpha_bar, next_alpha_bar: share of the signal in the variance, now and after the step; 1 at the end.
        eta: 0 is deterministic, 1 has the variance of DDPM's posterior (equation 16).
        noise: standard normal, needed where `eta` > 0.
    """
    epsilon = (noisy - alpha_bar**0.5 * latents) / (1 - alpha_bar) ** 0.5
    variance = eta**2 * posterior_variance(alpha_bar, next_alpha_bar)
    mean = next_alpha_bar**0.5 * latents + max(1 - next_alpha_bar - variance, 0) ** 0.5 * epsilon
    return mean if noise is None or variance == 0 else mean + variance**0.5 * noise


def ancestral_step(
    noisy: torch.Tensor, latents: torch.Tensor, alpha_bar: float, next_alpha_bar: float, *, noise: torch.Tensor
) -> torch.Tensor:
    """Euler's step to less noise than wanted, and fresh noise for the rest (`EulerAncestralDiscreteScheduler`).

    With s^2 = (1 - alpha_bar) / alpha_bar: down to s_down, then up by s_up, s_down^2 + s_up^2 = s_next^2. In exact
    arithmetic this is DDIM with eta 1 and DDPM's posterior.
    """
    now, after = (1 - alpha_bar) / alpha_bar, (1 - next_alpha_bar) / next_alpha_bar  # squares
    up = after * (now - after) / now
    exploding = noisy / alpha_bar**0.5  # latents + s epsilon
    slope = (exploding - latents) / now**0.5
    exploding = exploding + ((after - up) ** 0.5 - now**0.5) * slope + up**0.5 * noise
    return next_alpha_bar**0.5 * exploding


def sample_ddpm(
    denoise: Denoiser,
    noise: torch.Tensor,
    alpha_bar: torch.Tensor,
    timesteps: Sequence[int] | torch.Tensor,
    *,
    sampler: str = "ddpm",
    eta: float = 0.0,
    step_noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """From noise at `timesteps[0]` to data: (B, ...) -> (B, ...).

    Args:
        denoise: what the network makes of the noisy latents; corrections by data belong in there.
        noise: standard normal.
        alpha_bar: of all timesteps of training, (num_train_timesteps,), as `alphas_cumprod` returns it.
        timesteps: descending, as `ddpm_timesteps` returns them; after the last comes the data.
        sampler: "ddpm" (the posterior's mean and variance, or the learned one), "ddim" with `eta`, or "ancestral".
        step_noise: number of the step (0, 1, ...) -> standard normal noise like `noise`; by default from torch's
            default generator. Not called where nothing is added: at the last step, and for DDIM with eta 0.

    Raises:
        ValueError: unknown sampler.
    """
    if sampler not in DDPM_SAMPLERS:
        raise ValueError(f"`sampler` {sampler!r}: use one of {', '.join(DDPM_SAMPLERS)}.")
    times = [int(t) for t in timesteps]
    bars = [float(alpha_bar[t]) for t in times] + [1.0]
    draw = step_noise or (lambda step: torch.randn_like(noise))
    x = noise
    for step, timestep in enumerate(times):
        now, after = bars[step], bars[step + 1]
        found = denoise(x, torch.full((len(x),), timestep, device=x.device))
        latents, fraction = found if isinstance(found, tuple) else (found, None)
        if after == 1:
            x = latents
        elif sampler == "ddim":
            x = ddim_step(x, latents, now, after, eta=eta, noise=draw(step) if eta else None)
        elif sampler == "ancestral":
            x = ancestral_step(x, latents, now, after, noise=draw(step))
        else:
            variance = posterior_variance(now, after)
            scale = variance**0.5 if fraction is None else (ddpm_log_variance(fraction, now, after) / 2).exp()
            x = ddpm_mean(x, latents, now, after) + scale * draw(step)
    return x
