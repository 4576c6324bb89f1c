"""SciForma's published data: every form to the same losses; its caches, long captions, and filters on resume."""

import dataclasses
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import sciforma
import torch
from PIL import Image
from trainings import losses, make_args, make_trainer

import sciflow_hf as sf
from sciflow_hf.data.load import load_data
from sciflow_hf.errors import SciflowError
from sciflow_hf.training.prepare import build_cache_for, prepare_data

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("datasets_cache")]
FORMS = {
    "generation": [("parquet", None), ("files", "gen_768"), ("older", "gen_768")],
    "editing": [("parquet", None), ("files", "edit_1024")],
}


@pytest.fixture(scope="module")
def caches(family, tmp_path_factory):
    """A function: the caches of a kind from each form of its data, in float32."""
    folder, made = tmp_path_factory.mktemp("published"), {}

    def make(kind):
        for form, split in FORMS[kind] if kind not in made else ():
            source, target = folder / f"{kind}_{form}", folder / f"{kind}_{form}_cache"
            sciforma.parquet(source, kind) if form == "parquet" else sciforma.files(source, older=form == "older")
            options = {"split": split, "buckets": "given", "dtype": "fp32", "payload": "inline"}
            build_cache_for(family, str(source), str(target), **options)
            made.setdefault(kind, []).append(target)
        return made[kind]

    return make


def run(folder, family, data, **options):
    options = {"max_steps": 3, "per_device_train_batch_size": 2} | options
    trainer = make_trainer(folder, family, data, **options)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_trains_to_the_same_losses(tmp_path, family, caches, kind):
    """Read at once and streamed, with a filter where the data has tiers."""
    conditions = ["quality_tier=High,Medium", "is_tikz=false"] if kind == "generation" else ["bucket_w>=96"]
    for streaming in (False, True):
        found = []
        for number, cache in enumerate(caches(kind)):
            data = sf.load_cache(cache, streaming=streaming, dtype=torch.float32, row_filter=conditions)
            assert len(data) == (12 if kind == "generation" else 13)
            found.append(run(tmp_path / f"{streaming}{number}", family, data))
        assert len(set(found[0])) == 3 and all(one == found[0] for one in found)


def test_a_resumed_run_needs_its_filter(tmp_path, family, caches):
    """The same conditions in another order are the same filter; so is that of `--input_dir`."""
    cache, options = caches("generation")[0], {"save_strategy": "steps", "save_steps": 2}
    conditions = ["quality_tier=High", "is_tikz=false"]
    expected = run(tmp_path, family, sf.load_cache(cache, dtype=torch.float32, row_filter=conditions), **options)
    for given, message in ((conditions[::-1], None), (conditions[:1], r"row_filter: \['is_tikz=false', 'qual.* now")):
        data = sf.load_cache(cache, dtype=torch.float32, row_filter=given)
        trainer = make_trainer(tmp_path, family, data, max_steps=3, per_device_train_batch_size=2, **options)
        if message is None:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert losses(trainer)[-1:] == expected[-1:]
        else:
            with pytest.raises(SciflowError, match=message):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    images = tmp_path / "images"
    args = sf.DataArguments(input_dir=str(sciforma.parquet(images)), row_filter=conditions, eval_fraction=0.3)
    train, held_out = prepare_data(args, family, make_args(tmp_path / "built"))
    assert len(train) + len(held_out) == 8 and train.row_filter == tuple(conditions)


@pytest.mark.parametrize("kind", FORMS)
def test_a_dry_run_plans_as_the_cache_would_be_and_builds_none(kind, family, tmp_path, monkeypatch, caplog):
    """The same text but for the samples' bytes of text, whose lengths only the encoder knows."""
    images = sciforma.parquet(tmp_path / "images", kind)
    args = {"input_dir": str(images), "buckets": "given", "eval_fraction": 0.3}
    network = family.load_model(dtype=torch.float32, meta=True)
    built = prepare_data(sf.DataArguments(**args), family, make_args(tmp_path / "run"))
    expected = sf.plan(network, family, make_args(tmp_path / "run"), *built)

    def load_encoders(*_, **__):
        raise AssertionError("a dry run loads no encoder")

    monkeypatch.setattr(type(family), "load_encoders", load_encoders)
    dry = prepare_data(sf.DataArguments(**args), family, make_args(tmp_path / "dry", dry_run=True))
    assert not list(tmp_path.glob("dry/**/*.parquet")) and not list(tmp_path.glob("dry/**/*.safetensors"))
    assert "no cache is built" in caplog.text and [len(part) for part in dry] == [len(part) for part in built]
    assert dry[0].row_ids == built[0].row_ids and dry[0].batch_keys == built[0].batch_keys
    found = sf.plan(network, family, make_args(tmp_path / "run"), *dry)
    assert found == expected


def test_filters_go_with_prior_preservation(caches):
    """The filter is of the run's own rows."""
    own, prior = caches("generation")[:2]
    args = sf.DataArguments([str(own)], prior_dataset_dir=str(prior), row_filter=["quality_tier=Low"], eval_fraction=0)
    train, _ = load_data(args)
    assert len(train) == 5 + 20 and train.prior.rows.sum() == 20 and train.row_filter == ("quality_tier=Low",)


# -- their caches --


@pytest.fixture(scope="module")
def theirs(family, tmp_path_factory):
    """`vae_h` next to each image, by the tiny pipeline's own encoders; their data is that of `caches`."""
    folder = sciforma.files(tmp_path_factory.mktemp("theirs") / "data")
    encoders = family.load_encoders(device="cpu", dtype=torch.float32)
    for row in pq.read_table(folder / "metadata.parquet").slice(0, sciforma.ROWS).to_pylist():
        pixels = torch.from_numpy(np.asarray(Image.open(folder / row["image_path"]), np.float32)) / 127.5 - 1
        with torch.no_grad():
            posterior = encoders.vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist
        arrays = {
            "vae_h": torch.cat([posterior.mean, posterior.logvar], 1)[0].numpy(),
            "prompt_embeds": family.encode_prompts([row["caption"]], encoders)["prompt_embeds"][0].half().numpy(),
            "attention_mask": np.ones(12, np.int64),
        }
        np.savez((folder / row["image_path"]).with_suffix("").as_posix() + "_flux_h.npz", **arrays)
    return folder


def test_their_cache_gives_our_batches_and_says_that_the_mask_is_unused(tmp_path, family, caches, theirs, caplog):
    data = sf.load_cache(theirs, dtype=torch.float32, row_filter=["split=gen_768"])
    ours = sf.load_cache(caches("generation")[1], dtype=torch.float32)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(tmp_path, family, data, held_out=data.select([0]), per_device_train_batch_size=2)
    assert caplog.text.count("`attention_mask` of this cache is not used") == 1
    same = make_trainer(tmp_path, family, ours, per_device_train_batch_size=2)
    for one, other in zip(trainer.get_train_dataloader(), same.get_train_dataloader(), strict=True):
        assert one.keys() == other.keys() and torch.equal(one["latents"], other["latents"])
        assert torch.equal(one["prompt_embeds"], other["prompt_embeds"].half().float())
        assert torch.equal(one["noise_key"], other["noise_key"])
    drawn = [run(tmp_path / p, dataclasses.replace(family, posterior=p), data) for p in ("mode", "sample")]
    assert drawn[0] != drawn[1] and np.isfinite(drawn).all()


def test_one_hidden_state_as_text_is_refused_with_the_reason(tmp_path, family, theirs):
    data = sf.load_cache(theirs, dtype=torch.float32, row_filter=["split=gen_768"])
    sample = data[0] | {"prompt_embeds": torch.zeros(12, 16)}
    model = family.load_model(dtype=torch.float32, meta=True)
    message = r"takes \(L, 48\)\. That is one hidden state .* reads 3 of them side by side, 9, 18, 27\..*`--text_enc"
    with pytest.raises(SciflowError, match=message):
        family.check_sample(model, sample)
    with pytest.raises(SciflowError, match=r"\(L, 48\)\. Build the cache with the model that you train"):
        family.check_sample(model, sample | {"prompt_embeds": torch.zeros(12, 17)})


# -- long captions --


@pytest.mark.parametrize("length", [1024, pytest.param(2048, marks=pytest.mark.acceptance)])
def test_long_captions(tmp_path, family, caplog, length):
    """Stored or encoded in training, their text is the same; what is beyond the limit is counted before."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, words in enumerate((200, 3000)):
        sciforma.drawing(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(" ".join(["a plot"] * (words // 2)))
    family = dataclasses.replace(family, max_sequence_length=length)
    tokens = family.count_tokens([(folder / f"{n}.txt").read_text() for n in (0, 1)])[0]
    assert tokens[0] < 1024 and tokens[1] > 2048
    args = sf.DataArguments(input_dir=str(folder), dataset_dir=[str(tmp_path / "cache")], eval_fraction=0)
    stored, _ = prepare_data(args, family, make_args(tmp_path / "run"))
    told = [record.getMessage() for record in caplog.records if "Captions that are cut" in record.getMessage()]
    assert len(told) == 1 and f"1 after {length} tokens, the longest has {tokens[1]}: 1.png" in told[0]
    assert f"1 up to {1 << (tokens[1] - 1).bit_length():,}." in told[0]
    args = sf.DataArguments(dataset_dir=[str(tmp_path / "cache")], text_encoding="online", eval_fraction=0)
    family.count_tokens = counting = Counting(family.count_tokens)
    online, _ = prepare_data(args, family, make_args(tmp_path / "run"))
    del family.count_tokens
    assert counting.texts == [""], "the note of the build is taken"
    assert stored[1]["prompt_embeds"].shape == (length, 48)
    for row in range(2):
        torch.testing.assert_close(online[row]["prompt_embeds"], stored[row]["prompt_embeds"], rtol=0.02, atol=0.02)
    assert np.isfinite(run(tmp_path / "run", family, online, max_steps=1, per_device_train_batch_size=1)).all()


class Counting:
    """Counts tokens, and keeps what it is asked about."""

    def __init__(self, count):
        self.count, self.texts = count, []

    def __call__(self, texts):
        self.texts += texts
        return self.count(texts)
