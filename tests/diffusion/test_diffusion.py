"""The maths of noising: densities, shift, losses and weights against diffusers and closed forms; keyed randomness."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from sciflow_hf.diffusion.losses import LOSSES, flow_weight, sample_loss
from sciflow_hf.diffusion.objectives import ddpm_weight
from sciflow_hf.diffusion.process import level_grid, logit_normal_density, mode_density, shift_sigmas, uniform_density
from sciflow_hf.diffusion.randomness import generator, hash64, noise_keys, randn, sample_keys, uniform

SIGMAS = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # the quantiles of a uniform number
LEVELS = np.linspace(0.02, 0.98, 33)


# -- densities -----------------------------------------------------------------------------------------------


def their_sigmas(scheme, **options):
    """Noise levels as diffusers' scripts draw them: u looks up the scheduler's descending list of timesteps."""
    rng = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, 400_000, generator=rng, **options)
    scheduler = FlowMatchEulerDiscreteScheduler()
    indices = (u * scheduler.config.num_train_timesteps).long()
    return u.numpy(), scheduler.sigmas[indices].numpy()


@pytest.mark.promise("A31")
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.0), (-1.0, 0.5), (0.5, 1.6)])
def test_logit_normal_is_the_papers(mean, std):
    """sigma = sigmoid(mean + std z). diffusers draws the same number, but looks it up from the noisy end."""
    ours = np.quantile(logit_normal_density(GRID, logit_mean=mean, logit_std=std), LEVELS)
    u, sigmas = their_sigmas("logit_normal", logit_mean=mean, logit_std=std)
    np.testing.assert_allclose(ours, np.quantile(u, LEVELS), atol=0.006)
    np.testing.assert_allclose(ours, 1 - np.quantile(sigmas, 1 - LEVELS), atol=0.006)
    _, mirrored = their_sigmas("logit_normal", logit_mean=-mean, logit_std=std)
    np.testing.assert_allclose(ours, np.quantile(mirrored, LEVELS), atol=0.006)
    closed = [1 / (1 + math.exp(-mean - std * NormalDist().inv_cdf(p))) for p in LEVELS]
    np.testing.assert_allclose(ours, closed, atol=1e-3)
    exact = logit_normal_density(torch.from_numpy(LEVELS), logit_mean=mean, logit_std=std)
    np.testing.assert_allclose(exact, closed, atol=1e-12)
    if mean:  # a positive mean moves training towards noise
        assert (ours[16] - 0.5) * mean > 0


@pytest.mark.promise("A31")
@pytest.mark.parametrize("scale", [1.29, 0.5, -0.8])
def test_mode_is_diffusers(scale):
    ours = np.quantile(mode_density(GRID, mode_scale=scale), LEVELS)
    u, sigmas = their_sigmas("mode", mode_scale=scale)
    np.testing.assert_allclose(ours, np.quantile(u, LEVELS), atol=0.006)
    np.testing.assert_allclose(ours, np.quantile(sigmas, LEVELS), atol=0.006)  # symmetric, so both ways round
    ends = mode_density(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), mode_scale=scale)
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_uniform_is_uniform():
    assert torch.equal(uniform_density(GRID), GRID)
    _, sigmas = their_sigmas("none")
    np.testing.assert_allclose(LEVELS, np.quantile(sigmas, LEVELS), atol=0.006)


def test_densities_stay_inside_the_noise_range():
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for values in (
        logit_normal_density(ends, logit_mean=2.0, logit_std=3.0),
        mode_density(ends),
        uniform_density(ends),
    ):
        assert torch.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()


def test_levels_of_the_evaluation_grid():
    assert level_grid(4).tolist() == [0.125, 0.375, 0.625, 0.875] and level_grid(1).tolist() == [0.5]
    assert level_grid(3).dtype == torch.float32


# -- shift ---------------------------------------------------------------------------------------------------


@pytest.mark.promise("A32")
@pytest.mark.parametrize("mu", [-0.7, 0.0, 0.5, 1.15, 2.5])
def test_shift_is_the_schedulers(mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected = torch.as_tensor(scheduler.time_shift(mu, 1.0, SIGMAS))
    torch.testing.assert_close(shift_sigmas(SIGMAS, mu), expected, rtol=0, atol=1e-12)


def test_shift_in_closed_form():
    assert torch.equal(shift_sigmas(SIGMAS, 0.0), SIGMAS)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(ends, 1.3), ends)
    torch.testing.assert_close(shift_sigmas(SIGMAS, math.log(3)), 3 * SIGMAS / (1 + 2 * SIGMAS))
    torch.testing.assert_close(shift_sigmas(shift_sigmas(SIGMAS, 0.8), -0.8), SIGMAS)
    # The static shift of SD3's scheduler is the same formula.
    static = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:-1].double()
    plain = FlowMatchEulerDiscreteScheduler().sigmas[:-1].double()
    torch.testing.assert_close(shift_sigmas(plain, math.log(3)), static, rtol=0, atol=1e-6)


# -- losses and weights --------------------------------------------------------------------------------------


def pair(dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    return (torch.randn(3, 5, 7, generator=rng) * 2).to(dtype), torch.randn(3, 5, 7, generator=rng).to(dtype)


@pytest.mark.promise("C03", "E21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss_type", "delta", "theirs"),
    [
        ("mse", 1.0, torch.nn.functional.mse_loss),
        ("l1", 1.0, torch.nn.functional.l1_loss),
        ("huber", 1.0, torch.nn.functional.huber_loss),
        ("huber", 0.3, lambda p, t: torch.nn.functional.huber_loss(p, t, delta=0.3)),
    ],
)
def test_losses_are_torchs_sample_by_sample(loss_type, delta, theirs, dtype):
    pred, target = pair(dtype)
    loss = sample_loss(pred, target, loss_type=loss_type, huber_delta=delta)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    expected = torch.stack([theirs(p.float(), t.float()) for p, t in zip(pred, target, strict=True)])
    torch.testing.assert_close(loss, expected)
    assert torch.equal(sample_loss(pred, pred, loss_type=loss_type), torch.zeros(3))


def test_every_loss_is_tested():
    assert set(LOSSES) == {"mse", "l1", "huber"}


@pytest.mark.promise("E16")
@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none", "logit_normal", "mode"])
def test_weights_are_diffusers(scheme):
    for sigmas in (SIGMAS, SIGMAS.float()):
        theirs = compute_loss_weighting_for_sd3(scheme, sigmas).to(sigmas.dtype)
        torch.testing.assert_close(flow_weight(sigmas, weighting_scheme=scheme), theirs, rtol=1e-6, atol=0)


@pytest.mark.promise("E21")
@pytest.mark.parametrize("gamma", [1.0, 5.0, math.inf])
def test_min_snr_weights_the_loss_on_the_clean_image(gamma):
    """min(SNR, gamma) times the squared error of x0, computed from x0 itself (Hang et al. 2023, equation 2)."""
    rng = torch.Generator().manual_seed(2)
    clean, noise, velocity = torch.randn(3, len(SIGMAS), 6, generator=rng, dtype=torch.float64)
    sigma = SIGMAS[:, None]
    noisy = (1 - sigma) * clean + sigma * noise
    clean_pred = noisy - sigma * velocity
    snr = ((1 - SIGMAS) / SIGMAS) ** 2
    expected = snr.clamp_max(gamma) * ((clean - clean_pred) ** 2).mean(1)
    weight = flow_weight(SIGMAS, min_snr_gamma=gamma)
    torch.testing.assert_close(weight * ((velocity - (noise - clean)) ** 2).mean(1), expected)
    assert (snr.min() < 1) and (snr.max() > 5)  # both sides of the minimum are there
    both = flow_weight(SIGMAS, weighting_scheme="cosmap", min_snr_gamma=gamma)
    torch.testing.assert_close(both, weight * compute_loss_weighting_for_sd3("cosmap", SIGMAS))


@pytest.mark.promise("E16")
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, math.inf])
def test_flow_weights_in_numpy(gamma):
    """With SNR = ((1 - sigma) / sigma)^2: sigma^2 min(SNR, gamma), on the velocity; gamma infinite is plain SNR."""
    snr = ((1 - LEVELS) / LEVELS) ** 2
    found = flow_weight(torch.from_numpy(LEVELS), min_snr_gamma=gamma)
    np.testing.assert_allclose(found, np.where(snr < gamma, (1 - LEVELS) ** 2, min(gamma, 1e9) * LEVELS**2), rtol=1e-12)
    np.testing.assert_allclose(found, LEVELS**2 * np.minimum(snr, gamma), rtol=1e-12)
    both = flow_weight(torch.from_numpy(LEVELS), min_snr_gamma=gamma, weighting_scheme="sigma_sqrt")
    np.testing.assert_allclose(both, np.minimum(snr, gamma), rtol=1e-12)
    cosmap = flow_weight(torch.from_numpy(LEVELS), weighting_scheme="cosmap")
    np.testing.assert_allclose(cosmap, 2 / (np.pi * (LEVELS**2 + (1 - LEVELS) ** 2)), rtol=1e-12)


def test_min_snr_of_flow_is_that_of_ddpm():
    """At equal SNR both weigh the error of the latents alike: it is the velocity's / sigma^2, the noise's x SNR."""
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    snr = ((1 - sigma) / sigma) ** 2
    of_flow = flow_weight(sigma, min_snr_gamma=5.0) / sigma**2
    of_ddpm = ddpm_weight(snr / (1 + snr), prediction_type="epsilon", min_snr_gamma=5.0) * snr
    torch.testing.assert_close(of_flow, of_ddpm)
    torch.testing.assert_close(of_flow, torch.tensor([5.0, 5.0, 1.0, 1 / 81], dtype=torch.float64))


# -- hash ----------------------------------------------------------------------------------------------------


def test_hash64_never_changes():
    """Frozen: another value here would change the noise of every run. hash64(0) is SplitMix64's first from seed 0."""
    assert hash64(0) == 0xE220A8397B1DCDAF
    assert hash64(1, 2, 3) == 0xBDC97C11A6CCB2C4
    assert hash64("noise") == 0x8CEAFFE78B9F6C9F
    assert hash64(2**63 + 5, "level") == 0x03ACC1A0D7CE0303
    assert hash64("ein Schaltbild, größer", 7) == 0x11B721886679B769
    assert hash64(-1) == hash64(2**64 - 1) == 0x158ED36505BC3E75  # a key may be read as signed or unsigned


def test_noise_never_changes():
    """The level of a sample is arithmetic alone; its noise is torch's generator seeded with the folded hash."""
    keys = noise_keys(0, 0, [0, 1])
    assert [key % 2**64 for key in keys.tolist()] == [hash64(0, 0, 0), hash64(0, 0, 1)] and keys.dtype == torch.int64
    level = (hash64(hash64(0, 0, 1), "level") >> 11) / 2**53
    assert uniform(keys, stream="level")[1].item() == level == pytest.approx(0.6701, abs=1e-4)
    seed = hash64(hash64(0, 0, 1), "noise") % 2**32
    expected = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(randn(keys, (2, 3, 4))[1], expected)


def test_every_bit_of_a_part_reaches_every_bit_of_the_hash():
    """Avalanche: one flipped input bit flips half of the 64 output bits, each of them half of the time."""
    flips = []
    for number in range(64):
        start = hash64("start", number)
        flips += [[start, start ^ (1 << bit)] for bit in range(64)]
    for parts in (lambda x: (x,), lambda x: (3, x, "noise"), lambda x: (x, 5)):
        changed = np.array([hash64(*parts(a)) ^ hash64(*parts(b)) for a, b in flips], dtype=np.uint64)
        bits = (changed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        assert abs(bits.sum(1).mean() - 32) < 0.5
        assert bits.mean(0).min() > 0.46 and bits.mean(0).max() < 0.54  # 4096 draws: 0.5 +- 0.04 is 5 sigma
        assert bits.reshape(64, 64, 64).mean(0).min() > 0.15  # input bit by output bit, 64 draws: 5.6 sigma


def test_order_and_kind_of_parts_matter():
    values = [hash64(1, 2), hash64(2, 1), hash64(1), hash64(1, 0), hash64("1"), hash64("1", 2), hash64("a", "b"),
              hash64("ab"), hash64("b", "a"), hash64(""), hash64("", ""), hash64("a\0"), hash64("a")]  # fmt: skip
    assert len(set(values)) == len(values)
    keys = torch.cat([noise_keys(seed, epoch, range(2000)) for seed in (0, 1) for epoch in range(5)])
    assert len(set(keys.tolist())) == len(keys) == 20_000


# -- noise ---------------------------------------------------------------------------------------------------


def test_keys_that_differ_in_high_bits_give_different_noise():
    """torch's CPU generator keeps the low 32 bits of a seed, so a key as seed would repeat noise."""
    for bit in (32, 40, 63):
        high = 5 + (1 << bit)
        low, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(high % 2**64)
        assert torch.equal(torch.randn(8, generator=low), torch.randn(8, generator=same))
        first, second = randn([5, high], (2, 8))
        assert not torch.equal(first, second) and (first - second).abs().min() > 0
        levels = uniform([5, high], stream="level")
        assert levels[0] != levels[1]


def test_noise_belongs_to_the_sample_not_to_the_batch():
    keys = noise_keys(1, 2, range(6))
    whole = randn(keys, (6, 4, 3, 5))
    for chosen in ([5, 0, 3], [2], [1, 1]):
        part = randn(keys[chosen], (len(chosen), 4, 3, 5))
        assert torch.equal(part, whole[chosen])
        assert torch.equal(uniform(keys[chosen], stream="x"), uniform(keys, stream="x")[chosen])
    assert torch.equal(randn(keys.tolist(), (6, 4, 3, 5)), whole)
    assert torch.equal(randn(keys, (6, 4, 3, 5), draw_on_cpu=True), whole)
    assert not torch.equal(randn(keys, (6, 4, 3, 5), stream="posterior"), whole)
    state = torch.random.get_rng_state()
    randn(keys, (6, 2)), uniform(keys, stream="x"), generator(3, "y")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_is_standard_normal_and_independent():
    noise = randn(noise_keys(0, 0, range(2000)), (2000, 40)).double()
    assert abs(noise.mean()) < 0.015 and abs(noise.var() - 1) < 0.025  # 80,000 numbers: 4 and 5 sigma
    neighbours = (noise[:-1] * noise[1:]).mean()  # neighbouring positions of the order
    later = randn(noise_keys(0, 1, range(2000)), (2000, 40)).double()
    assert abs(neighbours) < 0.015 and abs((noise * later).mean()) < 0.015
    ordered = noise.flatten().sort().values.numpy()
    cdf = np.array([NormalDist().cdf(x) for x in ordered[::40]])
    assert np.abs(cdf - np.arange(len(cdf)) / len(cdf)).max() < 1.95 / math.sqrt(len(ordered)) + 1 / len(cdf)


def test_uniform_is_flat_and_independent_between_streams():
    count = 20_000
    keys = noise_keys(0, 0, range(count))
    streams = {name: uniform(keys, stream=name).numpy() for name in ("level", "caption_dropout", "posterior")}
    for values in streams.values():
        assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
        distance = np.abs(np.sort(values) - (np.arange(count) + 0.5) / count).max()
        assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(count)
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        assert ((counts - count / 100) ** 2 / (count / 100)).sum() < 160  # chi-squared, 99 degrees: 0.01 %
    for a in streams:
        for b in streams:
            if a < b:
                assert abs(np.corrcoef(streams[a], streams[b])[0, 1]) < 4 / math.sqrt(count)
                joint = np.histogram2d(streams[a], streams[b], bins=10, range=[(0, 1)] * 2)[0]
                assert ((joint - count / 100) ** 2 / (count / 100)).sum() < 160
    # A level does not tell the noise: streams of the same key are drawn from different seeds.
    noise = randn(keys[:5000], (5000, 1), stream="level")[:, 0].numpy()
    assert abs(np.corrcoef(noise, streams["level"][:5000])[0, 1]) < 4 / math.sqrt(5000)


def test_without_keys_torch_decides():
    torch.manual_seed(3)
    first = sample_keys({}, 4)
    torch.manual_seed(3)
    assert torch.equal(sample_keys({}, 4), first) and first.dtype == torch.int64 and len(set(first.tolist())) == 4
    assert not torch.equal(sample_keys({}, 4), first)
    given = torch.tensor([1, 2])
    assert sample_keys({"noise_key": given}, 2) is given
