"""Trainings by rewards as users run them: killed, on two ranks, by the recipe, and what they write."""

import json

import numpy as np
import pytest
from family_steps import FAMILIES
from recipe_runs import ROOT, run, weights
from reward_runs import launch, reward_trainer
from trainings import same, trained

import sciflow_hf as sf
from sciflow_hf.training.reward_prompts import Prompts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RECIPE = ROOT / "recipes" / "train_reward.py"


def job(tiny_klein, output_dir, **options):
    defaults = dict(save_strategy="steps", save_steps=3, resume_from_checkpoint="latest", kl_weight=0.1)
    return {"pipeline": tiny_klein, "output_dir": output_dir} | defaults | options


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_klein):
    """A run of two rollouts on one rank, with steps of four, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    options = dict(per_device_train_batch_size=4, prompts_per_rollout=4)
    return folder, launch(folder, job(tiny_klein, folder / "run", **options))["log"]


@pytest.mark.parametrize(
    ("where", "at"),
    [("draw", 7), *(pytest.param(*more, marks=pytest.mark.acceptance) for more in (("score", 6), ("update", 5)))],
)
def test_two_n_rollouts_equal_n_a_kill_and_n_more(tmp_path, tiny_klein, whole, where, at):
    """Stops at the other places without a process of their own: test_reward_trainer."""
    options = dict(per_device_train_batch_size=4, prompts_per_rollout=4)
    killed = job(tiny_klein, tmp_path / "run", kill=(where, at), **options)
    assert launch(tmp_path, killed, check=False).returncode != 0
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "rollouts" / "000001").glob("draw_*")}
    assert len(drawn) == {"draw": 2, "score": 4, "update": 4}[where]
    log = launch(tmp_path, job(tiny_klein, tmp_path / "run", **options))["log"]
    assert log == whole[1] and same(weights(tmp_path / "run"), weights(whole[0] / "run"))


def test_two_ranks_take_the_steps_of_one(tmp_path, tiny_klein, whole):
    """1 x 4 = 2 x 2: images of the first rollout bit for bit, then rewards and weights to rounding."""
    options = dict(per_device_train_batch_size=2, prompts_per_rollout=4)
    log = launch(tmp_path, job(tiny_klein, tmp_path / "run", **options), ranks=2)["log"]
    compared = ("reward", "reward_std", "loss", "kl", "old_distance", "eval_reward", "eval_reward_gain")
    assert len(log) == len(whole[1])
    for ours, theirs in zip(log, whole[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in compared:
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), (name, ours["step"])
    first = [entry for entry in log if entry.get("rollout") == 0]
    assert first == [entry for entry in whole[1] if entry.get("rollout") == 0]
    one, two = weights(whole[0] / "run"), weights(tmp_path / "run")
    largest = max(float(value.abs().max()) for value in one.values())
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-2 * largest


def test_an_error_on_one_rank_ends_both(tmp_path, tiny_klein):
    """A reward that lacks something on the second rank: the first says so instead of waiting for it."""
    options = job(tiny_klein, tmp_path / "run", rewards="away_on_rank_1")
    assert launch(tmp_path, options, ranks=2)["error"] == "another rank has stopped: the judge is not installed"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("flux2_klein", "sdxl")])
def test_a_rollout_and_its_steps_of_every_family(tmp_path, tiny_pipelines, name):
    """Texts of several lengths included: weights move, and at the first step the policy is the old one."""
    options = {"pretrained_model_name_or_path": str(tiny_pipelines[name])}
    if name != "ernie_image":  # which takes texts of any length
        options["max_sequence_length"] = 7
    data = Prompts([{"prompt": text, "height": 32, "width": 64} for text in ("XZ", "Z", "ZXZ")])
    trainer = reward_trainer(
        tmp_path / "run", sf.load_family(name)(**options), data, num_train_epochs=1, num_generations=2,
        prompts_per_rollout=3, per_device_train_batch_size=3, rollout_batch_size=6,
    )  # fmt: skip
    before = trained(trainer)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["old_distance"] == 0 and np.isfinite(first["loss"]) and first["loss"] > 0
    assert not same(trained(trainer), before)


def test_the_recipe_and_what_it_writes(tmp_path, tiny_klein):
    """The plan, a card with method and rewards, a LoRA that the stock pipeline loads."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i} bars", "height": 32, "width": 48} for i in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(
        family="flux2_klein", pretrained_model_name_or_path=tiny_klein, max_sequence_length=12, prompts_file=prompts,
        output_dir=tmp_path / "out", num_generations=2, prompts_per_rollout=2, rollout_steps=2, num_train_epochs=2,
        per_device_train_batch_size=2, reward_funcs="reward_runs.dark", watch_rewards="reward_runs.bright", rank=4,
        use_cpu=True, num_inference_steps=2, save_strategy="no", learning_rate=1e-2, eval_fraction=0.2,
        validation_guidance_scale=1, logging_steps=1, validation_prompts="A figure", validation_steps=4,
    )  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    plan = run(*words, "--dry_run", script=RECIPE).stdout
    assert "4 steps (2 an epoch), 2 samples a step" in plan and "10 samples to train on, 2 held out" in plan
    done = run(*words, script=RECIPE)
    assert "Held-out reward: 0." in done.stdout and "10 prompts to train on, 2 held out." in done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arxiv:2509.16117" in card and "It learnt from rewards of images that it drew itself: `dark`." in card
    assert "| watched bright | 0." in card and "10 prompts" in card
    facts = json.loads((tmp_path / "out" / "run_facts.json").read_text())
    assert facts["rewards"]["rewards"] == {"dark": 1.0} and np.isfinite(facts["metrics"]["eval_reward_gain"])
    assert (tmp_path / "out" / "rollouts" / "rollout_000001.png").exists()
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein)
    pipeline.load_lora_weights(tmp_path / "out")
    assert pipeline.get_active_adapters()
