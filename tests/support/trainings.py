"""Short trainings of tiny networks on the CPU: their trainer, and what came of them."""

import dataclasses
import shutil
from pathlib import Path

import torch

import sciflow_hf as sf

ADAPTER_OPTIONS = {field.name for field in dataclasses.fields(sf.AdapterArguments)}
TRAINER_OPTIONS = {"callbacks", "caption_dropout", "source_dropout", "compute_metrics"}
# For a training that is to learn something: a larger adapter, more rows at once.
LONGER = dict(
    rank=8, lora_alpha=16, max_steps=20, logging_steps=5, per_device_train_batch_size=4, per_device_eval_batch_size=4,
)  # fmt: skip


def make_args(folder, **options):
    """Six steps of two rows that save nothing, unless `options` say otherwise."""
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, save_strategy="no", logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-2, seed=3, report_to="none",
    )  # fmt: skip
    return sf.DiffusionTrainingArguments(**(defaults | options))


def make_trainer(folder, family, data, held_out=None, *, eval_fraction=0.0, adapter=None, **options):
    """A trainer of a LoRA on a tiny network.

    Args:
        data: a data set, or the folder of a cache, of which `eval_fraction` is held out.
        adapter: options of the adapter; the default is rank 4, alpha 8, and those of `options` that are an adapter's.
        options: of the training, of the adapter, or of the trainer: each has a name of its own.
    """
    adapter = adapter or {"rank": 4, "lora_alpha": 8} | {n: options.pop(n) for n in ADAPTER_OPTIONS & options.keys()}
    others = {name: options.pop(name) for name in TRAINER_OPTIONS & options.keys()}
    args = make_args(folder, **options)
    if isinstance(data, (str, Path)):
        data = sf.load_cache(data, dtype=torch.float32)
    if eval_fraction:
        data, held_out = data.split(eval_fraction)
    model = family.load_model(dtype=torch.float32)
    model = sf.add_adapter(model, sf.AdapterArguments(**adapter), family=family, seed=1)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=data, eval_dataset=held_out, **others)


def trained(trainer):
    """Copies of the trained weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer):
    """The losses in the trainer's log."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(left, right):
    """The same names, and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def assert_resume_is_exact(tmp_path, family, data, **more):
    """8 steps = 4 steps, resume, 4 steps: the same bits, with accumulation."""
    options = LONGER | dict(max_steps=8, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2) | more
    whole = make_trainer(tmp_path / "whole", family, data, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = make_trainer(tmp_path / "again", family, data, resume_from_checkpoint="latest", **options)
    start = trained(again)
    again.train()
    one, two = trained(whole), trained(again)
    assert same(one, two)
    assert sum(torch.equal(start[name], two[name]) for name in one) < len(one) / 10


def assert_folders_equal(one, two, *, other):
    """The same bytes in every file; weights that differ in `other`."""
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file()) and len(files) > 8
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    network = "transformer/diffusion_pytorch_model.safetensors"
    assert (one / network).read_bytes() != (other / network).read_bytes()
