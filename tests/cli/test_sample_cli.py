"""`sciflow-hf sample`: classes by a saved DiT, prompts by a pipeline with or without a LoRA, and what is refused."""

import json

import numpy as np
import pytest
import torch
from dits import make_network
from PIL import Image

import sciflow_hf as sf
from sciflow_hf.adapters.files import save_adapter
from sciflow_hf.cli import main
from sciflow_hf.pipelines.dit import DiTImagePipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    names = {str(i): name for i, name in enumerate(["cell", "nucleus", "axon", "spine", "glia"])}
    DiTImagePipeline(make_network(id2label=names)).save_pretrained(folder)
    return folder


def sample(*flags):
    return main(["sample", "--device", "cpu", *map(str, flags)])


def images(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_classes_in_turn_whatever_the_batch(saved, tmp_path, capsys):
    flags = ["--model_path", saved, "--num_images", 5, "--seed", 7, "--class_labels", "axon", 0]
    flags += ["--guidance_scale", 2, "--num_inference_steps", 3]
    assert sample(*flags, "--output_dir", tmp_path / "a") == 0
    assert "5 images in" in capsys.readouterr().out
    found = rows(tmp_path / "a")
    assert [row["label"] for row in found] == [2, 0, 2, 0, 2] and found[0]["class"] == "axon"
    assert [row["file_name"] for row in found] == [f"{i:05d}.png" for i in range(5)]
    sample(*flags, "--batch_size", 2, "--output_dir", tmp_path / "b")
    one, two = images(tmp_path / "a"), images(tmp_path / "b")
    assert all(np.abs(one[name].astype(int) - two[name]).max() <= 1 for name in one) and len(one) == 5
    assert not np.array_equal(one["00000.png"], one["00002.png"])
    sample(*flags[:-4], "--num_inference_steps", 3, "--output_dir", tmp_path / "c")  # no guidance
    assert not np.array_equal(images(tmp_path / "c")["00000.png"], one["00000.png"])


def test_it_draws_what_the_pipeline_draws(saved, tmp_path):
    """With the code of this package: the folder's own, which a repository could have changed, is not run."""
    (saved / "pipeline.py").write_text("raise RuntimeError('this code must not run')\n")
    sample("--model_path", saved, "--output_dir", tmp_path, "--class_labels", 3, "--num_inference_steps", 2)
    from sciflow_hf.diffusion.randomness import hash64

    pipeline = sf.DiT(pretrained_model_name_or_path=str(saved)).load_pipeline()
    generator = torch.Generator().manual_seed(hash64(0, "sample", 0) & 0xFFFFFFFF)
    expected = pipeline(3, num_inference_steps=2, generator=generator).images[0]
    np.testing.assert_array_equal(images(tmp_path)["00000.png"], np.asarray(expected))
    assert Image.open(tmp_path / "00000.png").info["class"] == "spine"


def test_grey_images_stay_grey(tmp_path):
    DiTImagePipeline(make_network(in_channels=1)).save_pretrained(tmp_path / "saved")
    sample("--model_path", tmp_path / "saved", "--output_dir", tmp_path, "--num_inference_steps", 1)
    assert images(tmp_path)["00000.png"].shape == (4, 10)


def test_all_classes_by_default(saved, tmp_path):
    sample("--model_path", saved, "--output_dir", tmp_path, "--num_images", 6, "--num_inference_steps", 1)
    assert [row["label"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 0]


def test_a_pipeline_of_prompts(tiny_klein, tmp_path):
    flags = ["--model_path", tiny_klein, "--height", 32, "--width", 48, "--num_inference_steps", 1, "--num_images", 3]
    assert sample(*flags, "--prompts", "a plot", "a chart", "--output_dir", tmp_path) == 0
    assert [row["prompt"] for row in rows(tmp_path)] == ["a plot", "a chart", "a plot"]
    assert {image.shape for image in images(tmp_path).values()} == {(32, 48, 3)}


def test_a_trained_lora_of_a_run(tiny_klein, tmp_path):
    """The run says which family and size; the base has to be named where it was a folder. The LoRA counts."""
    family = sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein))
    model = family.load_model(dtype=torch.float32)
    model = sf.add_adapter(model, sf.AdapterArguments(rank=4), family=family)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    run = tmp_path / "run"
    save_adapter(model, run, family=family)
    facts = {"family": "flux2_klein", "base_model": tiny_klein.name, "dataset": {"buckets": {"16x16": 2, "24x32": 9}}}
    (run / "run_facts.json").write_text(json.dumps(facts))
    flags = ["--base_model", tiny_klein, "--prompts", "a plot", "--num_inference_steps", 1]
    assert sample("--model_path", run, *flags, "--output_dir", tmp_path / "lora") == 0
    assert (
        sample("--model_path", tiny_klein, *flags[2:], "--height", 24, "--width", 32, "--output_dir", tmp_path / "base")
        == 0
    )
    one, two = images(tmp_path / "lora")["00000.png"], images(tmp_path / "base")["00000.png"]
    assert one.shape == two.shape == (24, 32, 3) and not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--num_images", 0], "`num_images` 0: at least 1"),
        (["--class_labels", "dog"], "`class_labels` 'dog': use a number from 0 to 4, or a name: cell, nucleus"),
        (["--class_labels", 5], "'5': use a number from 0 to 4"),
        (["--prompts", "a plot"], "`prompts`: this network takes classes"),
        (["--sampler", "ddim"], "`sampler` 'ddim': use one of euler, heun"),
        (["--height", 5], "multiples of 2"),
        (["--device", "cuda:9"], "`device`"),
    ],
)
def test_mistakes_of_classes(saved, tmp_path, capsys, flags, match):
    assert sample("--model_path", saved, "--output_dir", tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert match in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([], "`prompts` is missing"),
        (["--class_labels", 1, "--prompts", "x"], "`class_labels` is for networks of classes"),
        (["--prompts", "x", "--height", 33], "multiples of 8 for `flux2_klein`"),
    ],
)
def test_mistakes_of_prompts(tiny_klein, tmp_path, capsys, flags, match):
    assert sample("--model_path", tiny_klein, "--output_dir", tmp_path, *flags) == 2
    assert match in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    assert sample("--model_path", tmp_path / "no", "--output_dir", tmp_path, "--prompts", "x") == 2
    assert "does not say what it belongs to. Name `--family` and `--base_model`" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_not_a_missing_file(tmp_path, capsys, monkeypatch):
    """diffusers says that there is no model_index.json, and the model was blamed."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def load_config(*args, **kwargs):
        try:
            raise LocalEntryNotFoundError("not in the cache") from ConnectionError("Connection refused")
        except LocalEntryNotFoundError as error:
            raise OSError("user/lora does not appear to have a file named model_index.json.") from error

    monkeypatch.setattr("diffusers.ConfigMixin.load_config", load_config)
    assert sample("--model_path", "user/lora", "--output_dir", tmp_path, "--prompts", "a") == 2
    words = "the Hub cannot be reached (Connection refused). Check the network, `HF_ENDPOINT`"
    assert f"`model_path` 'user/lora' is not on this machine, and {words}" in capsys.readouterr().err
    with pytest.raises(sf.SciflowError) as caught:
        sf.Flux2Klein(pretrained_model_name_or_path="user/model").load_model(dtype=torch.float32)
    assert words in str(caught.value) and "diffusers layout" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_scale", "nan"), ("guidance_scale", "inf"), ("guidance_scale", -1), ("width", 0), ("num_images", -2)],
)
def test_numbers_out_of_their_range_are_named(saved, tmp_path, capsys, name, value):
    """Infinite guidance drew images of NaN, a width of 0 was the default's."""
    assert sample("--model_path", saved, "--output_dir", tmp_path, f"--{name}", value) == 2
    assert f"error: `{name}` {value}" in capsys.readouterr().err
