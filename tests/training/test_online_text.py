"""Prompts encoded in training: the truncated encoder gives what the whole one gives, and the cache needs no text."""

import dataclasses

import numpy as np
import pytest
import torch
from caches import encoder_settings, write_cache
from diffusers import Flux2KleinPipeline

from sciflow_hf.data.arguments import DataArguments
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError, SciflowError
from sciflow_hf.families import flux2_klein
from sciflow_hf.families.flux2_klein import Flux2Klein
from sciflow_hf.training.arguments import DiffusionTrainingArguments
from sciflow_hf.training.prepare import online_text, prepare_data

PROMPTS = ["A line plot of accuracy.", "", "a very long caption that is cut " * 5, "A line plot of accuracy."]


@pytest.fixture(scope="module")
def family(tiny_klein):
    return Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=32)


def arguments(folder, **options):
    return DiffusionTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)


def whole_encoder(tiny_klein, dtype):
    """The published pipeline with all its layers: what the truncated one is compared with."""
    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein, dtype=dtype)
    with torch.no_grad():
        return pipeline.encode_prompt(PROMPTS, max_sequence_length=32)[0], pipeline.text_encoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_truncated_encoder_gives_the_same_embeddings(tiny_klein, family, dtype, tolerance):
    expected, whole = whole_encoder(tiny_klein, dtype)
    encoders = family.load_text_encoder(device="cpu", dtype=dtype)
    ours = family.encode_prompts(PROMPTS, encoders)["prompt_embeds"]
    assert ours.dtype == dtype and ours.shape == expected.shape == (4, 32, 48) and not ours.requires_grad
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    assert not torch.equal(ours[0], ours[1])

    kept, before = encoders.text_encoder, whole.config.num_hidden_layers
    assert before > 27 and len(kept.model.layers) == kept.config.num_hidden_layers == 27
    layers = {name.split(".")[2] for name, _ in kept.named_parameters() if ".layers." in name}
    assert layers == {str(i) for i in range(27)}
    # Nothing else is loaded, and nothing of it is trained or draws dropout.
    assert encoders.vae is None and encoders.transformer is None
    assert not kept.training and not any(p.requires_grad for p in kept.parameters())
    assert not any("lm_head" in name or name == "model.norm.weight" for name, _ in kept.named_parameters())


def _norm_kept(decoder, depth):
    norm = decoder.norm
    truncate(decoder, depth)
    decoder.norm = norm


def _one_layer_less(decoder, depth):
    truncate(decoder, depth - 1)


truncate = flux2_klein.truncate


def test_comparison_sees_a_norm_that_stays(tiny_klein, family, monkeypatch):
    monkeypatch.setattr(flux2_klein, "truncate", _norm_kept)
    encoders = family.load_text_encoder(device="cpu", dtype=torch.float32)
    expected, _ = whole_encoder(tiny_klein, torch.float32)
    ours = family.encode_prompts(PROMPTS, encoders)["prompt_embeds"]
    assert torch.equal(ours[..., :32], expected[..., :32])  # layers 9 and 18
    assert (ours[..., 32:] - expected[..., 32:]).abs().max() > 1e-2 * expected.abs().max()


def test_a_layer_too_few_is_an_error(family, monkeypatch):
    monkeypatch.setattr(flux2_klein, "truncate", _one_layer_less)
    with pytest.raises(IndexError):
        family.encode_prompts(PROMPTS, family.load_text_encoder(device="cpu", dtype=torch.float32))


def test_a_batch_is_its_captions_one_by_one(family, monkeypatch):
    """Each distinct caption is encoded once, in the caller's order; the encoder is loaded at the first."""
    seen, loaded = [], []
    encode, load = Flux2Klein.encode_prompts, Flux2Klein.load_encoders
    monkeypatch.setattr(Flux2Klein, "encode_prompts", lambda f, p, e: seen.append(list(p)) or encode(f, p, e))
    monkeypatch.setattr(Flux2Klein, "load_encoders", lambda f, **o: loaded.append(o) or load(f, **o))
    function = online_text(family, device="cpu", dtype=torch.float32)
    assert loaded == []
    batch = function(["b", "a", "b", "", "a"])["prompt_embeds"]
    assert seen == [["b", "a", ""]] and batch.shape == (5, 32, 48)
    for row, caption in zip(batch, ["b", "a", "b", "", "a"], strict=True):
        torch.testing.assert_close(row, function([caption])["prompt_embeds"][0], rtol=1e-4, atol=1e-5)
    assert len(loaded) == 1 and not batch.requires_grad


# ---- from images to training ----


def data_arguments(folder, figures, **options):
    return DataArguments(
        input_dir=str(figures),
        dataset_dir=[str(folder)],
        resolution=64,
        eval_fraction=0.3,
        encode_batch_size=8,
        **options,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, family, figures):
    """What `--text_encoding online` makes of 24 figures: (folder of the cache, training part, held-out part)."""
    folder = tmp_path_factory.mktemp("online")
    args = data_arguments(folder / "cache", figures, text_encoding="online")
    return folder / "cache", *prepare_data(args, family, arguments(folder / "out"))


def test_a_cache_is_built_without_embeddings(prepared, tmp_path, family, figures):
    folder, train, held_out = prepared
    expected = family.encode_prompts([train.captions[3]], family.load_text_encoder(device="cpu", dtype=torch.float32))
    assert torch.equal(train[3]["prompt_embeds"], expected["prompt_embeds"][0])
    assert set(train.members(0)) == {"latents"} and held_out[0]["prompt_embeds"].shape == (32, 48)
    assert len(train) + len(held_out) == 24
    prepare_data(data_arguments(tmp_path / "cached", figures), family, arguments(tmp_path / "out"))
    cached, online = (sum(f.stat().st_size for f in d.rglob("*") if f.is_file()) for d in (tmp_path / "cached", folder))
    stored = load_cache(tmp_path / "cached")
    texts = len(set(stored.captions)) * 32 * 48 * 2
    assert cached - online > 0.9 * texts


@pytest.mark.promise("A09")
def test_the_vae_alone_is_loaded_to_build_it(tmp_path, family, figures, monkeypatch):
    loaded, load = [], Flux2Klein.load_encoders
    monkeypatch.setattr(Flux2Klein, "load_encoders", lambda f, **o: loaded.append(o.get("text", True)) or load(f, **o))
    args = data_arguments(tmp_path / "cache", figures, text_encoding="online")
    prepare_data(args, family, arguments(tmp_path / "out"))
    assert loaded == [False]


def test_stored_text_is_asked_for_where_there_is_none(prepared, tmp_path, family):
    folder, _, _ = prepared
    args = DataArguments(dataset_dir=[str(folder)], eval_fraction=0)
    with pytest.raises(CacheError, match=r"no text embeddings.*--text_encoding online"):
        prepare_data(args, family, arguments(tmp_path))


def test_another_encoder_than_the_caches_is_refused(prepared, family):
    _, train, _ = prepared
    train.check_family(family.encoder_settings())
    with pytest.raises(CacheError, match="max_sequence_length"):
        train.check_family(dataclasses.replace(family, max_sequence_length=48).encoder_settings())


def test_online_and_cached_runs_log_the_same_losses(tmp_path, tiny_klein, family):
    """Float32 embeddings of the whole encoder in npz files, against the truncated one beside the network."""
    from sciflow_hf.adapters.adapter import add_adapter
    from sciflow_hf.adapters.arguments import AdapterArguments
    from sciflow_hf.training.trainer import DiffusionTrainer

    folder = write_cache(
        tmp_path / "cache", settings=encoder_settings(tiny_klein, max_sequence_length=32), text_lengths=32
    )
    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein)
    index = load_cache(folder).index
    with torch.no_grad():
        texts = pipeline.encode_prompt(list(index["caption"]), max_sequence_length=32)[0].numpy()
    for path, text in zip(index["cache_path"], texts, strict=True):
        arrays = dict(np.load(folder / path))
        np.savez(folder / path, **(arrays | {"prompt_embeds": text}))

    def losses(encoding):
        args = arguments(
            tmp_path / encoding, max_steps=4, logging_steps=1, per_device_train_batch_size=2, seed=1,
            learning_rate=1e-3, save_strategy="no", eval_strategy="steps", eval_steps=4, disable_tqdm=True,
        )  # fmt: skip
        options = DataArguments(dataset_dir=[str(folder)], eval_fraction=0.3, text_encoding=encoding)
        train, held_out = prepare_data(options, family, args)
        model = family.load_model(dtype=torch.float32)
        add_adapter(model, AdapterArguments(rank=4, lora_alpha=8), family=family, seed=1)
        trainer = DiffusionTrainer(model, args, family=family, train_dataset=train, eval_dataset=held_out)
        trainer.train()
        history = trainer.state.log_history
        return [e[k] for e in history for k in ("loss", "eval_loss") if k in e]

    cached, online = losses("cached"), losses("online")
    assert len(cached) == 5
    np.testing.assert_allclose(online, cached, rtol=1e-5)


def test_posterior_sample_needs_a_cache_with_deviations(prepared, family):
    _, train, _ = prepared
    model = family.load_model(dtype=torch.float32)
    family.check_sample(model, train[0])
    with pytest.raises(SciflowError, match="--posterior sample"):
        dataclasses.replace(family, posterior="sample").check_sample(model, train[0])


@pytest.mark.parametrize("stream", [False, True])
def test_cut_captions_are_told_once_where_text_is_encoded_in_training(prepared, tmp_path, family, caplog, stream):
    folder, train, held_out = prepared
    short = dataclasses.replace(family, max_sequence_length=20)
    args = DataArguments(dataset_dir=[str(folder)], text_encoding="online", streaming=stream, eval_fraction=0.3)
    data, _ = prepare_data(args, short, arguments(tmp_path / "out"))
    row = next(iter(data)) if stream else data[0]
    assert "prompt_embeds" in row and caplog.text.count("Captions that are cut") == 1
    counted = short.count_tokens([*train.captions, *held_out.captions])[0]
    if not stream:
        assert f"of 24: {sum(length > 20 for length in counted)} after 20 tokens" in caplog.text
