"""SDXL from a folder of figures to a LoRA: cache, training, resuming, diffusers' own pipeline."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import StableDiffusionXLPipeline
from family_steps import with_adapter

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import add_adapter
from sciflow_hf.adapters.arguments import AdapterArguments
from sciflow_hf.adapters.files import load_adapter_weights, save_adapter
from sciflow_hf.data.batches.loader import collate
from sciflow_hf.demo import make_tiny
from sciflow_hf.families.sdxl import SDXL
from sciflow_hf.training.arguments import DiffusionTrainingArguments
from sciflow_hf.training.prepare import build_cache_for


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sdxl") / "tiny", "sdxl", size="test")


@pytest.fixture(scope="module")
def family(tiny):
    return SDXL(pretrained_model_name_or_path=str(tiny))


@pytest.fixture(scope="module")
def cache(family, figures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "sdxl"
    build_cache_for(family, str(figures), str(folder), resolution=64, batch_size=4)
    return sf.load_cache(folder, dtype=torch.float32)


def test_captions_are_words_of_the_tiny_pipeline(family, figures):
    """Captions of figures fit into CLIP's 77 tokens, words being words."""
    encoders = family.load_text_encoder(device="cpu", dtype=torch.float32)
    captions = [json.loads(line)["caption"] for line in (figures / "metadata.jsonl").read_text().splitlines()]
    lengths = [len(encoders.tokenizer(caption).input_ids) for caption in captions]
    assert min(lengths) > 20 and max(lengths) <= 77 and max(lengths) < 0.7 * max(map(len, captions))
    assert encoders.tokenizer.decode(encoders.tokenizer("A bar chart.").input_ids[1:-1]) == "a bar chart ."


def trainer(family, cache, folder, *, eval_dataset=None, **options):
    options = {"max_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 4} | options
    args = DiffusionTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", weighting_scheme="none", disable_tqdm=True,
        per_device_eval_batch_size=4, **options,
    )  # fmt: skip
    model = family.load_model(dtype=torch.float32)
    add_adapter(model, AdapterArguments(rank=8, lora_layers="full"), family=family)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=cache, eval_dataset=eval_dataset)


def adapter(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def test_cache_holds_sizes_and_crops(cache):
    for i in range(len(cache)):
        row, (height, width) = cache.index[i], cache.buckets[i]
        ids = [row["original_h"], row["original_w"], row["crop_top"], row["crop_left"], height, width]
        assert cache[i]["time_ids"].tolist() == ids and cache[i]["time_ids"].dtype == torch.int64
    assert collate([cache[0], cache[0]])["time_ids"].shape == (2, 6)


@pytest.mark.promise("E02")
def test_training_lowers_the_loss_and_resumes_exactly(family, cache, tmp_path):
    some = cache.select(range(8))
    whole = trainer(family, some, tmp_path / "whole", eval_dataset=some)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < 0.7 * before
    trainer(family, some, tmp_path / "part", max_steps=12, save_steps=12).train()
    resumed = trainer(family, some, tmp_path / "part")
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-12"))
    expected, found = adapter(whole), adapter(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.promise("E02")
def test_lora_loads_into_the_stock_pipeline_and_changes_the_image(family, tiny, tmp_path):
    model = with_adapter(family)
    saved = save_adapter(model, tmp_path, family=family)
    stock = StableDiffusionXLPipeline.from_pretrained(tiny)
    ours = family.load_pipeline(model, with_text_encoder=True)

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": 48, "width": 32, "num_inference_steps": 2, "output_type": "np"}
        return torch.from_numpy(pipeline("a plot", generator=torch.Generator().manual_seed(0), **size).images[0])

    plain = draw(stock)
    stock.load_lora_weights(saved)
    changed_image = draw(stock)
    assert changed_image.shape == (48, 32, 3) and (changed_image - plain).abs().mean() > 0.005
    torch.testing.assert_close(changed_image, draw(ours), rtol=0, atol=1e-5)  # alpha is not the rank, and arrived
    fresh = family.load_model(dtype=torch.float32)
    add_adapter(fresh, AdapterArguments(rank=4, lora_alpha=8, lora_layers="full"), family=family)
    load_adapter_weights(fresh, Path(saved).parent, family=family)
    for (name, value), (_, other) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_generate_draws_with_the_training_network(family, precision):
    """Also in mixed precision, where the network answers in float32 and the VAE is bfloat16."""
    model = family.load_model(dtype=torch.float32 if precision == "float32" else torch.bfloat16)
    if precision == "mixed":
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    pipe = family.load_pipeline(model)
    assert pipe.unet is model and pipe.text_encoder is None and pipe.text_encoder_2 is None
    inputs = family.encode_validation_prompts(["a plot"], device="cpu", dtype=torch.float32)[0]

    def draw():
        return family.generate(
            pipe, inputs, height=48, width=32, num_inference_steps=2, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
        )[0]  # fmt: skip

    first, again = draw(), draw()
    assert first.size == (32, 48) and first.tobytes() == again.tobytes()
    with torch.no_grad():
        model.conv_out.weight.mul_(-1)
    assert draw().tobytes() != first.tobytes()


@pytest.mark.acceptance
def test_eight_samples_are_learned(family, cache, tmp_path):
    some = cache.select(range(8))
    run = trainer(family, some, tmp_path, eval_dataset=some, max_steps=200, save_strategy="no")
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] <= 0.6 * before
