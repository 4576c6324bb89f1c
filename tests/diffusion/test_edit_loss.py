"""`--edit_loss`: the weights of an edited region, against the formulas in float64."""

from types import SimpleNamespace

import pytest
import torch

from sciflow_hf.diffusion.losses import edit_weights, sample_loss

RNG = torch.Generator().manual_seed(0)
ERROR = torch.rand(4, 3, 6, 8, generator=RNG) + 0.1
# A region with soft edges, an empty one, a full one, and one that the loss mask leaves nothing of.
REGION = torch.randint(0, 256, (4, 6, 8), generator=RNG, dtype=torch.uint8)
REGION[1], REGION[2], REGION[3] = 0, 255, 0
REGION[3, 0] = 255
MASK = torch.randint(1, 256, (4, 6, 8), generator=RNG, dtype=torch.uint8)
MASK[3, 0] = 0


def loss_of(kind, mask, weight=4.0, balance=0.5):
    args = SimpleNamespace(edit_loss=kind, edit_weight=weight, edit_balance=balance)
    found = edit_weights(REGION, mask, args)
    expanded = None if found is None else found[:, None].expand_as(ERROR)
    return sample_loss(ERROR.sqrt(), torch.zeros_like(ERROR), mask=expanded)


def mean(values, weights):
    return (values * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))


@pytest.mark.parametrize("mask", [None, MASK], ids=["alone", "with a loss mask"])
def test_the_weights_of_an_edit(mask):
    inside = (REGION.double() / 255)[:, None].expand_as(ERROR)
    base = torch.ones_like(inside) if mask is None else mask.double()[:, None].expand_as(inside)
    error, uniform = ERROR.double(), mean(ERROR.double(), base)
    torch.testing.assert_close(loss_of("uniform", mask).double(), uniform, rtol=1e-6, atol=0)
    for weight in (4.0, 0.5):
        times = base * torch.where(inside > 0, 1 + (weight - 1) * inside, 1)  # `edit_weight` times inside
        torch.testing.assert_close(loss_of("weighted", mask, weight).double(), mean(error, times), rtol=1e-6, atol=0)
    for balance in (0.5, 0.9, 0.0):
        parts = (1 - balance) * mean(error, base * (1 - inside)) + balance * mean(error, base * inside)
        expected = torch.where(parts.isnan(), uniform, parts)
        found = loss_of("balanced", mask, balance=balance).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert torch.equal(parts.isnan(), torch.tensor([False, True, True, mask is not None]))


def test_weights_have_the_mean_one():
    """A loss that is alike everywhere stays as it is, whatever the region and the loss."""
    for kind in ("weighted", "balanced"):
        args = SimpleNamespace(edit_loss=kind, edit_weight=7.0, edit_balance=0.8)
        weights = edit_weights(REGION, None, args)[:, None].expand(4, 3, 6, 8)
        found = sample_loss(torch.full((4, 3, 6, 8), 3.0), torch.ones(4, 3, 6, 8), mask=weights)
        torch.testing.assert_close(found, torch.full((4,), 4.0), rtol=1e-6, atol=0)
