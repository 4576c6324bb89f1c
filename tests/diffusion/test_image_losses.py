"""Losses between images against numpy, their gradients, and what each of them is for."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from sciflow_hf.diffusion.image_losses import HierarchicalFeatures, fourier_loss, multiscale_loss, perceptual_loss


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.promise("C03")
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (8, 9), (5, 6)])
def test_fourier_loss_equals_numpys_full_transform(size):
    a, b = images(3, 2, *size), images(3, 2, *size, seed=1)
    full = np.abs(np.fft.fft2(a.numpy() - b.numpy(), norm="ortho"))
    np.testing.assert_allclose(fourier_loss(a, b).numpy(), full.mean(axis=(1, 2, 3)), rtol=1e-5)
    assert fourier_loss(a, a).shape == (3,) and fourier_loss(a, a).max() < 1e-5


def test_fourier_loss_sees_fine_weak_frequencies():
    """A coarse error and a fine one of a tenth of its size: the squared error has the fine one's gradient at 1 %."""
    x = torch.arange(32)
    coarse = torch.cos(2 * np.pi * x / 32).expand(32, 32)
    fine = 0.1 * torch.cos(2 * np.pi * 12 * x / 32).expand(32, 32)
    target = torch.zeros(1, 1, 32, 32)
    weight = torch.ones(2, requires_grad=True)
    image = (weight[0] * coarse + weight[1] * fine)[None, None]
    shares = []
    for loss in (fourier_loss(image, target), (image - target).square().mean()[None]):
        gradient = torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0]
        shares.append(float(gradient[1] / gradient[0]))
    assert shares[0] == pytest.approx(0.1, rel=1e-3) and shares[1] == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_finite_where_images_agree():
    a = images(2, 1, 8, 8).requires_grad_()
    for loss in (fourier_loss(a, a.detach()), multiscale_loss(a, a.detach())):
        assert torch.isfinite(torch.autograd.grad(loss.sum(), a)[0]).all()


@pytest.mark.promise("C05", "C29")
def test_multiscale_loss_equals_block_means():
    a, b = images(2, 3, 16, 24), images(2, 3, 16, 24, seed=1)
    difference = (a - b).numpy()
    expected = 0
    for scale in (2, 4, 8):
        blocks = difference.reshape(2, 3, 16 // scale, scale, 24 // scale, scale).mean(axis=(3, 5))
        expected = expected + scale**2 * (blocks**2).mean(axis=(1, 2, 3)) / 3
    np.testing.assert_allclose(multiscale_loss(a, b).numpy(), expected, rtol=1e-5)
    small = images(2, 1, 4, 4)
    np.testing.assert_allclose(multiscale_loss(small, 0 * small, scales=(2, 64)),
                               multiscale_loss(small, 0 * small, scales=(2,)))  # fmt: skip


def test_multiscale_loss_counts_shifts_of_large_parts_more_than_noise():
    noise, shift = images(1, 1, 32, 32), torch.ones(1, 1, 32, 32)
    zero = torch.zeros_like(noise)
    assert float(multiscale_loss(noise, zero)) == pytest.approx(1, rel=0.3)  # as the squared error of pixels
    assert float(multiscale_loss(shift, zero)) == pytest.approx((4 + 16 + 64) / 3, rel=1e-5)


class Features(torch.nn.Module):
    """Two outputs, one of them a convolution's."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, bias=False)
        torch.nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(3))

    def forward(self, x):
        return self.conv(x), x.flatten(1) * 2


@pytest.mark.promise("C03")
def test_perceptual_loss_equals_its_formula_and_trains_the_image_alone():
    features = Features().requires_grad_(False)
    a, b = images(2, 1, 8, 8).requires_grad_(), images(2, 1, 8, 8, seed=1)
    loss = perceptual_loss(a, b, features)
    conv = (features.conv(a.detach()) - features.conv(b)).square().mean(dim=(1, 2, 3))
    flat = (2 * (a.detach() - b)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.detach(), (conv + flat) / 2)
    assert torch.autograd.grad(loss.sum(), a)[0].abs().min() > 0
    one = perceptual_loss(a, b, features.conv)
    torch.testing.assert_close(one.detach(), conv)


@pytest.mark.promise("C31")
@pytest.mark.parametrize(
    ("features", "words"),
    [
        (lambda x: x.mean(), "returns \\(\\) for 2 images"),
        (lambda x: [x[:1]], "returns \\(1, 1, 8, 8\\) for 2 images"),
        (lambda x: {"a": x}, "returns dict"),
        (lambda x: (), "returns tuple"),
        (lambda x: [3], "returns int"),
    ],
)
def test_features_of_the_wrong_shape_are_named(features, words):
    with pytest.raises(ValueError, match=f"`feature_network` {words}"):
        perceptual_loss(images(2, 1, 8, 8), images(2, 1, 8, 8), features)


def block_means(array, scale):
    height, width = array.shape[-2] // scale, array.shape[-1] // scale
    return array[..., : height * scale, : width * scale].reshape(
        *array.shape[:-2], height, scale, width, scale
    ).mean(axis=(-3, -1))  # fmt: skip


def test_hierarchical_features_are_block_means_and_their_sobel_derivatives():
    a = images(2, 3, 12, 17).double()
    found = HierarchicalFeatures(scales=(1, 2, 4, 16))(a)
    assert [tuple(f.shape) for f in found] == [(2, 9, 12, 17), (2, 9, 6, 8), (2, 9, 3, 4)]  # blocks of 16 do not fit
    for scale, features in zip((1, 2, 4), found, strict=True):
        for b, c in np.ndindex(2, 3):
            plane = block_means(a[b, c].numpy(), scale)
            down, right = (ndimage.sobel(plane, axis=axis, mode="nearest") / 8 for axis in (0, 1))
            np.testing.assert_allclose(features[b, 3 * c : 3 * c + 3], [plane, down, right], atol=1e-14)


def test_a_plane_has_its_slope_at_every_scale():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    found = HierarchicalFeatures(scales=(1, 2, 4))((3 * y - 2 * x)[None, None])
    for scale, features in zip((1, 2, 4), found, strict=True):
        assert (features[0, 1, 1:-1, 1:-1] == 3 * scale).all() and (features[0, 2, 1:-1, 1:-1] == -2 * scale).all()


@pytest.mark.promise("C18")
def test_multiscale_consistency_is_the_perceptual_loss_of_every_scale():
    network = Features().requires_grad_(False)
    a, b = images(2, 1, 8, 12), images(2, 1, 8, 12, seed=1)
    pairs = [[torch.from_numpy(block_means(x.numpy(), scale)) for x in (a, b)] for scale in (1, 2)]
    expected = sum(perceptual_loss(x, y, network) for x, y in pairs) / 2
    torch.testing.assert_close(perceptual_loss(a, b, HierarchicalFeatures(network, scales=(1, 2, 16))), expected)


@pytest.mark.parametrize("loss", [fourier_loss, multiscale_loss])
def test_any_image_loss_takes_features(loss):
    a, b = images(2, 3, 8, 12), images(2, 3, 8, 12, seed=1)
    same = HierarchicalFeatures(torch.nn.Identity(), scales=(1,))
    torch.testing.assert_close(perceptual_loss(a, b, same, compare=loss), loss(a, b))
    two = HierarchicalFeatures(torch.nn.Identity(), scales=(1, 2))
    halves = [torch.nn.functional.avg_pool2d(x, 2) for x in (a, b)]
    torch.testing.assert_close(perceptual_loss(a, b, two, compare=loss), (loss(a, b) + loss(*halves)) / 2)
