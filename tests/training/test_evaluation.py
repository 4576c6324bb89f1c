"""The interval of `eval_gain` and the metrics of an evaluation, against plain loops and known distributions."""

import numpy as np
import pytest
from scipy import stats

from sciflow_hf.metrics.intervals import (
    MIN_EFFECTIVE_GROUPS,
    _degrees_of_freedom,
    _unskewed,
    mean_interval,
    student_quantile,
)
from sciflow_hf.training.evaluation import quarter_means, summarise


def simple_interval(gains, groups):
    """The same interval by loops, matrices and a search for the root."""
    by_group = {}
    for gain, group in zip(gains, groups, strict=True):
        by_group.setdefault(group, []).append(gain)
    without = [np.mean([gain for name in by_group if name != left for gain in by_group[name]]) for left in by_group]
    number, mean = len(by_group), np.mean(gains)
    deviations = mean - np.array(without)
    variance = (number - 1) / number * (deviations**2).sum()
    skewness = (number - 1) / number * (deviations**3).sum() / variance**1.5
    sizes = np.array([len(values) for values in by_group.values()])
    w = sizes / sizes.sum()
    residual = np.eye(number) - np.outer(np.ones(number), w)
    form = residual.T @ np.diag((w / (1 - w)) ** 2) @ residual
    degrees = []
    for variances in (np.ones(number), 1 / sizes):
        product = form @ np.diag(variances)
        degrees.append(np.trace(product) ** 2 / np.trace(product @ product))
    quantile = stats.t.ppf(0.975, min(degrees))
    ends = np.linspace(-20, 20, 400_001)
    transform = ends + skewness * ends**2 / 3 + skewness**2 * ends**3 / 27 + skewness / 6
    low, high = (mean - np.sqrt(variance) * ends[np.searchsorted(transform, q)] for q in (quantile, -quantile))
    return low, high


def clustered(rng, num_groups, mean=0.1, between=0.3, within=0.2):
    """Gains whose groups have their own level and 1 to 6 rows."""
    sizes = rng.integers(1, 7, num_groups)
    groups = [f"paper{i}" for i, size in enumerate(sizes) for _ in range(size)]
    levels = np.repeat(mean + between * rng.standard_normal(num_groups), sizes)
    return levels + within * rng.standard_normal(len(groups)), groups


@pytest.mark.parametrize("num_groups", [15, 40, 200])
def test_interval_equals_a_simple_one(num_groups):
    gains, groups = clustered(np.random.default_rng(num_groups), num_groups)
    low, high = mean_interval(gains, groups)
    other_low, other_high = simple_interval(gains.tolist(), groups)
    width = other_high - other_low
    assert abs(low - other_low) < 2e-4 * width and abs(high - other_high) < 2e-4 * width
    assert low < gains.mean() < high


@pytest.mark.parametrize("degrees", [4, 5.5, 9, 30, 1000])
def test_quantile_of_student(degrees):
    assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=4e-4)


def test_degrees_of_equal_groups_are_the_usual_ones():
    """n - 1, by hand: V is then the usual variance of a mean."""
    for number in (10, 37):
        assert _degrees_of_freedom(np.full(number, 1 / number), np.ones(number)) == pytest.approx(number - 1)


def test_skewness_moves_the_interval_to_its_long_side():
    for quantile, skewness in ((2.2, 0.6), (-2.2, 0.6), (2.2, -0.4), (2.0, 1e-9)):
        t = _unskewed(quantile, skewness)
        assert t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6 == pytest.approx(quantile)
    gains = np.random.default_rng(0).exponential(size=30)
    low, high = mean_interval(gains, [str(i) for i in range(30)])
    assert high - gains.mean() > 1.3 * (gains.mean() - low)


def unequal(rng, effective):
    """Sizes of groups, lognormal with deviation 1, that are in effect so many equal ones."""
    sizes = np.maximum(1, np.round(5 * np.exp(rng.standard_normal(effective)))).astype(int)
    while sizes.sum() ** 2 / (sizes**2).sum() < effective:
        sizes = np.append(sizes, max(1, round(5 * np.exp(rng.standard_normal()))))
    return sizes


@pytest.mark.parametrize("draw", ["normal", "exponential"])
@pytest.mark.parametrize("effective", [10, 20])
def test_interval_covers_the_truth_19_times_in_20(draw, effective):
    """500 data sets of mean 0 in groups of very unequal size. The bounds: 4 deviations of a binomial below .93 and
    .92, above .97, and above .04 for an interval that lies above 0. Rows as if they were groups cover far less."""
    rng = np.random.default_rng(effective)
    covered = better = as_rows = 0
    for _ in range(500):
        sizes = unequal(rng, effective)
        noise = rng.standard_normal if draw == "normal" else lambda n: rng.exponential(size=n) - 1
        gains = np.repeat(noise(len(sizes)), sizes) + 0.5 * noise(sizes.sum())
        low, high = mean_interval(gains, np.repeat(np.arange(len(sizes)), sizes).astype(str))
        covered, better = covered + (low <= 0 <= high), better + (low > 0)
        low, high = mean_interval(gains, np.arange(len(gains)).astype(str))
        as_rows += low <= 0 <= high
    least = 0.93 if draw == "normal" else 0.92
    deviation = np.sqrt(500 * least * (1 - least))
    assert 500 * least - 4 * deviation <= covered <= 485 + 4 * deviation
    assert better <= 20 + 4 * np.sqrt(20) and as_rows < 400


def test_interval_does_not_depend_on_the_order_of_rows():
    gains, groups = clustered(np.random.default_rng(0), 30)
    order = np.random.default_rng(1).permutation(len(gains))
    shuffled = mean_interval(gains[order], [groups[i] for i in order])
    np.testing.assert_allclose(shuffled, mean_interval(gains, groups), rtol=1e-12)


def test_no_interval_below_ten_groups_in_effect():
    assert MIN_EFFECTIVE_GROUPS == 10
    gains = np.arange(30.0)
    assert mean_interval(gains, [str(i % 9) for i in range(30)]) is None
    low, high = mean_interval(gains, [str(i % 10) for i in range(30)])
    assert low < gains.mean() < high
    assert mean_interval(gains, [str(max(i - 9, 0)) for i in range(30)]) is None, "21 groups, one of them of 10 rows"
    assert mean_interval(gains, ["one"] * 30) is None
    assert mean_interval(np.ones(12), [str(i) for i in range(12)]) == (1.0, 1.0)


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
    low, high = mean_interval((base_losses - losses).mean(1), [groups[row] for row in rows])
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


def test_kinds_are_measured_apart(evaluation):
    """Loss, gain and interval of edits are those of an evaluation of the edits alone, and so of the other rows."""
    rows, groups, losses, base = evaluation
    rng = np.random.default_rng(5)
    names = [f"{row}{kind}" for row in rows for kind in "ab"]  # 24 rows, an edit and a generation in each group
    edits, order = np.array([name.endswith("a") for name in names]), rng.permutation(24)
    both, plain = rng.random((24, 4)), {name: rng.random(4).tolist() for name in names}
    group_of = {name: groups[name[:-1]] for name in names}
    shuffled = [names[i] for i in order]
    metrics = summarise(both[order], LEVELS, shuffled, group_of, plain, edits[order])
    assert {k: v for k, v in metrics.items() if "edit" not in k and "generation" not in k} == summarise(
        both, LEVELS, names, group_of, plain
    )
    for kind, chosen in (("edit", edits), ("generation", ~edits)):
        alone = summarise(both[chosen], LEVELS, [n for n, c in zip(names, chosen, strict=True) if c], group_of, plain)
        for name in ("loss", "gain"):
            assert metrics[f"{name}_{kind}"] == alone[name]
        for end in ("low", "high"):
            assert metrics[f"gain_{kind}_{end}"] == alone[f"gain_{end}"]
    assert metrics["gain_edit"] != metrics["gain_generation"] != metrics["gain"]

    only = summarise(losses, LEVELS, rows, groups, base, np.ones(12, bool))
    assert "gain_edit_low" in only and not any("generation" in name for name in only)
    assert summarise(losses, LEVELS, rows, groups, base, np.zeros(12, bool)) == summarise(
        losses, LEVELS, rows, groups, base
    )
    few = summarise(losses, LEVELS, rows, groups, base, np.arange(12) < 3)
    assert {"gain_edit", "gain_generation"} < few.keys() and not any("_low" in n for n in few if "_edit" in n)
    assert summarise(losses, LEVELS, rows, groups, None, np.arange(12) < 3).keys() >= {"loss_edit", "loss_generation"}
