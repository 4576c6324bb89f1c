"""Checkpoints and caches of another family, and checkpoints that lack a setting: refused by name, for every family."""

import ast
from pathlib import Path

import pytest
import torch
from caches import write_cache
from family_steps import FAMILIES, edited

import sciflow_hf as sf
from sciflow_hf.errors import CacheError, SciflowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PAIRS = [pair for one in zip(FAMILIES, FAMILIES[1:] + FAMILIES[:1], strict=True) for pair in (one, one[::-1])]
SOURCE = Path(sf.__file__).parent / "families"
FILES = {"scheduler": "scheduler/scheduler_config.json"}
# Keys that are read otherwise than by `setting`.
OTHERS = {"qwen_image": [("vae", "latents_mean"), ("vae", "latents_std"), ("vae", "z_dim")]}


@pytest.fixture(scope="module")
def folders(tiny_pipelines):
    return tiny_pipelines


def make_family(name, path, **options):
    return sf.load_family(name)(pretrained_model_name_or_path=str(path), posterior="mode", **options)


# ---- another family's ----


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_a_checkpoint_of_another_family_is_refused(name, other, folders):
    """By whatever asks for it first: training, its dry run, building a cache, online text, sampling, buckets."""
    family = make_family(name, folders[other])
    mine, theirs = (sf.load_family(n)("x").network_class().__name__ for n in (name, other))
    for use in (
        lambda: family.load_model(dtype=torch.float32),
        lambda: family.load_model(dtype=torch.float32, meta=True),
        lambda: family.load_encoders(device="cpu", dtype=torch.float32),
        lambda: family.load_text_encoder(device="cpu", dtype=torch.float32),
        lambda: family.load_pipeline(),
        lambda: family.bucket_step(),
    ):
        with pytest.raises(SciflowError, match=f"holds a {theirs}, but `{name}` trains a {mine}"):
            use()


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_a_cache_of_another_family_is_refused(name, other, folders, tmp_path):
    """Map-style and as a stream, with both names in the message."""
    write_cache(tmp_path, settings=make_family(other, folders[other]).encoder_settings())
    settings = make_family(name, folders[name]).encoder_settings()
    for streaming in (False, True):
        with pytest.raises(CacheError, match=f"`family` is '{other}' in the cache and '{name}' in this run"):
            sf.load_cache(tmp_path, streaming=streaming).check_family(settings)


def test_the_trainer_asks(folders, tmp_path, tiny_cache):
    """klein's cache for FLUX.1, before a step is made."""
    family = make_family("flux", folders["flux"])
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=2), family=family)
    args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(CacheError, match="`family` is 'flux2_klein' in the cache and 'flux' in this run"):
        sf.DiffusionTrainer(model, args, family=family, train_dataset=sf.load_cache(tiny_cache))


def test_a_pipeline_without_a_network_is_refused(folders, tmp_path):
    path = edited(folders["flux"], tmp_path, "model_index.json", transformer=None)
    with pytest.raises(SciflowError, match="holds a pipeline without a network, but `flux` trains"):
        make_family("flux", path).load_model(dtype=torch.float32)


# ---- what a configuration must say ----


def settings_of(name):
    """(part, key) of every `self.setting(part, key)` in a family's file; `self.component` is the network."""
    component = sf.load_family(name).component
    for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.setting":
            part, key = node.args
            part = component if ast.unparse(part) == "self.component" else ast.literal_eval(part)
            if isinstance(key, ast.Constant):
                yield part, key.value
    yield component, "_class_name"


NEEDED = [(name, *place) for name in FAMILIES for place in sorted({*settings_of(name), *OTHERS.get(name, [])})]
NEEDED += [("sdxl", "unet", "addition_embed_type"), ("sdxl", "unet", "in_channels")]  # asked for in a loop


@pytest.mark.parametrize("name", FAMILIES)
def test_no_configuration_is_indexed(name):
    """`self.config(part)[key]` would end in a KeyError: `self.setting(part, key)` says what is missing."""
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    indexed = [node.value for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    assert not [n for n in indexed if isinstance(n, ast.Call) and ast.unparse(n.func) == "self.config"]


def test_there_is_much_to_ask():
    assert len(NEEDED) > 20 and {name for name, _, _ in NEEDED} == set(FAMILIES)


def batch_for(widths):
    """A batch of one sample whose shapes fit the network."""
    rng, ends = torch.Generator().manual_seed(0), {"latents": (12, 8), "pooled_prompt_embeds": ()}
    sizes = {key: (1, width, *ends[key]) if key in ends else (1, 7, width) for key, width in widths.items()}
    return {key: torch.randn(size, generator=rng) for key, size in sizes.items()}


def use_all(family, args):
    """Whatever a run asks of a checkpoint's configurations: building a cache, then training on it."""
    family.bucket_step()
    if family.name == "sd3":
        family.encode_prompts(["a"], family.load_text_encoder(device="cpu", dtype=torch.float32))
    model = family.load_model(dtype=torch.float32)
    family.compute_loss(model, batch_for(family.widths(model.config)), args)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none")


@pytest.mark.parametrize(("name", "part", "key"), NEEDED, ids=lambda value: value)
def test_a_setting_that_is_missing_is_named(name, part, key, folders, tmp_path, args):
    path = edited(folders[name], tmp_path, FILES.get(part, f"{part}/config.json"), **{key: None})
    family = make_family(name, path, **({"use_t5": False} if name == "sd3" else {}))
    with pytest.raises(SciflowError, match=f"`pretrained_model_name_or_path.*edited.*`{key}`") as caught:
        use_all(family, args)
    assert name in str(caught.value) or "Qwen-Image" in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_checkpoints_have_it_all(name, folders, args):
    use_all(make_family(name, folders[name], **({"use_t5": False} if name == "sd3" else {})), args)
