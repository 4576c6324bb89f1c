"""Options of adapters: what each does to the weights, and what is refused in words, on a tiny klein and SDXL."""

import json

import pytest
import torch
from adapter_bench import Bench, make_tiny_family, randomise
from peft import IA3Config, LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import match_layers
from sciflow_hf.adapters.files import WEIGHT_NAME, save_adapter
from sciflow_hf.adapters.layers import adapter_disabled, adapter_facts, adapter_layers, adapter_parameters
from sciflow_hf.options import RecipeParser

LAYER = "transformer_blocks.0.attn.to_q"  # 32 wide


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return Bench(make_tiny_family("flux2_klein", folder), folder)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return make_tiny_family("sdxl", tmp_path_factory.mktemp("sdxl"))


def ranks(model):
    """Rank of every adapted layer, by the shapes of its weights."""
    return {path: layer.lora_A["default"].weight.shape[0] for path, layer in adapter_layers(model).items()}


# -- what an option does -------------------------------------------------------------------------------------------


def kron(w1, w2):
    """Kronecker product by its definition: (i k, j l) -> w1[i, j] w2[k, l]."""
    return torch.einsum("ij,kl->ikjl", w1, w2).reshape(w1.shape[0] * w2.shape[0], -1)


def merged_by_hand(kind, p, weight):
    """The weight of a layer with an adapter of rank 4 and alpha 6, by the papers' equations."""
    if kind == "lora":
        return weight + 6 / 4 * p["lora_B.weight"] @ p["lora_A.weight"]
    if kind == "rslora":
        return weight + 6 / 4**0.5 * p["lora_B.weight"] @ p["lora_A.weight"]
    if kind == "dora":
        moved = weight + 6 / 4 * p["lora_B.weight"] @ p["lora_A.weight"]
        return p["lora_magnitude_vector.weight"][:, None] * moved / moved.norm(dim=1, keepdim=True)
    if kind == "lokr":
        return weight + 6 / 4 * kron(p["lokr_w1"], p["lokr_w2"])
    if kind == "lokr of both factors":
        return weight + 6 / 1 * kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"])
    if kind == "loha":
        return weight + 6 / 4 * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    rows, columns = torch.triu_indices(8, 8, 1)  # oft: I + 2Q + 2Q^2 + 2Q^3 + Q^4 is nearly (I + Q)(I - Q)^-1
    rotations = []
    for vector in p["oft_R.weight"]:
        q = torch.zeros(8, 8)
        q[rows, columns] = vector
        q = q - q.T
        rotations.append((torch.eye(8) + q) @ torch.linalg.inv(torch.eye(8) - q))
    return weight @ torch.block_diag(*rotations).T


MATHS = {
    "lora": {"rank": 4, "lora_alpha": 6},
    "rslora": {"rank": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"rank": 4, "lora_alpha": 6, "adapter_type": "dora"},
    "lokr": {"rank": 4, "lora_alpha": 6, "adapter_type": "lokr", "lokr_factor": 4},
    "lokr of both factors": {"rank": 1, "lora_alpha": 6, "adapter_type": "lokr", "lokr_decompose_both": True},
    "loha": {"rank": 4, "lora_alpha": 6, "adapter_type": "loha"},
    "oft": {"adapter_type": "oft", "oft_block_size": 8},
}


@pytest.mark.parametrize("kind", MATHS)
def test_a_layer_is_what_the_paper_says(bench, kind):
    model = bench.adapted(lora_layers=LAYER, **MATHS[kind])
    randomise(model)
    if kind == "oft":  # small rotations: five terms of the series are enough
        for parameter in adapter_parameters(model).values():
            parameter.data *= 0.1
    (layer,) = adapter_layers(model).values()
    found = {n.removeprefix(f"{LAYER}.").replace(".default", ""): p for n, p in adapter_parameters(model).items()}
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    base = layer.get_base_layer()
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, merged_by_hand(kind, found, base.weight), base.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=2e-5)
        assert (layer(x) - base(x)).abs().max() > 1e-2


@pytest.mark.promise("B09")
def test_ranks_and_alphas_of_single_layers(bench, tmp_path):
    pattern = "single_transformer_blocks.*=8, ff=4,single_transformer_blocks.1=2"
    model = bench.adapted(rank=16, rank_pattern=pattern)
    expected = dict.fromkeys(adapter_layers(model), 16)
    for path in expected:
        if path.startswith("transformer_blocks.0.ff."):  # not ff_context
            expected[path] = 4
        if path.startswith("single_transformer_blocks.0."):
            expected[path] = 8
        if path.startswith("single_transformer_blocks.1."):  # the last that matches
            expected[path] = 2
    assert ranks(model) == expected and set(expected.values()) == {2, 4, 8, 16}
    assert {layer.scaling["default"] for layer in adapter_layers(model).values()} == {1.0}  # alpha is the rank
    facts = adapter_facts(model)
    assert facts["rank_pattern"]["transformer_blocks.*.ff.linear_in"] == 4 and facts["rank"] == 16
    assert facts["rank_pattern"]["single_transformer_blocks.1.attn.to_out"] == 2  # the blocks differ
    state = load_file(save_adapter(model, tmp_path, family=bench.family))
    assert {k.split(".lora_A")[0]: v.shape[0] for k, v in state.items() if "lora_A" in k} == {
        f"transformer.{path}": rank for path, rank in expected.items()
    }
    given = bench.adapted(rank=16, lora_alpha=8, rank_pattern={"ff": 4}, alpha_pattern={"to_q": 32, "ff.linear_in": 1})
    scales = {path: layer.scaling["default"] for path, layer in adapter_layers(given).items()}
    assert scales[LAYER] == 2 and scales["transformer_blocks.0.attn.to_k"] == 0.5  # 32 / 16, 8 / 16
    assert scales["transformer_blocks.0.ff.linear_out"] == 2 and scales["transformer_blocks.0.ff.linear_in"] == 0.25


def test_patterns_of_flags_and_yaml(tmp_path):
    yaml = "rank_pattern:\n  single_transformer_blocks.*: 8\n  ff: 4\ninit_lora_weights: true\n"
    (tmp_path / "run.yaml").write_text(yaml)
    parser = RecipeParser([sf.AdapterArguments])
    (by_yaml,) = parser.parse(["--config", str(tmp_path / "run.yaml")])
    (by_flag,) = parser.parse(
        ["--rank_pattern", "single_transformer_blocks.*=8,ff=4", "--init_lora_weights", "kaiming"]
    )
    assert by_yaml == by_flag and by_flag.rank_pattern == {"single_transformer_blocks.*": 8, "ff": 4}
    assert by_flag.init_lora_weights == "kaiming" and (by_flag.rank, by_flag.lora_alpha) == (16, 16)


@pytest.mark.parametrize(
    ("init", "dtype"), [("pissa", torch.float32), ("olora", torch.float32), ("pissa", torch.bfloat16)]
)
def test_beginning_with_a_part_of_the_base(bench, tmp_path, init, dtype):
    """B0 A0 is that part, by an SVD or QR of our own; no bit of the base changes; the file needs the base only."""
    untouched = dict(bench.load(dtype).named_parameters())
    model = bench.adapted(dtype=dtype, rank=4, lora_alpha=6, init_lora_weights=init)
    for path, layer in adapter_layers(model).items():
        weight = untouched[f"{path}.weight"]
        assert torch.equal(layer.get_base_layer().weight, weight)
        if init == "pissa":
            u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
            part = u[:, :4] * s[:4] @ v[:4]
        else:
            q, r = torch.linalg.qr(weight.double())
            part = 6 / 4 * q[:, :4] @ r[:4]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close((6 / 4 * b @ a).double(), part, rtol=0, atol=1e-4)
        assert torch.equal(layer.lora_A["initial"].weight, a) and torch.equal(layer.lora_B["initial"].weight, -b)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert not [
        n for n, p in model.named_parameters() if ".initial." in n and (p.requires_grad or p.dtype != torch.float32)
    ]
    file = save_adapter(model, tmp_path, family=bench.family)
    with safe_open(file, "pt") as opened:
        stored = next(json.loads(v) for v in opened.metadata().values() if v.startswith("{"))
    assert stored["transformer.init_lora_weights"] is True  # by another name diffusers would change the base
    assert (stored["transformer.r"], stored["transformer.lora_alpha"]) == (8, 12)
    assert {v.shape[0] for k, v in load_file(file).items() if "lora_A" in k} == {8}
    assert adapter_facts(model)["init"] == init


# -- bases and devices ---------------------------------------------------------------------------------------------

TYPES = {
    "lora": {"rank": 4},
    "pissa": {"rank": 4, "init_lora_weights": "pissa_niter_4"},
    "orthogonal": {"rank": 4, "init_lora_weights": "orthogonal"},
    "dora": {"rank": 4, "adapter_type": "dora"},
    "lokr": {"rank": 4, "adapter_type": "lokr"},
    "loha": {"rank": 4, "adapter_type": "loha"},
    "oft": {"adapter_type": "oft", "oft_block_size": 4},
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_without_weights_takes_it(bench, kind):
    """`--dry_run` has the network on the meta device."""
    real, args = bench.adapted(**TYPES[kind]), sf.AdapterArguments(**TYPES[kind])
    empty = sf.add_adapter(bench.load(torch.bfloat16, meta=True), args, family=bench.family)
    assert adapter_facts(empty) == adapter_facts(real)
    shapes = {n: (p.shape, p.dtype, p.requires_grad) for n, p in adapter_parameters(empty).items()}
    assert shapes == {n: (p.shape, torch.float32, True) for n, p in adapter_parameters(real).items()}
    assert {p.device.type for p in empty.parameters()} == {"meta"}


REFUSED = {
    ("nf4", "lokr"): "'lokr' cannot work on 4-bit weights",
    ("nf4", "loha"): "'loha' cannot work on 4-bit weights",
}
REFUSED |= {("int8", "dora"): "'dora' cannot read the 8-bit weights of bitsandbytes on a CPU"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """FLUX.1 has layers 128 wide even in the smallest network: nf4 packs those whose width is a multiple of 64."""
    folder = tmp_path_factory.mktemp("wide")
    return Bench(make_tiny_family("flux", folder), folder)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("base", ["bfloat16", "nf4", "int8"])
def test_weights_are_float32_and_train_whatever_the_base(wide, base, kind):
    network = wide.load(torch.bfloat16, quantize=None if base == "bfloat16" else base)
    if base != "bfloat16":
        assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[base] in {type(m).__name__ for m in network.modules()}
    with torch.no_grad():
        expected = wide.loss(network)
    args = sf.AdapterArguments(**TYPES[kind])
    if (base, kind) in REFUSED:
        with pytest.raises(sf.SciflowError, match=REFUSED[base, kind]):
            sf.add_adapter(network, args, family=wide.family)
        return
    model = sf.add_adapter(network, args, family=wide.family, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(wide.loss(model), expected, rtol=0.02, atol=0.02)
    randomise(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = wide.loss(model)
    loss.mean().backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    with adapter_disabled(model), torch.no_grad():
        assert torch.equal(wide.loss(model), expected)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_type": "oft", "rank": 4}, "`rank` 4 does not go with `adapter_type` 'oft': it is an option"),
        ({"adapter_type": "oft", "lora_alpha": 4}, "`lora_alpha` 4 does not go with"),
        ({"adapter_type": "oft", "lora_dropout": 0.1}, "`lora_dropout` 0.1 does not go with"),
        ({"adapter_type": "loha", "lora_dropout": 0.1}, "it is an option of lora, dora. Leave it out."),
        ({"adapter_type": "lokr", "use_rslora": True}, "`use_rslora` True does not go with"),
        ({"adapter_type": "lokr", "init_lora_weights": "pissa"}, "`init_lora_weights` 'pissa' does not go with"),
        ({"lokr_factor": 4}, "`lokr_factor` 4 does not go with `adapter_type` 'lora': it is an option of lokr"),
        ({"lokr_decompose_both": True}, "`lokr_decompose_both` True does not go with"),
        ({"adapter_type": "dora", "oft_block_size": 8}, "`oft_block_size` 8 does not go with"),
        ({"adapter_type": "dora", "init_lora_weights": "pissa"}, "'pissa' does not go with `adapter_type` 'dora'"),
        ({"adapter_type": "dora", "init_lora_weights": "olora"}, "'olora' does not go with `adapter_type` 'dora'"),
        ({"init_lora_weights": "eva"}, "'eva' cannot work here: it needs the activations of the training data"),
        ({"init_lora_weights": "corda"}, "'corda' cannot work here"),
        ({"init_lora_weights": "loftq"}, "'loftq' cannot work here: it quantises the base"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' cannot work here: it needs gradients"),
        ({"init_lora_weights": "pissa_niter_0"}, "'pissa_niter_0': use one of gaussian, kaiming, orthogonal, pissa"),
        ({"init_lora_weights": "no"}, "'no': use one of"),
        ({"rank_pattern": "ff"}, "`rank_pattern` 'ff': write name=number"),
        ({"rank_pattern": "ff=0"}, "`rank_pattern` 'ff=0'"),
        ({"rank_pattern": "ff=2.5,to_q=2"}, "whole numbers of at least 1"),
        ({"alpha_pattern": {"ff": True}}, "`alpha_pattern` {'ff': True}"),
        ({"alpha_pattern": "=4"}, "`alpha_pattern` '=4'"),
        ({"adapter_type": "lokr", "lokr_factor": 0}, "`lokr_factor` 0: at least 2, or -1"),
        ({"adapter_type": "oft", "oft_block_size": 1}, "`oft_block_size` 1: at least 2"),
    ],
)  # fmt: skip
def test_options_that_cannot_work(options, words):
    with pytest.raises(sf.SciflowError) as caught:
        sf.AdapterArguments(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 33}, f"`rank` 33 is above the width of {LAYER}, 32 (and of "),
        ({"rank": 4, "rank_pattern": "to_q=40"}, f"`rank_pattern` 40 is above the width of {LAYER}, 32. Lower it"),
        ({"rank": 33, "adapter_type": "dora"}, "`rank` 33 is above"),
        ({"rank": 33, "adapter_type": "loha"}, "`rank` 33 is above"),
        ({"rank": 33, "adapter_type": "lokr"}, "`rank` 33 is above"),
        ({"adapter_type": "lokr", "lokr_factor": 3}, f"`lokr_factor` 3 does not divide 32, a width of {LAYER}"),
        ({"adapter_type": "lokr", "lokr_factor": 64}, "All of these layers allow 2, 4, 8, 16, 32;"),
        ({"adapter_type": "oft", "oft_block_size": 24}, f"24 does not divide 32, a width of {LAYER}"),
        ({"adapter_type": "oft", "oft_block_size": 5}, "All of these layers allow 2, 4, 8, 16, 32;"),
        ({"rank_pattern": "fff=4"}, "`rank_pattern` 'fff' matches no layer with an adapter. Parts of their names: ff"),
        ({"alpha_pattern": "x_embedder=4"}, "`alpha_pattern` 'x_embedder' matches no layer"),
        ({"rank": 5, "init_lora_weights": "orthogonal"}, "'orthogonal' needs even ranks: transformer_blocks.0"),
        ({"rank": 4, "rank_pattern": "ff=3", "init_lora_weights": "orthogonal"}, "ff.linear_in"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_network(bench, options, words):
    with pytest.raises(sf.SciflowError) as caught:
        bench.adapted(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("options", [{"adapter_type": "oft"}, {"rank": 4, "init_lora_weights": "pissa"}])
def test_convolutions_are_named(sdxl, options):
    args = sf.AdapterArguments(lora_layers="conv1,to_q", **options)
    with pytest.raises(sf.SciflowError) as caught:
        sf.add_adapter(sdxl.load_model(dtype=torch.float32), args, family=sdxl)
    value = options.get("init_lora_weights", "oft")
    assert f"{value!r} does not go with convolutions: down_blocks.0.resnets.0.conv1" in str(caught.value)
    assert "and 5 more" in str(caught.value) and "`standard` and `attention`" in str(caught.value)


def test_presets_that_a_family_has_not(bench):
    network = bench.load()
    with pytest.raises(sf.SciflowError) as caught:
        match_layers(network, "full", {"attention": "to_q"})
    assert "`lora_layers` 'full': this family has no preset of that name, but attention. Or write" in str(caught.value)
    with pytest.raises(sf.SciflowError, match=r"no preset of that name\. Or write comma-separated"):
        match_layers(network, "standard", {})
    assert match_layers(network, "full", {"full": LAYER}) == [LAYER]


# -- PEFT's files --------------------------------------------------------------------------------------------------


def test_a_lora_that_peft_wrote(bench, tmp_path):
    theirs = PeftModel(bench.load(), LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"]), "default")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        model = bench.adapted(adapter_path=str(path))
        assert torch.equal(bench.output(model), bench.output(theirs))
        assert adapter_facts(model)["type"] == "lora" and adapter_facts(model)["alpha"] == 6


def change(folder, **values):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


def test_peft_files_that_are_refused(bench, tmp_path):
    options = {"adapter_type": "lokr", "rank": 4}
    save_adapter(bench.adapted(**options), tmp_path, family=bench.family)
    weights = load_file(tmp_path / "adapter_model.safetensors")

    def said():
        with pytest.raises(sf.SciflowError) as caught:
            bench.adapted(adapter_path=str(tmp_path))
        assert f"`adapter_path` {str(tmp_path)!r}" in str(caught.value)
        return str(caught.value)

    change(tmp_path, modules_to_save=["proj_out"])
    assert "`modules_to_save` or `bias` train weights of the network itself" in said()
    change(tmp_path, modules_to_save=None, target_modules=["no_such_layer"])
    assert "does not fit this network" in said()
    change(tmp_path, target_modules=["to_q"], r=2)
    assert "does not fit this network" in said()
    IA3Config(target_modules=["to_q"], feedforward_modules=[]).save_pretrained(tmp_path)
    assert "it is a ia3, not one of lora, dora, lokr, loha, oft" in said()
    LoraConfig(target_modules=["to_q"], init_lora_weights="pissa").save_pretrained(tmp_path)
    assert "belongs to base weights that its training changed (`init_lora_weights` 'pissa')" in said()
    save_adapter(bench.adapted(**options), tmp_path, family=bench.family)
    save_file(dict(list(weights.items())[1:]), tmp_path / "adapter_model.safetensors")
    assert "the file lacks 1 of its tensors" in said()


def test_a_folder_holds_one_adapter(bench, tmp_path):
    save_adapter(bench.adapted(adapter_type="oft"), tmp_path, family=bench.family)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    save_adapter(bench.adapted(rank=4), tmp_path, family=bench.family)
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHT_NAME]
    save_adapter(bench.adapted(adapter_type="loha", rank=4), tmp_path, family=bench.family)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
