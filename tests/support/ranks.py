"""Trainings on several ranks of gloo: one launch takes a list of jobs, as loading the libraries costs most of it."""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.tensor
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from recipe_runs import run
from torch.distributed.fsdp import FSDPModule

import sciflow_hf as sf
from sciflow_hf.cli.run import leave_process_group


def launch(folder, *jobs, ranks=2):
    """Runs `train(**job)` for each job on all ranks; what it returns on the first rank, one dict a job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    run(folder / "jobs.json", ranks=ranks, script=Path(__file__))
    return json.loads((folder / "results.json").read_text())


def make(*, pipeline, cache, output_dir, whole=False, adapter=None, held_out=0, **options):
    """A trainer on the klein pipeline and cache in these folders, as a recipe makes it.

    `whole` trains the network and not an adapter; evaluation is of the first `held_out` rows.
    """
    defaults = dict(
        output_dir=str(output_dir), use_cpu=True, max_steps=8, save_steps=4, logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=2, learning_rate=1e-3, max_grad_norm=1.0, seed=3, report_to="none",
    )  # fmt: skip
    args = sf.DiffusionTrainingArguments(**(defaults | options))
    family = sf.Flux2Klein(str(pipeline), max_sequence_length=12)
    model = family.load_model(dtype=args.load_dtype(trained=whole))
    adapter_args = sf.AdapterArguments(**({"rank": 4, "lora_alpha": 8, "no_adapter": whole} | (adapter or {})))
    model = sf.add_adapter(model, adapter_args, family=family, seed=1)
    data = sf.load_cache(str(cache), dtype=args.weight_dtype)
    some = data.select(range(held_out)) if held_out else None
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=data, eval_dataset=some)


@contextmanager
def sharding_on_cpu():
    """accelerate 1.15 takes DDP where FSDP is asked for on a CPU, without a word: here it keeps to FSDP."""
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def train(*, start=None, on_rank_1=None, **job):
    """Losses of every step and how the parameters lie, or the error of a user's mistake.

    `start` is a checkpoint to put into the output folder before; `on_rank_1` are other options there.
    """
    try:
        if on_rank_1 is not None and os.environ["RANK"] == "1":
            job |= on_rank_1
        if start is not None and PartialState().is_main_process:
            shutil.copytree(start, Path(job["output_dir"]) / Path(start).name)
        trainer = make(**job)
        trainer.train()
    except sf.SciflowError as error:
        return {"error": str(error)}
    trainer.save_model()
    sharded = [isinstance(p, torch.distributed.tensor.DTensor) for p in trainer.model.parameters()]
    return {
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "eval_losses": [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e],
        "norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": sum(sharded) / len(sharded),
        "units": sum(isinstance(m, FSDPModule) for m in trainer.model.modules()),
    }


def main():
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    with sharding_on_cpu():
        results = [train(**job) for job in json.loads(path.read_text())]
    if torch.distributed.get_rank() == 0:
        (path.parent / "results.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
