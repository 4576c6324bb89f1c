"""Runs of comparisons: every family, the recipe as a user calls it, kills, two ranks, what the card says."""

import json
import math
import re

import numpy as np
import pytest
import torch
from caches import edit, encoder_settings, index_files, write_edits
from family_steps import FAMILIES, Step
from preferences import dpo_trainer, first_batch, groups_of, write_candidates
from recipe_runs import ROOT, flags, logged_losses, run, run_and_kill, weights
from trainings import losses, make_args, same

import sciflow_hf as sf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RECIPE = ROOT / "recipes" / "train_dpo.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_klein):
    return write_candidates(tmp_path_factory.mktemp("candidates") / "cache", tiny_klein)


@pytest.fixture(scope="module")
def pipelines(tiny_pipelines):
    return tiny_pipelines


class Groups(list):
    """Groups in memory."""

    group_size = 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family(tmp_path, pipelines, name):
    """log 2 at the start, also of DDPM and of padded text; then trained weights move, and evaluation compares."""
    step = Step(name, pipelines[name], make_args(tmp_path))
    rng = torch.Generator().manual_seed(1)
    rows = Groups()
    for number in range(4):
        row = {name: value[number % 2] for name, value in step.batch.items()}
        row["latents"] = torch.randn(2, *row["latents"].shape, generator=rng)
        if name == "sdxl":
            row["time_ids"] = torch.tensor([[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]] * 2)
        if step.family.pads_text:
            row["prompt_embeds"] = row["prompt_embeds"][: 7 - number]
        rows.append(row)
    trainer = dpo_trainer(tmp_path, step.family, rows, Groups(rows[:2]), max_steps=3, stratified_levels=True)
    batch = first_batch(trainer)
    if step.family.pads_text:
        assert batch["prompt_embeds_mask"].shape == batch["prompt_embeds"].shape[:2]
    assert float(trainer.compute_loss(trainer.model.train(), batch)) == np.float32(math.log(2))
    trainer.train()
    assert len(set(losses(trainer))) == 3
    metrics = trainer.evaluate()
    assert metrics["eval_base_loss"] == pytest.approx(math.log(2)) and 0 <= metrics["eval_right_orders"] <= 1


def test_edits_are_compared_with_their_sources(tmp_path, tiny_klein, family):
    """Groups of two with none, one and two sources, which winner and loser share."""
    cache = write_edits(tmp_path / "edits", settings=encoder_settings(tiny_klein))
    names = {}

    def groups(values):
        keys = list(zip(kept["h"], map(str, kept["s"]), strict=True))
        for row, key in enumerate(keys):
            names.setdefault(key, []).append(row)
        return [f"{key} {names[key].index(row) // 2}" for row, key in enumerate(keys)]

    kept = {}
    edit(
        index_files(cache)[0],
        bucket_h=lambda v: kept.setdefault("h", v),
        source_shapes=lambda v: kept.setdefault("s", v),
    )
    edit(
        index_files(cache)[0], group_id=groups, caption=lambda v: ["Make it red."] * 24, paper_id=lambda v: [None] * 24
    )
    roles = lambda v: ["winner" if names_of.setdefault(g, row) == row else "loser" for row, g in enumerate(v)]  # noqa: E731
    names_of = {}
    columns = {}
    edit(index_files(cache)[0], group_id=lambda v: columns.setdefault("g", v))
    edit(index_files(cache)[0], role=lambda _: roles(columns["g"]))
    found = groups_of(cache)
    assert len(found) == 12 and sum(bool(s) for s in found.source_shapes) == 8
    trainer = dpo_trainer(tmp_path / "out", family, found, found, max_steps=4, edit_loss="balanced")
    for batch in (first_batch(trainer),):
        assert float(trainer.compute_loss(trainer.model.train(), batch)) == np.float32(math.log(2))
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_gain_edit", "eval_gain_generation"} <= metrics.keys()


# ---- the recipe ----


def dpo_flags(tiny_klein, cache, output_dir, **options):
    defaults = dict(eval_fraction=0.3, eval_strategy="no", save_steps=3, max_steps=6, max_winner_drift=0)
    return flags(tiny_klein, cache, output_dir, **(defaults | options))


def test_the_recipe_and_what_it_writes(tmp_path, tiny_klein, folder):
    """A card with method and paper, metrics before and after, and a LoRA that the stock pipeline loads."""
    out = tmp_path / "out"
    words = dpo_flags(tiny_klein, folder, out, eval_strategy="steps", eval_steps=3, preference_loss="mdpo_contrastive")
    words += [
        "--axes",
        "component",
        "text",
        "--global_worst",
        "--validation_prompts",
        "A figure",
        "--family",
        "flux2_klein",
    ]
    words += ["--num_inference_steps", "2", "--validation_steps", "6", "--min_reward_gap", "0.1"]
    done = run(*words, script=RECIPE)
    assert "Groups of candidates:" in done.stderr and "gap of component" in done.stderr
    assert re.search(r"right orders \d", done.stdout)
    card = (out / "README.md").read_text()
    assert "arxiv:2607.18091" in card and "M-DPO" in card and "[2311.12908]" in card and "groups of figures" in card
    facts = json.loads((out / "run_facts.json").read_text())
    assert facts["metrics"]["eval_right_orders"] >= 0 and facts["preferences"]["axes"] == ["component", "text", "worst"]
    assert (out / "validation" / "contact_sheet.png").exists()
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein)
    pipeline.load_lora_weights(out)
    assert pipeline.get_active_adapters()
    plan = run(*words, "--dry_run", script=RECIPE).stdout
    assert "a sample is a group of up to 4 candidates" in plan
    assert "Loss per sample: [1.0986" not in run(*words, "--debug_batch", script=RECIPE).stdout


def test_a_drift_ends_the_recipe_with_a_word(tmp_path, tiny_klein, folder):
    words = dpo_flags(tiny_klein, folder, tmp_path / "out", max_winner_drift=1.02, learning_rate=0.3, max_steps=60,
                      per_device_train_batch_size=4, logging_steps=2)  # fmt: skip
    done = run(*words, script=RECIPE, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: the winners' loss is" in done.stderr and "`max_winner_drift` is 1.02" in done.stderr


@pytest.mark.acceptance
@pytest.mark.parametrize("more", [{}, {"no_adapter": True, "learning_rate": 1e-5}, {"ema_decay": 0.9}])
def test_two_n_steps_equal_n_kill_and_n_more(tmp_path, tiny_klein, folder, more):
    options = dict(gradient_accumulation_steps=2, save_steps=4, max_steps=8, resume_from_checkpoint="latest") | more
    run(*dpo_flags(tiny_klein, folder, tmp_path / "whole", **options), script=RECIPE)
    words = dpo_flags(tiny_klein, folder, tmp_path / "killed", **options)
    run_and_kill(*words, when="'loss'", times=6, script=RECIPE)
    run(*words, script=RECIPE)
    if "no_adapter" in more:
        from safetensors.torch import load_file

        name = "transformer/diffusion_pytorch_model.safetensors"
        whole, killed = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
    else:
        whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert same(whole, killed)
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path, tiny_klein, folder):
    """1 x 4 = 2 x 2, where no group is cut: losses of the steps and metrics of the held-out groups."""
    options = dict(preference_beta=20, eval_strategy="steps", eval_steps=3, optim="sgd", learning_rate=1e-4,
                   eval_fraction=0.2)  # fmt: skip
    one = dpo_flags(tiny_klein, folder, tmp_path / "one", per_device_train_batch_size=4, **options)
    two = dpo_flags(tiny_klein, folder, tmp_path / "two", per_device_train_batch_size=2, **options)
    run(*one, script=RECIPE)
    run(*two, script=RECIPE, ranks=2)
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-5)
    logs = [
        json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    ]
    names = ("margin", "winner_ratio", "right_orders", "eval_margin", "eval_loss", "eval_winner_ratio")
    ours, theirs = ([{name: e[name] for name in names if name in e} for e in log] for log in logs)
    assert len(ours) >= 8 and [e.keys() for e in ours] == [e.keys() for e in theirs]
    for one_log, other in zip(ours, theirs, strict=True):
        assert one_log == pytest.approx(other, rel=1e-4, abs=16 * float(np.finfo(np.float32).eps))


def test_the_family_that_is_named(tmp_path, monkeypatch):
    """By the flag, else by the config, else klein; by a dotted path, too."""
    config = tmp_path / "run.yaml"
    config.write_text("family: sdxl\n")
    assert sf.chosen_family(["--config", str(config)]) is sf.SDXL
    assert sf.chosen_family(["--config", str(config), "--family", "sd3", "--axes", "a", "b"]) is sf.SD3
    assert sf.chosen_family([]) is sf.Flux2Klein
    assert sf.chosen_family(["--family=sciflow_hf.families.flux.Flux"]) is sf.Flux
    with pytest.raises(sf.SciflowError, match="`family` 'klein' is unknown: use one of dit, ernie_image, flux"):
        sf.chosen_family(["--family", "klein"])
