"""Losses between prediction and target, and the weights of the noise levels. All per sample, float32."""

import math

import torch
import torch.nn.functional as F

from .arguments import LossArguments

LOSSES = ("mse", "l1", "huber")
EDIT_LOSSES = ("uniform", "weighted", "balanced")
"""How the elements inside and outside of an edited region (`edit_mask`) count."""


def sample_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    *,
    loss_type: str = "mse",
    huber_delta: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss of every sample: (B, ...) and (B, ...) -> (B,), float32.

    Args:
        loss_type: "mse", "l1" or "huber" (quadratic below `huber_delta`, linear above).
        mask: weights of the elements, (B, ...) of the same shape, at least 0: the mean becomes
            sum(mask * loss) / sum(mask), and 0 for a sample whose mask is 0 everywhere.
    """
    pred, target = model_pred.float(), target.float()
    if loss_type == "mse":
        loss = (pred - target) ** 2
    elif loss_type == "l1":
        loss = (pred - target).abs()
    else:
        loss = F.huber_loss(pred, target, reduction="none", delta=huber_delta)
    return sample_mean(loss, mask)


def sample_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of every sample, (B, ...) -> (B,), weighted by `mask` as in `sample_loss`."""
    values = values.flatten(1)
    if mask is None:
        return values.mean(dim=1)
    mask = mask.float().flatten(1)
    return (mask * values).sum(dim=1) / mask.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def edit_weights(edit_mask: torch.Tensor, loss_mask: torch.Tensor | None, args: LossArguments) -> torch.Tensor | None:
    """Weights (B, h, w) of an edit's elements in `sample_loss`, where `--edit_loss` looks closer; else `loss_mask`.

    With m in [0, 1] the part of an element inside the changed region and w its weight in `loss_mask`, the loss is the
    mean over the elements weighted by

    - `weighted`: w (1 + (`edit_weight` - 1) m);
    - `balanced`: w (1 - b) (1 - m) / sum(w (1 - m)) + w b m / sum(w m) with b = `edit_balance`, which is (1 - b) times
      the mean outside and b times the mean inside; w where one of them is empty.

    Args:
        edit_mask: (B, h, w) uint8, 255 inside the changed region.
        loss_mask: (B, h, w), or None for 1 everywhere.
    """
    if args.edit_loss == "uniform":
        return loss_mask
    inside = edit_mask.float() / 255
    weight = torch.ones_like(inside) if loss_mask is None else loss_mask.float()
    if args.edit_loss == "weighted":
        return weight * (1 + (args.edit_weight - 1) * inside)
    parts = [weight * (1 - inside), weight * inside]
    totals = [part.sum(dim=(1, 2), keepdim=True) for part in parts]
    outside, within = (part / total for part, total in zip(parts, totals, strict=True))
    balanced = (1 - args.edit_balance) * outside + args.edit_balance * within
    return torch.where((totals[0] > 0) & (totals[1] > 0), balanced, weight)


def flow_weight(
    sigmas: torch.Tensor, *, weighting_scheme: str = "none", min_snr_gamma: float | None = None
) -> torch.Tensor:
    """Weight of the velocity loss at each noise level: (B,) -> (B,).

    Args:
        weighting_scheme: "sigma_sqrt": sigma^-2; "cosmap": 2 / (pi (1 - 2 sigma + 2 sigma^2))
            (Esser et al. 2024, section 3.1); anything else: 1 (the scheme is then a density, not a weight).
        min_snr_gamma: min-SNR (Hang et al. 2023) weights the loss on x0 by min(SNR, gamma). With
            SNR = ((1 - sigma) / sigma)^2 and x0 - x0_pred = sigma (u_pred - u) the weight on the velocity is
            sigma^2 min(SNR, gamma) = min((1 - sigma)^2, gamma sigma^2).
    """
    if weighting_scheme == "sigma_sqrt":
        weight = sigmas**-2
    elif weighting_scheme == "cosmap":
        weight = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    else:
        weight = torch.ones_like(sigmas)
    if min_snr_gamma is not None:
        weight = weight * torch.minimum((1 - sigmas) ** 2, min_snr_gamma * sigmas**2)
    return weight
