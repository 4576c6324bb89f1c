"""For tests of a family: an adapter with values, a network that answers as told, a small training."""

import json
import shutil

import torch

import sciflow_hf as sf


def with_adapter(family):
    """The network with a LoRA that does something: B starts at zero, which would hide errors in A's gradient."""
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=4, lora_alpha=8), family=family, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


class Spy(torch.nn.Module):
    """Stands for the network: answers with `answer`, whatever it is asked."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer, self.weight, self.calls = answer, torch.nn.Parameter(torch.zeros(())), []

    def forward(self, **inputs):
        self.calls.append(inputs)
        return (self.answer + self.weight * inputs["hidden_states"],)


def edited(folder, tmp_path, file, **changes):
    """A copy of a pipeline folder with one JSON file changed; None takes a line away."""
    copy = shutil.copytree(folder, tmp_path / "edited", dirs_exist_ok=True)
    values = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return copy


def make_trainer(folder, family, train, held_out=None, **options):
    """A LoRA of rank 8 on a tiny network, on the CPU."""
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=20, save_strategy="no", logging_steps=5, disable_tqdm=True,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-2, seed=3, report_to="none",
    )  # fmt: skip
    args = sf.DiffusionTrainingArguments(**(defaults | options))
    model = family.load_model(dtype=torch.float32)
    sf.add_adapter(model, sf.AdapterArguments(rank=8, lora_alpha=16), family=family, seed=1)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=train, eval_dataset=held_out)


def weights(trainer):
    """Copies of the trained weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_resume_is_exact(tmp_path, family, data):
    """8 steps = 4 steps, resume, 4 steps: the same bits, with accumulation."""
    options = dict(max_steps=8, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2)
    whole = make_trainer(tmp_path / "whole", family, data, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = make_trainer(tmp_path / "again", family, data, resume_from_checkpoint="latest", **options)
    start = weights(again)
    again.train()
    one, two = weights(whole), weights(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sum(torch.equal(start[name], two[name]) for name in one) < len(one) / 10


def assert_folders_equal(one, two, *, other):
    """The same bytes in every file; weights that differ in `other`."""
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file()) and len(files) > 8
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    network = "transformer/diffusion_pytorch_model.safetensors"
    assert (one / network).read_bytes() != (other / network).read_bytes()
