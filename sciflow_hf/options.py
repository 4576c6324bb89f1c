"""Options: dataclass fields that carry their range, checked when made, and one parser of flags and YAML for all."""

import argparse
import copy
import dataclasses
import difflib
import inspect
import itertools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, dataclass_transform, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import SciflowError
from .files import recipes_folder


class _Help(str):
    """A help text with the range of its option: stock HfArgumentParser passes all metadata on to argparse."""

    choices: Sequence[Any]
    within: str
    advice: str
    required_unless: str
    check: Callable[[Any], None] | None


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] = (),
    within: str = "",
    advice: str = "",
    required_unless: str = "",
    check: Callable[[Any], None] | None = None,
) -> Any:
    """A field of an argument dataclass: default, explanation and range in one place.

    Args:
        default: of the option; required without one. Lists and dicts are copied.
        help: what it does, for `--help` and the docstring; the range is added to it.
        choices: allowed values; of a list, allowed elements.
        within: interval of allowed numbers, such as "[0, 1)" or "(0, inf)".
        advice: sentence added to the error where the value is out of range.
        required_unless: the option that may be given instead: without either of them `advice` is the error.
        check: called with the dataclass when the option is not at its default, once for all options that name it, for
            what depends on other options; raises SciflowError.
    """
    many = isinstance(default, list)
    allowed = f"One{' or more' * many} of {', '.join(map(str, choices))}." if choices else ""
    words = _in_words(within)
    text = " ".join(filter(None, (help, allowed, f"{words[:1].upper()}{words[1:]}." if words else "")))
    described = _Help(_escaped(text))
    described.choices, described.within, described.advice, described.check = choices, within, advice, check
    described.required_unless = required_unless
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={"help": described})
    return dataclasses.field(default=default, metadata={"help": described})


# For type checkers every `option` has a default: they see one only where it is given by keyword.
@dataclass_transform(field_specifiers=(dataclasses.field,))
def arguments(kind: type) -> Any:
    """`dataclass` for argument classes: the help texts of its options become the `Args` of its docstring."""
    made: Any = dataclasses.dataclass(kind)
    lines = [f"    {f.name}: {f.metadata['help'].replace('%%', '%')}" for f in _described(made)]
    made.__doc__ = "\n".join([inspect.cleandoc(made.__doc__ or ""), "", "Args:", *lines])
    return made


class Options:
    """Base of argument dataclasses whose options are checked when they are made."""

    def __post_init__(self) -> None:
        check_options(self)


def check_options(args: Any) -> None:
    """Raises SciflowError where an option of `args` is out of its range, or cannot go with another one."""
    fields = _described(args)
    for field in fields:
        value, described = getattr(args, field.name), field.metadata["help"]
        if (other := described.required_unless) and not value and not getattr(args, other):
            raise SciflowError(described.advice or f"give `--{field.name}` or `--{other}`.")
        for single in value if isinstance(value, list) else [value]:
            if single is None:
                continue
            if described.choices and getattr(single, "value", single) not in described.choices:
                several = "one or more" if isinstance(value, list) else "one"
                allowed = f"use {several} of {', '.join(map(str, described.choices))}."
                raise SciflowError(" ".join(filter(None, (f"`{field.name}` {single!r}: {allowed}", described.advice))))
            if described.within:
                check_range(field.name, single, described.within, described.advice)
    changed = [field.metadata["help"].check for field in fields if getattr(args, field.name) != _default(field)]
    for check in dict.fromkeys(filter(None, changed)):  # once where several options name it
        check(args)


def given_options(args: Any) -> set[str]:
    """Names of the options that stand on the command line or in the YAML; without one, that differ from defaults."""
    if (given := getattr(args, "given", None)) is not None:
        return set(given)
    fields = [field for field in dataclasses.fields(args) if field.init]
    return {f.name for f in fields if (getattr(args, f.name) or None) != (_default(f) or None)}


def check_range(name: str, value: float, within: str, advice: str = "") -> None:
    """Raises SciflowError where the value of an option is no number in the interval, such as "[0, 1)"; NaN never is."""
    if not _is_within(value, within):
        words = _in_words(within) if math.isfinite(value) else f"a finite number is needed, {_in_words(within)}"
        raise SciflowError(" ".join(filter(None, (f"`{name}` {value}: {words.rstrip(', ')}.", advice))))


def _described(args: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(args) if isinstance(field.metadata.get("help"), _Help)]


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _bounds(within: str) -> tuple[float, float]:
    low, high = within[1:-1].split(",")
    return float(low), float(high)


def _is_within(value: float, within: str) -> bool:
    low, high = _bounds(within)
    return (low <= value if within[0] == "[" else low < value) and (
        value <= high if within[-1] == "]" else value < high
    )


def _in_words(within: str) -> str:
    """ "[1, inf)" -> "at least 1"; "(0, inf)" -> "above 0"; "[0, 4]" -> "0 to 4"; "[0, 1)" -> "in [0, 1)"."""
    if not within:
        return ""
    low, high = (bound.strip() for bound in within[1:-1].split(","))
    if low == "-inf":
        return ""
    if high == "inf":
        return f"at least {low}" if within[0] == "[" else f"above {low}"
    return f"{low} to {high}" if (within[0], within[-1]) == ("[", "]") else f"in {within}"


def _escaped(text: str) -> str:
    """A help text in which `%` stands for itself, but in `%(default)s`."""
    return re.sub(r"%(?!\(\w+\)s)", "%%", text.replace("%%", "%"))


class RecipeParser(HfArgumentParser):
    """HfArgumentParser that takes YAML and flags together, and suggests the nearest name for unknown ones."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        # argparse's own usage would list every option before the first of them is explained
        kwargs = {"usage": "%(prog)s [--config NAME_OR_FILE] [--OPTION VALUE ...]"} | kwargs
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        help = "YAML of options, a file or a name of `sciflow-hf configs`; flags override it."
        self.add_argument("--config", metavar="NAME_OR_FILE", help=help)
        help = "Also show what other packages say as they are imported."
        self.add_argument("--verbose", action="store_true", help=help)  # read by `run`, before there is a parser

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """The parent's, in groups: each option below the `heading` of the class that declares it, bases last."""
        hints = get_type_hints(dtype)
        declared: dict[type, list[dataclasses.Field]] = {kind: [] for kind in dtype.__mro__}
        for field in filter(lambda f: f.init, dataclasses.fields(dtype)):
            owner = next(kind for kind in dtype.__mro__ if field.name in vars(kind).get("__annotations__", {}))
            declared[owner].append(field)
        for owner, fields in declared.items():
            group = self.add_argument_group(vars(owner).get("heading", owner.__name__)) if fields else None
            for field in fields:
                found = copy.copy(field)
                found.type = hints[field.name]
                if text := field.metadata.get("help"):  # argparse formats it with `%`, which may stand in it by itself
                    found.metadata = {**field.metadata, "help": _escaped(text)}  # type: ignore[assignment]
                self._parse_dataclass_field(group, found)
                if isinstance(_default(field), list) and not _default(field):
                    self._actions[-1].nargs = "*"  # the flag without values switches off what a YAML says

    def error(self, message: str) -> NoReturn:
        """One line on stderr, without argparse's page of usage; exit status 2."""
        sys.stderr.write(f"{self.prog}: error: {' '.join(message.split())}\n")
        sys.exit(2)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from defaults, then the YAML, then the flags."""
        config = self._config_file(argv)
        options: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config", "verbose"):
                options.setdefault(action.dest, action)  # `--x` of a boolean stands before its `--no_x`
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        written = read_yaml(config) if config else {}
        for name, value in written.items():
            if name not in options:
                self.error(f"{config}: unknown option `{name}`{_nearest(str(name), ['base', *options])}")
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
        unset = object()
        flags = vars(self.parse_known_args(list(argv), argparse.Namespace(**dict.fromkeys(options, unset)))[0])
        given = {*written, *(name for name in options if flags[name] is not unset)}
        values, made = vars(namespace), []
        for kind in self.dataclass_types:
            names = {f.name for f in dataclasses.fields(kind) if f.init}
            made.append(kind(**{name: values[name] for name in names}))
            made[-1].given = given & names
        return tuple(made)

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
        if isinstance(value, list) and action.nargs in ("+", "*"):
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
        return [converted] if action.nargs in ("+", "*") else converted


def read_yaml(path: str | Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a YAML file (or `shipped_configs` name) on top of those of the one its `base:` names. Safe load.

    A file that `base:` names lies relative to the file that names it.
    """
    file = _path_of(path, seen[-1].parent if seen else Path()).resolve()
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
    return {**(read_yaml(base, seen=(*seen, file)) if base else {}), **options}


def shipped_configs() -> dict[str, Path]:
    """{name: file} of the configs that come with the package."""
    return {file.stem: file for file in sorted((recipes_folder() / "configs").glob("*.yaml"))}


def _path_of(name: str | Path, folder: Path) -> Path:
    file, known = folder / name, shipped_configs()
    if file.exists():
        return file
    if str(name) in {option for stem in known for option in (stem, f"{stem}.yaml")}:
        return known[Path(name).stem]
    close = [Path(name).stem] if Path(name).stem in known else difflib.get_close_matches(Path(name).stem, known, n=1)
    meant = f" Did you mean `{close[0]}` of the package?" if close else ""
    raise SciflowError(
        f"`config` {name}: cannot be read (no such file).{meant} `sciflow-hf configs` lists all of these."
    )


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
    for noisy in ("httpx", "httpx2", "httpcore", "filelock", "fsspec", "datasets", "accelerate", "urllib3", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.get_logger("transformers").propagate = False
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # "Loading weights", which a file would keep
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
