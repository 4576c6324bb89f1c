"""What takes longer: kills of every kind, and the demo as printed in the README. `pytest -m acceptance`."""

import os
import random
import shutil
import sys

import pytest
from caches import encoder_settings, write_cache
from recipe_runs import ROOT, environment, flags, logged_losses, run, run_and_kill, weights
from trainings import largest_difference, same

from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

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
    assert same(whole, killed), f"largest difference {largest_difference(whole, killed)}"
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
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_the_demo_as_printed(tmp_path):
    """The README's command in a copy of the checkout: held-out loss clearly falls, all its files are there."""
    import subprocess

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    done = subprocess.run(
        [sys.executable, "recipes/train_flux2klein.py", "--config", "recipes/configs/flux2klein_demo.yaml"],
        cwd=tmp_path, env=environment(OMP_NUM_THREADS="2"), capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "better" in done.stdout and "no clear difference" not in done.stdout
    out = tmp_path / "outputs" / "flux2klein_demo"
    for name in ("pytorch_lora_weights.safetensors", "README.md", "validation/contact_sheet.png", "checkpoint-300"):
        assert (out / name).exists() and (name in done.stdout or "checkpoint" in name)


@pytest.mark.parametrize("payload", ["shards", "inline"])
def test_a_conversion_killed_at_random_moments(tmp_path, payload):
    """20 kills of `cache convert`: the rerun finishes, and every sample is there once, as without a kill."""
    import subprocess
    import time

    import torch

    from sciflow_hf.data.load import load_cache

    source = write_cache(
        tmp_path / "source", settings=encoder_settings("x"), buckets={(256, 384): 90, (384, 256): 70}, embed_dim=4096
    )
    moments, killed = random.Random(payload), 0

    def start(output):
        words = ["-m", "sciflow_hf.cli", "cache", "convert", "--shard_size_mb", "1", "--payload", payload]
        words += ["--input_dir", str(source), "--output_dir", str(output)]
        return subprocess.Popen([sys.executable, *words], env=environment(), stderr=subprocess.DEVNULL)

    def whole_files(output):
        return len([*output.glob("data_*"), *output.glob("shards/part*")])

    assert start(tmp_path / "whole").wait() == 0
    for number in range(20):
        output = tmp_path / f"killed{number // 4}"  # each folder is killed four times
        wanted = whole_files(output) + moments.randint(0, 8)
        process = start(output)
        while whole_files(output) < wanted and process.poll() is None:
            pass
        time.sleep(moments.uniform(0, 0.05))
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed >= 10
    old = load_cache(source)
    for number in range(5):
        output = tmp_path / f"killed{number}"
        process = start(output)
        assert process.wait() == 0
        new = load_cache(output)
        assert new.row_ids == old.row_ids
        for row in range(len(old)):
            assert all(torch.equal(new[row][name], value) for name, value in old[row].items())
        files = {f.relative_to(output): f for f in output.rglob("*") if f.is_file() and f.name != ".lock"}
        assert not [name for name in files if name.name.endswith(".tmp")]
        assert all(f.read_bytes() == (tmp_path / "whole" / name).read_bytes() for name, f in files.items())


def test_cache_build_killed_at_random_moments(tmp_path, tiny_klein, figures):
    """20 SIGKILLs after so many files and some time: the next build finishes, and the cache is that of one build."""
    import subprocess
    import time

    import torch

    from sciflow_hf.cli import main
    from sciflow_hf.data.inspect.verify import verify_cache
    from sciflow_hf.data.load import load_cache

    def words(output):
        options = {
            "family": "flux2_klein", "pretrained_model_name_or_path": tiny_klein, "input_dir": figures,
            "output_dir": output, "resolution": 64, "max_sequence_length": 12, "payload": "shards", "crops": 7,
            "device": "cpu",
        }  # fmt: skip
        return ["cache", "build"] + [str(word) for name, value in options.items() for word in (f"--{name}", value)]

    def written(output):
        staged = sum(name.endswith(".safetensors") for _, _, names in os.walk(output / ".staging") for name in names)
        return 1000 if list(output.glob("shards/.*")) or list(output.glob("shards/*")) else staged

    def start(output, files):
        process = subprocess.Popen(
            [sys.executable, "-m", "sciflow_hf.cli", *words(output)],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        while written(output) < files and process.poll() is None:
            time.sleep(0.002)
        return process

    def samples(output):
        cache = load_cache(output)
        assert len(set(cache.row_ids)) == len(cache) == 8 * 24
        return {name: cache[i] for i, name in enumerate(cache.row_ids)}

    assert start(tmp_path / "whole", 0).wait() == 0
    whole = samples(tmp_path / "whole")
    moments, killed = random.Random(0), 0
    for i in range(20):
        output = tmp_path / f"killed_{i}"
        process = start(output, moments.randint(0, 250))  # 216 are staged before they are packed
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        killed += process.wait() == -9
        assert main(words(output)) == 0
        found = samples(output)
        assert found.keys() == whole.keys() and not (output / ".staging").exists()
        for name, sample in found.items():
            assert all(torch.equal(value, whole[name][key]) for key, value in sample.items()), name
        assert verify_cache(load_cache(output), progress=False).clean
        shutil.rmtree(output)
    assert killed >= 15
