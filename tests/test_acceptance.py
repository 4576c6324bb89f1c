"""What takes longer: kills of every kind, and the demo as printed in the README. `pytest -m acceptance`."""

import random
import shutil
import sys

import pytest
from helpers import encoder_settings, write_cache
from runs import ROOT, environment, logged_losses, run, run_and_kill, weights
from test_processes import equal, flags, largest_difference

from sciflow_hf.checkpoints import checkpoint_fault, list_checkpoints

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_klein):
    """Three buckets that leave tails at every total batch used here."""
    return write_cache(
        tmp_path_factory.mktemp("odd"),
        settings=encoder_settings(tiny_klein),
        buckets={(32, 48): 21, (48, 32): 13, (24, 64): 8},
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "prodigy"])
@pytest.mark.parametrize("stop", [4, 16], ids=["epoch 0", "epoch 1"])
def test_two_n_steps_equal_n_kill_and_n_more(tmp_path, tiny_klein, cache, ranks, optim, stop):
    options = dict(
        optim=optim, learning_rate=1.0 if optim == "prodigy" else 1e-3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_steps=2 * stop, save_steps=stop, resume_from_checkpoint="latest",
    )  # fmt: skip
    run(*flags(tiny_klein, cache, tmp_path / "whole", **options), ranks=ranks)
    words = flags(tiny_klein, cache, tmp_path / "killed", **options)
    run_and_kill(*words, when="'loss'", times=stop + 2, ranks=ranks)
    assert [p.name for p in list_checkpoints(tmp_path / "killed")] == [f"checkpoint-{stop}"]
    run(*words, ranks=ranks)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert equal(whole, killed), f"largest difference {largest_difference(whole, killed)}"
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")


def test_killed_at_random_moments_while_saving(tmp_path, tiny_klein, cache):
    """A save at every step and 12 kills at random moments: what is found newest is always whole, nothing changes."""
    options = dict(
        per_device_train_batch_size=2, max_steps=60, save_steps=1, save_total_limit=2, resume_from_checkpoint="latest",
        eval_fraction=0.3, eval_strategy="steps", eval_steps=7,
    )  # fmt: skip
    run(*flags(tiny_klein, cache, tmp_path / "whole", **options))
    words = flags(tiny_klein, cache, tmp_path / "killed", **options)
    moments = random.Random(0)
    for _ in range(12):
        run_and_kill(*words, when="'loss'", times=moments.randint(1, 4), delay=moments.uniform(0, 0.05))
        folders = list_checkpoints(tmp_path / "killed")
        assert any(checkpoint_fault(folder) is None for folder in folders), folders
    run(*words)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_the_demo_as_printed(tmp_path):
    """The README's command in a copy of the checkout: held-out loss clearly falls, all its files are there."""
    import subprocess

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    done = subprocess.run(
        [sys.executable, "recipes/train_flux2klein.py", "--config", "recipes/configs/flux2klein_demo.yaml"],
        cwd=tmp_path, env=environment(OMP_NUM_THREADS="2"), capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "better" in done.stdout and "not clearly" not in done.stdout
    out = tmp_path / "outputs" / "flux2klein_demo"
    for name in ("pytorch_lora_weights.safetensors", "README.md", "validation/contact_sheet.png", "checkpoint-150"):
        assert (out / name).exists() and (name in done.stdout or "checkpoint" in name)
