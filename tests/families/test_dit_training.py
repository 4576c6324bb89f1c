"""Training a DiT: exact resume, accumulation and ranks, average, evaluation, images by class, card."""

import functools
import json
import runpy
import shutil

import pytest
import torch
from dits import SMALL, FewImages, dit_trainer
from recipe_runs import ROOT, run
from safetensors.torch import load_file
from trainings import largest_difference

import sciflow_hf as sf
from sciflow_hf.hub.upload import publishable_files
from sciflow_hf.metrics import samples
from sciflow_hf.metrics.samples import SampleMetrics

RECIPE = ROOT / "recipes" / "train_dit.py"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.promise("D14", "D25")
def test_resume_is_exact_with_average_and_accumulation(tmp_path):
    """8 steps = 4 steps, resume, 4 steps: the same bits."""
    options = dict(save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, ema_decay=0.9)
    whole = dit_trainer(tmp_path / "whole", **options)
    start = weights(whole)
    whole.train()
    whole.save_model()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = dit_trainer(tmp_path / "again", resume_from_checkpoint="latest", **options)
    again.train()
    again.save_model()
    assert largest_difference(weights(whole), weights(again)) == 0
    assert all(not torch.equal(start[name], value) for name, value in weights(whole).items())
    averages = [load_file(tmp_path / name / NETWORK) for name in ("whole", "again")]
    assert largest_difference(*averages) == 0 and largest_difference(averages[0], weights(whole)) > 1e-4
    raw = load_file(tmp_path / "whole" / "checkpoint-8" / NETWORK)  # as trained; the average beside it
    assert largest_difference(raw, weights(whole)) == 0


@pytest.mark.promise("D22")
def test_accumulation_is_one_batch(tmp_path):
    one = dit_trainer(tmp_path / "a", max_steps=4)
    four = dit_trainer(tmp_path / "b", max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    one.train()
    four.train()
    assert largest_difference(weights(one), weights(four)) < 1e-5
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def run_here(*flags):
    """The recipe in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", [str(RECIPE), *map(str, flags)])
        runpy.run_path(str(RECIPE), run_name="__main__")
    return end.value.code


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it reads of folders: not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.mark.promise("D22")
def test_two_ranks_are_one(tmp_path, own_cache):
    """The recipe on scikit-learn's digits: 1 x 8 and 2 x 4 reach the same weights and metrics."""
    flags = ["--input_dir", "digits", "--image_size", 8, "--hidden_size", 16, "--num_hidden_layers", 1,
             "--num_attention_heads", 2, "--max_steps", 3, "--max_train_samples", 40, "--report_to", "none",
             "--use_cpu", "true", "--logging_steps", 1, "--learning_rate", 1e-2, "--ema_decay", 0.5,
             "--per_device_eval_batch_size", 90, "--eval_levels", 1, "--metric_images", 6, "--metric_batch_size", 2,
             "--metric_network", "dits.mean_colour", "--metric_classifier", "dits.brightness",
             "--num_inference_steps", 1]  # fmt: skip
    assert run_here(*flags, "--output_dir", tmp_path / "1", "--per_device_train_batch_size", 8) == 0
    two = [*flags, "--output_dir", tmp_path / "2", "--per_device_train_batch_size", 4]
    run(*two, ranks=2, script=RECIPE)
    one, other = (load_file(tmp_path / name / NETWORK) for name in "12")
    assert largest_difference(one, other) < 1e-5
    found = [json.loads((tmp_path / name / "run_facts.json").read_text())["metrics"] for name in "12"]
    names = ("eval_loss", "eval_fid", "eval_kid", "eval_class_accuracy")
    assert [found[0][n] for n in names] == pytest.approx([found[1][n] for n in names], rel=1e-3, abs=1e-6)


def test_evaluation_has_no_base(tmp_path):
    trainer = dit_trainer(tmp_path, held_out=FewImages(8, seed=1), learning_rate=3e-3, max_steps=60)
    before = trainer.evaluate()
    assert trainer.evaluate() == pytest.approx(before | {
        key: trainer.state.log_history[-1][key] for key in before if key.endswith(("runtime", "per_second"))
    })  # fmt: skip
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert not {key for key in after if "base" in key or "gain" in key}


def test_a_fine_tuned_network_has_a_base(tmp_path):
    dit_trainer(tmp_path / "first", max_steps=1).save_model()
    family = sf.DiT(pretrained_model_name_or_path=str(tmp_path / "first"))
    trainer = dit_trainer(tmp_path / "second", family=family, held_out=FewImages(8, seed=1), max_steps=30)
    trainer.train()
    metrics = trainer.evaluate()
    assert (
        metrics["eval_gain"] == pytest.approx(metrics["eval_base_loss"] - metrics["eval_loss"])
        and metrics["eval_gain"] > 0
    )


def test_another_network_does_not_resume(tmp_path):
    dit_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    other = sf.DiT(**SMALL | {"hidden_size": 32})
    with pytest.raises(sf.SciflowError, match=r"network\.hidden_size: 16 then, 32 now"):
        dit_trainer(tmp_path, family=other, resume_from_checkpoint="latest").train()


def test_images_by_class_card_and_what_is_published(tmp_path):
    family = sf.DiT(**SMALL)
    family.class_names = ["cell", "nucleus", "axon", "spine", "glia"]
    trainer = dit_trainer(
        tmp_path, family=family, held_out=FewImages(8, seed=1), max_steps=2, num_inference_steps=2,
        validation_class_labels=["axon", "4"], validation_seeds=[0, 1], validation_guidance_scale=2.0,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    drawn = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("validation/step-*/*.png"))
    assert len(drawn) == 8 and (tmp_path / "validation" / "contact_sheet.png").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: unconditional-image-generation" in card and "trained from scratch on 24 images" in card
    assert f'DiffusionPipeline.from_pretrained("path/to/{tmp_path.name}", trust_remote_code=True)' in card
    assert "pipeline(class_labels=[4], num_inference_steps=2, guidance_scale=2.0)" in card and "*axon*" in card
    files = publishable_files(tmp_path)
    assert {"model_index.json", "pipeline.py", "transformer/modeling_dit.py", NETWORK, "README.md"} <= set(files)
    assert not [file for file in files if file.startswith("checkpoint")]
    with pytest.raises(sf.SciflowError, match=r"class_labels.*'dog'.*cell"):
        dit_trainer(tmp_path / "b", family=family, validation_class_labels=["dog"]).train()


@pytest.mark.promise("D23", "D24")
def test_metrics_of_samples_are_in_the_evaluation(tmp_path, monkeypatch):
    short = functools.partial(samples.train_classifier, steps=30)
    monkeypatch.setattr(samples, "train_classifier", short)
    family, train, held_out = sf.DiT(**SMALL), FewImages(40), FewImages(20, seed=1)
    args = sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", num_inference_steps=2, validation_guidance_scale=1.0
    )
    model = family.load_model(dtype=torch.float32)
    metrics = SampleMetrics(metric_images=10, metric_batch_size=4)
    measure = metrics.of(family, model, train, held_out, args)
    trainer = sf.DiffusionTrainer(
        model, args, family=family, train_dataset=train, eval_dataset=held_out, compute_metrics=measure
    )
    found = trainer.evaluate()
    assert {"eval_fid", "eval_kid", "eval_kid_std", "eval_class_accuracy", "eval_loss"} <= set(found)
    assert found["eval_fid"] > 1 and found["eval_class_accuracy"] <= 0.4  # a new network draws noise
    assert measure(None) == measure(None)  # the same noise each time
    trainer.create_model_card()
    assert "| fid | " in (tmp_path / "README.md").read_text()
    assert SampleMetrics().of(family, model, train, held_out, args) is None
    with pytest.raises(sf.SciflowError, match=r"metric_images.*latents"):
        metrics.of(family, model, train, [{"latents": torch.zeros(4, 2, 2)}], args)


def test_dry_run_makes_no_weights(tmp_path, own_cache, capsys):
    flags = ["--input_dir", "digits", "--image_size", 8, "--preset", "XL", "--output_dir", tmp_path, "--dry_run"]
    assert run_here(*flags) == 0
    printed = capsys.readouterr().out
    assert "the complete network, 6" in printed and "1,257 samples to train on, 540 held out" in printed
    assert not (tmp_path / "transformer").exists()
