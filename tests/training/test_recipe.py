"""The recipe from end to end in its own process: from drawn figures to a LoRA, and what a user may do wrong."""

import json
import shutil

import pytest
from recipe_runs import ROOT, run, weights

DEMO = ROOT / "tests" / "flux2klein_tiny.yaml"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, shortened: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = run(
        "--config", DEMO, "--output_dir", out, "--max_steps", 30, "--save_steps", 15, "--eval_steps", 30,
        "--validation_steps", 100, "--num_inference_steps", 2, "--validation_seeds", 0, "--resolution", 64,
    )  # fmt: skip
    return out, done


@pytest.mark.promise("A10", "B02")
def test_demo_lowers_the_held_out_loss_and_says_so(demo):
    out, done = demo
    assert "better" in done.stdout and "not clearly" not in done.stdout
    for name in ("pytorch_lora_weights.safetensors", "README.md", "validation/contact_sheet.png"):
        assert (out / name).is_file() and name in done.stdout
    state = json.loads((out / "checkpoint-30" / "trainer_state.json").read_text())
    evaluated = [e for e in state["log_history"] if "eval_loss" in e]
    assert evaluated[-1]["eval_loss"] < 0.9 * evaluated[-1]["eval_base_loss"]
    assert all(".lora_" in key for key in weights(out))


def test_buckets_are_said_before_step_one(demo):
    _, done = demo
    assert 0 < done.stderr.index("Buckets of an epoch") < done.stderr.index(" of 30: loss ")


def test_second_run_goes_on_without_encoding_again(demo, tmp_path):
    out, _ = demo
    copy = shutil.copytree(out, tmp_path / "out")
    done = run(
        "--config", DEMO, "--output_dir", copy, "--max_steps", 32, "--resume_from_checkpoint", "latest",
        "--overwrite_output_dir", False, "--validation_steps", 100, "--num_inference_steps", 2, "--resolution", 64,
        "--validation_seeds", 0, "--lr_scheduler_type", "constant",
    )  # fmt: skip
    assert "0 encoded now, 100 before" in done.stderr and "checkpoint-30" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lern_rate", 1], ["--lern_rate", "did you mean `--learning_rate`"]),
        (["--rank", "many"], ["--rank", "many"]),
        (["--lora_layers", "nonsense"], ["`lora_layers` 'nonsense'", "attention, standard, full"]),
        (["--pretrained_model_name_or_path", "/nowhere"], ["/nowhere", "diffusers layout"]),
        (["--input_dir", "/nowhere"], ["/nowhere"]),
        (["--resume_from_checkpoint", "checkpoint-7"], ["checkpoint-7", "does not exist"]),
        (["--overwrite_output_dir", False], ["holds checkpoint-", "--resume_from_checkpoint latest"]),
        (["--resume_from_checkpoint", "latest", "--rank", 4], ["another run", "adapter"]),
        (["--weighting_scheme", "best"], ["weighting_scheme", "logit_normal"]),
        (["--auto_find_batch_size"], ["auto_find_batch_size"]),
        (["--adapter_path", "/nowhere/lora.safetensors"], ["adapter_path", "/nowhere/lora.safetensors"]),
        (["--timestep_shift", "-1"], ["timestep_shift"]),
    ],
)
def test_mistakes_end_in_one_line(demo, tmp_path, flags, words, monkeypatch, capsys):
    """In this process, for speed: exit status 2, the value and what to do, no traceback; nothing is changed."""
    import sciflow_hf as sf

    out = shutil.copytree(demo[0], tmp_path / "out")
    before = sorted(p.relative_to(out) for p in out.rglob("*"))
    argv = ["--config", DEMO, "--output_dir", out, "--resolution", 64, "--use_cpu", True, "--max_steps", 30]
    if "--overwrite_output_dir" not in flags:
        argv += ["--overwrite_output_dir", "--resume_from_checkpoint", "checkpoint-30"]
    argv = [str(word) for word in argv + flags]
    monkeypatch.setattr("sys.argv", ["train_flux2klein.py", *argv])
    namespace: dict = {"__name__": "recipe"}
    exec(compile((ROOT / "recipes" / "train_flux2klein.py").read_text(), "recipe", "exec"), namespace)
    with pytest.raises(SystemExit) as stopped:
        sf.run(namespace["main"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert "error: " in last and all(word in last for word in words), last
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == before
