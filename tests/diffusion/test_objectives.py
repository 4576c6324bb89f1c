"""DDPM's schedules, mixing, targets and weights against diffusers' scheduler and against closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from diffusers.training_utils import compute_snr

from sciflow_hf.diffusion.objectives import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    alphas_cumprod,
    beta_schedule,
    convert_prediction,
    ddpm_weight,
    signal_to_noise,
)
from sciflow_hf.diffusion.process import GivenSchedule, NoiseProcess

TIMESTEPS = torch.tensor([0, 40, 500, 999])
DIFFUSERS_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def noise():
    return torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.promise("C01", "C29", "D24")
@pytest.mark.parametrize("name", DIFFUSERS_SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"beta_start": 0.00085, "beta_end": 0.012}])
@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_betas_are_diffusers(name, options, num_timesteps):
    scheduler = DDPMScheduler(beta_schedule=name, num_train_timesteps=num_timesteps, **options)
    betas = beta_schedule(name, num_timesteps, **options)
    assert betas.shape == (num_timesteps,) and betas.dtype == torch.float32
    assert torch.equal(betas, scheduler.betas)
    assert torch.equal(alphas_cumprod(betas), scheduler.alphas_cumprod)


@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_our_names_are_diffusers_functions(num_timesteps):
    assert torch.equal(beta_schedule("cosine", num_timesteps), betas_for_alpha_bar(num_timesteps))
    exponential = betas_for_alpha_bar(num_timesteps, alpha_transform_type="exp")
    torch.testing.assert_close(beta_schedule("exponential", num_timesteps), exponential)
    bars = alphas_cumprod(beta_schedule("exponential", num_timesteps))
    assert float(bars[num_timesteps // 4 - 1]) == pytest.approx(math.exp(-3), rel=1e-4)
    assert set(BETA_SCHEDULES) == {*DIFFUSERS_SCHEDULES, "cosine", "exponential"}


@pytest.mark.promise("C01", "C07")
def test_betas_in_closed_form():
    linear = beta_schedule("linear", 5, beta_start=0.1, beta_end=0.5)
    torch.testing.assert_close(linear, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    torch.testing.assert_close(alphas_cumprod(linear)[:3], torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]))
    scaled = beta_schedule("scaled_linear", 3, beta_start=0.01, beta_end=0.09)
    torch.testing.assert_close(scaled, torch.tensor([0.01, 0.04, 0.09]))
    # alpha_bar of the cosine schedule is cos^2 itself, relative to step 0, as long as no beta is capped.
    cosine = alphas_cumprod(beta_schedule("squaredcos_cap_v2", 1000))
    at = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 500, 900)]
    torch.testing.assert_close(cosine[[0, 499, 899]], torch.tensor([a / at[0] for a in at[1:]]), rtol=1e-4, atol=0)
    assert beta_schedule("squaredcos_cap_v2", 1000).max() == pytest.approx(0.999)
    sigmoid = beta_schedule("sigmoid", 3, beta_start=0.0, beta_end=1.0)
    torch.testing.assert_close(sigmoid, torch.tensor([1 / (1 + math.exp(6)), 0.5, 1 / (1 + math.exp(-6))]))


@pytest.mark.parametrize("name", DIFFUSERS_SCHEDULES)
def test_zero_terminal_snr(name):
    """The last step is pure noise, the first as before; between them, diffusers up to its rounding."""
    betas = beta_schedule(name, 1000)
    rescaled = alphas_cumprod(betas, zero_terminal_snr=True)
    assert rescaled[-1] == 0 and signal_to_noise(rescaled)[-1] == 0
    torch.testing.assert_close(rescaled[0], alphas_cumprod(betas)[0])
    assert (rescaled.diff() < 0).all()
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(rescaled, theirs, rtol=0, atol=1e-6)


def test_mixing_and_targets_are_diffusers(latents, noise):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    alpha_bar = alphas_cumprod(beta_schedule("scaled_linear", 1000))
    step = latents, noise, TIMESTEPS
    v, epsilon, sample = (GivenSchedule(alpha_bar, kind) for kind in ("v_prediction", "epsilon", "sample"))
    for process in (v, NoiseProcess("ddpm", "epsilon", schedule="scaled_linear")):
        torch.testing.assert_close(process.mix(*step), scheduler.add_noise(*step), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(v.target(*step), scheduler.get_velocity(*step), rtol=1e-6, atol=1e-6)
    assert torch.equal(epsilon.target(*step), noise) and torch.equal(sample.target(*step), latents)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_sampler_recovers_the_latents_from_each_target(prediction_type, latents, noise):
    """diffusers' step, given the target as the prediction, finds the clean latents."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    for i, timestep in enumerate(TIMESTEPS[:3]):
        process = GivenSchedule(scheduler.alphas_cumprod, prediction_type)
        x0, step = latents[i : i + 1], (latents[i : i + 1], noise[i : i + 1], timestep[None])
        found = scheduler.step(process.target(*step), int(timestep), process.mix(*step)).pred_original_sample
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signal", ["flow", "ddpm"])
@pytest.mark.parametrize("source", [*PREDICTION_TYPES, "velocity"])
def test_every_conversion_goes_there_and_back(source, signal, latents, noise):
    """Each word for the same network, from its definition; then back to the word it came from."""
    sigma = torch.tensor([0.05, 0.3, 0.7, 0.95])
    a, b = (1 - sigma, sigma) if signal == "flow" else ((1 - sigma).sqrt(), sigma.sqrt())
    wide_a, wide_b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
    noisy = wide_a * latents + wide_b * noise
    meant = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": wide_a * noise - wide_b * latents,
        "velocity": noise - latents,
    }
    for target, expected in meant.items():
        options = {"noisy": noisy, "signal": a, "noise_scale": b}
        found = convert_prediction(meant[source], source=source, target=target, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        again = convert_prediction(found, source=target, target=source, **options)
        torch.testing.assert_close(again, meant[source], rtol=1e-4, atol=1e-4)


def test_conversion_at_the_ends_is_finite(latents, noise):
    """At pure noise the noise says nothing of the latents, and on data the data nothing of the noise."""
    zero, one = torch.zeros(4), torch.ones(4)
    assert (
        convert_prediction(noise, noise, signal=zero, noise_scale=one, source="epsilon", target="sample").abs().max()
        == 0
    )
    assert (
        convert_prediction(latents, latents, signal=one, noise_scale=zero, source="sample", target="epsilon")
        .abs()
        .max()
        == 0
    )
    with pytest.raises(ValueError, match=r"'flow'.*velocity"):
        convert_prediction(noise, noise, signal=one, noise_scale=zero, source="flow", target="sample")


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma):
    """diffusers' scripts divide min(SNR, gamma) by SNR, for v by SNR + 1."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, TIMESTEPS)
    alpha_bar = scheduler.alphas_cumprod[TIMESTEPS]
    torch.testing.assert_close(signal_to_noise(alpha_bar), snr)
    least = torch.minimum(snr, torch.tensor(gamma))
    for kind, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1)), ("sample", least)):
        weight = ddpm_weight(alpha_bar, prediction_type=kind, min_snr_gamma=gamma)
        torch.testing.assert_close(weight, expected)
        assert torch.equal(ddpm_weight(alpha_bar, prediction_type=kind), torch.ones(4))


def test_min_snr_is_one_loss_on_the_latents(latents, noise):
    """However the network is parametrised, the weighted loss is min(SNR, gamma) times the error of its latents."""
    alpha_bar = alphas_cumprod(beta_schedule("linear", 1000))[TIMESTEPS[:3]]
    x0, epsilon = latents[:3].double(), noise[:3].double()
    wrong = x0 + 0.1 * latents[1:].double()  # predicted latents
    a = alpha_bar.double().view(-1, 1, 1, 1)
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * epsilon
    implied = {
        "sample": wrong,
        "epsilon": (noisy - a.sqrt() * wrong) / (1 - a).sqrt(),
        "v_prediction": (a.sqrt() * noisy - wrong) / (1 - a).sqrt(),
    }
    losses = []
    for kind, prediction in implied.items():
        target = GivenSchedule(alpha_bar.double(), kind).target(x0, epsilon, torch.arange(len(alpha_bar)))
        loss = (prediction - target).square().flatten(1).mean(1)
        losses.append(loss * ddpm_weight(alpha_bar.double(), prediction_type=kind, min_snr_gamma=5.0))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_pure_noise_has_finite_weights():
    alpha_bar = torch.tensor([0.0])
    weights = {k: float(ddpm_weight(alpha_bar, prediction_type=k, min_snr_gamma=5.0)) for k in PREDICTION_TYPES}
    assert weights == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}


@pytest.mark.promise("C07")
def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"beta_schedule.*'cosinus'.*squaredcos_cap_v2"):
        beta_schedule("cosinus", 10)
    with pytest.raises(ValueError, match="num_timesteps"):
        beta_schedule("linear", 0)
    with pytest.raises(ValueError, match=r"prediction_type.*'flow'.*v_prediction"):
        GivenSchedule(torch.ones(1), "flow")
