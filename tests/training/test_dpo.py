"""Training on comparisons: the loss by another way, its reference, exact resume, and what is refused."""

import dataclasses
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from faults import Memory
from preferences import PUBLISHED, dpo_trainer, first_batch, groups_of, moved, write_candidates
from safetensors.torch import load_file
from trainings import losses, same, trained

import sciflow_hf as sf
from sciflow_hf.diffusion.randomness import hash64, randn
from sciflow_hf.errors import SciflowError
from sciflow_hf.training.preferences import candidates, preference_metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_klein):
    return write_candidates(tmp_path_factory.mktemp("candidates") / "cache", tiny_klein)


@pytest.fixture(scope="module")
def pairs(folder):
    return groups_of(folder)


@pytest.fixture(scope="module")
def triples(folder):
    """Of each group the losers of two axes, and the worst of all."""
    return groups_of(folder, global_worst=True, **PUBLISHED)


class ByMode(sf.Flux2Klein):
    """Draws other noise in evaluation than in training, as a GPU does."""

    def draw_noise(self, keys, latents, *, training):
        return randn([hash64(int(key), str(training)) for key in keys], latents.shape)


@pytest.fixture(scope="module")
def by_mode(family):
    return ByMode(**{field.name: getattr(family, field.name) for field in dataclasses.fields(family)})


# ---- the loss, by single samples ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory, by_mode, triples):
    """A trainer whose adapter has values, a batch of two groups, and the losses of its candidates one by one."""
    options = dict(stratified_levels=True, gradient_accumulation_steps=2)  # levels depend on positions in the step of 4
    trainer = dpo_trainer(tmp_path_factory.mktemp("measured"), by_mode, triples, **options)
    moved(trainer.model.train(), 0.3)
    batch = first_batch(trainer)
    return trainer, batch, one_by_one(trainer, triples, batch)


def one_by_one(trainer, groups, batch, levels=None):
    """{network: losses (B, 1 + K)} with the network's gradients, of samples of the cache in batches of one."""
    family, args, model = trainer.family, trainer.args, trainer.model
    base = family.load_model(dtype=torch.float32)
    chosen = [groups.tuples[row] for row in batch["row"].tolist()]
    tokens = family.image_seq_len(family.clean_latents({"latents": batch["latents"][:, 0]}))
    if levels is None:
        keyed = {name: batch[name] for name in ("position", "step_key") if name in batch}
        levels = family.sample_levels(batch["noise_key"], args, tokens, keyed)
    found = {"policy": [], "reference": []}
    for i, item in enumerate(chosen):
        text = groups.cache[item.winner]["prompt_embeds"][None]
        for name, network in (("policy", model), ("reference", base)):
            for row in (item.winner, *item.losers):
                one = {"latents": groups.cache[row]["latents"][None], "prompt_embeds": text}
                clean = family.clean_latents(one)
                noise = family.draw_noise(batch["noise_key"][i : i + 1], clean, training=model.training)
                loss, _ = family.compute_loss(network, one, args, noise=noise, levels=levels[i : i + 1])
                found[name].append(loss)
    size = 1 + len(chosen[0].losers)
    return {name: torch.cat(losses).unflatten(0, (len(chosen), size)) for name, losses in found.items()}


def by_numpy(policy, reference, loss, beta, *, hard=False, worst=0.0):
    """The loss of each group in float64, written from the papers."""
    found = []
    for pi, ref in zip(policy.astype(np.float64), reference.astype(np.float64), strict=True):
        s = [(ref[0] - pi[0]) - (ref[k] - pi[k]) for k in range(1, len(pi))]
        each = [math.log1p(math.exp(-beta * v)) for v in s]
        if loss == "mdpo_contrastive":
            found.append(math.log(1 + sum(math.exp(-beta * v) for v in s)) / len(s))
        elif loss == "mdpo_adaptive":
            total = sum(math.exp(-beta * v) for v in s)
            found.append(sum(math.exp(-beta * v) / total * e for v, e in zip(s, each, strict=True)))
        elif loss == "mdpo_mean":
            weights = [math.exp((pi[k] - pi[0]) / 0.2) if hard else 1.0 for k in range(1, len(pi) - 1)]
            found.append(sum(w / sum(weights) * e for w, e in zip(weights, each[:-1], strict=True)) + worst * each[-1])
        else:
            found.append(sum(each) / len(each))
    return np.array(found)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dpo", {}),
        ("mdpo_contrastive", {}),
        ("mdpo_adaptive", {}),
        ("mdpo_mean", {}),
        ("mdpo_mean", {"preference_weights": "hard", "worst_weight": 0.3}),
        ("dpo", {"sft_weight": 2.0}),
    ],
)
@pytest.mark.parametrize("stratified", [False, True])
def test_the_loss_is_that_of_single_samples(measured, triples, monkeypatch, loss, options, stratified):
    """Noise and level are shared, the adapter is off in the reference, and the formula is the paper's."""
    trainer, batch, alone = measured
    for name, value in ({"preference_loss": loss, "preference_beta": 20.0} | options).items():
        monkeypatch.setattr(trainer.args, name, value)
    if not stratified:
        monkeypatch.setattr(trainer.args, "stratified_levels", False)
        alone = one_by_one(trainer, triples, batch)
    with torch.no_grad():
        mean, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    policy, reference = (alone[name].detach().numpy() for name in ("policy", "reference"))
    hard, worst = options.get("preference_weights") == "hard", options.get("worst_weight", 1.0)
    expected = by_numpy(policy, reference, loss, 20.0, hard=hard, worst=worst)
    expected = expected + options.get("sft_weight", 0.0) * 20.0 / 4 * policy[:, 0]
    tolerance = 64 * EPS * 20.0 * policy.max()
    np.testing.assert_allclose(found["loss"].numpy(), expected, rtol=0, atol=tolerance)
    assert mean == found["loss"].mean() and len(set(found["levels"].tolist())) == 2
    changed = by_numpy(policy[:, [1, 0, 2, 3]], reference[:, [1, 0, 2, 3]], loss, 20.0, hard=hard, worst=worst)
    assert np.abs(changed - expected).min() > 100 * tolerance, "a winner that is taken for a loser would not be seen"


def test_the_gradient_is_that_of_the_policy_alone(measured, monkeypatch):
    trainer, batch, alone = measured
    monkeypatch.setattr(trainer.args, "preference_beta", 20.0)
    gained = alone["reference"].detach() - alone["policy"]
    expected = torch.nn.functional.softplus(-20.0 * (gained[:, :1] - gained[:, 1:])).mean()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(expected, list(parameters.values()), retain_graph=True)
    found = torch.autograd.grad(trainer.compute_loss(trainer.model, batch), list(parameters.values()))
    largest = max(float(g.abs().max()) for g in wanted)
    for name, ours, theirs in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2000 * EPS * largest, msg=name)
    assert all(p.requires_grad for p in parameters.values()), "the adapter is on again"
    assert not trainer.candidate_losses(trainer.model, batch)[1].requires_grad


def test_at_the_start_the_loss_is_log_2_and_its_slope_half_of_beta(tmp_path, by_mode, pairs):
    trainer = dpo_trainer(tmp_path, by_mode, pairs)
    batch = first_batch(trainer)
    for network in (trainer.model.train(), trainer.model.eval()):
        _, found = trainer.compute_loss(network, batch, return_outputs=True)
        assert (found["loss"] == np.float32(math.log(2))).all()
    losses = torch.rand(3, 2, dtype=torch.float64)
    policy = losses.clone().requires_grad_()
    trainer.group_losses(policy, losses).sum().backward()
    np.testing.assert_allclose(policy.grad, [[1000.0, -1000.0]] * 3, rtol=1e-12)  # -beta/2 of s


def test_one_axis_is_dpo(tmp_path, family, pairs, monkeypatch):
    trainer = dpo_trainer(tmp_path, family, pairs, preference_beta=20.0)
    moved(trainer.model, 0.3)
    batch = first_batch(trainer)
    found = {}
    for loss in ("dpo", "mdpo_contrastive", "mdpo_adaptive", "mdpo_mean"):
        monkeypatch.setattr(trainer.args, "preference_loss", loss)
        found[loss] = float(trainer.compute_loss(trainer.model, batch))
    assert max(found.values()) - min(found.values()) <= 8 * EPS * found["dpo"] and abs(found["dpo"] - math.log(2)) > 0.1


def test_candidates_of_a_batch():
    batch = {
        "latents": torch.arange(6.0).reshape(2, 3, 1, 1, 1), "prompt_embeds": torch.tensor([[[7.0]], [[8.0]]]),
        "noise_key": torch.tensor([1, 2]), "captions": ["a", "b"], "with_worst": torch.tensor([True, False]),
    }  # fmt: skip
    flat, size = candidates(batch)
    assert size == 3 and "with_worst" not in flat
    assert flat["latents"].flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert flat["prompt_embeds"].flatten().tolist() == [7, 8] * 3
    assert flat["noise_key"].tolist() == [1, 2] * 3 and flat["captions"] == ["a", "b"] * 3


# ---- the reference ----


def starts_at_log_2(trainer):
    batch = first_batch(trainer)
    trainer.model.train()
    first = float(trainer.compute_loss(trainer.model, batch))
    moved(trainer.model, 0.3)
    return first, float(trainer.compute_loss(trainer.model, batch))


def test_another_network_in_evaluation_mode_sees_the_same_noise(tmp_path, by_mode, pairs):
    reference = by_mode.load_model(dtype=torch.float32)
    trainer = dpo_trainer(tmp_path, by_mode, pairs, reference=reference, stratified_levels=True)
    assert not trainer.reference_model.training and not any(p.requires_grad for p in reference.parameters())
    first, then = starts_at_log_2(trainer)
    assert first == np.float32(math.log(2)) and abs(then - first) > 0.1
    # It is the reference, and not the network with its adapter switched off.
    with torch.no_grad():
        next(trainer.reference_model.parameters()).mul_(1.5)
    assert abs(float(trainer.compute_loss(trainer.model, first_batch(trainer))) - then) > 0.1


@pytest.mark.parametrize("kind", [{"adapter_type": "dora"}, {"adapter_type": "lokr"}, {"init_lora_weights": "pissa"}])
def test_other_adapters_begin_as_their_reference(tmp_path, family, pairs, kind):
    """As near as float32 rounds: an adapter that is on adds its zero, or scales by one."""
    adapter = {"rank": 4} | ({} if kind.get("adapter_type") == "lokr" else {"lora_alpha": 4}) | kind
    trainer = dpo_trainer(tmp_path, family, pairs, adapter=adapter, preference_beta=20.0)
    loss = float(trainer.compute_loss(trainer.model.train(), first_batch(trainer)))
    assert abs(loss - math.log(2)) < 1e4 * EPS
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * p.requires_grad)
    assert abs(float(trainer.compute_loss(trainer.model, first_batch(trainer))) - loss) > 1e-3


def test_a_loaded_adapter_is_its_own_reference(tmp_path, family, pairs):
    """Where training continues a LoRA, the reference is the network with that LoRA."""
    before = dpo_trainer(tmp_path / "before", family, pairs)
    moved(before.model, 0.3)
    before.save_model(tmp_path / "before")
    adapter = {"adapter_path": str(tmp_path / "before")}
    trainer = dpo_trainer(tmp_path / "after", family, pairs, adapter=adapter)
    start = trained(trainer)
    trainer.compute_loss(trainer.model.train(), first_batch(trainer)).backward()
    gradients = [p.grad.abs().max() for p in trainer.model.parameters() if p.requires_grad]
    assert max(gradients) > 1, "were the gradient through the reference, too, it would be 0 here"
    first, then = starts_at_log_2(trainer)
    assert first == np.float32(math.log(2)) and then == first  # `moved` gives the same values again
    moved(trainer.model, 0.4)
    assert abs(float(trainer.compute_loss(trainer.model, first_batch(trainer))) - first) > 0.1
    assert not same(trained(trainer), start), "the values of training are back after the reference"
    new = dpo_trainer(tmp_path / "new", family, pairs)
    assert new._identity()["reference"] == "as training begins" != trainer._identity()["reference"]


def test_all_weights_with_a_frozen_copy(tmp_path, family, pairs):
    options = dict(adapter={"no_adapter": True}, learning_rate=1e-5, max_steps=3)
    args = sf.PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    reference = sf.load_reference(family, args, trained=True)
    trainer = dpo_trainer(tmp_path / "a", family, pairs, reference=reference, **options)
    copy = {name: p.clone() for name, p in reference.named_parameters()}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=EPS) and len(set(losses(trainer))) == 3
    assert same(copy, dict(reference.named_parameters())) and not same(copy, dict(trainer.model.named_parameters()))
    # A run's own result is a reference, too; so is a pipeline.
    trainer.save_model(tmp_path / "result")
    args = dataclasses.replace(args, reference_model=str(tmp_path / "result"))
    again = sf.load_reference(family, args, trained=True)
    assert same(dict(again.named_parameters()), dict(trainer.model.named_parameters()))
    with pytest.raises(SciflowError, match="`reference_model` is missing: all weights are trained"):
        dpo_trainer(tmp_path / "b", family, pairs, **options)


def test_a_copy_in_16_bit_computes_as_the_network(tmp_path, family, pairs):
    """Under autocast: a margin of rounding alone would be taken for a preference, 2000 times as strong."""
    options = dict(bf16=True, adapter={"no_adapter": True}, learning_rate=1e-6, max_steps=1)
    args = sf.PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    reference = sf.load_reference(family, args, trained=True)
    sizes = [p.numel() for p in reference.parameters() if p.dtype == torch.bfloat16]
    assert sum(sizes) > 0.9 * sum(p.numel() for p in reference.parameters())
    trainer = dpo_trainer(tmp_path, family, pairs, reference=reference, **options)
    trainer.train()
    assert losses(trainer) == [pytest.approx(math.log(2), rel=EPS)] and trainer.state.log_history[0]["margin"] == 0.0


def test_a_reference_of_other_shapes(tmp_path, family, pairs):
    network = family.load_model(dtype=torch.float32)
    network.proj_out = torch.nn.Linear(8, 8)
    with pytest.raises(SciflowError, match=r"`reference_model`: proj_out.bias has the shape \(8,\) there and "):
        dpo_trainer(tmp_path, family, pairs, reference=network)


# ---- steps ----


def test_a_group_is_never_cut(tmp_path, family, triples, caplog):
    """Out of memory with 4 groups of 4 candidates: parts are of groups, and the weights are the same."""
    options = dict(per_device_train_batch_size=4, optim="sgd", learning_rate=1e-4, max_steps=2, preference_beta=20.0)
    whole = dpo_trainer(tmp_path / "whole", family, triples, **options)
    whole.train()
    parts = dpo_trainer(tmp_path / "parts", family, triples, **options)
    start, memory = trained(parts), Memory(parts, 4)
    parts.train()
    assert memory.passes and set(memory.passes) <= {4, 8, 16} and parts._micro_batches.largest == 1
    moved_by = max(float((trained(whole)[name] - value).abs().max()) for name, value in start.items())
    for name, value in trained(whole).items():
        torch.testing.assert_close(trained(parts)[name], value, rtol=0, atol=1e-4 * moved_by)
    noted = [[e[name] for name in ("margin", "right_orders", "winner_ratio")] for e in parts.state.log_history[:2]]
    expected = [[e[name] for name in ("margin", "right_orders", "winner_ratio")] for e in whole.state.log_history[:2]]
    np.testing.assert_allclose(noted, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", [{"ema_decay": 0.9}, {"adapter_type": "dora"}], ids=["ema", "dora"])
def test_resume_is_exact(tmp_path, family, triples, more):
    """6 steps = 3 steps, resume, 3 steps, with accumulation: weights, average, losses and metrics."""
    train, held_out = triples.split(0.3)
    options = dict(
        save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3,
        preference_loss="mdpo_contrastive", sft_weight=1.0,
    ) | more  # fmt: skip
    whole = dpo_trainer(tmp_path / "whole", family, train, held_out, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = dpo_trainer(tmp_path / "again", family, train, held_out, resume_from_checkpoint="latest", **options)
    again.train()
    assert same(trained(whole), trained(again)) and losses(whole) == losses(again)
    metrics = [[e for e in t.state.log_history if "eval_margin" in e] for t in (whole, again)]
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert [{k: v for k, v in e.items() if k not in timed} for e in metrics[0]] == [
        {k: v for k, v in e.items() if k not in timed} for e in metrics[1]
    ]
    whole.save_model(tmp_path / "one")
    again.save_model(tmp_path / "two")
    name = "pytorch_lora_weights.safetensors"
    assert same(*(load_file(tmp_path / folder / name) for folder in ("one", "two")))


def test_accumulation_takes_the_same_steps(tmp_path, family, pairs):
    found = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = dpo_trainer(
            tmp_path / str(size), family, pairs, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            optim="sgd", learning_rate=1e-4, max_steps=2, preference_beta=20.0, max_grad_norm=0,
        )  # fmt: skip
        start = trained(trainer)
        trainer.train()
        found.append({name: value - start[name] for name, value in trained(trainer).items()})
    largest = max(float(v.abs().max()) for v in found[0].values())
    assert largest > 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-4 * largest)


# ---- evaluation ----


def test_evaluation_is_by_group_and_compares_with_the_reference(tmp_path, family, triples):
    """Against single samples on the same grid; batch size and order of the groups change nothing."""
    options = dict(eval_levels=3, preference_beta=20.0, per_device_eval_batch_size=3)
    trainer = dpo_trainer(tmp_path / "a", family, triples, triples, **options)
    moved(trainer.model, 0.3).eval()
    metrics = trainer.evaluate()
    policy, reference = [], []
    for level_number, level in enumerate(family.evaluation_levels(3)):
        keys = [hash64(hash64(item.group, "evaluation"), level_number) for item in triples.tuples]
        columns = {"policy": [], "reference": []}
        for row in range(len(triples)):
            signed = keys[row] - (1 << 64) * (keys[row] >> 63)
            batch = {"row": torch.tensor([row]), "noise_key": torch.tensor([signed])}
            batch["latents"] = triples[row]["latents"][None]
            with torch.no_grad():
                alone = one_by_one(trainer, triples, batch, levels=level[None])
            for name, found in alone.items():
                columns[name].append(found[0].numpy())
        policy.append(columns["policy"])
        reference.append(columns["reference"])
    pi, ref = (np.array(values, np.float64).transpose(1, 0, 2) for values in (policy, reference))  # (N, 3, 1 + K)
    s = (ref[..., :1] - pi[..., :1]) - (ref[..., 1:] - pi[..., 1:])
    tolerance = 64 * EPS * pi.max()
    assert metrics["eval_margin"] == pytest.approx(s.mean(), abs=tolerance)
    assert metrics["eval_right_orders"] == pytest.approx((s.mean(1) > 0).mean())
    assert metrics["eval_winner_ratio"] == pytest.approx(pi[..., 0].sum() / ref[..., 0].sum(), rel=64 * EPS)
    assert metrics["eval_loser_ratio"] == pytest.approx(pi[..., 1:].sum() / ref[..., 1:].sum(), rel=64 * EPS)
    for number, axis in enumerate(triples.tuples[0].axes):
        assert metrics[f"eval_right_orders_{axis}"] == pytest.approx((s.mean(1)[:, number] > 0).mean())
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-20.0 * s)).mean(), abs=20 * tolerance)
    assert metrics["eval_base_loss"] == pytest.approx(math.log(2), rel=EPS)
    assert metrics["eval_gain"] == pytest.approx(metrics["eval_base_loss"] - metrics["eval_loss"])
    other = dpo_trainer(tmp_path / "b", family, triples, triples.select(range(len(triples))[::-1]), **options)
    other.args.per_device_eval_batch_size = 1
    moved(other.model, 0.3)
    again = other.evaluate()
    for name in ("eval_margin", "eval_loss", "eval_winner_ratio"):
        assert again[name] == pytest.approx(metrics[name], abs=20 * tolerance), name


def test_metrics_of_a_table():
    """Two axes of which some groups have one, ties, and intervals once there are ten groups."""
    rng = np.random.default_rng(0)
    table = rng.uniform(0.5, 1.0, (12, 4, 3, 2))
    table[:4, :, 2] = np.nan  # these have one loser
    table[4, :, :, 0] = table[4, :, :, 1]  # nothing gained
    axes = [("text",)] * 4 + [("component", "text")] * 8
    levels, groups = np.array([0.1, 0.4, 0.6, 0.9]), [str(i) for i in range(12)]
    found = preference_metrics(table, levels, groups, axes)
    gained = table[..., 1] - table[..., 0]
    s = gained[:, :, :1] - gained[:, :, 1:]
    each = [s[i, :, : len(axes[i])].mean(0) for i in range(12)]
    share = [np.mean([1.0 if v > 0 else 0.5 if v == 0 else 0.0 for v in values]) for values in each]
    assert found["right_orders"] == pytest.approx(np.mean(share))
    assert found["margin"] == pytest.approx(np.mean([values.mean() for values in each]))
    of_text = [each[i][axes[i].index("text")] for i in range(12)]
    assert found["margin_text"] == pytest.approx(np.mean(of_text))
    assert found["margin_component"] == pytest.approx(np.mean([each[i][0] for i in range(4, 12)]))
    assert found["right_orders_low"] < found["right_orders"] < found["right_orders_high"]
    assert "right_orders_component_low" not in found, "eight groups are too few"
    winner = table[:, :, 0]
    assert found["winner_ratio"] == pytest.approx(winner[..., 0].sum() / winner[..., 1].sum())
    assert found["winner_ratio_low"] < found["winner_ratio"] < found["winner_ratio_high"]
    for q in range(4):
        right = [(np.sign(s[i, q, : len(axes[i])]) + 1).mean() / 2 for i in range(12)]
        assert found[f"right_orders_q{q + 1}"] == pytest.approx(np.mean(right))


# ---- the guard ----


@pytest.mark.parametrize("logging_steps", [4, 20], ids=["at a log", "before a checkpoint"])
def test_a_run_whose_winners_drift_stops_and_keeps_its_last_good_checkpoint(tmp_path, family, pairs, logging_steps):
    """Though each step is saved and one checkpoint kept: what is over the limit is not saved."""
    trainer = dpo_trainer(
        tmp_path, family, pairs, max_winner_drift=1.05, learning_rate=1e-1, max_steps=20, save_strategy="steps",
        save_steps=1, logging_steps=logging_steps, save_total_limit=1, per_device_train_batch_size=4,
    )  # fmt: skip
    with pytest.raises(SciflowError, match=r"the winners' loss is \d+\.\d+ times that of the reference at step \d+"):
        trainer.train()
    stopped = trainer.state.global_step
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{stopped - 1}"] and 4 <= stopped < 20


def test_the_guard_needs_some_groups(tmp_path, family, pairs):
    trainer = dpo_trainer(tmp_path, family, pairs, max_winner_drift=1.1)
    trainer._check_drift(np.array([[2.0, 1.0]] * 15))
    with pytest.raises(SciflowError, match=r"is 2\.000 times that of the reference"):
        trainer._check_drift(np.array([[2.0, 1.0]] * 16))
    trainer._check_drift(np.array([[1.1, 1.0]] * 15 + [[0.9, 1.0]]))


# ---- what does not go ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "huber"}, "`loss_type` huber does not go with preferences"),
        ({"preference_weights": "hard"}, "`preference_weights` hard is for `--preference_loss mdpo_mean`"),
        ({"worst_weight": 0.5}, "`worst_weight` 0.5 is for"),
        ({"preference_beta": 0.0}, "`preference_beta` 0.0: a"),
        ({"max_winner_drift": -1.0}, "`max_winner_drift` -1.0"),
        ({"preference_loss": "ipo"}, "`preference_loss` 'ipo': use one of dpo"),
    ],
)
def test_options_that_do_not_go(tmp_path, family, pairs, options, message):
    with pytest.raises(SciflowError, match=message):
        dpo_trainer(tmp_path, family, pairs, **options)


def test_objectives_that_compare_something_else(tmp_path, family, pairs):
    for name in ("precondition_outputs", "learn_sigma"):
        other = dataclasses.replace(family)
        vars(other)[name] = True
        with pytest.raises(SciflowError, match=f"`{name}` does not go with preferences"):
            dpo_trainer(tmp_path, other, pairs)


def test_plain_arguments_and_plain_data_are_refused(tmp_path, family, folder, pairs):
    model = sf.add_adapter(family.load_model(dtype=torch.float32), sf.AdapterArguments(rank=4), family=family)
    args = sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(SciflowError, match="`args` is a `DiffusionTrainingArguments`: give"):
        sf.DiffusionDPOTrainer(model, args, family=family, train_dataset=pairs)
    rows = [{k: v for k, v in pairs.cache[i].items() if k != "txt_ids"} for i in (0, 2)]
    with pytest.raises(SciflowError, match="the data has no groups of candidates: `latents` of a batch are"):
        dpo_trainer(tmp_path, family, rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_reward_gap": 0.3}, ["tuples.min_reward_gap: 0.2 then, 0.3 now"]),
        ({"select": range(8)}, ["data: "]),
        ({"reference_model": True}, ["reference: 'as training begins' then, 'tiny' now"]),
    ],
    ids=["threshold", "tuples", "reference"],
)
def test_a_resumed_run_compares_as_before(tmp_path, tiny_klein, family, folder, change, words):
    options = dict(save_strategy="steps", save_steps=2, max_steps=2)
    groups = groups_of(folder, min_reward_gap=0.2)
    dpo_trainer(tmp_path, family, groups, **options).train()
    reference = None
    if "select" in change:
        groups = groups.select(change["select"])
    elif "reference_model" in change:
        options |= {"reference_model": str(tiny_klein)}
        reference = family.load_model(dtype=torch.float32)
    else:
        groups = groups_of(folder, **change)
    options |= {"resume_from_checkpoint": "latest", "max_steps": 4}
    trainer = dpo_trainer(tmp_path, family, groups, reference=reference, **options)
    with pytest.raises(SciflowError, match="belongs to another run") as error:
        trainer.train()
    assert all(word in str(error.value) for word in words)


# ---- streams of groups ----


class Endless(torch.utils.data.IterableDataset):
    """Groups one after another, as a user's own stream gives them."""

    def __init__(self, groups):
        self.groups = groups

    def __iter__(self):
        for i in range(len(self.groups)):
            yield {name: value for name, value in self.groups[i].items() if name != "txt_ids"}


def test_a_stream_of_groups_is_trained_on(tmp_path, family, pairs):
    """Of one bucket and in its order: the losses of the same groups by row."""
    one = pairs.select([i for i, key in enumerate(pairs.batch_keys) if key[:2] == (32, 48)])
    options = dict(train_sampling_strategy="sequential", max_steps=3)
    rows = dpo_trainer(tmp_path / "rows", family, one, **options)
    rows.train()
    stream = dpo_trainer(tmp_path / "stream", family, Endless(one), **options)
    stream.train()
    assert losses(rows) == losses(stream) and all(a != b for a, b in pairwise(losses(rows)))
