"""Guided sampling by a forward model: a clean image is moved to where it explains the measurement better."""

import torch

from .optics import ForwardModel
from .transforms import IntensityTransform


def towards_measurement(
    latents: torch.Tensor,
    measured: torch.Tensor,
    transform: IntensityTransform,
    optics: ForwardModel,
    *,
    variance: float,
    strength: float = 1.0,
) -> torch.Tensor:
    """A step up the gradient of log p(measured | latents), as long as the Fisher information says: -> (B, C, H, W).

    The network's estimate counts as the mean of a Gaussian prior of `variance` v. Along the gradient g of the Poisson
    log-likelihood the posterior is then highest at about g.g / (g.F g + g.g / v), with F the Fisher information
    J^T diag(1 / m) J of the expected photons m. No step size is to be tuned (compare the fixed one of Chung et al.
    2023, algorithm 1).

    Args:
        latents: in the network's units, as the network sees them now.
        measured: in intensities.
        variance: of the noise at this level, in (0, 1].
        strength: 1 for that step, more or less for a longer or shorter one.
    """

    with torch.enable_grad():
        values = latents.detach().requires_grad_()
        intensities = transform.inverse(values)
        (derivative,) = torch.autograd.grad(intensities.sum(), values, retain_graph=True)
        likelihood = optics.log_likelihood(intensities, measured).sum()
        (gradient,) = torch.autograd.grad(likelihood, values)
    mean = optics.expected_photons(intensities.detach()) + optics.read_noise**2
    change = optics.photons / optics.white * optics.blur(derivative * gradient)  # J g
    slope = gradient.square().flatten(1).sum(1)
    curvature = (change.square() / mean.clamp_min(1e-3)).flatten(1).sum(1) + slope / max(variance, 1e-6)
    step = strength * slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    return latents + step.view(-1, 1, 1, 1) * gradient
