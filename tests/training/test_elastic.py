"""A run goes on with another number of processes, at the same number of samples a step: the same losses."""

import shutil

import numpy as np
import pytest
from caches import encoder_settings, write_cache
from ranks import launch, train

EVEN = {(32, 48): 12, (48, 32): 8, (24, 64): 4}  # 6 steps of 4 an epoch, no tails
TAILS = {(32, 48): 5, (48, 32): 5, (24, 64): 5, (40, 32): 5}  # 4 steps of 4, and one left of each


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_klein):
    """Ten steps of 4 samples on two ranks; a checkpoint after seven, in the second epoch."""
    cache = write_cache(tmp_path_factory.mktemp("even"), settings=encoder_settings(tiny_klein), buckets=EVEN)
    return dict(pipeline=tiny_klein, cache=cache, max_steps=10, save_steps=7, resume_from_checkpoint="latest")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, job):
    """The whole run on one rank: its folder and losses."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(output_dir=folder, gradient_accumulation_steps=2, **job)["losses"]


def copy_of(run, folder, checkpoint="checkpoint-7"):
    shutil.copytree(run / checkpoint, folder / checkpoint)
    return folder


def assert_close(losses, expected):
    assert len(losses) == len(expected) == len(set(losses))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_one_rank_and_two(tmp_path, job, alone):
    """Saved on one, gone on with two, and the other way round; a step of 8 samples is refused."""
    start, losses = alone
    wrong = {"output_dir": copy_of(start, tmp_path / "wrong"), "gradient_accumulation_steps": 2}
    two, one_two, refused = launch(
        tmp_path,
        {**job, "output_dir": tmp_path / "two"},
        {**job, "output_dir": copy_of(start, tmp_path / "one_two")},
        {**job, **wrong},
    )
    back = train(output_dir=copy_of(tmp_path / "two", tmp_path / "two_one"), gradient_accumulation_steps=2, **job)
    for found in (two, one_two, back):
        assert_close(found["losses"], losses)
    words = "2 per device x 2 processes x 2 accumulation samples; `--per_device_train_batch_size 2 "
    assert f"{words}--gradient_accumulation_steps 1` makes it 4" in refused["error"]


@pytest.mark.acceptance
def test_two_ranks_and_four(tmp_path, job, alone):
    """Saved on four ranks, gone on with two, and the other way round."""
    start, losses = alone
    ours = {**job, "per_device_train_batch_size": 1}
    four, one_four = launch(
        tmp_path / "4",
        {**ours, "output_dir": tmp_path / "four"},
        {**ours, "output_dir": copy_of(start, tmp_path / "one_four")},
        ranks=4,
    )
    (four_two,) = launch(tmp_path / "2", {**job, "output_dir": copy_of(tmp_path / "four", tmp_path / "four_two")})
    for found in (four, one_four, four_two):
        assert_close(found["losses"], losses)


@pytest.mark.parametrize(
    ("length", "lengths"),
    [
        ({"num_train_epochs": 3, "max_steps": -1}, [15, 18, 8 + 3 + 5, 10 + 6]),
        pytest.param({"max_steps": 14}, [14] * 4, marks=pytest.mark.acceptance),
    ],
)
def test_tails_of_another_length(tmp_path, tiny_klein, length, lengths):
    """Batches of 2 make 6 steps of this data, batches of 1 make 5: the place in the epoch is kept, not the step."""
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets=TAILS)
    job = dict(pipeline=tiny_klein, cache=cache, learning_rate=1e-9, resume_from_checkpoint="latest") | length
    by_one = job | dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, save_steps=10)
    by_two = job | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=8)
    fives = train(output_dir=tmp_path / "fives", **by_one)["losses"]
    sixes = train(output_dir=tmp_path / "sixes", **by_two)["losses"]
    to_fives = train(output_dir=copy_of(tmp_path / "sixes", tmp_path / "a", "checkpoint-8"), **by_one)["losses"]
    to_sixes = train(output_dir=copy_of(tmp_path / "fives", tmp_path / "b", "checkpoint-10"), **by_two)["losses"]
    assert [len(run) for run in (fives, sixes, to_fives, to_sixes)] == lengths
    for found, expected in ((to_fives, sixes[:8] + fives[7:15]), (to_sixes, fives[:10] + sixes[12:18])):
        known = min(len(found), len(expected))
        assert_close(found[:known], expected[:known])
        assert known >= 12
