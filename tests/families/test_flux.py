"""FLUX.1's step against diffusers' own pipeline and scheduler, its text, and a whole training of a tiny one."""

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from family_steps import Spy, edited, with_adapter
from parity import FEW, MANY, roundings
from trainings import LONGER, assert_resume_is_exact, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import match_layers
from sciflow_hf.adapters.layers import adapter_disabled
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.flux import Flux
from sciflow_hf.training.prepare import build_cache_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTH = 12  # T5 tokens
TOKENS = 24  # of the images below: 6 x 4
PROMPTS = ["a line plot", "", "Two red bars and one blue bar, with a legend at the top right. " * 4]


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Folder of the smallest FLUX.1 pipeline; a token is 8x8 pixels. Read only."""
    return make_tiny(tmp_path_factory.mktemp("flux") / "tiny", "flux", size="test")


@pytest.fixture(scope="module")
def pipeline(tiny_flux):
    return FluxPipeline.from_pretrained(tiny_flux)


@pytest.fixture(scope="module")
def family(tiny_flux):
    return Flux(pretrained_model_name_or_path=str(tiny_flux), max_sequence_length=LENGTH)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none")


@pytest.fixture(scope="module")
def batch(pipeline):
    """Two non-square images' latents (12 x 8), the pipeline's own text embeddings, and a mask."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.rand(2, 3, 48, 32, generator=rng) * 2 - 1).latent_dist.sample(rng)
        embeds, pooled, _ = pipeline.encode_prompt(["a line plot", "two red bars"], max_sequence_length=LENGTH)
    mask = torch.randint(0, 256, (2, 12, 8), generator=rng, dtype=torch.uint8)
    return {"latents": latents, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "loss_mask": mask}


@pytest.fixture(scope="module")
def noise(batch):
    return torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def levels(pipeline):
    """(sigmas, timesteps) of two places in a sampler's schedule at this resolution."""
    pipeline.scheduler.set_timesteps(10, mu=calculate_shift(TOKENS))
    chosen = torch.tensor([2, 7])
    return pipeline.scheduler.sigmas[chosen], pipeline.scheduler.timesteps[chosen]


@pytest.fixture(scope="module")
def model(family):
    return with_adapter(family)


class Reference:
    """The step written with the pipeline's helpers and its scheduler's mixing. A mistake replaces one method."""

    guidance = 1.0

    def __init__(self, pipeline, **mistakes):
        self.pipeline, self.config, self.scheduler = pipeline, pipeline.vae.config, pipeline.scheduler
        vars(self).update(mistakes)

    def normalise(self, latents):
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def mix(self, latents, timesteps, noise):
        return self.scheduler.scale_noise(latents, timesteps, noise)

    def pack(self, latents):
        return self.pipeline._pack_latents(latents, *latents.shape)

    def pack_mask(self, mask, latents):
        return self.pack(mask[:, None].expand_as(latents).float())

    def inputs(self, inputs):
        return inputs

    def target(self, latents, noise):
        return noise - latents

    def loss(self, model, batch, noise, timesteps):
        latents = self.normalise(batch["latents"])
        height, width = latents.shape[2:]
        inputs = {
            "hidden_states": self.pack(self.mix(latents, timesteps, noise)),
            "timestep": timesteps / 1000,
            "guidance": None if self.guidance is None else torch.full((2,), self.guidance),
            "encoder_hidden_states": batch["prompt_embeds"],
            "pooled_projections": batch["pooled_prompt_embeds"],
            "txt_ids": torch.zeros(LENGTH, 3),
            "img_ids": self.pipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32),
        }
        prediction = model(**self.inputs(inputs), return_dict=False)[0]
        error = (prediction - self.pack(self.target(latents, noise))) ** 2
        mask = batch.get("loss_mask", torch.ones(2, height, width))
        mask = self.pack_mask(mask, latents)
        return (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@pytest.mark.promise("E17")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise, levels, guidance_scale):
    sigmas, timesteps = levels
    guided = dataclasses.replace(family, guidance_scale=guidance_scale)
    for names in (batch.keys(), batch.keys() - {"loss_mask"}):
        chosen = {name: batch[name] for name in names}
        difference = roundings(
            lambda chosen=chosen: guided.compute_loss(model, chosen, args, noise=noise, levels=sigmas)[0],
            lambda chosen=chosen: Reference(pipeline, guidance=guidance_scale).loss(model, chosen, noise, timesteps),
            model,
        )
        assert difference < FEW


@pytest.mark.promise("E17")
def test_a_network_without_guidance_embedding_is_told_nothing(tiny_flux, tmp_path, batch, args, noise, levels, caplog):
    folder = edited(tiny_flux, tmp_path, "transformer/config.json", guidance_embeds=False)
    family = Flux(pretrained_model_name_or_path=str(folder), max_sequence_length=LENGTH)
    model = with_adapter(family)
    assert "schnell" not in caplog.text  # its scheduler shifts: no step-distilled network
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=levels[0])[0],
        lambda: Reference(FluxPipeline.from_pretrained(folder), guidance=None, scheduler=Unshifted()).loss(
            model, batch, noise, levels[1]
        ),
        model,
    )
    assert difference < FEW
    spy = Spy()
    family.compute_loss(spy, {n: v for n, v in batch.items() if n != "loss_mask"}, args, noise=noise)
    assert spy.calls[0]["guidance"] is None


class Unshifted:
    """Mixes without a schedule."""

    def scale_noise(self, latents, timesteps, noise):
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise


def _unshifted(sigmas):
    scale = torch.exp(torch.tensor(calculate_shift(TOKENS)))
    return sigmas / (scale - (scale - 1) * sigmas)


def _changed(**changes):
    return {"inputs": lambda inputs: inputs | {name: change(inputs[name]) for name, change in changes.items()}}


def _pack_other_order(latents):
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)


def _pack_by_columns(latents):
    return FluxPipeline._pack_latents(latents.transpose(2, 3), *latents.transpose(2, 3).shape)


def _averaged(mask, latents):
    return torch.nn.functional.avg_pool2d(mask[:, None].float(), 2).flatten(2).transpose(1, 2).expand(-1, -1, 16)


MISTAKES = {
    "sign of the velocity": {"target": lambda latents, noise: latents - noise},
    "target is the noise": {"target": lambda latents, noise: noise},
    "sigma and 1 - sigma swapped": {"mix": lambda x, t, n: (t / 1000).view(-1, 1, 1, 1) * (x - n) + n},
    "mixed by the unshifted sigma": {"mix": lambda x, t, n: x + _unshifted(t / 1000).view(-1, 1, 1, 1) * (n - x)},
    "normalisation left out": {"normalise": lambda latents: latents},
    "scaled before shifted": {"normalise": lambda latents: latents * 1.65 - 0.117},
    "timestep times 1000": _changed(timestep=lambda t: 1000 * t),
    "timestep of the unshifted schedule": _changed(timestep=_unshifted),
    "timestep in bfloat16": _changed(timestep=lambda t: t.bfloat16().float()),
    "guidance left out": {"guidance": 0.0},
    "guidance of sampling": {"guidance": 3.5},
    "pooled zeroed": _changed(pooled_projections=torch.zeros_like),
    "text of the other sample": _changed(encoder_hidden_states=lambda e: e.flip(0)),
    "ids with height and width swapped": _changed(img_ids=lambda ids: ids[:, [0, 2, 1]]),
    "ids left out": _changed(img_ids=torch.zeros_like),
    "ids in the first column": _changed(img_ids=lambda ids: ids.roll(-1, 1)),
    "ids of text counted": _changed(txt_ids=lambda ids: ids + torch.arange(LENGTH)[:, None]),
    "packed in another channel order": {"pack": _pack_other_order},
    "packed by columns": {"pack": _pack_by_columns},
    "mask ignored": {"pack_mask": lambda mask, latents: torch.ones(2, TOKENS, 16)},
    "mask averaged over patches": {"pack_mask": _averaged},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, family, model, pipeline, batch, args, noise, levels):
    sigmas, timesteps = levels
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=sigmas)[0],
        lambda: Reference(pipeline, **MISTAKES[name]).loss(model, batch, noise, timesteps),
        model,
    )
    assert difference > MANY


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
@pytest.mark.parametrize("loss_type", ["mse", "l1", "huber"])
def test_perfect_model_has_zero_loss(family, batch, args, noise, levels, scheme, loss_type):
    options = dataclasses.replace(args, weighting_scheme=scheme, loss_type=loss_type)
    velocity = noise - (batch["latents"] - family.latents_shift) * family.latents_scale
    velocity = FluxPipeline._pack_latents(velocity, *velocity.shape)
    for answer, is_perfect in ((velocity, True), (-velocity, False)):
        spy = Spy(answer)
        loss, found = family.compute_loss(spy, batch, options, noise=noise, levels=levels[0])
        assert (loss == 0).all() if is_perfect else (loss > 0.1).all()
        assert len(spy.calls) == 1 and loss.dtype == torch.float32 and loss.shape == (2,)
        assert torch.equal(found, levels[0])


def test_bfloat16_keeps_timestep_and_guidance_in_float32(family, batch, args, noise, levels):
    spy = Spy().bfloat16()
    loss, sigmas = family.compute_loss(spy, batch, args, noise=noise, levels=levels[0])
    seen = spy.calls[0]
    assert torch.equal(seen["timestep"], levels[0]) and torch.equal(seen["guidance"], torch.ones(2))
    assert seen["timestep"].dtype == seen["guidance"].dtype == torch.float32
    assert loss.dtype == sigmas.dtype == torch.float32
    assert {seen[n].dtype for n in ("hidden_states", "encoder_hidden_states", "pooled_projections")} == {torch.bfloat16}
    assert seen["img_ids"].shape == (TOKENS, 3) and seen["txt_ids"].shape == (LENGTH, 3)  # no batch axis


def test_shift_is_the_samplers(family, args):
    """The pipeline's line over image tokens, and its scheduler's way of shifting by it."""
    for length in (256, 1024, 4096):
        assert family.shift_mu(args, length) == pytest.approx(calculate_shift(length), abs=2e-5)
    keys = torch.arange(4000)
    plain = family.sample_levels(keys, dataclasses.replace(args, timestep_shift="none"), 4096)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected = scheduler.time_shift(calculate_shift(4096), 1.0, plain.double())
    torch.testing.assert_close(family.sample_levels(keys, args, 4096).double(), expected, rtol=0, atol=1e-5)
    assert abs(float(plain.mean()) - 0.5) < 0.01 < float(expected.mean()) - 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompts_equal_the_pipelines(tiny_flux, family, dtype):
    pipeline = FluxPipeline.from_pretrained(tiny_flux, dtype=dtype)
    encoders = family.load_text_encoder(device="cpu", dtype=dtype)
    assert encoders.transformer is None and encoders.vae is None
    seen = []
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]], PROMPTS, PROMPTS[::-1]):
        ours = family.encode_prompts(prompts, encoders)
        with torch.no_grad():
            embeds, pooled, ids = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
        assert ours["prompt_embeds"].dtype == dtype and ours["prompt_embeds"].shape[1:] == (LENGTH, 32)
        assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["pooled_prompt_embeds"], pooled)
        assert not ours["prompt_embeds"].requires_grad and not ids.any()
        seen += ours["pooled_prompt_embeds"]
    assert not torch.equal(seen[0], seen[1])
    for length in (0, 513):
        with pytest.raises(SciflowError, match=f"`max_sequence_length` {length}"):
            dataclasses.replace(family, max_sequence_length=length)


def test_bucket_step_and_images_are_the_pipelines(family, pipeline):
    assert family.bucket_step() == 2 * pipeline.vae_scale_factor
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    found = family.encode_images(images, family.load_encoders(device="cpu", dtype=torch.float32, text=False))
    with torch.no_grad():
        expected = pipeline.vae.encode(images).latent_dist
    assert torch.equal(found["latents"], expected.mean) and torch.equal(found["latents_std"], expected.std)


def test_samples_that_do_not_fit_are_named(family, model, batch):
    good = {name: value[0] for name, value in batch.items()} | {"latents_std": batch["latents"][0].abs()}
    family.check_sample(model, good | {"txt_ids": torch.zeros(LENGTH, 3)})
    for changes, words in (
        ({"latents": torch.zeros(5, 12, 8)}, r"`latents` \(5, 12, 8\).*takes \(4, h, w\)"),
        ({"latents": torch.zeros(4, 12, 7)}, "even h and w"),
        ({"prompt_embeds": torch.zeros(LENGTH, 31)}, r"`prompt_embeds` \(12, 31\).*\(L, 32\)"),
        ({"pooled_prompt_embeds": torch.zeros(9)}, r"`pooled_prompt_embeds` \(9,\).*\(8\)"),
        ({"pooled_prompt_embeds": None}, r"needs \['pooled_prompt_embeds'\]"),
        ({"latents_std": None}, "`posterior` 'sample'"),
        ({"loss_mask": torch.zeros(6, 8)}, "`loss_mask`"),
        ({"txt_ids": torch.ones(LENGTH, 3)}, "`text_ids`"),
    ):
        sample = {name: value for name, value in (good | changes).items() if value is not None}
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, sample)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("vae/config.json", {"shift_factor": None}, "vae has no `shift_factor`"),
        ("vae/config.json", {"scaling_factor": None}, "vae has no `scaling_factor`"),
        ("transformer/config.json", {"guidance_embeds": None}, "transformer has no `guidance_embeds`"),
        ("transformer/config.json", {"out_channels": 8}, r"`in_channels` 16.*`out_channels` 8.*Fill"),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel.*`flux` trains"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(tiny_flux, tmp_path, args, batch, file, changes, words):
    family = Flux(pretrained_model_name_or_path=str(edited(tiny_flux, tmp_path, file, **changes)))
    with pytest.raises(SciflowError, match=words):
        family.compute_loss(family.load_model(dtype=torch.float32), batch, args)


def test_schnell_is_warned_about(tiny_flux, tmp_path, caplog):
    folder = edited(tiny_flux, tmp_path, "transformer/config.json", guidance_embeds=False)
    edited(folder, tmp_path / "schnell", "scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    for path, warned in ((folder, False), (tmp_path / "schnell" / "edited", True)):
        Flux(pretrained_model_name_or_path=str(path)).load_model(dtype=torch.float32, meta=True)
        assert ("step-distilled" in caplog.text) is warned


def test_presets_leave_the_last_layer_alone(family):
    model = family.load_model(dtype=torch.float32, meta=True)
    matched = {name: match_layers(model, name, family.lora_presets) for name in family.lora_presets}
    assert set(matched["attention"]) < set(matched["standard"]) < set(matched["full"])
    assert "proj_out" not in matched["full"] and "single_transformer_blocks.1.proj_mlp" in matched["full"]


# ---- a whole training ----


@pytest.fixture(scope="module")
def cache(tmp_path_factory, family, figures):
    """The drawn figures in three non-square buckets, with the deviation of the posterior."""
    folder = tmp_path_factory.mktemp("cache")
    build_cache_for(family, str(figures), str(folder), resolution=64, batch_size=4, dtype="fp32")
    return sf.load_cache(folder, dtype=torch.float32)


@pytest.mark.promise("E04")
def test_training_lowers_the_held_out_loss_and_the_lora_changes_the_image(tmp_path, tiny_flux, family, cache):
    train, held_out = cache.split(0.3)
    sample = train[0]
    assert sample["latents_std"].shape == sample["latents"].shape and sample["prompt_embeds"].shape == (LENGTH, 32)
    trainer = make_trainer(tmp_path, family, train, held_out, **LONGER)
    start = trained(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.9 * metrics["eval_base_loss"]
    assert not any(torch.equal(start[name], value) for name, value in trained(trainer).items())
    trainer.save_model()

    inputs = family.encode_validation_prompts(["a line plot"], device="cpu", dtype=torch.float32)[0]

    def draw(pipeline, guidance_scale=3.5):
        options = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": guidance_scale}
        return family.generate(pipeline, inputs, generator=torch.Generator().manual_seed(0), **options)[0]

    ours = draw(family.load_pipeline(trainer.model.eval()))
    stock = FluxPipeline.from_pretrained(tiny_flux)
    base = draw(stock)
    stock.load_lora_weights(str(tmp_path))
    assert ours.size == (32, 48) and draw(stock).tobytes() == ours.tobytes() != base.tobytes()
    assert draw(stock, guidance_scale=1.0).tobytes() != ours.tobytes()
    with adapter_disabled(trainer.model):
        assert draw(family.load_pipeline(trainer.model)).tobytes() == base.tobytes()


def test_resumed_equals_uninterrupted(tmp_path, family, cache):
    assert_resume_is_exact(tmp_path, family, cache)


@pytest.mark.acceptance
def test_eight_samples_are_learned(tmp_path, family, cache):
    eight = cache.select(range(8))
    trainer = make_trainer(tmp_path, family, eight, eight, **LONGER | {"max_steps": 200})
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] <= 0.6 * metrics["eval_base_loss"]
