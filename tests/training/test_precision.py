"""Order and precision: what `--train_sampling_strategy`, `--fp16` and its loss scale do, and what is refused."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from trainings import losses, make_args, make_trainer, same, trained

import sciflow_hf as sf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# -- order --------------------------------------------------------------------------------------------------------


def rows_of(loader, count=None):
    return [batch["row"].tolist() for batch, _ in zip(loader, range(count or len(loader)), strict=False)]


@pytest.mark.promise("E27")
def test_sequential_is_the_order_of_the_rows_in_each_bucket(tmp_path, family, even_cache):
    trainer = make_trainer(tmp_path, family, even_cache, train_sampling_strategy="sequential")
    loader, buckets = trainer.get_train_dataloader(), trainer.train_dataset.buckets
    rows = rows_of(loader)
    order = sorted(range(24), key=lambda row: (buckets.index(buckets[row]), row))
    assert rows == [order[i : i + 2] for i in range(0, 24, 2)]
    loader.set_epoch(1)
    assert rows_of(loader) == rows
    shuffled = make_trainer(tmp_path, family, even_cache).get_train_dataloader()
    assert sorted(map(sorted, rows_of(shuffled))) != rows


def test_a_stream_is_sequential_without_its_buffer(tmp_path, family, even_cache):
    options = dict(train_sampling_strategy="sequential")
    with pytest.raises(sf.SciflowError, match=r"sequential: this stream is shuffled. Add `--shuffle_buffer 0`"):
        make_trainer(tmp_path, family, sf.load_cache(even_cache, streaming=True, dtype=torch.float32), **options)
    data = sf.DataArguments(dataset_dir=[str(even_cache)], streaming=True, shuffle_buffer=0, eval_fraction=0)
    stream = sf.load_data(data, dtype=torch.float32)[0]
    rows = rows_of(make_trainer(tmp_path, family, stream, **options).get_train_dataloader(), 6)
    assert all(one < other for one, other in rows) and rows == sorted(rows)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.promise("B25")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_sampling_strategy": "group_by_length"},
            "`train_sampling_strategy` 'group_by_length' cannot work",
        ),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "`train_sampling_strategy` 'batch_rebalance' cannot work",
        ),
        ({"fp16": True}, "`fp16` True cannot work on the CPU: use `--bf16`"),
        ({"fp16": True, "use_cpu": False}, "`fp16` True cannot work on the CPU: use `--bf16`"),
        ({"loss_scale": 8.0}, "are for `--fp16`"),
        ({"dynamic_loss_scale": False, "bf16": True}, "are for `--fp16`"),
        ({"loss_scale": 0.0}, "`loss_scale` 0.0: above 0"),
        ({"fp16_full_eval": True}, "`fp16_full_eval` True cannot work here.*trained weights"),
        ({"bf16_full_eval": True}, "`bf16_full_eval` True cannot work here.*trained weights"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "`dataloader_persistent_workers` True"),
        ({"accelerator_config": {"even_batches": False}}, "`accelerator_config` even_batches False cannot work here"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`accelerator_config` dispatch_batches True"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *a, **k: False)
    with pytest.raises(sf.SciflowError, match=message):
        make_args(tmp_path, **options)


# -- fp16 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(monkeypatch):
    """Makes accelerate train in fp16 on the CPU, as it does on a GPU: autocast, and a GradScaler of its arguments."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *a, **k: True)
    made = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", **self.scaler_handler.to_kwargs())

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    return dict(fp16=True, use_cpu=False)


@pytest.mark.promise("B11", "E23")
def test_fp16_trains_saves_its_scale_and_resumes_exactly(tmp_path, family, even_cache, half):
    """Near the losses of float32, but not at them; a scale that overflows is halved, and its steps change nothing."""
    plain = make_trainer(tmp_path / "plain", family, even_cache, max_steps=1)
    plain.train()
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, loss_scale=2.0**18) | half
    whole = make_trainer(tmp_path / "whole", family, even_cache, **options)
    start = trained(whole)
    whole.train()
    assert losses(whole)[0] != losses(plain)[0] == pytest.approx(losses(whole)[0], rel=1e-2)
    scale = whole.accelerator.scaler.get_scale()
    assert scale < 2.0**18 and not same(start, trained(whole))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    assert torch.load(tmp_path / "again" / "checkpoint-3" / "scaler.pt", weights_only=True)["scale"] < 2.0**18
    again = make_trainer(tmp_path / "again", family, even_cache, resume_from_checkpoint="latest", **options)
    again.train()
    assert same(trained(again), trained(whole)) and losses(again) == losses(whole)
    assert again.accelerator.scaler.get_scale() == scale


@pytest.mark.promise("E23")
@pytest.mark.parametrize("moves", [False, True])
def test_a_static_scale_stays_and_steps_that_overflow_are_left_out(tmp_path, family, even_cache, half, moves, caplog):
    scale = 2.0**10 if moves else 2.0**18
    trainer = make_trainer(
        tmp_path, family, even_cache, max_steps=2, loss_scale=scale, dynamic_loss_scale=False, **half
    )
    start = trained(trainer)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == scale and same(start, trained(trainer)) is not moves
    assert ("No trained weight moved" in caplog.text) is not moves


def test_a_static_scale_does_not_grow(tmp_path, half):
    """After more steps than a dynamic one takes to double."""
    for dynamic in (False, True):
        args = make_args(tmp_path, loss_scale=12.0, dynamic_loss_scale=dynamic, **half)
        scaler = torch.amp.GradScaler("cpu", **GradScalerKwargs(**args.loss_scaling).to_kwargs())
        optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.zeros(1))])
        for _ in range(2001):
            scaler.scale(weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (24.0 if dynamic else 12.0)
