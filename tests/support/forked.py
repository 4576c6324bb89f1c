"""Python processes that need not import the libraries: forks of one that has, by `multiprocessing`'s fork server.

Importing torch, transformers and diffusers takes a process longer than a short training does. What is run here is as
`python script ...` or `python -c code ...` otherwise: own environment, session, output, signals and exit status.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "sciflow_hf.cli.main",
        "sciflow_hf.training.trainer",
        "sciflow_hf.training.finish",
        "sciflow_hf.report.plan",
        "sciflow_hf.families.flux2_klein",
        "diffusers.pipelines.flux2.pipeline_flux2_klein",
        "diffusers.models.transformers.transformer_flux2",
        "diffusers.models.autoencoders.autoencoder_kl_flux2",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.qwen2.tokenization_qwen2",
        "matplotlib.pyplot",
        "torch.distributed.fsdp",
    ]
)

Job = tuple[Sequence[object], Mapping[str, str]]  # words after `python`, environment


def start(job: Job, *, stdout: int, stderr: int) -> BaseProcess:
    """Starts Python with the words of `job`; `stdout` and `stderr` are file descriptors."""
    words, env = job
    with Connection(os.dup(stdout)) as out, Connection(os.dup(stderr)) as err:
        arguments = ([str(word) for word in words], dict(env), os.getcwd(), out, err)
        process = CONTEXT.Process(target=_become, args=arguments)
        process.start()
    return process


def run(*jobs: Job, timeout: float = 600) -> CompletedProcess[str]:
    """Runs processes side by side to their end, with common output; where one fails the others are killed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = [start(job, stdout=out.fileno(), stderr=err.fileno()) for job in jobs]
        code = 0
        try:
            while running and code == 0:
                ended = wait([process.sentinel for process in running], timeout)
                if not ended:
                    raise TimeoutError(f"{jobs[0][0]} runs longer than {timeout} s")
                for process in [process for process in running if process.sentinel in ended]:
                    process.join()
                    code = code or process.exitcode or 0
                    running.remove(process)
        finally:
            kill(running)
        out.seek(0)
        err.seek(0)
        return CompletedProcess(list(jobs[0][0]), code, out.read().decode(), err.read().decode())


def kill(processes: Sequence[BaseProcess]) -> None:
    """SIGKILL to the processes and all that they started."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _become(words: list[str], env: dict[str, str], cwd: str, stdout: Connection, stderr: Connection) -> None:
    """Is the script, or the code after -c, in a process that `multiprocessing` has just forked."""
    gc.freeze()  # what is imported: no collection looks at it, and its memory stays that of the server
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # it may be killed; the machine is not
    os.setsid()
    os.chdir(cwd)
    for target, source in ((1, stdout), (2, stderr)):
        os.dup2(source.fileno(), target)
        source.close()
    # Anew: those of the server know what they wrote to, a file perhaps.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]
    code: Any = 0
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    # As the interpreter does at its end; multiprocessing skips it.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
