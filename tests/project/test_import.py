"""What `import sciflow_hf` and `--help` must not load, and the public names."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sciflow_hf

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))

# What takes long to import and is needed only for work. What importing TrainingArguments loads anyway (for example
# `peft`, depending on the version of transformers) is not ours to avoid.
STOCK = "from transformers import TrainingArguments, HfArgumentParser"
NETWORKS = {
    *("diffusers", "peft", "datasets", "pandas", "wandb", "tensorboard", "torchvision"),
    *("transformers.trainer", "transformers.modeling_utils", "transformers.models.qwen3"),
    "sciflow_hf.training.trainer",
}


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, check=False)


@functools.cache
def loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after `code`."""
    return output_and_modules(code)[1]


def output_and_modules(code: str) -> tuple[str, set[str]]:
    """What `code` prints in a fresh interpreter, and the names of the modules that are loaded then."""
    marker = "loaded modules: "
    report = f"import sys, json\nsys.stdout.write({marker!r} + json.dumps(sorted(sys.modules)))"
    result = python("-c", f"{code}\n{report}")
    assert result.returncode == 0, result.stderr
    output, _, modules = result.stdout.rpartition(marker)
    return output, set(json.loads(modules))


@pytest.mark.promise("C27")
def test_import_loads_nothing_heavy() -> None:
    plain = loaded_by("pass")
    ours = loaded_by("import sciflow_hf; sciflow_hf.__version__; dir(sciflow_hf)") - plain
    assert {name for name in ours if name.startswith("sciflow_hf")} == {"sciflow_hf"}
    assert not ours & {"torch", "transformers", "numpy", "yaml", *NETWORKS}


def test_the_look_at_modules_can_fail() -> None:
    assert "sciflow_hf.errors" in loaded_by("import sciflow_hf; sciflow_hf.SciflowError")
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize("name", [n for n in sciflow_hf.__all__ if n != "__version__"])
def test_public_name(name: str) -> None:
    value = getattr(sciflow_hf, name)
    assert callable(value) and value.__name__ == name
    assert value.__doc__, "public names are documented"


def test_names_are_listed_and_unknown_ones_refused() -> None:
    assert dir(sciflow_hf) == sorted(sciflow_hf.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        sciflow_hf.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from sciflow_hf import no_such_name")


HELP = f"""
import contextlib, io, json, runpy, sys
{STOCK}
print(json.dumps(["stock", None, "", sorted(sys.modules)]))
for recipe in sys.argv[1:]:
    sys.argv, printed, status = [recipe, "--help"], io.StringIO(), "it went on"
    sys.path.insert(0, recipe.rpartition("/")[0])
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([recipe, status, printed.getvalue(), sorted(sys.modules)]))
"""


def test_help_of_recipes() -> None:
    """All in one process, after what each must load; a module that one of them loads is there for those after it."""
    result = python("-c", HELP, *map(str, RECIPES))
    assert result.returncode == 0, result.stderr
    stock, *answers = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("["))
    assert [answer[0] for answer in answers] == [str(recipe) for recipe in RECIPES]
    for recipe, status, output, modules in answers:
        assert status in (0, None), recipe
        for flag in ("--config", "--output_dir", "--dry_run", "--learning_rate"):
            assert flag in output, recipe
        assert "sciflow_hf.training.arguments" in modules
        assert set(modules) & NETWORKS - set(stock[-1]) == set(), recipe


@pytest.mark.parametrize("args", [(), ("cache",), ("cache", "build"), ("cache", "info")], ids=" ".join)
def test_help_of_command(args: tuple[str, ...]) -> None:
    result = python("-m", "sciflow_hf.cli", *args, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: sciflow-hf")
