"""The documents say what is true: commands parse, files exist, CI runs the README's test command."""

import ast
import contextlib
import io
import itertools
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from sciflow_hf.cli import main as cli
from sciflow_hf.options import RecipeParser, read_yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("train_*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest"
DEMO_COMMAND = (
    "pip install -c constraints.txt -e . && "
    "python recipes/train_flux2klein.py --config recipes/configs/flux2klein_demo.yaml"
)


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
    """Recipe commands and `sciflow-hf` commands with flags, in words; a backslash joins lines."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|`", line):
            found = re.match(r"\s*((?:python|torchrun|accelerate)\b.*recipes/\w+\.py|sciflow-hf [a-z ]+--).*", part)
            if found:
                yield shlex.split(found.group(), comments=True)


def option_strings(recipe: Path) -> set[str]:
    """The flags that a recipe's own parser knows."""
    parser = parser_of(recipe)
    return {flag for action in parser._actions for flag in action.option_strings}


def parser_of(recipe: Path) -> RecipeParser:
    """The parser that the recipe makes: its dataclasses are read from its call of `parse_args`."""
    import sciflow_hf

    calls = [node for node in ast.walk(ast.parse(read(recipe))) if isinstance(node, ast.Call)]
    call = next(c for c in calls if ast.unparse(c.func).endswith("parse_args"))
    names = [ast.unparse(argument).removeprefix("sf.") for argument in call.args]
    own = {} if all(name in sciflow_hf.__all__ for name in names) else runpy.run_path(str(recipe))
    return RecipeParser([own.get(name) or getattr(sciflow_hf, name) for name in names])


def faults(words: list[str]) -> list[str]:
    """What is wrong with a command: a file that is not there, a flag that does not exist, a missing argument."""
    if words[0] == "sciflow-hf":
        with_errors = io.StringIO()
        with contextlib.redirect_stderr(with_errors), contextlib.suppress(SystemExit):
            cli._parser().parse_args(words[1:])
        return with_errors.getvalue().splitlines()[-1:]
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
    recipe, flags = ROOT / words[place], words[place + 1 :]
    missing = [word for word in words[: place + 1] if word.startswith("recipes/") and not (ROOT / word).is_file()]
    if missing:
        return [f"no file {word}" for word in missing]
    known = option_strings(recipe)
    wrong = [f"no flag {word}" for word in flags if word.startswith("--") and word.split("=")[0] not in known]
    for word, value in itertools.pairwise(flags):
        if word == "--config" and not (ROOT / value).is_file():
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


# ---- the repository ----


def test_the_two_commands_are_printed() -> None:
    text = read(ROOT / "README.md")
    assert f"\n{DEMO_COMMAND}\n" in text and f"\n{TEST_COMMAND}\n" in text


def test_ci_runs_the_test_command() -> None:
    assert f'"{TEST_COMMAND}"' in read(ROOT / ".ci" / "run")
    assert f"run: {TEST_COMMAND}\n" in read(ROOT / ".github" / "workflows" / "ci.yml")


@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES, *CONFIGS], ids=relative)
def test_commands_parse(path: Path) -> None:
    found = list(commands(prose_of(path)))
    assert found or (path.suffix == ".md" and path.name != "README.md"), "no command to check"
    assert [fault for words in found for fault in faults(words)] == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES, *CONFIGS], ids=relative)
def test_files_and_flags_exist(path: Path) -> None:
    text = prose_of(path)
    missing = [t for t in links(text) if not (path.parent / t).exists()]
    missing += [t for t in named_paths(text) if not (ROOT / t).exists()]
    assert missing == []
    known = {flag for recipe in RECIPES for flag in option_strings(recipe)} | OTHER_FLAGS | command_flags()
    known |= {flag for file in (ROOT / "tests/benchmarks").glob("*.py") for flag in benchmark_flags(file)}
    assert mentioned_flags(text) - known == set()


# Flags of other programs that documents may name.
OTHER_FLAGS = {"--minimum", "--nproc_per_node", "--main_process_port", "--master_port"}


def benchmark_flags(file: Path) -> list[str]:
    return re.findall(r'"(--[a-z_]+)"', file.read_text(encoding="utf-8"))


def command_flags() -> set[str]:
    """All flags of `sciflow-hf`, of every command."""
    seen: list[str] = []

    def collect(parser: object, *names: str, **options: object) -> object:
        seen.extend(name for name in names if name.startswith("--"))
        return original(parser, *names, **options)

    import argparse

    original: Callable[..., object] = argparse._ActionsContainer.add_argument
    with mock.patch.object(argparse._ActionsContainer, "add_argument", collect):
        cli._parser()
    return set(seen)


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_is_understood_by_the_recipe_it_names(path: Path) -> None:
    """Parsed as a user's run would parse it, so an option that was renamed or a wrong value is seen."""
    words = next(commands(prose_of(path)))
    place = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    assert words[words.index("--config") + 1] == relative(path)
    options = read_yaml(path)
    argv = [*words[place + 1 :]]
    argv[argv.index("--config") + 1] = str(path)
    if options.get("bf16"):  # TrainingArguments refuses bf16 where there is no GPU, unless told to use the CPU
        argv.append("--use_cpu")
    parsed = parser_of(ROOT / words[place]).parse(argv)
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert set(options) <= set(values)


# ---- the checkers themselves ----


def test_checkers_can_fail() -> None:
    text = "`sciflow-hf cache info --dataset_dir x`\n    accelerate launch recipes/train_x.py --a \\\n  b  # c"
    assert list(commands(text)) == [
        ["sciflow-hf", "cache", "info", "--dataset_dir", "x"],
        ["accelerate", "launch", "recipes/train_x.py", "--a", "b"],
    ]
    assert faults(["python", "recipes/train_none.py"]) == ["no file recipes/train_none.py"]
    recipe = "recipes/train_flux2klein.py"
    assert faults(["python", recipe, "--rnak", "4"]) == ["no flag --rnak"]
    assert faults(["python", recipe, "--config", "no.yaml", "--rank", "4"]) == ["no file no.yaml"]
    launch = ["accelerate", "launch", "--config_file", "recipes/launch/none.yaml", recipe]
    assert faults(launch) == ["no file recipes/launch/none.yaml"]
    assert faults(["sciflow-hf", "cache", "info", "--dataset_dir", "x"]) == []
    assert "--dataset" in faults(["sciflow-hf", "cache", "info", "--dataset", "x"])[0]
    assert mentioned_flags("`--rnak 4` and `pip --x`") == {"--rnak"}
    assert links("[a](docs/b.md#c) [d](https://e.f) [g](#h)") == ["docs/b.md"]
    assert named_paths("see docs/none.md, `tests/test_x.py`.") == ["docs/none.md", "tests/test_x.py"]
    assert {"--dataset_dir", "--strict", "--input_dir"} <= command_flags()
