"""The forward model against optics written another way; its noise by statistics; guided sampling by its likelihood."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import torch

import sciflow_hf as sf
from sciflow_hf.images.consistency import towards_measurement
from sciflow_hf.images.files import ImageFile, write_image
from sciflow_hf.images.optics import ForwardModel, born_wolf
from sciflow_hf.images.transforms import KINDS, IntensityTransform


def test_gaussian_equals_scipys():
    optics = ForwardModel(psf_sigma=1.7)
    image = torch.rand(2, 3, 30, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter(image.numpy(), 1.7, mode="mirror", radius=optics.radius, axes=(2, 3))
    np.testing.assert_allclose(optics.blur(image).numpy(), expected, atol=1e-6)
    assert optics.kernel.sum() == pytest.approx(1, abs=1e-6)


def test_airy_disk_has_its_closed_form_and_first_dark_ring():
    v = torch.linspace(1e-6, 12, 200, dtype=torch.float64)
    expected = (2 * scipy.special.j1(v.numpy()) / v.numpy()) ** 2
    np.testing.assert_allclose(born_wolf(v, 0.0).numpy(), expected, atol=1e-7)
    optics = ForwardModel(psf="airy", wavelength=500, numerical_aperture=1.0, pixel_size=25)
    profile = optics.kernel[optics.radius, optics.radius :]
    dark = int(torch.argmax((profile[1:] > profile[:-1]).int()))
    assert dark * 25 == pytest.approx(0.61 * 500, abs=25)


def test_born_wolf_on_the_axis():
    """(sin(u/4) / (u/4))^2: Born and Wolf, section 8.8, equation 26."""
    for u in (0.5, 3.0, 10.0, 12.566370614):
        expected = (np.sin(u / 4) / (u / 4)) ** 2
        assert float(born_wolf(torch.zeros(1), u)[0]) == pytest.approx(expected, abs=1e-10)
    sharp, blurred = (ForwardModel(psf="born_wolf", defocus=z).kernel for z in (0.0, 600.0))
    assert torch.equal(sharp, ForwardModel(psf="airy").kernel)
    assert blurred.max() < 0.6 * sharp.max()


def test_two_photons_square_the_psf():
    one, two = ForwardModel(psf="airy").kernel, ForwardModel(psf="airy", psf_exponent=2).kernel
    torch.testing.assert_close(two, one**2 / (one**2).sum())
    gaussian = ForwardModel(psf_sigma=2.0, psf_exponent=2).kernel
    narrow = ForwardModel(psf_sigma=2.0 / 2**0.5).kernel
    centre = len(gaussian) // 2
    np.testing.assert_allclose(gaussian[centre, centre], narrow.max(), rtol=1e-3)


def test_a_measured_psf_is_convolved_not_correlated(tmp_path):
    psf = np.zeros((9, 9), np.float32)
    psf[4, 4], psf[4, 6] = 3, 1  # a ghost two pixels to the right
    path = write_image(ImageFile(tmp_path / "p.tif", psf[None, None], "YX", psf.shape), tmp_path / "psf.tif")
    optics = ForwardModel(psf=str(path))
    image = torch.zeros(1, 1, 20, 20)
    image[0, 0, 10, 10] = 4
    found = optics.blur(image)
    assert found[0, 0, 10, 10] == 3 and found[0, 0, 10, 12] == 1 and found.sum() == 4
    even = np.pad(psf, ((0, 1), (0, 3)))
    write_image(ImageFile(path, even[None, None], "YX", even.shape), tmp_path / "even.npy")
    assert torch.equal(ForwardModel(psf=str(tmp_path / "even.npy")).kernel, optics.kernel)


def test_noise_has_the_mean_and_variance_of_photons_and_camera():
    optics = ForwardModel(photons=50, background=3, read_noise=2, white_level=1000.0, psf_sigma=0.5)
    image = torch.full((1, 1, 200, 200), 600.0)
    expected = optics.expected_photons(image)
    torch.testing.assert_close(expected, torch.full_like(expected, 33.0))
    found = optics.detect(expected, [7])
    assert float(found.mean()) == pytest.approx(33, abs=0.1)
    assert float(found.var()) == pytest.approx(33 + 4, rel=0.03)
    measured = optics.measure(image, [7])
    torch.testing.assert_close(optics.to_photons(measured), found)
    assert float(measured.mean()) == pytest.approx(600, rel=0.01)  # the unit of the sharp image
    counts = ForwardModel(photons=50, background=3, read_noise=0, white_level=1000.0).detect(expected, [7])
    observed = np.bincount(counts.int().flatten(), minlength=80)[:80] / counts.numel()
    assert np.abs(observed - scipy.stats.poisson.pmf(np.arange(80), 33)).max() < 0.003


def test_noise_follows_the_keys():
    optics = ForwardModel(white_level=1.0)
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    one, again, other = (optics.measure(image, keys) for keys in ([3, 4], [3, 4], [3, 5]))
    assert torch.equal(one, again) and torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert torch.equal(optics.measure(image[1:], [4])[0], one[1])  # whatever else is in the batch


def test_likelihood_equals_scipys_and_its_gradient_is_right():
    optics = ForwardModel(photons=30, background=2, read_noise=0, white_level=1.0, psf_sigma=0.8)
    image = torch.rand(2, 1, 12, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = optics.measure(image.float(), [1, 2]).double()
    expected = optics.expected_photons(image).numpy()
    counts = np.rint(optics.to_photons(measured).numpy())
    other = (image * 0.9 + 0.05).requires_grad_()

    def ours(x):
        return optics.log_likelihood(x, measured)

    theirs = [scipy.stats.poisson.logpmf(counts, optics.expected_photons(x.detach()).numpy()).sum((1, 2, 3))
              for x in (image, other)]  # fmt: skip
    np.testing.assert_allclose((ours(image) - ours(other)).detach().numpy(), theirs[0] - theirs[1], rtol=1e-4)
    assert expected.min() > 2
    assert torch.autograd.gradcheck(ours, (other,), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_data_consistency_climbs_the_likelihood(kind):
    optics = ForwardModel(photons=80, white_level=1000.0)
    transform = IntensityTransform(kind, (0.0,), (1000.0,), gain=12.5)
    truth = 800 * torch.rand(3, 1, 32, 40, generator=torch.Generator().manual_seed(2)) + 50
    truth = optics.blur(truth)
    measured = optics.measure(truth, [1, 2, 3])
    guess = transform(truth) + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))
    before = optics.log_likelihood(transform.inverse(guess), measured)
    moved = towards_measurement(guess, measured, transform, optics, variance=1.0)
    after = optics.log_likelihood(transform.inverse(moved), measured)
    assert (after > before).all()
    at_truth = optics.log_likelihood(truth, measured)
    assert ((at_truth - after) < 0.7 * (at_truth - before)).all()
    for _ in range(30):
        moved = towards_measurement(moved, measured, transform, optics, variance=1.0)
    assert (optics.log_likelihood(transform.inverse(moved), measured) > after).all()
    still = towards_measurement(guess, measured, transform, optics, variance=1e-6)
    assert (still - guess).abs().max() < 1e-2 * (moved - guess).abs().max()  # nothing left to decide at low noise


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"psf": "box"}, "`psf` 'box'"),
        ({"psf_sigma": 0}, "`psf_sigma`"),
        ({"photons": -1}, "`photons`"),
        ({"photons": float("inf")}, "`photons` inf: a finite number"),
        ({"defocus": float("nan")}, "`defocus` nan: a finite number"),
        ({"white_level": float("inf")}, "`white_level` inf: a finite number"),
        ({"read_noise": -1}, "`read_noise`"),
        ({"numerical_aperture": 1.4}, "`numerical_aperture` 1.4: below `refractive_index`"),
        ({"psf_exponent": 4}, "`psf_exponent`"),
        ({"white_level": float("nan")}, "`white_level`"),
    ],
)
def test_optics_that_cannot_be_are_refused(options, words):
    with pytest.raises(sf.SciflowError, match=words):
        ForwardModel(**options)


def test_psf_files_that_cannot_be_are_refused(tmp_path):
    for name, psf, words in (("zero", np.zeros((5, 5)), "not all 0"), ("corner", np.eye(5)[:, ::-1] * [5, 1, 1, 1, 1],
                             "border"), ("minus", -np.eye(5), "not negative")):  # fmt: skip
        np.save(tmp_path / f"{name}.npy", psf.astype("float32"))
        with pytest.raises(sf.SciflowError, match=words) as caught:
            _ = ForwardModel(psf=str(tmp_path / f"{name}.npy")).kernel
        assert name in str(caught.value)
    with pytest.raises(sf.SciflowError, match="`psf` gaussian is 33 pixels wide, larger than the image of 12 x 90"):
        ForwardModel(psf_sigma=4).blur(torch.zeros(1, 1, 12, 90))
    with pytest.raises(sf.SciflowError, match="`white_level` 0"):
        ForwardModel().expected_photons(torch.zeros(1, 1, 20, 20))
