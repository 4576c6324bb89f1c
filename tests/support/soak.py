"""Runs of random flags on small data sets with one fault each, and whether what came of them is right.

A case follows from its seed. It is run without its fault, with it, and by the same command again. As a script this is
such a run: `python soak.py FAULT FLAGS`, with the fault at the n-th step or at the n-th file that it opens to write.
"""

import atexit
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
from caches import encoder_settings, write_cache
from hub_server import HubServer
from recipe_runs import RECIPE, jobs
from safetensors.torch import load_file
from trainings import same

from sciflow_hf.data.build.convert import convert_cache
from sciflow_hf.training.checkpoints import checkpoint_fault, list_checkpoints

LIMIT = 120.0
"""Seconds after which a process that has not ended hangs."""
KINDS = ("kill", "SIGTERM", "SIGHUP", "full disk", "second run", "option", "moved folder", "dead Hub", "lost rank")
BUCKETS = ((32, 48), (48, 32), (24, 64))


# ---- a case ----


@dataclass
class Case:
    """Flags and data of a run, and its fault; `draw` has the rest of its dice."""

    seed: int
    kind: str
    layout: str
    rows: int
    flags: dict[str, Any]
    draw: random.Random

    @property
    def ranks(self) -> int:
        return 2 if self.kind == "lost rank" else 1


def draw(seed: int, kind: str | None = None) -> Case:
    """The case of a seed; kinds take turns."""
    of = random.Random(seed)
    kind = kind or KINDS[seed % len(KINDS)]
    rows, layout = of.randint(3, 40), of.choice(["npz", "shards", "inline", "stream"])
    strategy, often = of.choice(["steps"] * 3 + ["epoch", "no"]), of.randint(1, 3)
    evaluated = of.random() < 0.6
    flags: dict[str, Any] = {
        "max_steps": of.randint(2, 8),
        "per_device_train_batch_size": of.randint(1, 3),
        "gradient_accumulation_steps": of.choice([1, 1, 2]),
        "save_strategy": strategy,
        "save_steps": often,
        "save_total_limit": of.choice([None, 1, 2]),
        "eval_fraction": of.choice([0.05, 0.3]) if evaluated else 0,
        "eval_strategy": strategy if evaluated and of.random() < 0.7 else "no",
        "eval_steps": often,
        "eval_levels": of.choice([1, 4]),
        "logging_steps": of.choice([1, 2, 10]),
        "optim": of.choice(["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "prodigy", "adagrad"]),
        "lr_scheduler_type": of.choice(["constant", "cosine", "linear"]),
        "warmup_steps": of.choice([0, 0, 2]),
        "ema_decay": of.choice([None, None, 0.9]),
        "loss_type": of.choice(["mse", "mse", "huber"]),
        "stratified_levels": of.random() < 0.2,
        "dataloader_threads": of.choice([0, 2]),
        "bf16": of.random() < 0.1,
        "validation_prompts": of.choice([None] * 6 + ["a line plot"]),
        "max_train_samples": of.choice([None, None, 2]) if layout != "stream" else None,
        "seed": of.randint(0, 9),
    }
    adapter = of.choice(["lora", "lora", "dora", "loha", "none"])
    flags |= {"no_adapter": True} if adapter == "none" else {"adapter_type": adapter, "rank": 4, "lora_alpha": 8}
    flags["learning_rate"] = {"prodigy": 1.0, "sgd": 0.1}.get(flags["optim"], 1e-3)
    flags["load_best_model_at_end"] = flags["eval_strategy"] == strategy != "no" and of.random() < 0.5
    if kind == "moved folder":
        flags |= dict(save_strategy="steps", eval_strategy="steps", eval_fraction=0.3, load_best_model_at_end=True)
    if kind in ("option", "moved folder"):
        flags |= dict(save_strategy="steps", max_steps=max(4, flags["max_steps"]))
    return Case(seed, kind, layout, rows, {name: value for name, value in flags.items() if value is not None}, of)


# ---- a run with its fault inside ----


def put_in(fault: dict[str, Any], folder: str) -> None:
    """Has the fault happen in this process, and prints at its end how many steps and opened files there were."""
    import safetensors.torch
    import torch

    import sciflow_hf as sf
    from sciflow_hf.hub import upload

    upload.RETRY_WAITS, upload.SILENCE = (0.0,), 0.3
    events: Counter[str] = Counter()

    def happens(event: str, full: Exception) -> None:
        events[event] += 1
        if event != fault.get("event") or not fault["number"] <= events[event] < fault["number"] + fault["times"]:
            return
        if fault["act"] == "full disk":
            raise full
        if fault["act"] == "pause":
            Path(fault["fifo"]).read_text()
        else:
            os.kill(os.getpid(), signal.Signals[fault["act"]])

    def written(path: Any, error: Exception) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder + os.sep):
            happens("file", error)

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            written(arguments[0], OSError(errno.ENOSPC, "No space left on device", arguments[0]))

    def beyond_python(place: Any, name: str, error: Exception) -> None:
        """Files that C++ or Rust open: no audit hook sees them."""
        write = getattr(place, name)

        def noted(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            written(path, error)
            return write(what, path, *args, **kwargs)

        setattr(place, name, noted)

    step = sf.DiffusionTrainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        happens("step", OSError(errno.ENOSPC, "No space left on device"))
        return step(*args, **kwargs)

    sf.DiffusionTrainer.training_step = training_step
    beyond_python(torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"))
    beyond_python(safetensors.torch, "serialize_file", Exception("I/O error: No space left on device (os error 28)"))
    sys.addaudithook(opened)
    atexit.register(lambda: print("events:", json.dumps(events), flush=True))


def main() -> None:
    fault = json.loads(sys.argv.pop(1))
    if fault.get("rank", os.environ.get("RANK")) != os.environ.get("RANK"):
        fault = {}
    put_in(fault, sys.argv[sys.argv.index("--output_dir") + 1])
    sys.argv[0] = str(RECIPE)
    runpy.run_path(str(RECIPE), run_name="__main__")


# ---- what came of it ----


class Life:
    """A run, with all its ranks, from its start to its end."""

    def __init__(self, words: list[Any], fault: dict[str, Any], *, ranks: int, env: dict[str, str]) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        started = jobs(json.dumps(fault), *words, ranks=ranks, script=Path(__file__), **env)
        out = self.output.fileno()
        self.processes = [forked.start(job, stdout=out, stderr=out) for job in started]

    def end(self) -> tuple[list[int], str]:
        """Exit statuses and output."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hangs = [process for process in self.processes if process.is_alive()]
        forked.kill(hangs)
        self.output.seek(0)
        text = self.output.read().decode()
        assert not hangs, f"hangs after {LIMIT} s:\n{text[-3000:]}"
        assert "Traceback" not in text, text[-6000:]
        return [process.exitcode or 0 for process in self.processes], text

    def wait_for(self, fifo: Path) -> int | None:
        """The fifo at which the run waits; None where it has ended without."""
        while self.processes[0].is_alive():
            with contextlib.suppress(OSError):
                return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            self.processes[0].join(0.01)
        return None


def result(folder: Path) -> dict[str, Any]:
    """What a finished run has found: steps and metrics."""
    facts = json.loads((folder / "run_facts.json").read_text())
    metrics = {name: value for name, value in facts["metrics"].items() if not re.search("runtime|second", name)}
    return {"steps": facts["global_step"], "pictures": facts["sample_images"]} | metrics


def weights(folder: Path) -> dict[str, Any]:
    """{file: tensors} of what a finished run has trained."""
    found = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {f"{path.name}:{name}": tensor for path in found for name, tensor in load_file(path).items()}


def files(folder: Path) -> dict[str, str]:
    """Path -> sha256 of all that lies there."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".run.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


APPLIED = {"learning_rate": 5e-4, "weight_decay": 0.1, "warmup_steps": 3, "max_grad_norm": 0.5, "logging_steps": 3}
MEASURED = {"loss_type": "l1", "eval_levels": 3, "weighting_scheme": "cosmap"}
REFUSED = {"seed": 77, "per_device_train_batch_size": 5, "optim": "rmsprop"}


class Soak:
    """Runs cases in `folder`, over common caches that no case may change."""

    def __init__(self, folder: Path, pipeline: Path) -> None:
        self.folder, self.pipeline = folder, pipeline
        self.env: dict[str, str] = {}

    def check(self, case: Case) -> str:
        """What was seen; AssertionError where it is wrong."""
        cache = self.cache(case)
        before = files(cache)
        self.words = self.options(case, cache)
        self.place = self.folder / str(case.seed)
        shutil.rmtree(self.place, ignore_errors=True)
        statuses, text = self.run(case, "whole")
        if any(statuses):
            assert statuses == [2] * case.ranks, text
            return f"refused: {text.strip().splitlines()[-2]}"
        self.events = max(
            (json.loads(found) for found in re.findall("events: (.*)", text)), key=lambda found: found.get("file", 0)
        )
        seen = getattr(self, case.kind.lower().replace(" ", "_"))(case)
        assert files(cache) == before
        shutil.rmtree(self.place)
        return seen

    # -- a run --

    def cache(self, case: Case) -> Path:
        """Made when it is first asked for."""
        layout = "inline" if case.layout == "stream" else case.layout
        source, cache = (self.folder / f"{name}-{case.rows}" for name in ("npz", layout))
        if not source.exists():
            counts = {size: case.rows // 3 + (i < case.rows % 3) for i, size in enumerate(BUCKETS)}
            write_cache(source, settings=encoder_settings(self.pipeline), buckets=counts)
        if not cache.exists():
            convert_cache(source, cache, payload=layout)
        return cache

    def options(self, case: Case, cache: Path) -> dict[str, Any]:
        fixed = {
            "pretrained_model_name_or_path": self.pipeline, "max_sequence_length": 12, "dataset_dir": cache,
            "use_cpu": True, "disable_tqdm": True, "report_to": "none", "resume_from_checkpoint": "latest",
            "num_inference_steps": 1, "validation_guidance_scale": 1.0, "validation_steps": case.flags["eval_steps"],
            "validation_size": [32, 48],
        }  # fmt: skip
        return fixed | case.flags | ({"streaming": True} if case.layout == "stream" else {})

    def start(self, case: Case, name: str, fault: dict[str, Any] | None = None, **options: Any) -> Life:
        flags = self.words | options | {"output_dir": self.place / name}
        words = [
            word
            for flag, value in flags.items()
            for word in (f"--{flag}", *(value if isinstance(value, list) else [value]))
        ]
        return Life(words, fault or {}, ranks=case.ranks, env=self.env)

    def run(self, *args: Any, **options: Any) -> tuple[list[int], str]:
        return self.start(*args, **options).end()

    def fault(self, case: Case, act: str, **more: Any) -> dict[str, Any]:
        event = case.draw.choice([name for name in ("step", "file") if self.events.get(name)])
        number = case.draw.randint(1, self.events[event])
        return {"act": act, "event": event, "number": number, "times": 1, **more}

    def right(self, case: Case, name: str = "run", **options: Any) -> str:
        """The same command ends as the run that had no fault."""
        statuses, text = self.run(case, name, **options)
        assert statuses == [0] * case.ranks, text[-3000:]
        self.same(name)
        return text

    def same(self, name: str) -> None:
        one, two = self.place / "whole", self.place / name
        assert same(weights(one), weights(two)), "other weights"
        assert result(one) == result(two)
        assert not (two / ".saving").exists() and not (two / ".run.json").exists()

    # -- the faults --

    def kill(self, case: Case, act: str = "SIGKILL") -> str:
        fault = self.fault(case, act)
        (status,), text = self.run(case, "run", fault)
        assert status in (-signal.Signals[act], 75 * (act != "SIGKILL")), text[-3000:]
        if status == 75:
            assert f"{act}: saved and stopped after step" in text and "--resume_from_checkpoint latest" in text
        self.right(case)
        return f"{fault}, {status}, resumed"

    def sigterm(self, case: Case) -> str:
        return self.kill(case, "SIGTERM")

    def sighup(self, case: Case) -> str:
        return self.kill(case, "SIGHUP")

    def full_disk(self, case: Case) -> str:
        fault = self.fault(case, "full disk", times=case.draw.choice([1, 3, 10**6])) | {"event": "file"}
        fault["number"] = case.draw.randint(1, self.events["file"])
        (status,), text = self.run(case, "run", fault)
        said = [line for line in text.splitlines() if re.search("No space left|disk is full", line)]
        assert status in (0, 2) and said, text[-3000:]
        assert all(str(self.place / "run") in line for line in said), said
        assert re.search("[Ff]ree (disk space|more)|tries again|[Cc]hoose another", "".join(said)), said
        assert not any(map(checkpoint_fault, list_checkpoints(self.place / "run")))
        if status == 0:
            self.same("run")
        self.right(case)
        return f"{fault}, {status}: {said[0][-200:]}"

    def second_run(self, case: Case) -> str:
        fifo = self.place / "fifo"
        os.mkfifo(fifo)
        fault = self.fault(case, "pause", fifo=str(fifo))
        first = self.start(case, "run", fault)
        gate = first.wait_for(fifo)
        assert gate is not None, first.end()
        before = files(self.place / "run")
        statuses, text = self.run(case, "run")
        refused = [text] * (statuses == [2])
        if refused:
            assert files(self.place / "run") == before, "the second run left something"
        os.close(gate)
        one, text = first.end()
        refused += [text] * (one == [2])
        assert statuses + one in ([0, 2], [2, 0]), (statuses, one, text[-3000:])
        assert len(refused) == 1 and re.search(r"process \d+, since .*trains there. Take another folder", refused[0])
        self.same("run")
        return f"{fault}, {statuses + one}"

    def option(self, case: Case) -> str:
        fault = self.fault(case, "SIGTERM") | {"event": "step"}
        fault["number"] = case.draw.randint(1, self.events["step"])
        self.run(case, "run", fault)
        (checkpoint, *_) = list_checkpoints(self.place / "run")
        kind = case.draw.choice([APPLIED, MEASURED, REFUSED])
        name, value = case.draw.choice(list(kind.items()))
        before = files(checkpoint)
        statuses, text = self.run(case, "run", **{name: value})
        if kind is REFUSED:
            assert statuses == [2] and "belongs to another run" in text and "Use the same options" in text, text
            assert files(checkpoint) == before
            self.right(case)
        else:
            assert statuses == [0] and re.search(rf"apply from here on: .*\b{name} .* -> {value!r}", text), text[-3000:]
        if kind is MEASURED and (checkpoint / "eval_base.json").is_file():
            assert f"measured again: {name} changed" in text, text
        return f"{fault}, {name} {value}: {statuses}"

    def moved_folder(self, case: Case) -> str:
        fault = self.fault(case, case.draw.choice(["SIGKILL", "SIGTERM"]))
        self.run(case, "run", fault)
        (self.place / "run").rename(self.place / "moved")
        self.right(case, "moved")
        best = self.best("whole")
        assert best == self.best("moved") and (self.place / "moved" / best).is_dir(), best
        return f"{fault}, {best}"

    def best(self, name: str) -> str:
        newest = list_checkpoints(self.place / name)[0]
        return Path(json.loads((newest / "trainer_state.json").read_text())["best_model_checkpoint"]).name

    def dead_hub(self, case: Case) -> str:
        fifo, repo = self.place / "fifo", f"user/{case.seed}"
        os.mkfifo(fifo)
        hub = HubServer()
        self.env = hub.env(self.place / "home")
        push = dict(push_to_hub=True, hub_model_id=repo, hub_token="dummy")
        push["hub_strategy"] = case.draw.choice(["end", "every_save", "checkpoint"])
        fault = self.fault(case, "pause", fifo=str(fifo))
        first = self.start(case, "run", fault, **push)
        gate = first.wait_for(fifo)
        hub.die(silent=case.draw.random() < 0.5)
        if gate is not None:
            os.close(gate)
        (status,), text = first.end()
        hub.close()
        revived = HubServer()
        revived.repos = hub.repos
        try:
            assert status == 0 or (status == 2 and "Hub" in text), text[-3000:]
            if status == 2 and (self.place / "run" / "run_facts.json").exists():
                self.same("run")
                command = re.findall("sciflow-hf (push .*)", text)[-1].split()
                code = "import sys; from sciflow_hf.cli import main; sys.exit(main())"
                done = forked.run((["-c", code, *command], self.env))
                assert done.returncode == 0, done.stderr
            elif status == 2:
                assert "without `--push_to_hub` and push later" in text, text[-3000:]
                self.right(case, **push)
            name = next(path for path in revived.repos[repo].files if path.endswith(".safetensors"))
            assert revived.repos[repo].files[name] == (self.place / "run" / name).read_bytes()
        finally:
            revived.close()
            self.env = {}
        return f"{fault}, {push['hub_strategy']}, {status}"

    def lost_rank(self, case: Case) -> str:
        fault = self.fault(case, "SIGKILL")
        lost = case.draw.randint(0, 1) if fault["event"] == "step" else 0  # which writes the files
        fault["rank"] = str(lost)
        statuses, text = self.run(case, "run", fault)
        assert statuses[lost] == -signal.SIGKILL and statuses[1 - lost] == 2, (statuses, text[-3000:])
        assert re.search("another process .*--resume_from_checkpoint latest", text), text[-3000:]
        self.right(case)
        return f"{fault}, {statuses}"


if __name__ == "__main__":
    main()
