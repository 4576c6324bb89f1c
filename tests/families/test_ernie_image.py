"""ERNIE-Image's step against diffusers' pipeline and scheduler, its text, and a LoRA in the stock pipeline.

What a family has in common with the others is tested for all of them, see test_z_image.py.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler
from family_steps import edited
from parity import FEW, MANY, roundings
from trainings import LONGER, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import match_layers
from sciflow_hf.demo import make_tiny
from sciflow_hf.engines.checkpointing import blocks_of
from sciflow_hf.engines.memory import MemoryOptions, estimate
from sciflow_hf.engines.offload import held_bytes
from sciflow_hf.engines.sharding import configure
from sciflow_hf.families.ernie_image import ErnieImage
from sciflow_hf.training.prepare import build_cache_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIGMAS = torch.tensor([0.353, 0.807, 0.601])
PROMPTS = ["a line plot with two blue curves", "", "red bars"]  # three lengths
LONG = "a very long caption of a chart " * 9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of the smallest ERNIE-Image pipeline; a token is 8x8 pixels. Read only."""
    return make_tiny(tmp_path_factory.mktemp("ernie") / "tiny", "ernie_image", size="test")


@pytest.fixture(scope="module")
def family(tiny):
    return ErnieImage(pretrained_model_name_or_path=str(tiny))


@pytest.fixture(scope="module")
def batch(family, pipeline):
    """Latents (3, 4, 12, 8) of non-square images, texts of three lengths, padded as a loader pads them, and a mask."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.rand(3, 3, 48, 32, generator=rng) * 2 - 1).latent_dist.mode()
    weights = torch.randint(0, 256, (3, 12, 8), generator=rng, dtype=torch.uint8)
    return {"latents": latents, "loss_mask": weights, **family.encode_prompts(PROMPTS, pipeline)}


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 16, 6, 4, generator=torch.Generator().manual_seed(5))


def reference_loss(model, pipeline, batch, noise, change=None):
    """The step by the pipeline's own text, padding and patches, the scheduler's mixing; `change` spoils one thing.

    `ErnieImagePipeline.__call__`: `latents * bn_std + bn_mean` before `decode`, eps 1e-5, the scheduler's timestep.
    """

    def spoilt(name, value):
        return value if change is None or name not in change else change[name](value)

    bn, patches = pipeline.vae.bn, spoilt("patchify", pipeline._patchify_latents)
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + spoilt("eps", 1e-5))
    latents = (patches(batch["latents"]) - spoilt("mean", bn.running_mean).view(1, -1, 1, 1)) / std
    timesteps = SIGMAS * 1000
    noisy = spoilt("mix", FlowMatchEulerDiscreteScheduler().scale_noise)(latents, timesteps, noise)
    texts = pipeline.encode_prompt(list(PROMPTS), "cpu")
    text_bth, text_lens = pipeline._pad_text(spoilt("texts", texts), "cpu", torch.float32, 16)
    prediction = model(
        hidden_states=spoilt("images", noisy),
        timestep=spoilt("timestep", timesteps),
        text_bth=text_bth,
        text_lens=spoilt("lengths", text_lens),
        return_dict=False,
    )[0]
    error = (spoilt("prediction", prediction) - spoilt("target", noise - latents)) ** 2
    weights = pipeline._patchify_latents(batch["loss_mask"][:, None].expand(-1, 4, -1, -1).float())
    weights = spoilt("weights", weights)
    return (error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


@pytest.mark.promise("E17")
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise):
    assert len(set(batch["prompt_embeds_mask"].sum(1).tolist())) == 3
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise),
        model,
    )
    assert difference < FEW


def _other_order(latents):
    return torch.nn.functional.pixel_unshuffle(latents, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


MISTAKES = {
    "sign of the velocity": {"target": torch.neg},
    "timestep is sigma": {"timestep": lambda t: t / 1000},
    "timestep reversed": {"timestep": lambda t: 1000 - t},
    "timestep in bfloat16": {"timestep": lambda t: t.bfloat16().float()},
    "data and noise swapped": {"mix": lambda mix: lambda latents, t, noise: mix(noise, t, latents)},
    "another eps": {"eps": lambda _: 1e-3},
    "mean left out": {"mean": torch.zeros_like},
    "patches in another order": {"patchify": lambda _: _other_order},
    "text of another sample": {"texts": lambda texts: texts[1:] + texts[:1]},
    "last token cut": {"texts": lambda texts: [text[:-1] if len(text) > 1 else text for text in texts]},
    "padding shown": {"lengths": lambda lengths: torch.full_like(lengths, int(lengths.max()))},
    "lengths of another sample": {"lengths": lambda lengths: lengths.roll(1)},
    "mask ignored": {"weights": torch.ones_like},
    "height and width swapped": {
        "images": lambda images: images.transpose(2, 3),
        "prediction": lambda answer: answer.transpose(2, 3),
    },
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, family, model, pipeline, batch, args, noise):
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, MISTAKES[name]),
        model,
    )
    assert difference > MANY


def test_each_loss_is_that_of_its_sample_alone(family, model, batch, args, noise):
    def alone():
        losses = []
        for i, length in enumerate(batch["prompt_embeds_mask"].sum(1).tolist()):
            row = {name: batch[name][i : i + 1] for name in ("latents", "loss_mask")}
            row["prompt_embeds"] = batch["prompt_embeds"][i : i + 1, :length]
            losses.append(family.compute_loss(model, row, args, noise=noise[i : i + 1], levels=SIGMAS[i : i + 1])[0])
        return torch.cat(losses)

    assert roundings(lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0], alone, model) < FEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompts_equal_the_pipelines(tiny, family, dtype):
    stock = ErnieImagePipeline.from_pretrained(tiny, dtype=dtype)
    encoders = family.load_text_encoder(device="cpu", dtype=dtype)
    assert encoders.transformer is encoders.vae is encoders.pe is encoders.pe_tokenizer is None
    assert not any("vision" in name for name, _ in encoders.text_encoder.named_parameters())
    for prompts in ([PROMPTS[0]], [""], [LONG], [*PROMPTS, LONG]):
        ours, theirs = family.encode_prompts(prompts, encoders), stock.encode_prompt(prompts, "cpu")
        mask = ours.get("prompt_embeds_mask", torch.ones(ours["prompt_embeds"].shape[:2], dtype=torch.bool))
        for row, kept, text in zip(ours["prompt_embeds"], mask, theirs, strict=True):
            assert torch.equal(row[kept], text) and not row[~kept].any() and kept[: len(text)].all()
    assert ours["prompt_embeds"].shape[1] == 90 and not ours["prompt_embeds"].requires_grad


def test_the_prompt_enhancer_is_never_loaded(tiny, tmp_path, args):
    """Not even where the checkpoint has one; the card's call says so."""
    enhancer = {"pe": ["transformers", "Ministral3ForCausalLM"], "pe_tokenizer": ["transformers", "T5TokenizerFast"]}
    family = ErnieImage(str(edited(tiny, tmp_path, "model_index.json", **enhancer)))
    assert family.load_pipeline(with_text_encoder=True).pe is None
    assert family.count_tokens(["a"])[1] == 90
    assert "use_pe=False" in family.call_arguments(args)


def test_shift_presets_and_turbo(family, pipeline, tiny, tmp_path, caplog):
    assert pipeline.vae.config.batch_norm_eps != 1e-5
    assert torch.equal(family.statistics[1].flatten(), torch.sqrt(pipeline.vae.bn.running_var + 1e-5))
    assert family.resolution_mu(1024) == family.resolution_mu(4096) == pytest.approx(1.0986, abs=1e-4)  # log 3
    model = family.load_model(dtype=torch.float32, meta=True)
    found = {name: match_layers(model, name, family.lora_presets) for name in family.lora_presets}
    attention = [f"self_attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    mlps = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2")]
    assert set(found["standard"]) == set(found["attention"]) == {f"layers.{i}.{n}" for i in range(2) for n in attention}
    assert set(found["full"]) == {f"layers.{i}.{name}" for i in range(2) for name in (*attention, *mlps)}
    assert "distilled" not in caplog.text
    turbo = edited(tiny, tmp_path / "ERNIE-Image-Turbo", "model_index.json")
    ErnieImage(str(turbo)).load_model(dtype=torch.float32, meta=True)
    assert "is step-distilled" in caplog.text and "Train baidu/ERNIE-Image" in caplog.text


def test_its_blocks_are_known(model, args):
    """To offloading, estimates and FSDP, though the network does not say what must not be split."""
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    configure(plugin, torch.float32, model)
    assert plugin.transformer_cls_names_to_wrap == ["ErnieImageSharedAdaLNBlock"]
    assert len(blocks_of(model)) == 2 and held_bytes(model)[0] > 0
    options = MemoryOptions.of(args)
    found = [estimate(model, model, args, tokens=n, image_tokens=n, options=options).activations for n in (10, 20)]
    assert found[1] == 2 * found[0] > 0


def test_from_figures_to_the_stock_pipeline(tmp_path, tiny, pipeline, figures):
    family = ErnieImage(str(tiny))
    build_cache_for(family, str(figures), str(tmp_path / "cache"), resolution=64, batch_size=4, dtype="fp32")
    train, held_out = sf.load_cache(tmp_path / "cache", dtype=torch.float32).split(0.3)
    [text] = pipeline.encode_prompt([train.index["caption"][0]], "cpu")
    torch.testing.assert_close(train[0]["prompt_embeds"], text, rtol=0, atol=1e-4)
    trainer = make_trainer(tmp_path / "run", family, train, held_out, **LONGER)
    start = trained(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.95 * metrics["eval_base_loss"]
    assert not any(torch.equal(start[name], value) for name, value in trained(trainer).items())
    trainer.save_model()

    inputs = family.encode_validation_prompts(["a line plot"], device="cpu", dtype=torch.float32)[0]
    options = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    ours = family.generate(
        family.load_pipeline(trainer.model.eval()), inputs, generator=torch.Generator().manual_seed(0), **options
    )[0]

    def stock(**more):
        rng = torch.Generator().manual_seed(0)
        return pipeline("a line plot", generator=rng, use_pe=False, **options | more).images[0].tobytes()

    base = stock()
    pipeline.load_lora_weights(str(tmp_path / "run"))
    assert stock() == ours.tobytes() != base != stock(guidance_scale=1.0)
    pipeline.unload_lora_weights()
