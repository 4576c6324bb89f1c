"""Learning from rewards of drawn images: DiffusionNFT (Zheng et al. 2025, 2509.16117), and a baseline."""

import torch

REWARD_ALGORITHMS = ("nft", "rft")
SPREADS = ("rollout", "group")
OLD_POLICY_DECAYS = ("on_policy", "slow", "late")
_LIMIT = 5  # standard deviations


def advantages(rewards: torch.Tensor, groups: torch.Tensor, *, spread: str = "rollout") -> torch.Tensor:
    """How much better than the others of its group each image is: (R - mean of its group) / (std + 1e-4), (N,).

    Args:
        rewards: of N images, float64; NaN where there is none, whose advantage is 0.
        groups: number of the group (the prompt) of each, (N,), int64.
        spread: whose standard deviation divides: that of the "rollout", or of the "group".
    """
    known = ~rewards.isnan()
    counts = torch.bincount(groups, weights=known.double()).clamp_min(1)
    values = rewards.nan_to_num(0.0).double()
    mean = torch.bincount(groups, weights=values) / counts
    away = torch.where(known, values - mean[groups], 0.0)
    if spread == "group":
        std = (torch.bincount(groups, weights=away**2) / counts).sqrt()[groups]
    else:
        std = values[known].std(correction=0) if known.any() else values.new_zeros(())
    return away / (std + 1e-4)


def optimality(advantages: torch.Tensor) -> torch.Tensor:
    """The probability r that an image is a good one, in [0, 1]: 1/2 for the mean of its group."""
    return advantages.clamp(-_LIMIT, _LIMIT) / (2 * _LIMIT) + 0.5


def nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    target: torch.Tensor,
    sigmas: torch.Tensor,
    optimality: torch.Tensor,
    *,
    beta: float = 1.0,
) -> torch.Tensor:
    """DiffusionNFT's loss of each sample, (B,): good images draw the policy towards them, bad ones away (section 3.2).

    The policy v defines a positive one, v+ = v_old + beta (v - v_old), and the negative one that the old policy leaves
    then, v- = v_old - beta (v - v_old). With e = sigma (v - u), the error of the clean latents x_t - sigma v:

        5 [r mean(e+^2) / m+  +  (1 - r) mean(e-^2) / m-] / beta,    m = mean |e|, at least 1e-5, without gradient.

    Args:
        velocity: of the policy, (B, ...).
        old_velocity: of the policy that drew the images, at the same noise and level.
        target: u = noise - latents.
        sigmas: (B,).
        optimality: r, (B,), in [0, 1].
        beta: how far the positive policy lies from the old one; smaller is bolder.
    """
    away, sigma = beta * (velocity - old_velocity), sigmas.view(-1, *[1] * (target.ndim - 1))

    def loss_of(policy: torch.Tensor) -> torch.Tensor:
        error = (sigma * (policy - target)).flatten(1)
        return error.square().mean(dim=1) / error.detach().abs().mean(dim=1).clamp_min(1e-5)

    good, bad = loss_of(old_velocity + away), loss_of(old_velocity - away)
    return _LIMIT * (optimality * good + (1 - optimality) * bad) / beta


def rft_loss(
    velocity: torch.Tensor, target: torch.Tensor, advantages: torch.Tensor, *, threshold: float = 0.0
) -> torch.Tensor:
    """The loss of rejection sampling, (B,): mean (v - u)^2 of images with an advantage above `threshold`, else 0."""
    return (velocity - target).square().flatten(1).mean(dim=1) * (advantages > threshold)


def old_policy_decay(rollouts: int, schedule: str) -> float:
    """d of old <- d old + (1 - d) policy, after that many rollouts: the schedules that the paper's code has.

    Args:
        rollouts: n, from 1.
        schedule: "on_policy": 0; "slow": min(.001 n, .5); "late": 0 up to 75, then min(.0075 (n - 75), .999).
    """
    if schedule == "on_policy":
        return 0.0
    return min(0.001 * rollouts, 0.5) if schedule == "slow" else min(0.0075 * max(rollouts - 75, 0), 0.999)
