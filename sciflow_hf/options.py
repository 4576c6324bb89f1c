"""One parser for all recipes: HfArgumentParser dataclasses, a YAML file below the flags, errors that help."""

import argparse
import dataclasses
import difflib
import errno
import gc
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import Preempted, SciflowError


class RecipeParser(HfArgumentParser):
    """HfArgumentParser that takes YAML and flags together, and suggests the nearest name for unknown ones."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML of options; flags win over it.")

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """argparse formats help texts with `%`; a stray one, as in "50 % of", shall not break `--help`."""
        if options.get("help"):
            options["help"] = re.sub(r"%(?!\(\w+\)s)", "%%", options["help"].replace("%%", "%"))
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """One line on stderr, without argparse's page of usage; exit status 2."""
        sys.stderr.write(f"{self.prog}: error: {' '.join(message.split())}\n")
        sys.exit(2)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from defaults, then the YAML, then the flags."""
        config = self._config_file(argv)
        options: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config"):
                options.setdefault(action.dest, action)  # `--x` of a boolean stands before its `--no_x`
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in (read_yaml(config) if config else {}).items():
            if name not in options:
                self.error(f"{config}: unknown option `{name}`{_nearest(str(name), options)}")
            try:
                default = self._default(options[name], hints[name], value)
            except argparse.ArgumentError as error:
                self.error(f"{config}: `{name}`: {error.message}")
            options[name].required = False
            self.set_defaults(**{name: default})
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            flag = next((u for u in unknown if u.startswith("--")), unknown[0]).split("=")[0]
            self.error(f"unknown argument {' '.join(unknown)}{_nearest(flag, known)}")
        values = vars(namespace)
        return tuple(
            kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
            for kind in self.dataclass_types
        )

    def _config_file(self, argv: Sequence[str]) -> str | None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--config")
        try:
            return parser.parse_known_args(list(argv))[0].config
        except argparse.ArgumentError as error:
            self.error(str(error))

    def _default(self, action: argparse.Action, hint: Any, value: Any) -> Any:
        """YAML values take the same road as flags: scalars as text, converted and checked by argparse."""
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) if _is_union(hint) else (hint,))}
        if value is None and NoneType not in kinds:
            raise argparse.ArgumentError(None, "expected a value, got nothing")
        if value is None or (isinstance(value, bool | dict) and type(value) in kinds):
            return value
        if isinstance(value, list) and action.nargs == "+":
            return [self._get_value(action, str(item)) for item in value]
        if isinstance(value, list) and list in kinds:
            return value
        if isinstance(value, list | dict):
            comma = f"; write {','.join(map(str, value))}" if isinstance(value, list) and str in kinds else ""
            raise argparse.ArgumentError(None, f"expected one value, got {value!r}{comma}")
        if value is False and "no" in (action.choices or ()):
            value = "no"  # YAML reads a bare `no` as false
        converted = self._get_value(action, str(value))
        if action.choices is not None:
            self._check_value(action, converted)
        return [converted] if action.nargs == "+" else converted


def read_yaml(path: str | Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a YAML file on top of those of the file its `base:` names (relative to it). Safe load."""
    file = Path(path).resolve()
    if file in seen:
        raise SciflowError(f"`base` of {seen[-1]}: {file} is already being read; the files name each other.")
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SciflowError(f"`config` {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise SciflowError(f"`config` {path}: is no UTF-8 text.") from error
    except yaml.YAMLError as error:
        raise SciflowError(f"`config` {path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise SciflowError(f"`config` {path}: expected `option: value` lines, got {type(options).__name__}.")
    base = options.pop("base", None)
    if not isinstance(base, str | None):
        raise SciflowError(f"`base` of {path}: expected the name of one YAML file, got {base!r}.")
    return {**(read_yaml(file.parent / base, seen=(*seen, file)) if base else {}), **options}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def parse_args(
    *dataclass_types: type, argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Command line (and `--config` YAML) -> one instance per dataclass. Exits with status 2 on a mistake.

    Args:
        dataclass_types: families and argument dataclasses; their fields are the flags.
        argv: default `sys.argv[1:]`.
        description: printed by `--help`.
    """
    from transformers.utils import logging as transformers_logging

    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "filelock", "fsspec", "datasets", "accelerate", "urllib3", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.get_logger("transformers").propagate = False
    parser = RecipeParser(dataclass_types, description=description)
    words = sys.argv[1:] if argv is None else argv
    if argv is None:
        sys.argv[1:] = _without_tokens(sys.argv[1:])
    try:
        return parser.parse(words)
    except ValueError as error:
        parser.error(str(error))


def _without_tokens(words: Sequence[str]) -> list[str]:
    """The command line as others may see it: W&B stores `sys.argv` with the run."""
    shown = [re.sub(r"^(--\w*token=).*", r"\1***", word) for word in words]
    return ["***" if re.fullmatch(r"--\w*token", before) else word for before, word in itertools.pairwise(["", *shown])]


def run(main: Callable[[], Any]) -> NoReturn:
    """Runs a recipe's `main`.

    Exit status: 0; 2 after a user's mistake or too little memory, with a message; 75 saved and stopped by a signal
    (`Preempted`); 130 Ctrl-C. torchrun and `accelerate launch` of several processes report 1 for any but 0.
    """
    status: Any = 0
    try:
        main()
    except Preempted as stop:
        status = stop.code
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; go on with --resume_from_checkpoint latest\n")
        sys.exit(130)
    except Exception as error:
        message = str(error) if isinstance(error, SciflowError) else _shortage(error)
        if message is None:
            raise
        sys.stderr.write(f"\nerror: {message}\n")
        leave_process_group(together=False)  # the other ranks may be anywhere
        sys.exit(2)
    leave_process_group()
    sys.exit(status)


def _shortage(error: Exception) -> str | None:
    """What to say where a disk is full or memory used up; None for other errors."""
    from .training.out_of_memory import memory_message  # torch, which is not needed before

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}: make room; the same command with --resume_from_checkpoint latest goes on."
    return memory_message(error)


def leave_process_group(*, together: bool = True) -> None:
    """A rank that exits with gloo's threads alive may abort after its work is done; `together`: once all are here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()  # networks under DDP, in the trainer's cycles of references, would keep the group's threads alive
        if together:
            dist.barrier()
        dist.destroy_process_group()
