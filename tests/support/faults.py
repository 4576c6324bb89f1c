"""Faults put into a run: memory that ends, disks that fill, signals; and runs of several ranks with such faults."""

import contextlib
import copy
import errno
import json
import os
import signal
import sys
from pathlib import Path

import ranks
import torch
from recipe_runs import run
from transformers import TrainerCallback

from sciflow_hf.cli.run import leave_process_group
from sciflow_hf.errors import Preempted
from sciflow_hf.training import trainer as trainer_module
from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

ERRORS = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


class Memory:
    """From its pass number `after` on, a trainer has no room for more than `fits` samples at once.

    Args:
        where: "forward", or "backward", then at a parameter in the middle, when others have their gradient.

    Attributes:
        passes: samples of every pass that was begun. failures: those that did not fit, and how many of the trained
            parameters had a gradient then.
    """

    def __init__(self, trainer, fits, *, where="forward", after=0, error="device"):
        self.passes, self.failures, self.after, self.fits, self.error = [], [], after, fits, ERRORS[error]
        self.trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.family = copy.copy(trainer.family)  # other tests share the family
        compute_loss = trainer.family.compute_loss

        def counted(model, batch, args, **options):
            if model.training:
                self.passes.append(len(batch["noise_key"]))
            done = compute_loss(model, batch, args, **options)
            if where == "forward" and model.training:
                self.allocate()
            return done

        trainer.family.compute_loss = counted
        if where == "backward":
            self.trained[len(self.trained) // 2].register_hook(lambda gradient: self.allocate())

    def allocate(self):
        if len(self.passes) > self.after and self.passes[-1] > self.fits:
            self.failures.append((self.passes[-1], sum(p.grad is not None for p in self.trained)))
            raise self.error()


class Signal(TrainerCallback):
    """Sends this process a signal in the middle of a step: after the gradients, before the weights move."""

    def __init__(self, step, name):
        self.step, self.number = step, signal.Signals[name]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


class FullDisk:
    """Of the checkpoint of `step` half a file is written, then the disk is full: once, where `at` is written.

    Attributes:
        failed: steps whose save failed.
    """

    def __init__(self, trainer, at, *, step, patch=setattr):
        self.failed = []
        place, name, error = {
            "weights": (trainer, "_save_weights", Exception("I/O error: No space left on device (os error 28)")),
            "optimizer": (trainer, "_save_optimizer_and_scheduler", RuntimeError("inline_container.cc:672] . pos 5")),
            "rng": (trainer, "_save_rng_state", OSError(errno.ENOSPC, "No space left on device")),
            "state": (type(trainer.state), "save_to_json", OSError(errno.ENOSPC, "No space left on device")),
            "manifest": (trainer_module, "write_manifest", OSError(errno.EDQUOT, "Disk quota exceeded")),
        }[at]
        write = getattr(place, name)

        def fails(*args, **kwargs):
            if trainer.state.global_step != step or self.failed:
                return write(*args, **kwargs)
            self.failed.append(step)
            folder = Path(trainer._get_output_dir(trial=None))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "torn.bin").write_bytes(b"half a fi")
            raise error

        patch(place, name, fails)


class FilledDisk(TrainerCallback):
    """Really full while step 4 is saved."""

    def __init__(self, filler):
        self.filler = filler

    def on_step_end(self, args, state, control, **kwargs):
        self.filler.unlink(missing_ok=True)
        if state.global_step == 4:
            with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass


def on_a_small_disk(folder, **job):
    """A run in `folder`, whose disk is full at step 4; prints its checkpoints."""
    output_dir = Path(folder) / "run"
    trainer = ranks.make(output_dir=output_dir, max_steps=6, save_steps=2, **job)
    trainer.add_callback(FilledDisk(Path(folder) / "filler"))
    trainer.train()
    for checkpoint in list_checkpoints(output_dir):
        print(checkpoint.name, checkpoint_fault(checkpoint) or "whole")
    print(len(list(output_dir.glob(".saving*"))))


def train(*, memory=None, preempted=None, disk_full=None, rank=None, **job):
    """As `ranks.train`, with a fault on this rank alone, or on all: its arguments."""
    trainer, faults = ranks.make(**job), None
    if rank in (None, trainer.args.process_index):
        faults = Memory(trainer, **memory) if memory else None
        if preempted:
            trainer.add_callback(Signal(**preempted))
        if disk_full:
            FullDisk(trainer, **disk_full)
    try:
        trainer.train()
    except Preempted as stop:
        return {"stopped": trainer.state.global_step, "status": stop.code}
    except ValueError as error:
        return {"error": str(error)}
    trainer.save_model()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return {"losses": losses, "failures": len(faults.failures) if faults else 0}


def launch(folder, *jobs, ranks=2):
    """Runs `train(**job)` for each job on all ranks; for each job a list of what it returned on every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    run(folder / "jobs.json", ranks=ranks, script=Path(__file__))
    found = [json.loads((folder / f"results_{rank}.json").read_text()) for rank in range(ranks)]
    return [list(of_ranks) for of_ranks in zip(*found, strict=True)]


def main():
    torch.set_num_threads(1)
    if sys.argv[1] == "--disk":
        return on_a_small_disk(sys.argv[2], pipeline=sys.argv[3], cache=sys.argv[4])
    path = Path(sys.argv[1])
    results = [train(**job) for job in json.loads(path.read_text())]
    (path.parent / f"results_{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    leave_process_group()
    for thread in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            assert "gloo" not in thread.read_text(), "with this thread alive a rank may abort at its exit"


if __name__ == "__main__":
    main()
