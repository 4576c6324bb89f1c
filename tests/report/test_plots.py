"""`training.png`: what its lines hold against the log history, for all kinds of runs, and where it goes."""

import json

import numpy as np
import pytest
from PIL import Image
from trainings import LONGER, make_trainer

import sciflow_hf as sf
from sciflow_hf.data.load import load_cache
from sciflow_hf.hub.upload import publishable_files
from sciflow_hf.report.plots import MAX_POINTS, plot_training, training_figure


def log(step, loss, rate=1e-3, **more):
    return {"step": step, "epoch": step / 10, "loss": loss, "learning_rate": rate, "grad_norm": 1.0, **more}


def evaluation(step, loss, base, low=None, high=None, prefix="eval_"):
    entry = {f"{prefix}loss": loss, f"{prefix}base_loss": base, f"{prefix}gain": base - loss}
    if low is not None:
        entry |= {f"{prefix}gain_low": low, f"{prefix}gain_high": high}
    return {"step": step, "eval_runtime": 1.0, **entry}


QUARTERS = {f"loss_q{q}": 0.1 * q for q in range(1, 5)}
RUN = [
    log(10, 2.0, 1e-4, **QUARTERS),
    log(20, 1.0, 1e-3, **{name: value / 2 for name, value in QUARTERS.items() if name != "loss_q3"}),
    evaluation(20, 0.9, 1.5, 0.4, 0.7),
    log(30, 0.5, 1e-3, **QUARTERS),
    evaluation(30, 0.8, 1.5, 0.5, 0.75),
    {"step": 30, "train_loss": 1.2, "train_runtime": 3.0},
    evaluation(30, 0.7, 1.5, 0.6, 0.85),  # once more at the end, as the recipes do
]


def panels(history):
    return {axes.get_title(loc="left"): axes for axes in training_figure(history).axes}


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_the_lines_are_the_logs():
    drawn = panels(RUN)
    assert list(drawn) == ["training loss", "held-out loss", "learning rate"]
    losses = lines(drawn["training loss"])
    assert list(losses) == ["all", "quarter 1 (least noise)", "quarter 2", "quarter 3", "quarter 4 (most noise)"]
    assert losses["all"] == ([10, 20, 30], [2.0, 1.0, 0.5])
    assert losses["quarter 1 (least noise)"] == ([10, 20, 30], [0.1, 0.05, 0.1])
    assert losses["quarter 3"] == ([10, 30], [QUARTERS["loss_q3"]] * 2), "no sample fell there before step 20"
    held_out = lines(drawn["held-out loss"])
    assert held_out["trained"] == ([20, 30], [0.9, 0.7])
    assert held_out["base model"] == ([0, 20, 30], [1.5, 1.5, 1.5])
    assert lines(drawn["learning rate"]) == {"_": ([10, 20, 30], [1e-4, 1e-3, 1e-3])}
    assert {axes.get_xlim() for axes in drawn.values()} == {(0, 1.03 * 30)}
    assert all(axes.get_xlabel() == "optimizer step" for axes in drawn.values())


def test_the_interval_is_that_of_the_gain_laid_around_the_trained_loss():
    band, bars = panels(RUN)["held-out loss"].collections
    corners = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    assert corners == {(20, 0.8), (20, 1.1), (30, 0.65), (30, 0.9)}  # base - high, base - low
    assert [np.round(path.vertices, 9).tolist() for path in bars.get_paths()] == [
        [[20, 0.8], [20, 1.1]], [[30, 0.65], [30, 0.9]]
    ]  # fmt: skip


def test_scales():
    drawn = panels(RUN)
    assert [drawn[name].get_yscale() for name in drawn] == ["log", "linear", "linear"]  # losses span 40 and 2
    cosine = panels([log(10, 1.0, 1e-3), log(20, 1.0, 1e-9)])["learning rate"]  # not nine decades of nothing
    assert cosine.get_yscale() == "linear" and cosine.get_ylim() == (0, pytest.approx(1.08e-3))
    below = panels([evaluation(10, 0.2, 1.0, 0.5, 1.4)])["held-out loss"]
    assert below.get_ylim()[0] >= 0, "an interval may reach below 0, a loss does not"


def test_prodigy_shows_the_rate_in_use():
    history = [log(s, 1.0, 1.0, effective_learning_rate=r) for s, r in ((10, 1e-6), (20, 1e-4), (30, 3e-4))]
    drawn = panels(history)
    assert list(drawn) == ["training loss", "learning rate in use"]
    rates = drawn["learning rate in use"]
    assert lines(rates) == {"Prodigy: d x learning rate": ([10, 20, 30], [1e-6, 1e-4, 3e-4])}
    assert rates.get_yscale() == "log" and "Prodigy" in rates.get_legend().get_texts()[0].get_text()


def test_several_learning_rates():
    history = [log(10, 1.0, 1e-4, learning_rate_lora_A=1e-4, learning_rate_lora_B=1.6e-3)]
    assert lines(panels(history)["learning rate"]) == {"lora_A": ([10], [1e-4]), "lora_B": ([10], [1.6e-3])}


def test_prior_preservation_and_several_held_out_sets():
    history = [log(10, 1.0, prior_loss=0.3, instance_loss=0.7), evaluation(10, 0.5, 0.8, prefix="eval_cells_")]
    history.append(evaluation(10, 0.6, 0.9, prefix="eval_charts_"))
    drawn = panels(history)
    assert lines(drawn["training loss"])["prior"] == ([10], [0.3])
    held_out = lines(drawn["held-out loss"])
    assert held_out["cells trained"] == ([10], [0.5]) and held_out["charts base model"] == ([0, 10], [0.9, 0.9])


def test_many_logs_are_averaged():
    """Means of equal runs keep the whole: 1,000 logs of alternating 0 and 2 make a line at 1."""
    drawn = lines(panels([log(10 * i, 2.0 * (i % 2)) for i in range(1, 1001)])["training loss"])["all"]
    assert len(drawn[0]) == MAX_POINTS and drawn[1] == [1.0] * MAX_POINTS
    assert np.mean(drawn[0]) == pytest.approx(np.mean(np.arange(10, 10_001, 10)))


@pytest.mark.parametrize(
    ("history", "titles"),
    [
        ([log(1, 0.5)], ["training loss", "learning rate"]),
        ([evaluation(0, 0.5, 0.5)], ["held-out loss"]),
        ([log(5, 0.5), {"step": 5, "eval_loss": 0.4}], ["training loss", "held-out loss", "learning rate"]),
        ([log(5, 0.5), {"step": 5, "eval_loss": float("nan")}], ["training loss", "learning rate"]),
    ],
    ids=["one log", "evaluation alone", "from scratch: no base", "nothing finite"],
)
def test_small_histories(tmp_path, history, titles):
    assert list(panels(history)) == titles
    for axes in training_figure(history).axes:
        assert all(len(line.get_xdata()) > 1 or line.get_marker() == "o" for line in axes.lines), "a point is seen"
    file = plot_training(history, tmp_path / "new" / "plot.png")
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width == pytest.approx(506 * len(titles), abs=2)
    assert [path.name for path in file.parent.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("history", [[], [{"step": 3, "train_loss": 0.5, "epoch": 1.0}]])
def test_nothing_to_draw(tmp_path, history):
    assert training_figure(history) is None
    with pytest.raises(sf.SciflowError, match="log_history"):
        sf.plot_training(history, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_a_run_writes_it_shows_it_in_the_card_and_uploads_it(tmp_path, tiny_klein, tiny_cache):
    family = sf.Flux2Klein(str(tiny_klein), max_sequence_length=12)
    train, held_out = load_cache(tiny_cache).split(0.4)
    often = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path, family, train, held_out, **LONGER | dict(max_steps=4) | often)
    trainer.create_model_card()
    assert not (tmp_path / "training.png").exists() and "training.png" not in (tmp_path / "README.md").read_text()

    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "](training.png)" in (tmp_path / "README.md").read_text()
    assert "training.png" in publishable_files(tmp_path)
    assert f"Plot: {tmp_path / 'training.png'}" in sf.summary(trainer)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    from_state = sf.plot_training(state["log_history"], tmp_path / "again.png")
    # The state is saved before the run's own closing entry, which no panel shows.
    assert from_state.read_bytes() == (tmp_path / "training.png").read_bytes()
    assert lines(panels(state["log_history"])["held-out loss"])["trained"][0] == [2, 4]


@pytest.mark.parametrize(
    "name", ["eval_loss", "eval_base_loss", "eval_gain", "eval_gain_low", "eval_gain_high", "loss"]
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_what_is_not_finite_is_left_out(tmp_path, name, everywhere):
    """Whichever value of an evaluation is NaN, the others are drawn, and nothing warns."""
    history = [dict(entry) for entry in RUN]
    for entry in history if everywhere else history[:4]:
        if name in entry:
            entry[name] = float("nan")
    drawn = panels(history)
    assert "held-out loss" in drawn or (everywhere and name == "eval_loss")
    for axes in drawn.values():
        assert all(np.isfinite(values).all() for line in lines(axes).values() for values in line)
    plot_training(history, tmp_path / "training.png")
