"""Tiles of large images: exact for local networks, one batch of tiles in memory, no seam; folders; cascades."""

import dataclasses
import itertools

import numpy as np
import pytest
import tifffile
import torch

import sciflow_hf as sf
from sciflow_hf.images.files import ImageFile, write_image
from sciflow_hf.images.optics import ForwardModel
from sciflow_hf.images.tiles import blend_weight, padded, tile_starts, tiled, turned, turned_back
from sciflow_hf.images.transforms import IntensityTransform
from sciflow_hf.pipelines.microscopy import MicroscopyRestorationPipeline


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(100, 32, 8), (33, 32, 8), (32, 32, 8), (20, 32, 8), (1024, 48, 12)]
)
def test_tiles_cover_and_overlap(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
    assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
    assert len(starts) <= max(1, -(-(size - overlap) // (tile - overlap)))


def test_weights_fade_to_where_another_tile_is():
    weight = blend_weight(10, 16, 100, 4)
    rise = [np.sin(np.pi / 2 * i / 5) ** 2 for i in range(1, 5)]
    assert weight.tolist()[:5] == pytest.approx([*rise, 1]) and torch.equal(weight, weight.flip(0))
    assert blend_weight(0, 16, 100, 4)[:8].min() == 1 and blend_weight(84, 16, 100, 4)[8:].min() == 1
    left, right = blend_weight(0, 16, 28, 4)[12:], blend_weight(12, 16, 28, 4)[:4]
    torch.testing.assert_close(left + right, torch.ones(4))  # neighbours share what lies between them


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_pointwise_network_is_exact_and_timesteps_stay_with_their_image(batch_size):
    calls = []

    def network(inputs, timesteps):
        calls.append(inputs.shape)
        return inputs[:, :1] * inputs[:, 1:] + timesteps.view(-1, 1, 1, 1)

    inputs = torch.randn(2, 2, 70, 41, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3, 900])
    found = tiled(network, tile_size=16, overlap=4, batch_size=batch_size)(inputs, timesteps)
    torch.testing.assert_close(found, network(inputs, timesteps))
    assert max(shape[0] for shape in calls[:-1]) <= batch_size and {shape[2:] for shape in calls[:-1]} == {(16, 16)}


def test_a_network_of_short_reach_has_no_seams():
    """A convolution whose borders are wrong in every tile: away from the image's border nothing is left of that."""
    conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    torch.nn.init.constant_(conv.weight, 1 / 9)
    image = torch.ones(1, 1, 96, 96)
    time = torch.zeros(1)
    with torch.no_grad():
        blended = tiled(lambda x, t: conv(x), tile_size=32, overlap=16, batch_size=4)(image, time)
        hard = tiled(lambda x, t: conv(x), tile_size=32, overlap=0, batch_size=4)(image, time)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert (blended[inner] - 1).abs().max() < 0.01 < 0.3 < (hard[inner] - 1).abs().max()


def test_sizes_that_no_tile_has():
    small = torch.randn(1, 2, 10, 50)
    network = tiled(lambda x, t: x[:, :1], tile_size=16, overlap=4, batch_size=8)
    torch.testing.assert_close(network(small, torch.zeros(1)), small[:, :1])
    wide = padded(small, 16)
    assert wide.shape == (1, 2, 16, 64) and torch.equal(wide[..., :10, :50], small)
    assert torch.equal(wide[0, 0, 10], wide[0, 0, 8]) and padded(wide, 16) is wide
    assert padded(torch.randn(1, 1, 3, 20), 16).shape == (1, 1, 16, 32)  # more to add than there is
    with pytest.raises(sf.SciflowError, match="`tile_overlap` 9: 0 to half of `tile_size` 16"):
        tiled(lambda x, t: x, tile_size=16, overlap=9, batch_size=1)


# -- the pipeline ----------------------------------------------------------------------------------------------


class Denoiser(torch.nn.Module):
    """A network that predicts the clean image: the measured one, in the sharp image's units."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.sizes, self.config = scale, [], type("Config", (), {"block_out_channels": (8, 16, 32)})

    def forward(self, sample, timestep, return_dict):
        self.sizes.append(tuple(sample.shape))
        return (self.scale * sample[:, -1:],)


def make_pipeline(network=None, *, kind="percentile", **options):
    scheduler = sf.MicroscopyUNet(prediction_type="sample", num_train_timesteps=50).scheduler()
    transform = IntensityTransform(kind, (0.0,), (65535.0,), gain=10.0).to_dict()
    options = {
        "optics": dataclasses.asdict(ForwardModel(psf_sigma=0.5, white_level=65535.0)),
        "tile_size": 16,
    } | options
    pipeline = MicroscopyRestorationPipeline(
        network or Denoiser(), scheduler, intensity=transform, conditioning_intensity=transform, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ancestral"])
@pytest.mark.parametrize("kind", ["percentile", "anscombe", "log"])
@pytest.mark.parametrize("shape", [(12, 16), (37, 50)])
def test_a_perfect_model_returns_the_measured_counts(sampler, kind, shape):
    values = np.random.default_rng(0).integers(0, 65536, (2, 1, *shape)).astype("uint16")
    found = make_pipeline(kind=kind)(values, num_inference_steps=5, num_samples=2, sampler=sampler)
    assert np.abs(found.mean.numpy() - values).max() < 0.5 and found.std.max() < 0.5


def test_samples_do_not_depend_on_batches():
    class Noisy(Denoiser):
        def forward(self, sample, timestep, return_dict):
            return (0.5 * sample[:, -1:] + 0.3 * sample[:, :1],)

    values = np.random.default_rng(0).integers(0, 60000, (3, 1, 16, 12)).astype("uint16")
    pipeline = make_pipeline(Noisy())
    results = [pipeline(values, num_samples=4, num_inference_steps=6, batch_size=size).samples for size in (1, 5, 16)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1)
    assert results[0].std(dim=0).min() > 0 and not torch.equal(results[0][0], pipeline(values, seed=1).samples[0])
    more = pipeline(values, num_samples=5, num_inference_steps=6).samples
    torch.testing.assert_close(more[:4], results[0], rtol=1e-4, atol=1)


def test_the_eight_orientations_are_those_of_numpy():
    image = torch.arange(2 * 3 * 5).view(2, 3, 5)
    seen = [turned(image, turn) for turn in range(8)]
    assert len({tuple(i.flatten().tolist()) for i in seen}) == 8
    for turn, view in enumerate(seen):
        rotated = np.rot90(image.numpy(), turn % 4, axes=(1, 2))
        assert np.array_equal(view.numpy(), rotated[..., ::-1] if turn >= 4 else rotated)
        assert torch.equal(turned_back(view, turn), image)


def test_self_ensemble_draws_each_sample_in_an_orientation_of_its_own():
    """Of a network that is not symmetric: a sample is that of the turned image, turned back."""

    class Slanted(Denoiser):
        def forward(self, sample, timestep, return_dict):
            return (0.5 * sample[:, -1:].roll(1, dims=-1) + 0.2 * sample[:, :1],)

    values = torch.from_numpy(np.random.default_rng(0).uniform(0, 60000, (2, 1, 12, 16)).astype("float32"))
    pipeline = make_pipeline(Slanted())
    options = {"num_samples": 11, "num_inference_steps": 3}
    found = pipeline(values, **options, self_ensemble=True, batch_size=3).samples
    assert found.shape == (11, 2, 1, 12, 16)
    for sample in range(11):
        turn = sample % 8
        alone = pipeline(turned(values, turn), **options).samples[sample]
        torch.testing.assert_close(found[sample], turned_back(alone, turn), rtol=1e-4, atol=1)


def test_self_ensemble_needs_a_symmetric_psf(tmp_path):
    kernel = np.zeros((3, 3), np.float32)
    kernel[1, 1], kernel[1, 2] = 0.7, 0.3
    tifffile.imwrite(tmp_path / "psf.tif", kernel)
    optics = dataclasses.asdict(ForwardModel(psf=str(tmp_path / "psf.tif"), white_level=65535.0))
    with pytest.raises(sf.SciflowError, match="`self_ensemble`: the point-spread function"):
        make_pipeline(optics=optics)(np.ones((1, 1, 16, 16), np.float32), self_ensemble=True)


@pytest.mark.promise("C19")
def test_memory_of_a_large_image_is_that_of_one_batch_of_tiles():
    pipeline = make_pipeline(Denoiser())
    values = np.random.default_rng(0).integers(0, 60000, (1, 1, 130, 90)).astype("uint16")
    pipeline(values, num_inference_steps=2, batch_size=4)
    assert {shape[1:] for shape in pipeline.unet.sizes} == {(2, 16, 16)}
    assert max(shape[0] for shape in pipeline.unet.sizes) == 4


@pytest.mark.promise("C19")
def test_a_cascade_goes_from_coarse_to_fine():
    pipeline = make_pipeline(Denoiser())
    values = np.random.default_rng(0).integers(0, 60000, (1, 1, 32, 48)).astype("uint16")
    found = pipeline(values, num_inference_steps=4, cascade=(2, 1), tile_size=64, cascade_strength=0.5)
    assert [shape[2:] for shape in pipeline.unet.sizes] == [(16, 24)] * 4 + [(32, 48)] * 2
    assert np.abs(found.mean.numpy() - values).max() < 0.5
    wrong = [({"cascade": (1, 2)}, "`cascade` \\[1, 2\\]"), ({"cascade": ()}, "`cascade`")]
    wrong += [({"cascade_strength": 0}, "`cascade_strength` 0"), ({"sampler": "euler"}, "`sampler`")]
    wrong += [({"timestep_spacing": "karras"}, "`timestep_spacing` 'karras'")]
    for options, words in wrong:
        with pytest.raises(sf.SciflowError, match=words):
            pipeline(values, **options)


@pytest.mark.promise("C12")
def test_data_consistency_brings_samples_to_the_measurement():
    """A network that knows nothing: with the optics its samples explain the measurement, without they do not."""
    optics = ForwardModel(psf_sigma=0.8, photons=500, white_level=65535.0)
    x = torch.linspace(0, 6.28, 32)
    truth = 30000 + 20000 * torch.sin(x)[:, None] * torch.cos(x)[None]
    measured = optics.measure(truth[None, None], [1])
    pipeline = make_pipeline(Denoiser(scale=0.0), optics=dataclasses.asdict(optics), tile_size=32)
    errors = []
    for strength in (0.0, 1.0):
        options = {"num_inference_steps": 25, "timestep_spacing": "trailing"}  # at little noise the network has its way
        found = pipeline(measured, data_consistency=strength, **options).samples[0, 0, 0]
        errors.append(float((found - truth).square().mean().sqrt()))
    assert errors[1] < 0.6 * errors[0]
    with pytest.raises(sf.SciflowError, match="`data_consistency`: this network learned from pairs"):
        make_pipeline(optics=None)(measured, num_inference_steps=2, data_consistency=1.0)


# -- folders ---------------------------------------------------------------------------------------------------


def put(path, values, axes="YX"):
    planes = values.reshape(-1, 1, *values.shape[-2:])
    return write_image(ImageFile(path, planes, axes, values.shape), path)


def test_a_folder_of_sixteen_bit_tiffs_comes_back_as_such(tmp_path):
    flat = np.full((21, 34), 40007, "uint16")
    stack = np.random.default_rng(0).integers(0, 65536, (3, 20, 18)).astype("uint16")
    put(tmp_path / "in" / "flat.tif", flat)
    put(tmp_path / "in" / "deep" / "stack.ome.tif", stack, "ZYX")
    put(tmp_path / "in" / "eight.png", np.full((16, 16), 200, "uint8"))
    pipeline = make_pipeline(kind="anscombe")
    written = pipeline.restore_folder(tmp_path / "in", tmp_path / "out", num_inference_steps=3, save_std=True)
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in written)
    assert names == [
        "deep/stack.ome.tif",
        "deep/stack_std.tif",
        "eight.png",
        "eight_std.tif",
        "flat.tif",
        "flat_std.tif",
    ]
    for name, expected in (("flat.tif", flat), ("deep/stack.ome.tif", stack)):
        found = tifffile.imread(tmp_path / "out" / name)
        assert found.dtype == np.uint16 and found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1
    with tifffile.TiffFile(tmp_path / "out" / "deep" / "stack.ome.tif") as file:
        assert file.is_ome and file.series[0].axes == "ZYX"
    assert tifffile.imread(tmp_path / "out" / "flat_std.tif").dtype == np.float32


def test_folders_that_cannot_be_restored_are_refused_before_the_first_file(tmp_path):
    pipeline = make_pipeline()
    put(tmp_path / "in" / "a.tif", np.ones((16, 16), "uint16"))
    with pytest.raises(sf.SciflowError, match=r"`output_dir`.*of their own"):
        pipeline.restore_folder(tmp_path / "in", tmp_path / "in")
    np.save(tmp_path / "in" / "z.npy", np.zeros((2, 16, 16), "uint16"))
    with pytest.raises(sf.SciflowError, match=r"z.npy: 2 channels, but this network was trained on 1"):
        pipeline.restore_folder(tmp_path / "in", tmp_path / "out")
    np.save(tmp_path / "in" / "z.npy", np.full((16, 16), np.nan, "float32"))
    with pytest.raises(sf.SciflowError, match=r"z.npy: pixels are NaN"):
        pipeline.restore_folder(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(sf.SciflowError, match="`images` \\(1, 2, 16, 16\\): this network takes \\(B, 1, H, W\\)"):
        pipeline(np.zeros((1, 2, 16, 16)))
