"""The public `predict` of every family: shape and dtype of `clean_latents`, one call, nothing lost in `compare`."""

import pytest
import torch
from dits import SMALL, make_network
from family_steps import FAMILIES, with_adapter
from family_steps import Step as TinyStep

import sciflow_hf as sf
from sciflow_hf.diffusion.process import Noised
from sciflow_hf.diffusion.randomness import noise_keys

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DITS = {
    "dit_flow": {},
    "dit_v": {"objective": "ddpm", "prediction_type": "v_prediction"},
    "dit_sample": {"prediction_type": "sample"},
    "dit_variance": {"objective": "ddpm", "prediction_type": "epsilon", "learn_sigma": True},
}
NAMES = (*FAMILIES, "sd3_preconditioned", *DITS, "microscopy_unet")


@pytest.fixture(scope="module")
def folders(tiny_pipelines):
    return tiny_pipelines


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none")


def pixels(channels, seed):
    return torch.randn(2, channels, 8, 12, generator=torch.Generator().manual_seed(seed))


def published(name, folders, args):
    step = TinyStep(name.removesuffix("_preconditioned"), folders[name.removesuffix("_preconditioned")], args)
    if name != step.family.name:
        step.family.precondition_outputs = True
    return step.family, with_adapter(step.family), step.batch


def own_network(name):
    if name == "microscopy_unet":
        family = sf.MicroscopyUNet(block_out_channels=[8, 16])
        family.intensity, family.conditioning_intensity = {"low": [0.0]}, {"low": [0.0, 0.0]}
        batch = {"pixel_values": pixels(1, 0), "conditioning_pixel_values": pixels(2, 1)}
        return family, family.load_model(dtype=torch.float32), batch
    family = sf.DiT(**SMALL, **DITS[name])
    network = make_network(in_channels=3, image_size=(8, 12), learn_sigma=family.learn_sigma)
    return family, network, {"pixel_values": pixels(3, 0), "class_labels": torch.tensor([0, 3])}


@pytest.fixture(params=NAMES)
def step(request, folders, args):
    """(family, network, batch, and what a step mixes of it)."""
    name = request.param
    family, model, batch = published(name, folders, args) if name in folders or "_pre" in name else own_network(name)
    latents = family.clean_latents(batch)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    levels = family.evaluation_levels(4)[1:3]
    noisy, target = (made(latents, noise, levels) for made in (family.process.mix, family.process.target))
    return family, model, batch, Noised(latents, noise, noisy, levels, target)


@pytest.mark.promise("B01")
def test_prediction_has_the_shape_of_the_clean_latents(step):
    family, model, batch, (latents, _, noisy, levels, _) = step
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = family.predict(model, batch, noisy, levels)
    with torch.no_grad():
        again = family.predict(model, batch, noisy, levels)
    handle.remove()
    assert found.shape == latents.shape and found.dtype == latents.dtype == torch.float32 and len(calls) == 2
    assert found.requires_grad and not again.requires_grad and torch.equal(found, again)
    assert latents.ndim == 4 and set(batch) == set(step[2]) and not torch.equal(found[0], found[1])


def test_a_bfloat16_network_answers_in_float32(step):
    family, model, batch, (_, _, noisy, levels, _) = step
    full = family.predict(model, batch, noisy, levels)
    found = family.predict(model.to(torch.bfloat16), batch, noisy, levels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full, rtol=0.2, atol=0.2 * float(full.abs().max()))


def test_the_right_answer_has_no_loss(step, args):
    """What the process asks for compares to nothing, and anything else to more; the variance has a loss of its own."""
    family, _, batch, noised = step
    target = noised.target
    batch = batch | ({"variance_fraction": -torch.ones_like(target)} if getattr(family, "learn_sigma", False) else {})
    right, wrong = (family.compare(answer, noised, batch, args) for answer in (target, target + 0.5))
    assert right.shape == wrong.shape == (2,) and right.dtype == torch.float32
    assert (right < 1e-6).all() and (wrong > 0.01).all()


@pytest.mark.promise("A03")
def test_the_step_is_made_of_these_parts(step, args):
    """`compute_loss` is `compare` of `predict`, also where it draws noise and levels from the keys itself."""
    family, model, batch, noised = step
    loss, levels = family.compute_loss(model.eval(), batch, args, noise=noised.noise, levels=noised.levels)
    told = dict(batch)
    model_pred = family.predict(model, told, noised.noisy_latents, noised.levels)
    assert torch.equal(loss, family.compare(model_pred, noised, told, args))
    assert torch.equal(levels, noised.levels.float())
    keyed = batch | {"noise_key": noise_keys(0, 0, range(2))}
    one, two = (family.compute_loss(model, keyed, args)[0] for _ in range(2))
    assert torch.equal(one, two) and "noise_key" not in batch
    # Levels that a step returned can be given to another one.
    torch.testing.assert_close(family.compute_loss(model, batch, args, noise=noised.noise, levels=levels)[0], loss)
