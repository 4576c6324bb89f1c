"""The Python of README, docs and mini_klein's card runs as it is printed, with small models for those that it names."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import encoder_settings, write_cache
from dits import make_network
from documents import DOCUMENTS, ROOT, read, relative
from PIL import Image
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.images.transforms import IntensityTransform
from sciflow_hf.pipelines.dit import DiTImagePipeline

CARD = ROOT / "sciflow_hf" / "assets" / "mini_klein" / "README.md"
RUN_ELSEWHERE = {"docs/add_a_family.md", "docs/own_data.md"}  # by test_own_family, test_own_data: files
SMALLER = {
    "black-forest-labs/FLUX.2-klein-base-9B": "klein", "hf://datasets/user/name": "cache", '"cuda"': '"cpu"',
    "=1024": "=32", "=50": "=1", "=24": "=1", "guidance_scale=3.5": "guidance_scale=3.5, num_inference_steps=1",
    "num_samples=16": "num_samples=2", "my_figures_cache": "klein_cache",
    "max_sequence_length=512": "max_sequence_length=12",
    "max_steps=200": "use_cpu=True, max_steps=2", "eval_steps=100": "eval_steps=1",
}  # fmt: skip
"""What is printed -> what is run."""


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.M | re.S)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path, tiny_cache: Path) -> Path:
    """A folder with what the blocks name: pipelines, a LoRA, a cache."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "klein").symlink_to(tiny_klein)
    (folder / "cache").symlink_to(tiny_cache)
    write_cache(folder / "klein_cache", settings=encoder_settings("klein"))
    family = sf.Flux2Klein(str(tiny_klein), max_sequence_length=12)
    trainer = make_trainer(folder / "my_lora", family, tiny_cache, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    DiTImagePipeline(make_network(num_classes=10, image_size=8)).save_pretrained(folder / "outputs" / "dit_digits")
    microscope = sf.MicroscopyUNet(block_out_channels=[8, 16], num_train_timesteps=100)
    microscope.tile_size = 16
    intensity = IntensityTransform("percentile", (0.0,), (1.0,)).to_dict()
    microscope.intensity = microscope.conditioning_intensity = intensity
    microscope.save_network(microscope.load_model(dtype=torch.float32), folder / "my_model")
    return folder


def run(page: Path, **given: Any) -> dict[str, Any]:
    """The names that the page's Python leaves, block after block."""
    names = dict(given)
    for code in blocks_of(page):
        for printed, smaller in SMALLER.items():
            code = code.replace(printed, smaller)
        exec(compile(code, relative(page), "exec"), names)
    return names


def draws(page: str, found: dict[str, Any]) -> None:
    """What is to be seen of a page's code when it has run."""
    if page == "docs/add_a_callback.md":
        lines = [json.loads(line) for line in Path("my_run", "gains.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and lines[1]["gain"] != 0
    if page in ("README.md", "docs/publishing.md", "docs/quickstart.md"):
        assert any("lora_A" in name for name, _ in found["pipeline"].transformer.named_parameters())
    if page == "docs/quickstart.md":
        assert found["image"].size == (32, 32)
    if page == "docs/caches.md":
        assert found["sample"].keys() == found["sf"].load_cache("cache")[0].keys()
        one, other = found["written"][0], found["inline"][0]
        assert one["latents"].shape == (128, 2, 4) and one["prompt_embeds"].shape == (12, 64)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert (
            verify_cache(found["cache"], progress=False).clean and verify_cache(found["inline"], progress=False).clean
        )
    if page == "docs/configuration.md":
        assert (found["adapter"].rank, found["adapter"].rank_pattern) == (16, {"ff": 32})
        assert found["run"]["options"]["learning_rate"] == 1e-2 and found["args"].learning_rate == 2e-4
    if page == "docs/preferences.md":
        grey = Image.new("RGB", (4, 4), (51, 51, 51))
        assert found["bright"](["a", "b"], [grey, Image.new("RGB", (4, 4))], colour=[None, None]) == [0.2, 0.0]
    if page == "docs/rewards.md":
        assert found["grey"]([""] * 2, [Image.new("RGB", (4, 4), colour) for colour in ("red", "grey")]) == [-1, 0]
        assert found["trainer"].state.global_step == 2
    if page == "docs/dit.md":
        assert len(found["images"]) == 2
    if page == "docs/evaluating.md":
        assert found["ink"](["", ""], [Image.new("RGB", (4, 4), colour) for colour in ("black", "white")]) == [1, 0]
    if page == "docs/microscopy.md":
        assert found["restored"].shape == found["spread"].shape == (1, 1, 16, 16)
        assert found["trainer"].family.intensity["low"] == [0]


DOCS = (
    "add_a_callback",
    "add_a_loss",
    "caches",
    "configuration",
    "dit",
    "evaluating",
    "microscopy",
    "preferences",
    "publishing",
    "quickstart",
    "rewards",
)
PAGES = ["README.md", *(f"docs/{name}.md" for name in DOCS), relative(CARD)]


def test_every_page_with_code_is_run() -> None:
    found = {relative(page) for page in [*DOCUMENTS, CARD] if blocks_of(page)}
    assert found == {*PAGES, *RUN_ELSEWHERE}


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page(page: str, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pixels = torch.arange(256.0).view(1, 16, 16)
    given = {
        "measured": np.random.default_rng(0).random((1, 1, 16, 16), dtype=np.float32),
        "my_pairs": [{"pixel_values": pixels.floor_divide(2), "conditioning_pixel_values": pixels}],
        "args": sf.DiffusionTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
    }
    draws(page, run(ROOT / page, **given))
