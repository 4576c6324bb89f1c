"""SD3's step against diffusers' own pipeline and scheduler, its text, and a whole training of a tiny one."""

import dataclasses
import math
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from family_steps import Spy, edited, with_adapter
from parity import FEW, MANY, roundings
from trainings import LONGER, assert_resume_is_exact, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_disabled
from sciflow_hf.demo import make_tiny
from sciflow_hf.diffusion.process import shift_sigmas
from sciflow_hf.errors import CacheError, SciflowError
from sciflow_hf.families.sd3 import SD3
from sciflow_hf.training.prepare import build_cache_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTH = 12  # T5 tokens
PROMPTS = ["a line plot", "", "Two red bars and one blue bar, with a legend at the top right. " * 4]


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """Folder of the smallest SD3 pipeline; a token is 8x8 pixels. Read only."""
    return make_tiny(tmp_path_factory.mktemp("sd3") / "tiny", "sd3", size="test")


@pytest.fixture(scope="module")
def pipeline(tiny_sd3):
    return StableDiffusion3Pipeline.from_pretrained(tiny_sd3)


@pytest.fixture(scope="module")
def family(tiny_sd3):
    return SD3(pretrained_model_name_or_path=str(tiny_sd3), max_sequence_length=LENGTH)


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
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            ["a line plot", "two red bars"], None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    mask = torch.randint(0, 256, (2, 12, 8), generator=rng, dtype=torch.uint8)
    return {"latents": latents, "prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled, "loss_mask": mask}


@pytest.fixture(scope="module")
def noise(batch):
    return torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def levels(pipeline):
    """(sigmas, timesteps) of two places in the schedule of the pipeline, which is shifted."""
    chosen = torch.tensor([250, 800])
    return pipeline.scheduler.sigmas[chosen], pipeline.scheduler.timesteps[chosen]


@pytest.fixture(scope="module")
def model(family):
    return with_adapter(family)


class Reference:
    """The step written with the pipeline's configuration and its scheduler's mixing. A mistake replaces one method."""

    def __init__(self, pipeline, **mistakes):
        self.config, self.scheduler = pipeline.vae.config, pipeline.scheduler
        vars(self).update(mistakes)

    def normalise(self, latents):
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def mix(self, latents, timesteps, noise):
        return self.scheduler.scale_noise(latents, timesteps, noise)

    def inputs(self, inputs):
        return inputs

    def output(self, prediction):
        return prediction

    def target(self, latents, noise):
        return noise - latents

    def mean(self, error, mask):
        return (error * mask).sum() / (error.shape[0] * mask.sum())  # a pixel counts once for every channel

    def loss(self, model, batch, noise, timesteps):
        latents = self.normalise(batch["latents"])
        inputs = {
            "hidden_states": self.mix(latents, timesteps, noise),
            "timestep": timesteps,
            "encoder_hidden_states": batch["prompt_embeds"],
            "pooled_projections": batch["pooled_prompt_embeds"],
        }
        prediction = self.output(model(**self.inputs(inputs), return_dict=False)[0])
        error = (prediction - self.target(latents, noise)) ** 2
        masks = batch.get("loss_mask", torch.ones(error.shape[0], *error.shape[2:]))
        return torch.stack([self.mean(e, m.float()) for e, m in zip(error, masks, strict=True)])


@pytest.mark.promise("E15")
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise, levels):
    sigmas, timesteps = levels
    for names in (batch.keys(), batch.keys() - {"loss_mask"}):
        chosen = {name: batch[name] for name in names}
        difference = roundings(
            lambda chosen=chosen: family.compute_loss(model, chosen, args, noise=noise, levels=sigmas)[0],
            lambda chosen=chosen: Reference(pipeline).loss(model, chosen, noise, timesteps),
            model,
        )
        assert difference < FEW


def _unshifted(timesteps):
    sigmas = timesteps / 1000
    return 1000 * sigmas / (3 - 2 * sigmas)


def _changed(**changes):
    return {"inputs": lambda inputs: inputs | {name: change(inputs[name]) for name, change in changes.items()}}


MISTAKES = {
    "sign of the velocity": {"target": lambda latents, noise: latents - noise},
    "target is the noise": {"target": lambda latents, noise: noise},
    "sigma and 1 - sigma swapped": {"mix": lambda x, t, n: (t / 1000).view(-1, 1, 1, 1) * (x - n) + n},
    "mixed by the unshifted sigma": {"mix": lambda x, t, n: x + _unshifted(t).view(-1, 1, 1, 1) / 1000 * (n - x)},
    "normalisation left out": {"normalise": lambda latents: latents},
    "scaled before shifted": {"normalise": lambda latents: latents * 1.65 - 0.117},
    "timestep is sigma": _changed(timestep=lambda t: t / 1000),
    "timestep of the unshifted schedule": _changed(timestep=_unshifted),
    "timestep in bfloat16": _changed(timestep=lambda t: t.bfloat16().float()),
    "pooled zeroed": _changed(pooled_projections=torch.zeros_like),
    "pooled of the CLIPs swapped": _changed(pooled_projections=lambda p: p.roll(8, 1)),
    "states of the CLIPs not padded": _changed(encoder_hidden_states=lambda e: e.roll(12, 2)),
    "T5 left out": _changed(encoder_hidden_states=lambda e: e[:, :16]),
    "CLIP left out": _changed(encoder_hidden_states=lambda e: e[:, 16:]),
    "text of the other sample": _changed(encoder_hidden_states=lambda e: e.flip(0)),
    "height and width swapped": _changed(hidden_states=lambda x: x.transpose(2, 3))
    | {"output": lambda prediction: prediction.transpose(2, 3)},
    "mask ignored": {"mean": lambda error, mask: error.mean()},
    "mask turned round": {"mean": lambda error, mask: (error * mask.flip(1)).sum() / (4 * mask.sum())},
    "mask as if not weights": {"mean": lambda error, mask: (error * mask).mean()},
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, family, model, pipeline, batch, args, noise, levels):
    sigmas, timesteps = levels
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=sigmas)[0],
        lambda: Reference(pipeline, **MISTAKES[name]).loss(model, batch, noise, timesteps),
        model,
    )
    assert difference > MANY


def test_preconditioning_is_that_of_the_scripts(family, model, pipeline, batch, args, noise, levels):
    """Prediction times -sigma plus the noisy latents, compared with the latents: sigma^2 times the usual loss."""
    sigmas, timesteps = levels
    preconditioned = dataclasses.replace(family, precondition_outputs=True)

    class Script(Reference):
        def output(self, prediction):
            noisy = self.mix(self.normalise(batch["latents"]), timesteps, noise)
            return prediction * -sigmas.view(-1, 1, 1, 1) + noisy

        def target(self, latents, noise):
            return latents

    def compute():
        return preconditioned.compute_loss(model, batch, args, noise=noise, levels=sigmas)[0]

    assert roundings(compute, lambda: Script(pipeline).loss(model, batch, noise, timesteps), model) < FEW
    usual = family.compute_loss(model, batch, args, noise=noise, levels=sigmas)[0]
    torch.testing.assert_close(compute(), sigmas**2 * usual, rtol=1e-5, atol=0)
    with pytest.raises(SciflowError, match=r"`min_snr_gamma` 5.0 does not go with `precondition_outputs`"):
        preconditioned.compute_loss(model, batch, dataclasses.replace(args, min_snr_gamma=5.0), levels=sigmas)


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
@pytest.mark.parametrize("loss_type", ["mse", "l1", "huber"])
def test_perfect_model_has_zero_loss(family, batch, args, noise, levels, scheme, loss_type, precondition):
    options = dataclasses.replace(args, weighting_scheme=scheme, loss_type=loss_type)
    preconditioned = dataclasses.replace(family, precondition_outputs=precondition)
    velocity = noise - (batch["latents"] - family.latents_shift) * family.latents_scale
    for answer, is_perfect in ((velocity, True), (-velocity, False)):
        spy = Spy(answer)
        loss, found = preconditioned.compute_loss(spy, batch, options, noise=noise, levels=levels[0])
        assert ((loss < 1e-6) if is_perfect else (loss > 0.05)).all()
        assert len(spy.calls) == 1 and loss.dtype == torch.float32 and loss.shape == (2,)
        assert torch.equal(found, levels[0])


def test_bfloat16_keeps_the_timestep_in_float32(family, batch, args, noise, levels):
    spy = Spy().bfloat16()
    loss, sigmas = family.compute_loss(spy, batch, args, noise=noise, levels=levels[0])
    seen = spy.calls[0]
    assert torch.equal(seen["timestep"], 1000 * levels[0]) and seen["timestep"].dtype == torch.float32
    assert loss.dtype == sigmas.dtype == torch.float32
    assert {seen[n].dtype for n in ("hidden_states", "encoder_hidden_states", "pooled_projections")} == {torch.bfloat16}


def test_shift_is_the_schedulers(family, args, tiny_sd3, tmp_path, pipeline):
    """3.0 at every resolution, as the scheduler of the pipeline shifts; another checkpoint's is its own."""
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas[:-1]
    for length in (24, 4096):
        assert family.shift_mu(args, length) == pytest.approx(math.log(3))
    shifted = shift_sigmas(plain, family.shift_mu(args, 24))
    torch.testing.assert_close(shifted, pipeline.scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    keys = torch.arange(20000)
    for options, mean in ((args, 1.5 - 0.75 * math.log(3)), (dataclasses.replace(args, timestep_shift="none"), 0.5)):
        assert float(family.sample_levels(keys, options, 24).mean()) == pytest.approx(mean, abs=0.005)
    other = edited(tiny_sd3, tmp_path, "scheduler/scheduler_config.json", shift=2.0)
    assert SD3(pretrained_model_name_or_path=str(other)).shift_mu(args, 24) == pytest.approx(math.log(2))


@pytest.mark.parametrize("use_t5", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_prompts_equal_the_pipelines(tiny_sd3, family, use_t5, dtype):
    family = dataclasses.replace(family, use_t5=use_t5)
    without = {} if use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, dtype=dtype, **without)
    encoders = family.load_encoders(device="cpu", dtype=dtype)
    assert encoders.transformer is None and (encoders.text_encoder_3 is not None) == use_t5
    seen = []
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]], PROMPTS, PROMPTS[::-1]):
        ours = family.encode_prompts(prompts, encoders)
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
            )
        assert ours["prompt_embeds"].dtype == dtype and ours["prompt_embeds"].shape[1:] == (16 + LENGTH, 32)
        assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["pooled_prompt_embeds"], pooled)
        assert not ours["prompt_embeds"].requires_grad
        seen += ours["pooled_prompt_embeds"]
    assert not torch.equal(seen[0], seen[1]) and bool(embeds[:, 16:].any()) == use_t5


@pytest.mark.promise("E15")
def test_no_t5_is_another_cache_and_a_missing_t5_is_named(tiny_sd3, family, tmp_path):
    folder = edited(tiny_sd3, tmp_path, "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    here = dataclasses.replace(family, pretrained_model_name_or_path=str(folder))
    with pytest.raises(SciflowError, match=r"`use_t5`.*holds no `text_encoder_3`.*--no_use_t5"):
        here.load_text_encoder(device="cpu", dtype=torch.float32)
    without = dataclasses.replace(here, use_t5=False)
    assert without.encode_validation_prompts(["x"], device="cpu", dtype=torch.float32)[0].keys() == {
        "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds"
    }  # fmt: skip
    for length in (0, 513):
        with pytest.raises(SciflowError, match=f"`max_sequence_length` {length}"):
            dataclasses.replace(family, max_sequence_length=length)


def test_bucket_step_and_images_are_the_pipelines(family, pipeline):
    assert family.bucket_step() == pipeline.vae_scale_factor * pipeline.patch_size
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    found = family.encode_images(images, family.load_encoders(device="cpu", dtype=torch.float32, text=False))
    with torch.no_grad():
        expected = pipeline.vae.encode(images).latent_dist
    assert torch.equal(found["latents"], expected.mean) and torch.equal(found["latents_std"], expected.std)


def test_samples_that_do_not_fit_are_named(family, model, batch):
    good = {name: value[0] for name, value in batch.items()} | {"latents_std": batch["latents"][0].abs()}
    family.check_sample(model, good)
    for changes, words in (
        ({"latents": torch.zeros(5, 12, 8)}, r"`latents` \(5, 12, 8\).*takes \(4, h, w\)"),
        ({"latents": torch.zeros(4, 11, 8)}, "even h and w"),
        ({"latents": torch.zeros(4, 12, 34)}, r"16 x 16 tokens.*`pos_embed_max_size`.*at most 128 pixels"),
        ({"prompt_embeds": torch.zeros(28, 31)}, r"`prompt_embeds` \(28, 31\).*\(L, 32\)"),
        ({"pooled_prompt_embeds": torch.zeros(19)}, r"`pooled_prompt_embeds` \(19,\).*\(20\)"),
        ({"pooled_prompt_embeds": None}, r"needs \['pooled_prompt_embeds'\]"),
        ({"latents_std": None}, "`posterior` 'sample'"),
        ({"loss_mask": torch.zeros(6, 8)}, "`loss_mask`"),
    ):
        sample = {name: value for name, value in (good | changes).items() if value is not None}
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, sample)


def test_idle_layers_are_those_without_a_gradient(family, batch, args):
    model = family.load_model(dtype=torch.float32)
    family.compute_loss(model, batch, args)[0].mean().backward()
    without = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(family.idle_layers(model))


def test_turbo_is_warned_about(tiny_sd3, tmp_path, caplog):
    turbo = shutil.copytree(tiny_sd3, tmp_path / "sd3.5-Turbo")
    for path, warned in ((tiny_sd3, False), (turbo, True)):
        SD3(pretrained_model_name_or_path=str(path)).load_model(dtype=torch.float32, meta=True)
        assert ("step-distilled" in caplog.text) is warned


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("vae/config.json", {"shift_factor": None}, "vae has no `shift_factor`"),
        ("vae/config.json", {"scaling_factor": None}, "vae has no `scaling_factor`"),
        ("scheduler/scheduler_config.json", {"shift": None}, "scheduler has no `shift`"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel.*`sd3` trains"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(tiny_sd3, tmp_path, args, batch, file, changes, words):
    family = SD3(pretrained_model_name_or_path=str(edited(tiny_sd3, tmp_path, file, **changes)))
    with pytest.raises(SciflowError, match=words):
        family.compute_loss(family.load_model(dtype=torch.float32), batch, args)


# ---- a whole training ----


@pytest.fixture(scope="module")
def cache(tmp_path_factory, family, figures):
    """The 24 drawn figures in three non-square buckets, with the deviation of the posterior."""
    folder = tmp_path_factory.mktemp("cache")
    build_cache_for(family, str(figures), str(folder), resolution=64, batch_size=4, dtype="fp32")
    return sf.load_cache(folder, dtype=torch.float32)


@pytest.mark.promise("E03")
def test_training_lowers_the_held_out_loss_and_the_lora_changes_the_image(tmp_path, tiny_sd3, family, cache):
    train, held_out = cache.split(0.3)
    sample = train[0]
    assert sample["latents_std"].shape == sample["latents"].shape and sample["prompt_embeds"].shape == (16 + LENGTH, 32)
    trainer = make_trainer(tmp_path, family, train, held_out, **LONGER)
    start = trained(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.97 * metrics["eval_base_loss"]
    assert not any(torch.equal(start[name], value) for name, value in trained(trainer).items())
    trainer.save_model()

    inputs = family.encode_validation_prompts(["a line plot"], device="cpu", dtype=torch.float32)[0]

    def draw(pipeline, guidance_scale=2.0):
        options = {"height": 48, "width": 32, "num_inference_steps": 2, "guidance_scale": guidance_scale}
        return family.generate(pipeline, inputs, generator=torch.Generator().manual_seed(0), **options)[0]

    ours = draw(family.load_pipeline(trainer.model.eval()))
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    base = draw(stock)
    stock.load_lora_weights(str(tmp_path))
    assert ours.size == (32, 48) and draw(stock).tobytes() == ours.tobytes() != base.tobytes()
    assert draw(stock, guidance_scale=1.0).tobytes() != ours.tobytes()
    with adapter_disabled(trainer.model):
        assert draw(family.load_pipeline(trainer.model)).tobytes() == base.tobytes()


def test_resumed_equals_uninterrupted(tmp_path, family, cache):
    assert_resume_is_exact(tmp_path, family, cache)


def test_a_cache_without_t5_is_refused(tmp_path, family, cache):
    with pytest.raises(CacheError, match="`text_encoder_layers`"):
        make_trainer(tmp_path, dataclasses.replace(family, use_t5=False), cache)


@pytest.mark.acceptance
def test_eight_samples_are_learned(tmp_path, family, cache):
    eight = cache.select(range(8))
    trainer = make_trainer(tmp_path, family, eight, eight, **LONGER | {"max_steps": 200})
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] <= 0.6 * metrics["eval_base_loss"]
