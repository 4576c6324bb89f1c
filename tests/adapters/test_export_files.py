"""What goes in and comes out of an export: sources, families, dtypes, metadata, mistakes, half-written files."""

import json
import pickle

import fsspec
import pytest
import torch
from answers import apart, read_back, tiny_family, trained_adapter
from parity import FEW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainings import same

import sciflow_hf as sf
from sciflow_hf.adapters.export import export_adapter
from sciflow_hf.adapters.files import WEIGHT_NAME, save_adapter
from sciflow_hf.cli import main

LAYERS = "to_q,to_k,to_v,to_out.0,to_qkv_mlp_proj,attn.to_out"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return tiny_family("flux2_klein", tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny_family("flux", tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory):
    """A LoRA of klein with alpha != rank, and the folder that holds it."""
    model = trained_adapter(family, rank=4, lora_alpha=10, lora_layers=LAYERS)
    return model, save_adapter(model, tmp_path_factory.mktemp("run"), family=family).parent


def facts_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# -- sources ---------------------------------------------------------------------------------------------------------


def test_from_file_folder_and_url(trained, tmp_path):
    _, folder = trained
    with fsspec.open("memory://exports/run/" + WEIGHT_NAME, "wb") as target:
        target.write((folder / WEIGHT_NAME).read_bytes())
    sources = (folder, folder / WEIGHT_NAME, "memory://exports/run", f"memory://exports/run/{WEIGHT_NAME}")
    states = []
    for number, source in enumerate(sources):
        done = export_adapter(str(source), tmp_path / f"{number}.safetensors", file_format="kohya")
        assert (done.family, done.adapter_type, done.layers) == ("flux2_klein", "lora", 8)
        states.append(load_file(done.file))
    assert all(same(state, states[0]) for state in states)


def test_from_the_hub(trained, tmp_path, monkeypatch):
    """The usual names first, then the only safetensors file; the facts of the run beside it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    _, folder = trained
    (tmp_path / "hub").mkdir()
    asked = []

    def download(repo_id, name):
        asked.append(name)
        if repo_id == "no/body":
            raise PermissionError("401: log in")
        if not (tmp_path / "hub" / name).exists():
            raise LocalEntryNotFoundError(f"no {name}")
        return str(tmp_path / "hub" / name)

    def files(self, repo_id):
        return [path.name for path in (tmp_path / "hub").iterdir()]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", files)
    (tmp_path / "hub" / "figures.safetensors").write_bytes((folder / WEIGHT_NAME).read_bytes())
    (tmp_path / "hub" / "run_facts.json").write_text(json.dumps({"family": "flux2_klein"}))
    done = export_adapter("some/lora", tmp_path / "x.safetensors", file_format="kohya")
    assert done.family == "flux2_klein" and asked[:3] == [
        WEIGHT_NAME,
        "adapter_model.safetensors",
        "figures.safetensors",
    ]
    (tmp_path / "hub" / "figures.safetensors").rename(tmp_path / "hub" / WEIGHT_NAME)
    again = export_adapter("some/lora", tmp_path / "y.safetensors", file_format="kohya")
    assert same(load_file(done.file), load_file(again.file))
    with pytest.raises(sf.SciflowError, match="`adapter_path` 'no/body' cannot be read from the Hub: 401: log in"):
        export_adapter("no/body", tmp_path / "z.safetensors", file_format="kohya")


def test_through_every_format_and_back_to_the_first(family, trained, tmp_path):
    """kohya's file is as good a source as ours: to diffusers' and again to kohya's, not a bit differs."""
    model, folder = trained
    kohya, plain, again, comfy = (tmp_path / f"{n}.safetensors" for n in ("kohya", "plain", "again", "comfy"))
    export_adapter(str(folder), kohya, file_format="kohya")
    assert export_adapter(str(kohya), plain, file_format="diffusers").family == "flux2_klein"  # its names say so
    assert same(load_file(plain), load_file(folder / WEIGHT_NAME))
    before, after = (json.loads(facts_of(f)["lora_adapter_metadata"]) for f in (folder / WEIGHT_NAME, plain))
    for option in ("r", "lora_alpha", "use_dora"):
        assert after[f"transformer.{option}"] == before[f"transformer.{option}"]
    export_adapter(str(plain), again, file_format="kohya")
    assert same(load_file(again), load_file(kohya)) and facts_of(again) == facts_of(kohya) | {
        "modelspec.title": "again"
    }
    export_adapter(str(kohya), comfy, file_format="comfy")
    assert apart(read_back(family, comfy), model, family) < FEW


def test_names_of_older_diffusers(tmp_path):
    """LoRA files of UNets and text encoders from before PEFT, with an alpha each."""
    unet, text = "unet.mid_block.attentions.0.transformer_blocks.0.attn1", "text_encoder.text_model.encoder.layers.0"
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    state = {}
    for name in (f"{unet}.processor.to_q_lora", f"{text}.self_attn.q_proj.lora_linear_layer"):
        state |= {f"{name}.down.weight": down.clone(), f"{name}.up.weight": up.clone()}
    state[f"{unet}.to_q.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "old.safetensors")
    done = export_adapter(str(tmp_path / "old.safetensors"), tmp_path / "x.safetensors", file_format="kohya")
    found = load_file(done.file)
    assert done.family == "sdxl" and len(found) == 6
    for name, scale in (
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 0.5),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 1.0),
    ):
        update = found[f"{name}.lora_up.weight"] @ found[f"{name}.lora_down.weight"]
        torch.testing.assert_close(float(found[f"{name}.alpha"]) / 4 * update, scale * up @ down)


# -- families --------------------------------------------------------------------------------------------------------


def test_the_family_is_found_by_names_and_by_the_facts_of_the_run(flux, tmp_path):
    model = trained_adapter(flux, rank=2, lora_alpha=4, lora_layers="attention")
    folder = save_adapter(model, tmp_path / "run", family=flux).parent
    assert export_adapter(str(folder), tmp_path / "a.safetensors", file_format="kohya").family == "flux"
    double = trained_adapter(flux, rank=2, lora_alpha=4, lora_layers="add_q_proj,to_add_out")
    file = save_adapter(double, tmp_path / "double", family=flux)
    with pytest.raises(sf.SciflowError) as caught:  # sd3 and klein have layers of these names, too
        export_adapter(str(file), tmp_path / "b.safetensors", file_format="kohya")
    assert "flux2_klein, qwen_image, sd3 have all of them" in str(caught.value).replace("flux, ", "")
    assert export_adapter(str(file), tmp_path / "b.safetensors", file_format="diffusers").family is None
    (file.parent / "run.json").write_text(json.dumps({"family": "flux"}))
    assert export_adapter(str(file), tmp_path / "c.safetensors", file_format="kohya").family == "flux"
    with pytest.raises(sf.SciflowError, match=r"`family` 'sd3': the run of .* trained 'flux'"):
        export_adapter(str(file), tmp_path / "d.safetensors", file_format="kohya", family="sd3")


def test_files_of_another_family(family, trained, flux, tmp_path):
    _, folder = trained
    target = tmp_path / "x.safetensors"
    with pytest.raises(sf.SciflowError, match="it holds layers of transformer, which are none of `sdxl`"):
        export_adapter(str(folder), target, file_format="kohya", family="sdxl")
    with pytest.raises(
        sf.SciflowError, match=r"has no name for 4 of these layers in `flux`, such as transformer.single_"
    ):
        export_adapter(str(folder), target, file_format="kohya", family="flux")
    with pytest.raises(sf.SciflowError, match="`family` 'flux3' is unknown: use one of"):
        export_adapter(str(folder), target, file_format="kohya", family="flux3")
    kohya = export_adapter(str(folder), tmp_path / "kohya.safetensors", file_format="kohya").file
    with pytest.raises(sf.SciflowError, match=r"layers are none of `sd3`, .* It is a file for flux or flux2_klein\."):
        export_adapter(str(kohya), target, file_format="diffusers", family="sd3")
    with pytest.raises(sf.SciflowError, match=r"`adapter_path` .* is a file for `flux2_klein`, not for `flux`"):
        read_back(flux, kohya)
    assert not target.exists()


def test_families_without_a_convention(trained, tmp_path):
    for name in ("dit", "microscopy_unet"):
        with pytest.raises(sf.SciflowError, match=f"`family` '{name}': .* have no names for its layers"):
            export_adapter(str(trained[1]), tmp_path / "x.safetensors", file_format="comfy", family=name)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_options_are_checked_before_anything_is_read(trained, tmp_path):
    folder, there = str(trained[1]), tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    for options, words in (
        ({"file_format": "a1111"}, "`format` 'a1111': use one of diffusers, kohya, comfy"),
        ({"dtype": "int8"}, "`dtype` 'int8': use one of float32, bfloat16, float16"),
        ({"output_file": tmp_path / "x.bin"}, "`output_file` .*x.bin': give a file name that ends in .safetensors"),
        ({"output_file": there}, "`output_file` .*there.safetensors' exists. Name another file, or add `--overwrite`"),
    ):
        given = {"output_file": tmp_path / "x.safetensors", "file_format": "kohya"} | options
        with pytest.raises(sf.SciflowError, match=words):
            export_adapter(folder, given.pop("output_file"), **given)
    assert there.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == ["there.safetensors"]
    export_adapter(folder, there, file_format="kohya", overwrite=True)
    export_adapter(folder, tmp_path / "new" / "folder" / "x.safetensors", file_format="kohya")
    assert len(load_file(there)) == len(load_file(tmp_path / "new" / "folder" / "x.safetensors")) == 18


def test_files_that_are_no_adapter(trained, tmp_path):
    whole = (trained[1] / WEIGHT_NAME).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.safetensors").write_bytes(b"")
    (tmp_path / "pickled.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "lora.ckpt").write_bytes(pickle.dumps({"a": 1}))
    save_file({}, tmp_path / "empty.safetensors")
    save_file({"transformer.x.weight": torch.ones(2)}, tmp_path / "network.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    for name, words in (
        ("cut.safetensors", "no complete safetensors file"),
        ("nothing.safetensors", "no complete safetensors file"),
        ("pickled.safetensors", "no complete safetensors file"),
        ("lora.ckpt", "a pickle can run code"),
        ("empty.safetensors", "without tensors"),
        ("network.safetensors", "1 tensors are none of an adapter, such as transformer.x.weight"),
        ("two", "several safetensors files, a.safetensors, b.safetensors: name one"),
        ("nowhere.safetensors", "there is no such file"),
    ):
        with pytest.raises(sf.SciflowError, match=words) as caught:
            export_adapter(str(tmp_path / name), tmp_path / "x.safetensors", file_format="comfy", family="flux")
        assert f"`adapter_path` {str(tmp_path / name)!r}" in str(caught.value)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_is_there_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    def breaks(state, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "x.safetensors"
    export_adapter(str(trained[1]), target, file_format="kohya")
    before = target.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(sf.SciflowError, match=r"`output_file` .* cannot be written: No space left on device"):
        export_adapter(str(trained[1]), target, file_format="comfy", overwrite=True)
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# -- dtypes and metadata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(trained, tmp_path, dtype):
    whole, cast = (tmp_path / name for name in ("whole.safetensors", "cast.safetensors"))
    export_adapter(str(trained[1]), whole, file_format="kohya")
    export_adapter(str(trained[1]), cast, file_format="kohya", dtype=dtype)
    found = load_file(cast)
    for name, value in load_file(whole).items():
        expected = value if name.endswith(".alpha") else value.to(getattr(torch, dtype))
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)


def test_values_that_a_dtype_cannot_hold(trained, tmp_path):
    state = load_file(trained[1] / WEIGHT_NAME)
    name = next(iter(state))
    for value, dtype, words in (
        (1e6, "float16", f"{name} has values that are too large for float16. Use bfloat16"),
        (float("nan"), None, f"{name} has values that are not finite"),
    ):
        save_file(state | {name: torch.full_like(state[name], value)}, tmp_path / "big.safetensors")
        with pytest.raises(sf.SciflowError, match=words):
            export_adapter(
                str(tmp_path / "big.safetensors"), tmp_path / "x.safetensors", file_format="diffusers", dtype=dtype
            )


def test_metadata_says_what_is_known_and_no_more(trained, tmp_path):
    file = export_adapter(str(trained[1]), tmp_path / "my figures.safetensors", file_format="kohya").file
    facts = facts_of(file)
    assert facts == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Flux.2-klein/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": "my figures",
        "software": json.dumps({"name": "sciflow_hf", "version": sf.__version__}),
        "ss_network_module": "networks.lora_flux_2",
        "ss_network_dim": "Dynamic",  # query, key and value are one layer of rank 12
        "ss_network_alpha": "Dynamic",
    }
    comfy = facts_of(export_adapter(str(trained[1]), tmp_path / "c.safetensors", file_format="comfy").file)
    assert not [name for name in comfy if name.startswith("ss_")] and "lora_adapter_metadata" not in comfy


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(family, trained, tmp_path, capsys):
    target = str(tmp_path / "x.safetensors")
    arguments = ["export", "--adapter_path", str(trained[1]), "--format", "kohya", "--output_file", target]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said == f"{target}: lora of 8 layers (flux2_klein), 0.0 MiB, for musubi-tuner and ComfyUI.\n"
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: `output_file` {target!r} exists.")
    network = ["--family", "flux2_klein", "--pretrained_model_name_or_path", family.pretrained_model_name_or_path]
    assert main([*arguments, "--overwrite", "--dtype", "bfloat16", *network]) == 0
    assert {value.dtype for name, value in load_file(target).items() if "alpha" not in name} == {torch.bfloat16}
    capsys.readouterr()
    assert main([*arguments, "--overwrite", *network[2:]]) == 2
    assert "needs `--family`" in capsys.readouterr().err


def test_blocks_of_another_unet_are_numbered_by_its_configuration(tmp_path, capsys):
    sdxl = tiny_family("sdxl", tmp_path)
    model = trained_adapter(sdxl, rank=2, lora_alpha=3, lora_layers="conv1,upsamplers.0.conv")
    folder = save_adapter(model, tmp_path / "run", family=sdxl).parent
    (folder / "run.json").write_text(json.dumps({"family": "sdxl"}))
    arguments = ["export", "--adapter_path", str(folder), "--format", "comfy", "--family", "sdxl"]
    network = ["--pretrained_model_name_or_path", sdxl.pretrained_model_name_or_path]
    names = []
    for number, extra in enumerate(([], network)):
        target = tmp_path / f"{number}.safetensors"
        assert main([*arguments, "--output_file", str(target), *extra]) == 0
        names.append({name.split(".")[0] for name in load_file(target)})
    assert capsys.readouterr().out.count(", for ComfyUI.\n") == 2
    assert "lora_unet_input_blocks_4_0_in_layers_2" in names[0] and "lora_unet_input_blocks_3_0_in_layers_2" in names[1]
    assert apart(read_back(sdxl, tmp_path / "1.safetensors"), model, sdxl) < FEW
