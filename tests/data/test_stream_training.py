"""A stream trains as a map-style cache does, and goes on from its checkpoints."""

import shutil

import pytest
import torch
from caches import encoder_settings, write_cache
from trainings import losses, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.errors import SciflowError
from sciflow_hf.training.checkpoints import write_manifest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_klein):
    """24 samples in bfloat16 in three buckets whose sizes are multiples of 4."""
    buckets = {(32, 48): 12, (48, 32): 8, (24, 64): 4}
    folder = tmp_path_factory.mktemp("even")
    write_cache(folder, settings=encoder_settings(tiny_klein), buckets=buckets, dtype="bfloat16")
    return sf.load_cache(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, cache):
    """The cache as shards, and as inline in the order of the first map-style epoch of seed 3 and total batch 4."""
    folder = tmp_path_factory.mktemp("layouts")
    order = sf.BucketBatchSampler(cache.batch_keys, batch_size=4, seed=3).batches()
    rows = cache.select([row for batch in order for row in batch])
    return {
        "shards": convert_cache(cache, folder / "shards", payload="shards").output_dir,
        "inline": convert_cache(rows, folder / "inline", payload="inline").output_dir,
    }


def test_every_layout_and_a_stream_log_identical_losses(tmp_path, family, cache, layouts):
    runs = {
        "npz": cache,
        "shards": sf.load_cache(layouts["shards"], dtype=torch.float32),
        "inline": sf.load_cache(convert_cache(cache, tmp_path / "c", payload="inline").output_dir, dtype=torch.float32),
        "stream": StreamingCache(layouts["inline"], dtype=torch.float32, shuffle_buffer=0),
    }
    found = {}
    for name, data in runs.items():
        trainer = make_trainer(tmp_path / name, family, data, gradient_accumulation_steps=2, max_steps=6)
        trainer.train()
        found[name] = losses(trainer), trained(trainer)
        trainer.create_model_card()  # a stream does not know how many papers it comes from
        assert ("groups (papers)" in (tmp_path / name / "README.md").read_text()) == (name != "stream")
    for name in ("shards", "inline", "stream"):
        assert found[name][0] == found["npz"][0] and len(found[name][0]) == 6
        assert all(torch.equal(value, found["npz"][1][key]) for key, value in found[name][1].items())


def test_a_stream_goes_on_from_a_checkpoint(tmp_path, family, layouts):
    options = {"gradient_accumulation_steps": 2, "max_steps": 9, "save_steps": 4, "save_strategy": "steps"}

    def stream():
        return StreamingCache(layouts["inline"], dtype=torch.float32, shuffle_buffer=5)

    whole = make_trainer(tmp_path / "whole", family, stream(), **options)
    whole.train()
    for name in ("with its state", "read again"):
        checkpoint = tmp_path / name / "checkpoint-8"
        shutil.copytree(tmp_path / "whole" / "checkpoint-8", checkpoint)
        if name == "read again":
            (checkpoint / "stream.json").unlink()
            write_manifest(checkpoint)
        again = make_trainer(tmp_path / name, family, stream(), **options)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert losses(again) == losses(whole)
        assert all(torch.equal(value, trained(again)[key]) for key, value in trained(whole).items())


def test_a_stream_has_no_end(tmp_path, family, layouts):
    with pytest.raises(SciflowError, match="`max_steps` is missing"):
        make_trainer(tmp_path, family, StreamingCache(layouts["inline"], dtype=torch.float32), max_steps=-1)


def test_evaluation_and_card_of_a_stream(tmp_path, family, cache, layouts):
    stream, held_out = StreamingCache(layouts["shards"], dtype=torch.float32).split(0.3)
    one = make_trainer(tmp_path / "a", family, stream, held_out=held_out, max_steps=2)
    other = make_trainer(tmp_path / "b", family, cache, held_out=cache.split(0.3)[1], max_steps=2)
    assert one.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]
    one.train()
    one.save_model()
    one.create_model_card()
    assert (tmp_path / "a" / "README.md").is_file()
