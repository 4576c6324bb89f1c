"""A recipe's `main` with the exit statuses that launchers and users rely on."""

import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import Preempted, SciflowError, first_line
from ..files import is_disk_full

# Loggers of packages that warn as they are imported of parts that a run does not use.
_NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


def run(main: Callable[[], Any]) -> NoReturn:
    """Runs a recipe's `main` and ends the process.

    Exit status: 0; 2 for a mistake or a fault that can be explained, with a message; 75 saved and stopped by a signal
    (`Preempted`); 130 Ctrl-C. torchrun and `accelerate launch` of several processes report 1 for any but 0.

    Args:
        main: the steps of the recipe, without arguments.
    """
    from ..training.run_lock import let_go_of_all

    status: Any = 0
    outlast_readers()
    quieten()
    try:
        try:
            main()
        except Preempted as stop:
            status = stop.code
        leave_process_group()
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; resume with --resume_from_checkpoint latest\n")
        sys.exit(130)
    except Exception as error:  # a user's mistake gets one line, any other its traceback
        message = explained(error)
        if message is None:
            raise
        sys.stderr.write(f"\nerror: {message}\n")
        leave_process_group(together=False)  # the other ranks may be anywhere
        sys.exit(2)
    finally:
        let_go_of_all()
    sys.exit(status)


def quieten() -> None:
    """Unless `--verbose` is among the flags, other packages say nothing as they are imported."""
    if "--verbose" not in sys.argv:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)


def outlast_readers() -> None:
    """Lets a run continue when nobody reads its output or errors any more; escapes what their encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Lasting):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Lasting(stream))


class _Lasting:
    """A stream whose reader may leave (a closed terminal, `| head`), or whose disk fills: what is not taken is lost.

    Where the reader has left nothing more is tried; on a disk there may be room again.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._left():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._left():
            self._stream.flush()

    @contextmanager
    def _left(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is still in the buffer
            os.close(nowhere)


def explained(error: Exception) -> str | None:
    """The message for a user's mistake, a full disk, used-up memory or a lost process; None for other errors."""
    from ..training.out_of_memory import memory_message  # torch, which is not needed before

    if isinstance(error, SciflowError):
        return str(error)
    again = "run the same command again; a training resumes with --resume_from_checkpoint latest"
    if is_disk_full(error):
        return f"{first_line(error)}: free disk space, then {again}."
    if _is_lost(error):
        return (
            f"another process of this run ended, or cannot be reached ({first_line(error)}). The last lines of that "
            f"process say why. Mend it, then {again}."
        )
    return memory_message(error)


def _is_lost(error: Exception) -> bool:
    """Whether gloo, NCCL or their store raise this when a rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave_process_group(*, together: bool = True) -> None:
    """A rank that exits with gloo's threads alive may abort after its work is done; `together`: once all are here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()  # networks under DDP, in the trainer's cycles of references, would keep the group's threads alive
        if together:
            dist.barrier()
        dist.destroy_process_group()
