"""Losses that learn which image of a group is better: Diffusion-DPO in flow form, and M-DPO with a loser an axis."""

import torch
import torch.nn.functional as F

PREFERENCE_LOSSES = ("dpo", "mdpo_contrastive", "mdpo_adaptive", "mdpo_mean")


def preference_margins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How much more the policy has gained on the winner than on each loser, s: (B, 1 + K) and (B, 1 + K) -> (B, K).

    s_k = (reference_w - policy_w) - (reference_k - policy_k), above 0 where the order is right.

    Args:
        policy: losses of the trained network at one noise and one level a group, the winner's first.
        reference: those of the network that training began with, at the same noise and level.
    """
    gained = reference - policy
    return gained[:, :1] - gained[:, 1:]


def preference_loss(
    margins: torch.Tensor, *, loss: str, beta: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of every group: margins (B, K) -> (B,); log 2 where policy and reference are the same and K is 1.

    Args:
        margins: of `preference_margins`.
        loss: one of `PREFERENCE_LOSSES`. With x_k = -beta s_k:

            - `dpo`: mean of -log sigmoid(beta s_k) (Wallace et al. 2023, equation 14, in flow form).
            - `mdpo_contrastive`: log(1 + sum exp(x_k)) / K;
            - `mdpo_adaptive`: sum of softmax(x)_k, without gradient, times -log sigmoid(beta s_k);
            - `mdpo_mean`: the same with `weights` (SciForma 2026).
        beta: strength, of losses that are means over the elements.
        weights: of `mdpo_mean`, (B, K) or (K,); 1 / K where not given.
    """
    x = -beta * margins
    each = F.softplus(x)  # -log sigmoid(beta s)
    if loss == "mdpo_contrastive":
        return F.softplus(x.logsumexp(dim=1)) / x.shape[1]
    if loss == "mdpo_adaptive":
        return (x.softmax(dim=1).detach() * each).sum(dim=1)
    if loss == "mdpo_mean" and weights is not None:
        return (weights * each).sum(dim=1)
    return each.mean(dim=1)


def loser_weights(
    policy: torch.Tensor,
    with_worst: torch.Tensor | None = None,
    *,
    hard: bool = False,
    worst_weight: float = 1.0,
    temperature: float = 0.2,
) -> torch.Tensor:
    """Weights of `mdpo_mean`, without gradient: (B, 1 + K) -> (B, K); those of the axes add up to 1.

    Args:
        policy: losses of the trained network, the winner's first.
        with_worst: (B,), whether the last loser is the worst of all, next to the axes'; its weight is `worst_weight`.
        hard: in proportion to exp((policy_k - policy_w) / temperature) instead of all alike.
    """
    logits = (policy[:, 1:] - policy[:, :1]).detach() / temperature if hard else torch.zeros_like(policy[:, 1:])
    if with_worst is None:
        return logits.softmax(dim=1).detach()
    worst = torch.zeros_like(logits, dtype=torch.bool)
    worst[:, -1] = with_worst
    return logits.masked_fill(worst, -torch.inf).softmax(dim=1).detach().masked_fill(worst, worst_weight)
