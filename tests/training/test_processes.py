"""Whole runs in their own processes: SIGKILL and resume, two ranks against one, two ranks resumed.

One of them is as a user starts it, by torchrun, against a run that is forked.
"""

import numpy as np
import pytest
from recipe_runs import flags, logged_losses, run, run_and_kill, weights
from trainings import largest_difference, same

from sciflow_hf.training.checkpoints import checkpoint_fault


def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_klein, even_cache):
    """SIGKILL after the first save, then the same command again: the same bits. One process, accumulation 2."""
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, resume_from_checkpoint="latest")
    run(*flags(tiny_klein, even_cache, tmp_path / "whole", **options))
    words = flags(tiny_klein, even_cache, tmp_path / "killed", **options)
    run_and_kill(*words, when="'loss'", times=8)  # checkpoint-6 is whole, steps 7 and 8 are lost
    assert not (tmp_path / "killed" / "checkpoint-12").exists()
    assert checkpoint_fault(tmp_path / "killed" / "checkpoint-6") is None
    run(*words)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")


@pytest.mark.promise("E24")
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
    assert not same(one, weights(tmp_path / "one" / "checkpoint-6"))


def test_two_ranks_killed_and_resumed(tmp_path, tiny_klein, tiny_cache):
    """Two gloo ranks, several buckets with tails, Prodigy, evaluation with a base, stopped inside epoch 1."""
    options = dict(
        optim="prodigy", learning_rate=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=10,
        save_steps=5, eval_fraction=0.3, eval_strategy="steps", eval_steps=5, resume_from_checkpoint="latest",
    )  # fmt: skip
    run(*flags(tiny_klein, tiny_cache, tmp_path / "whole", **options), ranks=2)
    words = flags(tiny_klein, tiny_cache, tmp_path / "killed", **options)
    run_and_kill(*words, when="'loss'", times=7, ranks=2)
    run(*words, ranks=2, fresh=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


EDITS = dict(source_dropout=0.3, edit_loss="balanced", resume_from_checkpoint="latest")  # some steps lose their sources


def test_a_mixed_run_of_edits_on_two_ranks(tmp_path, tiny_klein, edits_cache):
    """One rank with the batch of both: the same losses. Weights differ by rounding, as of the run without edits."""
    run(*flags(tiny_klein, edits_cache, tmp_path / "two", per_device_train_batch_size=2, **EDITS), ranks=2)
    run(*flags(tiny_klein, edits_cache, tmp_path / "one", per_device_train_batch_size=4, **EDITS))
    np.testing.assert_allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), rtol=1e-5)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4


@pytest.mark.acceptance
def test_a_mixed_run_of_edits_killed_and_resumed(tmp_path, tiny_klein, edits_cache):
    """The same bits, on two ranks; test_edits has it on one."""
    run(*flags(tiny_klein, edits_cache, tmp_path / "whole", per_device_train_batch_size=2, **EDITS), ranks=2)
    words = flags(tiny_klein, edits_cache, tmp_path / "killed", per_device_train_batch_size=2, **EDITS)
    run_and_kill(*words, when="'loss'", times=8, ranks=2)
    run(*words, ranks=2)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
