"""Adapters as files of other programs: every family, format and type, read by the readers that users have."""

import re

import pytest
import torch
from answers import FAMILIES, answer, read_back, rounding, tiny_family, trained_adapter
from kohya_names import kohya_layers
from lora_formulas import merged
from parity import FEW
from safetensors.torch import load_file

import sciflow_hf as sf
from sciflow_hf.adapters.export import check_run, export_adapter
from sciflow_hf.adapters.files import read_tensors, save_adapter
from sciflow_hf.adapters.formats.names import COMFY, DIFFUSERS, FORMATS, KOHYA
from sciflow_hf.adapters.layers import adapter_layers, adapter_parameters
from sciflow_hf.demo import make_tiny

TYPES = {
    "lora": {},
    # Ranks and alphas of their own, and alpha / sqrt(rank): every layer has another scale.
    "patterns": {"use_rslora": True, "rank_pattern": "to_q=3,to_k=1", "alpha_pattern": "to_out.0=5"},
    "dora": {"adapter_type": "dora"},
    "loha": {"adapter_type": "loha"},
    "lokr": {"adapter_type": "lokr"},
}
REFUSED = {
    (DIFFUSERS, "loha"): "cannot hold loha: diffusers loads lora, dora and lokr",
    (COMFY, "dora"): "cannot hold DoRA: ComfyUI divides by the norm of the base weight",
    (KOHYA, "lokr"): "several Kronecker products are not one",
}
FUSED = ("flux2_klein", "sd3", "flux")  # one matrix for query, key and value


def refused(family, kind, file_format):
    if kind == "lokr" and file_format == KOHYA and family not in FUSED:
        return None
    return REFUSED.get((file_format, kind))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return tiny_family(request.param, tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module", params=TYPES)
def trained(request, family, tmp_path_factory):
    """(type, network, its answer, what rounding does to that, folder of its adapter), alpha != rank."""
    model = trained_adapter(family, rank=4, lora_alpha=10, **TYPES[request.param])
    folder = save_adapter(model, tmp_path_factory.mktemp("adapter"), family=family).parent
    return request.param, model, answer(model, family), FEW * rounding(model, family), folder


def export(family, model, folder, file_format, target):
    return export_adapter(
        str(folder), target, file_format=file_format, family=family.name, network=dict(model.config)
    ).file


def changed(family, out):
    """How far the adapter moves the answer of the base."""
    return (out - answer(family.load_model(dtype=torch.float32), family)).abs().max()


def whole_weights(family, model):
    """Of every matrix of the original network that is adapted: base weights, and those with PEFT's merged in."""
    modules, layers = dict(model.named_modules()), adapter_layers(model)
    base, summed = {}, {}
    for name, parts in kohya_layers(family.name, model).items():
        if not any(part in layers for part in parts):
            continue
        before, after = [], []
        for part in parts:
            module = modules[part]
            before.append((module.get_base_layer() if part in layers else module).weight.detach().clone())
            if part in layers:
                module.merge()
                after.append(module.get_base_layer().weight.detach().clone())
                module.unmerge()
            else:
                after.append(before[-1])
        base[name], summed[name] = torch.cat(before), torch.cat(after)
    return base, summed


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_pair_is_exported_and_read_back_or_refused(family, trained, tmp_path, file_format):
    kind, model, expected, tolerance, folder = trained
    words = refused(family.name, kind, file_format)
    if words is not None:
        with pytest.raises(sf.SciflowError) as caught:
            export(family, model, folder, file_format, tmp_path / "x.safetensors")
        assert words in str(caught.value) and re.search("Use `--format|PeftModel", str(caught.value))
        assert list(tmp_path.iterdir()) == []
        return
    file = export(family, model, folder, file_format, tmp_path / "x.safetensors")
    again = read_back(family, file)
    assert adapter_layers(again).keys() == adapter_layers(model).keys()
    assert (answer(again, family) - expected).abs().max() < tolerance < 0.05 < changed(family, expected)
    # Where scales differ, layers of a fused matrix get one, and so do all of sdxl.
    kept = kind in ("lora", "dora") or (kind == "patterns" and family.name in ("qwen_image", "z_image", "ernie_image"))
    if file_format == DIFFUSERS or (file_format == KOHYA and kept):  # not a bit is lost
        ours, theirs = adapter_parameters(model), adapter_parameters(again)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        scales = ({path: x.scaling["default"] for path, x in adapter_layers(m).items()} for m in (model, again))
        assert next(scales) == pytest.approx(next(scales), rel=1e-6)


@pytest.mark.parametrize("file_format", [KOHYA, COMFY])
def test_their_arithmetic_gives_the_same_weights(family, trained, tmp_path, file_format):
    """By the formulas of LyCORIS and ComfyUI on the original network's matrices, under the published names."""
    kind, model, _, _, folder = trained
    if refused(family.name, kind, file_format) is not None:
        return
    state = load_file(export(family, model, folder, file_format, tmp_path / "x.safetensors"))
    base, expected = whole_weights(family, model)
    if file_format == COMFY and family.name != "sdxl":  # its names are diffusers': a layer each
        layers = adapter_layers(model)
        base = {f"transformer.{path}": x.get_base_layer().weight.detach().clone() for path, x in layers.items()}
        for layer in layers.values():
            layer.merge()
        expected = {f"transformer.{path}": x.get_base_layer().weight.detach().clone() for path, x in layers.items()}
        for layer in layers.values():
            layer.unmerge()
    found, unknown = merged(state, base)
    assert unknown == [] and len(found) >= 10
    for name, weight in expected.items():
        theirs = found[name]
        if kind == "dora" and name == "lora_unet_joint_blocks_1_context_block_attn_qkv":
            theirs, weight = theirs[len(theirs) // 3 :], weight[len(weight) // 3 :]  # nothing reads these queries
        torch.testing.assert_close(theirs, weight, rtol=1e-5, atol=2e-6)
        assert (weight - base[name][-len(weight) :]).abs().max() > 1e-3


def diffusers_reads(family, kind, file_format):
    """What the family's pipeline loads."""
    if kind == "lokr":  # of pipelines FLUX.2's and Z-Image's
        return family in ("flux2_klein", "z_image") and file_format != KOHYA
    if kind not in ("lora", "patterns"):
        return kind == "dora" and file_format == DIFFUSERS
    # sd3 and ernie_image have no reader of kohya's names. That of flux has the published widths written into it.
    return file_format != KOHYA or family not in ("sd3", "ernie_image", "flux")


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_stock_pipeline_reads_it(family, trained, tmp_path, monkeypatch, file_format):
    kind, model, expected, tolerance, folder = trained
    if not diffusers_reads(family.name, kind, file_format):
        return
    file = export(family, model, folder, file_format, tmp_path / "x.safetensors")
    reports = []
    monkeypatch.setattr("diffusers.loaders.peft._maybe_warn_for_unhandled_keys", lambda keys, _: reports.append(keys))
    pipeline = family.load_pipeline(family.load_model(dtype=torch.float32))
    pipeline.load_lora_weights(str(file), adapter_name="default")
    network = getattr(pipeline, family.component)
    assert adapter_layers(network).keys() == adapter_layers(model).keys()
    assert reports and all(not keys.unexpected_keys for keys in reports)
    assert not [name for keys in reports for name in keys.missing_keys if "lora_" in name or "lokr_" in name]
    assert (answer(network, family) - expected).abs().max() < tolerance


def test_the_converter_of_flux_at_published_widths():
    """diffusers' reader of FLUX.1's kohya files takes 3072 channels and 12288 of the MLP for granted."""
    from diffusers import FluxPipeline

    from sciflow_hf.adapters.formats import kohya
    from sciflow_hf.adapters.formats.diffusers import Layer

    rng = torch.Generator().manual_seed(0)
    sizes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    ranks = {"attn.to_q": 4, "attn.to_k": 4, "attn.to_v": 4, "proj_mlp": 2}
    adapter = {
        f"transformer.single_transformer_blocks.7.{name}": Layer(
            "lora",
            {
                "lora_A": torch.randn(ranks[name], 3072, generator=rng),
                "lora_B": torch.randn(size, ranks[name], generator=rng),
            },
            scale=2.5 if name == "proj_mlp" else 0.5,
        )
        for name, size in sizes.items()
    }
    state = kohya.write(adapter, KOHYA, "flux")
    assert state["lora_unet_single_blocks_7_linear1.lora_up.weight"].shape == (21504, 14)
    converted = FluxPipeline.lora_state_dict(dict(state))
    assert {key.rsplit(".lora_", 1)[0] for key in converted} == set(adapter)
    for path, layer in adapter.items():
        theirs = converted[f"{path}.lora_B.weight"] @ converted[f"{path}.lora_A.weight"][:, :64]
        ours = layer.scale * layer.weights["lora_B"] @ layer.weights["lora_A"][:, :64]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    back = kohya.read(state, "flux")
    assert {path: layer.rank for path, layer in back.items()} == {p: x.rank for p, x in adapter.items()}


def test_oft_has_no_format(family, tmp_path):
    model = trained_adapter(family, adapter_type="oft", oft_block_size=4, lora_layers="attention")
    folder = save_adapter(model, tmp_path / "oft", family=family).parent
    said = {DIFFUSERS: "PeftModel.from_pretrained", KOHYA: "turns the input of a layer", COMFY: "train lora"}
    for file_format, words in said.items():
        with pytest.raises(sf.SciflowError, match=words):
            export(family, model, folder, file_format, tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "base"), [("flux_kontext", "flux"), ("qwen_image_edit", "qwen_image")])
def test_an_adapter_of_edits_has_the_names_of_its_base(name, base, tmp_path):
    """Whatever the family is called: in the file, in its metadata, and when it is read again."""
    family = sf.load_family(name)(str(make_tiny(tmp_path / "tiny", name, size="test")))
    model = trained_adapter(family, rank=4, lora_alpha=10)
    folder = save_adapter(model, tmp_path / "adapter", family=family).parent
    check_run(model, FORMATS, family)
    for kind in (name, base):
        (tmp_path / kind).mkdir()
    for file_format in (KOHYA, COMFY):
        options = {"file_format": file_format, "network": dict(model.config)}
        ours, theirs = (
            export_adapter(str(folder), tmp_path / kind / f"{file_format}.safetensors", family=kind, **options)
            for kind in (name, base)
        )
        (mine, facts), (state, expected) = (read_tensors(done.file, "") for done in (ours, theirs))
        assert ours.family == base and facts == expected and mine.keys() == state.keys()
        assert all(torch.equal(mine[layer], value) for layer, value in state.items())
        again = adapter_parameters(read_back(family, ours.file))
        kept = [torch.equal(again[layer], value) for layer, value in adapter_parameters(model).items()]
        assert len(kept) == len(again) and (file_format == COMFY or all(kept))
