"""Rows of docs/migration.md that no test of a room shows: a short script each."""

import ast
import configparser
import dataclasses
import gc
import json
import re
import weakref
from pathlib import Path

import diffusers
import documents
import pytest
import torch
import yaml
from family_steps import Step
from torch.nn.parallel import DistributedDataParallel
from trainings import losses, make_args, make_trainer, same, trained
from transformers import TrainerCallback

import sciflow_hf as sf
from sciflow_hf.cli.train import RECIPES
from sciflow_hf.diffusion.objectives import alphas_cumprod, beta_schedule
from sciflow_hf.diffusion.sampling import sample_ddpm
from sciflow_hf.families import BUILT_IN
from sciflow_hf.families.base import network_dtype
from sciflow_hf.options import read_yaml

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.promise("A06", "A08", "A09")
def test_parts_are_loaded_together_and_one_by_one(family):
    network = family.load_model(dtype=torch.bfloat16)
    assert type(network) is family.network_class() and {p.dtype for p in network.parameters()} == {torch.bfloat16}
    pipeline = family.load_pipeline(network, with_text_encoder=True)
    assert type(pipeline) is family.pipeline_class() and pipeline.transformer is network
    assert None not in pipeline.components.values() and {"vae", "text_encoder", "tokenizer", "scheduler"} < set(
        pipeline.components
    )
    for wanted, left_out in (({"text": False}, "text_encoder"), ({"images": False}, "vae")):
        encoders = family.load_encoders(device="cpu", dtype=torch.float32, **wanted)
        found = {name for name in ("vae", "text_encoder", "tokenizer") if getattr(encoders, name) is not None}
        assert left_out not in found and found & {"vae", "text_encoder"} and encoders.transformer is None


@pytest.mark.promise("A27")
def test_training_from_a_cache_holds_neither_vae_nor_text_encoder(tmp_path, family, even_cache, monkeypatch):
    """klein's VAE is read for the statistics of its latents, and is gone before the first step."""
    load, read_for_statistics = diffusers.AutoencoderKLFlux2.from_pretrained, []

    def noted(*args, **options):
        vae = load(*args, **options)
        read_for_statistics.append(weakref.ref(vae))
        return vae

    monkeypatch.setattr(diffusers.AutoencoderKLFlux2, "from_pretrained", noted)
    monkeypatch.setattr(type(family), "read_pipeline", None)  # what loads encoders
    trainer = make_trainer(tmp_path, dataclasses.replace(family), even_cache, max_steps=2)
    gc.collect()
    assert [reference() for reference in read_for_statistics] == [None]
    trainer.train()
    assert len(losses(trainer)) == 2 and len(read_for_statistics) == 1


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.promise("A28", "A36", "A40")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_inside_ddp_computes_in_its_own_dtype(tmp_path, family, even_cache, request, dtype):
    trainer = make_trainer(tmp_path, family, even_cache)
    network = sf.add_adapter(family.load_model(dtype=dtype), sf.AdapterArguments(rank=2), family=family, seed=1)
    batch = next(iter(trainer.get_train_dataloader()))
    given = []
    network.register_forward_pre_hook(lambda _, __, inputs: given.append(inputs), with_kwargs=True)

    def step(model):
        network.zero_grad()
        loss, _ = family.compute_loss(model, batch, trainer.args)
        loss.mean().backward()
        return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}

    alone, gradients = step(network)
    request.getfixturevalue("one_rank")
    wrapped = DistributedDataParallel(network)
    with pytest.raises(AttributeError):
        _ = wrapped.dtype  # what the older code asked
    loss, inside = step(wrapped)
    assert network_dtype(wrapped) == dtype and torch.equal(loss, alone) and same(inside, gradients)
    assert given[1]["hidden_states"].dtype == given[1]["encoder_hidden_states"].dtype == dtype
    assert given[1]["timestep"].dtype == torch.float32 and {g.dtype for g in inside.values()} == {torch.float32}
    assert trainer.accelerator.unwrap_model(wrapped) is network


@pytest.mark.promise("A35", "E18", "E19")
def test_callbacks_of_ones_own_see_epochs_steps_and_metrics(tmp_path, family, even_cache):
    seen = []

    class Note(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            seen.append("epoch")

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(state.global_step)

        def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
            seen.append((metrics["eval_loss"] > 0, model is trainer.model))

    trainer = make_trainer(
        tmp_path, family, even_cache, callbacks=[Note()], eval_fraction=0.3, max_steps=-1, num_train_epochs=2,
        per_device_train_batch_size=8, eval_strategy="epoch", eval_levels=1,
    )  # fmt: skip
    trainer.train()
    an_epoch = trainer.state.global_step // 2
    evaluated = (True, True)
    assert seen == [
        "epoch",
        *range(1, an_epoch + 1),
        evaluated,
        "epoch",
        *range(an_epoch + 1, 2 * an_epoch + 1),
        evaluated,
    ]


@pytest.mark.promise("E05", "E06")
def test_a_trainer_has_its_state_and_leaves_checkpoints_and_images(tmp_path, family, even_cache):
    trainer = make_trainer(
        tmp_path, family, even_cache, max_steps=2, save_strategy="steps", save_steps=2, ema_decay=0.5,
        validation_prompts=["a plot"], validation_steps=2, validation_seeds=[1], num_inference_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.device.type == "cpu" and trainer.family is family and trainer.state.global_step == 2
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad} and held
    assert trainer.lr_scheduler.last_epoch == 2 and Path(trainer.args.output_dir) == tmp_path
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["global_step"] == 2 and (tmp_path / "validation" / "step-000002" / "p00_seed1.png").is_file()


@pytest.mark.promise("E14")
def test_activation_checkpointing_of_sdxl_changes_no_weight(tmp_path):
    from sciflow_hf.demo import make_tiny

    step = Step("sdxl", make_tiny(tmp_path / "sdxl", "sdxl", size="test"), make_args(tmp_path))
    rows = [{name: value[i] for name, value in step.batch.items()} for i in range(2)]
    found = []
    for checkpointing in (False, True):
        options = {"activation_checkpointing": checkpointing, "max_steps": 2, "weighting_scheme": "none"}
        trainer = make_trainer(tmp_path / str(checkpointing), step.family, rows, **options)
        trainer.train()
        assert trainer.model.down_blocks[0].gradient_checkpointing is checkpointing
        found.append(trained(trainer))
    assert all((found[0][name] - value).abs().max() < 1e-6 for name, value in found[1].items())


@pytest.mark.promise("C25")
def test_one_channel_images_come_in_the_shape_of_the_noise():
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    bars = alphas_cumprod(beta_schedule("cosine", 100))
    for sampler in ("ddpm", "ddim", "ancestral"):
        image = sample_ddpm(lambda x, t: 0.5 * torch.ones_like(x), noise, bars, [99, 50, 0], sampler=sampler)
        assert image.shape == (1, 1, 64, 64) and (image == 0.5).all()


@pytest.mark.promise("B23")
def test_the_recommended_run():
    options = read_yaml(ROOT / "recipes" / "configs" / "flux2klein_9b_lora.yaml")
    assert options["rank"] == options["lora_alpha"] == 128 and options["lora_layers"] == "full"
    assert (options["optim"], options["learning_rate"]) == ("prodigy", 1.0)
    assert (options["per_device_train_batch_size"], options["gradient_accumulation_steps"]) == (2, 1)


@pytest.mark.promise("D20", "D21")
def test_the_recipes_of_published_data_sets():
    cifar, imagenet = (
        read_yaml(ROOT / "recipes" / "configs" / f"dit_{name}.yaml") for name in ("cifar10", "imagenet256")
    )
    family = sf.DiT(preset=cifar["preset"], image_size=cifar["image_size"], num_classes=10)
    config = family.load_model(dtype=torch.float32, meta=True).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert (cifar["per_device_train_batch_size"], cifar["learning_rate"], cifar["num_train_epochs"]) == (
        128,
        "1e-4",
        100,
    )
    on_8_gpus = 8 * imagenet["per_device_train_batch_size"]
    assert (imagenet["preset"], on_8_gpus, imagenet["gradient_accumulation_steps"]) == ("XL", 256, 2)
    assert imagenet["vae_name_or_path"] == "stabilityai/sd-vae-ft-mse" and imagenet["flip"]
    assert 2 * imagenet["num_train_epochs"] == 400  # mirror images are rows of their own


@pytest.mark.promise("A41")
def test_every_function_says_its_types():
    found = []
    for file in (ROOT / "sciflow_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
                untyped = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
                found += [f"{file.name}: {node.name}"] * bool(untyped or node.returns is None)
    assert found == []


PAGES = {name: f"docs/{'microscopy' if name == 'microscopy_unet' else name}.md" for name in BUILT_IN}


@pytest.mark.promise("A42")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_for_each_family(name):
    """It names the network's recipe, the options that the family itself has, and the layers of each preset."""
    page, family = read(PAGES[name]), sf.load_family(name)
    assert f"({Path(PAGES[name]).name})" in read("docs/families.md")
    assert f"recipes/{RECIPES[name]}.py" in page
    if not issubclass(family, sf.PipelineFamily):
        return
    own = [f.name for f in dataclasses.fields(family) if f.name in vars(family)["__annotations__"]]
    assert [o for o in own if f"--{o}" not in page and f"--no_{o}" not in page and o != "posterior"] == []
    layers = {layer for preset in family.lora_presets.values() for layer in preset.split(",")}
    assert sorted(layer for layer in layers if f"{layer}`" not in page) == []


@pytest.mark.promise("A42")
def test_the_configuration_guide_lists_every_group_of_options():
    page, every = read("docs/configuration.md"), {recipe.stem.removeprefix("train_") for recipe in documents.RECIPES}
    cells = [re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if line.count("|") == 5]
    told = {heading: (kind.strip("`"), file.strip("`"), recipes) for heading, kind, file, recipes in cells[2:]}
    found = {"TrainingArguments": ("transformers.TrainingArguments", "transformers", every)}
    for recipe in documents.RECIPES:
        for kind in documents.parser_of(recipe).dataclass_types:
            for owner in (owner for owner in kind.__mro__ if "heading" in vars(owner)):
                file = f"{owner.__module__.replace('.', '/')}.py"
                found.setdefault(owner.heading, (owner.__name__, file, set()))[2].add(recipe.stem[len("train_") :])
    assert {
        heading: (*row[:2], every if row[2] == "all" else set(row[2].split(", "))) for heading, row in told.items()
    } == found
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.S).group(1))
    known = documents.option_strings(ROOT / "recipes" / "train_flux2klein.py")
    assert {f"--{name}" for name in options if name != "base"} <= known
    assert (ROOT / "recipes" / "configs" / options["base"]).is_file()


@pytest.mark.promise("B19")
def test_the_versions_of_the_table():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    table = dict(re.findall(r"^\| (\w+) \| (.*?) \|$", read("docs/install.md").partition("## Versions")[2], re.M))
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    named = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert table["Python"].startswith(f"{named[0]} to {named[-1]}") and named[0] == oldest
    assert f"torch=={re.search(r'torch ([0-9.]+)', table['torch']).group(1)}\n" in read("constraints.txt")
    assert f"torch>={re.search(r'oldest: ([0-9.]+)', table['torch']).group(1)}\n" in read("setup.cfg")


@pytest.mark.promise("D26")
def test_licence_and_citation():
    assert "Apache License" in read("LICENSE")[:200] and "\nlicense = Apache-2.0\n" in read("setup.cfg")
    assert "\nlicense: Apache-2.0\n" in read("CITATION.cff") and (ROOT / "recipes" / "train_dit.py").is_file()
