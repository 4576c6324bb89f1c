"""How good a restored image is: PSNR, SSIM, power spectrum, histogram; and whether its uncertainty is honest."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import SciflowError
from ..options import Options, arguments, option

if TYPE_CHECKING:
    import torch

    from ..families.microscopy_unet import MicroscopyUNet
    from ..images.microscopes import MicroscopyTiles

COVERAGE = 0.9  # of the interval whose coverage `calibration` measures


def psnr(image: np.ndarray, truth: np.ndarray, *, data_range: float) -> float:
    """Peak signal-to-noise ratio, dB: 10 log10(data_range^2 / mean squared error); any shape."""
    error = np.mean((np.asarray(image, np.float64) - truth) ** 2)
    return float(10 * np.log10(data_range**2 / error)) if error else float("inf")


def ssim(image: np.ndarray, truth: np.ndarray, *, data_range: float) -> float:
    """Structural similarity with the Gaussian window of Wang et al. 2004 (sigma 1.5); (C, H, W), mean of channels.

    Raises:
        SciflowError: scikit-image, which computes it, is missing.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise SciflowError("SSIM needs scikit-image: `pip install 'sciflow_hf[microscopy]'`.") from error
    return float(
        structural_similarity(
            np.asarray(image, np.float64), np.asarray(truth, np.float64), data_range=data_range, channel_axis=0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
    )  # fmt: skip


def radial_power_spectrum(image: np.ndarray) -> np.ndarray:
    """Mean power over rings of equal spatial frequency, (R,): ring r has |k| in [r, r + 1) / min(H, W).

    Args:
        image: (C, H, W); its mean is taken off, and a Hann window keeps the border from leaking into all rings.
    """
    height, width = image.shape[-2:]
    window = np.outer(np.hanning(height), np.hanning(width))
    centred = np.asarray(image, np.float64) - np.mean(image, axis=(-2, -1), keepdims=True)
    power = np.abs(np.fft.rfft2(centred * window)) ** 2 / (window**2).sum()
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    rings = (frequency * min(height, width)).astype(int)
    keep = rings < min(height, width) // 2
    flat = np.broadcast_to(rings, power.shape)[..., keep].ravel()
    return np.bincount(flat, power[..., keep].ravel()) / np.bincount(flat)


def power_spectrum_error(image: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square over rings of the difference in log10 power: 0 is the same spectrum, 1 a factor of 10."""
    ours, theirs = radial_power_spectrum(image), radial_power_spectrum(truth)
    floor = 1e-12 * theirs.max()
    return float(np.sqrt(np.mean((np.log10(ours + floor) - np.log10(theirs + floor)) ** 2)))


def histogram_distance(image: np.ndarray, truth: np.ndarray, *, data_range: float) -> float:
    """Wasserstein-1 distance of the intensities, as a share of `data_range`; images of one shape."""
    ours, theirs = np.sort(np.ravel(image)), np.sort(np.ravel(truth))
    return float(np.mean(np.abs(ours.astype(np.float64) - theirs)) / data_range)


def restoration_metrics(image: np.ndarray, truth: np.ndarray, *, data_range: float) -> dict[str, float]:
    """The four of one image (C, H, W) in one dict."""
    return {
        "psnr": psnr(image, truth, data_range=data_range),
        "ssim": ssim(image, truth, data_range=data_range),
        "power_spectrum_error": power_spectrum_error(image, truth),
        "histogram_distance": histogram_distance(image, truth, data_range=data_range),
    }


def calibration(samples: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Whether samples differ from each other as they differ from the truth.

    Args:
        samples: (S, ...), S at least 2.
        truth: (...).

    Returns:
        ratio: mean squared error of one sample over that of the mean of all.
        expected_ratio: what it is when truth and samples come from one distribution, 2 / (1 + 1 / S).
        rank_correlation: Spearman's, over pixels, of the samples' standard deviation and the mean's absolute error.
        coverage: share of pixels whose truth lies in the central 90 % interval of the samples (see `interval`).
    """
    samples = np.asarray(samples, np.float64)
    mean = samples.mean(axis=0)
    of_mean = np.mean((mean - truth) ** 2)
    low, high = interval(samples, COVERAGE)
    return {
        "ratio": float(np.mean((samples - truth) ** 2) / of_mean),
        "expected_ratio": 2 / (1 + 1 / len(samples)),
        "rank_correlation": rank_correlation(samples.std(axis=0, ddof=1), np.abs(mean - truth)),
        "coverage": float(np.mean((low <= truth) & (truth <= high))),
    }


def interval(samples: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the central interval that a further sample falls into with probability `share`, (...) each.

    Of S exchangeable samples the next lies below the k-th smallest with probability k / (S + 1): the ends are the
    quantiles of rank (S + 1) (1 -+ share) / 2, interpolated, and at most the smallest and the largest.
    """
    quantiles = np.array([(1 - share) / 2, (1 + share) / 2])
    low, high = np.quantile(samples, quantiles, axis=0, method="weibull")
    return low, high


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks."""
    of_a, of_b = (np.argsort(np.argsort(np.ravel(v), kind="stable"), kind="stable").astype(float) for v in (a, b))
    return float(np.corrcoef(of_a, of_b)[0, 1])


@arguments
class RestorationMetrics(Options):
    """Scores of restored held-out tiles in every evaluation, as `eval_psnr` and so on."""

    heading: ClassVar[str] = "Metrics of restored images"

    metric_tiles: int = option(
        8, "Held-out tiles that are restored and scored, spread over all; 0 for none.", within="[0, inf)"
    )
    metric_samples: int = option(
        4,
        "Samples drawn for each tile; their mean is scored, and the first alone (`eval_sample_psnr`).",
        within="[2, inf)",
    )
    metric_steps: int = option(20, "Sampling steps of the scored tiles.", within="[1, inf)")

    def of(
        self, family: "MicroscopyUNet", model: "torch.nn.Module", dataset: "MicroscopyTiles | None"
    ) -> Callable[[Any], dict[str, float]] | None:
        """`compute_metrics` for a trainer: restores with the current `model` (averaged, if EMA is on)."""
        if dataset is None or not self.metric_tiles:
            return None
        rows = np.unique(np.linspace(0, len(dataset) - 1, min(self.metric_tiles, len(dataset))).round().astype(int))

        def measure(prediction: Any) -> dict[str, float]:
            import torch

            pairs = [dataset.intensities(int(row), dataset.key_of(int(row))) for row in rows]
            sharp, measured = (torch.stack(side) for side in zip(*pairs, strict=True))
            was_training = model.training
            pipeline = family.load_pipeline(model.eval(), device=next(model.parameters()).device)
            pipeline.set_progress_bar_config(disable=True)
            found = pipeline(measured, num_samples=self.metric_samples, num_inference_steps=self.metric_steps)
            model.train(was_training)
            return score(found.samples.cpu().numpy(), sharp.numpy())

        return measure


def score(samples: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Metrics of the mean and of one sample, averaged over images; and the calibration over all pixels.

    Args:
        samples: (S, B, C, H, W).
        truth: (B, C, H, W); its range is the data range.
    """
    data_range = float(truth.max() - truth.min())
    mean = samples.mean(axis=0)
    rows = [restoration_metrics(m, t, data_range=data_range) for m, t in zip(mean, truth, strict=True)]
    ones = [restoration_metrics(s, t, data_range=data_range) for s, t in zip(samples[0], truth, strict=True)]
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    found |= {f"sample_{name}": float(np.mean([row[name] for row in ones])) for name in ones[0]}
    return found | {f"calibration_{name}": value for name, value in calibration(samples, truth).items()}
