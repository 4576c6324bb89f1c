"""LoRA files of kohya's tools, LyCORIS, ComfyUI and others as `--adapter_path`, and what PEFT cannot take of them."""

import pytest
import torch
from answers import apart, read_back, tiny_family, trained_adapter
from parity import FEW
from safetensors.torch import load_file, save_file
from trainings import same

import sciflow_hf as sf
from sciflow_hf.adapters.export import export_adapter
from sciflow_hf.adapters.files import save_adapter
from sciflow_hf.adapters.layers import adapter_parameters


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return tiny_family("flux2_klein", tmp_path_factory.mktemp("pipeline"))


def test_a_fused_adapter_of_other_programs_is_split_and_fused_again(family, tmp_path):
    """What kohya's tools train: one factor on the input side for query, key and value."""
    rng = torch.Generator().manual_seed(1)
    width = family.load_model(dtype=torch.float32).transformer_blocks[0].attn.to_q.in_features
    state = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(4, width, generator=rng),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(3 * width, 4, generator=rng),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
    }
    save_file(state, tmp_path / "theirs.safetensors")
    model = read_back(family, tmp_path / "theirs.safetensors")
    parameters = adapter_parameters(model)
    assert len(parameters) == 6 and {p.shape[0] for n, p in parameters.items() if "lora_A" in n} == {4}
    again = save_adapter(model, tmp_path / "run", family=family)
    export_adapter(str(again), tmp_path / "b.safetensors", file_format="kohya", family="flux2_klein")
    assert same(load_file(tmp_path / "b.safetensors"), state)


SPELLINGS = {
    "musubi-tuner": lambda layer, _, kind: f"lora_unet_{layer.replace('.', '_')}.{kind}",
    "ai-toolkit": lambda layer, _, kind: f"diffusion_model.{layer}.{AB.get(kind, kind)}",
    "SimpleTuner": lambda _, ours, kind: f"lycoris_{ours.replace('.', '_')}.{kind}",
    "OneTrainer": lambda _, ours, kind: f"lora_transformer_{ours.replace('.', '_')}.{kind}",
    "DiffSynth": lambda _, ours, kind: f"{ours}.{AB.get(kind, kind)}",
    "with alphas": lambda _, ours, kind: f"transformer.{ours}.{AB.get(kind, kind)}",
}
AB = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@pytest.mark.parametrize("program", SPELLINGS)
def test_names_as_other_programs_spell_them(family, tmp_path, program):
    """The same layers and values: as ComfyUI's `model_lora_keys_unet` lists the spellings."""
    rng, state, merged = torch.Generator().manual_seed(2), {}, family.load_model(dtype=torch.float32)
    for layer, ours in (
        ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
        ("single_blocks.1.linear2", "single_transformer_blocks.1.attn.to_out"),
    ):
        module = merged.get_submodule(ours)
        down, up = (
            torch.randn(shape, generator=rng) * 0.1 for shape in ((4, module.in_features), (module.out_features, 4))
        )
        for kind, value in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(6.0))):
            state[SPELLINGS[program](layer, ours, kind)] = value
        module.weight.data += 6 / 4 * up @ down
    save_file(state, tmp_path / "theirs.safetensors")
    model = read_back(family, tmp_path / "theirs.safetensors")
    assert apart(model, merged, family) < FEW
    done = export_adapter(
        str(tmp_path / "theirs.safetensors"), tmp_path / "x.safetensors", file_format="kohya", family="flux2_klein"
    )
    assert apart(read_back(family, done.file), merged, family) < FEW


def test_single_layers_of_a_fused_matrix(family, tmp_path):
    """Only the keys are adapted: zeros for queries and values, which are dropped again."""
    model = trained_adapter(family, rank=4, lora_alpha=10, lora_layers="to_k,add_v_proj")
    folder = save_adapter(model, tmp_path / "run", family=family).parent
    file = export_adapter(str(folder), tmp_path / "k.safetensors", file_format="kohya", family="flux2_klein").file
    up = load_file(file)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    third = len(up) // 3
    assert up.shape[1] == 4 and not up[:third].any() and up[third : 2 * third].any() and not up[2 * third :].any()
    assert same(adapter_parameters(read_back(family, file)), adapter_parameters(model))


def test_the_norms_of_a_dora_count_without_an_update(family, tmp_path):
    """A layer of a fused matrix whose update is zero, but not its norms."""
    model = trained_adapter(family, rank=4, lora_alpha=10, adapter_type="dora", lora_layers="to_q,to_k,to_v")
    adapter_parameters(model)["transformer_blocks.0.attn.to_q.lora_B.default.weight"].data.zero_()
    folder = save_adapter(model, tmp_path / "run", family=family).parent
    file = export_adapter(str(folder), tmp_path / "k.safetensors", file_format="kohya", family="flux2_klein").file
    assert apart(read_back(family, file), model, family) < FEW


def test_an_untrained_adapter_keeps_its_ranks(family, tmp_path):
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=4, lora_alpha=10, lora_layers="to_q,to_k,to_v"), family=family)
    folder = save_adapter(model, tmp_path / "run", family=family).parent
    file = export_adapter(str(folder), tmp_path / "k.safetensors", file_format="kohya", family="flux2_klein").file
    assert same(adapter_parameters(read_back(family, file)), adapter_parameters(model))


NAME = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{NAME}.lora_mid.weight": torch.ones(4, 4)}, "1 are the middle matrices of a LoCon, such as .*mid"),
        ({"lora_unet_time_in_in_layer.alpha": torch.tensor(1.0)}, "1 of its layers are none of `flux2_klein`"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, "none of `flux2_klein`"),
        ({"lora_unet_single_blocks_0_linear2.alpha": torch.tensor(1.0)}, "has an alpha and no weights"),
        ({f"{NAME}.lora_up.weight": None}, f"{NAME} lacks lora_B"),
        ({f"{NAME}.lora_down.weight": None, f"{NAME}.lora_up.weight": None, f"{NAME}.lokr_w1": torch.ones(4, 4),
          f"{NAME}.lokr_w2": torch.ones(8, 8), f"{NAME}.dora_scale": torch.ones(32, 1)},
         "is a lokr with dora_scale, which PEFT does not have"),
        ({f"{NAME}.dora_scale": torch.ones(1, 32)}, "its DoRA has a magnitude for each column"),
        ({"transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": torch.ones(4, 32),
          "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": torch.ones(32, 4)}, "two of its layers are"),
    ],
)  # fmt: skip
def test_files_of_tools_that_peft_cannot_take(family, tmp_path, change, words):
    state = {f"{NAME}.lora_down.weight": torch.ones(4, 32), f"{NAME}.lora_up.weight": torch.ones(32, 4)} | change
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "theirs.safetensors")
    for use in (
        lambda: read_back(family, tmp_path / "theirs.safetensors"),
        lambda: export_adapter(
            str(tmp_path / "theirs.safetensors"), tmp_path / "x.safetensors", file_format="comfy", family="flux2_klein"
        ),
    ):
        with pytest.raises(sf.SciflowError, match=words) as caught:
            use()
        assert "theirs.safetensors" in str(caught.value)


def test_a_fused_kronecker_product_cannot_be_split(family, tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lokr_w1": torch.ones(6, 4), f"{name}.lokr_w2": torch.ones(16, 8)}
    save_file(state, tmp_path / "lokr.safetensors")
    with pytest.raises(sf.SciflowError, match="a lokr of the fused matrix is none of the 3 layers"):
        read_back(family, tmp_path / "lokr.safetensors")
