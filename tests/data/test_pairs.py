"""Preference data: candidates in every layout, pairs as trl and the Hub have them, tables, and `prefer pairs`."""

import json
import logging
import shutil
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builds import PAYLOADS, RandomEncoders, build, index_of, write_notes
from PIL import Image

import sciflow_hf as sf
from sciflow_hf.cli import main
from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.data.build.sources.find import find_records
from sciflow_hf.data.inspect.describe import describe_cache
from sciflow_hf.data.inspect.verify import verify_cache
from sciflow_hf.data.load import load_cache
from sciflow_hf.errors import CacheError

pytestmark = pytest.mark.usefixtures("datasets_cache")

REWARDS = {"a": [0.9, 0.1, 0.5, None], "b": [0.2, 0.6, 0.6, 0.3], "c": [0.5, 0.5, 0.45, 0.5]}
CHOSEN = {"a": (0, 1), "b": (1, 0)}  # the numbers of winner and loser, by hand; c is too even

ROLES = ("winner", "loser")


def noise(seed, size=(32, 32)):
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def candidates(tmp_path):
    """Four scored candidates of each of three prompts; two of the first group are the same picture."""
    folder, rows = tmp_path / "candidates", []
    folder.mkdir()
    for group, rewards in REWARDS.items():
        for number, reward in enumerate(rewards):
            name = f"{group}_{number}.png"
            noise([ord(group), 1 if (group, number) == ("a", 2) else number]).save(folder / name)
            rows.append(
                {"file_name": name, "caption": f"a figure {group}", "group_id": group, "number": number, "seed": number,
                 "reward": reward, "text_score": 1 - number / 4, "kind": "bar"}
            )  # fmt: skip
    write_notes(folder, rows)
    return folder


def told(groups):
    """{group: (number of the winner, numbers of the losers)}."""
    numbers = groups.cache.strings("number")
    return {t.group: tuple(int(numbers[row]) for row in (t.winner, *t.losers)) for t in groups.tuples}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_candidates_in_every_layout(candidates, tmp_path, payload):
    """Columns survive building, converting and streaming; equal pictures of a group stay two rows."""
    build(candidates, tmp_path / "cache", RandomEncoders(), payload=payload)
    other = PAYLOADS[PAYLOADS.index(payload) - 1]
    convert_cache([tmp_path / "cache"], tmp_path / "other", payload=other)
    for folder in (tmp_path / "cache", tmp_path / "other"):
        rows = {row["image_path"]: row for row in index_of(folder)}
        assert len(rows) == 12 and rows["a_1.png"]["reward"] == 0.1 and rows["a_3.png"]["reward"] is None
        assert {(row["group_id"], row["kind"]) for row in rows.values()} == {(group, "bar") for group in "abc"}
        assert rows["b_2.png"]["text_score"] == 0.5 and rows["b_2.png"]["number"] == 2
        cache = load_cache(folder, dtype=torch.float32)
        assert told(sf.load_groups(cache)) == CHOSEN
        at = {name: i for i, name in enumerate(cache.row_ids)}
        assert torch.equal(cache[at["a_1.png"]]["latents"], cache[at["a_2.png"]]["latents"])
        assert verify_cache(cache).clean and "12" in describe_cache(cache, [str(folder)])
        streamed = load_cache(folder, streaming=True)
        assert streamed.metadata == cache.metadata


# ---- pairs ----


def png(image):
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_pairs_of_trl(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": noise([i, 0]), "rejected": noise([i, 1]), "source": "x"} for i in range(3)]
    rows[2]["rejected"] = rows[2]["chosen"]
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image(),
         "source": datasets.Value("string")}
    )  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "pairs")
    report = build(tmp_path / "pairs", tmp_path / "cache", RandomEncoders())
    assert report.samples == 6
    found = index_of(tmp_path / "cache")
    assert sorted((row["caption"], row["role"]) for row in found) == [
        (f"p{i}", role) for i in range(3) for role in ("loser", "winner")
    ]
    assert {row["source"] for row in found} == {"x"}
    records = {record.name: record for record in find_records(tmp_path / "pairs")[0]}
    with records["row_00000001/rejected"].image.open() as image:
        assert image.tobytes() == noise([1, 1]).tobytes()
    groups = sf.load_groups(load_cache(tmp_path / "cache", dtype=torch.float32))
    roles = groups.cache.strings("role")
    assert [(roles[t.winner], [roles[row] for row in t.losers]) for t in groups.tuples] == [("winner", ["loser"])] * 3


@pytest.mark.parametrize("with_other_label", [True, False])
def test_pairs_of_the_hub(tmp_path, caplog, with_other_label):
    """The label decides; ties and pairs without a label are left out, and counted."""
    labels = [1.0, 0.0, 0.5, None, 1.0]
    rows = [
        {"jpg_0": png(noise([i, 0])), "jpg_1": png(noise([i, 1])), "label_0": label, "caption": "same", "uid": f"{i}"}
        | ({"label_1": None if label is None else 1 - label} if with_other_label else {})
        for i, label in enumerate(labels)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    records, tally = find_records(tmp_path / "pairs.parquet")
    assert len(tally.skipped) == 2 and {*tally.skipped.values()} == {"pairs without a winner (equal or missing labels)"}
    assert [(r.name, r.columns["role"], r.columns["uid"]) for r in records] == [
        ("row_00000000/jpg_0", "winner", "0"), ("row_00000000/jpg_1", "loser", "0"),
        ("row_00000001/jpg_1", "winner", "1"), ("row_00000001/jpg_0", "loser", "1"),
        ("row_00000004/jpg_0", "winner", "4"), ("row_00000004/jpg_1", "loser", "4"),
    ]  # fmt: skip
    assert len({r.columns["group_id"] for r in records}) == 3 and "label_0" not in records[0].columns
    with records[2].image.open() as image:
        assert image.tobytes() == noise([1, 1]).tobytes()
    with caplog.at_level(logging.INFO):
        build(tmp_path / "pairs.parquet", tmp_path / "cache", RandomEncoders())
    assert "pairs without a winner (equal or missing labels)" in caplog.text
    assert len(sf.load_groups(load_cache(tmp_path / "cache"))) == 3


def test_a_data_set_with_images_is_none_of_pairs(tmp_path):
    rows = [{"image": png(noise(0)), "caption": "x", "jpg_0": "a", "jpg_1": "b", "label_0": 1.0}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    [record] = find_records(tmp_path / "p.parquet")[0]
    assert record.columns["label_0"] == 1.0 and "role" not in record.columns


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_is_an_input(candidates, tmp_path, suffix):
    """Wherever it lies; it lists its images, and others next to them are not taken."""
    rows = [json.loads(line) for line in (candidates / "metadata.jsonl").read_text().splitlines()][:6]
    (tmp_path / "tables").mkdir()
    file = tmp_path / "tables" / f"some{suffix}"
    data = datasets.Dataset.from_list([row | {"file_name": f"../candidates/{row['file_name']}"} for row in rows])
    data.to_csv(file, index=False) if suffix == ".csv" else (
        data.to_parquet(file) if suffix == ".parquet" else data.to_json(file)
    )
    found, tally = find_records(file)
    assert [record.name for record in found] == [f"../candidates/{row['file_name']}" for row in rows]
    assert [str(record.columns["group_id"]) for record in found] == ["a"] * 4 + ["b"] * 2
    assert found[0].caption == "a figure a" and not tally.skipped and not tally.missing
    (candidates / rows[2]["file_name"]).unlink()
    _, tally = find_records(file)
    assert list(tally.missing) == [f"../candidates/{rows[2]['file_name']}"]


# ---- prefer pairs ----


def pairs(*flags):
    return main(["prefer", "pairs", *map(str, flags)])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_chosen_of_candidates(candidates, tmp_path, capsys, suffix):
    output = tmp_path / "out" / f"pairs{suffix}"
    output.parent.mkdir()
    assert pairs("--input_dir", candidates, "--output_file", output) == 0
    out = capsys.readouterr().out
    assert "4 candidates of 2 groups in" in out and "no reward is 0.2 below the best (`min_reward_gap`)  1" in out
    assert "without a reward or score" in out
    found = find_records(output)[0]
    roles = [(r.columns["group_id"], r.columns["role"], int(r.columns["number"])) for r in found]
    assert sorted(roles) == sorted((g, role, n) for g, c in CHOSEN.items() for n, role in zip(c, ROLES, strict=True))
    assert {r.columns["kind"] for r in found} == {"bar"}
    build(output, tmp_path / "cache", RandomEncoders())
    assert told(sf.load_groups(load_cache(tmp_path / "cache"))) == CHOSEN


@pytest.mark.parametrize("payload", PAYLOADS)
def test_chosen_of_a_cache(candidates, tmp_path, payload):
    """The table is an index of the same payloads; training takes it with `--payload_dir`."""
    build(candidates, tmp_path / "cache", RandomEncoders(), payload=payload)
    output = tmp_path / "pairs.parquet"
    assert pairs("--dataset_dir", tmp_path / "cache", "--output_file", output, "--min_reward_gap", 0.35) == 0
    chosen = load_cache(output, payload_dir=tmp_path / "cache", dtype=torch.float32)
    complete = load_cache(tmp_path / "cache", dtype=torch.float32)
    assert chosen.metadata == complete.metadata and chosen.empty_prompt is not None
    assert told(sf.load_groups(chosen)) == {"a": (0, 1), "b": (1, 0)}
    at = {name: i for i, name in enumerate(complete.row_ids)}
    for i, name in enumerate(chosen.row_ids):
        one, other = chosen[i], complete[at[name]]
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert pq.read_table(output)["axis"].to_pylist() == [None, "worst"] * 2


def test_axes(candidates, tmp_path, capsys):
    rows = [json.loads(line) for line in (candidates / "metadata.jsonl").read_text().splitlines()]
    scores = {0: (0.9, 0.9), 1: (0.3, 0.9), 2: (0.9, 0.4), 3: (0.5, 0.5)}
    for row in rows:
        row["component_score"], row["text"] = scores[row["number"]]
        row["reward"] = sum(scores[row["number"]]) / 2
        del row["text_score"]
    write_notes(candidates, rows)
    flags = ["--input_dir", candidates, "--output_file", tmp_path / "p.jsonl", "--axes", "component", "text"]
    assert pairs(*flags, "--global_worst") == 0
    found = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [(row["number"], row["role"], row["axis"]) for row in found[:4]] == [
        (0, "winner", None), (1, "loser", "component"), (2, "loser", "text"), (3, "loser", "worst")
    ]  # fmt: skip
    assert pairs(*flags, "--min_axis_gap", 0.7) == 2
    assert "no loser of the axis" in capsys.readouterr().err
    assert pairs(*flags, "--min_axis_gap", 0.55, "--no_every_axis") == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 6


def test_flags_are_those_of_training():
    """All of them, with their defaults, which the help says."""
    import argparse
    import dataclasses
    import re

    from sciflow_hf.cli.prefer_pairs import add_options

    parser = argparse.ArgumentParser()
    add_options(parser)
    flags = {action.dest: action for action in parser._actions}
    for field in dataclasses.fields(sf.TupleArguments):
        assert flags[field.name].default is None
        if said := re.search(r"\(default ([\d.]+)\)", flags[field.name].help or ""):
            assert float(said[1]) == field.default
        else:
            assert field.name in ("axes", "every_axis", "global_worst")


@pytest.mark.parametrize(
    ("flags", "change", "match"),
    [
        ([], {"reward": "good"}, "`reward` of a_0.png is 'good', but must be a number"),
        ([], {"role": "winner"}, "has a column `role`"),
        (["--axes", "colour"], {}, "has no column 'colour', but file_name, caption"),
        (["--min_reward_gap", 2], {}, "none of 3 groups has a winner"),
        (["--min_candidates", 1], {}, "`min_candidates` 1: at least 2"),
        (["--global_worst"], {}, "`global_worst` is a further loser"),
        (["--table", "x.csv"], {}, "give one of `--dataset_dir`"),
        (["--output_file", "x.txt"], {}, "`output_file` 'x.txt': give a file that ends with"),
    ],
)
def test_mistakes(candidates, tmp_path, capsys, flags, change, match):
    rows = [json.loads(line) for line in (candidates / "metadata.jsonl").read_text().splitlines()]
    write_notes(candidates, [rows[0] | change, *rows[1:]])
    assert pairs("--input_dir", candidates, "--output_file", tmp_path / "p.parquet", *flags) == 2
    assert match in capsys.readouterr().err and not (tmp_path / "p.parquet").exists()


def test_mistakes_of_caches(candidates, tmp_path, capsys):
    build(candidates, tmp_path / "cache", RandomEncoders())
    assert pairs("--dataset_dir", tmp_path / "cache", "--output_file", tmp_path / "cache" / "p.parquet") == 2
    assert "lie outside of it" in capsys.readouterr().err
    assert pairs("--dataset_dir", tmp_path / "cache", "--output_file", tmp_path / "p.csv") == 2
    assert "of a cache it is an index, a .parquet file" in capsys.readouterr().err


def test_a_winner_that_is_its_loser_by_content(candidates, tmp_path, capsys):
    for row in ("a_1", "b_0"):
        shutil.copy(candidates / f"{row[0]}_{CHOSEN[row[0]][0]}.png", candidates / f"{row}.png")
    assert pairs("--input_dir", candidates, "--output_file", tmp_path / "p.parquet") == 0
    out = capsys.readouterr().out
    assert "with the same content as their winner" in out and "4 candidates of 2 groups" in out
    (candidates / "b_0.png").write_bytes(b"no image")
    assert pairs("--input_dir", candidates, "--output_file", tmp_path / "q.parquet") == 2
    assert "b_0.png: " in capsys.readouterr().err


# ---- published tables ----


@pytest.mark.parametrize("own_text", [True, False])
def test_a_published_table_of_candidates(candidates, tmp_path, own_text):
    """Without shapes, and with the text in files of its own: opens as a cache, and trains as one."""
    build(candidates, tmp_path / "cache", RandomEncoders(), payload="npz")
    built = load_cache(tmp_path / "cache", dtype=torch.float32)
    rows, kept = [], ("group_id", "caption", "cache_path", "bucket_h", "bucket_w", "reward", "text_score")
    for row in index_of(tmp_path / "cache"):
        new = {name: row[name] for name in kept} | {"component_score": row["reward"]}
        if not own_text:
            file = tmp_path / "cache" / row["cache_path"]
            arrays = dict(np.load(file))
            text = {name: arrays.pop(name) for name in list(arrays) if name != "latents"}
            new["text_cache_path"] = f"texts/{row['group_id']}.npz"
            (tmp_path / "cache" / "texts").mkdir(exist_ok=True)
            np.savez(tmp_path / "cache" / new["text_cache_path"], **text)
            np.savez(file, latents=arrays["latents"])
        rows.append(new)
    before = {name: built[i] for i, name in enumerate(built.strings("cache_path"))} if own_text else {}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dpo.parquet")
    cache = load_cache(tmp_path / "dpo.parquet", payload_dir=tmp_path / "cache", dtype=torch.float32)
    assert len(cache) == 12 and cache[0]["prompt_embeds"].shape == (5, 6)
    for name, sample in before.items():
        mine = cache[cache.strings("cache_path").index(name)]
        assert mine.keys() == sample.keys() and all(torch.equal(mine[key], sample[key]) for key in mine)
    groups = sf.load_groups(cache, sf.TupleArguments(axes=["component"], min_axis_gap=0.2))
    assert {t.group for t in groups.tuples} == {"a", "b"} and groups[0]["latents"].shape == (2, 3, 4, 4)
    np.savez(tmp_path / "cache" / rows[5]["cache_path"], other=np.zeros(3))
    with pytest.raises(CacheError, match=r"Row 5 .*: its npz holds no `latents`"):
        load_cache(tmp_path / "dpo.parquet", payload_dir=tmp_path / "cache")
