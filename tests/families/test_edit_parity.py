"""Edits of every family that takes sources: the network sees what the stock pipeline gives it, bit for bit."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxKontextPipeline
from diffusers import QwenImageEditPlusPipeline as EditPlusPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext as stock_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_edit_plus
from edits import (
    IDS,
    MISTAKES,
    TWO,
    Caught,
    instead_of,
    of_network,
    our_inputs,
    rows_of,
    stock_inputs,
    unequal,
)
from family_steps import edited
from parity import FEW, roundings
from PIL import Image
from transformers import Qwen2VLProcessor

import sciflow_hf as sf
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.qwen_image import QwenImage
from sciflow_hf.families.qwen_image_edit import QwenImageEdit

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("small_sources")]

LENGTH, HEIGHT, WIDTH = 12, 64, 96
PROMPTS = ["XZ", "ZX"]  # of as many tokens
SIZES = {"of its size": [(96, 64)], "of another size": [(75, 101)], "two": [(96, 64), (130, 70)]}  # width, height
SIGMAS = torch.tensor([0.35, 0.8])
PREFERRED = stock_kontext.PREFERRED_KONTEXT_RESOLUTIONS


def noisy_image(size, seed):
    """Three large blocks a side, and noise: what is moved, mirrored or resized shows."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    noise = rng.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(blocks).astype(int) + noise).clip(0, 255).astype(np.uint8))


def pixels(image, resized, size):
    """An image as a pipeline's image processor gives it to the VAE, by Pillow: resized, cut around its centre."""
    image = image.resize(resized[::-1], Image.Resampling.LANCZOS) if image.size != resized[::-1] else image
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    shown = image.crop((left, top, left + size[1], top + size[0]))
    values = np.asarray(shown)[None].astype(np.float32) / 255.0
    return 2.0 * torch.from_numpy(values).permute(0, 3, 1, 2) - 1.0  # other strides round otherwise in the VAE


def as_it_is(self, height, width):
    """The size of a source that is cut to multiples of 32 pixels, and neither enlarged nor made smaller."""
    return height // 32 * 32, width // 32 * 32


def in_time(inputs, change):
    """Position ids whose first column is changed."""
    ids = inputs["img_ids"].clone()
    ids[..., 0] = change(ids[..., 0])
    return ids


def turned(inputs):
    """Shapes of images with height and width of the sources swapped."""
    return [[target, *((1, w, h) for _, h, w in sources)] for target, *sources in inputs["img_shapes"]]


def reading(change):
    """A mistake in the images that the text encoder reads."""
    right = QwenImageEdit._encoded
    return instead_of("_encoded", lambda self, text, images, pipe: right(self, text, change(images), pipe))


class Klein:
    name, most = "flux2_klein", 2
    options: ClassVar = {"max_sequence_length": LENGTH}
    call: ClassVar = {"guidance_scale": 1.0, "max_sequence_length": LENGTH}
    encoder = "prepare_image_latents"
    large: ClassVar = [(1300, 900), (900, 2400), (1024, 1024), (1030, 1020), (64, 512)]
    refused: ClassVar = [(63, 64), (600, 64), (64, 513)]

    def pipeline(self, folder):
        return Flux2KleinPipeline.from_pretrained(folder)

    def unpacked(self, pipeline, tokens):
        step = 2 * pipeline.vae_scale_factor
        return tokens.transpose(1, 2).unflatten(2, (HEIGHT // step, WIDTH // step))

    def reference(self, pipeline, model, batch, noise):
        bn, config = pipeline.vae.bn, pipeline.vae.config
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)

        def clean(latents):
            return (pipeline._patchify_latents(latents) - bn.running_mean.view(1, -1, 1, 1)) / std

        latents, sources = clean(batch["latents"]), [clean(batch[name]) for name in sources_in(batch)]
        images = [FlowMatchEulerDiscreteScheduler().scale_noise(latents, SIGMAS * 1000, noise), *sources]
        ids = [pipeline._prepare_latent_ids(latents)]
        ids += [pipeline._prepare_image_ids([s[:1] for s in sources]).expand(2, -1, -1)] if sources else []
        predicted = model(
            hidden_states=torch.cat([pipeline._pack_latents(image) for image in images], 1),
            timestep=SIGMAS * 1000 / 1000,
            guidance=None,
            encoder_hidden_states=batch["prompt_embeds"],
            txt_ids=pipeline._prepare_text_ids(batch["prompt_embeds"]),
            img_ids=torch.cat(ids, 1),
            return_dict=False,
        )[0]
        target = pipeline._pack_latents(noise - latents)
        return (predicted[:, : target.shape[1]] - target).square().mean((1, 2))

    mistakes: ClassVar = {
        **(MISTAKES | TWO | IDS),
        "ids 1 apart": of_network(lambda inputs, tokens: {"img_ids": in_time(inputs, lambda t: t // 10)}),
        "ids of all sources alike": of_network(
            lambda inputs, tokens: {"img_ids": in_time(inputs, lambda t: t.clamp(max=10))}
        ),
        "stretched instead of cut": instead_of(
            "source_resized", lambda self, height, width: (height // 8 * 8, width // 8 * 8)
        ),
    }


class Kontext:
    name, most = "flux_kontext", 1
    options: ClassVar = {"max_sequence_length": LENGTH, "guidance_scale": 2.5}
    call: ClassVar = {"guidance_scale": 2.5, "max_sequence_length": LENGTH, "max_area": HEIGHT * WIDTH}
    encoder = "prepare_latents"
    large: ClassVar = [(1300, 900), (900, 2400), (1024, 1024), (40, 60), (50, 400), (95, 65)]
    refused: ClassVar = [(400, 31), (31, 31)]

    def pipeline(self, folder):
        return FluxKontextPipeline.from_pretrained(folder)

    def unpacked(self, pipeline, tokens):
        return pipeline._unpack_latents(tokens, HEIGHT, WIDTH, pipeline.vae_scale_factor)

    def reference(self, pipeline, model, batch, noise):
        config = pipeline.vae.config

        def clean(latents):
            return (latents - config.shift_factor) * config.scaling_factor

        latents, sources = clean(batch["latents"]), [clean(batch[name]) for name in sources_in(batch)]
        images = [FlowMatchEulerDiscreteScheduler().scale_noise(latents, SIGMAS * 1000, noise), *sources]
        ids = [
            pipeline._prepare_latent_image_ids(2, i.shape[2] // 2, i.shape[3] // 2, "cpu", torch.float32)
            for i in images
        ]
        for source in ids[1:]:
            source[..., 0] = 1
        predicted = model(
            hidden_states=torch.cat([pipeline._pack_latents(image, *image.shape) for image in images], 1),
            timestep=SIGMAS * 1000 / 1000,
            guidance=torch.full((2,), 2.5),
            pooled_projections=batch["pooled_prompt_embeds"],
            encoder_hidden_states=batch["prompt_embeds"],
            txt_ids=torch.zeros(batch["prompt_embeds"].shape[1], 3),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        target = pipeline._pack_latents(noise - latents, *latents.shape)
        return (predicted[:, : target.shape[1]] - target).square().mean((1, 2))

    mistakes: ClassVar = {
        **(MISTAKES | IDS),
        "ids as FLUX.2 has them": of_network(lambda inputs, tokens: {"img_ids": in_time(inputs, lambda t: 10 * t)}),
        "not enlarged": instead_of("source_size", as_it_is),
        "another guidance": of_network(lambda inputs, tokens: {"guidance": torch.ones(2)}),
    }


class EditPlus:
    name, most = "qwen_image_edit", 2
    options: ClassVar = {}
    call: ClassVar = {"true_cfg_scale": 1.0}
    encoder = "prepare_latents"
    large: ClassVar = [(1300, 900), (900, 2400), (1024, 1024), (30, 20), (50, 400)]
    refused: ClassVar = [(10, 2900), (4, 2400)]

    def pipeline(self, folder):
        """With the stock processor, without its part for videos, which needs torchvision."""
        from transformers import AutoImageProcessor

        pipeline = EditPlusPipeline.from_pretrained(folder, processor=None)
        pipeline.processor = found = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
        found.image_processor = AutoImageProcessor.from_pretrained(folder, subfolder="processor")
        found.tokenizer, found.video_processor, found.chat_template = pipeline.tokenizer, None, None
        found.image_token, found.video_token = "<|image_pad|>", "<|video_pad|>"
        for kind in ("image", "video"):
            token = getattr(found, f"{kind}_token")
            setattr(found, f"{kind}_token_id", found.tokenizer.convert_tokens_to_ids(token))
        return pipeline

    def unpacked(self, pipeline, tokens):
        return pipeline._unpack_latents(tokens, HEIGHT, WIDTH, pipeline.vae_scale_factor)[:, :, 0]

    def reference(self, pipeline, model, batch, noise):
        mean, std = (torch.tensor(pipeline.vae.config[f"latents_{n}"]).view(1, -1, 1, 1) for n in ("mean", "std"))
        latents, *sources = ((batch[name] - mean) / std for name in ("latents", *sources_in(batch)))
        images = [FlowMatchEulerDiscreteScheduler().scale_noise(latents, SIGMAS * 1000, noise), *sources]
        predicted = model(
            hidden_states=torch.cat([pipeline._pack_latents(image, *image.shape) for image in images], 1),
            timestep=SIGMAS * 1000 / 1000,
            encoder_hidden_states=batch["prompt_embeds"],
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, image.shape[2] // 2, image.shape[3] // 2) for image in images]] * 2,
            return_dict=False,
        )[0]
        target = pipeline._pack_latents(noise - latents, *latents.shape)
        return (predicted[:, : target.shape[1]] - target).square().mean((1, 2))

    mistakes: ClassVar = {
        **(MISTAKES | TWO),
        "the sides of the sources swapped": of_network(lambda inputs, tokens: {"img_shapes": turned(inputs)}),
        "not enlarged": instead_of("source_size", as_it_is),
        "text without its images": reading(lambda images: []),
        "text with the images swapped": reading(lambda images: images[::-1]),
        "text with the images upside down": reading(lambda images: [image.rotate(180) for image in images]),
        "text with another number of images": reading(lambda images: images[:1]),
        "the template of text-to-image": instead_of(
            "_encoded",
            lambda self, text, images, pipe: QwenImage.encode_prompts(self, [text], pipe)["prompt_embeds"][0],
        ),
        "pictures at another size": lambda patch, family: patch.setattr(
            stock_edit_plus, "CONDITION_IMAGE_SIZE", 256**2
        ),
    }


def sources_in(batch):
    return [name for name in ("source_latents", "source_latents_1") if name in batch]


CASES = {case.name: case for case in (Klein(), Kontext(), EditPlus())}
SETUPS = [(name, sizes) for name, case in CASES.items() for sizes in SIZES if len(SIZES[sizes]) <= case.most]


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    """A function: (case, family, stock pipeline, our network, our encoders) of a family."""
    made, folder = {}, tmp_path_factory.mktemp("tiny")

    def make(name):
        if name not in made:
            case, path = CASES[name], make_tiny(folder / name, name, size="test")
            family = sf.load_family(name)(pretrained_model_name_or_path=str(path), **case.options)
            pipeline = case.pipeline(path)
            pipeline.set_progress_bar_config(disable=True)
            encoders = family.load_encoders(device="cpu", dtype=torch.float32)
            made[name] = case, family, pipeline, family.load_model(dtype=torch.float32), encoders
        return made[name]

    return make


@pytest.fixture(scope="module")
def stock(setups):
    """A function: images of two rows, what the stock pipeline gives its network for them, and its prediction."""
    made = {}

    def make(name, sizes):
        if (name, sizes) not in made:
            case, _, pipeline, _, _ = setups(name)
            rows = [[noisy_image(size, 10 * row + i) for i, size in enumerate(SIZES[sizes])] for row in range(2)]
            options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, **case.call}
            inputs = rows_of(
                [
                    stock_inputs(pipeline, image=images, prompt=prompt, step=1, **options)
                    for images, prompt in zip(rows, PROMPTS, strict=True)
                ]
            )
            with torch.no_grad():
                predicted = pipeline.transformer(**inputs)[0]
            tokens = HEIGHT * WIDTH // (2 * pipeline.vae_scale_factor) ** 2
            made[name, sizes] = rows, inputs, predicted[:, :tokens]
        return made[name, sizes]

    return make


def differences(setups, stock, name, sizes):
    """Where the network's inputs, or the prediction of both rows, are others than the stock pipeline's."""
    case, family, pipeline, model, encoders = setups(name)
    rows, theirs, predicted = stock(name, sizes)
    read = {"sources": rows} if family.text_reads_sources else {}
    batch = family.encode_prompts(PROMPTS, encoders, **read)
    batch["latents"] = torch.zeros(2, *family.latent_shape(HEIGHT, WIDTH))
    for i, images in enumerate(zip(*rows, strict=True)):
        size = images[0].height, images[0].width
        shown = [pixels(image, family.source_resized(*size), family.source_size(*size)) for image in images]
        latents = [family.encode_source_images(image, encoders) for image in shown]  # a batch of two rounds otherwise
        batch["source_latents" + (f"_{i}" if i else "")] = torch.cat(latents)
    noisy = case.unpacked(pipeline, theirs["hidden_states"][:, : predicted.shape[1]])
    try:
        ours, prediction = our_inputs(family, model, batch, noisy, theirs["timestep"])
    except RuntimeError as error:
        return [str(error)]
    close = torch.allclose(prediction, case.unpacked(pipeline, predicted), atol=1e-4)
    return unequal(ours, theirs) + ["prediction"] * (not close)


@pytest.mark.parametrize(("name", "sizes"), SETUPS)
def test_the_network_sees_what_the_pipeline_gives_it(setups, stock, name, sizes):
    assert differences(setups, stock, name, sizes) == []


@pytest.mark.parametrize(("name", "mistake"), [(name, m) for name, case in CASES.items() for m in case.mistakes])
def test_a_mistake_is_caught(monkeypatch, setups, stock, name, mistake):
    case, family, *_ = setups(name)
    sizes = "two" if case.most > 1 else "of another size"
    stock(name, sizes)  # is right
    case.mistakes[mistake](monkeypatch, family)
    assert differences(setups, stock, name, sizes) != []


def test_there_are_enough_mistakes():
    assert all(len(case.mistakes) >= 10 for case in CASES.values())


def batch_of(family, model, count):
    """Two rows with sources of other sizes than the target's, and noise."""
    rng, config = torch.Generator().manual_seed(0), model.config
    channels = config.in_channels // 4
    sizes = {"latents": (2, channels, 12, 8), "prompt_embeds": (2, 7, config.joint_attention_dim)}
    sizes |= {"source_latents": (2, channels, 8, 10), "source_latents_1": (2, channels, 6, 4)}
    if family.name == "flux_kontext":
        sizes["pooled_prompt_embeds"] = (2, config.pooled_projection_dim)
    batch = {name: torch.randn(size, generator=rng) for name, size in sizes.items()}
    noise = torch.randn(family.clean_latents(batch).shape, generator=rng)
    for name in sources_in(batch)[count:]:
        del batch[name]
    return batch, noise


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none")


@pytest.mark.parametrize(("name", "count"), [(name, n) for name, case in CASES.items() for n in range(case.most + 1)])
def test_loss_and_every_gradient_equal_an_independent_step(setups, args, name, count):
    case, family, pipeline, model, _ = setups(name)
    batch, noise = batch_of(family, model, count)
    difference = roundings(
        lambda: family.compute_loss(model, batch, args, noise=noise, levels=SIGMAS)[0],
        lambda: case.reference(pipeline, model, batch, noise),
        model,
    )
    assert difference < FEW and len([p for p in model.parameters() if p.grad is not None]) > 20
    if count:
        keys = {"noise_key": torch.arange(2)}
        drawn = [family.compute_loss(model, b, args)[1] for b in (batch | keys, batch_of(family, model, 0)[0] | keys)]
        assert torch.equal(*drawn)  # the shift counts the tokens of the target alone


@pytest.mark.parametrize("name", CASES)
def test_a_source_is_shown_as_the_pipeline_shows_it(monkeypatch, setups, name):
    """At sizes of published models: what the pipeline gives its VAE, pixel by pixel."""
    monkeypatch.setattr(stock_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", PREFERRED)
    monkeypatch.setattr(stock_edit_plus, "VAE_IMAGE_SIZE", 1024 * 1024)
    case, family, pipeline, _, _ = setups(name)
    given = []

    def stop(*args, **options):
        given.append(options.get("images", args[0] if args else None))
        raise Caught

    monkeypatch.setattr(pipeline, case.encoder, stop)
    for size in case.large:
        image = noisy_image(size, 3)
        with pytest.raises(Caught):
            pipeline(image=[image], prompt="X", height=HEIGHT, width=WIDTH, num_inference_steps=1, **case.call)
        seen = given[-1][0] if isinstance(given[-1], list) else given[-1]
        height, width = image.height, image.width
        expected = pixels(image, family.source_resized(height, width), family.source_size(height, width))
        assert torch.equal(seen.reshape(expected.shape), expected) and family.check_source(height, width) == "", size
    for width, height in case.refused:
        with pytest.raises((ValueError, ZeroDivisionError)):
            pipeline(image=[noisy_image((width, height), 3)], prompt="X", num_inference_steps=1, **case.call)
        assert family.check_source(height, width).startswith(f"{height} x {width} pixels")


@pytest.mark.parametrize("name", CASES)
def test_images_are_the_stock_pipelines(setups, name):
    """`encode_validation_prompts` and `generate` against the pipeline's own call with texts, with guidance too."""
    case, family, pipeline, model, encoders = setups(name)
    images = [noisy_image(size, i) for i, size in enumerate(SIZES["two" if case.most > 1 else "of another size"])]
    inputs, other = family.encode_validation_prompts(
        ["XZ", "ZX"], device="cpu", dtype=torch.float32, encoders=encoders, source_images=[images, images[:1]]
    )
    assert not torch.equal(inputs["prompt_embeds"][:, -1], other["prompt_embeds"][:, -1])
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2}
    ours = family.load_pipeline(model)
    for scale in (1.0, 4.0):
        rng = [torch.Generator().manual_seed(0) for _ in range(2)]
        drawn = family.generate(ours, inputs, source_images=images, generator=rng[0], guidance_scale=scale, **size)[0]
        given = case.call | {family.guidance_argument: scale}
        given |= {"negative_prompt": " "} if family.needs_negative_prompt() else {}
        expected = pipeline(image=images, prompt="XZ", generator=rng[1], **size, **given).images[0]
        assert drawn.size == (WIDTH, HEIGHT) and drawn.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_sources_that_do_not_fit_are_named(setups, args, name):
    _, family, _, model, _ = setups(name)
    batch, _ = batch_of(family, model, 1)
    sample = {key: value[0] for key, value in batch.items()} | {"latents_std": batch["latents"][0].abs()}
    family.check_sample(model, sample)
    for changes, words in (
        ({"source_latents": torch.zeros(5, 8, 8)}, r"`source_latents` \(5, 8, 8\).*takes \(4, h, w\)"),
        ({"source_latents": torch.zeros(4, 7, 8)}, "multiples of 2"),
        ({"edit_mask": torch.zeros(6, 8)}, "`edit_mask`"),
        ({f"source_latents_{i}": sample["source_latents"] for i in range(1, 11)}, "an edit of 11 reference images"),
    ):
        with pytest.raises(SciflowError, match=words):
            family.check_sample(model, sample | changes)
    if name == "qwen_image_edit":
        with pytest.raises(SciflowError, match="`qwen_image_edit` draws edits alone"):
            family.source_options([])
    other = {"flux_kontext": sf.Flux, "qwen_image_edit": sf.QwenImage}.get(name)
    if other is not None:
        family = other(family.pretrained_model_name_or_path)
        with pytest.raises(SciflowError, match=r"`source_latents`: this is an edit of 1 reference image, and .* none"):
            family.compute_loss(model, batch, args)
        with pytest.raises(SciflowError, match="takes no reference images"):
            family.source_size(64, 64)


def test_other_pipelines_around_the_same_network_are_refused(setups, tmp_path):
    for name, kind in (("flux_kontext", "FluxPipeline"), ("qwen_image_edit", "QwenImageEditPipeline")):
        _, family, pipeline, _, _ = setups(name)
        folder = edited(family.pretrained_model_name_or_path, tmp_path / name, "model_index.json", _class_name=kind)
        with pytest.raises(SciflowError, match=f"a {kind}, but `{name}` trains a {type(pipeline).__name__}"):
            type(family)(str(folder)).load_model(dtype=torch.float32, meta=True)


def test_torchvision_is_asked_for_where_it_is_missing(monkeypatch, setups):
    family = setups("qwen_image_edit")[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(SciflowError, match="needs torchvision: `pip install torchvision`"):
        family.load_pipeline(with_text_encoder=True)


def test_sources_at_timestep_zero(setups):
    """Qwen-Image-Edit-2511: its network tells sources from the target by `img_shapes`."""
    _, family, _, model, _ = setups("qwen_image_edit")
    batch, noise = batch_of(family, model, 2)
    network = type(model).from_config(dict(model.config) | {"zero_cond_t": True})
    network.load_state_dict(model.state_dict())
    with torch.no_grad():
        zero, plain = (family.predict(net, batch, noise, SIGMAS) for net in (network, model))
    assert zero.shape == plain.shape and torch.isfinite(zero).all() and not torch.allclose(zero, plain)
