"""The repository's documents, recipes and configs: the commands, flags, files and links that they name."""

import ast
import contextlib
import io
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

from sciflow_hf.cli import train
from sciflow_hf.cli.main import _parser
from sciflow_hf.options import RecipeParser, shipped_configs

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("train_*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose_of(path: Path) -> str:
    """What a person reads of a file: a document, a recipe's docstring, the header of a YAML."""
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(read(path))) or ""
    if path.suffix == ".yaml":
        return "\n".join(line.lstrip("# ") for line in read(path).splitlines() if line.startswith("#"))
    return read(path)


def commands(text: str) -> Iterator[list[str]]:
    """Recipe commands and `sciflow-hf` commands with flags, in words; a backslash joins lines.

    A training under `accelerate launch -m sciflow_hf.cli` or torchrun is that of `sciflow-hf`.
    """
    launcher = r"\s*(?:accelerate launch|torchrun)\b[^`]* -m sciflow_hf\.cli "
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|`", line):
            part = re.sub(launcher, "sciflow-hf ", part)
            found = re.match(r"\s*((?:python|torchrun|accelerate)\b.*recipes/\w+\.py|sciflow-hf [a-z0-9_ ]+--).*", part)
            if found:
                yield shlex.split(found.group(), comments=True)


def option_strings(recipe: Path) -> set[str]:
    """The flags that a recipe's own parser knows."""
    parser = parser_of(recipe)
    return {flag for action in parser._actions for flag in action.option_strings}


def parser_of(recipe: Path) -> RecipeParser:
    """The parser that the recipe makes: it is run as far as its call of `parse_args`."""
    import sciflow_hf

    asked: list[tuple[type, ...]] = []

    def parse_args(*classes: type, **options: object) -> NoReturn:
        asked.append(classes)
        raise SystemExit

    here = mock.patch.object(sys, "path", [str(recipe.parent), *sys.path])  # recipes import one another
    with here, mock.patch.object(sciflow_hf, "parse_args", parse_args), contextlib.suppress(SystemExit):
        runpy.run_path(str(recipe), run_name="__main__")
    return RecipeParser(list(asked[0]))


def faults(words: list[str]) -> list[str]:
    """What is wrong with a command: a file that is not there, a flag that does not exist, a missing argument."""
    if words[:2] == ["sciflow-hf", "train"]:
        recipe = train.RECIPES.get(words[2], "train_flux2klein")  # that of families of one's own
        return wrong_flags(ROOT / "recipes" / f"{recipe}.py", words[3:])
    if words[0] == "sciflow-hf":
        with_errors = io.StringIO()
        with contextlib.redirect_stderr(with_errors), contextlib.suppress(SystemExit):
            _parser().parse_args(words[1:])
        return with_errors.getvalue().splitlines()[-1:]
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
    recipe, flags = ROOT / words[place], words[place + 1 :]
    missing = [word for word in words[: place + 1] if word.startswith("recipes/") and not (ROOT / word).is_file()]
    if missing:
        return [f"no file {word}" for word in missing]
    return wrong_flags(recipe, flags)


def wrong_flags(recipe: Path, flags: list[str]) -> list[str]:
    known = option_strings(recipe)
    wrong = [f"no flag {word}" for word in flags if word.startswith("--") and word.split("=")[0] not in known]
    for word, value in itertools.pairwise(flags):
        if (
            word == "--config"
            and not (ROOT / value).is_file()
            and value not in shipped_configs()
            and not value.startswith("my_")
        ):
            wrong.append(f"no file {value}")
    return wrong


def mentioned_flags(text: str) -> set[str]:
    """Flags named in running text as `--flag`, alone or at the start of a code span."""
    return {m for span in re.findall(r"`([^`\n]+)`", text) for m in re.findall(r"^--[a-z0-9_]+", span)}


def links(text: str) -> list[str]:
    """Targets of links to files of the repository."""
    return [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]


def named_paths(text: str) -> list[str]:
    """Code spans and words that look like paths of the repository."""
    return re.findall(r"\b((?:recipes|docs|tests|notebooks|sciflow_hf)/[\w./-]+\.(?:py|yaml|md|ipynb))\b", text)
