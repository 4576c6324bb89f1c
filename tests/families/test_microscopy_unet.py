"""The family against diffusers' own scheduler and network; its image losses, noise schedules, saved pipeline."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from parity import FEW, roundings

import sciflow_hf as sf
from sciflow_hf.diffusion.image_losses import fourier_loss, multiscale_loss, perceptual_loss
from sciflow_hf.diffusion.objectives import shift_snr
from sciflow_hf.images.files import ImageFile, write_image
from sciflow_hf.images.microscopes import MicroscopyDataArguments, load_microscopy_images
from sciflow_hf.images.optics import ForwardModel
from sciflow_hf.images.transforms import IntensityTransform
from sciflow_hf.pipelines.microscopy import MicroscopyRestorationPipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make_family(channels=1, conditioning=1, **options):
    family = sf.MicroscopyUNet(**({"block_out_channels": [8, 16], "num_train_timesteps": 100} | options))
    family.intensity = IntensityTransform("percentile", (0.0,) * channels, (1000.0,) * channels).to_dict()
    family.conditioning_intensity = IntensityTransform(
        "anscombe", (0.0,) * conditioning, (900.0,) * conditioning
    ).to_dict()
    family.tile_size = 16
    return family


def redraw(model):
    """Weights of which every part of the input shows in the output."""
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5, generator=rng)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=rng)
    return model


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True, weighting_scheme="none", report_to="none"
    )


@pytest.fixture(scope="module")
def batch():
    """Not square; one channel to draw, two to draw it by."""
    rng = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(3, 1, 16, 24, generator=rng) * 0.4,
            "conditioning_pixel_values": torch.randn(3, 2, 16, 24, generator=rng) * 0.4}  # fmt: skip


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 1, 16, 24, generator=torch.Generator().manual_seed(5))


def reference(family, model, batch, noise, timesteps):
    """The loss by diffusers' scheduler."""
    scheduler, images = family.scheduler(), batch["pixel_values"]
    noisy = scheduler.add_noise(images, noise, timesteps)
    prediction = model(torch.cat([noisy, batch["conditioning_pixel_values"]], 1), timesteps, return_dict=False)[0]
    kind = scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": images, "v_prediction": scheduler.get_velocity(images, noise, timesteps)}[
        kind
    ]
    return (prediction - target).square().mean(dim=(1, 2, 3))


@pytest.mark.promise("C04", "C15", "C16", "C20")
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "exponential"])
@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_loss_and_gradients_equal_diffusers(schedule, kind, batch, noise, args):
    family = make_family(1, 2, beta_schedule=schedule, prediction_type=kind, attention_levels=1)
    model = redraw(family.load_model(dtype=torch.float32))
    assert isinstance(model, UNet2DModel) and model.config.in_channels == 3 and model.config.out_channels == 1
    levels = torch.tensor([3, 50, 99])
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=levels)[0],
        lambda: reference(family, model, batch, noise, levels),
        model,
    )
    assert difference < FEW


MISTAKES = {
    "conditioning left out": lambda b: b | {"conditioning_pixel_values": 0 * b["conditioning_pixel_values"]},
    "channels swapped": lambda b: b | {"conditioning_pixel_values": b["conditioning_pixel_values"].flip(1)},
    "another sample's": lambda b: b | {"conditioning_pixel_values": b["conditioning_pixel_values"].flip(0)},
    "turned": lambda b: b | {"conditioning_pixel_values": b["conditioning_pixel_values"].flip(-1)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, batch, noise, args):
    family, levels = make_family(1, 2), torch.tensor([3, 50, 99])
    model = redraw(family.load_model(dtype=torch.float32))
    right = reference(family, model, batch, noise, levels)
    wrong, _ = family.compute_loss(model, MISTAKES[name](batch), args, noise=noise, levels=levels)
    assert ((wrong - right).abs() / right).max() > 1e-2


class Answer(torch.nn.Module):
    """A network that answers as told."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, return_dict):
        assert not return_dict
        return (self.answer + 0 * self.weight,)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_a_perfect_model_has_no_loss_of_any_kind(kind, batch, noise, args):
    family = make_family(
        1, 2, prediction_type=kind, fourier_weight=1.0, multiscale_weight=1.0, perceptual_weight=1.0,
        hierarchical_weight=1.0, feature_network="torch.nn:Flatten",
    )  # fmt: skip
    levels, images = torch.tensor([3, 50, 90]), batch["pixel_values"]
    bar = family.process.alpha_bar[levels].view(-1, 1, 1, 1)
    perfect = {"v_prediction": bar.sqrt() * noise - (1 - bar).sqrt() * images, "epsilon": noise, "sample": images}[kind]
    assert family.compute_loss(Answer(perfect), batch, args, noise=noise, levels=levels)[0].max() < 1e-5
    assert family.compute_loss(Answer(-perfect), batch, args, noise=noise, levels=levels)[0].min() > 0.1


def test_image_losses_are_of_the_clean_image(batch, noise, args):
    """Each weight adds sqrt(a) times its loss between the image and what the prediction says of it."""
    levels, images = torch.tensor([3, 50, 90]), batch["pixel_values"]
    plain = make_family(1, 2, prediction_type="sample")
    root = plain.process.alpha_bar[levels].sqrt()
    guess = Answer(images + 0.3)
    base = plain.compute_loss(guess, batch, args, noise=noise, levels=levels)[0]
    features = torch.nn.Flatten()
    for options, expected in (
        ({"fourier_weight": 0.5}, 0.5 * fourier_loss(images + 0.3, images)),
        ({"multiscale_weight": 0.2}, 0.2 * multiscale_loss(images + 0.3, images)),
        ({"perceptual_weight": 2.0, "feature_network": "torch.nn:Flatten"},
         2 * perceptual_loss(images + 0.3, images, features)),
        ({"hierarchical_weight": 3.0}, torch.tensor(3 * 0.3**2 / 3)),  # means differ by 0.3, derivatives do not
        ({"hierarchical_weight": 1.0, "feature_network": "torch.nn:Flatten"}, torch.tensor(0.3**2)),
    ):  # fmt: skip
        family = dataclasses.replace(plain, **options)
        found = family.compute_loss(guess, batch, args, noise=noise, levels=levels)[0] - base
        torch.testing.assert_close(found, root * expected)


def test_noise_and_levels_follow_the_keys(batch, args):
    family = make_family(1, 2)
    model = redraw(family.load_model(dtype=torch.float32))
    one, again, other = (family.compute_loss(model, batch | {"noise_key": torch.tensor(keys)}, args)
                         for keys in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))  # fmt: skip
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert other[0][2] != one[0][2] and torch.equal(other[1][:2], one[1][:2])
    levels = family.sample_levels(torch.arange(4000), args, 1)
    assert 0 <= levels.min() < 2 and 97 < levels.max() <= 99 and abs(levels.float().mean() - 49.5) < 2
    assert family.evaluation_levels(4).tolist() == [12, 37, 62, 87] and family.level_range() == 100


@pytest.mark.promise("C17")
def test_coarse_training_hides_as_much_of_the_coarse_image(batch, args):
    """Blocks of 2: the noisy coarse image is the averaged noisy image, up to scale, at the same timestep."""
    alpha_bar = make_family().process.alpha_bar
    images = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    bar, pool = alpha_bar[60], torch.nn.AvgPool2d(2)
    averaged = pool(bar.sqrt() * images + (1 - bar).sqrt() * noise)
    coarse_bar = shift_snr(bar, 4)
    coarse = coarse_bar.sqrt() * pool(images) + (1 - coarse_bar).sqrt() * 2 * pool(noise)  # 2 pool(noise) is white
    torch.testing.assert_close(coarse, averaged * (coarse_bar / bar).sqrt())
    assert torch.equal(shift_snr(alpha_bar, 1), alpha_bar)
    seen = []

    class Sizes(Answer):
        def forward(self, sample, timestep, return_dict):
            seen.append(tuple(sample.shape))
            return (self.weight * sample[:, :1],)

    family = make_family(1, 2)
    family.block = 4
    model = Sizes(0.0)
    family.compute_loss(model.train(), batch, args)
    family.compute_loss(model.eval(), batch, args)
    assert seen == [(3, 3, 4, 6), (3, 3, 16, 24)]


def test_masks_are_honoured_or_refused(batch, noise, args):
    family, levels = make_family(1, 2), torch.tensor([3, 50, 90])
    guess = Answer(batch["pixel_values"])
    mask = torch.zeros(3, 16, 24, dtype=torch.uint8)
    mask[:, 4:8, 2:9] = 3
    found = family.compute_loss(guess, batch | {"loss_mask": mask}, args, noise=noise, levels=levels)[0]
    process = family.process
    error = (batch["pixel_values"] - process.target(batch["pixel_values"], noise, levels)).square()
    torch.testing.assert_close(found, error[:, :, 4:8, 2:9].flatten(1).mean(1))
    family.block = 2
    masked = batch | {"loss_mask": mask}
    assert family.compute_loss(redraw(family.load_model(dtype=torch.float32)).train(), masked, args)[0].shape == (3,)
    imaged = dataclasses.replace(family, fourier_weight=1.0)
    with pytest.raises(
        sf.SciflowError, match=r"`loss_mask` does not go with `fourier_weight`, .*, `hierarchical_weight`"
    ):
        imaged.compute_loss(guess, masked, args, noise=noise, levels=levels)


# -- the saved pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "exponential"])
def test_a_saved_pipeline_is_the_trained_network(tmp_path, schedule):
    family = make_family(1, 2, beta_schedule=schedule, prediction_type="epsilon")
    model = redraw(family.load_model(dtype=torch.float32))
    family.save_network(model, tmp_path)
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    torch.testing.assert_close(scheduler.alphas_cumprod, family.process.alpha_bar)
    again = sf.MicroscopyUNet(pretrained_model_name_or_path=str(tmp_path))
    assert not again.from_scratch and family.from_scratch
    pipelines = [family.load_pipeline(model), again.load_pipeline(),
                 MicroscopyRestorationPipeline.from_pretrained(tmp_path, trust_remote_code=True)]  # fmt: skip
    assert (again.block_out_channels, again.prediction_type, again.beta_schedule) == ([8, 16], "epsilon", schedule)
    measured = 500 * torch.rand(2, 2, 20, 26, generator=torch.Generator().manual_seed(0))
    results = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        results.append(pipeline(measured, num_inference_steps=4, num_samples=2).samples)
    assert results[0].shape == (2, 2, 1, 20, 26)
    assert all(torch.equal(results[0], other) for other in results[1:])


CHECK = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
files = pipeline.restore_folder(sys.argv[2], sys.argv[3], num_inference_steps=2)
assert len(files) == 1 and "sciflow_hf" not in sys.modules
"""


@pytest.mark.promise("C37")
def test_it_loads_where_this_package_is_not(tmp_path):
    import subprocess

    family = make_family(1, 1)
    family.save_network(family.load_model(dtype=torch.float32), tmp_path / "model")
    values = np.random.default_rng(0).integers(0, 900, (20, 24)).astype("uint16")
    write_image(ImageFile(tmp_path, values[None, None], "YX", values.shape), tmp_path / "in" / "a.tif")
    words = [sys.executable, "-c", CHECK, *(str(tmp_path / name) for name in ("model", "in", "out"))]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "a.tif").is_file()


def test_a_run_goes_on_from_a_saved_pipeline_with_its_intensities(tmp_path):
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 5000, (40, 40)).astype("uint16")
        write_image(ImageFile(tmp_path, values[None, None], "YX", values.shape), tmp_path / "in" / f"{number}.tif")
    args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    family = make_family()
    family.save_network(redraw(family.load_model(dtype=torch.float32)), tmp_path / "model")
    data = MicroscopyDataArguments(input_dir=str(tmp_path / "in"), tile_size=16, eval_fraction=0.0)
    again = sf.MicroscopyUNet(pretrained_model_name_or_path=str(tmp_path / "model"))
    train, _ = sf.prepare_microscopy(data, ForwardModel(psf_sigma=1.0), again, args)
    assert train.transform.to_dict() == family.intensity == again.intensity
    assert train.conditioning_transform.kind == "anscombe"
    fresh, _ = load_microscopy_images(data, ForwardModel(psf_sigma=1.0))
    assert fresh.transform != train.transform
    model = again.load_model(dtype=torch.float32, meta=True)
    assert next(model.parameters()).is_meta
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "X"}))
    with pytest.raises(sf.SciflowError, match="`pretrained_model_name_or_path`"):
        sf.MicroscopyUNet(pretrained_model_name_or_path=str(tmp_path / "other")).take_over()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_out_channels": [12, 16]}, "`block_out_channels` \\[12, 16\\]"),
        ({"block_out_channels": []}, "`block_out_channels`"),
        ({"attention_levels": 3}, "`attention_levels` 3"),
        ({"beta_schedule": "square"}, "`beta_schedule` 'square'"),
        ({"prediction_type": "x"}, "`prediction_type` 'x'"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps`"),
        ({"perceptual_weight": 1.0}, "`perceptual_weight` needs `feature_network`"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(sf.SciflowError, match=words):
        make_family(**options)


def test_what_does_not_fit_is_refused(batch, noise, args):
    family = make_family(1, 2)
    model = family.load_model(dtype=torch.float32, meta=True)
    sample = {name: value[0] for name, value in batch.items()}
    family.check_sample(model, sample)
    odd = {"pixel_values": torch.zeros(1, 15, 24), "conditioning_pixel_values": torch.zeros(2, 15, 24)}
    for changes, words in (
        ({"pixel_values": torch.zeros(2, 16, 24)}, "2 and 2 channels; this network was made for 1 and 2"),
        ({"conditioning_pixel_values": torch.zeros(2, 24, 16)}, "`conditioning_pixel_values`"),
        (odd, "multiple of 2"),
    ):
        with pytest.raises(sf.SciflowError, match=words):
            family.check_sample(model, sample | changes)
    with pytest.raises(sf.SciflowError, match="needs \\['conditioning_pixel_values'\\]"):
        family.check_sample(model, {"pixel_values": sample["pixel_values"]})
    for path in ("no.such:thing", "torch:float32", "nothing.pt"):
        broken = make_family(1, 2, perceptual_weight=1.0, feature_network=path)
        with pytest.raises(sf.SciflowError, match=f"`feature_network` '{path}'"):
            broken.compute_loss(Answer(noise), batch, args, noise=noise)
    with pytest.raises(sf.SciflowError, match="`prepare_microscopy`"):
        sf.MicroscopyUNet().load_model(dtype=torch.float32)
