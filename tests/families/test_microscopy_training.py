"""The trainer on microscopy: resume, averaged weights, accumulation, ranks, metrics in the loop, stages, commands."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from recipe_runs import ROOT, logged_losses, run
from safetensors.torch import load_file
from trainings import losses

import sciflow_hf as sf
from sciflow_hf.cli import main
from sciflow_hf.images.files import ImageFile, write_image
from sciflow_hf.images.microscopes import load_microscopy_images
from sciflow_hf.images.optics import ForwardModel
from sciflow_hf.images.transforms import IntensityTransform
from sciflow_hf.training.callbacks.progressive import ProgressiveResolutionCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RECIPE = ROOT / "recipes" / "train_microscopy.py"
OPTICS = {"psf_sigma": 1.0, "photons": 200}


def blobs(height, width, seed):
    """Soft spots on a gradient, 16 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = 2000 + 20.0 * x
    for cy, cx, r in zip(rng.uniform(0, height, 25), rng.uniform(0, width, 25), rng.uniform(2, 5, 25), strict=True):
        image += 20000 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r**2))
    return image.clip(0, 60000).astype("uint16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four specimens of 48 x 64; tiles of 16: 12 an image."""
    root = tmp_path_factory.mktemp("blobs")
    for number in range(4):
        values = blobs(48, 64, number)
        write_image(ImageFile(root, values[None, None], "YX", values.shape), root / f"s{number}.tif")
    return root


def microscopy_trainer(out, folder, *, family_options=None, metrics=None, callbacks=(), **options):
    defaults = dict(
        output_dir=str(out), use_cpu=True, max_steps=8, save_strategy="no", logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=3e-3, seed=3, report_to="none",
        weighting_scheme="none",
    )  # fmt: skip
    args = sf.DiffusionTrainingArguments(**(defaults | options))
    family = sf.MicroscopyUNet(**({"block_out_channels": [8, 16]} | (family_options or {})))
    data = sf.MicroscopyDataArguments(input_dir=str(folder), tile_size=16, eval_specimens=["s3"], eval_fraction=0.0)
    train, held_out = sf.prepare_microscopy(data, ForwardModel(**OPTICS), family, args)
    model = family.load_model(dtype=torch.float32)
    measure = None if metrics is None else metrics.of(family, model, held_out)
    found = [callback(family) for callback in callbacks]
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=train, eval_dataset=held_out,
                               compute_metrics=measure, callbacks=found)  # fmt: skip


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, folder):
    """With accumulation, averaged weights, fresh photons, moved tiles, and stages of resolution."""
    options = dict(save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, ema_decay=0.9, max_steps=12,
                   callbacks=[lambda family: ProgressiveResolutionCallback(family, [2, 1])])  # fmt: skip
    whole = microscopy_trainer(tmp_path / "whole", folder, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = microscopy_trainer(tmp_path / "again", folder, resume_from_checkpoint="latest", **options)
    again.train()
    one, two = weights(whole), weights(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(again)[-8:] == losses(whole)[-8:] and whole.family.block == 1
    for name in ("unet/diffusion_pytorch_model.safetensors", "ema.safetensors"):
        files = [tmp_path / run / "checkpoint-12" / name for run in ("whole", "again")]
        left, right = (load_file(file) for file in files)
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# -- a data set of one's own ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(folder):
    """16 pairs of tiles in intensities, as a list of dicts."""
    data = sf.MicroscopyDataArguments(input_dir=str(folder), tile_size=16, eval_fraction=0.0, augment=False)
    tiles, _ = load_microscopy_images(data, ForwardModel(**OPTICS))
    pairs = [tiles.intensities(row, tiles.key_of(row)) for row in range(16)]
    return [
        {"pixel_values": sharp.to(torch.uint16), "conditioning_pixel_values": 2 * measured} for sharp, measured in pairs
    ]


def plain_trainer(out, family, samples, **options):
    defaults = dict(
        output_dir=str(out), use_cpu=True, max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1, seed=3,
        disable_tqdm=True, per_device_train_batch_size=2, learning_rate=3e-3, report_to="none", weighting_scheme="none",
    )  # fmt: skip
    args = sf.DiffusionTrainingArguments(**(defaults | options))
    model = family.load_model(dtype=torch.float32)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=samples, eval_dataset=samples[:2])


def small_unet():
    return sf.MicroscopyUNet(block_out_channels=[8, 16])


@pytest.mark.promise("C10")
def test_intensities_of_a_plain_data_set_are_found(tmp_path, plain):
    """Percentiles of all its pixels; trained as with images that were scaled before, and restored in intensities."""
    family, scaled = small_unet(), small_unet()
    with pytest.raises(sf.SciflowError, match=r"`family.describe_data\(dataset\)`"):
        family.load_model(dtype=torch.float32)
    family.describe_data(plain)
    for name, found in (
        ("pixel_values", family.intensity),
        ("conditioning_pixel_values", family.conditioning_intensity),
    ):
        pixels = np.stack([np.asarray(sample[name], np.float64) for sample in plain])
        assert (found["low"], found["high"]) == tuple([float(x)] for x in np.percentile(pixels, (0.1, 99.9)))
    assert family.tile_size == 16 and family.optics is None
    streamed = small_unet()
    streamed.describe_data(iter(plain))
    assert (streamed.intensity, streamed.conditioning_intensity) == (family.intensity, family.conditioning_intensity)

    scaled.intensity, scaled.conditioning_intensity, scaled.tile_size = (
        family.intensity, family.conditioning_intensity, 16,
    )  # fmt: skip
    transforms = {name: IntensityTransform.from_dict(found) for name, found in (
        ("pixel_values", family.intensity), ("conditioning_pixel_values", family.conditioning_intensity))}  # fmt: skip
    before = [{name: transforms[name](image) for name, image in sample.items()} for sample in plain]
    one, two = plain_trainer(tmp_path / "one", family, plain), plain_trainer(tmp_path / "two", scaled, before)
    one.train(), two.train()
    assert losses(one) == losses(two) and one.evaluate()["eval_loss"] == two.evaluate()["eval_loss"]
    config = json.loads((tmp_path / "one" / "checkpoint-4" / "model_index.json").read_text())
    assert config["intensity"] == family.intensity and config["tile_size"] == 16
    found = family.load_pipeline(one.model)(
        plain[0]["conditioning_pixel_values"][None], num_samples=2, num_inference_steps=2
    )
    assert 0 < found.mean.mean() < 60000 and found.mean.std() > 100


def test_a_resumed_run_keeps_the_intensities_it_had_found(tmp_path, plain):
    """Though its samples, drawn otherwise, would give others now."""
    whole, again = small_unet(), small_unet()
    whole.describe_data(plain)
    uninterrupted = plain_trainer(tmp_path / "whole", whole, plain)
    uninterrupted.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again.describe_data(plain[:5], percentiles=(1, 99))
    assert again.intensity != whole.intensity
    resumed = plain_trainer(tmp_path / "again", again, plain, resume_from_checkpoint="latest")
    resumed.train()
    assert again.intensity == whole.intensity and again.conditioning_intensity == whole.conditioning_intensity
    one, two = weights(uninterrupted), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = small_unet()
    other.describe_data(plain, kind="log")
    with pytest.raises(sf.SciflowError, match=r"network.intensity: .*'percentile'.* then, .*'log'.* now"):
        plain_trainer(tmp_path / "again", other, plain, resume_from_checkpoint="latest").train()


def test_training_from_a_pipeline_keeps_its_intensities(tmp_path, plain):
    family = small_unet()
    family.describe_data(plain)
    family.save_network(family.load_model(dtype=torch.float32), tmp_path / "model")
    again = sf.MicroscopyUNet(pretrained_model_name_or_path=str(tmp_path / "model"))
    again.describe_data(plain[:3])
    assert again.intensity == family.intensity and again.holds_intensities
    tiles = sf.MicroscopyUNet()
    subset = torch.utils.data.Subset(SimpleNamespace(transform=IntensityTransform("log", (0.0,), (9.0,)),
        conditioning_transform=IntensityTransform("log", (0.0,), (8.0,)), optics=None, tile_size=32), [0])  # fmt: skip
    tiles.describe_data(subset)
    assert tiles.intensity["high"] == [9.0] and tiles.tile_size == 32 and not tiles.holds_intensities


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sample: {"pixel_values": sample["pixel_values"]}, "sample 0 has no `conditioning_pixel_values`"),
        (lambda sample: sample | {"pixel_values": torch.zeros(16, 16)}, r"`pixel_values` \(16, 16\): \(C, H, W\)"),
        (lambda sample: sample | {"pixel_values": torch.full((1, 16, 16), torch.nan)}, "sample 0 has NaN or infinity"),
        (lambda sample: sample | {"pixel_values": torch.ones(1, 16, 16)}, "lead to the same intensity"),
    ],
)
def test_samples_that_cannot_be_fitted(plain, change, words):
    with pytest.raises(sf.SciflowError, match=words):
        small_unet().describe_data([change(sample) for sample in plain])
    with pytest.raises(sf.SciflowError, match="the data set is empty"):
        small_unet().describe_data([])
    with pytest.raises(sf.SciflowError, match=r"sample 1 has `pixel_values` \(2, 16, 16\): \(1, H, W\) as in"):
        small_unet().describe_data([plain[0], plain[1] | {"pixel_values": torch.ones(2, 16, 16)}])


def test_every_checkpoint_is_a_pipeline_and_the_last_has_the_average(tmp_path, folder):
    trainer = microscopy_trainer(tmp_path, folder, ema_decay=0.5, save_strategy="steps", save_steps=8)
    start = weights(trainer)
    trainer.train()
    assert sum(not torch.equal(start[name], value) for name, value in weights(trainer).items()) > 0.9 * len(start)
    trainer.save_model()
    trained, averaged = (sf.MicroscopyUNet(pretrained_model_name_or_path=str(path)).load_pipeline()
                         for path in (tmp_path / "checkpoint-8", tmp_path))  # fmt: skip
    now = weights(trainer)
    assert all(torch.equal(now[name], value) for name, value in trained.unet.state_dict().items())
    with trainer.averaged_weights():
        mean = weights(trainer)
    assert all(torch.equal(mean[name], value) for name, value in averaged.unet.state_dict().items())
    assert any(not torch.equal(mean[name], now[name]) for name in now)


def test_micro_batches_do_not_change_the_run(tmp_path, folder):
    """4 x 1, 2 x 2 and 1 x 4: the same losses and weights, by SGD, an epoch of 36 tiles without tail."""
    runs = {}
    for size in (4, 2, 1):
        trainer = microscopy_trainer(
            tmp_path / str(size), folder, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            optim="sgd", max_steps=9, stratified_levels=True,
        )  # fmt: skip
        trainer.train()
        runs[size] = losses(trainer), weights(trainer)
    for size in (2, 1):
        np.testing.assert_allclose(runs[size][0], runs[4][0], rtol=1e-4)
        for name, value in runs[4][1].items():
            torch.testing.assert_close(runs[size][1][name], value, rtol=0, atol=1e-5)


def test_two_ranks_equal_one(tmp_path, folder):
    flags = dict(input_dir=folder, tile_size=16, eval_fraction=0, max_steps=6, logging_steps=1, save_steps=6,
                 use_cpu=True, report_to="none", seed=3, disable_tqdm=True, learning_rate=1e-3, optim="sgd",
                 weighting_scheme="none", progressive_resolutions="2 1", psf_sigma=1.0)  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    words += ["--block_out_channels", "8", "16"]
    for name, ranks in (("one", 1), ("two", 2)):
        size = ("--per_device_train_batch_size", 4 // ranks, "--output_dir", tmp_path / name)
        run(*words, *size, ranks=ranks, script=RECIPE)
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-5)
    one, two = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


@pytest.mark.promise("C14", "C30")
def test_training_lowers_the_loss_and_restorations_are_scored_in_the_log(tmp_path, folder):
    metrics = sf.RestorationMetrics(metric_tiles=3, metric_samples=2, metric_steps=4)
    trainer = microscopy_trainer(tmp_path, folder, metrics=metrics, max_steps=60, eval_strategy="steps", eval_steps=20,
                           ema_decay=0.8, logging_steps=20)  # fmt: skip
    trainer.train()
    first, last = ({k: v for k, v in entry.items() if k.startswith("eval_")} for entry in
                   [e for e in trainer.state.log_history if "eval_loss" in e][:: 2])  # fmt: skip
    assert last["eval_loss"] < 0.95 * first["eval_loss"] and "eval_base_loss" not in last
    assert last["eval_psnr"] > first["eval_psnr"] and last["eval_psnr"] > last["eval_sample_psnr"]
    wanted = {"eval_ssim", "eval_power_spectrum_error", "eval_histogram_distance", "eval_calibration_ratio"}
    assert wanted <= last.keys()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| psnr |" in card and "pipeline(images, num_samples=16)" in card and "image-to-image" in card
    assert sf.RestorationMetrics(metric_tiles=0).of(None, None, None) is None
    with pytest.raises(sf.SciflowError, match="`metric_samples` 1"):
        sf.RestorationMetrics(metric_samples=1)


@pytest.mark.promise("C05", "C17")
def test_stages_are_a_function_of_the_step(tmp_path, folder):
    family = sf.MicroscopyUNet(block_out_channels=[8, 16])
    callback = ProgressiveResolutionCallback(family, [4, 2, 1], [1, 1, 2])
    assert [callback.block_at(step, 8) for step in range(10)] == [4, 4, 2, 2, 1, 1, 1, 1, 1, 1]
    seen = []

    class Note(ProgressiveResolutionCallback):
        def on_step_begin(self, *args, **kwargs):
            super().on_step_begin(*args, **kwargs)
            seen.append(self.family.block)

    trainer = microscopy_trainer(tmp_path, folder, callbacks=[lambda f: Note(f, [4, 2, 1])], max_steps=6)
    trainer.train()
    assert seen == [4, 4, 2, 2, 1, 1] and trainer.family.block == 1
    wrong = [({"progressive_resolutions": [1, 2]}, "`progressive_resolutions` \\[1, 2\\]")]
    wrong += [({"progressive_resolutions": [2]}, "fall to 1")]
    wrong += [({"progressive_resolutions": [2, 1], "progressive_shares": [1.0]}, "2 numbers")]
    for options, words in wrong:
        with pytest.raises(sf.SciflowError, match=words):
            sf.ProgressiveResolution(**options)
    with pytest.raises(sf.SciflowError, match=r"tiles of 24 pixels become 1\.5"):
        sf.ProgressiveResolution(progressive_resolutions=[16, 1]).callbacks(family, tile_size=24)
    assert sf.ProgressiveResolution().callbacks(family, tile_size=16) == []


# -- commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("trained")
    trainer = microscopy_trainer(out, folder, max_steps=3)
    trainer.train()
    trainer.save_model()
    return out


def test_the_command_restores_a_folder(tmp_path, trained, folder, capsys):
    words = [
        "sample",
        "--model_path",
        trained,
        "--input_dir",
        folder,
        "--output_dir",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    words += ["--num_samples", 2, "--num_inference_steps", 3, "--save_std", "--tile_size", 32]
    assert main([str(word) for word in words]) == 0
    assert "8 images in" in capsys.readouterr().out
    found = tifffile.imread(tmp_path / "out" / "s0.tif")
    assert found.dtype == np.uint16 and found.shape == (48, 64)
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:2] == ["s0.tif", "s0_std.tif"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`input_dir` is missing"),
        (["--input_dir", "none"], "`input_dir` 'none': there is no such folder"),
        (["--input_dir", "{folder}", "--prompts", "a"], "`prompts` does not go with"),
        (["--input_dir", "{folder}", "--num_samples", "0"], "`num_samples` 0"),
        (["--input_dir", "{folder}", "--sampler", "heun"], "`sampler` 'heun'"),
        (["--input_dir", "{folder}", "--tile_size", "32", "--tile_overlap", "30"], "`tile_overlap` 30"),
    ],
)
def test_mistakes_at_the_command_end_in_one_line(tmp_path, trained, folder, capsys, words, message):
    given = [word.format(folder=folder) for word in words]
    code = main(
        ["sample", "--model_path", str(trained), "--output_dir", str(tmp_path / "o"), "--device", "cpu", *given]
    )
    assert code == 2 and message in capsys.readouterr().err


def test_the_demo_runs_from_one_command(tmp_path):
    """A twin of the demo: its images, a smaller network, a few steps."""
    config = ROOT / "recipes" / "configs" / "microscopy_demo.yaml"
    words = ["--config", config, "--output_dir", tmp_path / "out", "--block_out_channels", 8, 16]
    words += ["--max_steps", 2, "--eval_steps", 2, "--save_steps", 2, "--warmup_steps", 0, "--metric_tiles", 2]
    words += ["--metric_samples", 2, "--metric_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 2]
    words += ["--eval_levels", 1, "--bf16", "false"]  # bf16 is slow where the processor has none
    run(*words, script=RECIPE)
    facts = json.loads((tmp_path / "out" / "run_facts.json").read_text(encoding="utf-8"))
    assert facts["family"] == "microscopy_unet" and (tmp_path / "out" / "model_index.json").is_file()
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert {"eval_psnr", "eval_ssim"} <= {key for entry in state["log_history"] for key in entry}


def test_plan_and_debug_batch(tmp_path, folder):
    trainer = microscopy_trainer(tmp_path, folder)
    family, train, held_out = trainer.family, trainer.train_dataset, trainer.eval_dataset
    plan = sf.plan(family.load_model(dtype=torch.float32, meta=True), family, trainer.args, train, held_out)
    assert "the complete network" in plan and "16 x 16" in plan and "36 samples to train on, 12 held out" in plan
    assert "conditioning_pixel_values: (4, 1, 16, 16)" in sf.debug_batch(trainer)


@pytest.mark.promise("C21", "C22", "C23")
@pytest.mark.parametrize("preset", ["microscopy_2p", "microscopy_fast_inference", "microscopy_high_quality"])
def test_presets_take_overrides_from_flags_and_json(tmp_path, preset):
    kinds = (sf.MicroscopyUNet, sf.MicroscopyDataArguments, sf.ForwardModel, sf.ProgressiveResolution,
             sf.RestorationMetrics, sf.DiffusionTrainingArguments)  # fmt: skip
    file = ROOT / "recipes" / "configs" / f"{preset}.yaml"
    words = ["--input_dir", "x", "--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", "none"]
    family, data, optics, stages, metrics, args = sf.parse_args(*kinds, argv=["--config", str(file), *words])
    assert optics.psf_exponent == 2 and data.tile_size % family.bucket_step() == 0 and args.ema_decay == 0.9999
    stages.callbacks(family, tile_size=data.tile_size)
    options = {"base": str(file), "tile_size": 512, "metric_steps": 7}
    (tmp_path / "mine.json").write_text(json.dumps(options), encoding="utf-8")
    words += ["--photons", "12"]
    _, data, optics, _, metrics, _ = sf.parse_args(*kinds, argv=["--config", str(tmp_path / "mine.json"), *words])
    assert (data.tile_size, metrics.metric_steps, optics.photons, optics.wavelength) == (512, 7, 12, 920)
