"""DiffusionTrainer: what is trained, logged, evaluated, saved and resumed, on a tiny klein."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from caches import encoder_settings, write_cache
from safetensors import safe_open
from safetensors.torch import load_file
from trainings import losses, make_args, make_trainer, same, trained

import sciflow_hf as sf
from sciflow_hf.adapters.files import WEIGHT_NAME
from sciflow_hf.adapters.layers import adapter_disabled, adapter_parameters
from sciflow_hf.diffusion.randomness import hash64, noise_keys
from sciflow_hf.training.checkpoints import checkpoint_fault

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_every_trained_parameter_moves_and_no_frozen_one(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    wanted = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert wanted == set(adapter_parameters(trainer.model)) and len(wanted) > 20
    # The last block's text branch does not reach the output, so nothing can move there.
    assert moved <= wanted and {n for n in wanted - moved} == {n for n in wanted if before_gradless(trainer, n)}


def before_gradless(trainer, name):
    """Parameters without a gradient on a batch, by autograd itself."""
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.family.compute_loss(trainer.model.train(), batch, trainer.args)[0].mean().backward()
    gradient = dict(trainer.model.named_parameters())[name].grad
    return gradient is None or not gradient.any()


@pytest.mark.promise("E22")
def test_micro_batches_do_not_change_the_run(tmp_path, family, even_cache):
    """1 x 4, 2 x 2 and 4 x 1 see the same samples, keys, levels, losses and weights over two whole epochs.

    SGD, because Adam divides by the size of the gradient, and so makes rounding noise as large as a step.
    """
    runs = {}
    for size, accumulation in ((1, 4), (2, 2), (4, 1)):
        trainer = make_trainer(
            tmp_path / f"{size}", family, even_cache, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, max_steps=-1, num_train_epochs=2, optim="sgd",
        )  # fmt: skip
        seen = []
        step = trainer.family.compute_loss

        def spy(model, batch, args, step=step, seen=seen, **kwargs):
            loss, levels = step(model, batch, args, **kwargs)
            seen.extend(zip(batch["row"].tolist(), batch["position"].tolist(), batch["noise_key"].tolist(),
                            levels.tolist(), loss.tolist(), strict=True))  # fmt: skip
            return loss, levels

        trainer.family = dataclasses.replace(family)
        trainer.family.compute_loss = spy
        trainer.train()
        runs[size] = seen, losses(trainer), trained(trainer)
    seen, logged, weights = runs[4]
    assert len(seen) == 2 * 24 and len(logged) == 12
    for size in (1, 2):
        other, other_logged, other_weights = runs[size]
        assert [s[:3] for s in other] == [s[:3] for s in seen]
        np.testing.assert_allclose([s[3:] for s in other], [s[3:] for s in seen], rtol=1e-5)
        np.testing.assert_allclose(other_logged, logged, rtol=1e-5)
        for name in weights:
            torch.testing.assert_close(other_weights[name], weights[name], rtol=0, atol=1e-5)
    start = trained(make_trainer(tmp_path / "start", family, even_cache))
    assert max(float((weights[n] - start[n]).abs().max()) for n in start) > 1e-2
    # Both epochs hold every row once, in another order, with other keys.
    first, second = seen[:24], seen[24:]
    assert sorted(s[0] for s in first) == sorted(s[0] for s in second) == list(range(24))
    assert [s[0] for s in first] != [s[0] for s in second] and not {s[2] for s in first} & {s[2] for s in second}
    assert [s[2] for s in first] == noise_keys(3, 0, range(24)).tolist()


@pytest.mark.promise("B14", "E20")
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "prodigy"])
@pytest.mark.parametrize("stop", [4, 8], ids=["epoch 0", "epoch 1"])
def test_resumed_equals_uninterrupted(tmp_path, family, tiny_cache, optim, stop):
    """2N steps = N steps, resume, N steps: bit for bit, accumulation 2, several buckets, tails included."""
    options = dict(
        optim=optim, learning_rate=None, gradient_accumulation_steps=2, save_strategy="steps", save_steps=stop
    )
    whole = make_trainer(tmp_path / "whole", family, tiny_cache, max_steps=2 * stop, **options)
    whole.train()
    assert len(whole.get_train_dataloader()) / 2 < 8  # so that step 8 lies in epoch 1
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "again" / f"checkpoint-{stop}")
    again = make_trainer(
        tmp_path / "again", family, tiny_cache, max_steps=2 * stop, resume_from_checkpoint="latest", **options
    )
    start = trained(again)
    again.train()
    assert not same(start, trained(again)) and same(trained(whole), trained(again))
    assert losses(again) == losses(whole)


def test_resume_in_a_short_last_step(tmp_path, family, even_cache):
    """The last step of an epoch may have fewer micro-batches; resuming right before and after it is exact."""
    options = dict(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=5,
        max_steps=9,
        save_strategy="steps",
        save_steps=1,
    )
    whole = make_trainer(tmp_path / "whole", family, even_cache, **options)
    steps = -(-len(whole.get_train_dataloader()) // 5)
    whole.train()
    for stop in (steps - 1, steps, steps + 1):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / f"{stop}" / f"checkpoint-{stop}")
        again = make_trainer(
            tmp_path / f"{stop}", family, even_cache, resume_from_checkpoint=f"checkpoint-{stop}", **options
        )
        again.train()
        assert same(trained(whole), trained(again))


def test_full_fine_tuning_resumes_and_saves_diffusers_layout(tmp_path, family, even_cache):
    from diffusers import Flux2Transformer2DModel

    options = dict(no_adapter=True, save_strategy="steps", save_steps=3, eval_fraction=0.3, learning_rate=1e-3)
    whole = make_trainer(tmp_path / "whole", family, even_cache, **options)
    whole.train()
    metrics = whole.evaluate()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = make_trainer(tmp_path / "again", family, even_cache, resume_from_checkpoint="latest", **options)
    again.train()
    assert same(trained(whole), trained(again))
    assert again.evaluate()["eval_base_loss"] == metrics["eval_base_loss"] != metrics["eval_loss"]
    loaded = Flux2Transformer2DModel.from_pretrained(tmp_path / "whole" / "checkpoint-6" / "transformer")
    assert same(dict(loaded.state_dict()), {k: v for k, v in whole.model.state_dict().items()})
    whole.save_model()
    assert_modes_are_those_of_any_file(tmp_path / "whole")


def assert_modes_are_those_of_any_file(folder):
    (folder / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) > 8 and set(modes.values()) == {modes["plain"]}, modes


def test_checkpoints_hold_no_frozen_weight(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, save_strategy="steps", save_steps=6, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    assert_modes_are_those_of_any_file(tmp_path)
    frozen = {n: p for n, p in trainer.model.named_parameters() if not p.requires_grad}
    values = {p.flatten()[:8].tolist().__repr__() for p in frozen.values() if p.numel() >= 8}
    files = [tmp_path / WEIGHT_NAME, tmp_path / "checkpoint-6" / WEIGHT_NAME]
    for file in files:
        state = load_file(file)
        assert len(state) == len(adapter_parameters(trainer.model)) and all(".lora_" in key for key in state)
        assert not any(v.flatten()[:8].tolist().__repr__() in values for v in state.values())
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 8
    size = sum(p.numel() for p in frozen.values()) * 4
    weights = sum(f.stat().st_size for f in (tmp_path / "checkpoint-6").glob("*.safetensors"))
    assert weights < size / 2
    optimizer = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert sum(len(g["params"]) for g in optimizer["param_groups"]) == len(adapter_parameters(trainer.model))


@pytest.mark.parametrize("adapter_type", ["lora", "dora"])
def test_saved_adapter_gives_the_same_output_in_the_pipeline(tmp_path, family, even_cache, adapter_type, tiny_klein):
    """alpha != rank; reloaded by Flux2KleinPipeline.load_lora_weights from a checkpoint folder."""
    from diffusers import Flux2KleinPipeline

    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=4, lora_alpha=10, adapter_type=adapter_type), family=family)
    args = make_args(tmp_path, save_strategy="steps", save_steps=6)
    cache = sf.load_cache(even_cache, dtype=torch.float32)
    trainer = sf.DiffusionTrainer(model, args, family=family, train_dataset=cache)
    trainer.train()
    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    levels = torch.tensor([0.4, 0.9])
    noise = torch.zeros(2, 16, *[s // 2 for s in batch["latents"].shape[2:]])
    model.eval()
    with torch.no_grad():
        plain = family.compute_loss(pipeline.transformer, batch, args, noise=noise, levels=levels)[0]
        pipeline.load_lora_weights(tmp_path / "checkpoint-6")
        loaded = family.compute_loss(pipeline.transformer, batch, args, noise=noise, levels=levels)[0]
        ours = family.compute_loss(model, batch, args, noise=noise, levels=levels)[0]
    torch.testing.assert_close(loaded, ours, rtol=1e-6, atol=1e-6)
    assert (loaded - plain).abs().min() > 1e-3


def test_eval_loss_is_the_mean_over_rows_and_levels(tmp_path, family, even_cache):
    """Against a plain loop; batch size and its repeats do not matter; base is the network without adapter."""
    trainer = make_trainer(tmp_path, family, even_cache, eval_fraction=0.4, eval_levels=3)
    trainer.train()
    metrics = trainer.evaluate()
    held_out, model = trainer.eval_dataset, trainer.model.eval()

    def grid(network):
        rows = []
        for i in range(len(held_out)):
            batch = {k: v[None] for k, v in held_out[i].items()}
            key = hash64(held_out.row_ids[i], "evaluation")
            signed = key - (1 << 64) if key >> 63 else key
            row = []
            for k, level in enumerate((1 / 6, 3 / 6, 5 / 6)):
                batch["noise_key"] = torch.tensor([_signed(hash64(signed, k))])
                with torch.no_grad():
                    row.append(
                        float(family.compute_loss(network, batch, trainer.args, levels=torch.tensor([level]))[0])
                    )
            rows.append(row)
        return np.array(rows)

    ours = grid(model)
    base = grid(family.load_model(dtype=torch.float32).eval())
    assert metrics["eval_loss"] == pytest.approx(ours.mean(), rel=1e-6)
    assert metrics["eval_base_loss"] == pytest.approx(base.mean(), rel=1e-6)
    assert metrics["eval_gain"] == pytest.approx((base - ours).mean(), rel=1e-4)
    assert metrics["eval_loss_q1"] == pytest.approx(ours[:, 0].mean(), rel=1e-6)
    assert metrics["eval_loss_q3"] == pytest.approx(ours[:, 1].mean(), rel=1e-6)
    assert metrics["eval_loss_q4"] == pytest.approx(ours[:, 2].mean(), rel=1e-6) and "eval_loss_q2" not in metrics
    trainer.args.per_device_eval_batch_size = 3
    again = trainer.evaluate()
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert len(held_out) % 3 or len(set(held_out.batch_keys)) > 1  # there were repeats to leave out


def _signed(key):
    return key - (1 << 64) if key >> 63 else key


def test_evaluation_leaves_training_as_it_was(tmp_path, family, even_cache):
    """With and without evaluation, saving and logging: the same weights, gradients switched back on."""
    plain = make_trainer(tmp_path / "a", family, even_cache, eval_fraction=0.3)
    plain.train()
    watched = make_trainer(
        tmp_path / "b", family, even_cache, eval_fraction=0.3, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, logging_steps=3, eval_on_start=True,
    )  # fmt: skip
    watched.train()
    assert same(trained(plain), trained(watched))


def test_nan_stops_the_run_at_the_next_log_and_names_the_rows(tmp_path, family, tiny_klein):
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein))
    payload = sorted((tmp_path / "cache").rglob("*.npz"))[5]
    with np.load(payload) as arrays:
        content = dict(arrays)
    content["latents"][0, 0, 0] = np.nan
    np.savez(payload, **content)
    trainer = make_trainer(
        tmp_path / "out", family, cache, max_steps=24, logging_steps=4, save_strategy="steps", save_steps=1
    )
    with pytest.raises(sf.SciflowError, match="not finite") as caught:
        trainer.train()
    assert payload.name in str(caught.value)
    good = [p for p in (tmp_path / "out").glob("checkpoint-*") if checkpoint_fault(p) is None]
    for folder in good:  # no checkpoint holds a weight that the NaN has reached
        assert all(torch.isfinite(v).all() for v in load_file(folder / WEIGHT_NAME).values())


@pytest.mark.promise("B16")
def test_quarter_losses_average_to_the_loss(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, logging_steps=6)
    seen = []
    step = family.compute_loss
    trainer.family = dataclasses.replace(family)

    def spy(*args, **kwargs):
        loss, levels = step(*args, **kwargs)
        seen.extend(zip(levels.tolist(), loss.tolist(), strict=True))
        return loss, levels

    trainer.family.compute_loss = spy
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(np.mean([loss for _, loss in seen]), rel=1e-5)
    for q in range(4):
        inside = [loss for level, loss in seen if q / 4 <= level < (q + 1) / 4]
        assert (f"loss_q{q + 1}" in entry) == bool(inside)
        if inside:
            assert entry[f"loss_q{q + 1}"] == pytest.approx(np.mean(inside), rel=1e-5)


def test_prodigy_logs_its_effective_rate(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, optim="prodigy", learning_rate=None)
    trainer.train()
    rates = [e["effective_learning_rate"] for e in trainer.state.log_history if "loss" in e]
    group = trainer.optimizer.param_groups[0]
    assert trainer.args.learning_rate == 1.0 and type(trainer.optimizer.optimizer).__name__ == "Prodigy"
    assert rates[-1] == pytest.approx(group["d"] * group["lr"]) and rates[0] >= 1e-6 and rates == sorted(rates)


@pytest.mark.promise("B11")
def test_bf16_base_with_float32_adapter_trains(tmp_path, family, even_cache):
    """FACTS of 16-bit adapters: AdamW at 1e-4 moved nothing. Here the adapter is float32 and moves."""
    model = family.load_model(dtype=torch.bfloat16)
    sf.add_adapter(model, sf.AdapterArguments(rank=4), family=family)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    cache = sf.load_cache(even_cache)
    args = make_args(tmp_path, bf16=True, learning_rate=1e-4)
    trainer = sf.DiffusionTrainer(model, args, family=family, train_dataset=cache)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    assert {p.dtype for p in after.values()} == {torch.float32}
    moved = [float((after[n] - before[n]).abs().max()) for n in after if "lora_B" in n]
    assert sum(m > 5e-5 for m in moved) > len(moved) / 2


def test_adapter_disabled_is_the_base(family, tiny_cache):
    model = family.load_model(dtype=torch.float32)
    batch = {k: v[None] for k, v in sf.load_cache(tiny_cache, dtype=torch.float32)[0].items()}
    args = make_args("unused")
    torch.manual_seed(0)
    noise, levels = torch.randn(1, 16, *[s // 2 for s in batch["latents"].shape[2:]]), torch.tensor([0.5])
    base = family.compute_loss(model, batch, args, noise=noise, levels=levels)[0]
    sf.add_adapter(model, sf.AdapterArguments(rank=4), family=family)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not torch.allclose(family.compute_loss(model, batch, args, noise=noise, levels=levels)[0], base, rtol=1e-3)
    with adapter_disabled(model):
        assert torch.equal(family.compute_loss(model, batch, args, noise=noise, levels=levels)[0], base)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads


def test_caption_dropout_uses_the_empty_prompt_by_key(tmp_path, family, even_cache, tiny_klein):
    folder = shutil.copytree(even_cache, tmp_path / "cache")
    empty = np.full((12, 48), 7.0, dtype=np.float32)
    np.savez(folder / "empty_prompt.npz", prompt_embeds=empty)
    trainer = make_trainer(tmp_path / "out", family, folder, caption_dropout=0.5)
    batches = list(trainer.get_train_dataloader())
    dropped = torch.cat([(b["prompt_embeds"] == 7).flatten(1).all(1) for b in batches])
    assert 4 < dropped.sum() < 20
    again = torch.cat([(b["prompt_embeds"] == 7).flatten(1).all(1) for b in trainer.get_train_dataloader()])
    assert torch.equal(dropped, again)
    with pytest.raises(sf.SciflowError, match="empty prompt"):
        make_trainer(tmp_path / "out2", family, even_cache, caption_dropout=0.5).train()


def test_a_run_that_moves_nothing_is_warned_about(tmp_path, family, even_cache, caplog):
    make_trainer(tmp_path / "a", family, even_cache).train()
    assert "No trained weight moved" not in caplog.text
    make_trainer(tmp_path / "b", family, even_cache, learning_rate=0.0).train()
    assert "No trained weight moved in 6 steps" in caplog.text
