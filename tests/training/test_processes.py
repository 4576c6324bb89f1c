"""Whole runs in their own processes: SIGKILL and resume, two ranks against one, two ranks resumed."""

import numpy as np
import pytest
import torch
from caches import encoder_settings, write_cache
from recipe_runs import logged_losses, run, run_and_kill, weights

from sciflow_hf.training.checkpoints import checkpoint_fault


@pytest.fixture(scope="module")
def even_cache(tmp_path_factory, tiny_klein):
    folder = tmp_path_factory.mktemp("even")
    return write_cache(folder, settings=encoder_settings(tiny_klein), buckets={(32, 48): 12, (48, 32): 8, (24, 64): 4})


def flags(tiny_klein, cache, output_dir, **options):
    defaults = dict(
        pretrained_model_name_or_path=tiny_klein, max_sequence_length=12, dataset_dir=cache, output_dir=output_dir,
        eval_fraction=0, rank=4, lora_alpha=8, learning_rate=1e-3, max_steps=12, logging_steps=1, save_steps=6,
        use_cpu=True, seed=3, disable_tqdm=True,
    )  # fmt: skip
    return [word for name, value in (defaults | options).items() for word in (f"--{name}", value)]


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_klein, even_cache):
    """SIGKILL after the first save, then the same command again: the same bits. One process, accumulation 2."""
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    run(*flags(tiny_klein, even_cache, tmp_path / "whole", **options))
    words = flags(tiny_klein, even_cache, tmp_path / "killed", **options)
    run_and_kill(*words, when="'loss'", times=8)  # checkpoint-6 is whole, steps 7 and 8 are lost
    assert not (tmp_path / "killed" / "checkpoint-12").exists()
    assert checkpoint_fault(tmp_path / "killed" / "checkpoint-6") is None
    run(*words)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")


def test_two_ranks_equal_one(tmp_path, tiny_klein, even_cache):
    """Batch 4 on one process and 2 x 2 on two: the same losses (1e-5) and weights (1e-4); no step has a tail."""
    run(*flags(tiny_klein, even_cache, tmp_path / "one", per_device_train_batch_size=4, eval_fraction=0))
    run(
        *flags(tiny_klein, even_cache, tmp_path / "two", per_device_train_batch_size=2, eval_fraction=0),
        ranks=2,
    )
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert largest_difference(one, two) < 1e-4
    assert not equal(one, weights(tmp_path / "one" / "checkpoint-6"))


def test_two_ranks_killed_and_resumed(tmp_path, tiny_klein, tiny_cache):
    """Two gloo ranks, several buckets with tails, Prodigy, evaluation with a base, stopped inside epoch 1."""
    options = dict(
        optim="prodigy", learning_rate=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=10,
        save_steps=5, eval_fraction=0.3, eval_strategy="steps", eval_steps=5, resume_from_checkpoint="latest",
    )  # fmt: skip
    run(*flags(tiny_klein, tiny_cache, tmp_path / "whole", **options), ranks=2)
    words = flags(tiny_klein, tiny_cache, tmp_path / "killed", **options)
    run_and_kill(*words, when="'loss'", times=7, ranks=2)
    run(*words, ranks=2)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
