"""`sciflow-hf prefer score` by the judge: scores of each axis from one set of answers, failures asked again alone."""

import argparse
import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from judge_server import GOOD, serving
from PIL import Image

from sciflow_hf.cli.judge import _FLAGS, add_judge, judge_of
from sciflow_hf.cli.main import main
from sciflow_hf.errors import SciflowError
from sciflow_hf.metrics.judge.arguments import JudgeArguments
from sciflow_hf.metrics.rewards.base import load_rewards
from sciflow_hf.metrics.rewards.judge import JudgeReward

FINE = '{"errors": [], "broken": false}'
AXES = ("component", "arrow", "text")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three candidates of one prompt, with a reference next to the table; the last has no elements and no reference."""
    made = tmp_path / "drawn"
    made.mkdir()
    rows = []
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (16, 24), colour).save(made / f"{i}.png")
        lists = {"rubric_arrows": '["a -> b", "b -> c"]', "rubric_text": '["a"]'}
        given = {} if i == 2 else {"reference": "true.jpg", **lists}
        rows.append({"file_name": f"{i}.png", "caption": "a figure", "group_id": "g", "number": i, "seed": i} | given)
    Image.new("RGB", (8, 8)).save(made / "true.jpg")
    (made / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


def test_scores_of_the_axes_cost_no_further_calls(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    filtered = True

    def answer(body: dict[str, Any]) -> Any:
        if filtered and len(server.requests) == 1:
            return 400, {}, "filtered"
        return GOOD if "connecting lines only" in body["messages"][1]["content"][-1]["text"] else FINE

    with serving(answer) as server:
        flags = ["--reward", "judge", *(f"judge_{axis}" for axis in AXES[1:]), "--reward_weights", "1", "0", "0"]
        flags += ["--judge_url", server.url, "--judge_model", "m", "--judge_cache_dir", str(tmp_path / "answers")]
        flags += ["--judge_parallel", "1", "--input_dir", str(folder)]

        def table() -> list[dict[str, Any]]:
            assert main(["prefer", "score", *flags]) == 0
            lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            return [
                {name: row.get(name) for name in ("judge", "judge_arrow", "judge_text", "reward")}
                for row in map(json.loads, lines)
            ]

        first = table()
        assert len(server.requests) == 4 and {len(b["messages"][1]["content"]) for _, _, b in server.requests} == {3}
        assert "Judge: at most 7 calls for 3 images, about 18,186 tokens" in caplog.text
        assert first[0] == {"judge": None, "judge_arrow": None, "judge_text": 1.0, "reward": None}
        assert first[1] == {"judge": 0.75, "judge_arrow": 0.5, "judge_text": 1.0, "reward": 0.75}
        assert first[2] == dict.fromkeys(first[2])
        assert "without an answer" not in caplog.text  # the command says it once for each reward
        assert "`reward` judge failed on 0.png (" in caplog.text and "status 400: filtered" in caplog.text
        filtered = False
        assert table() == [first[1], first[1], first[2]] and len(server.requests) == 5
        assert table()[0] == first[1] and len(server.requests) == 5


def test_flags_of_a_judge() -> None:
    parser = argparse.ArgumentParser()
    add_judge(parser)
    with pytest.raises(SciflowError, match="`judge_url` is for the judge, whom no reward asks"):
        judge_of(parser.parse_args(["--judge_url", "http://a"]), ["blank"])
    with pytest.raises(SciflowError, match="`judge_parallel` 0: 1 to 256"):
        judge_of(parser.parse_args(["--judge_parallel", "0"]), ["blank", "judge_text"])
    assert judge_of(parser.parse_args([]), ["blank"]) is None
    judge = judge_of(parser.parse_args(["--scoring", "published"]), ["judge"])
    assert judge is not None and judge.args == JudgeArguments(scoring="published")


def test_the_flags_are_the_options() -> None:
    options = {field.name: field for field in fields(JudgeArguments)}
    assert _FLAGS.keys() == options.keys()
    for name, (kind, text) in _FLAGS.items():
        default = options[name].default
        assert kind is type(default) or default is None
        assert default is None or f"default {default if kind is not float else f'{default:g}'})" in text


def test_rewards_of_one_call_share_a_judge() -> None:
    rewards = [reward.function for reward in load_rewards(["judge", "judge_text", "blank"])]
    assert isinstance(rewards[0], JudgeReward) and isinstance(rewards[1], JudgeReward)
    assert rewards[0].judge is rewards[1].judge and rewards[0].identity != rewards[1].identity
