"""Z-Image's step against diffusers' pipeline and scheduler, its text, and from figures to a LoRA in the stock pipeline.

What a family has in common with the others is tested for all of them: test_family_facts, test_draw, test_predict here,
adapters and exports in tests/adapters, negative prompts and preferences in tests/training.
"""

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from family_steps import edited
from parity import FEW, MANY, roundings
from trainings import LONGER, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import match_layers
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.z_image import ZImage
from sciflow_hf.training.prepare import build_cache_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIGMAS = torch.tensor([0.35, 0.8, 0.6])
PROMPTS = ["a line plot with two blue curves", "", "red bars"]  # three lengths, of which one is beyond 32 tokens
LONG = "a very long caption of a chart " * 9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of the smallest Z-Image pipeline; a token is 8x8 pixels. Read only."""
    return make_tiny(tmp_path_factory.mktemp("z_image") / "tiny", "z_image", size="test")


@pytest.fixture(scope="module")
def family(tiny):
    return ZImage(pretrained_model_name_or_path=str(tiny), max_sequence_length=64)


@pytest.fixture(scope="module")
def batch(family, pipeline):
    """Latents (3, 4, 12, 8) of non-square images, texts of three lengths, padded as a loader pads them, and a mask."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.rand(3, 3, 48, 32, generator=rng) * 2 - 1).latent_dist.mode()
    weights = torch.randint(0, 256, (3, 12, 8), generator=rng, dtype=torch.uint8)
    return {"latents": latents, "loss_mask": weights, **family.encode_prompts(PROMPTS, pipeline)}


@pytest.fixture(scope="module")
def noise(batch):
    return torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))


def reference_loss(model, pipeline, batch, noise, sigmas, change=None):
    """The step by the pipeline's own text, the scheduler's mixing and the loop's conventions; `change` spoils one.

    `ZImagePipeline.__call__`: images with an axis of frames and texts in lists, (1000 - t) / 1000, the answer negated;
    before `decode`, latents / scaling_factor + shift_factor.
    """

    def spoilt(name, value):
        return value if change is None or name not in change else change[name](value)

    config = pipeline.vae.config
    normalise = spoilt("normalise", lambda raw: (raw - config.shift_factor) * config.scaling_factor)
    latents = normalise(batch["latents"])
    scheduler = FlowMatchEulerDiscreteScheduler()  # 1000 unshifted levels: sigma = timestep / 1000
    timesteps = sigmas * 1000
    noisy = spoilt("mix", scheduler.scale_noise)(latents, timesteps, noise)
    with torch.no_grad():
        texts, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=64)
    answers = model(
        list(spoilt("images", noisy.unsqueeze(2)).unbind(0)),
        spoilt("timestep", (1000 - timesteps) / 1000),
        spoilt("texts", texts),
        return_dict=False,
    )[0]
    prediction = spoilt("answer", -torch.stack(answers)).squeeze(2)
    error = (spoilt("prediction", prediction) - spoilt("target", noise - latents)) ** 2
    weights = spoilt("weights", batch["loss_mask"][:, None].expand_as(error).float())
    return (error * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


@pytest.mark.promise("E17")
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise):
    assert batch["prompt_embeds_mask"].sum(1).tolist() == [51, 19, 27]
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, SIGMAS),
        model,
    )
    assert difference < FEW


def _padded(texts):
    rows = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return list(rows)


MISTAKES = {
    "sign of the answer": {"answer": torch.neg},
    "sign of the target": {"target": torch.neg},
    "timestep is sigma": {"timestep": lambda t: 1 - t},
    "timestep times 1000": {"timestep": lambda t: 1000 * t},
    "timestep in bfloat16": {"timestep": lambda t: t.bfloat16().float()},
    "normalisation left out": {"normalise": lambda _: lambda raw: raw},
    "scaled before shifted": {"normalise": lambda _: lambda raw: raw * 0.4 - 0.1},
    "data and noise swapped": {"mix": lambda mix: lambda latents, t, noise: mix(noise, t, latents)},
    "text of another sample": {"texts": lambda texts: texts[1:] + texts[:1]},
    "padding shown": {"texts": _padded},
    "last token cut": {"texts": lambda texts: [text[:-1] for text in texts]},
    "text reversed": {"texts": lambda texts: [text.flip(0) for text in texts]},
    "mask ignored": {"weights": torch.ones_like},
    "mask turned": {"weights": lambda weights: weights.flip(2)},
    "height and width swapped": {
        "images": lambda images: images.transpose(3, 4),
        "prediction": lambda answer: answer.transpose(2, 3),
    },
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, family, model, pipeline, batch, args, noise):
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, SIGMAS, MISTAKES[name]),
        model,
    )
    assert difference > MANY


def test_each_loss_is_that_of_its_sample_alone(family, model, batch, args, noise):
    def together():
        return family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0]

    def alone():
        losses = []
        for i, length in enumerate(batch["prompt_embeds_mask"].sum(1).tolist()):
            row = {name: batch[name][i : i + 1] for name in ("latents", "loss_mask")}
            row["prompt_embeds"] = batch["prompt_embeds"][i : i + 1, :length]
            losses.append(family.compute_loss(model, row, args, noise=noise[i : i + 1], levels=SIGMAS[i : i + 1])[0])
        return torch.cat(losses)

    assert roundings(together, alone, model) < FEW


def test_bfloat16_keeps_the_timestep_in_float32(family, batch, args, noise):
    model, seen = family.load_model(dtype=torch.bfloat16), {}
    model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    loss, levels = family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)
    assert torch.equal(seen["t"], 1 - SIGMAS) and seen["t"].dtype == loss.dtype == levels.dtype == torch.float32
    assert {x.dtype for x in (*seen["x"], *seen["cap_feats"])} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompts_equal_the_pipelines(tiny, family, dtype):
    stock = ZImagePipeline.from_pretrained(tiny, dtype=dtype)
    encoders = family.load_text_encoder(device="cpu", dtype=dtype)
    assert encoders.transformer is None and encoders.vae is None
    for prompts in ([PROMPTS[0]], [""], [LONG], [*PROMPTS, LONG]):
        ours = family.encode_prompts(prompts, encoders)
        with torch.no_grad():
            theirs, _ = stock.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=64)
        mask = ours.get("prompt_embeds_mask", torch.ones(ours["prompt_embeds"].shape[:2], dtype=torch.bool))
        assert ("prompt_embeds_mask" in ours) == (len({len(text) for text in theirs}) > 1)
        for row, kept, text in zip(ours["prompt_embeds"], mask, theirs, strict=True):
            assert torch.equal(row[kept], text) and not row[~kept].any() and kept[: len(text)].all()
    assert ours["prompt_embeds"].shape[1] == 64 and not ours["prompt_embeds"].requires_grad


def test_shift_is_the_schedulers(family, pipeline, tiny, tmp_path, args):
    keys = torch.arange(2000)
    plain = family.sample_levels(keys, dataclasses.replace(args, timestep_shift="none"), 4096).double()
    ours = family.sample_levels(keys, args, 4096).double()
    shift = pipeline.scheduler.config.shift
    torch.testing.assert_close(ours, shift * plain / (1 + (shift - 1) * plain), rtol=0, atol=1e-6)
    assert torch.equal(ours, family.sample_levels(keys, args, 256).double())
    path = edited(tiny, tmp_path, "scheduler/scheduler_config.json", use_dynamic_shifting=True)
    dynamic = ZImage(str(path))
    assert [dynamic.resolution_mu(length) for length in (256, 4096)] == pytest.approx([0.5, 1.15])


def test_presets_take_the_layers_they_say(family):
    model = family.load_model(dtype=torch.float32, meta=True)
    found = {name: match_layers(model, name, family.lora_presets) for name in family.lora_presets}
    blocks = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    attention = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert set(found["attention"]) == {f"{block}.{name}" for block in blocks[:2] for name in attention}
    assert set(found["standard"]) == {f"{block}.{name}" for block in blocks for name in attention}
    mlps = [f"feed_forward.w{number}" for number in (1, 2, 3)]
    assert set(found["full"]) == {f"{block}.{name}" for block in blocks for name in (*attention, *mlps)}


def test_turbo_is_warned_about_and_omni_refused(tiny, tmp_path, caplog):
    ZImage(str(tiny)).load_model(dtype=torch.float32, meta=True)
    assert not caplog.text
    turbo = edited(tiny, tmp_path / "Z-Image-Turbo", "model_index.json")
    ZImage(str(turbo)).load_model(dtype=torch.float32, meta=True)
    assert "is step-distilled" in caplog.text
    omni = edited(tiny, tmp_path, "transformer/config.json", siglip_feat_dim=8)
    with pytest.raises(SciflowError, match=r"`siglip_feat_dim`.*Z-Image-Omni"):
        ZImage(str(omni)).load_model(dtype=torch.float32)


def test_from_figures_to_the_stock_pipeline(tmp_path, tiny, pipeline, figures):
    """A cache whose rows hold their own tokens, a training that moves every weight, a LoRA that diffusers draws."""
    family = ZImage(str(tiny), max_sequence_length=160)
    build_cache_for(family, str(figures), str(tmp_path / "cache"), resolution=64, batch_size=4, dtype="fp32")
    train, held_out = sf.load_cache(tmp_path / "cache", dtype=torch.float32).split(0.3)
    sample = train[0]
    with torch.no_grad():
        [text], _ = pipeline.encode_prompt(
            [train.index["caption"][0]], do_classifier_free_guidance=False, max_sequence_length=160
        )
    assert len({len(train[i]["prompt_embeds"]) for i in range(len(train))}) > 3
    assert sample["prompt_embeds"].shape == text.shape and "latents_std" not in sample
    torch.testing.assert_close(sample["prompt_embeds"], text, rtol=0, atol=1e-4)
    trainer = make_trainer(tmp_path / "run", family, train, held_out, **LONGER)
    start = trained(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.95 * metrics["eval_base_loss"]
    assert not any(torch.equal(start[name], value) for name, value in trained(trainer).items())
    trainer.save_model()

    inputs = family.encode_validation_prompts(["a line plot"], device="cpu", dtype=torch.float32)[0]
    options = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
    ours = family.generate(
        family.load_pipeline(trainer.model.eval()), inputs, generator=torch.Generator().manual_seed(0), **options
    )[0]

    def stock(**more):
        rng = torch.Generator().manual_seed(0)
        return pipeline("a line plot", generator=rng, max_sequence_length=160, **options | more).images[0].tobytes()

    base = stock()
    pipeline.load_lora_weights(str(tmp_path / "run"))
    assert stock() == ours.tobytes() != base != stock(guidance_scale=0.0)
    pipeline.unload_lora_weights()
