"""The course of docs/sciforma.md: each stage starts from the last, and goes on after a kill with the same bits."""

import pytest
from recipe_runs import RECIPE, ROOT, run, run_and_kill
from safetensors.torch import load_file
from trainings import same

from sciflow_hf.cli import main

DPO = ROOT / "recipes" / "train_dpo.py"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


def stage(folder, name, weights, *more, script=RECIPE):
    """Runs a config for 24 steps, once to its end, and once killed after step 14 and started again."""
    words = ["--config", ROOT / "recipes" / "configs" / f"{name}.yaml", "--max_steps", 24, "--save_steps", 8]
    words += ["--logging_steps", 2, "--eval_strategy", "no", "--disable_tqdm", "True"]
    words += ["--validation_prompts", "--validation_source_images", *more, "--output_dir"]
    run(*words, folder / name, script=script)
    run_and_kill(*words, folder / "killed" / name, when="'loss'", times=7, script=script)
    run(*words, folder / "killed" / name, script=script)
    whole, killed = (load_file(place / name / weights) for place in (folder, folder / "killed"))
    assert same(whole, killed)


@pytest.mark.acceptance
def test_every_stage_goes_on_after_a_kill(tmp_path):
    stage(tmp_path, "mini_stage1", NETWORK)
    stage(tmp_path, "mini_stage2", NETWORK, "--init_weights", tmp_path / "mini_stage1")
    first, second = (load_file(tmp_path / name / NETWORK) for name in ("mini_stage1", "mini_stage2"))
    assert all((first[name] - second[name]).abs().max() < 0.05 for name in first), "it starts from the one before"
    drawn = tmp_path / "candidates"
    draw = ["prefer", "draw", "--model_path", tmp_path / "mini_stage2", "--prompts_file", "demo_preferences"]
    draw += ["--output_dir", drawn, "--num_candidates", 4, "--num_inference_steps", 4, "--guidance_scale", 1]
    main([str(word) for word in draw])
    main(["prefer", "score", "--input_dir", str(drawn), "--reward", "chart_kind", "chart_colour"])
    more = ("--init_weights", tmp_path / "mini_stage2", "--input_dir", drawn, "--min_winner_reward", 1)
    stage(tmp_path, "mini_mdpo", "pytorch_lora_weights.safetensors", *more, script=DPO)
