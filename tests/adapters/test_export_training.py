"""Exports of a run: beside its adapter, published with it, refused before it trains; text encoders in them."""

import logging

import pytest
import torch
from answers import apart, tiny_family, trained_adapter
from parity import FEW
from safetensors.torch import load_file
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.adapters.export import export_adapter, export_run
from sciflow_hf.adapters.files import WEIGHT_NAME, save_adapter
from sciflow_hf.adapters.layers import adapter_layers, adapter_parameters
from sciflow_hf.adapters.text_encoders import NetworkWithText
from sciflow_hf.data.load import load_cache
from sciflow_hf.hub.upload import publishable_files
from sciflow_hf.report.summary import summary

TEXT_FAMILIES = ("sdxl", "sd3", "flux")


@pytest.fixture
def family(tiny_klein):
    return sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)


def options(folder, **more):
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **more)


def files(folder):
    return {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_a_run_writes_its_exports_beside_the_adapter(tmp_path, family, tiny_cache, caplog):
    more = dict(save_strategy="steps", save_steps=2, max_steps=2, ema_decay=0.5, ema_warmup=False)
    trainer = make_trainer(
        tmp_path, family, load_cache(tiny_cache), export_formats=["diffusers", "kohya", "comfy"], **more
    )
    trainer.train()
    with caplog.at_level(logging.INFO, logger="sciflow_hf"):
        trainer.save_model()
    assert files(tmp_path) == {WEIGHT_NAME, "lora_kohya.safetensors", "lora_comfy.safetensors"}
    assert not [name for name in files(tmp_path / "checkpoint-2") if name.startswith("lora_")]
    assert f"For ComfyUI: {tmp_path / 'lora_comfy.safetensors'}" in caplog.text
    for name in ("kohya", "comfy"):  # the averaged weights, as in diffusers' file
        by_hand = export_adapter(
            str(tmp_path / WEIGHT_NAME), tmp_path / "by_hand.safetensors", file_format=name, overwrite=True
        )
        state = load_file(tmp_path / f"lora_{name}.safetensors")
        assert all(torch.equal(value, state[key]) for key, value in load_file(by_hand.file).items())
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "\n- `lora_kohya.safetensors`: for musubi-tuner and ComfyUI\n- `lora_comfy.safetensors`: for ComfyUI" in card
    said = summary(trainer)
    assert f"For musubi-tuner and ComfyUI: {tmp_path / 'lora_kohya.safetensors'}\n" in said
    assert "sciflow-hf export" not in said + card  # all of them are there
    published = publishable_files(tmp_path)
    assert {"lora_kohya.safetensors", "lora_comfy.safetensors", WEIGHT_NAME} <= set(published)
    assert "by_hand.safetensors" not in published
    trainer.args.export_formats = ["comfy"]  # what an earlier run left would no longer be this adapter
    trainer.save_model()
    assert files(tmp_path) == {WEIGHT_NAME, "lora_comfy.safetensors", "by_hand.safetensors"}


def test_a_run_in_pefts_files_gets_one_of_diffusers(tmp_path, family):
    model = trained_adapter(family, adapter_type="lokr", rank=4, lora_alpha=10)
    save_adapter(model, tmp_path, family=family)
    written = export_run(tmp_path, ["diffusers"], family, model)
    assert [(done.file.name, done.readers) for done in written] == [
        ("lora_diffusers.safetensors", "diffusers (`load_lora_weights`)")
    ]
    pipeline = family.load_pipeline(family.load_model(dtype=torch.float32))
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora_diffusers.safetensors")
    assert apart(pipeline.transformer, model, family) < FEW


def test_what_a_format_cannot_hold_is_said_before_training(tmp_path, family, tiny_cache):
    model = family.load_model(dtype=torch.float32)
    dora = sf.add_adapter(model, sf.AdapterArguments(rank=2, adapter_type="dora"), family=family)
    whole = sf.add_adapter(family.load_model(dtype=torch.float32), sf.AdapterArguments(no_adapter=True), family=family)
    data = load_cache(tiny_cache)
    for network, words in ((dora, "'comfy': .* cannot hold DoRA"), (whole, "'comfy': only adapters are exported")):
        args = options(tmp_path, export_formats=["comfy"])
        with pytest.raises(sf.SciflowError, match="`export_formats` " + words):
            sf.DiffusionTrainer(network, args, family=family, train_dataset=data)
        with pytest.raises(sf.SciflowError, match="`export_formats` " + words):
            sf.plan(network, family, args, data)
    sf.DiffusionTrainer(dora, options(tmp_path, export_formats=["kohya"]), family=family, train_dataset=data)
    with pytest.raises(sf.SciflowError, match="`export_formats` 'a1111': use one or more of diffusers, kohya, comfy"):
        options(tmp_path, export_formats=["kohya", "a1111"])


# -- text encoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TEXT_FAMILIES)
def text_family(request, tmp_path_factory):
    return tiny_family(request.param, tmp_path_factory.mktemp(request.param))


def with_text(family, **more):
    args = {"rank": 3, "lora_alpha": 6, "train_text_encoder": True, "lora_layers": "to_q,to_k,to_v,to_out.0"} | more
    model = sf.add_adapter(family.load_model(dtype=torch.float32), sf.AdapterArguments(**args), family=family, seed=1)
    if "adapter_path" not in more:
        rng = torch.Generator().manual_seed(0)
        for parameter in adapter_parameters(model).values():
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return model


def updates(model):
    """Change of the weights of each adapted layer, text encoders included."""
    return {path: layer.get_delta_weight("default") for path, layer in adapter_layers(model).items()}


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "comfy"])
def test_text_encoders_travel_along(text_family, tmp_path, file_format):
    model = with_text(text_family)
    folder = save_adapter(model, tmp_path / "run", family=text_family).parent
    file, network = tmp_path / "x.safetensors", dict(model.config)
    export_adapter(str(folder), file, file_format=file_format, family=text_family.name, network=network)
    names = {name.rsplit(".lora", 1)[0] for name in load_file(file)}
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    first = f"text_encoder.{layer}"
    if file_format == "kohya" or (file_format == "comfy" and text_family.name == "sdxl"):
        first = "lora_te1_" + layer.replace(".", "_")
    assert first in names
    again = with_text(text_family, adapter_path=str(file))
    assert isinstance(again, NetworkWithText)
    before, after = updates(model), updates(again)
    assert before.keys() == after.keys() and len([path for path in before if path.startswith("text_encoder")]) >= 8
    for path, update in before.items():
        torch.testing.assert_close(after[path], update, rtol=1e-5, atol=1e-6)


def test_the_stock_pipeline_reads_kohyas_text_encoders(text_family, tmp_path):
    if text_family.name == "sd3":
        return  # its loader knows none of kohya's names
    model = with_text(text_family, lora_layers="add_q_proj,to_add_out,attn2.to_q")  # see test_export of flux's widths
    folder = save_adapter(model, tmp_path / "run", family=text_family).parent
    file = export_adapter(
        str(folder),
        tmp_path / "x.safetensors",
        file_format="kohya",
        family=text_family.name,
        network=dict(model.config),
    ).file
    pipeline = text_family.pipeline_class().from_pretrained(text_family.pretrained_model_name_or_path)
    pipeline.load_lora_weights(str(file), adapter_name="default")
    expected = {path: update for path, update in updates(model).items() if path.startswith("text_encoder")}
    for path, update in expected.items():
        part, _, inner = path.partition(".")
        theirs = getattr(pipeline, part).get_submodule(inner).get_delta_weight("default")
        torch.testing.assert_close(theirs, update, rtol=1e-5, atol=1e-6)
    assert len(expected) >= 8
