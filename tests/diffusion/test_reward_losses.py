"""DiffusionNFT's loss against its published form, closed forms, and what deliberate mistakes would do."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch

from sciflow_hf.diffusion import rewards

SOURCE = Path(rewards.__file__).read_text(encoding="utf-8")


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def published(velocity, old, latents, noise, sigmas, optimality, beta):
    """By clean latents, as in the paper's code: float64, one sample at a time."""
    losses = []
    for v, v_old, x0, eps, sigma, r in zip(velocity, old, latents, noise, sigmas, optimality, strict=True):
        noisy = (1 - sigma) * x0 + sigma * eps
        positive = noisy - sigma * (beta * v + (1 - beta) * v_old)
        negative = noisy - sigma * ((1 + beta) * v_old - beta * v)
        terms = []
        for clean in (positive, negative):
            weight = max(float((clean - x0).detach().abs().mean()), 1e-5)
            terms.append(((clean - x0) ** 2 / weight).mean())
        losses.append(5 * (r * terms[0] / beta + (1 - r) * terms[1] / beta))
    return torch.stack(losses)


def some(seed=0):
    latents, noise, velocity, old = (draw(seed + i, 6, 3, 2, 4) for i in range(4))
    sigmas = torch.tensor([0.02, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    optimality = torch.tensor([0.0, 0.1, 0.5, 0.7, 0.95, 1.0], dtype=torch.float64)
    return velocity, old, latents, noise, sigmas, optimality


def check_published_form(module):
    for beta in (1.0, 0.1, 0.4):
        velocity, old, latents, noise, sigmas, optimality = some()
        ours, theirs = velocity.clone().requires_grad_(), velocity.clone().requires_grad_()
        loss = module.nft_loss(ours, old, noise - latents, sigmas, optimality, beta=beta)
        expected = published(theirs, old, latents, noise, sigmas, optimality, beta)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def check_no_gradient_without_advantage(module):
    _, old, latents, noise, sigmas, _ = some(10)
    velocity = old.clone().requires_grad_()
    half = module.optimality(torch.zeros(6, dtype=torch.float64))
    loss = module.nft_loss(velocity, old, noise - latents, sigmas, half, beta=0.3)
    loss.sum().backward()
    assert velocity.grad.abs().max() < 1e-15 and (loss > 0).all()


def check_flow_loss_of_the_best(module):
    velocity, old, latents, noise, sigmas, _ = some(20)
    best = module.optimality(torch.full((6,), 7.0, dtype=torch.float64))
    loss = module.nft_loss(velocity, old, noise - latents, sigmas, best, beta=1.0)
    error = velocity - (noise - latents)
    expected = error.square().mean((1, 2, 3)) * 5 * sigmas**2 / (sigmas * error.abs().mean((1, 2, 3)))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def check_mixture(module):
    """Where the weight is constant, the loss is least at v_old + E[(2r - 1)(u - v_old)] / beta.

    It is constant where errors are below its least value: so the mixture is scaled down, which changes no minimum.
    """
    rng = np.random.default_rng(0)
    good = rng.random(500) < 0.4
    latents = np.where(good, 2 + 0.3 * rng.standard_normal(500), -1 + 0.5 * rng.standard_normal(500))
    scale, beta = 1e-7, 0.7
    target = scale * torch.from_numpy(rng.standard_normal(500) - latents)[:, None]
    optimality = torch.from_numpy(np.where(good, 0.9, 0.2))
    old = torch.full((500, 1), scale * -0.3, dtype=torch.float64)
    expected = old[0] + ((2 * optimality[:, None] - 1) * (target - old)).mean(0) / beta

    def slope(velocity):
        velocity = velocity.clone().requires_grad_()
        sigmas = torch.full((500,), 0.6, dtype=torch.float64)
        module.nft_loss(velocity.expand(500, 1), old, target, sigmas, optimality, beta=beta).mean().backward()
        return float(velocity.grad)

    assert abs(slope(expected)) < 1e-12 * abs(slope(old[0])) + 1e-13
    assert abs(float(expected - old[0])) > 0.1 * scale


def check_advantages(module):
    values = torch.tensor([1.0, 2.0, 4.0, 0.5, 0.5, torch.nan, 3.0, 3.0, 3.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    for spread in rewards.SPREADS:
        found = module.advantages(values, groups, spread=spread).numpy()
        for group in range(3):
            rows = [i for i in range(9) if groups[i] == group and not values[i].isnan()]
            own = values[rows].numpy()
            std = np.std(own) if spread == "group" else np.nanstd(values.numpy())
            np.testing.assert_allclose(found[rows], (own - own.mean()) / (std + 1e-4), rtol=1e-12, atol=1e-15)
        assert found[5] == 0 and np.isfinite(found).all()
    r = module.optimality(torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 80.0], dtype=torch.float64))
    assert r.tolist() == [0, 0, 0.4, 0.5, 0.75, 1, 1]


def check_baseline(module):
    velocity, _, latents, noise, _, _ = some(30)
    advantage = torch.tensor([-2.0, -0.1, 0.0, 0.3, 0.5, 3.0], dtype=torch.float64)
    loss = module.rft_loss(velocity, noise - latents, advantage, threshold=0.3)
    expected = (velocity - noise + latents).square().mean((1, 2, 3))
    assert loss[:4].tolist() == [0] * 4
    torch.testing.assert_close(loss[4:], expected[4:], rtol=1e-14, atol=0)


def check_schedules(module):
    decay = module.old_policy_decay
    assert [decay(n, "on_policy") for n in (1, 500)] == [0, 0]
    assert [decay(n, "slow") for n in (1, 200, 499, 500, 900)] == pytest.approx([0.001, 0.2, 0.499, 0.5, 0.5])
    assert [decay(n, "late") for n in (1, 75, 76, 100, 208, 209)] == pytest.approx(
        [0, 0, 0.0075, 0.1875, 0.9975, 0.999]
    )


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_rewards(check):
    check(rewards)


MISTAKES = {
    "good and bad are swapped": ("good, bad = ", "bad, good = "),
    "not divided by beta": ("* bad) / beta", "* bad)"),
    "without the limit": ("return _LIMIT * (optimality", "return (optimality"),
    "error of the velocity": ("sigma * (policy - target)", "(policy - target)"),
    "gradient through the weight": ("error.detach().abs()", "error.abs()"),
    "no negative policy": ("loss_of(old_velocity - away)", "loss_of(old_velocity + away)"),
    "beta left out of the policy": ("beta * (velocity - old_velocity)", "1.0 * (velocity - old_velocity)"),
    "another least weight": (".clamp_min(1e-5)", ".clamp_min(1e-1)"),
    "weight by squares": ("error.detach().abs().mean(dim=1)", "error.detach().square().mean(dim=1)"),
    "clipped to half": ("/ (2 * _LIMIT)", "/ _LIMIT"),
    "no least spread": ("away / (std + 1e-4)", "away / std"),
    "one mean for all groups": ("values - mean[groups]", "values - mean.mean()"),
    "spread of a sample": ("std(correction=0)", "std()"),
    "missing rewards are zeros": ("known = ~rewards.isnan()", "known = torch.ones_like(rewards, dtype=torch.bool)"),
    "the worst are trained on": ("(advantages > threshold)", "(advantages < threshold)"),
    "threshold included": ("(advantages > threshold)", "(advantages >= threshold)"),
    "late from 70 on": ("rollouts - 75", "rollouts - 70"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake):
    before, after = MISTAKES[mistake]
    assert SOURCE.count(before) == 1
    module = types.ModuleType("mistaken")
    exec(compile(SOURCE.replace(before, after), mistake, "exec"), module.__dict__)
    failed = 0
    for check in CHECKS:
        try:
            check(module)
        except AssertionError:
            failed += 1
    assert failed, f"{mistake}: every check passes"
