"""Groups of a cache: which there are, what a sample holds in every layout, and how they are split."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from caches import edit, index_files, payload_of, resave
from memory_cache import released
from preferences import AXES, PUBLISHED, SIZE, groups_of, write_candidates

import sciflow_hf as sf
from sciflow_hf.data.batches.buckets import BucketBatchSampler
from sciflow_hf.data.batches.loader import BucketLoader, batch_keys_of
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.data.preference_groups import PreferenceGroups, load_groups
from sciflow_hf.data.preferences import TupleArguments
from sciflow_hf.errors import CacheError, SciflowError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_candidates(tmp_path_factory.mktemp("candidates") / "cache", "x")


def changed(tmp_path, **columns):
    """A cache of its own whose index has other columns."""
    return write_candidates(tmp_path / "cache", "x", **columns)


def latents_of(cache, row):
    with np.load(cache.payload_path(row)) as stored:
        return torch.from_numpy(stored["latents"])


def test_a_sample_is_a_group(folder):
    groups = groups_of(folder, global_worst=True, **PUBLISHED)
    assert len(groups) == 10 and groups.row_ids[:2] == ["32x48 0", "48x32 0"]
    assert groups.batch_keys[0] == (32, 48, 12, "3 losers with the worst") and groups.group_size == 4
    for i in (0, 7):
        item, sample = groups.tuples[i], groups[i]
        assert item.axes == ("component", "text", "worst") and sample["latents"].shape[0] == 4
        for part, row in zip(sample["latents"], (item.winner, *item.losers), strict=True):
            assert torch.equal(part, latents_of(groups.cache, row))
        assert torch.equal(sample["prompt_embeds"], groups.cache[item.winner]["prompt_embeds"])
    assert groups.captions[0] == "A figure of the group 32x48 0." and groups.with_worst.all()
    assert "group '32x48 0' (winner row 0" in groups.describe(0)
    one = groups_of(folder)
    assert {key[-1] for key in one.batch_keys} == {"1 loser"} and not one.with_worst.any()


@pytest.mark.parametrize("payload", ["npz", "shards", "inline"])
def test_batches_of_every_layout_and_loader(tmp_path, folder, payload):
    """Read by threads into place, in the main thread, from a pickled copy in a worker: the same groups."""
    if payload != "npz":
        convert_cache(folder, tmp_path / payload, payload=payload)
        groups = groups_of(tmp_path / payload, **PUBLISHED)
    else:
        groups = groups_of(folder, **PUBLISHED)
    plain = groups_of(folder, **PUBLISHED)
    stored = torch.float32 if payload == "npz" else torch.bfloat16  # what a conversion stores
    assert groups.row_ids == plain.row_ids and groups.fingerprint == plain.fingerprint
    sampler = BucketBatchSampler(batch_keys_of(groups), batch_size=2, seed=5)
    for options in ({"threads": 2}, {"threads": 0}, {"num_workers": 1}):
        seen = []
        for batch in released(BucketLoader(groups, sampler, **options)):
            assert batch["with_worst"].tolist() == [False, False]
            for row, latents in zip(batch["row"].tolist(), batch["latents"], strict=True):
                assert torch.equal(latents, plain[row]["latents"].to(stored).float())
                seen.append(row)
        assert sorted(seen) == list(range(10))


def test_roles_that_are_given(tmp_path):
    """Nothing is chosen again: the first row loses, though its reward is the highest."""
    roles = ["loser", "winner", "loser", None] * 10
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 40}, role=lambda _: roles)
    groups = groups_of(folder)
    assert [(t.winner, t.losers, t.axes) for t in groups.tuples[:2]] == [
        (1, (0, 2), ("loser 1", "loser 2")), (5, (4, 6), ("loser 1", "loser 2")),
    ]  # fmt: skip
    edit(index_files(folder)[0], axis=lambda _: ["text", None, "component", None] * 10)
    assert groups_of(folder).tuples[0].axes == ("text", "component")
    with pytest.raises(SciflowError, match="`min_reward_gap` chooses winners and losers, but the data says them"):
        groups_of(folder, min_reward_gap=0.5)
    edit(index_files(folder)[0], role=lambda _: ["best", *roles[1:]])
    with pytest.raises(SciflowError, match="`role` of row 0 is 'best': use 'winner', 'loser'"):
        groups_of(folder)
    edit(index_files(folder)[0], role=lambda _: ["winner"] * 40)
    with pytest.raises(SciflowError, match=r"none of 10 groups has a winner and its losers.*more than one winner"):
        groups_of(folder)


def test_what_is_left_out_is_told(tmp_path, caplog):
    """A caption, a group, a reward that are not as they should be cost the candidate, not the run."""
    buckets = {(32, 48): 40}

    def other_caption(values):
        return ["Something else", *values[1:]]

    def without(place):
        return lambda values: [None if i == place else value for i, value in enumerate(values)]

    folder = write_candidates(
        tmp_path / "cache", "x", buckets=buckets, caption=other_caption, group_id=without(5), reward=without(10)
    )
    with caplog.at_level(logging.INFO, logger="sciflow_hf"):
        groups = groups_of(folder)
    told = caplog.text
    assert "candidates of another size, caption or sources than their group  1" in told
    assert "candidates without a group" in told and "candidates without a reward or score" in told
    assert groups.tuples[0].winner == 1, "the best of the first group has another caption"


def test_candidates_in_several_buckets(tmp_path):
    """One group over two buckets: the commonest is kept."""
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 4, (48, 32): 3}, group_id=lambda v: ["a"] * 7,
                              caption=lambda v: ["b"] * 7, reward=lambda v: [i / 10 for i in range(7)])  # fmt: skip
    groups = groups_of(folder)
    assert len(groups) == 1 and {
        groups.cache.buckets[row] for row in (groups.tuples[0].winner, *groups.tuples[0].losers)
    } == {(32, 48)}
    with pytest.raises(SciflowError, match=r"the group 'a': row 0 .* and row 1 .* have the buckets"):
        PreferenceGroups(groups.cache, [type(groups.tuples[0])("a", 0, (1,), ("worst",), ())])


def test_rows_of_one_payload_are_the_same_figure(tmp_path):
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 8})
    file = index_files(folder)[0]
    edit(file, cache_path=lambda v: [v[0], *v[1:3], v[0], *v[4:]], image_path=lambda v: [f"{i}" for i in range(8)])
    assert groups_of(folder).tuples[0].losers == (2,), "row 3, the worst, is the winner's own payload"


def test_a_loser_with_the_winners_latents_is_told(tmp_path, caplog):
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 4})
    with np.load(payload_of(folder, 0)) as stored:
        resave(payload_of(folder, 3), latents=stored["latents"])
    groups = groups_of(folder)
    groups[0]
    assert "group '32x48 0'" in caplog.text and "a loser has the winner's latents" in caplog.text


def test_columns_that_are_not_there(tmp_path, folder):
    with pytest.raises(SciflowError, match=r"there is no score column 'arrow' in the index, but .*component_score"):
        groups_of(folder, axes=["arrow"])
    other = changed(tmp_path, text_score=lambda values: ["good"] * len(values))
    with pytest.raises(SciflowError, match="the score column 'text' does not hold numbers alone"):
        groups_of(other, axes=["text"])
    edit(index_files(other)[0], text_score=lambda values: ["0.5"] * len(values))
    table = pq.read_table(index_files(other)[0])
    pq.write_table(table.drop_columns(["reward"]), index_files(other)[0])
    with pytest.raises(SciflowError, match="there is no score column 'reward'"):
        groups_of(other)
    pq.write_table(table.drop_columns(["group_id"]), index_files(other)[0])
    with pytest.raises(SciflowError, match="the index has no column `group_id`, which says"):
        groups_of(other)


def test_the_table_of_sciforma(tmp_path):
    """Its columns, with `component_score` for the axis `component`, and its published thresholds."""
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 8})
    rules = TupleArguments(
        axes=list(AXES), global_worst=True, min_candidates=4, min_winner_reward=0.7, min_reward_gap=0.2,
        min_axis_gap=0.3, max_other_gap=0.5,
    )  # fmt: skip
    assert [t.losers for t in load_groups(load_cache(folder), rules).tuples] == [(1, 2, 3), (5, 6, 7)]


def test_a_split_keeps_papers_and_groups_together(tmp_path):
    papers = lambda values: [f"paper {int(name.split()[1]) // 2}" for name in values]  # noqa: E731
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 40 * SIZE}, paper_id=papers)
    groups = groups_of(folder)
    train, held_out = groups.split(0.3)
    assert isinstance(train, PreferenceGroups) and len(train) + len(held_out) == 40 and len(held_out) > 2
    assert not set(train.groups) & set(held_out.groups) and not set(train.row_ids) & set(held_out.row_ids)
    assert len(set(groups.groups)) == 20 and train.rules == groups.rules
    # More groups do not move old ones.
    some = groups.select(range(20)).split(0.3)[1]
    assert set(some.row_ids) <= set(held_out.row_ids)


def test_groups_of_equal_names_in_two_caches(tmp_path, folder):
    """They are told apart, but stay on one side of a split."""
    other = write_candidates(tmp_path / "other", "x", seed=1)
    both = load_groups(load_cache([folder, other], dtype=torch.float32))
    assert len(both) == 20 == len(set(both.row_ids)) and "32x48 0#1" in both.row_ids
    names = dict(zip(both.row_ids, both.groups, strict=True))
    assert names["32x48 0"] == names["32x48 0#1"]


def test_the_fingerprint_is_of_the_tuples(folder):
    one, other = groups_of(folder), groups_of(folder, **PUBLISHED)
    assert one.fingerprint != other.fingerprint != one.select(range(9)).fingerprint
    assert one.fingerprint == groups_of(folder).fingerprint
    assert one.rules == dataclasses.asdict(TupleArguments()) != other.rules


def test_masks_of_some_candidates(tmp_path):
    """One without counts everywhere; arrays of other shapes are refused with the group's name."""
    folder = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 4})
    mask = np.zeros((8, 12), np.uint8)
    resave(payload_of(folder, 3), loss_mask=mask)
    sample = groups_of(folder)[0]
    assert sample["loss_mask"].shape == (2, 8, 12)
    assert (sample["loss_mask"][0] == 255).all() and (sample["loss_mask"][1] == 0).all()
    resave(payload_of(folder, 3), time_ids=np.zeros(6, np.float32))
    with pytest.raises(CacheError, match=r"group '32x48 0'.*`time_ids` of winner and losers have the shapes \[None"):
        groups_of(folder)[0]


# ---- of a run ----


@pytest.fixture
def run(tmp_path, folder, family):
    """`prepare_groups` with options of the data."""

    def prepare(**options):
        dirs = options.pop("dataset_dir", [str(folder)])
        data = sf.DataArguments(**({"dataset_dir": dirs, "eval_fraction": 0.3} | options))
        args = sf.PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        return sf.prepare_groups(data, sf.TupleArguments(), family, args)

    return prepare


def test_map_and_stream_give_the_same_groups(run, tmp_path, folder):
    """The index is read at once in either case; an inline cache is read where it lies."""
    train, held_out = run()
    convert_cache(folder, tmp_path / "inline", payload="inline")
    streamed, _ = run(streaming=True, dataset_dir=[str(tmp_path / "inline")])
    assert train.row_ids == streamed.row_ids and train.fingerprint == streamed.fingerprint and len(held_out) == 2
    for i in range(len(train)):
        assert torch.equal(train[i]["latents"].bfloat16().float(), streamed[i]["latents"])


def test_options_of_data_count_groups(run, tmp_path):
    assert len(run(max_train_samples=3)[0]) == 3 and run(eval_fraction=0)[1] is None
    other = write_candidates(tmp_path / "other", "x", buckets={(32, 48): 2 * SIZE}, seed=1)
    mixed, _ = run(dataset_dir=[str(run()[0].cache.index_files[0]).rsplit("/", 2)[0], str(other)],
                   dataset_weights=[1, 1], eval_fraction=0)  # fmt: skip
    shown = mixed.repeats[mixed.source_of_row == 0].sum(), mixed.repeats[mixed.source_of_row == 1].sum()
    assert shown == pytest.approx((10, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_encoding": "online"}, "`image_encoding` 'online' does not go with preferences"),
        ({"prior_dataset_dir": "elsewhere"}, "`prior_dataset_dir` 'elsewhere' does not go with preferences"),
    ],
)
def test_data_that_groups_do_not_have(run, options, message):
    with pytest.raises(SciflowError, match=message):
        run(**options)


def test_free_columns_of_a_built_cache_are_those_of_the_table(tmp_path, family):
    """`cache build` of a folder whose metadata has them: the groups of `prefer score` are found."""
    import json

    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(images / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "caption": f"g{i // 4}", "group_id": i // 4, "reward": i % 4 / 4})
    Path(images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = sf.DataArguments(input_dir=str(images), resolution=40, eval_fraction=0)
    args = sf.PreferenceTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    train, _ = sf.prepare_groups(data, sf.TupleArguments(), family, args)
    assert train.row_ids == ["0", "1"] and [t.gaps for t in train.tuples] == [(0.75,), (0.75,)]
    assert [train.strings("image_path")[i] for i in range(2)] == ["3.png", "7.png"]


def test_text_in_training_posteriors_and_dropped_captions(tmp_path, folder):
    """A group has one text, of which the caption may be dropped, and a draw for each candidate."""
    groups = groups_of(folder, **PUBLISHED)
    groups.__dict__["empty_prompt"] = {"prompt_embeds": torch.zeros(12, 48)}
    sampler = BucketBatchSampler(batch_keys_of(groups), batch_size=2, seed=5)
    loader = BucketLoader(groups, sampler, caption_dropout=0.5)
    dropped = [batch["prompt_embeds"].flatten(1).any(1) for batch in released(loader)]
    assert 0 < int(torch.cat(dropped).sum()) < 10

    groups = groups_of(folder, **PUBLISHED)
    groups.online_text = lambda captions: {"prompt_embeds": torch.tensor([[[float(len(c))]] for c in captions])}
    batch = next(released(BucketLoader(groups, sampler)))
    assert batch["prompt_embeds"].shape == (2, 1, 1)
    assert batch["prompt_embeds"][0] == len(groups.captions[batch["row"][0]])
    assert groups[0]["prompt_embeds"].item() == len(groups.captions[0])

    other = write_candidates(tmp_path / "cache", "x", buckets={(32, 48): 4})
    for row in range(4):
        resave(payload_of(other, row), latents_std=np.ones((4, 8, 12), np.float32))
    groups = groups_of(other, **PUBLISHED)
    sampler = BucketBatchSampler(batch_keys_of(groups), batch_size=1, seed=5)
    batch = next(released(BucketLoader(groups, sampler, posterior=True)))
    drawn = batch["latents"][0] - groups[0]["latents"]
    assert "latents_std" not in batch and 0.9 < drawn.std() < 1.1
    assert not torch.equal(drawn[0], drawn[1]), "each candidate has a draw of its own"
