"""DiT in the latents of a VAE: the cache with classes, training on it, the pipeline with its VAE."""

import numpy as np
import pytest
import torch
from class_folders import write_folder
from diffusers import AutoencoderKL
from PIL import Image

import sciflow_hf as sf
from sciflow_hf.cli import main
from sciflow_hf.data.batches.loader import BucketLoader, training_sampler
from sciflow_hf.images.class_source import ClassImageArguments
from sciflow_hf.images.classes import ClassLatents

pytestmark = pytest.mark.usefixtures("datasets_cache")
NETWORK = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """4 latent channels, 2 pixels a latent."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4, latent_channels=4, scaling_factor=0.3, shift_factor=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder


def arguments(folder, **options):
    return sf.DiffusionTrainingArguments(**(dict(
        output_dir=str(folder), use_cpu=True, report_to="none", max_steps=3, per_device_train_batch_size=4,
        learning_rate=1e-2, disable_tqdm=True, save_strategy="no", num_inference_steps=2,
    ) | options))  # fmt: skip


def prepare(tmp_path, vae, *, data=None, **options):
    family = sf.DiT(vae_name_or_path=str(vae), **NETWORK | options)
    args = arguments(tmp_path / "out")
    data = data or ClassImageArguments(input_dir=str(tmp_path / "data"), eval_fraction=0.3)
    return family, args, *sf.prepare_class_images(data, family, args)


@pytest.mark.promise("D18")
def test_cache_holds_the_vaes_latents_and_the_classes(tmp_path, vae):
    write_folder(tmp_path / "data", classes=("axon", "cell", "spine"), each=8, height=20, width=24)
    family, _, train, held_out = prepare(tmp_path, vae)
    assert len(train) + len(held_out) == 24 and held_out and isinstance(train, ClassLatents)
    assert (family.num_classes, family.class_names) == (3, ["axon", "cell", "spine"])
    encoder = AutoencoderKL.from_pretrained(vae).eval()
    row = 3
    sample = train[row]
    name = train.row_ids[row]
    assert sample["class_labels"] == ["axon", "cell", "spine"].index(name.split("/")[0])
    image = Image.open(tmp_path / "data" / name).convert("RGB").crop((2, 0, 22, 20)).resize((16, 16), Image.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = encoder.encode(pixels).latent_dist.mode()[0]
    assert sample["latents"].shape == (4, 8, 8)
    torch.testing.assert_close(sample["latents"].float(), expected, rtol=0.05, atol=0.05)


def test_a_dry_run_of_latents_encodes_nothing(tmp_path, vae, monkeypatch):
    write_folder(tmp_path / "data", each=4, height=20, width=24)
    family, _, built, _ = prepare(tmp_path, vae)

    def load_encoders(*_, **__):
        raise AssertionError("a dry run loads no encoder")

    monkeypatch.setattr(sf.DiT, "load_encoders", load_encoders)
    source = ClassImageArguments(input_dir=str(tmp_path / "data"), eval_fraction=0.3)
    args, found = arguments(tmp_path / "dry", dry_run=True), sf.DiT(vae_name_or_path=str(vae), **NETWORK)
    train, held_out = sf.prepare_class_images(source, found, args)
    assert not (tmp_path / "dry" / "cache").exists() and train.row_ids == built.row_ids and held_out
    assert torch.equal(train.class_labels, built.class_labels) and train.batch_keys == built.batch_keys
    networks = (one.load_model(dtype=torch.float32, meta=True) for one in (found, family))
    plans = [sf.plan(network, family, args, data) for network, data in zip(networks, (train, built), strict=True)]
    assert plans[0] == plans[1]


def test_latents_of_some_rows(tmp_path, vae):
    write_folder(tmp_path / "data", classes=("axon", "cell", "spine"), each=2, height=20, width=24)
    options = {"row_filter": ["label=0,2"], "eval_fraction": 0}
    source = ClassImageArguments(input_dir=str(tmp_path / "data"), **options)
    _, _, train, _ = prepare(tmp_path, vae, data=source)
    assert train.class_labels.tolist() == [0, 0, 2, 2] and train.row_filter == ("label=0,2",)
    stored = ClassImageArguments(dataset_dir=[str(tmp_path / "out" / "cache" / "train")], **options)
    stored.row_filter = ["label=2"]
    _, _, again, _ = prepare(tmp_path, vae, data=stored)
    assert again.class_labels.tolist() == [2, 2] and again.row_filter == ("label=2",)


@pytest.mark.promise("A07")
def test_latent_statistics(vae):
    family, latents = sf.DiT(vae_name_or_path=str(vae), **NETWORK), torch.randn(2, 4, 8, 8)
    mean, std = family.latent_statistics()
    assert mean.flatten().tolist() == pytest.approx([0.1] * 4) and std.shape == (1, 4, 1, 1)
    torch.testing.assert_close((latents - mean) / std, family.clean_latents({"latents": latents}))
    for pixels in (sf.DiT(**NETWORK), sf.MicroscopyUNet()):
        with pytest.raises(sf.SciflowError, match="images as they are: there are no latents"):
            pixels.latent_statistics()


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_have_the_classes_of_their_rows(tmp_path, vae, threads):
    write_folder(tmp_path / "data", each=8, height=16, width=16)
    _, args, train, _ = prepare(tmp_path, vae)
    seen = set()
    for batch in BucketLoader(train, training_sampler(train, args), threads=threads):
        assert torch.equal(batch["class_labels"], train.class_labels[batch["row"]])
        seen |= set(batch["row"].tolist())
    assert seen == set(range(len(train)))


@pytest.mark.promise("D18", "D24")
def test_training_and_the_pipeline_with_its_vae(tmp_path, vae):
    write_folder(tmp_path / "data", each=8, height=16, width=16)
    family, args, train, held_out = prepare(tmp_path, vae)
    model = family.load_model(dtype=torch.float32)
    assert (model.config.in_channels, model.config.image_size) == (4, 8)
    trainer = sf.DiffusionTrainer(model, args, family=family, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model()
    loaded = family.pipeline_class().from_pretrained(args.output_dir, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert loaded("cell", num_inference_steps=2).images[0].size == (16, 16)
    assert main(["sample", "--model_path", args.output_dir, "--output_dir", str(tmp_path / "drawn"), "--device", "cpu",
                 "--num_inference_steps", "2"]) == 0  # fmt: skip
    assert Image.open(tmp_path / "drawn" / "00000.png").size == (16, 16)


def test_cache_of_the_command_line(tmp_path, vae, capsys):
    write_folder(tmp_path / "data", each=8, height=16, width=16)
    flags = ["cache", "build", "--family", "dit", "--vae_name_or_path", vae, "--resolution", 16, "--device", "cpu"]
    flags += ["--input_dir", tmp_path / "data", "--output_dir", tmp_path / "cache", "--label_column", "label"]
    assert main([str(flag) for flag in flags]) == 0
    assert "16 samples in" in capsys.readouterr().out
    data = ClassImageArguments(dataset_dir=[str(tmp_path / "cache")], eval_fraction=0.2)
    family, _, train, held_out = prepare(tmp_path, vae, data=data)
    assert family.class_names == ["axon", "cell"] and len(train) + len(held_out) == 16
    with pytest.raises(sf.SciflowError, match=r"num_classes.*1.*label 1"):
        prepare(tmp_path, vae, data=data, num_classes=1)


def test_a_file_is_no_vae_by_itself():
    with pytest.raises(sf.SciflowError, match=r"`vae_name_or_path` 'ae\.safetensors': a file does not say how"):
        sf.DiT(vae_name_or_path="ae.safetensors").bucket_step()


def test_another_vae_is_refused(tmp_path, vae):
    write_folder(tmp_path / "data", each=8, height=16, width=16)
    family, args, train, _ = prepare(tmp_path, vae)
    other = sf.DiT(vae_name_or_path="stabilityai/sd-vae-ft-mse", num_classes=2, **NETWORK)
    other.__dict__["_vae_config"] = family._vae_config
    model = other.load_model(dtype=torch.float32)
    with pytest.raises(sf.SciflowError, match="vae_name_or_path"):
        sf.DiffusionTrainer(model, args, family=other, train_dataset=train)


def test_latents_without_their_vae(tmp_path):
    family = sf.DiT(**NETWORK)
    with pytest.raises(sf.SciflowError, match=r"dataset_dir.*--vae_name_or_path"):
        sf.prepare_class_images(ClassImageArguments(dataset_dir=["somewhere"]), family, arguments(tmp_path))
    with pytest.raises(sf.SciflowError, match=r"takes no cache of latents"):
        family.load_encoders(device="cpu", dtype=torch.float32)
    with pytest.raises(sf.SciflowError, match=r"image_size.*18.*multiple of 4.*2 pixels of a latent"):
        wrong = sf.DiT(vae_name_or_path="x", image_size=18)
        wrong.__dict__["_vae_config"] = {"block_out_channels": [8, 8], "latent_channels": 4}
        wrong.check_size(18)
