"""The interval of `eval_gain` and the metrics of an evaluation, against plain loops and known distributions."""

import random

import numpy as np
import pytest

from sciflow_hf.training.evaluation import MIN_GROUPS, NUM_BOOTSTRAP, bootstrap_interval, quarter_means, summarise


def simple_interval(gains, groups, *, draws=4000, seed=1):
    """The percentile bootstrap over groups, written with lists and Python's own generator."""
    by_group = {}
    for gain, group in zip(gains, groups, strict=True):
        by_group.setdefault(group, []).append(gain)
    names, rng = list(by_group), random.Random(seed)
    means = []
    for _ in range(draws):
        rows = [gain for name in rng.choices(names, k=len(names)) for gain in by_group[name]]
        means.append(sum(rows) / len(rows))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def clustered(rng, num_groups, mean=0.1, between=0.3, within=0.2):
    """Gains whose groups have their own level and 1 to 6 rows."""
    sizes = rng.integers(1, 7, num_groups)
    groups = [f"paper{i}" for i, size in enumerate(sizes) for _ in range(size)]
    levels = np.repeat(mean + between * rng.standard_normal(num_groups), sizes)
    return levels + within * rng.standard_normal(len(groups)), groups


@pytest.mark.parametrize("num_groups", [10, 40, 200])
def test_interval_equals_a_simple_one(num_groups):
    gains, groups = clustered(np.random.default_rng(num_groups), num_groups)
    low, high = bootstrap_interval(gains, groups)
    other_low, other_high = simple_interval(gains.tolist(), groups)
    width = other_high - other_low
    assert abs(low - other_low) < 0.06 * width and abs(high - other_high) < 0.06 * width
    assert low < gains.mean() < high


def test_interval_covers_the_truth_19_times_in_20():
    """200 data sets of known mean; a binomial(200, 0.95) lies in [181, 198] but for 3 in 1000. Rows drawn one by
    one, as if figures of a paper told as much as figures of different papers, would cover far less."""
    covered = as_rows = 0
    for seed in range(200):
        gains, groups = clustered(np.random.default_rng(1000 + seed), 60, mean=0.1)
        low, high = bootstrap_interval(gains, groups, seed=seed)
        covered += low <= 0.1 <= high
        low, high = bootstrap_interval(gains, [str(i) for i in range(len(gains))], seed=seed)
        as_rows += low <= 0.1 <= high
    assert 181 <= covered <= 198
    assert as_rows < 175


def test_interval_is_seeded_and_does_not_depend_on_the_order_of_rows():
    gains, groups = clustered(np.random.default_rng(0), 30)
    first = bootstrap_interval(gains, groups)
    assert bootstrap_interval(gains, groups) == first != bootstrap_interval(gains, groups, seed=1)
    order = np.random.default_rng(1).permutation(len(gains))
    shuffled = bootstrap_interval(gains[order], [groups[i] for i in order])
    np.testing.assert_allclose(shuffled, first, rtol=1e-12)
    state = np.random.get_state()[1].tolist()
    bootstrap_interval(gains, groups)
    assert np.random.get_state()[1].tolist() == state


def test_no_interval_below_ten_groups():
    assert MIN_GROUPS == 10 and NUM_BOOTSTRAP == 2000
    gains = np.arange(30.0)
    assert bootstrap_interval(gains, [str(i % 9) for i in range(30)]) is None
    low, high = bootstrap_interval(gains, [str(i % 10) for i in range(30)])
    assert low < gains.mean() < high
    assert bootstrap_interval(np.ones(12), [str(i) for i in range(12)]) == (1.0, 1.0)


def test_quarters_of_the_noise_range():
    levels = np.array([0.0, 0.2499, 0.25, 0.5, 0.74, 0.75, 0.99, 1.0])
    losses = np.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0])
    expected = {"loss_q1": 2.0, "loss_q2": 5.0, "loss_q3": 8.0, "loss_q4": 13.0}
    assert quarter_means(losses, levels) == expected
    assert quarter_means(losses[:2], levels[:2]) == {"loss_q1": 2.0}
    assert quarter_means(losses.reshape(2, 4), levels.reshape(2, 4)) == expected


@pytest.fixture
def evaluation():
    """12 rows of 11 groups at 4 levels, their base losses 0.5 higher at the noisy end."""
    rng = np.random.default_rng(2)
    rows = [f"r{i:02d}" for i in range(12)]
    groups = {row: f"g{min(i, 10)}" for i, row in enumerate(rows)}
    losses = rng.random((12, 4))
    base = losses + rng.random((12, 1)) * np.array([0.0, 0.1, 0.2, 0.7])
    return rows, groups, losses, {row: b.tolist() for row, b in zip(rows, base, strict=True)}


LEVELS = np.array([0.125, 0.375, 0.625, 0.875])


def test_metrics_are_means_over_rows_and_levels(evaluation):
    rows, groups, losses, base = evaluation
    metrics = summarise(losses, LEVELS, rows, groups, base)
    base_losses = np.array(list(base.values()))
    assert metrics["loss"] == pytest.approx(losses.mean()) and metrics["base_loss"] == pytest.approx(base_losses.mean())
    assert metrics["gain"] == pytest.approx(metrics["base_loss"] - metrics["loss"])
    for quarter in range(4):
        assert metrics[f"loss_q{quarter + 1}"] == pytest.approx(losses[:, quarter].mean())
    low, high = bootstrap_interval((base_losses - losses).mean(1), [groups[row] for row in rows])
    assert (metrics["gain_low"], metrics["gain_high"]) == (low, high) and 0 < low < metrics["gain"] < high
    assert all(isinstance(value, float) for value in metrics.values())


def test_rows_are_paired_by_name_not_by_place(evaluation):
    """A gain is a row's own base loss less its loss; without pairing the interval would be far wider."""
    rows, groups, losses, base = evaluation
    metrics = summarise(losses, LEVELS, rows, groups, base)
    order = np.random.default_rng(3).permutation(12)
    names = [rows[i] for i in order]
    assert summarise(losses[order], LEVELS, names, groups, dict(reversed(base.items()))) == metrics
    constant = {row: (values + 0.25).tolist() for row, values in zip(rows, losses, strict=True)}
    exact = summarise(losses[order], LEVELS, names, groups, constant)
    for name in ("gain", "gain_low", "gain_high"):
        assert exact[name] == pytest.approx(0.25, abs=1e-12)
    wrong = dict(zip(rows, list(constant.values())[::-1], strict=True))
    assert summarise(losses, LEVELS, rows, groups, wrong)["gain_high"] > 0.26


def test_a_row_that_fills_a_batch_counts_once(evaluation):
    rows, groups, losses, base = evaluation
    metrics = summarise(losses, LEVELS, rows, groups, base)
    more = np.concatenate([losses, losses[[3, 3, 7]]])
    assert summarise(more, LEVELS, [*rows, "r03", "r03", "r07"], groups, base) == metrics
    assert summarise(more[[*range(12, 15), *range(12)]], LEVELS, ["r03", "r03", "r07", *rows], groups, base) == metrics


def test_without_a_base_there_is_no_gain(evaluation):
    rows, groups, losses, _ = evaluation
    metrics = summarise(losses, LEVELS, rows, groups, None)
    assert metrics.keys() == {"loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"}


def test_few_groups_give_a_gain_without_an_interval(evaluation):
    rows, _, losses, base = evaluation
    metrics = summarise(losses, LEVELS, rows, {row: row[-1] for row in rows[:9]} | dict.fromkeys(rows[9:], "0"), base)
    assert "gain" in metrics and "gain_low" not in metrics and "gain_high" not in metrics
