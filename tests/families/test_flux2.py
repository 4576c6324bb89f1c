"""FLUX.2 [dev] against diffusers' pipeline: the step with guidance and sources, text of Mistral, edits, a LoRA."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from family_steps import edited
from parity import FEW, MANY, roundings
from PIL import Image
from trainings import LONGER, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.export import export_adapter
from sciflow_hf.adapters.files import read_tensors
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.flux2 import Flux2
from sciflow_hf.training.prepare import build_cache_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTH = 56  # tokens, of which 44 are those of the system message and of the template
PROMPTS = ["a line plot", "", "Two red bars and one blue bar, with a legend at the top right. " * 2]
SIGMAS = torch.tensor([0.3, 0.85])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of the smallest FLUX.2 [dev] pipeline; a token is 8x8 pixels. Read only."""
    return make_tiny(tmp_path_factory.mktemp("flux2") / "tiny", "flux2", size="test")


@pytest.fixture(scope="module")
def family(tiny):
    return Flux2(pretrained_model_name_or_path=str(tiny), max_sequence_length=LENGTH)


@pytest.fixture(scope="module")
def batch(pipeline):
    """Two edits: non-square images (12 x 8 latents), sources of another size, the pipeline's own text."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents, sources = (
            pipeline.vae.encode(torch.rand(2, 3, *size, generator=rng) * 2 - 1).latent_dist.mode()
            for size in ((48, 32), (32, 64))
        )
        embeds, _ = pipeline.encode_prompt(PROMPTS[::2], max_sequence_length=LENGTH)
    return {"latents": latents, "source_latents": sources, "prompt_embeds": embeds}


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(5))


def reference_loss(model, pipeline, batch, noise, guidance, change=None):
    """The step by the pipeline's own helpers, with its loop's inputs; `change` spoils one of them."""
    bn = pipeline.vae.bn
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps)

    def normal(latents):
        return (pipeline._patchify_latents(latents) - bn.running_mean.view(1, -1, 1, 1)) / std

    latents, source = normal(batch["latents"]), normal(batch["source_latents"])
    sigma = SIGMAS.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    source_ids = pipeline._prepare_image_ids([source[:1]]).repeat(2, 1, 1)
    inputs = {
        "hidden_states": torch.cat([pipeline._pack_latents(noisy), pipeline._pack_latents(source)], dim=1),
        "timestep": SIGMAS * 1000 / 1000,
        "guidance": torch.full([1], guidance).expand(2),
        "encoder_hidden_states": batch["prompt_embeds"],
        "txt_ids": pipeline._prepare_text_ids(batch["prompt_embeds"]),
        "img_ids": torch.cat([pipeline._prepare_latent_ids(noisy), source_ids], dim=1),
    }
    for name, spoil in (change or {}).items():
        if name != "target":
            inputs[name] = spoil(inputs[name])
    target = pipeline._pack_latents(noise - latents)
    target = change["target"](target) if change and "target" in change else target
    prediction = model(**inputs, return_dict=False)[0][:, : target.shape[1]]
    return ((prediction - target) ** 2).flatten(1).mean(1)


@pytest.mark.promise("E17")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise, guidance):
    guided = dataclasses.replace(family, guidance_scale=guidance)
    difference = roundings(
        lambda: guided.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, guidance),
        model,
    )
    assert difference < FEW


MISTAKES = {
    "guidance left out": {"guidance": torch.zeros_like},
    "guidance of sampling": {"guidance": lambda g: 4 * g},
    "guidance times 1000": {"guidance": lambda g: 1000 * g},
    "timestep times 1000": {"timestep": lambda t: 1000 * t},
    "timestep in bfloat16": {"timestep": lambda t: t.bfloat16().float()},
    "text of the other sample": {"encoder_hidden_states": lambda e: e.flip(0)},
    "layers in another order": {"encoder_hidden_states": lambda e: e.roll(16, 2)},
    "ids of text left out": {"txt_ids": torch.zeros_like},
    "ids with height and width swapped": {"img_ids": lambda ids: ids[..., [0, 2, 1, 3]]},
    "source at the time of the image": {"img_ids": lambda ids: ids * torch.tensor([0, 1, 1, 1])},
    "source of the other sample": {"hidden_states": lambda h: torch.cat([h[:, :24], h[:, 24:].flip(0)], dim=1)},
    "sign of the velocity": {"target": torch.neg},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, family, model, pipeline, batch, args, noise):
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, 1.0, MISTAKES[name]),
        model,
    )
    assert difference > MANY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompts_equal_the_pipelines(tiny, tmp_path, dtype):
    """Of an encoder without the layers above 30 and its vision tower; the processor is never asked for."""
    stock = Flux2Pipeline.from_pretrained(tiny, dtype=dtype)
    path = edited(tiny, tmp_path, "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    family = Flux2(str(path), max_sequence_length=LENGTH)
    encoders = family.load_text_encoder(device="cpu", dtype=dtype)
    assert encoders.transformer is None and encoders.vae is None
    assert len(encoders.text_encoder.model.language_model.layers) == 30
    assert not any("vision" in name or "lm_head" in name for name, _ in encoders.text_encoder.named_parameters())
    for prompts in ([PROMPTS[0]], [""], [PROMPTS[2]], PROMPTS):
        with torch.no_grad():
            expected, ids = stock.encode_prompt(prompts, max_sequence_length=LENGTH)
        found = family.encode_prompts(prompts, encoders)
        assert torch.equal(found["prompt_embeds"], expected) and torch.equal(found["text_ids"], ids)
    assert expected.shape == (3, LENGTH, 48) and not torch.equal(expected[0], expected[1])
    lengths, kept = family.count_tokens(PROMPTS)
    mask = [stock.tokenizer.apply_chat_template(m, tokenize=True, return_dict=True)["attention_mask"]
            for m in _messages(stock)]  # fmt: skip
    assert lengths == [len(row) for row in mask] and lengths[1] == 44 and kept == LENGTH
    assert family.load_pipeline(with_text_encoder=True).tokenizer is not None


def _messages(pipeline):
    for prompt in PROMPTS:
        said = ("system", pipeline.system_message), ("user", prompt)
        yield [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]


def test_the_caches_of_klein_are_others(tiny, tiny_klein, family):
    """As are its pipelines, whose network is of the same class."""
    klein = sf.Flux2Klein(str(tiny_klein))
    ours, theirs = family.encoder_settings(), klein.encoder_settings()
    assert (ours["family"], ours["text_encoder_layers"]) == ("flux2", [10, 20, 30])
    assert theirs["text_encoder_layers"] == [9, 18, 27]
    with pytest.raises(SciflowError, match="holds a Flux2KleinPipeline, but `flux2` trains a Flux2Pipeline"):
        Flux2(str(tiny_klein)).load_model(dtype=torch.float32)
    with pytest.raises(SciflowError, match=r"`guidance_embeds`.*FLUX\.2 \[dev\].*`flux2`"):
        sf.Flux2Klein(str(tiny)).load_model(dtype=torch.float32)


def test_a_negative_prompt_is_refused(family):
    with pytest.raises(SciflowError, match="`flux2` has its guidance embedded"):
        family.check_negative_prompt(4.0)


def test_from_figures_to_the_stock_pipeline(tmp_path, family, pipeline, figures):
    """A cache, a training, and the LoRA in diffusers' pipeline: drawn from text and from a source."""
    build_cache_for(family, str(figures), str(tmp_path / "cache"), resolution=64, batch_size=4, dtype="fp32")
    train, held_out = sf.load_cache(tmp_path / "cache", dtype=torch.float32).split(0.3)
    trainer = make_trainer(tmp_path / "run", family, train, held_out, **LONGER)
    start = trained(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.95 * metrics["eval_base_loss"]
    assert not any(torch.equal(start[name], value) for name, value in trained(trainer).items())
    trainer.save_model()

    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 96, 3), dtype=np.uint8))
    inputs = family.encode_validation_prompts(["a line plot"], device="cpu", dtype=torch.float32)[0]
    assert list(inputs) == ["prompt_embeds"]
    options = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
    ours = family.load_pipeline(trainer.model.eval())
    plain, edit = (
        family.generate(ours, inputs, generator=torch.Generator().manual_seed(0), source_images=images, **options)[0]
        for images in ((), (source,))
    )

    def stock(**more):
        rng = torch.Generator().manual_seed(0)
        call = options | {"prompt": "a line plot", "max_sequence_length": LENGTH} | more
        return pipeline(generator=rng, **call).images[0].tobytes()

    base = stock()
    pipeline.load_lora_weights(str(tmp_path / "run"))
    assert stock() == plain.tobytes() != base and stock(image=[source]) == edit.tobytes() != plain.tobytes()
    assert stock(guidance_scale=1.0) != plain.tobytes()
    pipeline.unload_lora_weights()
    (tmp_path / "run" / "run_facts.json").write_text(json.dumps({"family": "flux2"}))
    done = export_adapter(str(tmp_path / "run"), tmp_path / "kohya.safetensors", file_format="kohya")
    assert read_tensors(done.file, "")[1]["modelspec.architecture"] == "Flux.2-dev/lora"
    assert "lora_unet_single_blocks_1_linear1.lora_up.weight" in read_tensors(done.file, "")[0]
