"""FLUX.2 klein's step against diffusers' own pipeline helpers, and against closed forms."""

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from parity import FEW, MANY, roundings

from sciflow_hf.adapters.adapter import add_adapter
from sciflow_hf.adapters.arguments import AdapterArguments
from sciflow_hf.data.batches.loader import collate
from sciflow_hf.diffusion.process import NoiseProcess
from sciflow_hf.diffusion.randomness import noise_keys, randn
from sciflow_hf.errors import SciflowError
from sciflow_hf.families import base, flux2_klein, load_family
from sciflow_hf.families.flux2_klein import Flux2Klein
from sciflow_hf.families.tokens import patchify, position_ids
from sciflow_hf.training.arguments import DiffusionTrainingArguments

SIGMAS = torch.tensor([0.35, 0.8])


@pytest.fixture(scope="module")
def pipeline(tiny_klein):
    return Flux2KleinPipeline.from_pretrained(tiny_klein)


@pytest.fixture(scope="module")
def family(tiny_klein):
    return Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=24)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return DiffusionTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True, weighting_scheme="none"
    )


@pytest.fixture(scope="module")
def batch(pipeline):
    """Two non-square images' latents, and text embeddings of the pipeline's own encoder."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(2, 3, 48, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixel_values).latent_dist.mode()
        prompt_embeds, _ = pipeline.encode_prompt(["a line plot", "two red bars"], max_sequence_length=24)
    return {"latents": latents, "prompt_embeds": prompt_embeds}


@pytest.fixture
def model(family):
    model = family.load_model(dtype=torch.float32)
    add_adapter(model, AdapterArguments(rank=4, lora_alpha=8), family=family, seed=1)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # B starts at zero, which would hide errors in A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def noise(batch):
    latents = Flux2KleinPipeline._patchify_latents(batch["latents"])
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))


def reference_loss(model, pipeline, batch, noise, sigmas):
    """The step written with the pipeline's helpers and the scheduler's own mixing, per sample."""
    vae = pipeline.vae
    latents = pipeline._patchify_latents(batch["latents"])
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    latents = (latents - mean) / std
    scheduler = FlowMatchEulerDiscreteScheduler()  # 1000 unshifted levels: sigma = timestep / 1000
    noisy = scheduler.scale_noise(latents, sigmas * 1000, noise)
    prediction = model(
        hidden_states=pipeline._pack_latents(noisy),
        timestep=sigmas * 1000 / 1000,
        guidance=None,
        encoder_hidden_states=batch["prompt_embeds"],
        txt_ids=pipeline._prepare_text_ids(batch["prompt_embeds"]),
        img_ids=pipeline._prepare_latent_ids(latents),
        return_dict=False,
    )[0]
    target = pipeline._pack_latents(noise - latents)
    return torch.stack([torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)])


def differs(family, model, pipeline, batch, args, noise) -> float:
    """Largest difference of loss and gradients to the reference, in roundings."""
    return roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, SIGMAS),
        model,
    )


@pytest.mark.promise("A26")
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise):
    assert differs(family, model, pipeline, batch, args, noise) < FEW
    assert len([p for p in model.parameters() if p.grad is not None]) > 20


def _swapped_ids(*sizes, **options):
    return position_ids(*sizes, **options)[:, [0, 2, 1, 3]]


def _zero_text_ids(*sizes, **options):
    return position_ids(*sizes, **options) * (sizes[2] == 1)


def _wrong_patchify(latents):
    b, c, h, w = latents.shape
    latents = latents.view(b, c, h // 2, 2, w // 2, 2)
    return latents.permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)  # (ph, pw, c)


def _eps_outside(self, latents):
    mean, std = self.statistics
    return (latents - mean) / ((std**2 - 1e-4).sqrt() + 0.05)


MISTAKES = {
    "ids swapped": (flux2_klein, "position_ids", _swapped_ids),
    "patchify in another channel order": (base, "patchify", _wrong_patchify),
    "text ids all zero": (flux2_klein, "position_ids", _zero_text_ids),
    "packed by columns": (Flux2Klein, "pack", lambda self, x: x.transpose(2, 3).flatten(2).transpose(1, 2)),
    "weight forgotten to be one": (NoiseProcess, "weight", lambda self, sigmas, **_: sigmas**-2),
    "target with the wrong sign": (NoiseProcess, "target", lambda self, x, noise, sigmas: x - noise),
    "sigma and 1 - sigma swapped": (NoiseProcess, "mixture", lambda self, sigmas: (sigmas, 1 - sigmas)),
}  # fmt: skip


@pytest.mark.promise("A21", "A23", "A40")
@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, monkeypatch, family, model, pipeline, batch, args, noise):
    monkeypatch.setattr(*MISTAKES[name])
    assert differs(family, model, pipeline, batch, args, noise) > MANY


@pytest.mark.promise("A22", "A40")
@pytest.mark.parametrize("normalise", [lambda self, x: x, _eps_outside])
def test_parity_catches_normalisation(normalise, monkeypatch, family, model, pipeline, batch, args, noise):
    monkeypatch.setattr(Flux2Klein, "normalise", normalise)
    assert differs(family, model, pipeline, batch, args, noise) > MANY


class _Spy(torch.nn.Module):
    """Stands for the network: answers with `answer(hidden_states, timestep)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight, self.calls = answer, torch.nn.Parameter(torch.zeros(())), 0

    def forward(self, hidden_states, timestep, **kwargs):
        self.calls += 1
        return (self.answer(hidden_states, timestep) + self.weight,)


@pytest.mark.promise("A25", "A40")
def test_parity_catches_timestep_and_sign(family, pipeline, batch, args, noise):
    """What the network is given: sigma itself, float32, and the mixture; the target is noise - latents."""
    seen = {}
    spy = _Spy(lambda x, t: seen.update(x=x, t=t) or torch.zeros_like(x))
    loss, levels = family.compute_loss(spy, batch, args, noise=noise, levels=SIGMAS)
    assert seen["t"].dtype == torch.float32 and torch.equal(seen["t"], SIGMAS) and torch.equal(levels, SIGMAS)
    normalised = family.normalise(pipeline._patchify_latents(batch["latents"]))
    target = noise - normalised
    expected = (1 - SIGMAS.view(-1, 1, 1, 1)) * normalised + SIGMAS.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(seen["x"], pipeline._pack_latents(expected))
    torch.testing.assert_close(loss, target.flatten(1).square().mean(1))
    assert spy.calls == 1 and loss.dtype == torch.float32 and loss.shape == (2,)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
@pytest.mark.parametrize("loss_type", ["mse", "l1", "huber"])
def test_perfect_model_has_zero_loss(scheme, loss_type, family, batch, args, noise):
    options = dataclasses.replace(args, weighting_scheme=scheme, loss_type=loss_type)
    latents = family.normalise(patchify(batch["latents"]))
    velocity = family.pack(noise - latents)
    loss, _ = family.compute_loss(_Spy(lambda x, t: velocity), batch, options, noise=noise, levels=SIGMAS)
    assert torch.equal(loss, torch.zeros(2))
    loss, _ = family.compute_loss(_Spy(lambda x, t: -velocity), batch, options, noise=noise, levels=SIGMAS)
    assert (loss > 0.1).all()


def test_noise_and_levels_come_from_the_keys(family, batch, args, noise):
    keys = noise_keys(3, 0, [0, 1])
    seen = []
    spy = _Spy(lambda x, t: seen.append(x) or torch.zeros_like(x))
    first, levels = family.compute_loss(spy, batch | {"noise_key": keys}, args)
    again, same_levels = family.compute_loss(spy, batch | {"noise_key": keys}, args)
    assert torch.equal(first, again) and torch.equal(levels, same_levels) and torch.equal(*seen)
    other, other_levels = family.compute_loss(spy, batch | {"noise_key": noise_keys(3, 1, [0, 1])}, args)
    assert not torch.equal(first, other) and not torch.equal(levels, other_levels)
    # One sample at a time is the batch: keys belong to samples.
    one = {
        "latents": batch["latents"][1:],
        "prompt_embeds": batch["prompt_embeds"][1:],
        "noise_key": keys[1:],
    }
    torch.testing.assert_close(family.compute_loss(spy, one, args)[0], first[1:])
    torch.testing.assert_close(
        randn(keys, noise.shape)[1], torch.randn(noise.shape[1:], generator=_generator_of(keys[1]))
    )


def _generator_of(key):
    from sciflow_hf.diffusion.randomness import hash64

    return torch.Generator().manual_seed(hash64(int(key), "noise") % 2**32)


def test_without_keys_torch_seed_decides(family, batch, args):
    spy = _Spy(lambda x, t: torch.zeros_like(x))
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(family.compute_loss(spy, batch, args)[0])
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_resolution_shift_is_the_samplers(family, args):
    """mu of many sampling steps in diffusers; the design's worked value at 1024 px: sigma 0.5 -> 0.7595."""
    for length in (256, 1024, 4096):
        assert family.resolution_mu(length) == pytest.approx(compute_empirical_mu(length, 200), abs=1e-9)
    assert family.resolution_mu(4096) == pytest.approx(1.150, abs=1e-3)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shifted = scheduler.time_shift(family.resolution_mu(4096), 1.0, torch.tensor([0.5]))
    assert float(shifted) == pytest.approx(0.7595, abs=1e-4)
    keys = torch.arange(4000)
    plain = family.sample_levels(keys, dataclasses.replace(args, timestep_shift="none"), 4096)
    ours = family.sample_levels(keys, args, 4096)
    theirs = scheduler.time_shift(family.resolution_mu(4096), 1.0, plain.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    three = family.sample_levels(keys, dataclasses.replace(args, timestep_shift="3.0"), 4096)
    torch.testing.assert_close(three, FlowMatchEulerDiscreteScheduler(shift=3.0).config.shift * plain / (1 + 2 * plain))


def test_mean_level_with_and_without_shift(family, args):
    """Logit-normal at 1024 px: 0.50 without, 0.72 with the shift (measured on diffusers' own code)."""
    options = dataclasses.replace(args, weighting_scheme="logit_normal")
    keys = torch.arange(20000)
    assert family.sample_levels(keys, options, 4096).mean() == pytest.approx(0.72, abs=0.01)
    options = dataclasses.replace(options, timestep_shift="none")
    assert family.sample_levels(keys, options, 4096).mean() == pytest.approx(0.50, abs=0.01)


def test_encoders_equal_the_pipeline(family, pipeline):
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    prompts = ["a line plot", "", "a very long caption " * 20]
    ours = family.encode_prompts(prompts, encoders)
    embeds, ids = pipeline.encode_prompt(prompts, max_sequence_length=24)
    assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["text_ids"], ids)
    assert embeds.shape[1] == 24 and not torch.equal(embeds[0], embeds[1])
    # The layers are the pipeline's (9, 18, 27), not those of diffusers' training script.
    other, _ = pipeline.encode_prompt(prompts, max_sequence_length=24, text_encoder_out_layers=(10, 20, 30)[:3])\
        if pipeline.text_encoder.config.num_hidden_layers >= 30 else (embeds + 1, None)  # fmt: skip
    assert not torch.equal(ours["prompt_embeds"], other)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    expected = pipeline.vae.encode(images).latent_dist.mode()
    assert torch.equal(family.encode_images(images, encoders)["latents"], expected)
    assert encoders.transformer is None


def test_bucket_step_is_what_the_pipeline_divides_by(family, pipeline):
    assert family.bucket_step() == pipeline.vae_scale_factor * 2


def test_bfloat16_keeps_sigma_in_float32(family, batch, args, noise):
    model = family.load_model(dtype=torch.bfloat16)
    seen = {}
    model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    loss, levels = family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)
    assert seen["timestep"].dtype == torch.float32 and seen["hidden_states"].dtype == torch.bfloat16
    assert loss.dtype == levels.dtype == torch.float32
    full = family.compute_loss(family.load_model(dtype=torch.float32), batch, args, noise=noise, levels=SIGMAS)[0]
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)


@pytest.mark.promise("A24")
def test_samples_that_do_not_fit_are_named(family):
    model = family.load_model(dtype=torch.float32)
    channels, dim = model.config.in_channels // 4, model.config.joint_attention_dim
    good = {"latents": torch.zeros(channels, 12, 8), "prompt_embeds": torch.zeros(5, dim)}
    family.check_sample(model, good)
    for key, value, words in (
        ("latents", torch.zeros(channels + 1, 12, 8), "latents"),
        ("latents", torch.zeros(channels, 11, 8), "even"),
        ("prompt_embeds", torch.zeros(5, dim + 1), "prompt_embeds"),
        ("txt_ids", torch.ones(5, 4, dtype=torch.int64), "text_ids"),
    ):
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, good | {key: value})
    ids = torch.tensor([[0, 0, 0, i] for i in range(5)])
    family.check_sample(model, good | {"txt_ids": ids})


def test_distilled_weights_are_warned_about(family, tmp_path, tiny_klein, caplog):
    import json
    import shutil

    copy = shutil.copytree(tiny_klein, tmp_path / "distilled")
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    dataclasses.replace(family, pretrained_model_name_or_path=str(copy)).load_model(dtype=torch.float32)
    assert "distilled" in caplog.text


@pytest.mark.promise("B25")
def test_missing_model_is_explained(tmp_path):
    with pytest.raises(SciflowError, match="cannot load its pipeline configuration"):
        Flux2Klein(pretrained_model_name_or_path=str(tmp_path / "nowhere")).load_model(dtype=torch.float32)


@pytest.mark.promise("A01", "C06")
def test_load_family_takes_names_paths_and_classes():
    assert load_family("flux2_klein") is Flux2Klein is load_family(Flux2Klein)
    assert load_family("sciflow_hf.families.flux2_klein.Flux2Klein") is Flux2Klein
    for bad in ("flux3", "no.such.module", int):
        with pytest.raises(SciflowError, match="family"):
            load_family(bad)


@pytest.mark.promise("A04")
def test_generate_draws_with_the_training_network(family):
    """The pipeline holds the very network, and a changed weight changes the image."""
    model = family.load_model(dtype=torch.float32)
    pipe = family.load_pipeline(model)
    assert pipe.transformer is model and pipe.text_encoder is None
    inputs = family.encode_validation_prompts(["a plot"], device="cpu", dtype=torch.float32)[0]

    def draw():
        return family.generate(
            pipe, inputs, height=48, width=32, num_inference_steps=2, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
        )[0]  # fmt: skip

    first, again = draw(), draw()
    assert first.size == (32, 48) and first.tobytes() == again.tobytes()
    with torch.no_grad():
        model.proj_out.weight.mul_(-1)
    assert draw().tobytes() != first.tobytes()


def test_collated_samples_train(family, batch, args):
    rows = [{k: v[i] for k, v in batch.items()} for i in range(2)]
    model = family.load_model(dtype=torch.float32)
    loss, levels = family.compute_loss(model, collate(rows), args)
    assert torch.isfinite(loss).all() and ((levels > 0) & (levels < 1)).all()
