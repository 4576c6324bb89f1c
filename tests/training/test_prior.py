"""Prior preservation: its objective in closed form, its draws, and all that must not change beside it."""

import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import recipe_runs
import torch
from accelerate import Accelerator
from caches import TINY_BUCKETS, encoder_settings, write_cache
from memory_cache import released
from trainings import LONGER, make_trainer, trained

import sciflow_hf as sf
from sciflow_hf.data.arguments import DataArguments
from sciflow_hf.data.batches.loader import BucketLoader, training_sampler
from sciflow_hf.data.load import load_data
from sciflow_hf.data.prior import Prior, loss_weights, without_prior
from sciflow_hf.errors import CacheError, SciflowError
from sciflow_hf.training.loss_log import LossLog

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_klein):
    """The user's 12 samples and 16 of the prior, in two buckets of which one is shared; file names are the same."""
    folder, settings = tmp_path_factory.mktemp("caches"), encoder_settings(tiny_klein)
    own = write_cache(folder / "own", settings=settings, buckets={(32, 48): 8, (48, 32): 4}, seed=1)
    prior = write_cache(folder / "prior", settings=settings, buckets={(32, 48): 8, (24, 64): 8}, seed=2)
    return own, prior


def load(folders, **options):
    own, prior = folders
    defaults = dict(dataset_dir=[str(own)], prior_dataset_dir=str(prior), eval_fraction=0.0)
    return load_data(DataArguments(**(defaults | options)), dtype=torch.float32)


# ---- the objective ----


class Answers:
    """A family whose loss is what a parameter says of each row: gradients tell what each row counts."""

    def __init__(self, family, losses):
        vars(self).update(vars(family))
        self.family, self.losses = family, losses

    def __getattr__(self, name):
        return getattr(self.family, name)

    def compute_loss(self, model, batch, args, *, noise=None, levels=None):
        rows = batch["row"]
        return self.losses[rows] * 1.0, torch.full((len(rows),), 0.3)


@pytest.mark.parametrize("loss_weight", [0.0, 0.5, 1.0, 3.0])
def test_the_gradient_is_that_of_both_means(tmp_path, folders, family, loss_weight):
    """grad mean(own) + w grad mean(prior), of the real network, as diffusers' scripts add them: 2 + 2 samples."""
    train, _ = load(folders, prior_loss_weight=loss_weight)
    trainer = make_trainer(tmp_path, family, train, **LONGER)
    model = trainer.model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [i for i in range(len(train)) if not train.prior.rows[i] and train.buckets[i] == (32, 48)][:2]
    prior = [i for i in range(len(train)) if train.prior.rows[i] and train.buckets[i] == (32, 48)][:2]

    def batch_of(rows):
        samples = [train[i] for i in rows]
        stacked = {name: torch.stack([s[name] for s in samples]) for name in ("latents", "prompt_embeds")}
        return stacked | {"row": torch.tensor(rows), "noise_key": torch.tensor(rows) * 7919}

    def gradients(loss):
        return torch.autograd.grad(loss, trained, allow_unused=True)

    def mean(rows):
        return family.compute_loss(model, batch_of(rows), trainer.args)[0].mean()

    ours = gradients(trainer.compute_loss(model, batch_of([own[0], prior[0], prior[1], own[1]])))
    instance_loss, prior_loss = mean(own), mean(prior)
    theirs = gradients(instance_loss + loss_weight * prior_loss)
    assert sum(g is not None for g in theirs) > 20
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_an_epoch_adds_up_to_both_means(tmp_path, folders, family, size):
    """The mean of all steps' losses, whatever a step holds of either kind, up to rows that fill up batches."""
    train, _ = load(folders, prior_loss_weight=0.7)
    losses = torch.rand(len(train), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trainer = make_trainer(tmp_path, family, train, **LONGER | {"per_device_train_batch_size": size})
    trainer.family = Answers(family, losses)
    rows, steps = Counter(), []
    for batch in trainer.get_train_dataloader():
        steps.append(float(trainer.compute_loss(trainer.model.train(), batch)))
        rows.update(batch["row"].tolist())
    prior = train.prior.rows
    expected = losses[~prior].mean() + 0.7 * losses[prior].mean()
    if size == 1:  # nothing is filled up: exact, but for the rounding of how often a row comes
        shown = torch.tensor([rows[i] for i in range(len(train))], dtype=torch.float64)
        exact = [(shown * losses)[kind].sum() / shown[kind].sum() for kind in (~prior, prior)]
        assert np.mean(steps) == pytest.approx(float(exact[0] + 0.7 * exact[1]), rel=1e-6)
    assert np.mean(steps) == pytest.approx(float(expected), rel=0.15)


def test_weights_follow_the_draws():
    """Of rows that come 1, 3 and 6 times, the last two of the prior: shares 0.1 and 0.9."""
    data = type("Data", (), {"prior": Prior(np.array([False, True, True]), 0.5), "repeats": np.array([1.0, 3.0, 6.0])})
    np.testing.assert_allclose(loss_weights(data), [10, 0.5 / 0.9, 0.5 / 0.9], rtol=1e-6)
    data.repeats = None
    np.testing.assert_allclose(loss_weights(data), [3, 0.75, 0.75], rtol=1e-6)
    assert loss_weights(object()) is None


def test_without_a_prior_the_loss_is_the_plain_mean(tmp_path, folders, family):
    train, _ = load(folders, prior_dataset_dir=None)
    trainer = make_trainer(tmp_path, family, train, **LONGER)
    losses = torch.tensor([1.0, 4.0])
    assert trainer.mean_loss(losses, torch.tensor([0, 1])) == 2.5 and train.prior is None and train.repeats is None


# ---- data ----


@pytest.mark.parametrize(("own", "prior"), [(12, 16), (24, 6), (3, 40)])
def test_an_epoch_draws_as_many_of_either_kind(tmp_path, tiny_klein, own, prior):
    settings = encoder_settings(tiny_klein)
    folders = [write_cache(tmp_path / name, settings=settings, buckets={(32, 48): count}, seed=count)
               for name, count in (("own", own), ("prior", prior))]  # fmt: skip
    train, _ = load(folders)
    args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    seen = Counter()
    for epoch in range(20):
        sampler = training_sampler(train, args)
        sampler.set_epoch(epoch)
        rows = [row for batch in sampler.batches() for row in batch]
        assert set(rows) == set(range(own + prior))  # every one at least once
        kinds = Counter(row >= own for row in rows)
        assert abs(kinds[True] - kinds[False]) <= 1 and len(rows) <= 2 * max(own, prior) + 1
        seen.update(rows)
    for kind in (range(own), range(own, own + prior)):  # all rows of a kind come equally often
        counts = [seen[row] for row in kind]
        assert max(counts) - min(counts) <= 1


def test_weights_of_data_sets_keep_their_proportion(tmp_path, tiny_klein):
    settings = encoder_settings(tiny_klein)
    folders = [write_cache(tmp_path / name, settings=settings, buckets={(32, 48): count}, seed=count)
               for name, count in (("a", 10), ("b", 20), ("prior", 15))]  # fmt: skip
    data = DataArguments(dataset_dir=[str(f) for f in folders[:2]], dataset_weights=[3, 1], eval_fraction=0,
                         prior_dataset_dir=str(folders[2]))  # fmt: skip
    train, _ = load_data(data, dtype=torch.float32)
    draws = [train.repeats[train.source_of_row == source].sum() for source in range(3)]
    np.testing.assert_allclose(draws, [60, 20, 80])
    data = dataclasses.replace(data, dataset_weights=[], max_train_samples=6)
    train, _ = load_data(data, dtype=torch.float32)
    assert len(without_prior(train)) == 6 and train.prior.rows.sum() == 15  # the limit is of the user's own


def test_nothing_of_the_prior_is_held_out_and_nothing_else_moves(folders):
    """With a prior the same rows are trained on and held out, under the same names; all of the prior is trained on."""
    for fraction in (0.0, 0.4):
        train, held_out = load(folders, eval_fraction=fraction)
        plain, plain_held_out = load(folders, eval_fraction=fraction, prior_dataset_dir=None)
        assert without_prior(train).row_ids == plain.row_ids and train.prior.rows.sum() == 16
        assert torch.equal(without_prior(train)[0]["latents"], plain[0]["latents"])
        if fraction:
            assert held_out.row_ids == plain_held_out.row_ids and len(held_out) > 2
            assert held_out.prior is None and held_out.repeats is None
    assert len(set(train.row_ids)) == len(train)
    assert train.select([0, len(train) - 1]).prior.rows.tolist() == [False, True]
    assert train.fingerprint != plain.fingerprint


def test_equal_names_in_both_caches_are_different_samples(tmp_path, folders):
    """Also where the payloads have the same place in their own folders: here every file name is in both."""
    own, prior = (pq.read_table(next(f.rglob("*.parquet"))) for f in folders)
    assert set(own["cache_path"].to_pylist()) & set(prior["cache_path"].to_pylist())
    train, _ = load(folders)
    first_prior = int(np.flatnonzero(train.prior.rows)[0])
    assert train[0]["latents"].shape == train[first_prior]["latents"].shape
    assert not torch.equal(train[0]["latents"], train[first_prior]["latents"])


# ---- training ----


def run(folder, family, train, held_out=None, **options):
    trainer = make_trainer(folder, family, train, held_out, **LONGER | dict(max_steps=8, logging_steps=1) | options)
    trainer.train()
    return trainer, [e for e in trainer.state.log_history if "loss" in e]


@pytest.fixture(scope="module")
def even_folders(tmp_path_factory, tiny_klein):
    """16 samples of either kind in two buckets: an epoch of total batch 4 has no tail."""
    folder, settings = tmp_path_factory.mktemp("even"), encoder_settings(tiny_klein)
    buckets = {(32, 48): 8, (48, 32): 8}
    return [write_cache(folder / str(seed), settings=settings, buckets=buckets, seed=seed) for seed in (1, 2)]


def test_micro_batches_do_not_change_the_run(tmp_path, even_folders, family):
    """1 x 4, 2 x 2 and 4 x 1 draw the same rows and make the same losses and weights; SGD, as Adam divides."""
    train, _ = load(even_folders, prior_loss_weight=0.5)
    found = {}
    for size in (4, 2, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "optim": "sgd"}
        trainer, logs = run(tmp_path / str(size), family, train, **split)
        found[size] = [e["loss"] for e in logs], trained(trainer)
    for size in (2, 1):
        np.testing.assert_allclose(found[size][0], found[4][0], rtol=1e-5)
        for name, value in found[4][1].items():
            torch.testing.assert_close(found[size][1][name], value, rtol=0, atol=1e-5)


def test_two_ranks_draw_what_one_draws(even_folders):
    train, _ = load(even_folders)
    orders = []
    for ranks in (1, 2):
        rows = {}
        for rank in range(ranks):
            split = {"batch_size": 4 // ranks, "num_replicas": ranks, "rank": rank}
            sampler = sf.BucketBatchSampler(train.batch_keys, seed=3, repeats=train.repeats, **split)
            for batch in released(BucketLoader(train, sampler)):
                rows |= dict(zip(batch["position"].tolist(), batch["row"].tolist(), strict=True))
        orders.append(rows)
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(32))


@pytest.mark.acceptance
def test_two_processes_train_as_one(tmp_path, tiny_klein, even_folders):
    """The same losses of either kind (1e-5) and weights (1e-4), with stratified levels; fast twins: above, and in
    `tests/training/test_stratified.py`."""
    found = {}
    for ranks in (1, 2):
        options = dict(
            pretrained_model_name_or_path=tiny_klein, max_sequence_length=12, dataset_dir=even_folders[0],
            prior_dataset_dir=even_folders[1], prior_loss_weight=0.5, stratified_levels=True, eval_fraction=0, rank=4,
            learning_rate=1e-3, max_steps=12, logging_steps=1, save_steps=12, use_cpu=True, seed=3, disable_tqdm=True,
            output_dir=tmp_path / str(ranks), per_device_train_batch_size=4 // ranks, report_to="none",
        )  # fmt: skip
        recipe_runs.run(*(word for name, value in options.items() for word in (f"--{name}", value)), ranks=ranks)
        state = json.loads((tmp_path / str(ranks) / "checkpoint-12" / "trainer_state.json").read_text())
        logs = [[e.get(k, 0.0) for k in ("loss", "instance_loss", "prior_loss")] for e in state["log_history"][:12]]
        found[ranks] = np.array(logs), recipe_runs.weights(tmp_path / str(ranks))
    np.testing.assert_allclose(found[2][0], found[1][0], rtol=1e-5)
    assert (found[1][0] > 0).all(axis=0).any()
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[2][1][name], value, rtol=0, atol=1e-4)


def test_resumed_equals_uninterrupted(tmp_path, folders, family):
    train, held_out = load(folders, eval_fraction=0.3, prior_loss_weight=0.5)
    options = dict(save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    whole, logs = run(tmp_path / "whole", family, train, held_out, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again, again_logs = run(tmp_path / "again", family, train, held_out, resume_from_checkpoint=checkpoint, **options)
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items())
    assert [e["loss"] for e in again_logs] == [e["loss"] for e in logs]
    plain, _ = load(folders, eval_fraction=0.3, prior_dataset_dir=None)
    with pytest.raises(SciflowError, match="data"):  # another run's checkpoint
        run(tmp_path / "other", family, plain, resume_from_checkpoint=checkpoint, **options)


def test_logs_tell_the_kinds_apart(tmp_path, folders, family):
    """Own losses 1 and prior losses 5, so: loss 1 + 0.5 x 5 in the mean, each kind's own mean beside it."""
    train, _ = load(folders, prior_loss_weight=0.5)
    losses = torch.where(torch.from_numpy(train.prior.rows), 5.0, 1.0).requires_grad_()
    trainer = make_trainer(tmp_path, family, train, **LONGER | dict(max_steps=8, logging_steps=8))
    trainer.family = Answers(family, losses)
    trainer.train()
    logs = next(e for e in trainer.state.log_history if "loss" in e)
    assert logs["instance_loss"] == 1 and logs["prior_loss"] == 5
    assert logs["loss"] == pytest.approx(3.5, rel=0.2)
    assert logs["loss_q2"] == 1 and "loss_q1" not in logs  # quarters: of the user's own, all at 0.3 here


class Ranks:
    """Two ranks of an accelerator: the other one's table comes after ours."""

    def __init__(self, other):
        self.other = other

    def pad_across_processes(self, table, *, pad_index):
        return torch.cat([table, torch.full((1, table.shape[1]), float(pad_index))])

    def gather(self, table):
        return torch.cat([table, self.other])


def test_means_are_of_all_ranks():
    log = LossLog(np.array([False, True, True]))
    log.note(torch.tensor([2.0, 8.0]), torch.tensor([0.1, 0.9]), torch.tensor([0, 2]), 1)
    other = torch.tensor([[4.0, 0.1, 0.0], [6.0, 0.6, 1.0], [-1.0, -1.0, -1.0]])
    means = log.means(Ranks(other), 1.0)
    assert means == {"loss_q1": 3.0, "instance_loss": 3.0, "prior_loss": 7.0}
    assert log.means(Ranks(other), 1.0) == {}


def test_evaluation_does_not_see_it(tmp_path, folders, family):
    train, held_out = load(folders, eval_fraction=0.4, prior_loss_weight=3.0)
    plain, plain_held_out = load(folders, eval_fraction=0.4, prior_dataset_dir=None)
    one = make_trainer(tmp_path / "a", family, train, held_out, **LONGER).evaluate()
    other = make_trainer(tmp_path / "b", family, plain, plain_held_out, **LONGER).evaluate()
    assert one["eval_loss"] == other["eval_loss"] and one["eval_gain"] == other["eval_gain"] == 0


def test_plan_and_card_count_it_apart(tmp_path, folders, family):
    train, held_out = load(folders, eval_fraction=0.3, prior_loss_weight=0.5)
    own = len(train) - 16
    trainer, _ = run(tmp_path, family, train, held_out, max_steps=1)
    text = sf.plan(trainer.model, family, trainer.args, train, held_out)
    expected = f"{own} samples to train on, {12 - own} held out, 16 of prior preservation with weight 0.5"
    assert expected in text
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for line in (
        f"| figures | {own} |",
        f"| held out | {12 - own} |",
        "| prior preservation | 16 figures, weight 0.5 |",
    ):
        assert line in card
    facts = json.loads((tmp_path / "run_facts.json").read_text())["dataset"]
    assert sum(facts["buckets"].values()) == facts["samples"] == own and "24x64" not in facts["buckets"]
    assert f"trained on {own} captioned figures" in card


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior_loss_weight": 0.5}, "`prior_loss_weight` 0.5 weighs nothing: .*`--prior_dataset_dir`"),
        ({"prior_dataset_dir": "b", "prior_loss_weight": -1.0}, "`prior_loss_weight` -1.0: at least 0"),
        ({"prior_dataset_dir": "b", "prior_loss_weight": float("nan")}, "`prior_loss_weight` nan"),
        ({"prior_dataset_dir": "b", "streaming": True}, "`prior_dataset_dir` does not go with `--streaming`"),
        ({"prior_dataset_dir": "x/../a"}, "`prior_dataset_dir` 'x/../a' is also in `--dataset_dir`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(SciflowError, match=words):
        DataArguments(dataset_dir=["a"], **options)


def test_a_prior_of_other_encoders_is_refused(tmp_path, folders, tiny_klein):
    settings = encoder_settings(tiny_klein) | {"family": "flux"}
    other = write_cache(tmp_path / "other", settings=settings, buckets=TINY_BUCKETS, seed=3)
    with pytest.raises(CacheError, match="not made with the same settings: `family` is 'flux2_klein' and 'flux'"):
        load((folders[0], other))
    with pytest.raises(CacheError, match="does not exist"):
        load((folders[0], tmp_path / "none"))


def test_the_log_says_how_often_it_comes(folders, caplog):
    with caplog.at_level(logging.INFO):
        load(folders)
    assert "16 samples of prior preservation: 1 times each an epoch." in caplog.text
    assert "12 samples to train on, 0 held out." in caplog.text


def test_quarters_of_the_noise_range_are_of_the_family():
    """DDPM's levels are timesteps: the quarters are of 0 to 1000, as they are without a prior."""
    levels, losses = torch.tensor([100.0, 300.0, 600.0, 900.0, 950.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    log = LossLog(prior=np.array([False, False, False, False, True]))
    log.note(losses, levels, torch.arange(5), 1)
    means = log.means(Accelerator(cpu=True), 1000.0)
    assert means == {
        "loss_q1": 1.0, "loss_q2": 2.0, "loss_q3": 3.0, "loss_q4": 4.0, "instance_loss": 2.5, "prior_loss": 9.0,
    }  # fmt: skip
