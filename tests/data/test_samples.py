"""What the loader makes of samples, on every path: captions dropped, texts padded, posteriors drawn, text encoded."""

import collections
import threading

import pytest
import torch
from caches import write_cache
from memory_cache import BFLOAT16, DIM, PATHS, assert_same, make_rows, make_sampler, released
from trainings import make_args

import sciflow_hf as sf
from sciflow_hf.data.batches.loader import BucketLoader, training_sampler
from sciflow_hf.diffusion.randomness import hash64
from sciflow_hf.errors import CacheError, SciflowError


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


# -- caption dropout -----------------------------------------------------------------------------------------


def drops(key, probability):
    return (hash64(key, "caption_dropout") >> 11) / 2**53 < probability


def test_captions_are_dropped_by_key(path):
    """The same samples on every path; what is replaced is not read."""
    empty = {"prompt_embeds": torch.full((5, DIM), 7.0), "txt_ids": torch.zeros(5, 4), "unknown": torch.zeros(3)}
    rows = make_rows(48, empty_prompt=empty)
    count = 0
    for batch in released(BucketLoader(rows, make_sampler(rows), caption_dropout=0.4, **path)):
        for row, key, text, latents in zip(
            batch["row"].tolist(), batch["noise_key"].tolist(), batch["prompt_embeds"], batch["latents"], strict=True
        ):
            dropped = drops(key, 0.4)
            count += dropped
            expected = torch.full((5, DIM), 7.0, dtype=BFLOAT16) if dropped else rows.samples[row]["prompt_embeds"]
            assert torch.equal(text, expected) and torch.equal(latents, rows.samples[row]["latents"])
            if not path.get("num_workers"):
                (names,) = [names for number, names in rows.read if number == row]
                assert ("prompt_embeds" in names) == (not dropped) and "txt_ids" not in names
    assert 10 < count < 30


def test_an_empty_prompt_of_another_length_does_not_fit(path):
    rows = make_rows(empty_prompt={"prompt_embeds": torch.zeros(3, DIM)})
    with pytest.raises(CacheError, match=r"of memory.parquet: `prompt_embeds` has shape \(5, 6\).*\(3, 6\)"):
        list(released(BucketLoader(rows, make_sampler(rows), caption_dropout=1.0, **path)))
    rows.empty_prompt = None
    with pytest.raises(SciflowError, match="empty prompt"):
        BucketLoader(rows, make_sampler(rows), caption_dropout=0.1)


# -- padded text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["no masks", "some masks"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_texts_of_several_lengths_are_padded(path, stored, dropout):
    rows = make_rows(lengths=(5, 5, 2, 9), extras=False, empty_prompt={"prompt_embeds": torch.full((3, DIM), 7.0)})
    if stored == "some masks":
        for sample in rows.samples[::4]:
            sample["prompt_embeds_mask"] = torch.arange(len(sample["prompt_embeds"])) != 1
    loader = BucketLoader(rows, make_sampler(rows, batch_size=3), pads_text=True, caption_dropout=dropout, **path)
    kinds, noise = set(), 0
    list(loader)  # buffers and memory now hold other numbers
    for batch in released(loader):
        texts, masks = [], []
        for row, key in zip(batch["row"].tolist(), batch["noise_key"].tolist(), strict=True):
            dropped = drops(key, dropout)
            noise += dropped
            text = rows.empty_prompt["prompt_embeds"] if dropped else rows.samples[row]["prompt_embeds"]
            texts.append(text)
            own = rows.samples[row].get("prompt_embeds_mask")
            masks.append(torch.ones(len(text), dtype=torch.bool) if own is None or dropped else own)
            kinds.add((own is not None, dropped))
        longest = max(map(len, texts))
        assert batch["prompt_embeds"].shape == (3, longest, DIM)
        for got, text in zip(batch["prompt_embeds"], texts, strict=True):
            assert torch.equal(got[: len(text)], text.to(BFLOAT16)) and not got[len(text) :].any()
        stored_here = any("prompt_embeds_mask" in rows.samples[row] for row in batch["row"].tolist())
        assert ("prompt_embeds_mask" in batch) == (len({len(t) for t in texts}) > 1 or stored_here)
        if "prompt_embeds_mask" in batch:
            expected = torch.zeros(3, longest, dtype=torch.bool)
            for line, mask in zip(expected, masks, strict=True):
                line[: len(mask)] = mask
            assert_same({"mask": batch["prompt_embeds_mask"]}, {"mask": expected})
    assert len(kinds) == (1 + (stored == "some masks")) * (1 + (dropout > 0)) and (noise > 3) == (dropout > 0)


def test_the_text_length_joins_the_batch_key_only_where_nothing_is_padded(tmp_path):
    cache = sf.load_cache(write_cache(tmp_path, text_lengths=[12, 7]))
    args = make_args(tmp_path)
    assert len(training_sampler(cache, args).report()) == 6 and len(cache.batch_keys[0]) == 3
    assert [line.bucket for line in training_sampler(cache, args, pads_text=True).report()] == [
        (32, 48), (48, 32), (24, 64),
    ]  # fmt: skip
    loader = BucketLoader(cache, training_sampler(cache, args, pads_text=True), pads_text=True)
    lengths = collections.Counter()
    for batch in loader:
        for row, mask in zip(batch["row"].tolist(), batch.get("prompt_embeds_mask", [None] * 2), strict=True):
            length = batch["prompt_embeds"].shape[1] if mask is None else int(mask.sum())
            assert length == cache.text_lengths[row]
            lengths[length, batch["prompt_embeds"].shape[1]] += 1
    assert lengths.keys() == {(12, 12), (7, 12), (7, 7)} or lengths.keys() == {(12, 12), (7, 12)}


# -- posterior and online text -------------------------------------------------------------------------------


def test_posteriors_are_drawn_by_key(path):
    rows = make_rows(extras=False)
    for number, sample in enumerate(rows.samples):
        if number != 4:  # a row without one keeps its mean
            sample["latents_std"] = (sample["latents"].float().abs() * 0.1 + 0.2).to(BFLOAT16)
    for size in (1, 2):
        loader = BucketLoader(rows, make_sampler(rows, batch_size=size), posterior=True, **path)
        for batch in released(loader):
            assert "latents_std" not in batch
            for row, key, latents in zip(
                batch["row"].tolist(), batch["noise_key"].tolist(), batch["latents"], strict=True
            ):
                sample, rng = rows.samples[row], torch.Generator()
                rng.manual_seed(hash64(key, "posterior") & 0xFFFFFFFF)
                std = sample.get("latents_std", torch.zeros(())).float()
                drawn = sample["latents"].float() + std * torch.randn(latents.shape, generator=rng)
                assert torch.equal(latents, drawn.to(BFLOAT16))
                assert torch.equal(latents, sample["latents"]) == (row == 4)
    rows.read.clear()
    for batch in released(BucketLoader(rows, make_sampler(rows), **path)):
        assert "latents_std" not in batch
        assert torch.equal(batch["latents"][1], rows.samples[int(batch["row"][1])]["latents"])
    assert not any("latents_std" in names for _, names in rows.read)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_online_text_is_made_as_a_batch_is_taken(path, dropout):
    """In the consumer's thread, from captions; no text is read, and no stored empty prompt needed."""
    rows, asked = make_rows(), []

    def encode(captions):
        asked.append((captions, threading.current_thread()))
        embeds = torch.stack([torch.full((4, DIM), float(hash64(text) % 1000)) for text in captions])
        return {"prompt_embeds": embeds, "txt_ids": torch.zeros(len(captions), 4, 4)}

    rows.online_text = encode
    loader = BucketLoader(rows, make_sampler(rows), caption_dropout=dropout, **path)
    for number, batch in enumerate(released(loader)):
        captions, thread = asked[number]
        keys = batch["noise_key"].tolist()
        dropped = [drops(key, dropout) for key in keys]
        expected = ["" if d else f"caption {row}" for d, row in zip(dropped, batch["row"].tolist(), strict=True)]
        assert captions == expected and thread is threading.current_thread()
        assert torch.equal(batch["prompt_embeds"], encode(captions)["prompt_embeds"]) and asked.pop()
        assert "txt_ids" not in batch and "pooled_prompt_embeds" not in batch and "time_ids" in batch
    assert len(asked) == len(loader) and (any("" in texts for texts, _ in asked) == (dropout > 0))
    assert not any({"prompt_embeds", "pooled_prompt_embeds"} & names for _, names in rows.read)
