"""Parts of a pipeline from paths of their own: the weights that are meant, in caches, checkpoints, cards and images."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.adapters.layers import network_of
from sciflow_hf.cli import main
from sciflow_hf.cli.models import text_family
from sciflow_hf.demo import make_tiny
from sciflow_hf.errors import CacheError, SciflowError
from sciflow_hf.families.loading import Place
from sciflow_hf.report.model_card import model_card, read_facts
from sciflow_hf.report.plan import plan
from sciflow_hf.training.prepare import build_cache_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
PARTS = {
    "flux2_klein": ("transformer", "vae", "text_encoder"),
    "flux": ("transformer", "vae", "text_encoder", "text_encoder_2"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "qwen_image": ("transformer", "vae", "text_encoder"),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A function: two pipelines of a family with other weights."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}

    def make(name):
        if name not in made:
            made[name] = [make_tiny(folder / f"{name}{seed}", name, size="test", seed=seed) for seed in (0, 1)]
        return made[name]

    return make


def option(part):
    return "network_name_or_path" if part in ("transformer", "unet") else f"{part}_name_or_path"


def klein(base, **parts):
    return sf.Flux2Klein(str(base), max_sequence_length=12, **{name: str(path) for name, path in parts.items()})


def loaded(family, part):
    """The weights of a part, by the way that training takes."""
    if part == family.component:
        return family.load_model(dtype=torch.float32).state_dict()
    encoders = family.load_encoders(device="cpu", dtype=torch.float32, images=part == "vae", text=part != "vae")
    return getattr(encoders, part).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(family):
    """The weights of a pipeline, part by part, by the ways that training takes, and as it is drawn with."""
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    parts = {"network": family.load_model(dtype=torch.float32)}
    drawn = family.load_pipeline(with_text_encoder=True).components
    parts |= {name: part for name, part in encoders.components.items() if isinstance(part, torch.nn.Module)}
    parts |= {f"drawn {name}": part for name, part in drawn.items() if isinstance(part, torch.nn.Module)}
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.mark.promise("E08")
@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_each_family(pipelines, name):
    """All of them from a pipeline, from its folders (of one family) and from their files; and one alone."""
    base, other = pipelines(name)
    kind, parts = sf.load_family(name), PARTS[name]
    plain, wanted = everything(kind(str(base))), everything(kind(str(other)))
    assert {len(plain), len(wanted)} == {2 * len(parts)} and not any(same(plain[n], wanted[n]) for n in plain)
    places = {
        "pipeline": dict.fromkeys(parts, other),
        "folders": {part: other / part for part in parts},
        "files": {part: next((other / part).glob("*.safetensors")) for part in parts},
    }
    for place in places.values() if name == "flux" else [places["files"]]:
        found = everything(kind(str(base), **{option(part): str(path) for part, path in place.items()}))
        assert found.keys() == wanted.keys() and all(same(found[n], wanted[n]) for n in found)
    alone = everything(kind(str(base), vae_name_or_path=str(other)))
    assert all(same(alone[n], (wanted if n.endswith("vae") else plain)[n]) for n in plain)


def test_published_files(pipelines, tmp_path):
    """BFL's names of klein's network and of FLUX.1's VAE; CLIP as it is published for other programs."""
    base, other = pipelines("flux2_klein")
    network = load_file(next((other / "transformer").glob("*.safetensors")))
    save_file({n: v.contiguous() for n, v in published.flux2_network(network).items()}, tmp_path / "klein.safetensors")
    family = klein(base, network_name_or_path=tmp_path / "klein.safetensors")
    assert same(family.load_model(dtype=torch.float32).state_dict(), network)
    assert family.load_model(dtype=torch.bfloat16).dtype == torch.bfloat16

    base, other = pipelines("flux")
    vae = load_file(other / VAE_FILE)
    save_file({name: value.contiguous() for name, value in published.vae(vae).items()}, tmp_path / "ae.safetensors")
    inside = {f"first_stage_model.{name}": value.contiguous() for name, value in published.vae(vae).items()}
    save_file(inside | {"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "whole.safetensors")
    for file in ("ae", "whole"):
        family = sf.Flux(str(base), vae_name_or_path=str(tmp_path / f"{file}.safetensors"))
        assert same(loaded(family, "vae"), vae)
    clip = load_file(next((other / "text_encoder").glob("*.safetensors")))
    names = {name: name if name.startswith("text_model.") else f"text_model.{name}" for name in clip}
    save_file({names[name]: value for name, value in clip.items()}, tmp_path / "clip_l.safetensors")
    family = sf.Flux(str(base), text_encoder_name_or_path=str(tmp_path / "clip_l.safetensors"))
    assert same(loaded(family, "text_encoder"), loaded(sf.Flux(str(other)), "text_encoder"))


def test_configurations_are_those_of_the_part(pipelines, tmp_path):
    """Of a folder its own, of a file the pipeline's; statistics of the latents, too."""
    base, other = pipelines("flux2_klein")
    config = json.loads((other / "vae" / "config.json").read_text()) | {"batch_norm_eps": 0.5}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    (tmp_path / VAE_FILE).write_bytes((other / VAE_FILE).read_bytes())
    own, file = (klein(base, vae_name_or_path=path) for path in (tmp_path / "vae", tmp_path / VAE_FILE))
    assert own.config("vae")["batch_norm_eps"] == 0.5 and file.config("vae")["batch_norm_eps"] != 0.5
    variance = load_file(other / VAE_FILE)["bn.running_var"]
    for family, eps in ((own, 0.5), (file, file.config("vae")["batch_norm_eps"])):
        torch.testing.assert_close(family.statistics[1].flatten(), (variance + eps).sqrt())


@pytest.mark.parametrize(
    ("name", "part", "path", "words"),
    [
        ("flux2_klein", "vae", "{tmp}/no.safetensors", r"`vae_name_or_path` .* is no file here.*single \.safetensors"),
        ("flux2_klein", "vae", "{base}/model_index.json", "is no safetensors file, and no other is read"),
        ("flux2_klein", "vae", "nobody/nothing", "`vae_name_or_path` 'nobody/nothing'"),
        ("flux2_klein", "vae", "{tmp}/nothing", "`vae_name_or_path` .*cannot load its vae.*folder or a Hub repository"),
        (
            "flux2_klein",
            "vae",
            "{base}/transformer",
            "holds Flux2Transformer2DModel, but the vae .* AutoencoderKLFlux2",
        ),
        ("flux2_klein", "text_encoder", "{base}/vae", "holds AutoencoderKLFlux2, but the text_encoder .* is qwen3"),
        ("flux2_klein", "transformer", "{base}/vae", "but the transformer of this pipeline is Flux2Transformer2DModel"),
        (
            "flux2_klein",
            "vae",
            "{tmp}/part.safetensors",
            "lacks .* weights of a AutoencoderKLFlux2, the first .* no other",
        ),
        (
            "flux2_klein",
            "text_encoder",
            "{tmp}/part.safetensors",
            "lacks 310 weights of a Qwen3ForCausalLM.*transformers",
        ),
        ("flux2_klein", "transformer", "{tmp}/part.safetensors", "lacks weights of a Flux2Transformer2DModel"),
        ("sd3", "vae", "{tmp}/part.safetensors", "`vae_name_or_path`"),
    ],
)
def test_what_is_no_such_part(request, pipelines, tmp_path, name, part, path, words):
    if path.startswith("nobody"):
        request.getfixturevalue("hub")  # which answers that there is none; without a server clients try again and again
    save_file({"nothing.weight": torch.zeros(2, 3)}, tmp_path / "part.safetensors")
    base, _ = pipelines(name)
    family = sf.load_family(name)(str(base), **{option(part): path.format(tmp=tmp_path, base=base)})
    with pytest.raises(SciflowError, match=words):
        loaded(family, part)


def test_an_incomplete_folder_is_refused(pipelines, tmp_path):
    base, other = pipelines("flux2_klein")
    for part, name in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        weights = load_file(other / part / f"{name}.safetensors")
        gone = sorted(weights)[len(weights) // 2]
        del weights[gone]
        (tmp_path / part).mkdir()
        save_file(weights, tmp_path / part / f"{name}.safetensors", metadata={"format": "pt"})
        (tmp_path / part / "config.json").write_text((other / part / "config.json").read_text())
        with pytest.raises(SciflowError, match=f"`{option(part)}` .*lacks 1 weights .*{gone}"):
            loaded(klein(base, **{option(part): tmp_path / part}), part)


# ---- caches ----


@pytest.fixture(scope="module")
def build(tmp_path_factory, figures):
    folder = tmp_path_factory.mktemp("caches")

    def build(family, name):
        return build_cache_for(family, str(figures), str(folder / name), resolution=32, batch_size=8).output_dir

    return build


def test_a_cache_is_of_its_parts(pipelines, build, tmp_path):
    """Refused in training and rebuilding, naming both; its latents and texts are those of the parts."""
    base, other = pipelines("flux2_klein")
    copy, weights = tmp_path / "other.safetensors", load_file(other / VAE_FILE)
    save_file(weights, copy)
    plain, mixed = klein(base), klein(base, vae_name_or_path=copy, text_encoder_name_or_path=other)
    folders = {"plain": build(plain, "plain"), "mixed": build(mixed, "mixed"), "other": build(klein(other), "whole")}
    caches = {name: sf.load_cache(folder) for name, folder in folders.items()}
    assert same(caches["mixed"][0], caches["other"][0]) and not same(caches["mixed"][0], caches["plain"][0])
    caches["mixed"].check_family(mixed.encoder_settings())
    noted = caches["mixed"].metadata
    assert (
        noted["vae_name_or_path"].startswith("other.safetensors#")
        and "vae_name_or_path" not in caches["plain"].metadata
    )
    with pytest.raises(
        CacheError, match=r"`vae_name_or_path` is 'other.safetensors#\w{8}' in the cache and None in this"
    ):
        caches["mixed"].check_family(plain.encoder_settings())
    with pytest.raises(
        CacheError, match=r"`text_encoder_name_or_path` is None in the cache and '.*flux2_klein1' in this"
    ):
        caches["plain"].check_family(mixed.encoder_settings())
    with pytest.raises(SciflowError, match=r"`vae_name_or_path` was None and is now 'other.safetensors#"):
        build(mixed, "plain")
    # Another file of the same name and size is another VAE; the same file elsewhere is not, nor a folder that moves.
    save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"] + 1}, tmp_path / "new.safetensors")
    (tmp_path / "again").mkdir()
    moved = tmp_path / "again" / copy.name
    moved.write_bytes(copy.read_bytes())
    assert Place("vae", str(moved)).identity == Place("vae", str(copy)).identity
    (tmp_path / "new.safetensors").replace(moved)
    assert moved.stat().st_size == copy.stat().st_size
    with pytest.raises(CacheError, match=r"'other.safetensors#\w{8}' in the cache and 'other.safetensors#\w{8}'"):
        changed = klein(base, vae_name_or_path=moved, text_encoder_name_or_path=other)
        caches["mixed"].check_family(changed.encoder_settings())
    (tmp_path / other.name).symlink_to(other)
    renamed = klein(base, vae_name_or_path=copy, text_encoder_name_or_path=tmp_path / other.name)
    caches["mixed"].check_family(renamed.encoder_settings())


def test_the_command_line_builds_and_verifies(pipelines, figures, tmp_path, capsys):
    base, other = pipelines("flux2_klein")
    parts = ["--vae_name_or_path", str(other / VAE_FILE)]
    words = ["--family", "flux2_klein", "--pretrained_model_name_or_path", str(base), "--max_sequence_length", "12"]
    made = [
        "--input_dir",
        str(figures),
        "--output_dir",
        str(tmp_path / "cache"),
        "--resolution",
        "32",
        "--device",
        "cpu",
    ]
    assert main(["cache", "build", *words, *parts, *made]) == 0
    verify = ["cache", "verify", "--dataset_dir", str(tmp_path / "cache"), "--sample", "2", "--input_dir", str(figures)]
    assert main([*verify, "--device", "cpu", *parts]) == 0
    assert main([*verify, "--device", "cpu"]) == 2  # the cache does not say where the file is
    assert "`vae_name_or_path` 'diffusion_pytorch_model.safetensors#" in capsys.readouterr().err


# ---- training ----


@pytest.fixture(scope="module")
def run(pipelines, build, tmp_path_factory):
    """A training of a network, VAE and text encoder of their own: (its folder, its family, its cache)."""
    base, other = pipelines("flux2_klein")
    files = {"network_name_or_path": other / "transformer", "vae_name_or_path": other / VAE_FILE}
    family = klein(base, **files, text_encoder_name_or_path=other)
    folder, cache = tmp_path_factory.mktemp("run") / "lora", build(family, "trained")
    trainer = make_trainer(
        folder, family, cache, save_strategy="steps", save_steps=3, max_steps=3, validation_prompts=["a plot"],
        validation_size=[32, 48], num_inference_steps=2, validation_steps=3,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return folder, family, cache


def test_training_draws_with_them(pipelines, run, tmp_path):
    """The images are those of the other pipeline, which has all of these parts."""
    _, other = pipelines("flux2_klein")
    folder, _, cache = run
    whole = make_trainer(
        tmp_path, klein(other), build_of_other(cache, other, tmp_path), max_steps=3, validation_prompts=["a plot"],
        validation_size=[32, 48], num_inference_steps=2, validation_steps=3,
    )  # fmt: skip
    whole.train()
    for step in (0, 3):
        one, two = (np.asarray(Image.open(next(f.glob(f"validation/*{step:06d}/*.png")))) for f in (folder, tmp_path))
        assert np.array_equal(one, two)


def build_of_other(cache, other, tmp_path):
    """The same rows, said to be of the other pipeline, which they are."""
    data = sf.load_cache(cache, dtype=torch.float32)
    del data.metadata["vae_name_or_path"], data.metadata["text_encoder_name_or_path"]
    data.metadata["pretrained_model_name_or_path"] = str(other)
    return data


def test_checkpoints_are_of_their_parts(pipelines, run, tmp_path):
    base, other = pipelines("flux2_klein")
    folder, family, cache = run
    noted = json.loads((folder / "checkpoint-3" / "run.json").read_text())
    assert noted["parts"]["network_name_or_path"] == "transformer" and "family.vae_name_or_path" not in noted["options"]
    assert noted["parts"]["vae_name_or_path"].startswith("diffusion_pytorch_model.safetensors#")
    again = make_trainer(folder, family, cache, max_steps=4, resume_from_checkpoint="latest")
    again.train()
    parts = {"vae_name_or_path": other / VAE_FILE, "text_encoder_name_or_path": other}
    wrong = make_trainer(folder, klein(base, **parts), cache, max_steps=5, resume_from_checkpoint="latest")
    with pytest.raises(SciflowError, match=r"parts.network_name_or_path: 'transformer' then, None now"):
        wrong.train()


def test_the_card_and_sample_name_them(run, pipelines, tmp_path, monkeypatch):
    base, other = pipelines("flux2_klein")
    folder, _, _ = run
    facts = read_facts(folder)
    assert [own["part"] for own in facts.parts] == ["vae", "text_encoder", "transformer"]
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'transformer = Flux2Transformer2DModel.from_pretrained("path/to/transformer", torch_dtype' in code
    assert 'pipeline.vae.load_state_dict(load_file("path/to/diffusion_pytorch_model.safetensors"))' in code
    assert 'text_encoder = Qwen3ForCausalLM.from_pretrained("path/to/flux2_klein1", subfolder="text_encoder"' in code
    assert "transformer=transformer" in code and "| vae, instead of the base model's |" in text
    facts.parts[0] |= {"single_file": True, "kind": "AutoencoderKL", "path": "ae.safetensors"}
    assert 'AutoencoderKL.from_single_file("path/to/ae.safetensors", config="path/to/' in str(model_card(facts))

    places = {"--vae_name_or_path": other / VAE_FILE, "--text_encoder_name_or_path": other}
    places |= {"--network_name_or_path": other, "--base_model": base}
    draw = ["sample", "--model_path", folder, "--prompts", "a plot", "--num_inference_steps", "2", "--device", "cpu"]
    draw += ["--height", 32, "--width", 48]
    words = [word for pair in places.items() for word in pair]
    assert main([str(word) for word in [*draw, *words, "--output_dir", tmp_path / "parts"]]) == 0
    assert (
        main([str(word) for word in [*draw, "--base_model", other, *words[:6], "--output_dir", tmp_path / "all"]]) == 0
    )
    one, two = (np.asarray(Image.open(tmp_path / name / "00000.png")) for name in ("parts", "all"))
    assert np.array_equal(one, two)
    assert main([str(word) for word in [*draw, "--base_model", base, "--output_dir", tmp_path / "x"]]) == 2


def test_the_plan_names_them_and_loads_nothing(pipelines, run, tmp_path, monkeypatch):
    base, other = pipelines("flux2_klein")
    _, _, cache = run
    family = klein(base, network_name_or_path=other, vae_name_or_path=other / VAE_FILE)
    monkeypatch.setattr(family.network_class(), "from_pretrained", None)
    model = family.load_model(dtype=torch.float32, meta=True)
    model = sf.add_adapter(model, sf.AdapterArguments(rank=2), family=family, seed=0)
    data = sf.load_cache(cache)
    from sciflow_hf.data.online import OnlineImages

    data.online_images, data.online_text = OnlineImages(None, batch_size=2), lambda captions: {}
    args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    text = plan(model, family, args, data)
    assert f"network_name_or_path='{other}'" in text and f"vae_name_or_path='{other / VAE_FILE}'" in text
    sizes = {part: sum(v.numel() * 4 for v in load_file(next((other / part).glob("*.safetensors"))).values())
             for part in ("vae", "text_encoder")}  # fmt: skip
    found = text.partition("frozen next to the network, about: ")[2].partition("\n")[0]
    height, width = max(data.buckets, key=lambda size: size[0] * size[1])
    widest = json.loads((other / "vae" / "config.json").read_text())["block_out_channels"][0]
    for bytes_, name in ((sizes["vae"], "vae"), (2 * 4 * 5 * widest * height * width, "encoding an image")):
        assert f"{name} {bytes_ / 2**20:.1f} MiB" in found
    assert "text_encoder " in found and Path(cache).is_dir()


# -- weights to start from --


def test_weights_to_start_from(pipelines, tmp_path):
    """A pipeline, a network alone, the folder of a run that trained all weights, files in both layouts."""
    base, other = pipelines("flux2_klein")
    network = load_file(next((other / "transformer").glob("*.safetensors")))
    shutil.copytree(other / "transformer", tmp_path / "run" / "transformer")
    save_file(network, tmp_path / "network.safetensors")
    save_file({n: v.contiguous() for n, v in published.flux2_network(network).items()}, tmp_path / "bfl.safetensors")
    places = [tmp_path / name for name in ("run", "network.safetensors", "bfl.safetensors")]
    for place in (other, other / "transformer", *places):
        family = klein(base, init_weights=place)
        assert same(family.load_model(dtype=torch.float32).state_dict(), network), place
    assert same(loaded(family, "vae"), loaded(klein(base), "vae")), "all else is the pipeline's"


def test_weights_that_do_not_fit_are_named(pipelines, tmp_path):
    base, other = pipelines("flux2_klein")
    network = load_file(next((other / "transformer").glob("*.safetensors")))
    first, second = sorted(network)[:2]
    wrong = {
        "lacks": ({n: v for n, v in network.items() if n != first}, rf"it lacks '{first}'\."),
        "unknown": (network | {"more.bias": torch.zeros(3)}, r"it holds, unknown here, 'more\.bias'\."),
        "shape": (network | {second: torch.zeros(2, 3)}, rf"in another shape '{second}' \(2, 3\), here \("),
        "wrapped": ({f"module.{n}": v for n, v in network.items()}, r"it lacks .* and \d+ more; it holds, unknown"),
        "adapter": ({"transformer.x.lora_A.weight": torch.zeros(2, 3)}, r"It is an adapter: .* `--adapter_path`"),
    }
    for name, (weights, message) in wrong.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
        with pytest.raises(SciflowError, match=rf"`init_weights` '.*{name}\.safetensors' does not fit .*{message}"):
            klein(base, init_weights=tmp_path / f"{name}.safetensors").load_model(dtype=torch.float32)
    folder = shutil.copytree(other / "transformer", tmp_path / "folder")
    save_file(*wrong["unknown"][:1], next(folder.glob("*.safetensors")))
    with pytest.raises(SciflowError, match=r"does not fit this Flux2Transformer2DModel: it holds, unknown here, 'more"):
        klein(base, init_weights=folder).load_model(dtype=torch.float32)
    with pytest.raises(SciflowError, match=r"`init_weights` .* and `network_name_or_path` .* both name"):
        klein(base, init_weights=other, network_name_or_path=other)


def test_pickles_are_refused_unopened(pipelines, tmp_path):
    base, _ = pipelines("flux2_klein")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for file in (*(tmp_path / f"ema{end}" for end in (".pt", ".pth", ".bin", ".pkl")), folder / "pytorch_model.bin"):
        file.write_bytes(b"no pickle: opening it would be another error")
        for path in {file, folder if file.parent == folder else file}:
            with pytest.raises(SciflowError, match=r"is a pickle, and none is opened.*named_parameters.*strict=True"):
                klein(base, init_weights=path).load_model(dtype=torch.float32)


def test_the_conversion_that_is_advised(pipelines, tmp_path):
    """Nameless tensors in the order of the parameters become the file that training starts from."""
    base, other = pipelines("flux2_klein")
    network = klein(other).load_model(dtype=torch.float32)
    tensors = [p.detach() for p in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    save_file(dict(zip(names, tensors, strict=True)), tmp_path / "network.safetensors")
    started = klein(base, init_weights=tmp_path / "network.safetensors").load_model(dtype=torch.float32)
    assert same(started.state_dict(), network.state_dict())


@pytest.mark.parametrize("full", [False, True])
def test_a_run_from_weights_resumes_with_the_same_ones(pipelines, tmp_path, tiny_klein, tiny_cache, full):
    base, other = tiny_klein, pipelines("flux2_klein")[1]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    options["adapter"] = {"no_adapter": True} if full else None
    trainer = make_trainer(tmp_path / "run", klein(base, init_weights=other), tiny_cache, **options)
    assert same(network_of(trainer.model).state_dict(), loaded(klein(other), "transformer")) or not full
    trainer.train()
    again = make_trainer(tmp_path / "run", klein(base, init_weights=other), tiny_cache, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(trainer.model.state_dict(), again.model.state_dict())
    plain = make_trainer(tmp_path / "run", klein(base), tiny_cache, **options)
    with pytest.raises(SciflowError, match=r"another run: parts\.init_weights: 'flux2_klein1' then, None now"):
        plain.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_commands_draw_with_the_weights_that_a_run_started_from(pipelines, tmp_path):
    """An adapter needs them, unless they have moved; a network that was trained from them does not."""
    base, other = pipelines("flux2_klein")
    parts = [{"part": "transformer", "option": "init_weights", "path": str(other)}]
    facts = {"family": "flux2_klein", "base_model": str(base), "parts": parts}
    (tmp_path / "run_facts.json").write_text(json.dumps(facts))
    args = Namespace(model_path=str(tmp_path), family=None, base_model=None, trust_remote_code=False)
    assert text_family(args, None).init_weights == str(other)
    moved = text_family(Namespace(**vars(args), network_name_or_path="moved"), None)
    assert (moved.init_weights, moved.network_name_or_path) == (None, "moved")
    (tmp_path / "transformer").mkdir()
    assert text_family(args, None).init_weights is None
