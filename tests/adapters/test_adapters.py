"""Adapters: which layers, and how they begin, on a tiny klein."""

import logging

import pytest
import torch
from adapter_bench import adapted, klein_output, randomise
from peft import LoraConfig
from trainings import same

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import match_layers
from sciflow_hf.adapters.files import save_adapter
from sciflow_hf.adapters.layers import adapter_disabled, adapter_facts, adapter_layers, adapter_parameters

# The two strings that the older code recommended for klein; plain PEFT fails on both.
OLD_FULL = (
    "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,linear_in,linear_out,"
    "to_qkv_mlp_proj,attn.to_out"
)
OLD_EXPLICIT = (
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
    "attn.to_add_out,ff.linear_in,ff.linear_out,ff_context.linear_in,ff_context.linear_out,"
    "attn.to_qkv_mlp_proj,attn.to_out"
)


# -- layers --------------------------------------------------------------------------------------------------


def linears(model, preset):
    """The linear modules of a preset, collected by attribute from the blocks themselves."""
    found = []
    for block in model.transformer_blocks:
        attn = block.attn
        found += [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]]
        if preset != "attention":
            found += [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out]
        if preset == "full":
            found += [block.ff.linear_in, block.ff.linear_out]
            found += [block.ff_context.linear_in, block.ff_context.linear_out]
    if preset == "full":
        for block in model.single_transformer_blocks:
            found += [block.attn.to_qkv_mlp_proj, block.attn.to_out]
    assert all(isinstance(module, torch.nn.Linear) for module in found)
    return found


@pytest.mark.promise("B04", "B05", "B06")
@pytest.mark.parametrize("preset", ["attention", "standard", "full"])
def test_presets_take_the_layers_they_say(family, preset):
    model = family.load_model(dtype=torch.float32)
    expected = linears(model, preset)
    double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    count = {"attention": 4 * double, "standard": 8 * double, "full": 12 * double + 2 * single}[preset]
    sf.add_adapter(model, sf.AdapterArguments(rank=3, lora_layers=preset), family=family)
    layers = adapter_layers(model)
    assert {id(layer.get_base_layer()) for layer in layers.values()} == {id(module) for module in expected}
    facts = adapter_facts(model)
    assert facts["matched"] == len(layers) == len(expected) == count
    size = sum(3 * (module.in_features + module.out_features) for module in expected)
    assert facts["trainable_parameters"] == size == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.promise("B06")
def test_the_default_is_full(family):
    assert adapter_facts(adapted(family))["matched"] == len(linears(family.load_model(dtype=torch.float32), "full"))


@pytest.mark.promise("B06", "B07")
@pytest.mark.parametrize("layers", [OLD_FULL, OLD_EXPLICIT], ids=["full", "explicit"])
def test_the_old_strings_fail_in_peft_and_work_here(family, layers):
    config = LoraConfig(target_modules=layers.split(","))
    with pytest.raises(ValueError, match="ModuleList"):
        family.load_model(dtype=torch.float32).add_adapter(config)
    model = family.load_model(dtype=torch.float32)
    expected = {id(module) for module in linears(model, "full")}
    sf.add_adapter(model, sf.AdapterArguments(rank=2, lora_layers=layers), family=family)
    assert {id(layer.get_base_layer()) for layer in adapter_layers(model).values()} == expected
    ends = {name.split(".")[0] for name in adapter_layers(model) if name.endswith(".attn.to_out")}
    assert ends == {"single_transformer_blocks"}


def test_names_match_whole_parts_of_a_path(family):
    model = family.load_model(dtype=torch.float32)
    assert match_layers(model, "transformer_blocks.0.attn.to_k", {}) == ["transformer_blocks.0.attn.to_k"]
    assert match_layers(model, " to_k , x_embedder ", {}) == ["x_embedder", "transformer_blocks.0.attn.to_k"]
    assert match_layers(model, "mine", {"mine": "x_embedder"}) == ["x_embedder"]
    with pytest.raises(sf.SciflowError):
        match_layers(model, "o_k", {})  # the end of `to_k`, but no part of the path


def test_no_match_says_what_there_is(family, caplog):
    with pytest.raises(sf.SciflowError) as caught:
        adapted(family, lora_layers="to_kk")
    said = str(caught.value)
    assert "`lora_layers` 'to_kk' matches no layer" in said and "attention, standard, full" in said
    assert "to_k" in said.split("layer names here:")[1]
    for nothing in ("", " , ", "transformer_blocks"):
        with pytest.raises(sf.SciflowError, match="matches no layer"):
            adapted(family, lora_layers=nothing)
    with caplog.at_level(logging.INFO, logger="sciflow_hf"):
        model = adapted(family, rank=2, lora_layers="to_k,to_kk,nope")
    assert adapter_facts(model)["matched"] == 1
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and "to_kk, nope" in warned[0]
    assert "lora rank 2 alpha 2 on 1 layer, 128 parameters" in caplog.text


@pytest.mark.promise("B03")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "`rank` 0"),
        ({"rank": -3}, "`rank` -3"),
        ({"lora_alpha": 0}, "`lora_alpha` 0"),
        ({"lora_dropout": 1.0}, "`lora_dropout` 1.0"),
        ({"lora_dropout": -0.1}, "`lora_dropout` -0.1"),
        ({"adapter_type": "ia3"}, "`adapter_type` 'ia3': use one of lora, dora, lokr, loha, oft"),
        ({"no_adapter": True, "adapter_path": "x.safetensors"}, "`no_adapter` and `adapter_path`"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(sf.SciflowError) as caught:
        sf.AdapterArguments(**options)
    assert words in str(caught.value)


@pytest.mark.promise("B03")
def test_alpha_is_the_rank_unless_given():
    assert sf.AdapterArguments(rank=7).lora_alpha == 7
    assert sf.AdapterArguments(rank=7, lora_alpha=3).lora_alpha == 3


# -- how it begins -------------------------------------------------------------------------------------------


def test_it_begins_as_the_base_and_is_scaled_by_alpha_over_rank(family):
    base = family.load_model(dtype=torch.float32)
    for kind in ("lora", "dora"):
        torch.testing.assert_close(klein_output(adapted(family, rank=4, adapter_type=kind)), klein_output(base))
    model = randomise(adapted(family, rank=4, lora_alpha=10, lora_layers="to_qkv_mlp_proj"))
    merged = family.load_model(dtype=torch.float32)
    values = {name.replace(".default", ""): p.detach() for name, p in adapter_parameters(model).items()}
    for name, module in merged.named_modules():
        if f"{name}.lora_A.weight" in values:
            delta = values[f"{name}.lora_B.weight"] @ values[f"{name}.lora_A.weight"]
            module.weight.data += 10 / 4 * delta
    torch.testing.assert_close(klein_output(model), klein_output(merged))
    assert (klein_output(model) - klein_output(base)).abs().max() > 1e-2


def test_the_seed_decides_and_torch_is_left_alone(family):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (adapter_parameters(adapted(family, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    shifted = adapter_parameters(adapted(family, seed=1))
    assert same(first, again) and same(first, shifted)
    assert all(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert all(not value.any() for name, value in first.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_are_float32_on_a_bfloat16_base(family, kind):
    model = adapted(family, dtype=torch.bfloat16, adapter_type=kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == adapter_parameters(model).keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert len(trained) == len(adapter_layers(model)) * (3 if kind == "dora" else 2)
    assert klein_output(randomise(model)).dtype == torch.bfloat16


@pytest.mark.promise("B03")
def test_without_adapter_everything_is_trained(family):
    model = adapted(family, no_adapter=True)
    assert all(p.requires_grad for p in model.parameters()) and adapter_layers(model) == {}
    assert adapter_facts(model) is None and adapter_parameters(model) == {}


def test_a_model_without_weights_takes_adapters(family, tmp_path, recwarn):
    """`--dry_run` has the network on the meta device."""
    real = adapted(family, rank=4, lora_alpha=6)
    file = save_adapter(real, tmp_path, family=family)
    for options in ({"rank": 4, "lora_alpha": 6}, {"adapter_path": str(file)}):
        model = adapted(family, dtype=torch.bfloat16, meta=True, **options)
        assert adapter_facts(model) == adapter_facts(real)
        shapes = {n: (p.shape, p.dtype) for n, p in adapter_parameters(model).items()}
        assert shapes == {n: (p.shape, torch.float32) for n, p in adapter_parameters(real).items()}
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not [w for w in recwarn if "meta parameter" in str(w.message)]


def test_switched_off_it_is_the_base_even_after_an_exception(family):
    model, base = randomise(adapted(family, rank=4)), family.load_model(dtype=torch.float32)
    changed = klein_output(model)
    with adapter_disabled(model):
        assert torch.equal(klein_output(model), klein_output(base))
    with pytest.raises(KeyError), adapter_disabled(model):
        raise KeyError
    assert torch.equal(klein_output(model), changed)
