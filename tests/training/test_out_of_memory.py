"""Out of memory: a micro-batch in parts has the losses and the gradient of the whole, and nothing waits for ever."""

import logging

import numpy as np
import pytest
import ranks
import torch
from caches import encoder_settings, write_cache
from faults import ERRORS, Memory, launch
from recipe_runs import weights
from trainings import trained

import sciflow_hf as sf
from sciflow_hf.cli.run import run
from sciflow_hf.training.out_of_memory import (
    HOST_LADDER,
    LADDER,
    MicroBatches,
    _parts,
    average_gradients,
    memory_message,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_klein):
    """Steps of two micro-batches of 4. By SGD: Adam would make a step of what rounding leaves of a gradient near 0."""
    buckets = {(32, 48): 16, (48, 32): 8}
    cache = write_cache(tmp_path_factory.mktemp("cache"), settings=encoder_settings(tiny_klein), buckets=buckets)
    return dict(
        pipeline=str(tiny_klein), cache=str(cache), max_steps=3, save_strategy="no", per_device_train_batch_size=4,
        gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1,
    )  # fmt: skip


def logged(trainer):
    names = ("loss", "grad_norm", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "learning_rate")
    return [{k: e[k] for k in names if k in e} for e in trainer.state.log_history if "loss" in e]


def close(left, right, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, job):
    trainer = ranks.make(output_dir=tmp_path_factory.mktemp("whole"), **job)
    trainer.train()
    return trainer


@pytest.mark.promise("E30")
@pytest.mark.parametrize("after", [0, 1, 3], ids=["first micro-batch", "second", "second of the second step"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_losses_and_weights_stay(tmp_path, job, whole, caplog, where, after):
    trainer = ranks.make(output_dir=tmp_path, **job)
    start = trained(trainer)
    memory = Memory(trainer, 2, where=where, after=after, error="host" if after == 1 else "device")
    with caplog.at_level(logging.WARNING, logger="sciflow_hf"):
        trainer.train()
    close(trained(trainer), trained(whole))
    assert max(float((start[n] - w).abs().max()) for n, w in trained(whole).items()) > 1e-3
    for ours, theirs in zip(logged(trainer), logged(whole), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4, atol=1e-6)
    ((failed, with_gradient),) = memory.failures  # it is remembered
    assert failed == 4 and trainer._micro_batches.largest == 2
    if where == "backward" and after == 0:
        assert len(memory.trained) / 4 < with_gradient < len(memory.trained)
    repeated = after % 2 + 1  # micro-batches of the step so far
    assert memory.passes == [4] * (after + 1) + [2, 2] * (repeated + 6 - after - 1)
    said = [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()]
    assert len(said) == 1 and LADDER in said[0] and f"at step {after // 2 + 1} with 4 samples at once" in said[0]


def test_down_to_single_samples_and_no_further(tmp_path, job, whole, caplog):
    trainer = ranks.make(output_dir=tmp_path, **job)
    memory = Memory(trainer, 1)
    with caplog.at_level(logging.WARNING, logger="sciflow_hf"):
        trainer.train()
    close(trained(trainer), trained(whole))
    said = [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()]
    assert [n for n, _ in memory.failures] == [4, 2] and sum(LADDER in line for line in said) == 1 and len(said) == 2

    trainer = ranks.make(output_dir=tmp_path, **job)
    Memory(trainer, 0)
    with pytest.raises(sf.SciflowError, match="one sample does not fit into memory") as caught:
        trainer.train()
    assert LADDER in str(caught.value) and "Tried to allocate 2.00 GiB" in str(caught.value)
    assert trainer.state.global_step == 0


def test_other_errors_are_not_memory(tmp_path, job, monkeypatch):
    trainer = ranks.make(output_dir=tmp_path, **job)
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        trainer.train()


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharded_engines_stop_with_the_ladder(tmp_path, job, monkeypatch, engine):
    trainer, passes = ranks.make(output_dir=tmp_path, **job), []

    def full(model, inputs, **options):
        passes.append(len(inputs["noise_key"]))
        monkeypatch.setattr(trainer, f"is_{engine}_enabled", True)
        raise ERRORS["device"]()

    monkeypatch.setattr(trainer, "compute_loss", full)
    with pytest.raises(sf.SciflowError, match="cannot be repeated on one rank") as caught:
        trainer.train()
    assert LADDER in str(caught.value) and passes == [4]


# -- parts -----------------------------------------------------------------------------------------------------


def test_what_belongs_to_samples_is_divided_and_what_is_shared_is_not():
    batch = {
        "noise_key": torch.arange(5), "latents": torch.arange(20.0).view(5, 4), "captions": list("abcde"),
        "nested": {"ids": torch.arange(5), "table": torch.zeros(7)}, "scale": torch.tensor(2.0), "name": "five!",
    }  # fmt: skip
    assert list(_parts(batch, 5, 5)) == [batch]
    first, second = _parts(batch, 5, 3)
    assert first["noise_key"].tolist() == [0, 1, 2] and second["noise_key"].tolist() == [3, 4]
    assert torch.equal(torch.cat([first["latents"], second["latents"]]), batch["latents"])
    assert (first["captions"], second["captions"]) == (["a", "b", "c"], ["d", "e"])
    assert second["nested"]["ids"].tolist() == [3, 4] and second["nested"]["table"] is batch["nested"]["table"]
    assert all(second[name] is batch[name] for name in ("scale", "name"))


@pytest.mark.parametrize("rows", ["alike", "weighted"])
def test_uneven_parts_weigh_as_many_samples(tmp_path, job, rows):
    """5 = 3 + 2: the mean over samples, not the mean of two means; with the weights of prior preservation, too."""
    trainer = ranks.make(output_dir=tmp_path, **(job | {"per_device_train_batch_size": 5, "stratified_levels": True}))
    trainer.current_gradient_accumulation_steps = 2
    trainer._trained = [p for p in trainer.model.parameters() if p.requires_grad]
    if rows == "weighted":
        trainer._loss_weights = torch.linspace(0.1, 3, len(trainer.train_dataset))
    batch, found = dict(next(iter(trainer.get_train_dataloader()))), []
    assert len(batch["noise_key"]) == 5 and "step_key" in batch
    for largest in (None, 3):
        trainer.model.zero_grad()
        step = MicroBatches(trainer)
        step.largest = largest
        loss = step.run(trainer.model, batch)
        found.append((loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    close(found[0][1], found[1][1], 1e-6)
    assert max(float(g.abs().max()) for g in found[0][1].values()) > 1e-3


# -- two ranks ---------------------------------------------------------------------------------------------------


def test_one_of_two_ranks_runs_out_of_memory(tmp_path, job):
    """In forward and in backward, at a micro-batch in the middle of a step and at the last: nothing waits."""
    two = job | {"per_device_train_batch_size": 2, "save_strategy": "no"}
    cases = {
        "none": {},
        "forward": {"memory": {"fits": 1, "where": "forward", "after": 1}, "rank": 1},
        "backward": {"memory": {"fits": 1, "where": "backward", "after": 2}, "rank": 0},
        "all": {"memory": {"fits": 1, "where": "backward", "after": 0}},
    }
    results = launch(tmp_path, *({**two, **case, "output_dir": tmp_path / name} for name, case in cases.items()))
    expected = results[0][0]["losses"]
    for (name, case), (first, second) in list(zip(cases.items(), results, strict=True))[1:]:
        np.testing.assert_allclose(first["losses"], expected, rtol=1e-5)
        close(weights(tmp_path / name), weights(tmp_path / "none"))
        failed = [int(case.get("rank") in (None, rank)) for rank in (0, 1)]
        assert [first["failures"], second["failures"]] == failed, name


def test_the_mean_over_ranks_of_gradients_in_buckets(monkeypatch):
    """Against the sum written out; a bucket ends where the next would not fit, and none is empty."""
    sizes = [3, 5, 2, 9, 1]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    for number, parameter in enumerate(parameters):
        parameter.grad = None if number == 2 else torch.full((sizes[number],), float(number + 1))
    seen = []

    def all_reduce(flat):  # the other rank has 10 everywhere
        seen.append(len(flat))
        flat += 10.0 / 2

    monkeypatch.setattr("sciflow_hf.training.out_of_memory._BUCKET", 8 * 4)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    kept = parameters[0].grad
    average_gradients(parameters)
    assert seen == [8, 2, 9, 1] and parameters[0].grad is kept
    assert [p.grad.unique().tolist() for p in parameters] == [[5.5], [6.0], [5.0], [7.0], [7.5]]


# -- the host ----------------------------------------------------------------------------------------------------


@pytest.mark.promise("B24")
def test_what_is_said_about_memory():
    assert LADDER in memory_message(ERRORS["device"]()) and LADDER in memory_message(ERRORS["host"]())
    assert LADDER in memory_message(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    bus = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit."
    )
    for error in (MemoryError(), bus, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")):
        assert HOST_LADDER in memory_message(error) and "--dataloader_num_workers 0" in memory_message(error)
    assert "/dev/shm" in memory_message(bus).partition("To make")[0]
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory."), KeyError("x")):
        assert memory_message(error) is None


@pytest.mark.parametrize("error", [MemoryError(), ERRORS["host"]()], ids=["python", "torch"])
def test_a_reader_thread_without_memory_ends_the_run_with_a_message(tmp_path, job, monkeypatch, capsys, error):
    trainer = ranks.make(output_dir=tmp_path, **job)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("sciflow_hf.data.batches.threads.Buffer.carve", fail)
    with pytest.raises(SystemExit) as caught:
        run(trainer.train)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in said and "memory" in said and "To make" in said
