"""Metrics of restored images against scikit-image, scipy and samples whose calibration is known."""

import numpy as np
import pytest
import scipy.stats
import skimage.data
import skimage.metrics

from sciflow_hf.metrics.restoration import (
    calibration,
    histogram_distance,
    interval,
    power_spectrum_error,
    psnr,
    radial_power_spectrum,
    rank_correlation,
    score,
    ssim,
)


@pytest.fixture(scope="module")
def pair():
    truth = skimage.data.camera()[100:164, 100:180].astype(np.float64)[None]
    return truth + np.random.default_rng(0).normal(0, 12, truth.shape), truth


def test_psnr_and_ssim_equal_scikit_images(pair):
    image, truth = pair
    assert psnr(image, truth, data_range=255) == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(truth, image, data_range=255)
    )
    expected = skimage.metrics.structural_similarity(
        truth[0], image[0], data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(image, truth, data_range=255) == pytest.approx(expected)
    assert psnr(truth, truth, data_range=255) == np.inf and ssim(truth, truth, data_range=255) == pytest.approx(1)


def test_power_spectrum_of_known_fields(pair):
    rng = np.random.default_rng(1)
    white = rng.normal(0, 3, (1, 64, 96))
    np.testing.assert_allclose(radial_power_spectrum(white).mean(), 9, rtol=0.1)
    x = np.arange(64)
    wave = np.broadcast_to(np.cos(2 * np.pi * 10 * x / 64), (1, 64, 64))
    assert int(radial_power_spectrum(wave).argmax()) == 10
    image, truth = pair
    assert power_spectrum_error(truth, truth) == 0
    assert power_spectrum_error(10 * truth, truth) == pytest.approx(2, rel=1e-3)  # 100 times the power
    assert power_spectrum_error(truth[:, :, ::-1], truth) < 0.05 < power_spectrum_error(image, truth)


def test_histogram_distance_equals_scipys(pair):
    image, truth = pair
    expected = scipy.stats.wasserstein_distance(image.ravel(), truth.ravel()) / 255
    assert histogram_distance(image, truth, data_range=255) == pytest.approx(expected)
    assert histogram_distance(truth[:, ::-1], truth, data_range=255) == 0


def test_rank_correlation_equals_scipys():
    rng = np.random.default_rng(2)
    a = rng.normal(size=2000)
    b = a + rng.normal(size=2000)
    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-6)


def draws(count, *, spread=1.0, seed=3, shape=(60_000,)):
    """Truth and samples of normal distributions whose deviation differs from pixel to pixel; and `spread` times it."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 0.8, shape))
    mean = rng.normal(size=shape)
    return mean + spread * scale * rng.normal(size=(count, *shape)), mean + scale * rng.normal(size=shape)


@pytest.mark.parametrize("count", [8, 16, 32])
def test_honest_samples_have_the_expected_ratio_and_coverage(count):
    found = calibration(*draws(count))
    assert found["ratio"] == pytest.approx(found["expected_ratio"], rel=0.03)
    assert found["expected_ratio"] == pytest.approx(2 * count / (count + 1))
    low = min(0.9, (count - 1) / (count + 1))  # no interval of 8 samples covers more than 7 of 9
    assert found["coverage"] == pytest.approx(low, abs=0.01)
    assert 0.4 < found["rank_correlation"] < 0.7


def test_overconfident_and_vague_samples_show():
    sure, honest, vague = (calibration(*draws(16, spread=spread)) for spread in (0.3, 1.0, 3.0))
    assert sure["ratio"] < 0.7 * honest["ratio"] < honest["ratio"] < 0.5 * vague["ratio"]
    assert sure["coverage"] < 0.6 and vague["coverage"] > 0.97
    samples, truth = draws(16)
    shuffled = np.random.default_rng(0).permutation(len(truth))
    assert abs(calibration(samples[:, shuffled], truth)["rank_correlation"]) < 0.3


def test_the_interval_of_sixteen_samples():
    samples = np.arange(1.0, 17.0)[::-1]
    low, high = interval(samples, 0.5)
    assert (low, high) == (4.25, 12.75)  # ranks 17 / 4 and 3 * 17 / 4
    assert interval(samples, 0.99) == (1, 16)


def test_score_averages_images_and_prefers_the_mean():
    samples, truth = draws(8, shape=(3, 1, 24, 32))
    found = score(samples, truth)
    data_range = truth.max() - truth.min()
    each = [psnr(m, t, data_range=data_range) for m, t in zip(samples.mean(0), truth, strict=True)]
    assert found["psnr"] == pytest.approx(np.mean(each))
    assert found["psnr"] > found["sample_psnr"] + 1.5
    assert set(found) > {"ssim", "power_spectrum_error", "histogram_distance", "calibration_ratio"}
