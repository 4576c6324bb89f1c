"""Two ways to the same numbers: how far they lie apart, in units of what float32 rounds away."""

import contextlib

import torch

EPSILON = torch.finfo(torch.float32).eps
FEW, MANY = 30, 300  # roundings


@contextlib.contextmanager
def rounded_otherwise(model, seed=0):
    """Inside, every weight of the network is one unit of rounding larger or smaller."""
    rng, parameters = torch.Generator().manual_seed(seed), list(model.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            signs = torch.randint(0, 2, parameter.shape, generator=rng) * 2 - 1
            parameter.mul_(1 + EPSILON * signs)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def loss_and_gradients(compute, model):
    """The losses (B,) under "", and the gradient of every trained weight of the network by its name."""
    model.zero_grad()
    loss = compute()
    loss.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"": loss.detach()}


def roundings(compute, reference, model) -> float:
    """Largest difference of the losses and of every gradient of two steps, in roundings.

    A rounding is what changes when every weight is rounded otherwise: as much as two right ways to the same number may
    differ by, on any processor. Two right ways stay below `FEW`, a wrong formula is beyond `MANY`.
    """
    found, expected = loss_and_gradients(compute, model), loss_and_gradients(reference, model)
    assert found.keys() == expected.keys()
    assert all(torch.isfinite(value).all() for value in expected.values())
    units = {name: EPSILON * _largest(value) for name, value in expected.items()}
    for seed in range(2):
        with rounded_otherwise(model, seed):
            again = loss_and_gradients(reference, model)
        units = {name: max(unit, _largest(again[name] - expected[name])) for name, unit in units.items()}
    return max(_largest(found[name] - value) / max(units[name], 1e-30) for name, value in expected.items())


def _largest(value: torch.Tensor) -> float:
    return float(value.abs().max())
