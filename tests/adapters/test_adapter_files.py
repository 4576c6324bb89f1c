"""Files of LoRA and DoRA: what survives saving, what is read, and what is refused, on a tiny klein."""

import json
import os
import pickle

import fsspec
import pytest
import torch
from adapter_bench import adapted, klein_output, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainings import same

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME, load_adapter_weights, save_adapter
from sciflow_hf.adapters.layers import adapter_facts, adapter_parameters


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(request, family, tmp_path_factory):
    """A LoRA or DoRA of alpha != rank with its file, outside of the default layers."""
    layers = "to_q,to_out.0,to_qkv_mlp_proj,attn.to_out"
    model = randomise(adapted(family, rank=4, lora_alpha=10, lora_layers=layers, adapter_type=request.param))
    return model, save_adapter(model, tmp_path_factory.mktemp(request.param), family=family)


def test_the_file_holds_the_adapter_and_its_alpha(family, trained):
    model, file = trained
    assert file.name == WEIGHT_NAME and [p.name for p in file.parent.iterdir()] == [WEIGHT_NAME]
    state = load_file(file)
    values = {n.replace(".default", ""): p.detach() for n, p in adapter_parameters(model).items()}
    assert {f"transformer.{n.removesuffix('.weight')}" for n in values} == {k.removesuffix(".weight") for k in state}
    for name, value in values.items():
        key = f"transformer.{name}"
        assert torch.equal(state[key if key in state else key.removesuffix(".weight")], value)
    with safe_open(file, "pt") as opened:
        text = " ".join(opened.metadata().values())
        stored = next(json.loads(v) for v in opened.metadata().values() if v.startswith("{"))
    assert stored["transformer.lora_alpha"] == 10 and stored["transformer.r"] == 4, text


@pytest.mark.promise("A37")
def test_going_on_from_file_folder_and_url(family, trained):
    model, file = trained
    with fsspec.open("memory://bucket/some/lora.safetensors", "wb") as target:
        target.write(file.read_bytes())
    expected = klein_output(model)
    for path in (str(file), str(file.parent), "memory://bucket/some/lora.safetensors", f"file://{file}"):
        # The file's rank, alpha, layers and type count, not the options'.
        other = adapted(family, rank=16, lora_layers="full", adapter_path=path)
        assert adapter_facts(other) == adapter_facts(model)
        assert torch.equal(klein_output(other), expected) and same(adapter_parameters(other), adapter_parameters(model))
        assert {n for n, p in other.named_parameters() if p.requires_grad} == set(adapter_parameters(model))


def test_going_on_with_a_bfloat16_base_keeps_every_bit(family, trained):
    """PEFT loads into the dtype of the base; a second load into float32 keeps what that rounds away."""
    model, file = trained
    other = adapted(family, dtype=torch.bfloat16, adapter_path=str(file))
    assert same(adapter_parameters(other), adapter_parameters(model))
    assert not all(torch.equal(p, p.bfloat16().float()) for p in adapter_parameters(other).values())


def test_loading_leaves_torch_alone(family, trained):
    before = torch.random.get_rng_state()
    adapted(family, adapter_path=str(trained[1]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_file_without_metadata_has_alpha_equal_to_rank(family, tmp_path):
    model = randomise(adapted(family, rank=4, lora_alpha=4))
    save_file(load_file(save_adapter(model, tmp_path, family=family)), tmp_path / "plain.safetensors")
    other = adapted(family, lora_alpha=99, adapter_path=str(tmp_path / "plain.safetensors"))
    assert adapter_facts(other)["alpha"] == adapter_facts(other)["rank"] == 4
    assert torch.equal(klein_output(other), klein_output(model))


def test_a_kohya_file_is_read(family, tmp_path):
    """alpha / rank, fused qkv and the names of the original network, against weights merged by hand."""
    rng = torch.Generator().manual_seed(3)
    merged, width = family.load_model(dtype=torch.float32), 32
    double, state = merged.transformer_blocks[0].attn, {}

    def add(name, modules, rank, alpha):
        down = torch.randn(rank, modules[0].in_features, generator=rng) * 0.2
        up = torch.randn(sum(m.out_features for m in modules), rank, generator=rng) * 0.2
        state.update({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
        state[f"{name}.alpha"] = torch.tensor(float(alpha))
        for module, rows in zip(modules, up.split([m.out_features for m in modules]), strict=True):
            module.weight.data += alpha / rank * rows @ down

    add("lora_unet_double_blocks_0_img_attn_qkv", [double.to_q, double.to_k, double.to_v], 4, 2)
    add("lora_unet_single_blocks_1_linear2", [merged.single_transformer_blocks[1].attn.to_out], 4, 8)
    save_file(state, tmp_path / "kohya.safetensors")
    model = adapted(family, adapter_path=str(tmp_path / "kohya.safetensors"))
    assert adapter_facts(model)["matched"] == 4 and double.to_q.in_features == width
    torch.testing.assert_close(klein_output(model), klein_output(merged), rtol=1e-4, atol=1e-5)
    assert (klein_output(model) - klein_output(family.load_model(dtype=torch.float32))).abs().max() > 1e-2


DAMAGE = {
    "of another pipeline": lambda s: {k.replace("transformer.", "unet.", 1): v for k, v in s.items()},
    "no adapter at all": lambda s: {"some": torch.zeros(1)},
    "a tensor missing": lambda s: dict(list(s.items())[1:]),
    "a layer too many": lambda s: s | {f"transformer.more.{x}.weight": torch.zeros(4, 4) for x in ("lora_A", "lora_B")},
    "a name changed": lambda s: {k.replace("0.attn.", "0.attention."): v for k, v in s.items()},
    "wider": lambda s: {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in s.items()},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_fit_are_refused(family, trained, tmp_path, damage):
    save_file(DAMAGE[damage](load_file(trained[1])), tmp_path / "changed.safetensors")
    with pytest.raises(sf.SciflowError) as caught:
        adapted(family, adapter_path=str(tmp_path / "changed.safetensors"))
    said = {
        "of another pipeline": "holds no layer of this network (`flux2_klein`)",
        "no adapter at all": "holds no layer of this network",
        "a tensor missing": "does not fit this network: ",
        "a layer too many": "does not fit this network: the network has no layer for 2 of its tensors, such as more.",
        "a name changed": "does not fit this network: the network has no layer for",
        "wider": "does not fit this network: Error(s) in loading state_dict for Flux2Transformer2DModel: size mismatch",
    }[damage]
    assert said in str(caught.value) and "changed.safetensors" in str(caught.value)


def test_paths_that_lead_nowhere(family, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    monkeypatch.chdir(tmp_path)
    for path, words in (
        (str(tmp_path / "nowhere" / "x.safetensors"), "there is no such file"),
        ("nowhere.safetensors", "there is no such file"),
        ("./a/b", "there is no such file"),
        ("memory://no/such.safetensors", "cannot be read"),
        ("nosuchprotocol://x.safetensors", "cannot be read.*nosuchprotocol"),
        (str(tmp_path / "empty"), "cannot be read.*no file named"),
        ("cut.safetensors", "cannot be read"),
    ):
        with pytest.raises(sf.SciflowError, match=words) as caught:
            adapted(family, adapter_path=path)
        assert f"`adapter_path` {path!r}" in str(caught.value)


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("name", ["lora.bin", "lora.safetensors", "folder/pytorch_lora_weights.bin", "memory"])
def test_pickles_are_never_loaded(family, tmp_path, name):
    bomb = tmp_path / "went_off"
    path = tmp_path / (name if name != "memory" else "local.bin")
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        if name == "lora.bin":
            torch.save({"transformer.x_embedder.lora_A.weight": Bomb(bomb)}, file)
        else:
            pickle.dump(Bomb(bomb), file)
    given = str(path.parent if name.startswith("folder") else path)
    if name == "memory":
        given = "memory://bombs/lora.safetensors"
        with fsspec.open(given, "wb") as target:
            target.write(path.read_bytes())
    with pytest.raises(sf.SciflowError, match="safetensors"):
        adapted(family, adapter_path=given)
    assert not bomb.exists()
    with path.open("rb") as file:  # the bomb is live
        torch.load(file, weights_only=False) if name == "lora.bin" else pickle.load(file)
    assert bomb.exists()


def test_a_harmless_pickle_is_not_loaded_either(family, trained, tmp_path):
    torch.save(load_file(trained[1]), tmp_path / "pytorch_lora_weights.bin")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(sf.SciflowError, match="safetensors"):
            adapted(family, adapter_path=str(path))


def test_resuming_puts_back_every_bit_and_refuses_another_adapter(family, trained):
    model, file = trained
    kind = adapter_facts(model)["type"]
    options = {"lora_layers": "to_q,to_out.0,to_qkv_mlp_proj,attn.to_out", "adapter_type": kind}
    other = adapted(family, dtype=torch.bfloat16, rank=4, lora_alpha=10, **options)
    load_adapter_weights(other, file.parent, family=family)
    assert same(adapter_parameters(other), adapter_parameters(model))
    for wrong in (options | {"rank": 2}, options | {"rank": 4, "lora_layers": "to_q"}):
        with pytest.raises(sf.SciflowError, match="does not fit"):
            load_adapter_weights(adapted(family, **wrong), file.parent, family=family)


def test_a_save_that_fails_leaves_the_old_file(family, tmp_path, monkeypatch):
    model = randomise(adapted(family, rank=4))
    file = save_adapter(model, tmp_path, family=family)
    before = file.read_bytes()
    for parameter in adapter_parameters(model).values():
        parameter.data += 1

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path, family=family)
    monkeypatch.undo()
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [WEIGHT_NAME]


def test_a_kill_while_saving_leaves_no_configuration_without_weights(family, tmp_path, monkeypatch):
    """PEFT's configuration says that the weights are there, so that a reader takes the folder for complete."""
    model, replace = adapted(family, adapter_type="oft"), os.replace

    def killed_after(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed_after)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path, family=family)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    with pytest.raises(sf.SciflowError, match="are of no known kind"):
        adapted(family, adapter_path=str(tmp_path))
