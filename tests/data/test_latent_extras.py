"""What comes with latents: a mask that weighs the loss, and the deviation of the VAE's posterior."""

import dataclasses

import pytest
import torch
from diffusers import Flux2KleinPipeline

from sciflow_hf.diffusion.losses import LOSSES, flow_weight, sample_loss
from sciflow_hf.errors import SciflowError
from sciflow_hf.families import base
from sciflow_hf.families.flux2_klein import Flux2Klein
from sciflow_hf.training.arguments import DiffusionTrainingArguments

SIGMAS = torch.tensor([0.35, 0.8])


@pytest.fixture(scope="module")
def family(tiny_klein):
    return Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=24)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return DiffusionTrainingArguments(output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True)


@pytest.fixture(scope="module")
def batch():
    """Latents (2, 4, 12, 8): neither square nor one patch wide."""
    rng = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 4, 12, 8, generator=rng),
        "prompt_embeds": torch.randn(2, 5, 48, generator=rng),
        # No 2x2 patch of it is constant.
        "loss_mask": torch.randint(0, 256, (2, 12, 8), generator=rng, dtype=torch.uint8),
    }


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(5))


class _Network(torch.nn.Module):
    """Answers with one parameter for every number of the prediction."""

    def __init__(self):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden_states, **kwargs):
        return (self.answer,)


ERRORS = {"mse": lambda d: d**2, "l1": torch.abs, "huber": lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)}


def by_hand(family, batch, noise, answer, loss_type):
    """The weighted mean in the picture's own layout: diffusers' helpers undo patches, a loop adds pixel by pixel."""
    latents = family.normalise(Flux2KleinPipeline._patchify_latents(batch["latents"]))
    prediction = answer.transpose(1, 2).reshape(noise.shape)
    error = ERRORS[loss_type](Flux2KleinPipeline._unpatchify_latents(prediction - (noise - latents)))
    losses = []
    for sample, mask in zip(error, batch["loss_mask"].tolist(), strict=True):
        total = weights = 0.0
        for y, line in enumerate(mask):
            for x, weight in enumerate(line):
                total = total + weight * sample[:, y, x].sum()
                weights += weight * sample.shape[0]
        losses.append(total / weights if weights else 0 * total)
    return torch.stack(losses)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_masked_loss_is_the_weighted_mean_over_the_picture(loss_type, family, args, batch, noise):
    options = dataclasses.replace(args, loss_type=loss_type, weighting_scheme="cosmap")
    network = _Network()
    loss, _ = family.compute_loss(network, batch, options, noise=noise, levels=SIGMAS)
    weight = flow_weight(SIGMAS, weighting_scheme="cosmap")
    expected = weight * by_hand(family, batch, noise, network.answer, loss_type)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(x.sum(), network.answer)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    # It matters: without the mask, or with it laid over the wrong way round, the loss is another.
    plain = {name: value for name, value in batch.items() if name != "loss_mask"}
    turned = batch | {"loss_mask": batch["loss_mask"].flip(2)}
    for other in (plain, turned):
        changed, _ = family.compute_loss(network, other, options, noise=noise, levels=SIGMAS)
        assert ((changed / loss - 1).abs() > 1e-3).all()


def test_mask_is_brought_through_the_patches_of_the_latents(monkeypatch, family, args, batch, noise):
    """The comparison above fails when the mask is averaged over patches, or repeated in the wrong channel order."""
    network = _Network()
    expected = by_hand(family, batch, noise, network.answer, "mse")
    patchify = base.patchify

    def averaged(latents):
        if latents.dtype != torch.uint8:
            return patchify(latents)
        return torch.nn.functional.avg_pool2d(latents.float(), 2).repeat_interleave(4, 1)

    def other_order(latents):
        patches = patchify(latents)
        if latents.dtype != torch.uint8:
            return patches
        return patches.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)

    options = dataclasses.replace(args, weighting_scheme="none")
    for wrong in (averaged, other_order):
        monkeypatch.setattr(base, "patchify", wrong)
        loss, _ = family.compute_loss(network, batch, options, noise=noise, levels=SIGMAS)
        assert ((loss / expected - 1).abs() > 1e-3).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_mask_of_ones_changes_nothing_and_none_is_the_old_mean(loss_type):
    rng = torch.Generator().manual_seed(2)
    pred, target = torch.randn(2, 3, 5, 7, generator=rng), torch.randn(2, 3, 5, 7, generator=rng)
    plain = sample_loss(pred, target, loss_type=loss_type)
    assert torch.equal(plain, ERRORS[loss_type](pred - target).flatten(1).mean(1))
    for value in (1, 7, 255):
        mask = torch.full(pred.shape, value, dtype=torch.uint8)
        torch.testing.assert_close(sample_loss(pred, target, loss_type=loss_type, mask=mask), plain)
    half = torch.zeros(pred.shape, dtype=torch.bool)
    half[:, :, :2] = True
    expected = sample_loss(pred[:, :, :2], target[:, :, :2], loss_type=loss_type)
    torch.testing.assert_close(sample_loss(pred, target, loss_type=loss_type, mask=half), expected)


def test_a_mask_of_zeros_gives_zero_and_no_gradient(family, args, batch, noise):
    mask = batch["loss_mask"].clone()
    mask[1] = 0
    network = _Network()
    loss, _ = family.compute_loss(network, batch | {"loss_mask": mask}, args, noise=noise, levels=SIGMAS)
    assert loss[0] > 0 and loss[1] == 0
    loss.mean().backward()
    assert network.answer.grad[0].any()
    assert torch.equal(network.answer.grad[1], torch.zeros(24, 16))


def test_large_masks_keep_their_sum(family):
    """1024 px: 2 million weights of 255."""
    loss = torch.full((1, 4096, 128), 3.0)
    mask = torch.full(loss.shape, 255, dtype=torch.uint8)
    assert sample_loss(loss, torch.zeros_like(loss), mask=mask).item() == pytest.approx(9, rel=1e-6)


# ---- posterior ----


def test_posterior_is_stored_as_mean_and_deviation(family):
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    drawn = dataclasses.replace(family, posterior="sample")
    encoders = drawn.load_encoders(device="cpu", dtype=torch.float32, text=False)
    stored = drawn.encode_images(images, encoders)
    with torch.no_grad():
        moments = encoders.vae.quant_conv(encoders.vae.encoder(images))
    mean, logvar = moments.chunk(2, dim=1)
    torch.testing.assert_close(stored["latents"], mean)
    torch.testing.assert_close(stored["latents_std"], (logvar / 2).exp())
    assert stored["latents_std"].shape == stored["latents"].shape == (2, 4, 8, 12)
    mode = family.encode_images(images, encoders)
    assert set(mode) == {"latents"} and torch.equal(mode["latents"], stored["latents"])


def test_only_what_is_asked_for_is_loaded(family):
    images = family.load_encoders(device="cpu", dtype=torch.float32, text=False)
    assert images.vae is not None and images.text_encoder is None and images.tokenizer is None
    assert images.transformer is None and not any(p.requires_grad for p in images.vae.parameters())


def test_mode_leaves_the_settings_of_a_cache_as_they_were(family):
    assert "posterior" not in family.encoder_settings()
    other = dataclasses.replace(family, posterior="sample").encoder_settings()
    assert other == family.encoder_settings() | {"posterior": "sample"}


def test_samples_that_do_not_fit_are_named(family):
    model = family.load_model(dtype=torch.float32)
    drawn = dataclasses.replace(family, posterior="sample")
    plain = {"latents": torch.zeros(4, 12, 8), "prompt_embeds": torch.zeros(5, 48)}
    whole = plain | {"latents_std": torch.ones(4, 12, 8), "loss_mask": torch.ones(12, 8, dtype=torch.uint8)}
    for one in (family, drawn):
        one.check_sample(model, whole)
    family.check_sample(model, plain)
    for one, sample, words in (
        (drawn, plain, "`posterior` 'sample'.*cache build --posterior sample"),
        (drawn, whole | {"latents_std": torch.ones(4, 8, 12)}, "`latents_std`"),
        (family, whole | {"loss_mask": torch.ones(8, 12)}, r"`loss_mask` \(8, 12\)"),
        (family, whole | {"loss_mask": torch.ones(4, 12, 8)}, "`loss_mask`"),
    ):
        with pytest.raises(SciflowError, match=words):
            one.check_sample(model, sample)
    with pytest.raises(SciflowError, match="`posterior` 'median': use one of mode, sample"):
        dataclasses.replace(family, posterior="median")
