"""Files as other programs write them: default layers of sd-scripts' SD3, DiffSynth's names, tensors of no adapter.

Independent references: diffusers' converters of original checkpoints, and the formula of musubi-tuner.
"""

import re

import pytest
import torch
from answers import apart, read_back, tiny_family, trained_adapter
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from kohya_names import kohya_layers
from lora_formulas import merged
from parity import FEW
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file

import sciflow_hf as sf
from sciflow_hf.adapters.export import check_run, export_adapter
from sciflow_hf.adapters.files import save_adapter
from sciflow_hf.adapters.formats.names import FORMATS
from sciflow_hf.adapters.layers import adapter_layers

KINDS = ("lora", "dora", "lokr", "loha", "oft")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def get(name):
        if name not in made:
            made[name] = tiny_family(name, folder)
        return made[name]

    return get


def draw(rows, columns, kind, rng):
    """An adapter's tensors under kohya's names, and its update."""
    if kind == "lokr":
        sizes = zip(factorization(rows), factorization(columns), strict=True)
        first, second = (torch.randn(size, generator=rng) * 0.3 for size in sizes)
        return {"lokr_w1": first, "lokr_w2": second}, torch.kron(first, second)
    pairs = [[torch.randn(size, generator=rng) * 0.3 for size in ((rows, 4), (4, columns))] for _ in range(2)]
    scale = torch.tensor(6.0)
    if kind == "loha":
        (a, b), (c, d) = pairs
        names = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        return names | {"alpha": scale}, 1.5 * (a @ b) * (c @ d)
    (up, down), _ = pairs
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": scale}, 1.5 * up @ down


class Checkpoint(dict):
    """Of an original network: what is not changed is nothing, in any shape."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(12, 1))

    def __missing__(self, key):
        return torch.zeros(12, 1)


# Linear layers of `SingleDiTBlock`, sd-scripts' default (networks/lora_sd3.py, library/sd3_models.py): rows of the
# matrix relative to its columns. The last text block has the first two alone, two parts in the second.
STREAM = {"attn.qkv": 3, "adaLN_modulation.1": 6, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 1 / 4}


SD3_EMBEDDERS = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def sd3_layers(width):
    """All layers that sd-scripts adapts by default in a network of two blocks, the first with two attentions."""
    for block in range(2):
        for stream in ("x_block", "context_block"):
            for name, factor in STREAM.items():
                if (block, stream) == (1, "context_block"):
                    factor = {"attn.qkv": 3, "adaLN_modulation.1": 2}.get(name)
                elif (block, stream, name) == (0, "x_block", "adaLN_modulation.1"):
                    factor = 9
                columns = 4 * width if name == "mlp.fc2" else width
                if factor is not None:
                    yield f"joint_blocks.{block}.{stream}.{name}", int(columns * factor), columns
    yield "joint_blocks.0.x_block.attn2.qkv", 3 * width, width
    yield "joint_blocks.0.x_block.attn2.proj", width, width


def add(network, updates):
    """Adds to the weights of `network` those updates that have their shape."""
    parameters = dict(network.named_parameters())
    for name, value in updates.items():
        if name in parameters and value.shape == parameters[name].shape:
            parameters[name].data += value
    return network


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_sd_scripts_default_layers_of_sd3(families, tmp_path, kind):
    """With the last text block's modulation, whose halves diffusers has the other way round; and the last of all."""
    family, rng = families("sd3"), torch.Generator().manual_seed(0)
    base, state, updates = family.load_model(dtype=torch.float32), {}, Checkpoint()
    width = base.config.num_attention_heads * base.config.attention_head_dim
    layers = [*sd3_layers(width), ("final_layer.adaLN_modulation.1", 2 * width, width)]
    if kind == "lokr":  # a Kronecker product is not cut into query, key and value
        layers = [layer for layer in layers if "qkv" not in layer[0]]
    for name, rows, columns in layers:
        tensors, updates[f"{name}.weight"] = draw(rows, columns, kind, rng)
        state |= {f"lora_unet_{name.replace('.', '_')}.{end}": value for end, value in tensors.items()}
    if kind == "lora":  # a convolution, and other layers of sd-scripts' `emb_dims`
        for name, path in SD3_EMBEDDERS.items():
            weight = base.get_submodule(path).weight
            tensors, update = draw(len(weight), weight[0].numel(), kind, rng)
            tensors["lora_down.weight"] = tensors["lora_down.weight"].reshape(4, *weight.shape[1:])
            tensors["lora_up.weight"] = tensors["lora_up.weight"].reshape(-1, 4, *[1] * (weight.ndim - 2))
            updates[f"{name}.weight"] = update.reshape(weight.shape)
            state |= {f"lora_unet_{name.replace('.', '_')}.{end}": value for end, value in tensors.items()}
    save_file(state, tmp_path / "theirs.safetensors")
    expected = add(base, convert_sd3_transformer_checkpoint_to_diffusers(updates))
    found = read_back(family, tmp_path / "theirs.safetensors")
    assert "transformer_blocks.1.norm1_context.linear" in adapter_layers(found)
    assert apart(found, expected, family) < FEW

    config = dict(base.config)
    for file_format in ("kohya", "comfy"):
        file = tmp_path / f"{file_format}.safetensors"
        export_adapter(str(tmp_path / "theirs.safetensors"), file, file_format=file_format, network=config)
        assert apart(read_back(family, file), expected, family) < FEW
    again = load_file(tmp_path / "kohya.safetensors")
    names = {"lora": ("lora_up.weight",), "loha": ("hada_w1_b",), "lokr": ("lokr_w1", "lokr_w2")}[kind]
    for layer in ("joint_blocks_1_context_block_adaLN_modulation_1", "final_layer_adaLN_modulation_1"):
        assert all(torch.equal(again[f"lora_unet_{layer}.{n}"], state[f"lora_unet_{layer}.{n}"]) for n in names)


def test_the_last_modulation_of_klein(families, tmp_path):
    """Its halves, too, are turned where a file has the original's name, and not where it has diffusers'."""
    family, rng = families("flux2_klein"), torch.Generator().manual_seed(0)
    base = family.load_model(dtype=torch.float32)
    rows, columns = base.norm_out.linear.weight.shape
    tensors, update = draw(rows, columns, "lora", rng)
    converted = convert_flux2_transformer_checkpoint_to_diffusers({"final_layer.adaLN_modulation.1.weight": update})
    for name, updates in (
        ("lora_unet_final_layer_adaLN_modulation_1", converted),
        ("diffusion_model.final_layer.adaLN_modulation.1", converted),
        ("lycoris_norm_out_linear", {"norm_out.linear.weight": update}),
    ):
        save_file({f"{name}.{end}": value for end, value in tensors.items()}, tmp_path / "theirs.safetensors")
        expected = add(family.load_model(dtype=torch.float32), updates)
        assert apart(read_back(family, tmp_path / "theirs.safetensors"), expected, family) < FEW


def test_the_last_modulation_of_flux(families, tmp_path):
    family, rng = families("flux"), torch.Generator().manual_seed(0)
    base = family.load_model(dtype=torch.float32)
    rows, columns = base.norm_out.linear.weight.shape
    tensors, update = draw(rows, columns, "lora", rng)
    state = {f"lora_unet_final_layer_adaLN_modulation_1.{end}": value for end, value in tensors.items()}
    save_file(state, tmp_path / "theirs.safetensors")
    shift, scale = update.chunk(2)
    expected = add(base, {"norm_out.linear.weight": torch.cat([scale, shift])})
    assert apart(read_back(family, tmp_path / "theirs.safetensors"), expected, family) < FEW


@pytest.mark.parametrize("name", ["flux2_klein", "qwen_image", "sd3", "sdxl"])
def test_lokr_of_two_low_ranks_as_musubi_tuner_knows_it(families, tmp_path, name):
    """Its first factor is one matrix in kohya's names: a layer without `lokr_w1` is passed over there."""
    family = families(name)
    options = {"adapter_type": "lokr", "lokr_decompose_both": True, "lora_layers": "to_out.0,proj_in,img_mlp.net.2"}
    model = trained_adapter(family, rank=1, lora_alpha=6, **options)  # a higher rank is not below half of a width here
    folder, layers = save_adapter(model, tmp_path / "run", family=family).parent, adapter_layers(model)
    states = {}
    for file_format in ("kohya", "diffusers"):
        target, network = tmp_path / f"{file_format}.safetensors", dict(model.config)
        export_adapter(str(folder), target, file_format=file_format, family=name, network=network)
        states[file_format] = load_file(target)
    state, places = states["kohya"], {k: p[0] for k, p in kohya_layers(name, model).items() if p[0] in layers}
    assert sum(key.endswith(".lokr_w1_a") for key in states["diffusers"]) == len(layers)  # which has both
    assert {key for key in state if key.endswith(".lokr_w1")} == {f"{key}.lokr_w1" for key in places}
    assert not [key for key in state if "lokr_w1_" in key] and len(places) == len(layers)
    found, unknown = merged(state, {key: layers[path].base_layer.weight.detach() for key, path in places.items()})
    assert unknown == []
    for key, path in places.items():
        update = layers[path].get_delta_weight("default")
        torch.testing.assert_close(found[key], layers[path].base_layer.weight + update, rtol=1e-5, atol=2e-6)
        assert update.abs().max() > 1e-4
    assert apart(read_back(family, tmp_path / "kohya.safetensors"), model, family) < FEW


# Layer of the original network -> in DiffSynth's own of FLUX.1 (diffsynth/utils/lora/flux.py), and ours.
DIFFSYNTH_FLUX = {
    "blocks.0.attn.a_to_qkv": "attn.to_q attn.to_k attn.to_v",
    "blocks.0.attn.b_to_out": "attn.to_add_out",
    "blocks.0.ff_a.2": "ff.net.2",
    "blocks.0.norm1_b.linear": "norm1_context.linear",
}
PLAIN = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.add_k_proj")


@pytest.mark.parametrize(
    ("name", "prefix", "layers"),
    [
        ("flux2_klein", "", (*PLAIN, "single_transformer_blocks.1.attn.to_qkv_mlp_proj")),
        ("flux2_klein", "pipe.dit.", PLAIN),
        ("flux2_klein", "transformer.", PLAIN),
        ("qwen_image", "", (*PLAIN, "transformer_blocks.0.img_mod.1")),
        ("sdxl", "pipe.unet.", ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)),
        ("flux", "", DIFFSYNTH_FLUX),
    ],
)
def test_diffsynths_files(families, tmp_path, name, prefix, layers):
    """`.default.` in the names, no alpha, so a scale of 1 (diffsynth/diffusion/training_module.py)."""
    family, rng, state, updates = families(name), torch.Generator().manual_seed(0), {}, {}
    base = family.load_model(dtype=torch.float32)
    for layer in layers:
        own = layers[layer].split() if isinstance(layers, dict) else [layer]
        own = [f"transformer_blocks.0.{part}" for part in own] if isinstance(layers, dict) else own
        weights = [base.get_submodule(part).weight for part in own]
        rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
        up, down = (torch.randn(size, generator=rng) * 0.2 for size in ((sum(rows), 4), (4, columns)))
        state |= {f"{prefix}{layer}.lora_{x}.default.weight": v for x, v in (("A", down), ("B", up))}
        updates |= dict(zip((f"{part}.weight" for part in own), (up @ down).split(rows), strict=True))
    save_file(state, tmp_path / "epoch-4.safetensors")
    expected = add(base, updates)
    found = read_back(family, tmp_path / "epoch-4.safetensors")
    assert len(adapter_layers(found)) == len(updates)
    assert apart(found, expected, family) < FEW
    options = {"family": name, "network": dict(base.config)}
    file = export_adapter(
        str(tmp_path / "epoch-4.safetensors"), tmp_path / "x.safetensors", file_format="comfy", **options
    ).file
    assert apart(read_back(family, file), expected, family) < FEW


LAYER = "double_blocks.0.img_attn.proj"


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({"diff": (32, 32)}, r"of its tensors 1 are changes of complete weights, such as .*\.diff\."),
        ({"diff_b": (32,)}, r"1 are changes of biases, such as .*\.diff_b\."),
        (
            {"set_weight": (32, 32), "diff_b": (32,)},
            r"(?=.*1 are complete weights, .*set_weight)(?=.*1 are changes of biases)",
        ),
        (
            {"w_norm": (32,), "b_norm": (32,)},
            "(?=.*changes of the weights of norms)(?=.*changes of the biases of)",
        ),
        ({"oft_blocks": (4, 8, 8), "rescale": (32,)}, "an OFT that turns the output of a layer"),
        ({"a1.weight": (4, 32), "a2.weight": (32, 4), "b1.weight": (4, 32), "b2.weight": (32, 4)}, "4 are a GLoRA"),
        ({"lora_B.bias": (32,)}, "1 are biases of a LoRA"),
        ({"reshape_weight": (2,)}, "1 are new shapes of layers"),
        ({"something": (2,)}, "1 are of no known kind, such as"),
    ],
)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "transformer."])
def test_tensors_of_no_adapter_are_named_as_what_they_are(families, tmp_path, ends, words, prefix):
    """A LoRA with further tensors: without them it would draw other images, so it is not read without."""
    family = families("flux2_klein")
    layer = "transformer_blocks.0.attn.to_out.0" if prefix == "transformer." else LAYER
    layer = layer.replace(".", "_") if prefix == "lora_unet_" else layer
    down, up = ("lora_down", "lora_up") if prefix == "lora_unet_" else ("lora_A", "lora_B")
    sizes = {f"{down}.weight": (4, 32), f"{up}.weight": (32, 4)} | ends
    save_file({f"{prefix}{layer}.{end}": torch.ones(size) for end, size in sizes.items()}, tmp_path / "x.safetensors")
    if "something" in ends and prefix == "transformer.":  # not known to be of another program
        words = "x.safetensors"
    for use in (
        lambda: read_back(family, tmp_path / "x.safetensors"),
        lambda: export_adapter(str(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", file_format="kohya",
                               family="flux2_klein"),
    ):  # fmt: skip
        with pytest.raises(sf.SciflowError, match=words):
            use()
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("name", ["flux2_klein", "qwen_image", "flux"])
@pytest.mark.parametrize("layers", ["to_q", "full", "context_embedder,txt_in,norm1_context.linear,txt_mod.1"])
def test_no_refusal_advises_a_format_that_refuses_it_too(families, name, layers):
    family, said = families(name), 0
    for kind in KINDS:
        model = family.load_model(dtype=torch.float32)
        options = {"oft_block_size": 4} if kind == "oft" else {"rank": 2}
        sf.add_adapter(model, sf.AdapterArguments(adapter_type=kind, lora_layers=layers, **options), family=family)
        for file_format in FORMATS:
            try:
                check_run(model, [file_format], family)
            except sf.SciflowError as error:
                advised = re.findall(r"--format (\w+)", str(error))
                assert advised or "PeftModel.from_pretrained" in str(error)
                said += 1
                for other in advised:
                    check_run(model, [other], family)
    assert said >= 5  # oft three times, loha, dora


def test_an_adapter_of_t5_is_named(families, tmp_path):
    state = {
        f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_{x}.weight": torch.ones(4, 4) for x in ("up", "down")
    }
    save_file(state, tmp_path / "t5.safetensors")
    with pytest.raises(sf.SciflowError, match=r"1 of its layers are none of `sd3`.* No pipeline loads those of T5"):
        read_back(families("sd3"), tmp_path / "t5.safetensors")


@pytest.mark.parametrize("own", [("qkv", "out"), ("to_q", "to_out.0")])
def test_kohyas_names_of_z_image(families, tmp_path, own):
    """The original network's, with one matrix for query, key and value, and the trainer's, as diffusers reads them."""
    family, rng, state = families("z_image"), torch.Generator().manual_seed(0), {}
    width = family.load_model(dtype=torch.float32, meta=True).config.dim
    for name in own:
        layer = f"lora_unet_noise_refiner_0_attention_{name.replace('.', '_')}"
        state[f"{layer}.lora_down.weight"] = torch.randn(4, width, generator=rng) * 0.2
        state[f"{layer}.lora_up.weight"] = torch.randn((1 + 2 * (name == "qkv")) * width, 4, generator=rng) * 0.2
        state[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "kohya.safetensors")
    stock = family.load_pipeline(family.load_model(dtype=torch.float32))
    stock.load_lora_weights(str(tmp_path / "kohya.safetensors"), adapter_name="default")
    found = read_back(family, tmp_path / "kohya.safetensors")
    assert adapter_layers(found).keys() == adapter_layers(stock.transformer).keys()
    assert apart(found, stock.transformer, family) < FEW < apart(found, family.load_model(dtype=torch.float32), family)
