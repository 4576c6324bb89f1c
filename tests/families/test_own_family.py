"""The family of docs/add_a_family.md, from a folder outside the package: its step, and the way from cache to push."""

import dataclasses
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline
from family_steps import Spy, with_adapter
from hub_server import HubServer
from parity import FEW, MANY, roundings
from recipe_runs import command
from trainings import LONGER, make_trainer

import sciflow_hf as sf
from sciflow_hf.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
SOURCE = next(text for language, text in BLOCKS if language == "python" and "class MyFamily" in text)
LENGTH = 12
PROMPTS = ["a line plot", "", "Two red bars and one blue bar, with a legend at the top right. " * 4]

CHECK = """
import sys, torch
from diffusers import AuraFlowPipeline
pipeline = AuraFlowPipeline.from_pretrained(sys.argv[1])

def draw():
    return pipeline("a line plot", height=32, width=48, num_inference_steps=2, guidance_scale=1.0, output_type="pt",
                    max_sequence_length=12, generator=torch.Generator().manual_seed(0)).images

before = draw()
pipeline.load_lora_weights("user/my-figures-lora")
assert (before - draw()).abs().max() > 1e-3, "the LoRA changes nothing"
"""

# `python train_mine.py ...`, which puts the script's folder on the path.
RUN = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder outside the package, on `sys.path`: `my_family.py`, and the recipe that the page describes."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_family.py").write_text(SOURCE, encoding="utf-8")
    recipe = (ROOT / "recipes" / "train_flux2klein.py").read_text(encoding="utf-8")
    before, after = "    sf.run(main)\n", '    sf.run(lambda: main(sf.load_family("my_family.MyFamily")))\n'
    assert recipe.count(before) == 1 and after in PAGE
    (folder / "train_mine.py").write_text(recipe.replace(before, after), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
        sys.modules.pop("my_family", None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a tiny AuraFlow pipeline with random weights; a token is 8x8 pixels."""
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    from sciflow_hf.demo.tiny import quiet, redraw, t5_tokenizer
    from sciflow_hf.demo.tiny_sd3 import TIME_CHANNELS, vae

    tokenizer = t5_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    redraw(encoder, 0, "text_encoder", gains={"shared": 4.0, ".q.": 0.5, "relative_attention_bias": 1.0})
    network = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    redraw(network, 0, "transformer", gains={"norm": 0.5, "pos_embed.pos_embed": 10.0})
    with torch.no_grad():
        network.time_step_proj.linear_1.weight *= quiet(TIME_CHANNELS)
        network.proj_out.weight /= 2
    encoder_of_images = vae(0, (4, 8, 8))
    encoder_of_images.register_to_config(shift_factor=None)  # as the published one: the pipeline would not read it
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=encoder.eval(), vae=encoder_of_images, transformer=network.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip
    target = tmp_path_factory.mktemp("auraflow") / "tiny"
    pipeline.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def family(folder, tiny):
    return sf.load_family("my_family.MyFamily")(str(tiny), max_sequence_length=LENGTH)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return AuraFlowPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def model(family):
    return with_adapter(family)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True, weighting_scheme="none"
    )


@pytest.fixture(scope="module")
def batch():
    """Two images' latents, 12 x 8, with text and a mask; noise, and two places in the pipeline's schedule."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 256, (2, 12, 8), generator=rng, dtype=torch.uint8)
    latents, prompt_embeds = torch.randn(2, 4, 12, 8, generator=rng), torch.randn(2, LENGTH, 16, generator=rng)
    return {"latents": latents, "prompt_embeds": prompt_embeds, "loss_mask": mask}


@pytest.fixture(scope="module")
def noise(batch):
    return torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))


def of_pipeline(pipeline, model, batch, noise, places):
    """The losses of a step made of the pipeline's parts: its scheduler mixes, its loop's call of the network."""
    timesteps = pipeline.scheduler.timesteps[places]
    latents = batch["latents"] * pipeline.vae.config.scaling_factor
    noisy = pipeline.scheduler.scale_noise(latents, timesteps, noise)
    prediction = model(
        noisy, encoder_hidden_states=batch["prompt_embeds"], timestep=timesteps / 1000, return_dict=False
    )[0]
    error = (prediction - (noise - latents)) ** 2
    return torch.stack([(e * m).sum() / (4 * m.sum()) for e, m in zip(error, batch["loss_mask"].float(), strict=True)])


def difference(family, model, pipeline, batch, args, noise):
    """Between the family's losses and gradients and those of the pipeline's parts, in roundings."""
    places = torch.tensor([250, 800])
    levels = pipeline.scheduler.sigmas[places]
    return roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=levels)[0],
        lambda: of_pipeline(pipeline, model, batch, noise, places),
        model,
    )


def test_the_example_is_short():
    lines = [line for line in SOURCE.splitlines() if line.strip()]
    assert len(lines) <= 50 and max(map(len, lines)) <= 120


def test_loss_and_every_gradient_equal_the_pipelines(family, model, pipeline, batch, args, noise):
    assert difference(family, model, pipeline, batch, args, noise) < FEW


PROCESS = "from sciflow_hf.diffusion.process import NoiseProcess\n"
NAME = '    name = "my_family"\n'


def method(text):
    """A method, before the family's name."""
    return NAME, f"    def {text}\n\n{NAME}"


# Mistake in the page's file: what stands there, what stands there then.
MISTAKES = {
    "sign of the prediction": ("[0].float()", "[0].neg().float()"),
    "the noise as target": (NAME, f"    process = NoiseProcess(prediction_type='epsilon')\n\n{NAME}"),
    "scaling left out": method("normalise(self, latents): return latents"),
    "divided by the scale": method("normalise(self, latents): return latents / self.latents_scale"),
    "timestep times 1000": ("timestep=levels", "timestep=1000 * levels"),
    "timestep turned round": ("timestep=levels", "timestep=1 - levels"),
    "mask ignored": method("element_mask(self, mask, latents): return torch.ones_like(latents)"),
    "text of the other sample": ('batch["prompt_embeds"].to', 'batch["prompt_embeds"].flip(0).to'),
    "weight of another loss": method("compare(self, *step): return super().compare(*step) * step[1].levels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, tmp_path, monkeypatch, tiny, model, pipeline, batch, args, noise):
    right, wrong = MISTAKES[name]
    assert SOURCE.count(right) == 1
    source = SOURCE.replace(right, wrong).replace("import torch\n", f"import torch\n{PROCESS}", 1)
    (tmp_path / "broken_family.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_family", raising=False)
    broken = sf.load_family("broken_family.MyFamily")(str(tiny), max_sequence_length=LENGTH)
    assert difference(broken, model, pipeline, batch, args, noise) > MANY


def test_perfect_model_has_zero_loss(family, batch, args, noise):
    velocity = noise - batch["latents"] * family.latents_scale

    class Answer(Spy):
        def forward(self, hidden_states, *inputs, **options):
            return super().forward(hidden_states=hidden_states)

    for answer, is_perfect in ((velocity, True), (-velocity, False)):
        loss, _ = family.compute_loss(Answer(answer), batch, args, noise=noise, levels=torch.tensor([0.3, 0.9]))
        assert ((loss < 1e-6) if is_perfect else (loss > 0.05)).all() and loss.shape == (2,)


def test_shift_and_noise_follow_the_keys(family, model, batch, args):
    assert family.shift_mu(args, 24) == pytest.approx(math.log(1.73))
    one, two, other = (
        family.compute_loss(model, batch | {"noise_key": torch.tensor(keys)}, args)[0].detach()
        for keys in ([3, 4], [3, 4], [3, 5])
    )
    assert torch.equal(one, two) and other[1] != one[1]
    torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=0)


def test_encoded_prompts_equal_the_pipelines(family, pipeline):
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]], PROMPTS):
        with torch.no_grad():
            expected = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)[0]
        assert torch.equal(family.encode_prompts(prompts, encoders)["prompt_embeds"], expected)


# ---- the way that the page describes ----


@pytest.fixture(scope="module")
def cache(tmp_path_factory, folder, tiny, figures):
    """Built by the command of the page, with a smaller resolution."""
    target = tmp_path_factory.mktemp("own") / "cache"
    words = ["cache", "build", "--family", "my_family.MyFamily", "--pretrained_model_name_or_path", str(tiny)]
    assert " ".join(words[:4]) in PAGE
    words += ["--input_dir", str(figures), "--output_dir", str(target), "--resolution", "64", "--device", "cpu"]
    assert main([*words, "--max_sequence_length", str(LENGTH)]) == 0
    return target


@pytest.mark.promise("A30")
def test_ten_steps_lower_the_loss(tmp_path, family, cache):
    train, held_out = sf.load_cache(cache, dtype=torch.float32).split(0.3)
    assert train[0]["prompt_embeds"].shape == (LENGTH, 16)
    trainer = make_trainer(
        tmp_path, family, train, held_out,
        **LONGER | dict(max_steps=10, validation_prompts=["a line plot"], num_inference_steps=1),
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.85 * metrics["eval_base_loss"]
    assert sorted(path.name for path in (tmp_path / "validation").glob("step-*")) == ["step-000000", "step-000010"]


@pytest.mark.promise("A12", "B27", "C31")
def test_recipe_trains_validates_and_pushes(hub: HubServer, tmp_path, folder, tiny, cache):
    words = [
        *("--pretrained_model_name_or_path", tiny, "--dataset_dir", cache, "--eval_fraction", 0.3),
        *("--output_dir", tmp_path / "out", "--max_steps", 10, "--learning_rate", 1e-2, "--use_cpu", True),
        *("--validation_prompts", "A bar chart with four orange bars.", "--num_inference_steps", 1),
        *("--push_to_hub", "--hub_model_id", "my-figures-lora", "--max_sequence_length", LENGTH, "--report_to", "none"),
    ]
    printed = re.search(r"^python train_mine\.py (.*?[^\\])$", PAGE, re.M | re.S)[1]
    assert {word for word in shlex.split(printed) if word.startswith("--")} <= set(words)
    hub.run(RUN, tmp_path / "home", *command(*words, script=folder / "train_mine.py")[1:])
    files = hub.repos["user/my-figures-lora"].files
    assert {"README.md", "pytorch_lora_weights.safetensors", "validation/contact_sheet.png"} <= set(files)
    assert "validation/step-000010/p00_seed0.png" in files
    assert json.loads(files["run_facts.json"])
    hub.run(CHECK, tmp_path / "other", str(tiny))


def test_what_does_not_fit_is_refused(tmp_path, family, cache):
    model = family.load_model(dtype=torch.float32, meta=True)
    sample = dict(sf.load_cache(cache)[0])
    family.check_sample(model, sample)
    for name, value in (("latents", torch.zeros(16, 8, 8)), ("latents", torch.zeros(4, 8, 40)),
                        ("prompt_embeds", torch.zeros(12, 8))):  # fmt: skip
        with pytest.raises(sf.SciflowError, match=f"`{name}`"):
            family.check_sample(model, sample | {name: value})
    other = dataclasses.replace(family, max_sequence_length=8)
    with pytest.raises(sf.CacheError, match="`max_sequence_length`"):
        make_trainer(tmp_path, other, sf.load_cache(cache))
