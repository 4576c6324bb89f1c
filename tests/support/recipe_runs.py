"""Runs of a recipe in processes of their own: killed, resumed, on one rank or two."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "train_flux2klein.py"


def environment(**extra: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests" / "support"), env.get("PYTHONPATH", "")]))
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | extra


def command(*flags: object, ranks: int = 1, script: Path = RECIPE) -> list[str]:
    """What a user types: `python script ...`, or torchrun's words for several ranks."""
    words = [sys.executable, str(script)]
    if ranks > 1:
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), str(script)]
    return words + [str(flag) for flag in flags]


def jobs(*flags: object, ranks: int = 1, script: Path = RECIPE, **env: str) -> list[forked.Job]:
    """The same processes for `forked`: torchrun's are started without it, in the environment that it gives them."""
    words, environ = [script, *flags], environment(**env)
    if ranks == 1:
        return [(words, environ)]
    environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port())}
    return [(words, environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(
    *flags: object, ranks: int = 1, check: bool = True, script: Path = RECIPE, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs the recipe to its end; `fresh`: by an interpreter of its own or by torchrun, as users do.

    So does an environment with another Hub: it is read at import.
    """
    if fresh or any(os.environ[name] != env.get(name, os.environ[name]) for name in ("HF_ENDPOINT", "HF_HOME")):
        words = command(*flags, ranks=ranks, script=script)
        done = subprocess.run(words, env=environment(**env), capture_output=True, text=True, timeout=600)
    else:
        done = forked.run(*jobs(*flags, ranks=ranks, script=script, **env))
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done


def run_and_kill(
    *flags: object, when: str, times: int = 1, ranks: int = 1, delay: float = 0.0, script: Path = RECIPE
) -> str:
    """Starts the recipe and SIGKILLs it with all its ranks `delay` seconds after the n-th line that matches `when`."""
    reader, writer = os.pipe()
    processes = [forked.start(job, stdout=writer, stderr=writer) for job in jobs(*flags, ranks=ranks, script=script)]
    os.close(writer)
    lines = []
    with os.fdopen(reader, encoding="utf-8") as output:
        for line in output:
            lines.append(line)
            times -= bool(re.search(when, line))
            if times == 0:
                time.sleep(delay)
                break
        forked.kill(processes)
    if times:
        raise AssertionError(f"{when!r} never came:\n{''.join(lines)[-4000:]}")
    return "".join(lines)


def weights(folder: Path) -> dict:
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def logged_losses(folder: Path) -> list[float]:
    """Losses of the newest checkpoint's log."""
    newest = max(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def flags(tiny_klein, cache, output_dir, **options):
    defaults = dict(
        pretrained_model_name_or_path=tiny_klein, max_sequence_length=12, dataset_dir=cache, output_dir=output_dir,
        eval_fraction=0, rank=4, lora_alpha=8, learning_rate=1e-3, max_steps=12, logging_steps=1, save_steps=6,
        use_cpu=True, seed=3, disable_tqdm=True,
    )  # fmt: skip
    return [word for name, value in (defaults | options).items() for word in (f"--{name}", value)]
