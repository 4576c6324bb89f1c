"""`--validation_negative_prompt` and true guidance: for every family what diffusers' own pipeline draws with it."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from drawing import SIZE, StubFamily, callback
from family_steps import FAMILIES, edited
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.adapters.adapter import with_text_adapters
from sciflow_hf.errors import SciflowError
from sciflow_hf.report.contact_sheet import read_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PROMPTS = ["a line plot", "two red bars"]
NEGATIVE = ["blurred grey photograph", "watermark"]
OPTIONS = {
    "flux2_klein": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 12, "validation_true_cfg_scale": 3.0},
    "sd3": {"max_sequence_length": 12},
}
CALL = {  # what the stock pipeline is given beside the prompts
    "flux2_klein": {"guidance_scale": 4.0, "max_sequence_length": 12},
    "qwen_image": {"true_cfg_scale": 4.0},
    "z_image": {"guidance_scale": 4.0},
    "ernie_image": {"guidance_scale": 4.0, "use_pe": False},
    "sd3": {"guidance_scale": 4.0, "max_sequence_length": 12},
    "flux": {"guidance_scale": 4.0, "max_sequence_length": 12, "true_cfg_scale": 3.0},
    "sdxl": {"guidance_scale": 4.0},
}


@pytest.fixture(scope="module")
def folders(tiny_pipelines):
    return tiny_pipelines


@pytest.fixture(params=FAMILIES)
def family(request, folders):
    options = OPTIONS.get(request.param, {})
    return sf.load_family(request.param)(pretrained_model_name_or_path=str(folders[request.param]), **options)


def stock_call(family, pipeline, prompt, negative):
    """An image of diffusers' pipeline, which is given text. klein's call takes no negative text: it is encoded."""
    given = {} if negative is None else {"negative_prompt": negative}
    if family.name == "flux2_klein" and negative is not None:
        given = {"negative_prompt_embeds": pipeline.encode_prompt(negative, max_sequence_length=12)[0]}
    return np.asarray(
        pipeline(
            prompt=prompt, height=48, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
            **(CALL[family.name] | given),
        ).images[0]
    )  # fmt: skip


def draw(family, pipeline, inputs, **options):
    chosen = dict(height=48, width=32, num_inference_steps=2, guidance_scale=4.0) | options
    return np.asarray(family.generate(pipeline, inputs, generator=torch.Generator().manual_seed(0), **chosen)[0])


def encode(family, *, negative_prompts=None):
    given = {} if negative_prompts is None else {"negative_prompts": negative_prompts}
    return family.encode_validation_prompts(PROMPTS, device="cpu", dtype=torch.float32, **given)


def test_images_are_the_stock_pipelines(family, folders):
    """With a negative prompt of each prompt's own, with an empty one, and without; and these are different images."""
    model = family.load_model(dtype=torch.float32).eval()
    ours = family.load_pipeline(model)
    stock = family.pipeline_class().from_pretrained(folders[family.name])
    stock.set_progress_bar_config(disable=True)
    family.check_negative_prompt(4.0)
    without = {"flux": "", "qwen_image": " "}.get(family.name)  # these pipelines have true guidance only if told
    found = {}
    for name, negatives in (("own", NEGATIVE), ("empty", ["", ""]), ("none", None)):
        for i, inputs in enumerate(encode(family, negative_prompts=negatives)):
            found[name, i] = draw(family, ours, inputs)
            theirs = stock_call(family, stock, PROMPTS[i], without if negatives is None else negatives[i])
            assert found[name, i].shape == (48, 32, 3)
            assert np.abs(found[name, i].astype(int) - theirs).max() <= 1
    for i in range(2):
        assert (found["own", i] != found["empty", i]).mean() > 0.1
        assert (found["own", i] != found["none", i]).mean() > 0.1
    crossed = draw(family, ours, encode(family, negative_prompts=NEGATIVE[::-1])[0])
    assert (crossed != found["own", 0]).mean() > 0.05


def test_one_for_all_is_the_same_for_each(family):
    one = encode(family, negative_prompts=["blurred"] * 2)
    assert any(name.startswith("negative_") for name in one[0])
    for name, value in one[0].items():
        if name.startswith("negative_"):
            torch.testing.assert_close(value, one[1][name])


def test_a_negative_prompt_without_guidance_is_refused(family, folders):
    """As is one that the model at hand cannot take."""
    if family.name == "flux":
        family = dataclasses.replace(family, validation_true_cfg_scale=1.0)
        words = "`validation_negative_prompt` does nothing at `validation_true_cfg_scale` 1: `flux`"
    else:
        off = 0 if family.name == "z_image" else 1
        words = f"`validation_negative_prompt` does nothing at `validation_guidance_scale` {off}: there `{family.name}`"
    with pytest.raises(SciflowError, match=words):
        family.check_negative_prompt(0.0 if family.name == "z_image" else 1.0)


def test_true_guidance_of_flux_is_off_by_default(folders):
    """Then the negative prompt that goes along does nothing, as in the stock pipeline."""
    plain = sf.Flux(pretrained_model_name_or_path=str(folders["flux"]), max_sequence_length=12)
    pipeline = plain.load_pipeline(plain.load_model(dtype=torch.float32).eval())
    images = [draw(plain, pipeline, encode(plain, negative_prompts=n)[0]) for n in (None, NEGATIVE)]
    assert (images[0] == images[1]).all()
    guided = dataclasses.replace(plain, validation_true_cfg_scale=3.0)
    assert (draw(guided, pipeline, encode(guided, negative_prompts=NEGATIVE)[0]) != images[0]).mean() > 0.1


def test_a_distilled_klein_takes_none(folders, tmp_path):
    path = edited(folders["flux2_klein"], tmp_path, "model_index.json", is_distilled=True)
    with pytest.raises(SciflowError, match=r"`validation_negative_prompt`: .*edited' is step-distilled"):
        sf.Flux2Klein(pretrained_model_name_or_path=str(path)).check_negative_prompt(4.0)


def test_a_family_without_prompts_takes_none():
    family = sf.SDXL(pretrained_model_name_or_path="none")
    with pytest.raises(SciflowError, match="`validation_negative_prompt`: `sdxl` takes no negative prompt"):
        sf.ModelFamily.check_negative_prompt(family, 4.0)


# ---- the callback and its options ----


class Noting(StubFamily):
    """Notes what it is to lead away from."""

    def __init__(self):
        super().__init__()
        self.negatives = []

    def check_negative_prompt(self, guidance_scale):
        assert guidance_scale == 2.0

    def encode_validation_prompts(self, prompts, *, negative_prompts=None, **options):
        self.negatives.append(negative_prompts)
        return super().encode_validation_prompts(prompts, **options)


def test_each_prompt_gets_its_own(tmp_path):
    for given, expected in (([], None), (["grey"], ["grey", "grey"]), (["grey", ""], ["grey", ""])):
        family = Noting()
        validator = callback(tmp_path, family, negative_prompts=given)
        validator._encode(run_facts_args(), torch.nn.Linear(1, 1))
        assert family.negatives == [expected]
    with pytest.raises(SciflowError, match=r"`validation_negative_prompt` \['a', 'b', 'c'\]: 3 for 2"):
        callback(tmp_path, Noting(), negative_prompts=["a", "b", "c"])


def run_facts_args():
    return type("Args", (), {"bf16": False, "fp16": False})()


def test_it_needs_prompts(tmp_path):
    with pytest.raises(SciflowError, match="`validation_negative_prompt` without `validation_prompts`"):
        sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, validation_negative_prompt=["grey"])


def test_a_run_draws_with_it_and_says_so(tmp_path, folders, tiny_cache):
    """From the option to the image, its text fields, and the card's call, which draws that very image again."""
    path = edited(folders["flux2_klein"], tmp_path, "model_index.json")
    settings = dict(pretrained_model_name_or_path=str(path), max_sequence_length=12)
    family = sf.Flux2Klein(**settings)
    data = sf.load_cache(tiny_cache, dtype=torch.float32)
    data.check_family = lambda settings: None
    options = dict(validation_prompts=PROMPTS, validation_negative_prompt=["grey"], validation_guidance_scale=4.0,
                   num_inference_steps=2, max_steps=1, validation_size=list(SIZE))  # fmt: skip
    trainer = make_trainer(tmp_path / "run", family, data, **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    image = read_image(tmp_path / "run" / "validation" / "step-000001" / "p01_seed0.png")
    assert image.info["negative_prompt"] == "grey" and image.info["prompt"] == PROMPTS[1]

    code = re.search(r"^image = (pipeline\(.*)\.images\[0\]$", (tmp_path / "run/README.md").read_text(), re.M).group(1)
    assert "guidance_scale=4.0" in code and "'grey'" in code and "max_sequence_length=12" in code
    pipeline = family.pipeline_class().from_pretrained(path)
    pipeline.load_lora_weights(str(tmp_path / "run"))
    pipeline.set_progress_bar_config(disable=True)
    code = re.sub(r"height=\d+, width=\d+", f"height={SIZE[0]}, width={SIZE[1]}", code)
    seed = torch.Generator().manual_seed(0)
    again = eval(code[:-1] + ", num_inference_steps=2, generator=seed)", {**locals(), "prompt": PROMPTS[1]}).images[0]
    assert np.abs(np.asarray(again).astype(int) - np.asarray(image)).max() <= 1


@pytest.mark.parametrize(
    ("name", "options", "drawn", "expected"),
    [
        ("qwen_image", {}, {}, ["negative_prompt=' '"]),
        ("qwen_image", {}, {"validation_guidance_scale": 5.0}, ["true_cfg_scale=5.0", "negative_prompt=' '"]),
        ("flux", {}, {}, []),
        ("flux", {"max_sequence_length": 12}, {}, ["max_sequence_length=12"]),
        (
            "flux",
            {"validation_true_cfg_scale": 2.0},
            {"validation_negative_prompt": ["x"]},
            ["guidance_scale=3.5", "true_cfg_scale=2.0", "negative_prompt='x'"],
        ),
        ("sdxl", {"max_sequence_length": 30}, {"validation_negative_prompt": ["x", "y"]},
         ["guidance_scale=3.5", "negative_prompt='x'"]),
    ],
)  # fmt: skip
def test_the_card_says_how_to_call(tmp_path, folders, name, options, drawn, expected):
    family = sf.load_family(name)(pretrained_model_name_or_path=str(folders[name]), **options)
    drawn |= {"validation_prompts": PROMPTS} if drawn else {}
    args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **drawn)
    assert family.call_arguments(args) == expected


def test_trained_text_encoders_encode_it_as_they_are_now(folders, tmp_path):
    family = sf.SDXL(pretrained_model_name_or_path=str(folders["sdxl"]))
    model = with_text_adapters(
        family.load_model(dtype=torch.float32), sf.AdapterArguments(rank=2, train_text_encoder=True), family=family
    )
    validator = callback(tmp_path, family, prompts=PROMPTS, negative_prompts=NEGATIVE, size=(48, 32))
    validator._encode_with(model)
    before = validator._prompt_inputs[1]["negative_prompt_embeds"]
    torch.testing.assert_close(before, encode(family, negative_prompts=NEGATIVE)[1]["negative_prompt_embeds"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.5
        validator._encode_with(model)
    assert not torch.allclose(before, validator._prompt_inputs[1]["negative_prompt_embeds"])
