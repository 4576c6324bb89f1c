"""`--stratified_levels`: in every optimizer step one noise level in each equal part of the density, on any split."""

import dataclasses
import math
from collections import defaultdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import encoder_settings, write_cache
from memory_cache import PATHS, make_rows, make_sampler, released
from trainings import LONGER, make_trainer

import sciflow_hf as sf
from sciflow_hf.data.batches.loader import BucketLoader
from sciflow_hf.data.stream.loader import StreamLoader
from sciflow_hf.data.stream.stream import StreamingCache
from sciflow_hf.diffusion.process import GivenSchedule, density, shift_sigmas, stratify
from sciflow_hf.diffusion.randomness import noise_keys, step_keys, uniform
from sciflow_hf.errors import SciflowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SPLITS = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4), (1, 4, 1)]  # batch x ranks x accumulation
FLOW = ("flux2_klein", "qwen_image", "sd3", "flux")


def options(**changes):
    """What a family reads of the options to draw levels."""
    plain = dict(stratified_levels=True, total_batch=4, weighting_scheme="none", timestep_shift="none", logit_mean=0.3,
                 logit_std=0.8, mode_scale=1.29)  # fmt: skip
    return SimpleNamespace(**(plain | changes))


def make_family(name):
    """A family that draws levels without its checkpoint."""
    family = sf.load_family(name)(pretrained_model_name_or_path="none")
    if name == "sdxl":
        family.__dict__["process"] = GivenSchedule(torch.linspace(1, 0, 1000), "epsilon")
    return family


def strata(levels, total):
    """Number of the equal part of [0, 1) that each level is in, sorted."""
    return sorted(math.floor(level * total) for level in levels)


# ---- the formula ----


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 64])
def test_one_number_in_each_part_of_every_step(total):
    """For every turn, also at the ends of what `uniform` gives; and as the formula in exact fractions."""
    rng, parts = np.random.default_rng(total), set()
    for step in range(100):
        positions = torch.arange(step * total, (step + 1) * total)
        jitter = torch.from_numpy(rng.random(total))
        jitter[step % total] = (0.0, 2.0**-53, 1 - 2.0**-53)[step % 3]
        key = int(rng.integers(-(2**63), 2**63))
        u = stratify(jitter, positions, torch.full((total,), key), total)
        assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
        exact = [Fraction(float(j)) + i + key for i, j in enumerate(jitter)]
        exact = [(value / total) % 1 for value in exact]
        np.testing.assert_allclose(u, [float(value) for value in exact], rtol=0, atol=1e-14)
        below = [v - 1e-14 * (j > 0.9) for v, j in zip(u.tolist(), jitter.tolist(), strict=True)]
        assert strata(below, total) == list(range(total))
        parts.add(math.floor(exact[0] * total))
    assert len(parts) > 0.6 * total  # every turn comes


def test_each_number_alone_is_uniform():
    """At every place of a step, the short last step of an epoch included: Kolmogorov-Smirnov at 0.1 %."""
    total, steps = 4, 4000
    turns = torch.cat([step_keys(0, epoch, range(0, 400 * total, total), total) for epoch in range(10)])
    expected = (np.arange(steps) + 0.5) / steps
    for place in range(total):
        keys = torch.cat([noise_keys(0, epoch, range(place, 400 * total, total)) for epoch in range(10)])
        u = stratify(uniform(keys, stream="level"), torch.full((steps,), place), turns, total).numpy()
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / math.sqrt(steps)  # from step to step
        assert np.abs(np.sort(u) - expected).max() < 1.95 / math.sqrt(steps)


def test_the_mean_over_a_step_varies_less():
    """Of a loss that depends on the level, with 8 samples a step: 3 % of the independent variance (by calculus)."""
    total, steps = 8, 2000
    positions = torch.arange(total * steps)
    independent = uniform(noise_keys(1, 0, positions.tolist()), stream="level")
    spread = stratify(independent, positions, step_keys(1, 0, positions.tolist(), total), total)

    def means(u):
        return (1 + torch.exp(-3 * u)).view(steps, total).mean(1).numpy()

    assert means(spread).var() == pytest.approx(0.03 * means(independent).var(), rel=0.15)
    assert abs(means(spread).mean() - means(independent).mean()) < 0.01


def test_a_step_has_one_key_of_its_own():
    keys = step_keys(5, 2, range(40, 60), 8).tolist()
    assert [keys[0]] * 8 == keys[:8] and [keys[8]] * 8 == keys[8:16] and keys[0] != keys[8] != keys[16]
    assert keys[0] == step_keys(5, 2, [47], 8).item()
    others = {step_keys(s, e, [40], 8).item() for s, e in ((5, 3), (4, 2))}
    assert len(others | {keys[0]}) == 3
    assert not set(keys) & set(noise_keys(5, 2, range(60)).tolist())  # no sample's noise


# ---- families ----


def batch_of(steps, total=4, seed=0):
    positions = torch.arange(steps * total)
    keys = noise_keys(seed, 0, positions.tolist())
    return keys, {"position": positions, "step_key": step_keys(seed, 0, positions.tolist(), total)}


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "cosmap"])
@pytest.mark.parametrize("shift", ["none", "3.0"])
@pytest.mark.parametrize("name", FLOW)
def test_every_density_is_cut_into_parts(name, scheme, shift):
    """The k-th level of a step lies between the density's k-th and (k+1)-th quartile."""
    args = options(weighting_scheme=scheme, timestep_shift=shift)
    keys, batch = batch_of(25)
    levels = make_family(name).sample_levels(keys, args, 24, batch=batch).view(25, 4)
    chosen = {"logit_mean": args.logit_mean, "logit_std": args.logit_std, "mode_scale": args.mode_scale}
    borders = density(torch.linspace(0, 1, 5, dtype=torch.float64), scheme, **chosen)
    borders = shift_sigmas(borders, 0.0 if shift == "none" else math.log(3)).float().sort().values
    for step in levels.sort(dim=1).values:
        assert (step >= borders[:-1] - 1e-6).all() and (step <= borders[1:] + 1e-6).all()
    assert levels.dtype == torch.float32 and len(set(levels[:, 0].tolist())) == 25


def test_sdxls_timesteps_fall_one_in_each_quarter():
    keys, batch = batch_of(50)
    timesteps = make_family("sdxl").sample_levels(keys, options(), 24, batch=batch)
    assert timesteps.dtype == torch.int64
    for step in timesteps.view(50, 4).tolist():
        assert sorted(t // 250 for t in step) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [*FLOW, "sdxl"])
def test_a_batch_without_positions_has_independent_levels(name):
    """As does one of a run without the option, whatever it holds."""
    family, (keys, batch) = make_family(name), batch_of(10)
    plain = family.sample_levels(keys, options(stratified_levels=False), 24)
    for given in (None, {}, {"position": batch["position"]}):
        assert torch.equal(family.sample_levels(keys, options(), 24, batch=given), plain)
    assert torch.equal(family.sample_levels(keys, options(stratified_levels=False), 24, batch=batch), plain)
    assert not torch.equal(family.sample_levels(keys, options(), 24, batch=batch), plain)


# ---- loaders ----


def levels_of(batches, total=4):
    """(position, level) of the samples of batches."""
    family, found = make_family("flux2_klein"), []
    for batch in batches:
        levels = family.sample_levels(batch["noise_key"], options(total_batch=total), 24, batch=batch)
        found += zip(batch["position"].tolist(), levels.tolist(), strict=True)
    return found


def steps_of(found, total=4):
    """Levels by step."""
    steps = defaultdict(list)
    for position, level in found:
        steps[position // total].append(level)
    return steps


@pytest.mark.parametrize("path", PATHS)
def test_batches_of_every_path_say_their_step(path):
    rows = make_rows()
    loader = BucketLoader(rows, make_sampler(rows, accumulation_steps=2), step_keys=True, **PATHS[path])
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in released(loader):
            assert torch.equal(batch["step_key"], step_keys(5, epoch, batch["position"].tolist(), 4))
    assert "step_key" not in next(released(BucketLoader(rows, make_sampler(rows), **PATHS[path])))


def test_levels_do_not_depend_on_the_split():
    """Six ways to 4 samples a step give every position the same level, two epochs long; tails, with fewer, the same."""
    rows, expected = make_rows(30), None  # three buckets of 10: two steps each, and a tail
    for size, ranks, accumulation in SPLITS:
        found = {}
        for rank in range(ranks):
            split = {"batch_size": size, "num_replicas": ranks, "accumulation_steps": accumulation, "rank": rank}
            loader = BucketLoader(rows, make_sampler(rows, **split), step_keys=True)
            for epoch in (0, 1):
                loader.set_epoch(epoch)
                for position, level in levels_of(released(loader)):
                    assert (epoch, position) not in found
                    found[epoch, position] = level
        expected = expected or found
        for place in found.keys() & expected.keys():
            assert found[place] == expected[place]
        full = {(e, p) for e in (0, 1) for p in range(24)}
        assert full <= found.keys() & expected.keys()
        for epoch in (0, 1):
            for levels in steps_of((p, level) for (e, p), level in found.items() if e == epoch).values():
                assert len(set(strata(levels, 4))) == len(levels) <= 4


@pytest.fixture(scope="module")
def stream_cache(tmp_path_factory, tiny_klein):
    buckets = {(32, 48): 9, (48, 32): 8, (24, 64): 4}
    return write_cache(tmp_path_factory.mktemp("stream"), settings=encoder_settings(tiny_klein), buckets=buckets)


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
def test_streams_are_stratified_alike(stream_cache, shuffle_buffer):
    stream = StreamingCache(stream_cache, dtype=torch.float32, shuffle_buffer=shuffle_buffer)
    expected, levels_of_row = None, defaultdict(list)
    for size, ranks, accumulation in ((4, 1, 1), (2, 2, 1), (1, 1, 4)):
        found = []
        for rank in range(ranks):
            split = {"batch_size": size, "num_replicas": ranks, "accumulation_steps": accumulation, "rank": rank}
            loader = StreamLoader(stream, seed=1, step_keys=True, threads=1, **split)
            batches = iter(loader)
            epochs, last = 0, -1
            while epochs < 3:
                batch = next(batches)
                epochs += int(batch["position"][0]) < last
                last = int(batch["position"][0])
                for row, place in zip(batch["row"].tolist(), levels_of([batch]), strict=True):
                    if epochs < 3:
                        found.append((epochs, *place))
                        levels_of_row[row].append(place[1])
            loader.close()
        for epoch in range(3):
            steps = steps_of((p, level) for e, p, level in found if e == epoch)
            assert len(steps) == 6 and all(strata(levels, 4) == [0, 1, 2, 3] for levels in steps.values())
        if size == 4:
            expected = sorted(found)
        elif size == 2:  # tails are filled up to whole batches, so they differ in their rows but not in their levels
            assert sorted(found) == expected
    # Without shuffling a row is at the same place every epoch, and sees other levels all the same: of 4 parts, 2.3.
    assert np.mean([len(set(strata(levels, 4))) for levels in levels_of_row.values()]) > 1.7


# ---- training ----


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_klein):
    folder = tmp_path_factory.mktemp("even")
    write_cache(folder, settings=encoder_settings(tiny_klein), buckets={(32, 48): 8, (48, 32): 4, (24, 64): 4})
    return sf.load_cache(folder, dtype=torch.float32)


def run(folder, family, cache, **options):
    """(losses of the log, levels by step) of two epochs of 4 steps with 4 samples each."""
    defaults = dict(
        LONGER, max_steps=8, optim="sgd", logging_steps=1, weighting_scheme="none", timestep_shift="none",
        stratified_levels=True,
    )  # fmt: skip
    family = dataclasses.replace(family)
    trainer, seen = make_trainer(folder, family, cache, **(defaults | options)), []
    step = family.compute_loss

    def spy(model, batch, args, **given):
        loss, levels = step(model, batch, args, **given)
        seen.extend(levels.tolist())
        return loss, levels

    family.compute_loss = spy
    trainer.train()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], np.array(seen).reshape(-1, 4)


def test_a_training_is_stratified_and_does_not_depend_on_micro_batches(tmp_path, family, cache):
    losses, levels = run(tmp_path / "4", family, cache, per_device_train_batch_size=4)
    assert len(losses) == 8 and [strata(step, 4) for step in levels] == [[0, 1, 2, 3]] * 8
    for size in (1, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        other_losses, other_levels = run(tmp_path / str(size), family, cache, **split)
        np.testing.assert_array_equal(other_levels, levels)
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    _, independent = run(tmp_path / "plain", family, cache, stratified_levels=False)
    assert [strata(step, 4) for step in independent] != [[0, 1, 2, 3]] * 8


def test_resumed_training_sees_the_same_levels(tmp_path, family, cache):
    losses, levels = run(tmp_path, family, cache, save_strategy="steps", save_steps=6)
    resumed = str(tmp_path / "checkpoint-6")
    again, last = run(tmp_path / "again", family, cache, resume_from_checkpoint=resumed)
    np.testing.assert_array_equal(last, levels[6:])
    assert again == losses


def test_total_batch_counts_accumulation(tmp_path):
    args = sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3, gradient_accumulation_steps=5
    )
    assert args.total_batch == 15 and not args.stratified_levels


def test_the_option_of_sdxl_is_still_checked():
    with pytest.raises(SciflowError, match="`weighting_scheme` 'mode' is for flow matching"):
        make_family("sdxl").sample_levels(*batch_of(1)[:1], options(weighting_scheme="mode"), 24)
