"""docs/families.md: every row is cited, computed, or compared here with what the code does with tiny pipelines."""

import dataclasses
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from family_steps import FAMILIES, PACKED, PATCHED, Step, edited

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import match_layers
from sciflow_hf.options import read_yaml

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def table():
    """Row of the first table -> (how it is known, {family: cell})."""
    lines = re.search(r"(^\|.*\n)+", TEXT, re.M).group().splitlines()
    names = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    found = {}
    for line in lines[2:]:
        label, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        fact, known = re.fullmatch(r"(.*) \((tested|cited|computed)\)", label).groups()
        found[fact] = known, dict(zip(names, cells, strict=True))
    return found


TABLE = table()


def cell(fact, name):
    return TABLE[fact][1][name]


@pytest.fixture(scope="module")
def folders(tiny_pipelines):
    return tiny_pipelines


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return sf.DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, weighting_scheme="none")


@pytest.fixture(scope="module")
def steps(folders, args):
    return {name: Step(name, folders[name], args) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def step(request, steps):
    return steps[request.param]


def pack(latents):
    """2x2 pixels become a token of (c, ph, pw): by einops' notation, (b, c, h 2, w 2) -> (b, h w, c 2 2)."""
    return torch.nn.functional.unfold(latents, 2, stride=2).transpose(1, 2)


# ---- the rows ----


def check_network(step):
    assert cell("network", step.family.name) == f"`{type(step.model).__name__}`"


def check_normalised(step):
    """The network sees the noise schedule's mixture of noise and these latents."""
    name, raw = step.family.name, step.batch["latents"]
    vae = step.family.config("vae")
    text = cell("normalised latents", name)
    if name in PATCHED:
        assert "batch norm" in text and "variance + eps" in text and ("1e-5" in text) == (name == "ernie_image")
        eps = 1e-5 if "1e-5" in text else vae["batch_norm_eps"]
        norm = step.family.load_encoders(device="cpu", dtype=torch.float32, text=False).vae.bn
        pixels = torch.nn.functional.pixel_unshuffle(raw, 2)
        return (pixels - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + eps).sqrt()
    if name == "qwen_image":
        assert text == "(x - latents_mean) / latents_std per channel"
        mean, std = (torch.tensor(vae[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (raw - mean) / std
    if name == "sdxl":
        assert text.startswith("x * scaling_factor") and vae.get("latents_mean") is None
        return raw * vae["scaling_factor"]
    assert text == "(x - shift_factor) * scaling_factor"
    return (raw - vae["shift_factor"]) * vae["scaling_factor"]


def mixture(step):
    """Signal and noise of each sample by the table, (2, 1, 1, 1)."""
    text = cell("noise schedule", step.family.name)
    if step.family.name == "sdxl":
        assert text.startswith("sqrt(a) x + sqrt(1 - a) noise")
        from diffusers import DDPMScheduler

        a = DDPMScheduler.from_config(step.family.config("scheduler")).alphas_cumprod[step.levels]
        return a.sqrt().view(-1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1)
    assert text == "(1 - sigma) x + sigma noise"
    sigma = step.levels.view(-1, 1, 1, 1)
    return 1 - sigma, sigma


def as_given(step, latents):
    """Latents in the network's form, by the table."""
    name = step.family.name
    text = cell("latents as the network gets them", name)
    if name == "flux2_klein":  # patchified already
        assert text.startswith("packed 2x2")
        return latents.flatten(2).transpose(1, 2)
    if name in PACKED:
        assert text.startswith("packed 2x2")
        return pack(latents)
    if text == "(B, 4 C, h/2, w/2)":  # patchified already
        return latents
    if text == "a list of (C, 1, h, w)":
        return latents.unsqueeze(2)
    assert text == "(B, C, h, w)"
    return latents


def check_schedule(step):
    signal, noise = mixture(step)
    expected = as_given(step, signal * check_normalised(step) + noise * step.noise)
    torch.testing.assert_close(step.image, expected, rtol=1e-5, atol=1e-5)


def check_posterior(step):
    assert step.default.posterior == cell("posterior by default", step.family.name)


def check_given(step):
    text = cell("latents as the network gets them", step.family.name)
    sizes = {
        "packed 2x2: tokens of 4 C numbers": (2, 24, 4 * step.channels),
        "(B, 4 C, h/2, w/2)": (2, 4 * step.channels, 6, 4),
        "a list of (C, 1, h, w)": (2, step.channels, 1, 12, 8),
        "(B, C, h, w)": (2, step.channels, 12, 8),
    }
    assert tuple(step.image.shape) == sizes[text]


def check_image_ids(step):
    text, ids = cell("image ids", step.family.name), step.seen.get("img_ids")
    places = [(h, w) for h in range(6) for w in range(4)]
    if text.startswith("4 columns"):
        assert ids.shape[:2] == (2, 24) and ids[0].tolist() == [[0, h, w, 0] for h, w in places]
    elif text.startswith("3 columns, no batch axis"):
        assert ids.tolist() == [[0, h, w] for h, w in places]
    else:
        assert text.startswith("none") and ids is None
    assert ("`img_shapes` is (1, h, w)" in text) == ("img_shapes" in step.seen)
    if "img_shapes" in step.seen:
        assert step.seen["img_shapes"] == [[(1, 6, 4)]] * 2
    assert ("`time_ids`" in text) == (step.family.name == "sdxl")
    if step.family.name == "sdxl":
        assert step.seen["added_cond_kwargs"]["time_ids"].tolist() == [[48, 32, 0, 0, 48, 32]] * 2


def check_text_ids(step):
    text, ids = cell("text ids", step.family.name), step.seen.get("txt_ids")
    if text.startswith("4 columns: (0, 0, 0, l)"):
        assert ids[1].tolist() == [[0, 0, 0, place] for place in range(7)]
    elif text.startswith("3 columns: (0, 0, 0)"):
        assert ids.tolist() == [[0, 0, 0]] * 7
    else:
        assert text == "none" and ids is None


def check_tokens(step):
    text, family = cell("text tokens by default", step.family.name), step.default
    numbers = [int(number) for number in re.findall(r"\d+", text)[:2]]
    encoders = step.family.load_text_encoder(device="cpu", dtype=torch.float32)
    short, most = step.family, 7
    if family.pads_text and "max_sequence_length" in vars(family):
        short, most = dataclasses.replace(step.family, max_sequence_length=24), 24
    elif family.pads_text:
        most = encoders.tokenizer.model_max_length
    one, longer = (short.encode_prompts([p], encoders)["prompt_embeds"] for p in ("a", "a red bar " * 20))
    if family.name == "sd3":  # CLIP's share is that of its tokenizer
        assert numbers == [77, family.max_sequence_length]
        assert one.shape[1] == longer.shape[1] == encoders.tokenizer.model_max_length + 7
    elif "the tokenizer's" in text:
        assert "max_sequence_length" not in vars(family) and longer.shape[1] == encoders.tokenizer.model_max_length
    else:
        assert numbers[0] == family.max_sequence_length
    if "its own length" in text:
        assert family.pads_text and one.shape[1] < longer.shape[1] == most
    else:
        assert "padding takes part" in text and not family.pads_text and one.shape == longer.shape
    assert ("`--no_use_t5`" in text) == ("use_t5" in vars(family))


def check_pooled(step):
    text = cell("pooled text", step.family.name)
    encoders = step.family.load_text_encoder(device="cpu", dtype=torch.float32)
    pooled = step.family.encode_prompts(["a line"], encoders).get("pooled_prompt_embeds")
    if text == "none":
        assert pooled is None and not {"pooled_projections", "added_cond_kwargs"} & step.seen.keys()
        return
    clips = [part for part in ("text_encoder", "text_encoder_2") if "CLIP" in type(getattr(encoders, part)).__name__]
    widths = [getattr(encoders, part).config.hidden_size if text == "of CLIP-L" else
              getattr(encoders, part).config.projection_dim for part in clips]  # fmt: skip
    expected = {"of both CLIPs": sum(widths), "of CLIP-L": widths[0], "of the second CLIP": widths[-1]}[text]
    assert pooled.shape == (1, expected)


def check_timestep(step):
    text, given = cell("timestep", step.family.name), step.timestep
    if text == "sigma":
        torch.testing.assert_close(given, step.levels)
    elif text == "1 - sigma":
        torch.testing.assert_close(given, 1 - step.levels)
    elif text == "1000 sigma":
        torch.testing.assert_close(given, 1000 * step.levels)
    else:
        assert text == "whole numbers, 0 to 999, drawn uniformly" and torch.equal(given, step.levels)
        drawn = step.family.sample_levels(torch.arange(20_000), step.args, 24)
        assert drawn.dtype == torch.int64 and drawn.min() == 0 and drawn.max() == 999
        assert abs(float(drawn.float().mean()) - 499.5) < 4 * 288.7 / math.sqrt(20_000)


def check_guidance(step):
    text, given = cell("guidance input", step.family.name), step.seen.get("guidance")
    if text == "none":
        assert given is None
    else:
        assert text.startswith("`--guidance_scale`, 1.0") and step.default.guidance_scale == 1.0
        assert torch.equal(given, torch.ones(2))


def check_shift(step, tmp_path):
    text, family = cell("shift by default", step.family.name), step.family
    if family.name == "qwen_image":
        published = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
        path = edited(family.pretrained_model_name_or_path, tmp_path, "scheduler/scheduler_config.json", **published)
        family = sf.QwenImage(pretrained_model_name_or_path=str(path))
    if text == "none":
        assert not math.expm1(family.shift_mu(step.args, 1024))
        return
    shifts = {length: math.exp(family.shift_mu(step.args, length)) for length in (1024, 4096)}
    if "at every L" in text:
        assert "scheduler's config" in text and shifts[1024] == shifts[4096] == pytest.approx(3.0)  # as the tiny one
        return
    told = [float(number) for number in re.findall(r"(\d\.\d\d) at", text)]
    assert told == [pytest.approx(shifts[length], abs=0.005) for length in (1024, 4096)]
    if "0.00016927" in text:
        slope, start = map(float, re.search(r"mu = ([\d.]+) L \+ ([\d.]+)", text).groups())
        assert math.log(shifts[1024]) == pytest.approx(slope * 1024 + start, abs=1e-4)


def check_target(step):
    """An answer of exactly that has no loss, one of its negative has."""
    text, latents = cell("target", step.family.name), check_normalised(step)
    if step.family.name == "sdxl":
        assert "as `prediction_type`" in text and step.family.prediction_type == "epsilon"
        target = step.noise
    else:
        assert text.startswith("noise - latents")
        target = as_given(step, step.noise - latents)
    assert (step.answered(target) < 1e-9).all() and (step.answered(-target) > 0.1).all()
    if "`--precondition_outputs`: the loss on x0, sigma^2 times that" in text:
        plain = step.answered(0 * target)
        step.family.precondition_outputs = True
        torch.testing.assert_close(step.answered(0 * target), step.levels**2 * plain)
        step.family.precondition_outputs = False


def check_sides(step, monkeypatch):
    """With the depth of the published VAEs (four levels, three halvings) and of SDXL's UNet (three levels)."""
    text = cell("sides of images", step.family.name)
    published = {
        ("vae", "block_out_channels"): [128, 256, 512, 512],
        ("vae", "temperal_downsample"): [False, True, True],
        ("unet", "block_out_channels"): [320, 640, 1280],
    }
    family = sf.load_family(step.family.name)(pretrained_model_name_or_path="none")
    monkeypatch.setattr(type(family), "setting", lambda self, part, key: published[part, key])
    assert int(re.match(r"multiples of (\d+) px", text).group(1)) == family.bucket_step()
    assert ("`pos_embed_max_size`" in text) == ("pos_embed_max_size" in step.model.config)


def check_guidance_argument(step):
    text, family = cell("guidance of validation images", step.family.name), step.family
    assert text.startswith(f"`{family.guidance_argument}`")
    assert ("`--validation_true_cfg_scale`" in text) == ("validation_true_cfg_scale" in vars(family))


def check_unconditional(step):
    text, family = cell("without `--validation_negative_prompt`", step.family.name), step.family
    zeros = not family.unconditional({"prompt_embeds": torch.ones(1, 2, 3)})["prompt_embeds"].any()
    assert zeros == text.startswith("away from zeros")
    assert (family.no_prompt == " ") == ("single space" in text)
    assert family.no_prompt == "" or text == "away from a single space"


PARTS = {  # words of the table -> what such layers are called
    "attention": r"(attn\d?|attention)\S*\.(to_\w+(\.0)?|add_\w+_proj|to_add_out)$",
    "mlps": r"(ff|ff_context|img_mlp|txt_mlp)\.(net\.(0\.proj|2)|linear_in|linear_out)$|feed_forward\.w\d$|mlp\.\w+$",
    "single blocks": r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out|attn\.(to_qkv_mlp_proj|to_out))$",
    "all of the attention blocks": r"attentions\.\d+\.",
    "convolutions": r"(conv1|conv2|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv)$",
    "time embedding of the blocks": r"time_emb_proj$",
}


def layers(step, preset):
    return match_layers(step.model, preset, step.family.lora_presets)


def check_standard(step):
    text = cell("`--lora_layers standard`", step.family.name)
    names = layers(step, "standard")
    if text == "attention of all blocks":
        assert all(re.search(PARTS["attention"], name) for name in names)
        refiners = {"noise_refiner", "context_refiner"} if step.family.name == "z_image" else set()
        assert {name.split(".")[0] for name in names} == {"layers"} | refiners
    elif text == "attention of both streams":
        assert all(re.search(PARTS["attention"], name) for name in names)
        assert any("add_k_proj" in name for name in names) and any(name.endswith("to_k") for name in names)
    else:
        assert text == "all of the attention blocks"
        inside = {name for name, module in step.model.named_modules()
                  if re.search(PARTS[text], name) and isinstance(module, torch.nn.Linear)}  # fmt: skip
        assert set(names) == inside


def check_full(step):
    text = cell("`--lora_layers full` adds", step.family.name).lower()
    words = [word for word in ("mlps", "single blocks", "convolutions", "time embedding of the blocks") if word in text]
    added = set(layers(step, "full")) - set(layers(step, "standard"))
    for word in words:
        assert any(re.search(PARTS[word], name) for name in added), word
    assert all(any(re.search(PARTS[word], name) for word in words) for name in added)
    assert ("`attn.to_out`" in text) == any(re.search(r"single\S+attn\.to_out$", name) for name in added)


def check_text_encoders(step):
    parts = step.family.trained_text_parts
    names = {(): "no", ("text_encoder",): "CLIP-L", ("text_encoder", "text_encoder_2"): "CLIP-L, CLIP-G"}
    assert cell("`--train_text_encoder`", step.family.name) == names[parts]


def check_options(step):
    """The files are there, of the family's recipe, and name one of the checkpoints that are cited."""
    for file in re.findall(r"`(\S+\.yaml)`", cell("recommended options", step.family.name)):
        model = read_yaml(ROOT / file)["pretrained_model_name_or_path"]
        assert f"sciflow-hf train {step.family.name} --config {Path(file).stem}" in (ROOT / file).read_text()
        assert model.split("/")[0] in ("black-forest-labs", "Qwen", "stabilityai", "Tongyi-MAI", "baidu")


def check_demo(step):
    (file,) = re.findall(r"`(\S+\.yaml)`", cell("demo without a download", step.family.name))
    model = "mini_klein" if step.family.name == "flux2_klein" else "demo"  # neither is downloaded
    assert read_yaml(ROOT / file)["pretrained_model_name_or_path"] == model


CHECKS = {
    "network": check_network,
    "normalised latents": check_schedule,
    "posterior by default": check_posterior,
    "latents as the network gets them": check_given,
    "image ids": check_image_ids,
    "text ids": check_text_ids,
    "text tokens by default": check_tokens,
    "pooled text": check_pooled,
    "timestep": check_timestep,
    "guidance input": check_guidance,
    "noise schedule": check_schedule,
    "shift by default": check_shift,
    "target": check_target,
    "sides of images": check_sides,
    "guidance of validation images": check_guidance_argument,
    "without `--validation_negative_prompt`": check_unconditional,
    "`--lora_layers standard`": check_standard,
    "`--lora_layers full` adds": check_full,
    "`--train_text_encoder`": check_text_encoders,
    "recommended options": check_options,
    "demo without a download": check_demo,
}


def test_every_row_is_known_somehow():
    """Tested rows have a check, cited ones a source in each cell, computed ones say that they are no measurement."""
    assert {fact for fact, (known, _) in TABLE.items() if known == "tested"} == set(CHECKS)
    sources = set(re.findall(r"^(\d)\. ", TEXT, re.M))
    for fact, (known, cells) in TABLE.items():
        assert tuple(cells) == FAMILIES and all(cells.values())
        if known == "cited":
            assert all(set(re.findall(r"\[(\d)\]", text)) & sources for text in cells.values()), fact
    assert "Computed*: from the published sizes, not measured" in " ".join(TEXT.split())


@pytest.mark.promise("A23", "A24", "B21", "B22")
@pytest.mark.parametrize("fact", CHECKS)
def test_row(fact, step, request):
    needed = {"tmp_path", "monkeypatch"} & set(CHECKS[fact].__code__.co_varnames[: CHECKS[fact].__code__.co_argcount])
    CHECKS[fact](step, **{name: request.getfixturevalue(name) for name in needed})


@pytest.mark.promise("A07")
def test_latent_statistics(step, tmp_path):
    """(x - mean) / std is what the network is trained on, by the VAE itself and by the family; no network is loaded."""
    folder = shutil.copytree(step.family.pretrained_model_name_or_path, tmp_path / "without_network")
    shutil.rmtree(folder / step.family.component)
    family = dataclasses.replace(step.family, pretrained_model_name_or_path=str(folder))
    mean, std = family.latent_statistics()
    raw = step.batch["latents"]
    raw = torch.nn.functional.pixel_unshuffle(raw, 2) if family.name in PATCHED else raw
    assert mean.shape == std.shape == (1, raw.shape[1], 1, 1) and mean.dtype == std.dtype == torch.float32
    found = (raw.double() - mean) / std
    rounding = 4 * torch.finfo(torch.float32).eps * found.abs().max()
    for expected in (check_normalised(step), step.family.clean_latents(step.batch)):
        assert (found - expected).abs().max() < rounding


LIMITS = {"flux2_klein": 40, "qwen_image": 40, "z_image": 40, "ernie_image": 90}
LIMITS |= {"sd3": 90, "flux": 90, "sdxl": 12, "sd3 without T5": 16}


@pytest.mark.parametrize("name", LIMITS)
def test_a_caption_is_cut_where_its_last_word_changes_nothing(name, folders):
    kind, limit = name.partition(" ")[0], LIMITS[name]
    options = {"max_sequence_length": 90, "use_t5": False} if "without" in name else {"max_sequence_length": limit}
    options = {} if kind == "ernie_image" else options
    family = sf.load_family(kind)(pretrained_model_name_or_path=str(folders[kind]), **options)
    encoders = family.load_text_encoder(device="cpu", dtype=torch.float32)
    texts = ["a " * number + "b" for number in range(100)]
    lengths, kept = family.count_tokens(texts)
    assert kept == limit and lengths == sorted(lengths) and lengths[0] < limit

    def same(text):
        """Whether the last word makes no difference."""
        one, other = (family.encode_prompts([t], encoders)["prompt_embeds"] for t in (text, text[:-1] + "c"))
        return torch.equal(one, other)

    fits = max(i for i, length in enumerate(lengths) if length <= kept)
    after = {"flux2_klein": 40, "qwen_image": 40, "z_image": 40}.get(name, 0)  # of a template, whose end is cut first
    behind = min(i for i, length in enumerate(lengths) if length > kept + after)
    assert not same(texts[fits]) and same(texts[behind])
