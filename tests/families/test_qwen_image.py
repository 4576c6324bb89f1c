"""Qwen-Image's step against diffusers' own pipeline helpers, and against closed forms."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from parity import FEW, MANY, roundings

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_parameters
from sciflow_hf.data.batches.loader import collate
from sciflow_hf.demo import make_tiny
from sciflow_hf.diffusion.losses import flow_weight
from sciflow_hf.diffusion.randomness import noise_keys
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.qwen_image import QwenImage
from sciflow_hf.options import read_yaml

SIGMAS = torch.tensor([0.35, 0.8, 0.6])
PROMPTS = ["a line plot with two blue curves", "", "red bars"]  # three lengths
HEIGHT, WIDTH = 48, 32


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """Folder of the smallest Qwen-Image pipeline; a token is 8x8 pixels, `bucket_step` 8. Read only."""
    return make_tiny(tmp_path_factory.mktemp("qwen") / "tiny", "qwen_image", size="test")


@pytest.fixture(scope="module")
def pipeline(tiny_qwen):
    pipeline = QwenImagePipeline.from_pretrained(tiny_qwen)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def family(tiny_qwen):
    return QwenImage(pretrained_model_name_or_path=str(tiny_qwen), max_sequence_length=64)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none")


@pytest.fixture(scope="module")
def batch(pipeline):
    """Latents (3, 4, 1, 12, 8) of non-square images, texts of three lengths under the pipeline's mask."""
    pixel_values = torch.rand(3, 3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixel_values).latent_dist.mode()
        prompt_embeds, mask = pipeline.encode_prompt(PROMPTS)
    return {"latents": latents, "prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask.bool()}


@pytest.fixture(scope="module")
def noise(batch):
    return torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(family):
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=4, lora_alpha=8), family=family, seed=1)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:  # B starts at zero, which would hide errors in A's gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def reference_loss(model, pipeline, batch, noise, sigmas, change=None):
    """The step by the pipeline's helpers and the scheduler's own mixing, per sample; `change` spoils one thing."""

    def spoilt(name, value):
        return value if change is None or name not in change else change[name](value)

    def pack(x):
        return spoilt("pack", QwenImagePipeline._pack_latents)(x, len(x), x.shape[1], *x.shape[-2:])

    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    normalise = spoilt("normalise", lambda raw, mean, std: (raw - mean) / std)
    latents = normalise(batch["latents"], mean, std)

    scheduler = FlowMatchEulerDiscreteScheduler()  # 1000 unshifted levels: sigma = timestep / 1000
    noisy = scheduler.scale_noise(latents, sigmas * 1000, noise)
    factor = pipeline.vae_scale_factor
    prediction = model(
        hidden_states=pack(noisy),
        timestep=spoilt("timestep", sigmas * 1000 / 1000),
        encoder_hidden_states=spoilt("text", batch["prompt_embeds"]),
        encoder_hidden_states_mask=spoilt("mask", batch["prompt_embeds_mask"]),
        img_shapes=[[spoilt("shape", (1, HEIGHT // factor // 2, WIDTH // factor // 2))]] * len(latents),
        return_dict=False,
    )[0]
    target = pack(spoilt("target", noise - latents))
    return torch.stack([torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)])


@pytest.mark.promise("A29")
def test_loss_and_every_gradient_equal_diffusers(family, model, pipeline, batch, args, noise):
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: reference_loss(model, pipeline, batch, noise, SIGMAS),
        model,
    )
    assert difference < FEW
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == adapter_parameters(model).keys()
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("no_adapter", [False, True])
def test_every_trained_parameter_takes_part(no_adapter, family, batch, args, noise):
    """DistributedDataParallel needs it; what the last block makes of its text is read by nothing."""
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=2, no_adapter=no_adapter), family=family)
    family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0].mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    ends = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp")
    assert family.idle_layers(model) == tuple(f"transformer_blocks.1.{end}" for end in ends)


def _columns(x, *_):
    return QwenImagePipeline._pack_latents(x.transpose(-1, -2), len(x), x.shape[1], x.shape[-1], x.shape[-2])


def _pixels_first(x, *sizes):
    """Channels in the order (ph, pw, c)."""
    packed = QwenImagePipeline._pack_latents(x, *sizes)
    return packed.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


MISTAKES = {
    "normalisation left out": {"normalise": lambda _: lambda raw, mean, std: raw},
    "multiplied by the deviation": {"normalise": lambda _: lambda raw, mean, std: (raw - mean) * std},
    "mean left out": {"normalise": lambda _: lambda raw, mean, std: raw / std},
    "wrong sign": {"target": torch.neg},
    "timestep times 1000": {"timestep": lambda t: t * 1000},
    "timestep reversed": {"timestep": lambda t: 1 - t},
    "mask ignored": {"mask": lambda m: None},
    "mask of another sample": {"mask": lambda m: m.roll(1, 0)},
    "text shifted by a token": {"text": lambda e: e.roll(1, 1)},
    "text of another sample": {"text": lambda e: e.roll(1, 0)},
    "height and width swapped": {"shape": lambda s: (s[0], s[2], s[1])},
    "shape before packing": {"shape": lambda s: (1, 2 * s[1], s[2] // 2)},
    "packed by columns": {"pack": lambda _: _columns},
    "packed in another channel order": {"pack": lambda _: _pixels_first},
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_catches(name, family, model, pipeline, batch, args, noise):
    difference = roundings(
        lambda: reference_loss(model, pipeline, batch, noise, SIGMAS, MISTAKES[name]),
        lambda: reference_loss(model, pipeline, batch, noise, SIGMAS),
        model,
    )
    assert difference > MANY


def test_three_prompt_lengths_have_the_mean_of_three_single_losses(family, model, batch, args, noise):
    lengths = batch["prompt_embeds_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3

    def together(batch=batch):
        return family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0]

    def alone():
        losses = []
        for i, length in enumerate(lengths):
            row = slice(i, i + 1)
            one = {"latents": batch["latents"][row], "prompt_embeds": batch["prompt_embeds"][row, :length]}
            losses.append(family.compute_loss(model, one, args, noise=noise[row], levels=SIGMAS[row])[0])
        return torch.cat(losses)

    assert roundings(together, alone, model) < FEW
    # The loader's own padding is the pipeline's.
    rows = [
        {"latents": batch["latents"][i, :, 0], "prompt_embeds": batch["prompt_embeds"][i, :length]}
        for i, length in enumerate(lengths)
    ]
    assert torch.equal(together(collate(rows, pads_text=True)), together())
    unmasked = {name: value for name, value in batch.items() if name != "prompt_embeds_mask"}
    assert abs(together(unmasked)[1].item() / together()[1].item() - 1) > 1e-3


class _Spy(torch.nn.Module):
    """Stands for the network: answers with `answer(hidden_states)` and keeps what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight, self.seen = answer, torch.nn.Parameter(torch.zeros(())), []

    def forward(self, hidden_states, **kwargs):
        self.seen.append(kwargs | {"hidden_states": hidden_states})
        return (self.answer(hidden_states) + self.weight,)


def test_the_network_is_called_once_with_sigma_itself(family, pipeline, batch, args, noise):
    spy = _Spy(torch.zeros_like)
    loss, levels = family.compute_loss(spy, batch | {"prompt_embeds_mask": None}, args, noise=noise, levels=SIGMAS)
    (seen,) = spy.seen
    assert torch.equal(seen["timestep"], SIGMAS) and seen["timestep"].dtype == torch.float32
    assert torch.equal(levels, SIGMAS) and loss.dtype == levels.dtype == torch.float32
    assert seen["img_shapes"] == [[(1, 6, 4)]] * 3 and seen["encoder_hidden_states_mask"] is None
    target = noise[:, :, 0] - family.clean_latents(batch)
    torch.testing.assert_close(loss, target.flatten(1).square().mean(1))
    # A cache's latents have no axis of frames: the same step.
    flat, _ = family.compute_loss(spy, batch | {"latents": batch["latents"][:, :, 0]}, args, noise=noise, levels=SIGMAS)
    assert torch.equal(flat, loss)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
@pytest.mark.parametrize("loss_type", ["mse", "l1", "huber"])
def test_perfect_model_has_zero_loss(scheme, loss_type, family, batch, args, noise):
    options = dataclasses.replace(args, weighting_scheme=scheme, loss_type=loss_type)
    velocity = family.pack(noise[:, :, 0] - family.clean_latents(batch))
    loss, _ = family.compute_loss(_Spy(lambda x: velocity), batch, options, noise=noise, levels=SIGMAS)
    assert torch.equal(loss, torch.zeros(3))
    loss, _ = family.compute_loss(_Spy(lambda x: -velocity), batch, options, noise=noise, levels=SIGMAS)
    assert (loss > 0.1).all()


def test_masked_loss_is_the_weighted_mean_over_the_picture(family, pipeline, batch, args, noise):
    """Pixel by pixel in the picture's own layout, which diffusers' helper unpacks."""
    rng = torch.Generator().manual_seed(2)
    mask = torch.randint(0, 256, (3, 12, 8), generator=rng, dtype=torch.uint8)  # no 2x2 patch of it is constant
    answer = torch.randn(3, 24, 16, generator=rng)
    options = dataclasses.replace(args, weighting_scheme="cosmap")
    step = {"noise": noise, "levels": SIGMAS}
    loss, _ = family.compute_loss(_Spy(lambda x: answer), batch | {"loss_mask": mask}, options, **step)
    prediction = QwenImagePipeline._unpack_latents(answer, HEIGHT, WIDTH, pipeline.vae_scale_factor)
    error = (prediction - noise)[:, :, 0] + family.clean_latents(batch)
    error = error.square()  # (B, C, h, w)
    weights = mask[:, None].double()
    expected = (weights * error).sum((1, 2, 3)) / (4 * weights.sum((1, 2, 3)))
    expected = expected * flow_weight(SIGMAS, weighting_scheme="cosmap")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    for other in ({}, {"loss_mask": mask.flip(2)}, {"loss_mask": mask.transpose(1, 2).reshape(3, 12, 8)}):
        changed, _ = family.compute_loss(_Spy(lambda x: answer), batch | other, options, **step)
        assert float((changed / loss - 1).abs().max().detach()) > 1e-2


def test_noise_and_levels_come_from_the_keys(family, batch, args):
    keys = noise_keys(3, 0, range(3))
    spy = _Spy(torch.zeros_like)
    first, levels = family.compute_loss(spy, batch | {"noise_key": keys}, args)
    again, _ = family.compute_loss(spy, batch | {"noise_key": keys}, args)
    other, other_levels = family.compute_loss(spy, batch | {"noise_key": noise_keys(3, 1, range(3))}, args)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(levels, other_levels)
    one = {name: value[1:2] for name, value in batch.items()} | {"noise_key": keys[1:2]}
    torch.testing.assert_close(family.compute_loss(spy, one, args)[0], first[1:2])


def test_resolution_shift_is_the_samplers(family, pipeline, args):
    config = pipeline.scheduler.config
    for length in (24, 256, 4096, 8192):
        mu = calculate_shift(
            length, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        assert family.resolution_mu(length) == pytest.approx(mu, abs=1e-9)
    assert [family.resolution_mu(n) for n in (256, 8192)] == pytest.approx([0.5, 0.9])  # the published scheduler's
    keys = torch.arange(2000)
    plain = family.sample_levels(keys, dataclasses.replace(args, timestep_shift="none"), 4096)
    ours = family.sample_levels(keys, args, 4096)
    theirs = pipeline.scheduler.time_shift(family.resolution_mu(4096), 1.0, plain.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    assert float(ours.mean() - plain.mean()) > 0.1  # forgotten, it would show


def test_the_step_asks_for_the_shift_of_its_image(family, batch, args):
    keys = noise_keys(0, 0, range(3))
    spy = _Spy(torch.zeros_like)
    _, levels = family.compute_loss(spy, batch | {"noise_key": keys}, args)
    assert torch.equal(levels, family.sample_levels(keys, args, 24))
    assert not torch.equal(levels, family.sample_levels(keys, args, 96))  # 12 x 8 pixels before packing


def test_bfloat16_keeps_sigma_in_float32(family, batch, args, noise):
    model = family.load_model(dtype=torch.bfloat16)
    seen = {}
    model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    loss, levels = family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)
    assert seen["timestep"].dtype == torch.float32 and seen["hidden_states"].dtype == torch.bfloat16
    assert loss.dtype == levels.dtype == torch.float32
    full = family.compute_loss(family.load_model(dtype=torch.float32), batch, args, noise=noise, levels=SIGMAS)[0]
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)


@pytest.mark.promise("B22")
def test_samples_that_do_not_fit_are_named(family):
    model = family.load_model(dtype=torch.float32)
    good = {"latents": torch.zeros(4, 12, 8), "latents_std": torch.zeros(4, 12, 8), "prompt_embeds": torch.zeros(5, 16)}
    family.check_sample(model, good)
    family.check_sample(model, good | {"latents": torch.zeros(4, 1, 12, 8), "latents_std": torch.zeros(4, 1, 12, 8)})
    family.check_sample(model, good | {"prompt_embeds_mask": torch.tensor([1, 1, 1, 0, 0])})
    for key, value, words in (
        ("latents", torch.zeros(5, 12, 8), r"`latents` \(5, 12, 8\): `qwen_image` takes \(4, h, w\)"),
        ("latents", torch.zeros(4, 2, 12, 8), "`latents`"),
        ("latents", torch.zeros(4, 11, 8), "even h"),
        ("latents_std", torch.zeros(4, 8, 12), "`latents_std`"),
        ("loss_mask", torch.zeros(6, 4, dtype=torch.uint8), "`loss_mask`"),
        ("prompt_embeds", torch.zeros(5, 17), r"`prompt_embeds` \(5, 17\).*\(L, 16\)"),
        ("prompt_embeds_mask", torch.ones(4), "`prompt_embeds_mask`"),
        ("prompt_embeds_mask", torch.zeros(5), "`prompt_embeds_mask`.*not all 0"),
    ):
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, good | {key: value})
    for key, words in (("latents_std", "posterior"), ("prompt_embeds", r"needs \['prompt_embeds'\]")):
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, {name: value for name, value in good.items() if name != key})


def test_later_weights_take_the_same_step(tiny_qwen, tmp_path, family, batch, args, noise):
    """Qwen-Image-2512: the configuration of its network also names what it does not have."""
    copy = shutil.copytree(tiny_qwen, tmp_path / "later")
    options = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    spoil(copy, "transformer", **dict.fromkeys(options, False))
    later = QwenImage(pretrained_model_name_or_path=str(copy), max_sequence_length=64)
    losses = [
        kind.compute_loss(kind.load_model(dtype=torch.float32), batch, args, noise=noise, levels=SIGMAS)[0]
        for kind in (family, later)
    ]
    assert torch.equal(*losses)
    configs = Path(sf.__file__).parents[1] / "recipes" / "configs"
    for name in ("qwen_image_2512_lora", "qwen_image_2512_24gb_lora"):
        named = read_yaml(configs / f"{name}.yaml")
        assert named["pretrained_model_name_or_path"] == "Qwen/Qwen-Image-2512"
        assert bool(named.get("offload")) == ("24gb" in name) and named["activation_checkpointing"]


def spoil(folder, part, **options):
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    content = json.loads(file.read_text()) | options
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_checkpoints_that_lack_something_are_named(tiny_qwen, tiny_klein, tmp_path, batch, args, noise):
    def family_of(part, **options):
        copy = shutil.copytree(tiny_qwen, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        spoil(copy, part, **options)
        return QwenImage(pretrained_model_name_or_path=str(copy))

    for name, value in (("latents_mean", None), ("latents_std", [1.0, 2.0])):
        with pytest.raises(SciflowError, match=f"`z_dim` 4 and {len(value or [])} numbers in `{name}`"):
            family_of("vae", **{name: value}).compute_loss(_Spy(torch.zeros_like), batch, args)
    for option in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
        with pytest.raises(SciflowError, match=f"`{option}` in its transformer's configuration"):
            family_of("transformer", **{option: True}).load_model(dtype=torch.float32)
    with pytest.raises(SciflowError, match="holds a Flux2Transformer2DModel, but `qwen_image`"):
        QwenImage(pretrained_model_name_or_path=str(tiny_klein)).load_model(dtype=torch.float32, meta=True)
    with pytest.raises(SciflowError, match="cannot load its pipeline configuration"):
        QwenImage(pretrained_model_name_or_path=str(tmp_path / "nowhere")).load_model(dtype=torch.float32)
    for length in (0, 1025):
        with pytest.raises(SciflowError, match=f"`max_sequence_length` {length}"):
            QwenImage(pretrained_model_name_or_path="x", max_sequence_length=length)
    # A scheduler that names no line: the pipeline's own default.
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    plain = family_of("scheduler", **dict.fromkeys(names))
    assert plain.resolution_mu(4096) == pytest.approx(calculate_shift(4096))
