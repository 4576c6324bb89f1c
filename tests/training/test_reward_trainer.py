"""Training by rewards: the loss by another way, rollouts, exact resume, held-out rewards, and what is refused."""

import errno
import json
import math
import signal
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from reward_runs import Fault, alike, bright, dark, mean, prompts, reward_trainer, rollout_logs, wished
from trainings import losses, same, trained

import sciflow_hf as sf
from sciflow_hf.adapters.layers import adapter_parameters
from sciflow_hf.adapters.values import with_values
from sciflow_hf.errors import DiskFullError, Preempted, SciflowError
from sciflow_hf.training import rollouts
from sciflow_hf.training.reward_prompts import Prompts, prompts_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True, scope="module")
def encoders_once():
    """Text encoders are loaded once for all trainers, which share the family."""
    with pytest.MonkeyPatch.context() as patch:
        load, cache = rollouts.Painter.encoders.func, {}
        patch.setattr(
            rollouts.Painter,
            "encoders",
            property(lambda self: cache.get(self.family.source) or cache.setdefault(self.family.source, load(self))),
        )
        yield


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def stop():
    raise Stopped


# ---- the loss, by single images ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory, family):
    """A trainer after a rollout of two sizes, whose policy has left the old one, and a batch of four images."""
    data = prompts(4, sizes=((32, 48), (48, 32)))
    options = dict(per_device_train_batch_size=8, kl_weight=0.3, stratified_levels=True, nft_beta=0.4)
    trainer = reward_trainer(tmp_path_factory.mktemp("measured"), family, data, rewards=[wished], **options)
    perturb(trainer, 0.05, 1)
    trainer.begin_rollout(0)
    perturb(trainer, 0.2, 2)
    trainer.model.train()
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def perturb(trainer, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(trainer.model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def one_by_one(trainer, batch, network):
    """Velocity and target of each image by a network without wrappers, in batches of one, and their levels."""
    family, args, found = trainer.family, trainer.args, []
    for i, sample in enumerate(batch["samples"]):
        one = {"latents": sample["latents"][None], "prompt_embeds": sample["prompt_embeds"][None]}
        clean = family.clean_latents(one)
        keys = {name: batch[name][i : i + 1] for name in ("position", "step_key")}
        noise = family.draw_noise(batch["noise_key"][i : i + 1], clean, training=True)
        level = family.sample_levels(batch["noise_key"][i : i + 1], args, family.image_seq_len(clean), keys)
        noisy = (1 - level) * clean + level * noise
        found.append((family.predict(network, one, noisy, level)[0], (noise - clean)[0], level))
    return found


def test_the_loss_is_that_of_single_images(measured):
    """Policy, old policy and reference are the networks they should be, on the same noise and level, of two sizes."""
    trainer, batch = measured
    assert len({sample["latents"].shape for sample in batch["samples"]}) == 2 and len(batch["samples"]) == 8
    base = trainer.family.load_model(dtype=torch.float32)
    policy = one_by_one(trainer, batch, trainer.model)
    with with_values(trainer.model, trainer._old), torch.no_grad():
        old = one_by_one(trainer, batch, trainer.model)
    with torch.no_grad():
        reference = one_by_one(trainer, batch, base)
    mean_loss, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = []
    for (v, u, level), (v_old, *_), (v_ref, *_), sample in zip(policy, old, reference, batch["samples"], strict=True):
        r, terms = min(max(float(sample["advantage"]), -5), 5) / 10 + 0.5, []
        for good, share in ((v_old + 0.4 * (v - v_old), r), (v_old - 0.4 * (v - v_old), 1 - r)):
            error = level * (good - u)
            terms.append(share * error.square().mean() / error.abs().mean().detach() / 0.4)
        expected.append(5 * sum(terms) + 0.3 * (v - v_ref).square().mean())
    expected = torch.stack(expected)
    tolerance = 200 * EPS * float(expected.detach().max())
    torch.testing.assert_close(found["loss"], expected, rtol=0, atol=tolerance)
    assert mean_loss == found["loss"].mean()
    torch.testing.assert_close(found["levels"], torch.cat([level for *_, level in policy]), rtol=0, atol=0)
    parameters = list(adapter_parameters(trainer.model).values())
    ours = torch.autograd.grad(mean_loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.mean(), parameters, allow_unused=True)
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=2000 * EPS * largest)
    assert all(p.requires_grad for p in parameters), "the adapter is on again"
    # and each of the three networks matters
    for name, one, other in (("old", old, policy), ("reference", reference, old)):
        assert max(float((a[0] - b[0]).abs().max()) for a, b in zip(one, other, strict=True)) > 0.01, name


def test_what_is_noted_of_a_batch(measured):
    trainer, batch = measured
    _, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss, kl, away = found["numbers"].T
    torch.testing.assert_close(found["loss"].detach(), loss + 0.3 * kl, rtol=4 * EPS, atol=0)
    assert (kl > 0).all() and (away > 0).all()


@pytest.mark.parametrize("more", [{}, {"adapter_type": "dora"}, {"init_lora_weights": "pissa"}])
def test_the_gradient_begins_at_nothing_for_equal_rewards(tmp_path, family, more, monkeypatch):
    """With r = 1/2 at the old policy, to rounding; and the reference is the network without its adapter."""
    trainer = reward_trainer(tmp_path, family, **more)
    trainer.begin_rollout(0)
    monkeypatch.setattr(trainer, "_advantages", torch.zeros_like(trainer._advantages))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    _, found = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert found["numbers"][:, 2].max() == 0 and found["numbers"][:, 1].max() < 1e3 * EPS**2
    parameters = list(adapter_parameters(trainer.model).values())
    gradients = torch.autograd.grad(found["loss"].sum(), parameters, allow_unused=True)
    usual = torch.autograd.grad(found_with(trainer, batch, 1.0), parameters, allow_unused=True)
    largest = max(float(g.abs().max()) for g in usual if g is not None)
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e3 * EPS * largest


def found_with(trainer, batch, advantage):
    for sample in batch["samples"]:
        sample["advantage"] = torch.tensor(advantage)
    return trainer.compute_loss(trainer.model, batch)


def test_a_loaded_adapter_is_the_reference_and_the_first_policy(tmp_path, family):
    first = reward_trainer(tmp_path / "first", family)
    first.train()
    first.save_model()
    trainer = reward_trainer(tmp_path / "second", family, adapter={"adapter_path": str(tmp_path / "first")})
    trainer.begin_rollout(0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    _, found = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert found["numbers"][:, 1:].max() == 0
    perturb(trainer, 0.1, 1)
    _, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert found["numbers"][:, 1].min() > 0


# ---- rollouts ----


def rollout_of(trainer):
    rollout = trainer._rollout
    return [rollout.sample(image)["latents"] for image in range(len(rollout.places))]


def test_a_rollout_is_what_the_pipeline_draws_with_the_old_policy(tmp_path, family):
    """Latents are those of `draw`, by seeds of the prompt and the number; and the network comes back as it was."""
    trainer = reward_trainer(tmp_path, family)
    perturb(trainer, 0.2, 1)
    trainer.begin_rollout(0)
    before, state = trained(trainer), torch.random.get_rng_state()
    perturb(trainer, 0.2, 2)
    moved = trained(trainer)
    trainer._rollout = None
    trainer.image_of(0)  # from the disk
    assert torch.equal(state, torch.random.get_rng_state()) and same(trained(trainer), moved)
    (draw, _), latents = trainer._rollout.draws, rollout_of(trainer)
    assert len(draw.images) == 4 and len({seed for _, seed in draw.images}) == 4
    with torch.no_grad(), with_values(trainer.model, trainer._old):
        pipeline = family.load_pipeline(trainer.model.eval())
        text = trainer.train_dataset[draw.rows[0]]["prompt"]
        encoded = family.encode_validation_prompts([text], device="cpu", dtype=torch.float32)
        expected, images = family.draw(
            pipeline, encoded[0], height=32, width=48, num_inference_steps=2, guidance_scale=1.0,
            generators=[torch.Generator().manual_seed(seed) for _, seed in draw.images],
        )  # fmt: skip
    assert torch.equal(torch.stack(latents[:4]), expected)
    assert [i.tobytes() for i in trainer._rollout.images(0)] == [i.tobytes() for i in images]
    assert all(torch.equal(value, trainer._old[name.replace("base_model.", "")]) for name, value in before.items())
    scores = json.loads((tmp_path / "rollouts" / "000000" / "scores_0000.json").read_text())["scores"]
    assert scores == {"dark": [1 - mean(image) for image in images]}


def test_every_prompt_comes_before_one_comes_again():
    data = prompts(7)
    order = [row for rollout in range(7) for row in data.of_rollout(5, rollout, 3)]
    assert all(sorted(order[turn * 7 : turn * 7 + 7]) == list(range(7)) for turn in range(3))
    assert order[:7] != order[7:14] and data.of_rollout(6, 0, 3) != order[:3]
    assert sorted(data.of_rollout(5, 0, 16)) == sorted([*range(7)] * 2 + order[14:16])


def test_held_out_prompts_are_chosen_by_their_text():
    data = Prompts([*prompts(40).rows, *prompts(40).rows])
    train, out = data.split(0.1)
    assert len(out) == 8 and len(train) == 72
    assert {row["prompt"] for row in train.rows}.isdisjoint(row["prompt"] for row in out.rows)
    assert {r["prompt"] for r in Prompts(data.rows[::-1]).split(0.1)[1].rows} == {r["prompt"] for r in out.rows}
    assert len(data.split(0.0)[1]) == 0


def test_the_old_policy_follows_after_each_rollout(tmp_path, family, monkeypatch):
    """By d old + (1 - d) policy; the images are the old policy's."""
    monkeypatch.setattr("sciflow_hf.training.rewards.old_policy_decay", lambda n, schedule: [None, 0.25, 0.5][n])
    trainer = reward_trainer(tmp_path, family, num_train_epochs=3)
    seen = []
    begin = trainer.begin_rollout

    def noting(number):
        before = {name: p.detach().clone() for name, p in adapter_parameters(trainer.model).items()}
        begin(number)
        seen.append((before, {name: value.clone() for name, value in trainer._old.items()}))

    trainer.begin_rollout = noting
    trainer.train()
    (start, old0), (now1, old1), (now2, old2) = seen
    assert same(start, old0)
    for name in start:
        torch.testing.assert_close(old1[name], 0.25 * old0[name] + 0.75 * now1[name])
        torch.testing.assert_close(old2[name], 0.5 * old1[name] + 0.5 * now2[name])
    assert any(not torch.equal(now1[name], start[name]) for name in start)


def test_it_learns_and_says_so(tmp_path, family):
    """Dark pages are rewarded: the reward of the rollouts grows, and that of held-out prompts with an interval."""
    options = dict(num_train_epochs=4, learning_rate=3e-2, kl_weight=0, eval_strategy="no")
    trainer = reward_trainer(tmp_path, family, held_out=prompts(12), watched=[bright], **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_reward_gain_low"] > 0 and metrics["eval_watched_bright_gain_high"] < 0
    assert metrics["eval_reward"] - metrics["eval_base_reward"] == pytest.approx(metrics["eval_reward_gain"])
    logs = rollout_logs(trainer)
    assert [entry["rollout"] for entry in logs] == list(range(4))
    assert all(entry["reward_std"] > 0 and entry["groups_without_spread"] == 0 for entry in logs)
    assert logs[-1]["reward"] > logs[0]["reward"]
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"policy_loss", "kl", "old_distance", "loss_q4"} & steps[-1].keys() >= {"policy_loss", "kl", "old_distance"}
    sheets = sorted(path.name for path in (tmp_path / "rollouts").glob("*.png"))
    assert len(sheets) == 4 and [p.name for p in (tmp_path / "rollouts").iterdir() if p.is_dir()] == ["000003"]


def test_the_baseline_learns_from_its_best_images_alone(tmp_path, family):
    trainer = reward_trainer(tmp_path, family, reward_algorithm="rft", kl_weight=0)
    trainer.begin_rollout(0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    _, found = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    better = torch.stack([sample["advantage"] for sample in batch["samples"]]) > 0
    assert ((found["loss"] > 0) == better).all()
    before = trained(trainer)
    trainer.train()
    assert len(losses(trainer)) == 8 and not same(trained(trainer), before)


def test_more_updates_than_images(tmp_path, family):
    """Seven steps of two on a rollout of eight images: some are seen twice, with other noise."""
    trainer = reward_trainer(tmp_path, family, updates_per_rollout=7, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 7
    seen = [image for batch in trainer.get_train_dataloader().sampler.batches() for image in batch]
    counts = np.bincount([row % 8 for row in seen], minlength=8)
    assert len(seen) == 14 and sorted(counts.tolist()) == [1, 1, 2, 2, 2, 2, 2, 2]


# ---- resume ----

RESUMED = dict(
    num_train_epochs=2, save_strategy="steps", save_steps=3, resume_from_checkpoint="latest", kl_weight=0.1,
    old_policy_decay="late",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, family):
    found = {}
    for name, more in VARIANTS.items():
        trainer = reward_trainer(tmp_path_factory.mktemp("whole"), family, held_out=prompts(2), **RESUMED | more)
        trainer.train()
        found[name] = trained(trainer), log_of(trainer)
    return found


VARIANTS = {
    "ema": {"ema_decay": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "dora": {"adapter_type": "dora", "old_policy_decay": "slow"},
}


def log_of(trainer):
    return [{n: v for n, v in e.items() if not n.startswith(("eval_", "train_"))} for e in trainer.state.log_history]


@pytest.mark.parametrize(
    ("variant", "where", "at"),
    [("ema", "draw", 4), ("ema", "update", 3), ("dora", "score", 4), ("dora", "update", 5)],
)  # fmt: skip
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_is_not(
    tmp_path, family, uninterrupted, monkeypatch, variant, where, at
):
    options = RESUMED | VARIANTS[variant]
    with monkeypatch.context() as patch:
        for owner, name in ((rollouts.Painter, "draw"), (rollouts.Rollout, "score")):
            patch.setattr(owner, name, getattr(owner, name))  # to be put back
        stopped = reward_trainer(tmp_path, family, held_out=prompts(2), **options)
        Fault(stop).put(stopped, where, at)
        with pytest.raises(Stopped):
            stopped.train()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").glob("*/draw_*")}
    again = reward_trainer(tmp_path, family, held_out=prompts(2), **options)
    again.train()
    weights, log = uninterrupted[variant]
    assert same(trained(again), weights) and log_of(again) == log
    kept = [path for path in drawn if path.is_file()]
    assert all(path.stat().st_mtime_ns == drawn[path] for path in kept), "images on disk are not drawn anew"


@pytest.mark.parametrize(
    ("variant", "where", "stops"),
    [
        ("ema", "draw", [(1, (1, 0), []), (1, (2, 0), [])]),
        ("ema", "draw", [(3, (1, 0), [3, 4]), (1, (2, 0), [3, 4])]),
        ("dora", "score", [(3, (2, 1), [3, 4])]),
    ],
)
def test_a_signal_is_answered_between_the_draws(
    tmp_path, family, uninterrupted, monkeypatch, caplog, variant, where, stops
):
    """The draw, or the score, under way is kept, and a step that no checkpoint has is saved, once."""
    options, rollout, written = RESUMED | VARIANTS[variant], tmp_path / "rollouts" / f"{stops[0][0] // 3:06d}", set()
    for at, kept, saved in stops:
        with monkeypatch.context() as patch:
            for owner, name in ((rollouts.Painter, "draw"), (rollouts.Rollout, "score")):
                patch.setattr(owner, name, getattr(owner, name))  # to be put back
            stopped = reward_trainer(tmp_path, family, held_out=prompts(2), **options)
            Fault(lambda: signal.raise_signal(signal.SIGTERM)).put(stopped, where, at)
            with pytest.raises(Preempted):
                stopped.train()
        assert f"SIGTERM: saved and stopped after step {max(saved, default=0)}" in caplog.text
        assert tuple(len(list(rollout.glob(f"{name}_*"))) for name in ("draw", "scores")) == kept
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in saved]
        written.add(tuple(path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-4")))
    assert len(written) == 1, "resumed there, it is not saved again"
    again = reward_trainer(tmp_path, family, held_out=prompts(2), **options)
    again.train()
    weights, log = uninterrupted[variant]
    assert same(trained(again), weights) and log_of(again) == log


def test_images_of_other_weights_or_options_are_drawn_anew(tmp_path, family):
    reward_trainer(tmp_path, family, num_train_epochs=1).train()
    file = tmp_path / "rollouts" / "000000" / "draw_0000.safetensors"
    first = file.read_bytes()
    same_again = reward_trainer(tmp_path, family, num_train_epochs=1)
    same_again.begin_rollout(0)
    assert file.read_bytes() == first
    other = reward_trainer(tmp_path, family, num_train_epochs=1, rollout_steps=3)
    other.begin_rollout(0)
    third = file.read_bytes()
    assert third != first
    perturb(other, 0.1, 1)
    other._forget()
    other.begin_rollout(0)
    assert file.read_bytes() != third


def test_other_rewards_are_refused_on_resume(tmp_path, family):
    options = RESUMED | {"num_train_epochs": 1}
    reward_trainer(tmp_path, family, **options).train()
    for change, word in (
        ({"rewards": [bright]}, "rewards.bright"),
        ({"reward_weights": [2.0]}, "rewards.dark: 1.0 then, 2.0 now"),
        ({"num_generations": 2}, "rollout: '2 prompts x 4 images"),
        ({"reward_algorithm": "rft"}, "reward_algorithm"),
    ):
        with pytest.raises(SciflowError, match="belongs to another run") as error:
            reward_trainer(tmp_path, family, **options | {"num_train_epochs": 2} | change).train()
        assert word in str(error.value)


# ---- rewards that fail ----


def broken(kind):
    """A reward that fails for every third image, or in every call."""

    def odd_one(prompts, images):
        found = [mean(image) for image in images]
        if kind == "raises":
            raise RuntimeError("the judge is away")
        if kind == "wrong length":
            return found[:-1] if len(found) > 1 else [*found, 1.0]
        bad = {"NaN": math.nan, "None": None, "text": "good", "often NaN": math.nan, "infinite": math.inf}[kind]
        return [bad if kind != "often NaN" or i % 3 == 0 else value for i, value in enumerate(found)]

    return odd_one


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", ["failed on all of 8 images", "RuntimeError: the judge is away"]),
        ("wrong length", ["failed on all", "it returned 2 scores for 1 image"]),
        ("NaN", ["failed on all", "it returned nan"]),
        ("infinite", ["failed on all", "it returned inf"]),
        ("text", ["failed on all", "it returned 'good', not a number"]),
        ("None", ["applies to none of 8 images"]),
    ],
)
def test_a_reward_that_fails_everywhere_ends_the_run_and_costs_no_image(tmp_path, family, kind, words):
    reward = broken(kind)
    with pytest.raises(SciflowError) as error:
        reward_trainer(tmp_path, family, rewards=[reward]).train()
    assert all(word in str(error.value) for word in ["`reward` odd_one", *words])
    drawn = {path: path.read_bytes() for path in (tmp_path / "rollouts" / "000000").glob("draw_*")}
    assert len(drawn) == 2
    if kind != "raises":
        return
    mended = reward_trainer(tmp_path, family, rewards=[dark], save_strategy="no")
    mended.begin_rollout(0)
    assert all(path.read_bytes() == data for path, data in drawn.items()), "only the scores are made anew"


def test_single_failures_are_counted_and_do_not_train(tmp_path, family, caplog):
    trainer = reward_trainer(tmp_path, family, rewards=[broken("often NaN")])
    trainer.train()
    assert (
        "`reward` odd_one failed on an image of" in caplog.text
        and "and on 3 more; these have no `reward`" in caplog.text
    )
    assert torch.isfinite(trainer._advantages).all() and (trainer._advantages == 0).sum() >= 4
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_a_reward_that_takes_too_long(tmp_path, family):
    released = []

    def slow(prompts, images):
        while not released:
            time.sleep(0.01)
        return [0.0] * len(images)

    with pytest.raises(SciflowError, match=r"`reward_timeout`: slow took longer than 0\.05 s for 4 images"):
        reward_trainer(tmp_path, family, rewards=[slow], reward_timeout=0.05).train()
    released.append(True)
    assert len(list((tmp_path / "rollouts" / "000000").glob("draw_*"))) == 2


def test_no_spread_in_any_group(tmp_path, family, caplog):
    with pytest.raises(SciflowError, match="in rollout 0 the rewards give all images of a prompt the same score"):
        reward_trainer(tmp_path / "first", family, rewards=[alike]).train()
    calls = []

    def soon_alike(prompts, images):
        calls.append(len(images))
        return [0.5] * len(images) if len(calls) > 2 else [mean(image) for image in images]

    trainer = reward_trainer(tmp_path / "then", family, rewards=[soon_alike])
    trainer.train()
    assert "in rollout 1 the rewards give all images" in caplog.text
    assert [entry["groups_without_spread"] for entry in rollout_logs(trainer)] == [0, 1]


def test_a_full_disk_in_a_rollout_is_named_and_costs_no_image(tmp_path, family, monkeypatch):
    write, count = rollouts.save_file, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(rollouts, "save_file", full)
    with pytest.raises(DiskFullError, match="rollouts/000000 could not be written, its disk is full"):
        reward_trainer(tmp_path, family).train()
    drawn = list((tmp_path / "rollouts" / "000000").glob("*draw_*"))
    assert [path.name for path in drawn] == ["draw_0000.safetensors"]
    monkeypatch.setattr(rollouts, "save_file", write)
    trainer = reward_trainer(tmp_path, family)
    trainer.train()
    assert trainer.state.global_step == 8


def test_a_file_of_another_rank_that_is_missing(tmp_path, family):
    trainer = reward_trainer(tmp_path, family)
    trainer.begin_rollout(0)
    (tmp_path / "rollouts" / "000000" / "draw_0001.safetensors").unlink()
    with pytest.raises(SciflowError, match=r"draw_0001.safetensors of another rank is not here"):
        trainer.image_of(7)


# ---- the held-out prompts ----


def test_a_watched_reward_stops_a_run_that_is_made_to_hack(tmp_path, family, caplog):
    """Black pages are paid for; their brightness is watched."""
    options = dict(num_train_epochs=4, learning_rate=3e-2, kl_weight=0, eval_strategy="epoch")
    trainer = reward_trainer(
        tmp_path, family, held_out=prompts(12), watched=[bright], stop_if_watched_falls=True, **options
    )
    with pytest.raises(SciflowError, match="`watch_rewards` bright has fallen from") as error:
        trainer.train()
    assert "with 95 % confidence" in str(error.value) and "are being hacked" in str(error.value)
    trainer.args.stop_if_watched_falls = False
    trainer.evaluate()
    assert "`--stop_if_watched_falls` would stop here" in caplog.text


def test_rewards_of_the_start_are_kept_and_measured_again_where_options_change(tmp_path, family, monkeypatch):
    options = RESUMED | {"num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    first = reward_trainer(tmp_path, family, held_out=prompts(2), **options)
    first.train()
    start = first.evaluate()["eval_base_reward"]
    measured = []
    evaluate = sf.training.rewards.held_out_scores
    monkeypatch.setattr(sf.training.rewards, "held_out_scores", lambda *args: measured.append(1) or evaluate(*args))
    second = reward_trainer(tmp_path, family, held_out=prompts(2), **options | {"num_train_epochs": 2})
    second.train()
    assert len(measured) == 1 and second.state.log_history[-2]["eval_base_reward"] == start
    measured.clear()
    third = reward_trainer(
        tmp_path, family, held_out=prompts(2), **options | {"num_train_epochs": 3, "validation_seeds": [1, 2]}
    )
    third.train()
    assert len(measured) == 2 and third.state.log_history[-2]["eval_base_reward"] != start


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_generations=1), "`num_generations` 1: at least 2. Images are compared with the others"),
        (dict(rewards=()), "`reward_funcs` is empty"),
        (dict(reward_weights=[1.0, 2.0]), "`reward_weights` has 2 values for 1 reward: give one each."),
        (dict(loss_type="huber"), "`loss_type` huber does not go with rewards"),
        (dict(weighting_scheme="cosmap"), "`weighting_scheme` cosmap does not go with rewards"),
        (dict(nft_beta=0.5, reward_algorithm="rft"), "`nft_beta` 0.5 is for `--reward_algorithm nft`"),
        (dict(rft_threshold=0.5), "`rft_threshold` 0.5 is for `--reward_algorithm rft`"),
        (dict(stop_if_watched_falls=True), "stops nothing without `watch_rewards`"),
        (dict(stop_if_watched_falls=True, watch_rewards=["blank"]), "stops nothing without held-out prompts"),
        (dict(figure_metrics=["chart"], validation_prompts=["a"]), "`figure_metrics`: evaluations draw the held-out"),
        (dict(updates_per_rollout=3), "`updates_per_rollout` 3: with 2 images a step these show 6 of the 8"),
        (dict(adapter={"no_adapter": True}), "would need three networks"),
    ],
)
def test_what_is_refused(tmp_path, family, options, words):
    with pytest.raises(SciflowError) as error:
        reward_trainer(tmp_path, family, **options)
    assert words in str(error.value)


def test_families_and_prompts_that_are_refused(tmp_path, family):
    args = sf.RewardTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    from sciflow_hf.demo import make_tiny

    sdxl = sf.SDXL(str(make_tiny(tmp_path / "sdxl", "sdxl", size="test")))
    for other, why in ((sdxl, "is trained by DDPM"), (sf.DiT(), "takes no prompts")):
        with pytest.raises(SciflowError, match=f"`family` {other.name} {why}"):
            sf.DiffusionRewardTrainer(None, args, family=other, train_dataset=prompts(), reward_funcs=[dark])
    with pytest.raises(SciflowError, match="`args` is a `DiffusionTrainingArguments`"):
        plain = sf.DiffusionTrainingArguments(str(tmp_path), use_cpu=True)
        sf.DiffusionRewardTrainer(None, plain, family=family, train_dataset=prompts())
    for rows, words in (
        ([], "holds no prompts"),
        ([{"prompt": "a", "height": 30}], "row 0: 30x1024 pixels"),
        ([{"prompt": "a", "source_images": ["x.png"]}], "`source_images` of an edit"),
    ):
        with pytest.raises(SciflowError, match=words):
            prompts_for(rows, family, (1024, 1024))
    with pytest.raises(SciflowError, match=r"`eval_fraction` 0\.9 holds out all"):
        prompts(1).split(0.9)


def test_too_few_held_out_prompts_to_stop_by(tmp_path, family):
    with pytest.raises(SciflowError, match="9 held-out prompts, and a fall is judged by an interval"):
        reward_trainer(tmp_path, family, held_out=prompts(9), watched=[bright], stop_if_watched_falls=True)


def test_prompts_fewer_than_ranks(tmp_path, family, monkeypatch):
    monkeypatch.setattr(sf.RewardTrainingArguments, "world_size", 3)
    monkeypatch.setattr(sf.RewardTrainingArguments, "total_batch", 2)
    with pytest.raises(SciflowError, match="`prompts_per_rollout` 2: fewer than the 3 processes"):
        reward_trainer(tmp_path, family)


def test_distilled_weights_get_a_warning(tmp_path, family, caplog, monkeypatch):
    monkeypatch.setitem(family.config(), "is_distilled", True)
    reward_trainer(tmp_path, family)
    assert "is distilled: rewards of distilled weights are outside the theory" in caplog.text


def test_several_rewards_have_columns_of_their_own(tmp_path, family):
    trainer = reward_trainer(tmp_path, family, held_out=prompts(2), rewards=[dark, wished], reward_weights=[1.0, 0.5],
                             num_train_epochs=1)  # fmt: skip
    trainer.train()
    (log,) = rollout_logs(trainer)
    assert log["reward"] == pytest.approx(log["reward_dark"] + 0.5 * log["reward_wished"])
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_reward_dark"] + 0.5 * metrics["eval_reward_wished"])
    assert "eval_reward_low" not in metrics, "two prompts have no interval"
    assert all(a != b for a, b in pairwise(losses(trainer)))


def test_accumulation_takes_the_same_steps(tmp_path, family):
    """1 x 4 = 4 x 1: the same images in every step, losses and weights to rounding."""
    found = []
    for size in (4, 1):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, num_train_epochs=1)
        trainer = reward_trainer(tmp_path / str(size), family, optim="sgd", learning_rate=1e-3, **options)
        trainer.train()
        found.append((losses(trainer), trained(trainer)))
    (one, weights), (other, theirs) = found
    assert len(one) == 2
    np.testing.assert_allclose(one, other, rtol=1000 * EPS)
    largest = max(float(value.abs().max()) for value in weights.values())
    assert max(float((weights[name] - theirs[name]).abs().max()) for name in weights) < 100 * EPS * largest
