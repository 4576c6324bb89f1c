"""Distances of sets of images: closed forms, a second way, bad networks; the default classifier on real digits."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import sciflow_hf as sf
from sciflow_hf.demo.digits import write_digits
from sciflow_hf.images.classes import load_class_images
from sciflow_hf.metrics.classifier import SmallClassifier, class_accuracy, train_classifier
from sciflow_hf.metrics.frechet import frechet_distance, image_features, kernel_distance, nearest_distances
from sciflow_hf.metrics.samples import SampleMetrics, even_labels, made


def draws(rows, *, seed, columns=3, scale=1.0, shift=0.0):
    return scale * np.random.default_rng(seed).normal(size=(rows, columns)) + shift


def test_frechet_distance_of_normals_in_closed_form():
    """|difference of means|^2 + D (difference of deviations)^2, for covariances that are multiples of one."""
    x = draws(200_000, seed=0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + np.arange(1, 4)) == pytest.approx(14, rel=1e-6)
    assert frechet_distance(x, draws(200_000, seed=1, scale=3, shift=2)) == pytest.approx(3 * 4 + 3 * 4, rel=0.01)


@pytest.mark.promise("D23")
def test_frechet_distance_is_the_formula():
    """With scipy's matrix root of the product, as clean-fid and pytorch-fid compute it."""
    mix = np.random.default_rng(5).normal(size=(4, 4))
    x, y = draws(300, seed=0, columns=4) @ mix, draws(200, seed=1, columns=4, shift=0.3)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_is_the_double_sum():
    x, y = draws(6, seed=0), draws(6, seed=1, shift=1)
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / 30
    between = sum(kernel(a, b) for a in x for b in y) / 36
    mean, spread = kernel_distance(x, y)
    assert mean == pytest.approx(within - 2 * between) and spread == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased():
    """Of two samples of one distribution 0 in the mean; the Frechet distance is above."""
    found = [kernel_distance(draws(50, seed=i), draws(50, seed=1000 + i), subsets=1)[0] for i in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 300**0.5
    assert min(frechet_distance(draws(50, seed=i), draws(50, seed=1000 + i)) for i in range(30)) > 0.02
    assert kernel_distance(draws(500, seed=0), draws(500, seed=1, shift=1))[0] > 1


def test_nearest_distances():
    points = np.array([[[0.0, 0.0]], [[3.0, 4.0]]])
    np.testing.assert_allclose(nearest_distances(points, np.array([[[3.0, 0.0]], [[0.0, 1.0]]])), [1.0, 4.0])


@pytest.mark.parametrize(
    "network",
    [lambda x: x, lambda x: x.mean(), lambda x: x.flatten(1)[:2], lambda x: (x.flatten(1),)],
    ids=["images", "number", "too few", "tuple"],
)
def test_networks_of_the_wrong_shape(network):
    with pytest.raises(sf.SciflowError, match=r"feature network makes.*\(4, 3, 2, 2\).*\(4, D\)"):
        image_features(network, [torch.zeros(4, 3, 2, 2)])


def test_what_else_is_refused():
    with pytest.raises(sf.SciflowError, match="not finite"):
        image_features(lambda x: x.flatten(1) / 0, [torch.zeros(4, 3, 2, 2)])
    with pytest.raises(sf.SciflowError, match=r"\(5, 3\) and \(5, 2\)"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 2)))
    with pytest.raises(sf.SciflowError, match="1 and 5 images"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(sf.SciflowError, match=r"classifier makes \(4, 2\).*labels up to 3"):
        class_accuracy(lambda x: torch.zeros(4, 2), torch.zeros(4, 1, 2, 2), torch.arange(4))
    with pytest.raises(sf.SciflowError, match=r"metric_network.*'nowhere\.to\.be'"):
        made("nowhere.to.be")
    with pytest.raises(sf.SciflowError, match=r"metric_images.*1"):
        SampleMetrics(metric_images=1)


def test_labels_go_round_the_classes():
    assert even_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0] and even_labels(7, 0) is None


def test_classifier_learns_digits(tmp_path):
    root = write_digits(tmp_path / "digits")
    args = sf.ClassImageArguments(input_dir=str(root), eval_split="test")
    train, held_out = load_class_images(args, image_size=8)
    images, labels = (torch.stack([held_out[i][key] for i in range(540)]) for key in ("pixel_values", "class_labels"))
    before = torch.random.get_rng_state()
    network = train_classifier(train, num_classes=10, steps=60)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert class_accuracy(network, images, labels) > 0.8  # chance is 0.1; about 0.9, which depends on the processor
    assert class_accuracy(network, images, (labels + 1) % 10) < 0.1
    twice = [train_classifier(train, num_classes=10, steps=4) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in twice), strict=True))
    features = image_features(network.features, images.split(200))
    real = image_features(network.features, [torch.stack([train[i]["pixel_values"] for i in range(0, 1257, 2)])])
    noise = image_features(network.features, [torch.rand(540, 1, 8, 8, generator=torch.Generator().manual_seed(0))])
    assert features.shape == (540, 64) and frechet_distance(real, features) < frechet_distance(noise, features) / 20


@pytest.mark.parametrize("size", [8, 28, 64])
def test_classifier_takes_any_size(size):
    network = SmallClassifier(3, size, 7).eval()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert network.convolutions(torch.zeros(1, 3, size, size)).shape[-1] <= 4
    widths = [block[0].out_channels for block in network.convolutions]
    assert widths == {8: [64] * 3, 28: [18, 36, 64, 64, 64], 64: [16, 16, 32, 64, 64, 64]}[size]


def test_classifier_needs_labels():
    with pytest.raises(sf.SciflowError, match=r"class_labels.*feature network of your own"):
        train_classifier([{"pixel_values": torch.zeros(1, 8, 8)}], num_classes=0)
