"""Samplers against diffusers' schedulers on the same noise, against closed forms, and a perfect model."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from sciflow_hf.diffusion import sampling
from sciflow_hf.diffusion.objectives import alphas_cumprod, beta_schedule, convert_prediction
from sciflow_hf.diffusion.process import shift_sigmas
from sciflow_hf.diffusion.sampling import (
    ddpm_timesteps,
    flow_sigmas,
    guide,
    opposite_velocity,
    sample_ddpm,
    sample_flow,
)

SHAPE = (2, 3, 5, 7)
ALPHA_BAR = alphas_cumprod(beta_schedule("scaled_linear", 1000))


def normal(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def network(x, level):
    """Depends on everything it is given, and not linearly."""
    return torch.sin(2 * x) + 0.3 * torch.cos(level.view(-1, 1, 1, 1) / 200) - 0.2


def ours(sampler, timesteps, prediction_type="epsilon", **options):
    noises = [normal(10 + i) for i in range(len(timesteps))]

    def denoise(x, t):
        bar = ALPHA_BAR[t]
        return convert_prediction(
            network(x, t), x, signal=bar.sqrt(), noise_scale=(1 - bar).sqrt(), source=prediction_type, target="sample"
        )

    return sample_ddpm(
        denoise, normal(0), ALPHA_BAR, timesteps, sampler=sampler, step_noise=noises.__getitem__, **options
    )


def with_noise(monkeypatch, module):
    """diffusers' schedulers draw the noise of step i with seed 10 + i."""
    count = iter(range(10, 2000))
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *args, **kwargs: normal(next(count)))


@pytest.mark.promise("C02", "C29")
@pytest.mark.parametrize("steps", [7, 1000])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddpm_is_diffusers(monkeypatch, steps, prediction_type):
    with_noise(monkeypatch, "scheduling_ddpm")
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    timesteps = ddpm_timesteps(1000, steps)
    assert torch.equal(timesteps, scheduler.timesteps)
    x = normal(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ours("ddpm", timesteps, prediction_type), x, rtol=1e-3, atol=1e-3)


@pytest.mark.promise("C02")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers(monkeypatch, eta):
    with_noise(monkeypatch, "scheduling_ddim")
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x = normal(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x, eta=eta).prev_sample
    torch.testing.assert_close(ours("ddim", ddpm_timesteps(1000, 10), eta=eta), x, rtol=1e-4, atol=1e-4)


@pytest.mark.promise("C02")
def test_ancestral_is_diffusers(monkeypatch):
    with_noise(monkeypatch, "scheduling_euler_ancestral_discrete")
    scheduler = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x = normal(0) * (scheduler.sigmas[0] ** 2 + 1) ** 0.5  # it works on latents + s epsilon
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ours("ancestral", ddpm_timesteps(1000, 10)), x, rtol=1e-3, atol=1e-3)


def test_ddpm_ancestral_and_ddim_with_eta_one_are_one_step():
    """As `ancestral_step` says: three ways to write the posterior."""
    found = [ours("ddpm", [900, 500, 100]), ours("ancestral", [900, 500, 100]), ours("ddim", [900, 500, 100], eta=1.0)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.promise("D09")
def test_learned_variance_is_diffusers(monkeypatch):
    with_noise(monkeypatch, "scheduling_ddpm")
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", variance_type="learned_range", clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(9)  # leading: ends at timestep 0; theirs adds noise at the end of others
    x = normal(0)
    for t in scheduler.timesteps:
        both = torch.cat([network(x, t.expand(2)), torch.tanh(x)], dim=1)
        x = scheduler.step(both, t, x).prev_sample

    def denoise(x, t):
        bar = ALPHA_BAR[t]
        latents = convert_prediction(
            network(x, t), x, signal=bar.sqrt(), noise_scale=(1 - bar).sqrt(), source="epsilon", target="sample"
        )
        return latents, torch.tanh(x)

    noises = [normal(10 + i) for i in range(9)]
    found = sample_ddpm(denoise, normal(0), ALPHA_BAR, scheduler.timesteps, step_noise=noises.__getitem__)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.promise("D16")
@pytest.mark.parametrize(
    ("sampler", "kind"), [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)]
)
def test_flow_samplers_are_diffusers(sampler, kind):
    scheduler = kind(num_train_timesteps=1000)
    scheduler.set_timesteps(6)
    sigmas = torch.cat([scheduler.sigmas.unique_consecutive()])
    x = normal(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    found = sample_flow(lambda x, sigma: network(x, 1000 * sigma), normal(0), sigmas, sampler=sampler)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_flow_sigmas():
    torch.testing.assert_close(flow_sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(shift_sigmas(flow_sigmas(4), math.log(3)), shifted.sigmas)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_perfect_flow_samples_the_data(sampler):
    """Data that is one image: the velocity is known, and every number of steps ends on the image."""
    data = normal(1)
    for steps in (1, 5):
        found = sample_flow(
            lambda x, sigma: (x - data) / sigma.view(-1, 1, 1, 1), normal(0), flow_sigmas(steps), sampler=sampler
        )
        torch.testing.assert_close(found, data, rtol=1e-4, atol=1e-5)


def test_heun_converges_faster_than_euler():
    """Normal data of deviation 2: x(0) = 2 noise; the velocity is linear in x."""

    def velocity(x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        variance = 4 * (1 - s) ** 2 + s**2
        return (s - 4 * (1 - s)) / variance * x  # E[noise - data | x]

    noise = normal(0)
    errors = {
        (sampler, steps): float(
            (sample_flow(velocity, noise, flow_sigmas(steps), sampler=sampler) - 2 * noise).abs().max()
        )
        for sampler in ("euler", "heun")
        for steps in (50, 100)
    }
    assert errors["heun", 50] < errors["euler", 50] / 10
    assert 1.8 < errors["euler", 50] / errors["euler", 100] < 2.2  # first order
    assert errors["euler", 100] < 0.11


@pytest.mark.promise("C24")
@pytest.mark.parametrize("sampler", sampling.DDPM_SAMPLERS)
def test_a_perfect_denoiser_samples_the_distribution(sampler):
    """Normal data, mean 0.5 and deviation 0.3: E[x0 | x_t] is known, so the samples' moments are."""
    bars = alphas_cumprod(beta_schedule("linear", 1000))

    def denoise(x, t):
        bar = bars[t].view(-1, 1)
        gain = bar.sqrt() * 0.09 / (bar * 0.09 + 1 - bar)
        return 0.5 + gain * (x - bar.sqrt() * 0.5)

    generator = torch.Generator().manual_seed(0)
    draw = lambda step: torch.randn(4000, 1, generator=generator)  # noqa: E731
    found = sample_ddpm(denoise, draw(0), bars, ddpm_timesteps(1000, 250), sampler=sampler, step_noise=draw)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(found.std()) == pytest.approx(0.3, abs=0.02)


def test_quadratic_timesteps():
    """Whole numbers near (i / N)^2 T, one of their own each where those lie closer than one."""
    times = ddpm_timesteps(1000, 100, spacing="quadratic").flip(0) + 1
    assert times[0] == 1 and times[-1] == 1000 and (times.diff() >= 1).all() and len(times) == 100
    expected = torch.arange(1, 101, dtype=torch.float64) ** 2 / 10
    assert (times[10:] - expected[10:]).abs().max() <= 0.5 and torch.equal(times[:10], torch.arange(1, 11))
    assert torch.equal(ddpm_timesteps(10, 10, spacing="quadratic"), ddpm_timesteps(10, 10))


def test_narrow_distributions_need_steps_at_little_noise():
    """Data of deviation 0.03, cosine schedule: 50 even steps give much too little spread, 50 quadratic ones do not."""
    bars, true = alphas_cumprod(beta_schedule("cosine", 1000)), 0.03

    def denoise(x, t):
        bar = bars[t].view(-1, 1)
        return bar.sqrt() * true**2 / (bar * true**2 + 1 - bar) * x  # E[x0 | x_t]

    found = {}
    for spacing in ("trailing", "quadratic"):
        generator = torch.Generator().manual_seed(0)
        draw = lambda step: torch.randn(20_000, 1, generator=generator)  # noqa: B023, E731
        times = ddpm_timesteps(1000, 50, spacing=spacing)
        found[spacing] = float(sample_ddpm(denoise, draw(0), bars, times, step_noise=draw).std()) / true
    assert found["trailing"] < 0.6 and 0.84 < found["quadratic"] < 1.02


def test_noise_is_asked_for_only_where_it_is_added():
    asked = []

    def draw(step):
        asked.append(step)
        return normal(step)

    for sampler, expected in (("ddpm", [0, 1]), ("ancestral", [0, 1]), ("ddim", [])):
        asked.clear()
        sample_ddpm(lambda x, t: x / 2, normal(0), ALPHA_BAR, [900, 500, 3], sampler=sampler, step_noise=draw)
        assert asked == expected


@pytest.mark.promise("D15")
def test_the_opposite_convention():
    """x_t = (1 - t) noise + t data, v = data - noise: their Euler loop upwards in t is our sampler of that network."""
    theirs = lambda x, t: network(x, 1000 * t)  # noqa: E731
    x, steps = normal(0), 5
    for i in range(steps):
        x = x + theirs(x, torch.full((2,), i / steps)) / steps
    torch.testing.assert_close(sample_flow(opposite_velocity(theirs), normal(0), flow_sigmas(steps)), x)


@pytest.mark.promise("D17")
def test_guidance():
    conditional, unconditional = normal(1), normal(2)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


@pytest.mark.promise("C07")
def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps"):
        flow_sigmas(0)
    with pytest.raises(ValueError, match="num_inference_steps"):
        ddpm_timesteps(10, 11)
    with pytest.raises(ValueError, match=r"timestep_spacing.*'karras'.*quadratic"):
        ddpm_timesteps(10, 5, spacing="karras")
    with pytest.raises(ValueError, match=r"sampler.*'midpoint'.*heun"):
        sample_flow(network, normal(0), flow_sigmas(1), sampler="midpoint")
    with pytest.raises(ValueError, match=r"sampler.*'plms'.*ancestral"):
        sample_ddpm(network, normal(0), ALPHA_BAR, [1], sampler="plms")
