"""One parser for all recipes: HfArgumentParser dataclasses, `--config file.yaml` below the flags, errors that help."""

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from .errors import SciflowError


class RecipeParser(HfArgumentParser):
    """HfArgumentParser that takes YAML and flags together, refuses unknown names and suggests the nearest one."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file of options; flags win. `base:` names its parent.")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from defaults, then the YAML, then the flags."""
        config = self._config_file(argv)
        options = {name: action for action in self._actions for name in [action.dest] if name not in ("help", "config")}
        for name, value in (read_yaml(config) if config else {}).items():
            if name not in options:
                self.error(f"{config}: unknown option `{name}`{_nearest(name, options)}")
            options[name].required = False
            self.set_defaults(**{name: self._default(options[name], name, value)})
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

    @staticmethod
    def _config_file(argv: Sequence[str]) -> str | None:
        parser = HfArgumentParser([], add_help=False, allow_abbrev=False)
        parser.add_argument("--config")
        return parser.parse_known_args(list(argv))[0].config

    def _default(self, action: Any, name: str, value: Any) -> Any:
        """YAML values take the same road as flags: scalars as text, converted and checked by argparse."""
        if isinstance(value, list) and action.nargs == "+":
            return [self._get_value(action, str(item)) for item in value]
        if isinstance(value, list | dict) and action.type not in (dict, str):
            self.error(f"`{name}`: expected one value, got {value!r}")
        if value is None or isinstance(value, list | dict):
            return value
        converted = self._get_value(action, str(value))
        if action.choices is not None:
            self._check_value(action, converted)
        return [converted] if action.nargs == "+" else converted


def read_yaml(path: str | Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a YAML file on top of those of the file its `base:` names (relative to it). Safe load only."""
    file = Path(path).resolve()
    if file in seen:
        raise SciflowError(f"`base` of {seen[-1]}: {file} is already being read; the files name each other.")
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SciflowError(f"`config` {path}: cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise SciflowError(f"`config` {path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise SciflowError(f"`config` {path}: expected `option: value` lines, got {type(options).__name__}.")
    base = options.pop("base", None)
    return {**(read_yaml(file.parent / base, seen=(*seen, file)) if base else {}), **options}


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

    rank_zero = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank_zero else logging.ERROR, stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "filelock", "fsspec", "datasets", "accelerate", "urllib3", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.get_logger("transformers").propagate = False
    parser = RecipeParser(dataclass_types, description=(description or "").replace("%", "%%"))
    try:
        return parser.parse(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        parser.error(str(error))


def run(main: Callable[[], Any]) -> NoReturn:
    """Runs a recipe's `main`: a user's mistake ends in one line and status 2, Ctrl-C in status 130."""
    try:
        main()
    except SciflowError as error:
        sys.stderr.write(f"\nerror: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; go on with --resume_from_checkpoint latest\n")
        sys.exit(130)
    sys.exit(0)
