"""`PipelineFamily.draw`: several images in one call, and raw latents as a cache of the family holds them."""

import pytest
import torch
from family_steps import FAMILIES
from parity import EPSILON

import sciflow_hf as sf
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import SciflowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SEEDS, HEIGHT, WIDTH = (3, 4, 5), 32, 64


@pytest.fixture(scope="module")
def pipelines(tiny_pipelines):
    """Of each family: itself, its pipeline, two encoded prompts of one length, and one of another."""
    found = {}
    for name in FAMILIES:
        options = {} if name in ("sdxl", "ernie_image") else {"max_sequence_length": 7}
        family = sf.load_family(name)(pretrained_model_name_or_path=str(tiny_pipelines[name]), **options)
        pipeline = family.load_pipeline(family.load_model(dtype=torch.float32).eval())
        encoded = family.encode_validation_prompts(["XZ", "ZX", "Z"], device="cpu", dtype=torch.float32)
        found[name] = family, pipeline, encoded
    return found


@pytest.fixture(params=FAMILIES)
def drawn(request, pipelines):
    return pipelines[request.param]


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


CALL = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "guidance_scale": 3.0}


def end_of_sampling(family, pipeline, encoded, seed):
    """What the sampler ends with, (1, C, h, w), normalised, by diffusers' own functions."""
    generator = torch.Generator().manual_seed(seed)
    packed = family.generate(pipeline, encoded, generator=generator, output_type="latent", **CALL)
    if family.name == "flux2_klein":  # this pipeline undoes the normalisation first
        mean, var = pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var
        std = (var + pipeline.vae.config.batch_norm_eps).sqrt()
        return (pipeline._patchify_latents(packed) - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    if family.name in ("flux", "qwen_image"):
        packed = pipeline._unpack_latents(packed, HEIGHT, WIDTH, pipeline.vae_scale_factor)
    return packed.squeeze(2) if packed.ndim == 5 else packed


def far(one, other):
    """The largest difference in roundings of the largest value."""
    return float((one - other).abs().max() / (EPSILON * other.abs().max()))


def test_latents_are_those_of_a_cache(drawn):
    """Normalised they are what the sampler ended with; decoded they are the picture; a cache holds their shape."""
    family, pipeline, encoded = drawn
    latents, images = family.draw(pipeline, encoded[0], generators=generators(), **CALL)
    assert latents.shape == (len(SEEDS), *family.latent_shape(HEIGHT, WIDTH)) and len(images) == len(SEEDS)
    for i, seed in enumerate(SEEDS):
        assert far(family.clean_latents({"latents": latents[i : i + 1]}),
                   end_of_sampling(family, pipeline, encoded[0], seed)) < 1000  # fmt: skip
    framed = latents.unsqueeze(2) if family.name == "qwen_image" else latents
    with torch.no_grad():
        pixels = pipeline.vae.decode(framed).sample
    pictures = pipeline.image_processor.postprocess(pixels.squeeze(2) if pixels.ndim == 5 else pixels)
    assert [p.tobytes() for p in pictures] == [image.tobytes() for image in images]
    assert len({image.tobytes() for image in images}) == len(SEEDS)


def test_one_image_is_that_of_generate(drawn):
    """Bit for bit; of several each to rounding."""
    family, pipeline, encoded = drawn
    one, images = family.draw(pipeline, encoded[0], generators=generators(SEEDS[:1]), **CALL)
    [expected] = family.generate(pipeline, encoded[0], generator=torch.Generator().manual_seed(SEEDS[0]), **CALL)
    assert images[0].tobytes() == expected.tobytes()
    several, _ = family.draw(pipeline, encoded[0], generators=generators(), **CALL)
    assert far(several[:1], one) < 1000


def test_prompts_of_one_length_share_a_call(drawn):
    family, pipeline, encoded = drawn
    both, _ = family.draw(pipeline, encoded[:2], generators=generators(SEEDS[:2]), **CALL)
    for i, seed in enumerate(SEEDS[:2]):
        alone, _ = family.draw(pipeline, encoded[i], generators=generators([seed]), **CALL)
        assert far(both[i : i + 1], alone) < 1000
    with pytest.raises(SciflowError, match="`encoded`: 3 images in one call need one text"):
        family.draw(pipeline, encoded[:2], generators=generators(), **CALL)


def test_prompts_of_other_lengths_do_not(pipelines):
    family, pipeline, encoded = pipelines["qwen_image"]
    with pytest.raises(SciflowError, match=r"of \[\(1, \d, \d+\), \(1, \d, \d+\)\]"):
        family.draw(pipeline, encoded[1:], generators=generators(SEEDS[:2]), **CALL)


def test_the_vae_is_left_as_it_was(pipelines):
    family, pipeline, encoded = pipelines["sdxl"]  # whose `decode` is already another one
    before = pipeline.vae.decode
    family.draw(pipeline, encoded[0], generators=generators(SEEDS[:1]), **CALL)
    assert pipeline.vae.decode is before
    family, pipeline, encoded = pipelines["flux"]
    family.draw(pipeline, encoded[0], generators=generators(SEEDS[:1]), **CALL)
    assert "decode" not in vars(pipeline.vae)


@pytest.mark.parametrize("name", ["flux2_klein", "flux_kontext", "qwen_image_edit"])
def test_edits_of_one_source(tmp_path, name, pipelines, small_sources):
    from PIL import Image

    source = Image.effect_noise((96, 64), 80).convert("RGB")
    if name == "flux2_klein":
        family, pipeline, encoded = pipelines[name]
    else:
        family = sf.load_family(name)(pretrained_model_name_or_path=str(make_tiny(tmp_path / name, name, size="test")))
        pipeline = family.load_pipeline(family.load_model(dtype=torch.float32).eval())
        read = {"source_images": [[source]]} if family.text_reads_sources else {}
        encoded = family.encode_validation_prompts(["XZ"], device="cpu", dtype=torch.float32, **read)
    both, images = family.draw(pipeline, encoded[0], generators=generators(SEEDS[:2]), source_images=[source], **CALL)
    for i, seed in enumerate(SEEDS[:2]):
        generator = torch.Generator().manual_seed(seed)
        [expected] = family.generate(pipeline, encoded[0], generator=generator, source_images=[source], **CALL)
        assert images[i].size == expected.size
        alone, _ = family.draw(pipeline, encoded[0], generators=generators([seed]), source_images=[source], **CALL)
        assert far(both[i : i + 1], alone) < 1000
