"""Edits of every family that takes sources: the network sees what the stock pipeline gives it, bit for bit."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxKontextPipeline
from diffusers import QwenImageEditPlusPipeline as EditPlusPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext as stock_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_edit_plus
from edits import IDS, MISTAKES, TWO, of_network, our_inputs, rows_of, stock_inputs, unequal
from family_steps import edited
from parity import FEW, roundings
from PIL import Image
from transformers import Qwen2VLProcessor

import sciflow_hf as sf
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import SciflowError
from sciflow_hf.families.base import PipelineFamily

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTH, HEIGHT, WIDTH = 12, 64, 96
PROMPTS = ["XZ", "ZX"]  # of as many tokens
SIZES = {"of its size": [(96, 64)], "of another size": [(75, 101)], "two": [(96, 64), (130, 70)]}  # width, height
SIGMAS = torch.tensor([0.35, 0.8])


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


class Klein:
    name, most, mistakes = "flux2_klein", 2, MISTAKES | TWO | IDS
    options: ClassVar = {"max_sequence_length": LENGTH}
    call: ClassVar = {"guidance_scale": 1.0, "max_sequence_length": LENGTH}
    encoder = "prepare_image_latents", "images"
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


class Kontext:
    name, most, mistakes = "flux_kontext", 1, MISTAKES | IDS
    options: ClassVar = {"max_sequence_length": LENGTH, "guidance_scale": 2.5}
    call: ClassVar = {"guidance_scale": 2.5, "max_sequence_length": LENGTH, "max_area": HEIGHT * WIDTH}
    encoder = "prepare_latents", 0
    large: ClassVar = [(1300, 900), (900, 2400), (1024, 1024), (30, 20), (50, 400)]
    refused: ClassVar = []

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


class EditPlus:
    name, most = "qwen_image_edit", 2
    options: ClassVar = {}
    call: ClassVar = {"true_cfg_scale": 1.0}
    encoder = "prepare_latents", 0
    large: ClassVar = [(1300, 900), (900, 2400), (1024, 1024), (30, 20), (50, 400)]
    refused: ClassVar = [(10, 2001)]

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

    mistakes = (
        MISTAKES
        | TWO
        | {
            "the sides of the sources swapped": of_network(
                lambda inputs, tokens: {
                    "img_shapes": [[s[0], *((1, w, h) for _, h, w in s[1:])] for s in inputs["img_shapes"]]
                }
            ),
        }
    )


def sources_in(batch):
    return [name for name in ("source_latents", "source_latents_1") if name in batch]


CASES = {case.name: case for case in (Klein(), Kontext(), EditPlus())}
SETUPS = [(name, sizes) for name, case in CASES.items() for sizes in SIZES if len(SIZES[sizes]) <= case.most]


@pytest.fixture(scope="module", autouse=True)
def small_sources():
    """Sources of about 128 x 128 pixels instead of 1 megapixel, in the pipelines' own modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(96, 160), (128, 128), (160, 96)])
        patch.setattr(stock_edit_plus, "VAE_IMAGE_SIZE", 128 * 128)
        yield


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
