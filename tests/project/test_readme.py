"""The documents say what is true: commands parse, files exist, CI runs the README's test command."""

import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from documents import (
    CONFIGS,
    DOCUMENTS,
    RECIPES,
    ROOT,
    commands,
    faults,
    links,
    mentioned_flags,
    named_paths,
    option_strings,
    parser_of,
    prose_of,
    read,
    relative,
)

from sciflow_hf.cli import train
from sciflow_hf.cli.main import _parser
from sciflow_hf.options import read_yaml

TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest"
DEMO_COMMAND = (
    "pip install -c constraints.txt -e . && "
    "python recipes/train_flux2klein.py --config recipes/configs/flux2klein_demo.yaml"
)


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
        _parser()
    return set(seen)


@pytest.mark.promise("B20", "D20", "D21")
@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_is_understood_by_the_family_it_names(path: Path) -> None:
    """Parsed as a user's run would parse it, so an option that was renamed or a wrong value is seen."""
    command, name, family, *argv = next(commands(prose_of(path)))
    assert (command, name) == ("sciflow-hf", "train") and argv[argv.index("--config") + 1] == path.stem
    options = read_yaml(path)
    if options.get("bf16"):  # TrainingArguments refuses bf16 where there is no GPU, unless told to use the CPU
        argv.append("--use_cpu")
    parsed = parser_of(ROOT / "recipes" / f"{train.RECIPES[family]}.py").parse(argv)
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
    assert list(commands("  torchrun --nproc_per_node 2 -m sciflow_hf.cli train dit --rank 1")) == [
        ["sciflow-hf", "train", "dit", "--rank", "1"],
    ]
    assert faults(["sciflow-hf", "train", "dit", "--rank", "1", "--config", "no"]) == ["no flag --rank", "no file no"]
    assert faults(["sciflow-hf", "train", "dit", "--image_size", "8", "--config", "dit_digits"]) == []
    assert faults(["sciflow-hf", "cache", "info", "--dataset_dir", "x"]) == []
    assert "--dataset" in faults(["sciflow-hf", "cache", "info", "--dataset", "x"])[0]
    assert mentioned_flags("`--rnak 4` and `pip --x`") == {"--rnak"}
    assert links("[a](docs/b.md#c) [d](https://e.f) [g](#h)") == ["docs/b.md"]
    assert named_paths("see docs/none.md, `tests/test_x.py`.") == ["docs/none.md", "tests/test_x.py"]
    assert {"--dataset_dir", "--strict", "--input_dir"} <= command_flags()
