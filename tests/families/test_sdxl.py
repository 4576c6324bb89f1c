"""SDXL's step against diffusers' pipeline helpers and scheduler; its prompts, cache, training and LoRA."""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from family_steps import with_adapter
from parity import FEW, MANY, roundings

from sciflow_hf.demo import make_tiny
from sciflow_hf.diffusion.process import GivenSchedule
from sciflow_hf.diffusion.randomness import noise_keys
from sciflow_hf.errors import SciflowError
from sciflow_hf.families import sdxl
from sciflow_hf.families.sdxl import SDXL
from sciflow_hf.training.arguments import DiffusionTrainingArguments

TIMESTEPS = torch.tensor([120, 730])
TIME_IDS = [(70, 55, 3, 0, 48, 32), (96, 64, 0, 5, 48, 32)]
# Parts of the pipeline's configuration that change the step, as fine-tuned checkpoints have them.
VARIANTS = {
    "epsilon": {},
    "v": {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
    "sample": {"scheduler": {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}},
    "statistics": {"vae": {"latents_mean": [0.1, -0.2, 0.3, 0.05], "latents_std": [0.5, 0.9, 1.4, 0.7]}},
}


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sdxl") / "tiny", "sdxl", size="test")


def changed(folder, target, changes):
    """A copy of a pipeline with other values in its configurations; None takes one out."""
    shutil.copytree(folder, target)
    for part, values in changes.items():
        names = {"": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
        file = target / names.get(part, f"{part}/config.json")
        config = json.loads(file.read_text()) | values
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return target


@pytest.fixture(scope="module")
def pipelines(tiny_sdxl, tmp_path_factory):
    """The pipeline of each variant, in diffusers' hands."""
    folders = {k: changed(tiny_sdxl, tmp_path_factory.mktemp("variants") / k, c) for k, c in VARIANTS.items()}
    return {k: StableDiffusionXLPipeline.from_pretrained(folder) for k, folder in folders.items()}


@pytest.fixture(scope="module")
def families(pipelines):
    return {k: SDXL(pretrained_model_name_or_path=str(pipe.config._name_or_path)) for k, pipe in pipelines.items()}


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines["epsilon"]


@pytest.fixture(scope="module")
def family(families):
    return families["epsilon"]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("args"))
    return DiffusionTrainingArguments(output_dir=folder, use_cpu=True, weighting_scheme="none")


@pytest.fixture(scope="module")
def batch(pipeline):
    """Latents of two non-square images, the pipeline's own text embeddings, sizes, crops, and a mask."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(torch.rand(2, 3, 48, 32, generator=rng) * 2 - 1).latent_dist.mode()
        embeds, _, pooled, _ = pipeline.encode_prompt(["a line plot", "two red bars"])
    return {
        "latents": latents,
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "time_ids": torch.tensor(TIME_IDS),
        "loss_mask": torch.randint(0, 256, (2, 12, 8), generator=rng, dtype=torch.uint8),
    }


@pytest.fixture(scope="module")
def noise(batch):
    return torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))


def reference_loss(model, pipeline, batch, noise, *, min_snr_gamma=None):
    """The step with the pipeline's helpers and a DDPM scheduler made of its scheduler's configuration."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    vae, kind = pipeline.vae.config, scheduler.config.prediction_type
    latents = batch["latents"]
    if vae.latents_mean is not None:
        mean, std = torch.tensor(vae.latents_mean), torch.tensor(vae.latents_std)
        latents = (latents - mean.reshape(1, 4, 1, 1)) / std.reshape(1, 4, 1, 1)
    latents = latents * vae.scaling_factor
    sizes = batch["time_ids"].tolist()
    ids = [pipeline._get_add_time_ids(s[:2], s[2:4], s[4:], torch.float32, batch["pooled_prompt_embeds"].shape[1])
           for s in map(tuple, sizes)]  # fmt: skip
    prediction = model(
        scheduler.add_noise(latents, noise, TIMESTEPS),
        TIMESTEPS,
        batch["prompt_embeds"],
        added_cond_kwargs={"text_embeds": batch["pooled_prompt_embeds"], "time_ids": torch.cat(ids)},
    ).sample
    velocity = scheduler.get_velocity(latents, noise, TIMESTEPS)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]
    snr = compute_snr(scheduler, TIMESTEPS)
    least = snr.clamp(max=min_snr_gamma or torch.inf)
    weight = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    mask = batch["loss_mask"].float().unsqueeze(1)
    losses = [(m * (p - t) ** 2).sum() / (4 * m.sum()) for m, p, t in zip(mask, prediction, target, strict=True)]
    return torch.stack(losses) * (1 if min_snr_gamma is None else weight)


class Changed(torch.nn.Module):
    """The network, called with something else than it was given: a mistake in the call."""

    def __init__(self, model, **changes):
        super().__init__()
        self.model, self.changes = model, changes

    def forward(self, *, added_cond_kwargs, **inputs):
        given = inputs | added_cond_kwargs
        given |= {name: change(given[name]) for name, change in self.changes.items()}
        added = {name: given.pop(name) for name in added_cond_kwargs}
        return self.model(**given, added_cond_kwargs=added)


def differs(family, model, pipeline, batch, args, noise, *, changes=None, ours=None) -> float:
    """Largest difference of loss and gradients to the reference, in roundings."""
    network = Changed(model, **changes) if changes else model
    return roundings(
        lambda: family.compute_loss(network, batch if ours is None else ours, args, noise=noise, levels=TIMESTEPS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, min_snr_gamma=args.min_snr_gamma),
        model,
    )


@pytest.mark.promise("E11")
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_diffusers(variant, gamma, families, pipelines, batch, args, noise):
    family = families[variant]
    options = dataclasses.replace(args, min_snr_gamma=gamma)
    model = with_adapter(family)
    assert differs(family, model, pipelines[variant], batch, options, noise) < FEW
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) > 40 and all(gradient.any() for gradient in gradients)


def _mixed_by(scales):
    """`GivenSchedule.mixture` with other scales of signal and noise, made of alpha_bar (B,)."""
    return "mixture", lambda process, timesteps: scales(process.alpha_bar_at(timesteps))


MISTAKES = {
    "noise with the wrong sign": ("target", lambda process, latents, noise, t: -noise),
    "velocity as target": ("target", lambda process, latents, noise, t: noise - latents),
    "signal and noise swapped": _mixed_by(lambda a: ((1 - a).sqrt(), a.sqrt())),
    "no square roots": _mixed_by(lambda a: (a, 1 - a)),
    "Euler's mixture": _mixed_by(lambda a: (torch.ones_like(a), ((1 - a) / a).sqrt())),
    "weight of min-SNR forgotten": ("weight", lambda process, t, **_: torch.ones(len(t))),
    "weight of v": ("weight", lambda process, t, **_: (5 * (1 - (a := process.alpha_bar_at(t)))).minimum(a)),
}
WRONG_INPUTS = {
    "timestep in [0, 1]": {"timestep": lambda t: t / 1000},
    "timestep one too high": {"timestep": lambda t: t + 1},
    "height and width swapped": {"time_ids": lambda ids: ids[:, [1, 0, 3, 2, 5, 4]]},
    "crop before size": {"time_ids": lambda ids: ids[:, [2, 3, 0, 1, 4, 5]]},
    "crop forgotten": {"time_ids": lambda ids: ids * torch.tensor([1, 1, 0, 0, 1, 1])},
    "sizes in latents": {"time_ids": lambda ids: ids / 4},
    "pooled text zeroed": {"text_embeds": torch.zeros_like},
    "pooled text of the other sample": {"text_embeds": lambda text: text.flip(0)},
    "text encoders swapped": {"encoder_hidden_states": lambda text: text.roll(8, -1)},
    "no text": {"encoder_hidden_states": torch.zeros_like},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, monkeypatch, family, pipeline, batch, args, noise):
    monkeypatch.setattr(GivenSchedule, *MISTAKES[name])
    options = dataclasses.replace(args, min_snr_gamma=5.0)
    assert differs(family, with_adapter(family, lora_layers="attention"), pipeline, batch, options, noise) > MANY


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_parity_catches_wrong_inputs(name, family, pipeline, batch, args, noise):
    changes = WRONG_INPUTS[name]
    assert (
        differs(family, with_adapter(family, lora_layers="attention"), pipeline, batch, args, noise, changes=changes)
        > MANY
    )


def test_parity_catches_mask_and_checkpoint(monkeypatch, family, pipeline, batch, args, noise, tiny_sdxl, tmp_path):
    model = with_adapter(family, lora_layers="attention")
    plain = {name: value for name, value in batch.items() if name != "loss_mask"}
    for wrong in (plain, batch | {"loss_mask": batch["loss_mask"].flip(1)}):
        assert differs(family, model, pipeline, batch, args, noise, ours=wrong) > MANY
    linear = changed(tiny_sdxl, tmp_path / "linear", {"scheduler": {"beta_schedule": "linear"}})
    assert differs(SDXL(pretrained_model_name_or_path=str(linear)), model, pipeline, batch, args, noise) > MANY
    monkeypatch.setattr(SDXL, "normalise", lambda self, latents: latents)
    assert differs(family, model, pipeline, batch, args, noise) > MANY


@pytest.mark.promise("A07")
def test_latent_statistics_of_a_vae_that_has_them(families, batch):
    family, vae = families["statistics"], VARIANTS["statistics"]["vae"]
    scale, (mean, std) = family.config("vae")["scaling_factor"], family.latent_statistics()
    assert mean.flatten().tolist() == pytest.approx(vae["latents_mean"])
    assert std.flatten().tolist() == pytest.approx([value / scale for value in vae["latents_std"]])
    torch.testing.assert_close((batch["latents"] - mean) / std, family.clean_latents(batch))


class Spy(torch.nn.Module):
    """Stands for the network: gives one answer and keeps what it is given."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight, self.seen = answer, torch.nn.Parameter(torch.zeros(())), []

    def forward(self, **inputs):
        self.seen.append(inputs)
        return (self.answer + self.weight,)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", ["mse", "l1", "huber"])
def test_perfect_model_has_zero_loss(variant, loss_type, families, pipelines, batch, args, noise):
    family, scheduler = families[variant], DDPMScheduler.from_config(pipelines[variant].scheduler.config)
    latents = family.normalise(batch["latents"])
    velocity = scheduler.get_velocity(latents, noise, TIMESTEPS)
    target = {"v": velocity, "sample": latents}.get(variant, noise)
    options = dataclasses.replace(args, loss_type=loss_type, min_snr_gamma=5.0)
    spy = Spy(target)
    loss, levels = family.compute_loss(spy, batch, options, noise=noise, levels=TIMESTEPS)
    assert loss.max() < 1e-6 and loss.shape == (2,) and loss.dtype == levels.dtype == torch.float32
    assert torch.equal(levels, TIMESTEPS.float()) and len(spy.seen) == 1
    assert (family.compute_loss(Spy(-target), batch, options, noise=noise, levels=TIMESTEPS)[0] > 0.01).all()


def test_without_sizes_images_count_as_uncropped(family, batch, args, noise):
    spy = Spy(noise)
    without = {name: value for name, value in batch.items() if name != "time_ids"}
    family.compute_loss(spy, without, args, noise=noise, levels=TIMESTEPS)
    family.compute_loss(spy, batch, args, noise=noise, levels=TIMESTEPS)
    given = [inputs["added_cond_kwargs"]["time_ids"].tolist() for inputs in spy.seen]
    assert given == [[[48, 32, 0, 0, 48, 32]] * 2, [list(ids) for ids in TIME_IDS]]


def test_bfloat16_keeps_timesteps_and_sizes_exact(family, batch, args, noise):
    model = family.load_model(dtype=torch.bfloat16)
    seen = {}
    model.register_forward_pre_hook(lambda m, a, k: seen.update(k | k["added_cond_kwargs"]), with_kwargs=True)
    sizes = batch | {"time_ids": batch["time_ids"] + 1000}
    loss, _ = family.compute_loss(model, sizes, args, noise=noise, levels=TIMESTEPS)
    assert torch.equal(seen["timestep"], TIMESTEPS) and torch.equal(seen["time_ids"].long(), sizes["time_ids"])
    assert seen["sample"].dtype == seen["text_embeds"].dtype == torch.bfloat16 and loss.dtype == torch.float32
    full = family.compute_loss(family.load_model(dtype=torch.float32), sizes, args, noise=noise, levels=TIMESTEPS)[0]
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)


def test_levels_are_whole_uniform_and_keyed(family, batch, args):
    keys = noise_keys(3, 0, range(4000))
    levels = family.sample_levels(keys, args, 96)
    assert levels.dtype == torch.int64 and levels.min() >= 0 and levels.max() <= 999
    assert torch.histc(levels.float(), 10, 0, 1000).sub(400).abs().max() < 80
    assert torch.equal(family.sample_levels(keys[7:9], args, 24), levels[7:9])
    assert family.evaluation_levels(4).tolist() == [125, 375, 625, 875]
    spy = Spy(torch.zeros_like(batch["latents"]))
    both = [family.compute_loss(spy, batch | {"noise_key": noise_keys(3, e, [0, 1])}, args) for e in (0, 0, 1)]
    assert torch.equal(both[0][0], both[1][0]) and not torch.equal(both[0][1], both[2][1])
    one = {name: value[1:] for name, value in batch.items()} | {"noise_key": noise_keys(3, 0, [1])}
    torch.testing.assert_close(family.compute_loss(Spy(spy.answer[1:]), one, args)[0], both[0][0][1:])


def test_options_of_flow_matching(family, args, caplog):
    sdxl.check_density.cache_clear()
    keys = torch.arange(3)
    for name, value in (("weighting_scheme", "cosmap"), ("weighting_scheme", "mode"), ("timestep_shift", "3.0")):
        with pytest.raises(SciflowError, match=f"`{name}` '{value}' is for flow matching"):
            family.sample_levels(keys, dataclasses.replace(args, **{name: value}), 96)
    family.sample_levels(keys, args, 96)
    assert not caplog.records
    for _ in range(2):
        family.sample_levels(keys, dataclasses.replace(args, weighting_scheme="logit_normal"), 96)
    assert len(caplog.records) == 1 and "uniformly" in caplog.text


PROMPTS = ["a line plot", "", "Scatter plot of 3 groups: velocity against dose. " * 9, "naïve µm 5"]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[1:2], PROMPTS[2:3], PROMPTS])
def test_prompts_equal_the_pipeline(prompts, family, pipeline):
    encoders = family.load_text_encoder(device="cpu", dtype=torch.float32)
    ours = family.encode_prompts(prompts, encoders)
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(prompts)
    assert torch.equal(ours["prompt_embeds"], embeds) and torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert embeds.shape == (len(prompts), 77, 20) and encoders.unet is None and encoders.vae is None
    inputs = family.pipeline_inputs(ours, family.unconditional(family.encode_prompts([""], encoders)))
    assert not negative.any() and not inputs["negative_prompt_embeds"].any()
    assert not negative_pooled.any() and not inputs["negative_pooled_prompt_embeds"].any()


def test_guidance_from_the_empty_prompt_where_the_pipeline_has_it(tiny_sdxl, tmp_path):
    folder = changed(tiny_sdxl, tmp_path / "empty", {"": {"force_zeros_for_empty_prompt": False}})
    family = SDXL(pretrained_model_name_or_path=str(folder))
    _, negative, _, pooled = StableDiffusionXLPipeline.from_pretrained(folder).encode_prompt("a plot")
    inputs = family.encode_validation_prompts(["a plot"], device="cpu", dtype=torch.float32)[0]
    assert negative.any()
    torch.testing.assert_close(inputs["negative_prompt_embeds"], negative)
    torch.testing.assert_close(inputs["negative_pooled_prompt_embeds"], pooled)


def test_fewer_tokens(tiny_sdxl, family):
    short = dataclasses.replace(family, max_sequence_length=9)
    embeds = short.encode_prompts(["a line plot"], short.load_text_encoder(device="cpu", dtype=torch.float32))
    long = family.encode_prompts(["a line plot"], family.load_text_encoder(device="cpu", dtype=torch.float32))
    assert embeds["prompt_embeds"].shape[1] == 9
    torch.testing.assert_close(embeds["prompt_embeds"], long["prompt_embeds"][:, :9])  # CLIP looks back only
    for length in (2, 78):
        with pytest.raises(SciflowError, match=f"`max_sequence_length` {length}.*3 to 77"):
            dataclasses.replace(family, max_sequence_length=length).load_text_encoder(device="cpu", dtype=torch.float32)


def test_images_and_bucket_step(family, pipeline):
    encoders = family.load_encoders(device="cpu", dtype=torch.bfloat16, text=False)
    assert encoders.vae.dtype == torch.float32 and encoders.text_encoder is None  # `force_upcast`
    images = torch.rand(1, 3, 48, 32) * 2 - 1
    posterior = pipeline.vae.encode(images).latent_dist
    ours = family.encode_images(images, encoders)
    assert torch.equal(ours["latents"], posterior.mean) and torch.equal(ours["latents_std"], posterior.std)
    assert list(dataclasses.replace(family, posterior="mode").encode_images(images, encoders)) == ["latents"]
    assert family.bucket_step() == pipeline.vae_scale_factor * 2 == 8


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("scheduler", {"beta_schedule": None}, "its scheduler has no `beta_schedule`"),
        ("scheduler", {"beta_schedule": "laplace"}, "`beta_schedule` in its scheduler configuration is 'laplace'"),
        ("scheduler", {"prediction_type": None}, "has no `prediction_type`"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "'epsilon' or 'v_prediction'"),
        ("scheduler", {"num_train_timesteps": None}, "has no `num_train_timesteps`"),
        ("vae", {"scaling_factor": None}, "its vae has no `scaling_factor`"),
        ("vae", {"shift_factor": 0.1}, "`shift_factor`"),
        ("unet", {"addition_embed_type": None}, "its unet has no `addition_embed_type`"),
        ("unet", {"in_channels": 9}, "`in_channels` in its unet configuration is 9"),
        ("", {"requires_aesthetics_score": True}, "`requires_aesthetics_score`"),
    ],
)
def test_checkpoints_that_are_not_sdxl_are_named(part, values, words, tiny_sdxl, tmp_path):
    family = SDXL(pretrained_model_name_or_path=str(changed(tiny_sdxl, tmp_path / "other", {part: values})))
    with pytest.raises(SciflowError, match=words) as caught:
        family.load_model(dtype=torch.float32)
    assert "pretrained_model_name_or_path" in str(caught.value)


def test_samples_that_do_not_fit_are_named(family, batch, caplog):
    model = family.load_model(dtype=torch.float32)
    good = {name: value[0] for name, value in batch.items()}
    good["latents_std"] = good["latents"].exp()
    family.check_sample(model, good)
    assert not caplog.records
    family.check_sample(model, {name: value for name, value in good.items() if name != "time_ids"})
    assert "time_ids" in caplog.text
    for key, value, words in (
        ("latents", torch.zeros(16, 12, 8), r"\(4, h, w\)"),
        ("prompt_embeds", torch.zeros(77, 8), r"`prompt_embeds` \(77, 8\).*\(L, 20\)"),
        ("pooled_prompt_embeds", torch.zeros(8), r"takes \(12\)"),
        ("time_ids", torch.zeros(5), "original height"),
        ("pooled_prompt_embeds", None, "needs.*pooled_prompt_embeds"),
        ("latents_std", None, "--posterior sample"),
    ):
        bad = {name: v for name, v in (good | {key: value}).items() if v is not None}
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, bad)
