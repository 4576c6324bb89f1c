"""Options of families: made without loading anything, earlier words accepted, mini_klein a name like any other."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from dits import SMALL, FewImages, dit_trainer

import sciflow_hf as sf
from sciflow_hf.data.cache import common_metadata, same_setting
from sciflow_hf.families.loading import model_source

PACKAGE = str(Path(sf.__file__).parent) + "/"
KLEIN = {"pretrained_model_name_or_path": "mini_klein", "max_sequence_length": 16}


def files_entered(function):
    """Files of the package whose functions are called, relative to it."""
    found = set()

    def note(frame, event, arg):
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and code.co_flags & 1:  # a function, not the body of a module or class
            found.add(code.co_filename.removeprefix(PACKAGE))

    before = sys.gettrace()
    sys.settrace(note)
    try:
        function()
    finally:
        sys.settrace(before)
    return found


def test_making_a_family_enters_no_family():
    sf.Flux2Klein(**KLEIN)
    assert files_entered(lambda: sf.Flux2Klein(**KLEIN)) == {"options.py"}


def test_sigmas_come_from_three_files(tmp_path):
    family = sf.Flux2Klein(**KLEIN)
    options = {"use_cpu": True, "output_dir": str(tmp_path), "report_to": "none", "timestep_shift": "3.0"}
    args, keys = sf.DiffusionTrainingArguments(**options), torch.tensor([1, 2])
    assert files_entered(lambda: family.sample_levels(keys, args, 24)) == {
        "diffusion/process.py", "diffusion/randomness.py",
    }  # fmt: skip


# ---- mini_klein, which comes with the package ----


def test_mini_klein_stays_a_name():
    family = sf.Flux2Klein(**KLEIN)
    assert family.encoder_settings()["pretrained_model_name_or_path"] == "mini_klein"
    assert family.load_model(dtype=torch.float32, meta=True).config.in_channels == 32
    assert family.normalise(torch.zeros(1, 32, 2, 2)).isfinite().all()
    assert type(family.load_pipeline().vae).__name__ == "AutoencoderKLFlux2"
    assert model_source("./mini_klein") == "./mini_klein"


def test_a_cache_may_hold_the_folder_that_mini_klein_once_was():
    key, folder = "pretrained_model_name_or_path", "/somewhere/else/sciflow_hf/assets/mini_klein"
    for one, other in ((folder, "mini_klein"), ("mini_klein", folder)):
        assert same_setting(key, one, other) and not same_setting(key, one, "user/other")
        assert common_metadata(["a", "b"], [{"family": "x", key: one}, {"family": "x", key: other}])[key] == one
    with pytest.raises(sf.CacheError, match=key):
        common_metadata(["a", "b"], [{"family": "x", key: "mini_klein"}, {"family": "x", key: "user/other"}])


# ---- v_prediction, which under ddpm was called velocity ----


def test_under_ddpm_velocity_is_v_prediction():
    given = ({}, {"prediction_type": "velocity"}, {"prediction_type": "v_prediction"})
    found = [sf.DiT(**SMALL, objective="ddpm", **options) for options in given]
    assert [family.prediction_type for family in found] == ["v_prediction"] * 3
    assert {family.process.prediction_type for family in found} == {"v_prediction"}
    assert sf.DiT(**SMALL).prediction_type == "velocity"
    with pytest.raises(sf.SciflowError, match=r"`prediction_type` v_prediction.*--objective ddpm"):
        sf.DiT(**SMALL, prediction_type="v_prediction")


def test_saved_pipelines_that_say_velocity(tmp_path):
    family = sf.DiT(**SMALL, objective="ddpm")
    family.save_network(family.load_model(dtype=torch.float32), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["prediction_type"] == "v_prediction"

    def drawn():
        pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
        assert pipeline.config.prediction_type == "v_prediction"
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2], num_inference_steps=2, generator=generator, output_type="pt").images

    now = drawn()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"prediction_type": "velocity"}))
    assert torch.equal(drawn(), now)
    tuned = sf.DiT(pretrained_model_name_or_path=str(tmp_path))
    tuned.load_model(dtype=torch.float32)
    assert (tuned.objective, tuned.prediction_type) == ("ddpm", "v_prediction")


def test_a_checkpoint_that_says_velocity_resumes(tmp_path):
    options = dict(save_strategy="steps", save_steps=2, max_steps=2)
    dit_trainer(tmp_path, family=sf.DiT(**SMALL, objective="ddpm"), train=FewImages(8), **options).train()
    folder = tmp_path / "checkpoint-2"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["network"]["prediction_type"] == "v_prediction"
    facts["network"]["prediction_type"] = "velocity"
    (folder / "run.json").write_text(json.dumps(facts))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["run.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    again = dict(options, max_steps=3, resume_from_checkpoint="latest")
    trainer = dit_trainer(tmp_path, family=sf.DiT(**SMALL, objective="ddpm"), train=FewImages(8), **again)
    trainer.train()
    assert trainer.state.global_step == 3
    with pytest.raises(sf.SciflowError, match=r"network\.prediction_type: 'v_prediction' then, 'sample' now"):
        other = sf.DiT(**SMALL, objective="ddpm", prediction_type="sample")
        dit_trainer(
            tmp_path, family=other, train=FewImages(8), **again | {"resume_from_checkpoint": str(folder)}
        ).train()
