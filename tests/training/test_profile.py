"""`--profile_steps`: the trace, the split of a step, and a training that stays the same bits."""

import copy
import itertools
import json
import logging
import re
from collections import Counter

import pytest
from trainings import losses, make_args, make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.training.callbacks.profile import PARTS, _Clock

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def spans(file):
    """How often each named span is in a trace."""
    return Counter(event["name"] for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X")


@pytest.mark.promise("C34")
def test_the_trace_holds_these_steps_and_the_weights_stay_the_same(tmp_path, family, tiny_cache):
    """Step 2 of 3, with accumulation; torch's optimizer and autograd have spans of their own."""
    options = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1, optim="adamw_torch")
    plain = make_trainer(tmp_path / "plain", family, tiny_cache, **options)
    plain.train()
    traced = make_trainer(tmp_path / "traced", family, tiny_cache, profile_steps="2:2", **options)
    traced.train()
    assert same(trained(plain), trained(traced)) and losses(plain) == losses(traced)
    assert not {"get_batch_samples", "compute_loss"} & vars(traced).keys() and "backward" not in vars(
        traced.accelerator
    )
    assert sorted(file.name for file in (tmp_path / "traced/profile").iterdir()) == ["steps_2-2.json", "steps_2-2.txt"]
    found = spans(tmp_path / "traced/profile/steps_2-2.json")
    assert [found[part] for part in PARTS] == [1, 2, 2, 1] and found["Optimizer.step#AdamW.step"] == 1
    assert found["autograd::engine::evaluate_function: MeanBackward0"] == 2
    text = (tmp_path / "traced/profile/steps_2-2.txt").read_text()
    assert "aten::mm" in text and "CPU Mem" in text and not (tmp_path / "plain/profile").exists()


def test_the_split_of_a_step(tmp_path, family, tiny_cache, monkeypatch, caplog):
    """By a clock that ticks once a look, two micro-batches a step: 13 ticks, of which 6 are in parts."""
    ticks = itertools.count()
    monkeypatch.setattr(_Clock, "now", lambda self: next(ticks))
    options = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1, profile_steps="1:2")
    trainer = make_trainer(tmp_path, family, tiny_cache, **options)
    with caplog.at_level(logging.INFO, logger="sciflow_hf"):
        trainer.train()
    told = next(record.message for record in caplog.records if record.message.startswith("Steps 1 to 2, "))
    assert told.startswith("Steps 1 to 2, 13000.00 ms a step:")
    parts = {name: float(ms) for ms, name in re.findall(r"([\d.]+) ms +[\d.]+% +(\w+)", told)}
    assert parts == {"wait": 1000, "forward": 2000, "backward": 2000, "optimizer": 1000, "other": 7000}
    assert "Memory: resident set" in told and len(re.findall(r"ms in [\d,]+ calls a step: ", told)) == 5
    assert (tmp_path / "profile/steps_1-2.txt").read_text().startswith(told[: told.index("Memory")])


def test_a_resumed_run_counts_on_and_what_is_not_traced_is_said(tmp_path, family, tiny_cache, caplog):
    options = dict(save_strategy="steps", save_steps=2, profile_steps="2:9", resume_from_checkpoint="latest")
    make_trainer(tmp_path, family, tiny_cache, max_steps=2, **options).train()
    make_trainer(tmp_path, family, tiny_cache, max_steps=3, **options).train()
    names = sorted(file.name for file in (tmp_path / "profile").glob("*.json"))
    assert names == ["steps_2-2.json", "steps_3-3.json"]  # as far as each call came
    assert "nothing was traced" not in caplog.text and "profile_steps" not in caplog.text
    options["profile_steps"] = "1:3"
    make_trainer(tmp_path, family, tiny_cache, max_steps=5, **options).train()
    assert "`profile_steps` 1:3: nothing was traced, because this run trained steps 4 to 5." in caplog.text
    make_trainer(tmp_path, family, tiny_cache, max_steps=5, **options).train()
    assert "nothing was traced, because this run trained no step." in caplog.text


def test_an_error_keeps_the_steps_before_it(tmp_path, family, tiny_cache, monkeypatch):
    trainer = make_trainer(tmp_path, family, tiny_cache, profile_steps="1:5", per_device_train_batch_size=1)
    stock = trainer.family.compute_loss

    def fails(*args, **options):
        if trainer.state.global_step == 1:
            raise RuntimeError("no")
        return stock(*args, **options)

    monkeypatch.setattr(trainer, "family", copy.copy(family))
    trainer.family.compute_loss = fails
    with pytest.raises(RuntimeError, match="no"):
        trainer.train()
    assert [file.name for file in (tmp_path / "profile").glob("*.json")] == ["steps_1-1.json"]


def test_one_process_traces(tmp_path, family, tiny_cache, monkeypatch):
    monkeypatch.setattr(sf.DiffusionTrainingArguments, "process_index", 1)
    assert make_trainer(tmp_path, family, tiny_cache, profile_steps="1:2")._profile is None


@pytest.mark.parametrize("value", ["5:3", "x", "0:2", "3", "1:2:3", "-1:2", ":4"])
def test_values_that_are_refused(tmp_path, value):
    with pytest.raises(sf.SciflowError, match=rf"`profile_steps` '{value}': FIRST:LAST.* such as 10:15") as found:
        make_args(tmp_path, profile_steps=value)
    assert ("quotes" in str(found.value)) == (value == "3")
    assert make_args(tmp_path, profile_steps="4:4").profile_steps == "4:4"
