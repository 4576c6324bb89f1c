"""Qwen-Image from captions and images to a LoRA in the stock pipeline: text, cache, training, sampling."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import QwenImagePipeline
from recipe_runs import ROOT, command, environment
from trainings import LONGER, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_layers, adapter_parameters
from sciflow_hf.demo import make_tiny
from sciflow_hf.families.qwen_image import QwenImage
from sciflow_hf.training.prepare import build_cache_for, online_text

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """Folder of the smallest Qwen-Image pipeline; a token is 8x8 pixels, `bucket_step` 8. Read only."""
    return make_tiny(tmp_path_factory.mktemp("qwen") / "tiny", "qwen_image", size="test")


@pytest.fixture(scope="module")
def pipeline(tiny_qwen):
    """The stock pipeline, whole."""
    return load(tiny_qwen)


def load(folder):
    pipeline = QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def family(tiny_qwen):
    return QwenImage(pretrained_model_name_or_path=str(tiny_qwen), max_sequence_length=128)


# -- text and images -----------------------------------------------------------------------------------------


TEXTS = {
    "single": ["a line plot"],
    "empty": [""],
    "long": ["a very long caption of a chart " * 40],
    "mixed": ["a line plot with two blue curves", "", "red bars", "a very long caption of a chart " * 40],
    "of one length": ["red bars", "red bars"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_encoded_prompts_are_the_pipelines(name, family, pipeline):
    """Of the encoder without vision tower and vocabulary; the pipeline's is whole."""
    encoders = family.load_text_encoder(device="cpu", dtype=torch.float32)
    ours = family.encode_prompts(TEXTS[name], encoders)
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(TEXTS[name], max_sequence_length=128)
    assert torch.equal(ours["prompt_embeds"], embeds) and embeds.shape[1] <= 128
    assert (mask is None) == ("prompt_embeds_mask" not in ours)
    assert mask is None or torch.equal(ours["prompt_embeds_mask"], mask)
    assert encoders.transformer is None and encoders.vae is None
    sizes = [sum(p.numel() for p in part.text_encoder.parameters()) for part in (encoders, pipeline)]
    assert sizes[0] < sizes[1] and next(pipeline.text_encoder.model.visual.parameters()) is not None


def test_the_templates_34_tokens_are_dropped(family, pipeline):
    """What is left is the prompt and the turn's end, whatever the prompt; the template is the network's own."""
    prefix, suffix = pipeline.prompt_template_encode.split("{}")
    tokenizer = pipeline.tokenizer
    assert len(tokenizer(prefix).input_ids) == 34
    encoders = family.load_text_encoder(device="cpu", dtype=torch.float32)
    for prompt in ("", "red bars", "a line plot"):
        found = family.encode_prompts([prompt], encoders)["prompt_embeds"]
        assert found.shape[1] == len(tokenizer(prompt + suffix).input_ids)
        ids = tokenizer(prefix + prompt + suffix, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipeline.text_encoder.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, states[:, 34:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[:, 1:], states[:, 34:-1], rtol=0.1)


def test_encoded_images_are_the_vaes(family, pipeline):
    encoders = family.load_encoders(device="cpu", dtype=torch.float32, text=False)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(images[:, :, None]).latent_dist
    assert family.posterior == "sample"
    found = family.encode_images(images, encoders)
    assert torch.equal(found["latents"], expected.mode()[:, :, 0]) and found["latents"].shape == (2, 4, 8, 12)
    assert torch.equal(found["latents_std"], expected.std[:, :, 0])
    modes = dataclasses.replace(family, posterior="mode").encode_images(images, encoders)
    assert list(modes) == ["latents"]
    assert family.bucket_step() == pipeline.vae_scale_factor * 2


@pytest.mark.parametrize("preset", ["attention", "standard", "full"])
def test_presets_take_the_layers_they_say(preset, family):
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=2, lora_layers=preset), family=family)
    expected = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    if preset != "attention":
        expected |= {f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    if preset == "full":
        expected |= {f"{stream}_mlp.{name}" for stream in ("img", "txt") for name in ("net.0.proj", "net.2")}
    paths = {f"transformer_blocks.{number}.{name}" for number in range(2) for name in expected}
    idle = family.idle_layers(model)
    assert set(adapter_layers(model)) == {path for path in paths if not path.startswith(idle)}


# -- cache and training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["shards", "npz", "inline"])
def any_cache(request, tmp_path_factory, family, figures):
    folder = tmp_path_factory.mktemp(request.param) / "cache"
    build_cache_for(family, str(figures), str(folder), resolution=64, batch_size=4, payload=request.param)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, family, figures):
    folder = tmp_path_factory.mktemp("built") / "cache"
    build_cache_for(family, str(figures), str(folder), resolution=64, batch_size=4)
    return folder


def test_a_row_holds_its_own_tokens(any_cache, family, pipeline):
    """Captions are encoded four at a time, padded; what is stored is what each gives alone, without a mask."""
    data = sf.load_cache(any_cache, dtype=torch.float32)
    lengths = set()
    for i in range(0, len(data), 5):
        sample = data[i]
        with torch.no_grad():
            embeds, mask = pipeline.encode_prompt(data.captions[i], max_sequence_length=128)
        assert mask is None and sorted(sample) == ["latents", "latents_std", "prompt_embeds"]
        assert sample["prompt_embeds"].shape == embeds[0].shape
        assert float((sample["prompt_embeds"] - embeds[0]).norm() / embeds.norm()) < 5e-3  # stored in bfloat16
        assert sample["latents"].ndim == 3 and sample["latents"].shape == sample["latents_std"].shape
        lengths.add(len(embeds[0]))
    assert len(lengths) > 2
    empty = data.empty_prompt["prompt_embeds"]
    assert empty.shape == (5, 16)


def qwen_trainer(folder, family, cache, *, rows=None, **options):
    """`rows` both trained on and held out, or a quarter of all held out."""
    defaults = dict(LONGER, lora_alpha=8, per_device_train_batch_size=3, learning_rate=5e-3)
    if rows is None:
        return make_trainer(folder, family, cache, eval_fraction=0.25, **defaults | options)
    chosen = sf.load_cache(cache, dtype=torch.float32).select(rows)
    return make_trainer(folder, family, chosen, chosen, **defaults | options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, family, cache):
    """20 steps, saved at 10 and 20."""
    trainer = qwen_trainer(tmp_path_factory.mktemp("run"), family, cache, save_strategy="steps", save_steps=10)
    trainer.train()
    return trainer


def test_batches_hold_texts_of_several_lengths(run):
    masks = [batch.get("prompt_embeds_mask") for batch in run.get_train_dataloader()]
    masks = [mask for mask in masks if mask is not None]
    assert masks and all(mask.dtype == torch.bool and not mask.all() for mask in masks)


@pytest.mark.promise("A11")
def test_twenty_steps_lower_the_held_out_loss(run):
    metrics = run.evaluate()
    assert metrics["eval_loss"] < 0.95 * metrics["eval_base_loss"]
    state = trained(run)
    assert all(value.any() for name, value in state.items() if "lora_B" in name)


def test_resumed_equals_uninterrupted(run, tmp_path, family, cache):
    """Ten steps from the checkpoint at ten: the same bits, posterior draws and all."""
    source = run.args.output_dir
    shutil.copytree(f"{source}/checkpoint-10", tmp_path / "checkpoint-10")
    options = {"save_strategy": "steps", "save_steps": 10, "resume_from_checkpoint": "latest"}
    again = qwen_trainer(tmp_path, family, cache, **options)
    start = trained(again)
    again.train()
    end, expected = trained(again), trained(run)
    assert all(torch.equal(end[name], expected[name]) for name in expected)
    assert any(not torch.equal(end[name], start[name]) for name in expected)


def test_padding_does_not_change_a_run(tmp_path, family, cache):
    """Three rows at once, padded, and one by one: the same losses and weights. SGD, as Adam blows rounding up."""
    buckets = sf.load_cache(cache).buckets
    rows = [i for i, bucket in enumerate(buckets) if bucket == buckets[0]][:6]  # two whole steps an epoch
    found = []
    for size in (3, 1):
        trainer = qwen_trainer(
            tmp_path / str(size), family, cache, rows=rows, per_device_train_batch_size=size, max_steps=4,
            gradient_accumulation_steps=3 // size, logging_steps=1, optim="sgd", learning_rate=1e-2,
        )  # fmt: skip
        masked = ["prompt_embeds_mask" in batch for batch in trainer.get_train_dataloader()]
        assert any(masked) == (size == 3)
        trainer.train()
        found.append(([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trained(trainer)))
    (losses, weights), (other, other_weights) = found
    assert losses == pytest.approx(other, rel=1e-5) and len(losses) == 4
    assert all(torch.allclose(weights[name], value, rtol=0, atol=1e-5) for name, value in other_weights.items())


def test_dropped_captions_share_batches(tmp_path, family, cache):
    trainer = qwen_trainer(tmp_path, family, cache, caption_dropout=0.5, max_steps=2)
    lengths = set()
    for batch in trainer.get_train_dataloader():
        mask = batch.get("prompt_embeds_mask", torch.ones(batch["prompt_embeds"].shape[:2]))
        lengths |= set(mask.sum(1).int().tolist())
    assert 5 in lengths and max(lengths) > 10
    trainer.train()


def test_online_text_is_the_cached_text(tmp_path, family, cache):
    """Captions encoded in training give the batch of the cache, up to what bfloat16 rounds."""
    data = sf.load_cache(cache, dtype=torch.float32)
    encode = online_text(family, device="cpu", dtype=torch.float32)
    captions = [data.captions[i] for i in (0, 3, 0)]
    batch = encode(captions)
    for row, i in enumerate((0, 3, 0)):
        stored = data[i]["prompt_embeds"]
        torch.testing.assert_close(batch["prompt_embeds"][row, : len(stored)], stored, rtol=0.02, atol=0.02)
        if "prompt_embeds_mask" in batch:
            assert batch["prompt_embeds_mask"][row].sum() == len(stored)
        else:
            assert len(batch["prompt_embeds"][row]) == len(stored)


# -- sampling ------------------------------------------------------------------------------------------------


def draw(pipeline, **options):
    defaults = dict(prompt="a line plot", height=48, width=32, num_inference_steps=2, true_cfg_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**(defaults | options), generator=generator, output_type="np").images[0]


def test_the_lora_changes_the_stock_pipelines_image(run, tiny_qwen):
    stock = load(tiny_qwen)
    before = draw(stock)
    stock.load_lora_weights(f"{run.args.output_dir}/checkpoint-20")
    after = draw(stock)
    assert before.shape == (48, 32, 3) and abs(after - before).max() > 0.02
    with torch.no_grad():
        for name, parameter in adapter_parameters(stock.transformer).items():
            torch.testing.assert_close(parameter, adapter_parameters(run.model)[name.replace("default_0", "default")])
    stock.unload_lora_weights()
    assert abs(draw(stock) - before).max() == 0


def test_validation_draws_what_the_pipeline_draws(family, pipeline):
    """Prompts encoded together and cut give the image of the pipeline's own call, guidance and all."""
    model = family.load_model(dtype=torch.float32)
    ours = family.load_pipeline(model)
    assert ours.transformer is model and ours.text_encoder is None
    prompts = ["a line plot with two blue curves", "red bars"]
    rows = family.encode_validation_prompts(prompts, device="cpu", dtype=torch.float32)
    images = {}
    for prompt, inputs in zip(prompts, rows, strict=True):
        for scale in (1.0, 4.0):
            image = family.generate(
                ours, inputs, height=48, width=32, num_inference_steps=2, guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
            )[0]  # fmt: skip
            negative = {"negative_prompt": " "} if scale > 1 else {}
            theirs = draw(pipeline, prompt=prompt, true_cfg_scale=scale, max_sequence_length=128, **negative)
            images[prompt, scale] = torch.from_numpy(theirs)
            assert image.size == (32, 48)
            shown = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(48, 32, 3) / 255
            torch.testing.assert_close(shown, images[prompt, scale], rtol=0, atol=0.003)
    found = list(images.values())
    assert all(float((a - b).abs().max()) > 0.02 for i, a in enumerate(found) for b in found[:i])


def test_long_prompts_are_drawn_whole(tiny_qwen):
    """The pipeline cuts embeddings at 512 tokens unless told: validation tells it what training used."""
    family = QwenImage(pretrained_model_name_or_path=str(tiny_qwen), max_sequence_length=600)
    (inputs,) = family.encode_validation_prompts(["red bars " * 400], device="cpu", dtype=torch.float32)
    assert inputs["prompt_embeds"].shape == (1, 600, 16)
    model, seen = family.load_model(dtype=torch.float32), []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True)
    pipeline = family.load_pipeline(model)
    family.generate(
        pipeline, inputs, height=16, width=24, num_inference_steps=2, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [states.shape[1] for states in seen] == [600, 600]


@pytest.mark.acceptance
def test_two_hundred_steps_on_eight_samples(tmp_path, family, cache):
    """The loss on the fixed grid falls to 60 % of the start or less."""
    trainer = qwen_trainer(
        tmp_path, family, cache, rows=list(range(8)), max_steps=200, per_device_train_batch_size=4, learning_rate=1e-2
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.6 * metrics["eval_base_loss"]


@pytest.mark.acceptance
def test_the_demo_as_printed(tmp_path):
    """From drawn figures to a LoRA in a process of its own, from a copy of the recipes."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    done = subprocess.run(
        [sys.executable, "recipes/train_qwen_image.py", "--config", "recipes/configs/qwen_image_demo.yaml"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "better" in done.stdout and "not clearly" not in done.stdout
    for name in ("pytorch_lora_weights.safetensors", "README.md", "validation/contact_sheet.png"):
        assert (tmp_path / "outputs" / "qwen_image_demo" / name).is_file() and name in done.stdout


@pytest.mark.acceptance
@pytest.mark.parametrize("no_adapter", [False, True])
def test_two_ranks(no_adapter, tmp_path, tiny_qwen, cache):
    """Every trained parameter takes part, or DistributedDataParallel stops at the second step."""
    options = dict(
        pretrained_model_name_or_path=tiny_qwen, max_sequence_length=128, dataset_dir=cache, output_dir=tmp_path,
        eval_fraction=0, no_adapter=no_adapter, max_steps=3, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    line = command(*words, ranks=2, script=ROOT / "recipes" / "train_qwen_image.py")
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Trained 3 steps" in done.stdout, done.stderr[-3000:]
