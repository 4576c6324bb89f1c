"""Losses of preferences against lines of numpy in float64, and what they are at the start."""

import math

import numpy as np
import pytest
import torch

from sciflow_hf.diffusion.preferences import PREFERENCE_LOSSES, loser_weights, preference_loss, preference_margins


def drawn(groups: int, losers: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(losers)
    return tuple(torch.rand(groups, 1 + losers, generator=generator, dtype=torch.float64) for _ in range(2))


def by_hand(policy: np.ndarray, reference: np.ndarray, loss: str, beta: float) -> list[float]:
    found = []
    for pi, ref in zip(policy, reference, strict=True):
        s = [(ref[0] - pi[0]) - (ref[k] - pi[k]) for k in range(1, len(pi))]
        each = [-math.log(1 / (1 + math.exp(-beta * v))) for v in s]
        if loss == "mdpo_contrastive":
            found.append(math.log(1 + sum(math.exp(-beta * v) for v in s)) / len(s))
        elif loss == "mdpo_adaptive":
            total = sum(math.exp(-beta * v) for v in s)
            found.append(sum(math.exp(-beta * v) / total * e for v, e in zip(s, each, strict=True)))
        else:
            found.append(sum(each) / len(each))
    return found


@pytest.mark.parametrize("losers", [1, 2, 3])
@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_losses_by_hand(loss: str, losers: int) -> None:
    policy, reference = drawn(5, losers)
    found = preference_loss(preference_margins(policy, reference), loss=loss, beta=7.0)
    np.testing.assert_allclose(found, by_hand(policy.numpy(), reference.numpy(), loss, 7.0), rtol=1e-13)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_at_the_start_a_pair_has_log_2_and_slope_minus_half_beta(loss: str) -> None:
    policy = torch.rand(4, 2, dtype=torch.float64)
    margins = preference_margins(policy, policy.clone()).requires_grad_()
    found = preference_loss(margins, loss=loss, beta=2000.0)
    found.sum().backward()
    assert margins.grad is not None
    np.testing.assert_allclose(found.detach(), math.log(2), rtol=1e-15)
    np.testing.assert_allclose(margins.grad, -1000.0, rtol=1e-15)


def test_gradients_by_hand() -> None:
    """Weights, adaptive ones and those of hard losers, are constants: only the losses have a gradient."""
    policy, reference = drawn(5, 3)
    s = preference_margins(policy, reference)
    x = -7.0 * s
    slopes = -7.0 * x.sigmoid()  # of each -log sigmoid(beta s)
    hard = loser_weights(policy, hard=True)
    expected = {
        "dpo": slopes / 3,
        "mdpo_contrastive": -7.0 * x.exp() / (1 + x.exp().sum(1, keepdim=True)) / 3,
        "mdpo_adaptive": x.softmax(1) * slopes,
        "mdpo_mean": hard * slopes,
    }
    for loss, wanted in expected.items():
        margins = s.clone().requires_grad_()
        preference_loss(margins, loss=loss, beta=7.0, weights=hard).sum().backward()
        torch.testing.assert_close(margins.grad, wanted, rtol=1e-12, atol=0)


def test_one_axis_is_dpo() -> None:
    margins = preference_margins(*drawn(6, 1))
    found = {loss: preference_loss(margins, loss=loss, beta=30.0) for loss in PREFERENCE_LOSSES}
    for loss in PREFERENCE_LOSSES[1:]:
        torch.testing.assert_close(found[loss], found["dpo"], rtol=1e-12, atol=0)


def test_large_margins_neither_overflow_nor_vanish() -> None:
    margins = torch.tensor([[-50.0, 50.0], [50.0, 50.0]], dtype=torch.float64)
    for loss in PREFERENCE_LOSSES:
        found = preference_loss(margins, loss=loss, beta=2000.0)
        assert torch.isfinite(found).all() and found[0] > 1e4 and found[1] == 0


def test_hard_losers_weigh_more() -> None:
    policy = torch.tensor([[0.1, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    weights = loser_weights(policy, hard=True)
    expected = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(weights[0], expected, rtol=1e-14)
    assert not weights.requires_grad
    margins = preference_margins(policy, torch.zeros_like(policy))
    each = [math.log1p(math.exp(-2 * float(s))) for s in margins[0].detach()]
    found = preference_loss(margins, loss="mdpo_mean", beta=2.0, weights=weights)
    assert found.item() == pytest.approx(float(np.dot(expected, each)), rel=1e-14)
