"""Text encoders trained with the network: gradients, files, resuming and what is refused, for sdxl, sd3 and flux."""

import logging

import numpy as np
import pytest
import torch
from recipe_runs import ROOT, logged_losses, run
from safetensors.torch import load_file
from trainings import trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME, load_adapter_weights, save_adapter, text_states
from sciflow_hf.adapters.layers import adapter_disabled, adapter_facts, adapter_parameters, network_of
from sciflow_hf.adapters.text_encoders import NetworkWithText
from sciflow_hf.cli import main
from sciflow_hf.data.load import load_cache
from sciflow_hf.demo import make_tiny
from sciflow_hf.training.prepare import build_cache_for, online_text

FAMILIES = ("sdxl", "sd3", "flux")
CAPTIONS = ["A line plot of accuracy.", "", "a bar chart, very long " * 30]
SIZES = {"sdxl": (4, 24, 16), "sd3": (16, 12, 8), "flux": (16, 12, 8)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    path = make_tiny(folder, request.param, size="test")
    return sf.load_family(request.param)(pretrained_model_name_or_path=str(path))


def adapter_args(**options):
    return sf.AdapterArguments(**({"rank": 3, "lora_alpha": 6, "train_text_encoder": True} | options))


def make_model(family, *, dtype=torch.float32, filled=True, **options):
    """A network with text encoders, whose adapters do something: B starts at zero."""
    model = sf.add_adapter(family.load_model(dtype=dtype), adapter_args(**options), family=family, seed=1)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if filled and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def batch_of(family, model):
    channels = model.config.in_channels // (4 if family.name == "flux" else 1)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(len(CAPTIONS), channels, 12, 8, generator=generator)
    levels = torch.tensor([3, 500, 900]) if family.name == "sdxl" else torch.tensor([0.1, 0.5, 0.9])
    return {"latents": latents}, {"noise": torch.randn(latents.shape, generator=generator), "levels": levels}


def arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder), use_cpu=True, report_to="none", weighting_scheme="none", max_steps=6, seed=3,
        logging_steps=2, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    return sf.DiffusionTrainingArguments(**(defaults | options))


def stock_pipeline(family, folder):
    """The published pipeline, whole, with the saved file loaded by diffusers alone."""
    pipeline = family.pipeline_class().from_pretrained(family.pretrained_model_name_or_path)
    pipeline.load_lora_weights(str(folder), adapter_name="default")
    return pipeline


def stock_text(family, pipeline):
    """`encode_prompt` of the pipeline, with gradients."""
    if family.name == "flux":
        embeds, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, max_sequence_length=family.max_sequence_length)
    elif family.name == "sd3":
        embeds, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=family.max_sequence_length
        )
    else:
        embeds, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def test_loss_and_gradients_equal_those_of_the_stock_pipeline(family, tmp_path):
    """Every adapter tensor, of network and encoders: the pipeline encodes, in ours the module does."""
    model = make_model(family)
    save_adapter(model, tmp_path, family=family)
    args = arguments(tmp_path)
    batch, given = batch_of(family, model)
    loss, _ = family.compute_loss(model, batch | {"captions": CAPTIONS}, args, **given)
    loss.mean().backward()

    pipeline = stock_pipeline(family, tmp_path)
    network = getattr(pipeline, family.component)
    parts = {family.component: network} | {n: getattr(pipeline, n) for n in family.trained_text_parts}
    theirs = {f"{part}.{name}": p for part, module in parts.items() for name, p in adapter_parameters(module).items()}
    for parameter in theirs.values():
        parameter.requires_grad_(True)
    expected, _ = family.compute_loss(network, batch | stock_text(family, pipeline), args, **given)
    expected.mean().backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    text = [name for name in ours if name.startswith("text_encoder")]
    assert len(text) >= 8 * len(family.trained_text_parts)
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        scale = theirs[name].grad.abs().max()
        assert scale > 0 and (parameter.grad - theirs[name].grad).abs().max() < 1e-4 * scale, name


def test_the_file_loads_into_the_stock_pipeline(family, tmp_path, caplog):
    model = make_model(family)
    path = save_adapter(model, tmp_path, family=family)
    keys = load_file(path).keys()
    for name in family.trained_text_parts:  # as files have had it since before transformers 5.6
        assert any(key.startswith(f"{name}.text_model.encoder.layers.") for key in keys)
    with caplog.at_level(logging.WARNING):
        pipeline = stock_pipeline(family, tmp_path)
    assert not [r for r in caplog.records if "unexpected" in r.message.lower() or "missing" in r.message.lower()]
    with torch.no_grad():
        expected, ours = stock_text(family, pipeline), model.encode(CAPTIONS)
        base = family.encode_prompts(CAPTIONS, family.load_text_encoder(device="cpu", dtype=torch.float32))
        with adapter_disabled(model):
            switched_off = model.encode(CAPTIONS)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(switched_off[name], base[name], rtol=1e-6, atol=1e-6)
    assert any((base[name] - ours[name]).abs().max() > 1e-2 for name in base)


def test_commands_refuse_what_they_would_draw_wrongly(family, tmp_path, capsys):
    save_adapter(make_model(family), tmp_path, family=family)
    words = ["--model_path", tmp_path, "--base_model", family.pretrained_model_name_or_path, "--family", family.name]
    assert main(["sample", *map(str, words), "--prompts", "a", "--output_dir", str(tmp_path / "a")]) == 2
    assert (
        f"also adapts {' and '.join(family.trained_text_parts)}, which commands do not load" in capsys.readouterr().err
    )


def test_saved_weights_come_back_bit_for_bit(family, tmp_path):
    model, fresh = make_model(family), make_model(family, filled=False)
    save_adapter(model, tmp_path, family=family)
    load_adapter_weights(fresh, tmp_path, family=family)
    again = dict(fresh.named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())


def test_going_on_from_a_file_takes_the_text_along(family, tmp_path, caplog):
    model = make_model(family, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert next(model.get_submodule("text_encoder").parameters()).dtype == torch.bfloat16
    save_adapter(model, tmp_path, family=family)
    more = sf.add_adapter(
        family.load_model(dtype=torch.bfloat16), adapter_args(rank=9, adapter_path=str(tmp_path)), family=family
    )
    assert isinstance(more, NetworkWithText)
    want = {name: p for name, p in model.named_parameters() if p.requires_grad}
    have = {name: p for name, p in more.named_parameters() if p.requires_grad}
    assert want.keys() == have.keys() and all(torch.equal(p, have[name]) for name, p in want.items())
    # Without, it says what is lost.
    alone = adapter_args(train_text_encoder=False, adapter_path=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        plain = sf.add_adapter(family.load_model(dtype=torch.bfloat16), alone, family=family)
    assert not isinstance(plain, NetworkWithText) and "--train_text_encoder" in caplog.text


@pytest.fixture(scope="module")
def captions_only(family, figures, tmp_path_factory):
    """A cache without embeddings."""
    folder = tmp_path_factory.mktemp("captions") / "cache"
    build_cache_for(family, str(figures), str(folder), resolution=64, batch_size=4, embeds="none")
    return folder


def text_trainer(folder, family, cache, *, streaming=False, **options):
    args = arguments(folder, **options)
    data = load_cache(str(cache), dtype=torch.float32, streaming=streaming)
    data.online_text = online_text(family, device="cpu", dtype=torch.float32)
    train, held_out = data.split(0.3)
    model = make_model(family, filled=False)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=train, eval_dataset=held_out)


def test_a_training_moves_the_encoders_and_resumes_exactly(family, captions_only, tmp_path):
    options = dict(save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    whole = text_trainer(tmp_path / "whole", family, captions_only, **options)
    start = trained(whole)
    whole.train()
    end = trained(whole)
    moved = [name for name in end if not torch.equal(start[name], end[name])]
    assert len(moved) == len(end)  # nothing is trained without a gradient
    metrics = whole.evaluate()
    assert metrics["eval_base_loss"] > 0 and metrics["eval_gain"] != 0

    again = text_trainer(
        tmp_path / "again",
        family,
        captions_only,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"),
        **options,
    )
    again.train()
    assert all(torch.equal(value, end[name]) for name, value in trained(again).items())
    facts = adapter_facts(whole.model)
    assert facts["rank"] == 3 and any("text_encoder" in layer for layer in facts["layers"])
    assert {k.split(".")[0] for k in load_file(tmp_path / "whole" / "checkpoint-6" / WEIGHT_NAME)} == {
        family.component, *family.trained_text_parts,
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES[:1], indirect=True)
def test_captions_of_a_stream_are_encoded_by_the_trained_encoders(family, captions_only, tmp_path):
    trainer = text_trainer(tmp_path, family, captions_only, streaming=True, max_steps=1)
    start = trained(trainer)
    trainer.train()
    assert all(not torch.equal(start[name], value) for name, value in trained(trainer).items() if "lora_B" in name)


def test_images_are_drawn_with_the_trained_encoders(family, captions_only, tmp_path):
    options = dict(max_steps=2, validation_prompts=["A line plot."], validation_size=[64, 96], num_inference_steps=2)
    trainer = text_trainer(tmp_path, family, captions_only, **options)
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "ValidationCallback")
    trainer.train()
    after = callback._prompt_inputs[0]
    base = family.encode_validation_prompts(["A line plot."], device="cpu", dtype=torch.float32)[0]
    name = "pooled_prompt_embeds"
    assert (tmp_path / "validation" / "contact_sheet.png").is_file() and not torch.equal(after[name], base[name])
    with torch.no_grad():
        torch.testing.assert_close(after[name], trainer.model.encode(["A line plot."])[name])


def test_a_dry_run_loads_no_weights(family):
    model = sf.add_adapter(family.load_model(dtype=torch.float32, meta=True), adapter_args(), family=family)
    assert all(p.is_meta for p in model.parameters()) and adapter_facts(model)["matched"] > 10


def test_stored_embeddings_are_refused(family, figures, tmp_path):
    build_cache_for(family, str(figures), str(tmp_path / "cache"), resolution=64, batch_size=4)
    data = load_cache(str(tmp_path / "cache"), dtype=torch.float32)
    with pytest.raises(sf.SciflowError, match="--text_encoding online"):
        sf.DiffusionTrainer(make_model(family), arguments(tmp_path), family=family, train_dataset=data)


def test_what_cannot_be_trained_is_refused_by_name(family, tiny_klein):
    with pytest.raises(sf.SciflowError, match=r"`text_encoder_layers` 'attn' matches no layer.*q_proj"):
        make_model(family, text_encoder_layers="attn")
    klein = sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein))
    with pytest.raises(sf.SciflowError, match="`train_text_encoder`: the pipeline of `flux2_klein` cannot load"):
        sf.add_adapter(klein.load_model(dtype=torch.float32), adapter_args(), family=klein)
    with pytest.raises(sf.SciflowError, match="`no_adapter` and `train_text_encoder`"):
        adapter_args(no_adapter=True)
    assert text_states(network_of(make_model(family))) == {}


def test_two_ranks_train_the_demo_as_one_does(tmp_path):
    """The demo itself, its network made on the spot: the same losses, and every adapter in the file."""
    script = ROOT / "recipes" / "train_sdxl.py"
    config = ROOT / "recipes" / "configs" / "sdxl_demo.yaml"
    options = dict(
        config=config, train_text_encoder=True, text_encoding="online", resolution=64, max_steps=3,
        logging_steps=1, eval_fraction=0, eval_strategy="no", save_steps=3, validation_prompts="A line plot.",
        validation_seeds=0, num_inference_steps=1,
    )  # fmt: skip
    for ranks in (1, 2):
        options |= dict(output_dir=tmp_path / str(ranks), per_device_train_batch_size=4 // ranks)
        run(*(word for name, value in options.items() for word in (f"--{name}", value)), ranks=ranks, script=script)
    one, two = (load_file(tmp_path / str(ranks) / WEIGHT_NAME) for ranks in (1, 2))
    assert {key.split(".")[0] for key in one} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(two[key].any() for key in two)
    np.testing.assert_allclose(logged_losses(tmp_path / "1"), logged_losses(tmp_path / "2"), rtol=1e-4)
