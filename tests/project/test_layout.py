"""The layout of the repository: import direction, one family a file, sizes, metadata in setup.cfg alone."""

import ast
import configparser
import fnmatch
import json
import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import sciflow_hf

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sciflow_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))
FAMILIES = [p for p in sorted((PACKAGE / "families").glob("*.py")) if p.stem not in ("__init__", "base")]
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))

# What may be imported at run time from below `sciflow_hf`; what is not listed here may use everything.
MAY_IMPORT = {
    "diffusion": ("sciflow_hf.diffusion",),
    "data": (
        *("sciflow_hf.__version__", "sciflow_hf.errors", "sciflow_hf.diffusion", "sciflow_hf.images"),
        "sciflow_hf.data",
    ),
    "microscopy": ("sciflow_hf.errors", "sciflow_hf.diffusion", "sciflow_hf.images"),
    "families": (
        *("sciflow_hf.errors", "sciflow_hf.families.loading", "sciflow_hf.engines.quantisation"),
        *("sciflow_hf.diffusion", "sciflow_hf.families.base"),
        *("sciflow_hf.networks", "sciflow_hf.pipelines", "sciflow_hf.images"),
    ),
    "networks": (),
    "formats": ("sciflow_hf.errors", "sciflow_hf.adapters.formats"),
}

TOP_LEVEL = {
    *("sciflow_hf", "recipes", "tests", "notebooks", "docs", ".ci", ".github"),
    *("setup.cfg", "pyproject.toml", "constraints.txt", "constraints-min.txt"),
    *("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"),
    *(".gitignore", ".pre-commit-config.yaml"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- checkers: source text in, complaints out ----


def imports(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Full names of all that is imported, inside functions too; `if TYPE_CHECKING:` apart."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), module, is_package=is_package)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, module, is_package=is_package)


def forbidden_imports(source: str, module: str, allowed: tuple[str, ...], *, is_package: bool = False) -> list[str]:
    """Imports from the project that are neither in `allowed` nor below it."""
    return [
        name
        for name in imports(ast.parse(source), module, is_package=is_package)
        if name.split(".")[0] == "sciflow_hf" and not any(f"{name}.".startswith(f"{a}.") for a in allowed)
    ]


def private_names(source: str, published: Collection[str] = ()) -> list[str]:
    """Names of `sciflow_hf` that a recipe or notebook uses and that are neither public nor `published`."""
    tree = ast.parse(source)
    used = [name for name in imports(tree, "recipe") if name.split(".")[0] == "sciflow_hf"]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "sciflow_hf"
    }
    used += [
        f"sciflow_hf.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
    ]
    public = {"sciflow_hf", "sciflow_hf.demo", *(f"sciflow_hf.{name}" for name in sciflow_hf.__all__)}
    return [name for name in used if name not in public and name not in published]


def notebook_source(text: str) -> str:
    """The Python of a notebook's code cells, without lines for the shell and for IPython."""
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def family_faults(source: str, stem: str) -> list[str]:
    """What is wrong with the file of a family."""
    classes = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(m, ast.FunctionDef) and m.name == "compute_loss" for m in node.body)
    ]
    if len(classes) != 1:
        return [f"{len(classes)} classes with compute_loss"]
    family = classes[0]
    faults = []
    names = [
        ast.literal_eval(node.value)
        for node in family.body
        if isinstance(node, ast.AnnAssign | ast.Assign)
        and node.value is not None
        and ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]) == "name"
    ]
    if names != [stem]:
        faults.append(f"`name` is {names}, the file is called {stem}")
    methods = [node for node in family.body if isinstance(node, ast.FunctionDef)]
    if methods[0].name != "compute_loss":
        faults.append(f"{methods[0].name} stands before compute_loss")
    loss = next(method for method in methods if method.name == "compute_loss")
    if (lines := code_lines(loss)) > 40:
        faults.append(f"compute_loss has {lines} lines")
    return faults


def code_lines(function: ast.FunctionDef) -> int:
    """Lines from `def` to the last one, blank ones and comments included, the docstring left out."""
    total = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def assert_lines(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds(requirements: str) -> dict[str, str]:
    """`name>=version` lines -> {name: version}; KeyError-proof: a line without a lower bound maps to ""."""
    found = {}
    for line in filter(None, (line.split(";")[0].strip() for line in requirements.splitlines())):
        name, _, version = line.partition(">=")
        found[normal(name.strip())] = version.strip()
    return found


def pins(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- the repository ----


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20 and FAMILIES and RECIPES


@pytest.mark.parametrize("path", [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in MAY_IMPORT], ids=relative)
def test_import_direction(path: Path) -> None:
    within = path.relative_to(PACKAGE)
    found = forbidden_imports(
        path.read_text(encoding="utf-8"),
        module_name(path),
        MAY_IMPORT[within.parts[0]],
        is_package=path.name == "__init__.py",
    )
    assert found == []


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_use_public_names(path: Path) -> None:
    assert private_names(path.read_text(encoding="utf-8")) == []


def test_notebooks_use_public_names() -> None:
    """Or those that docs/add_a_family.md shows to who writes a family."""
    page = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
    shown = [b for b in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "class MyFamily" in b]
    published = {name for block in shown for name in imports(ast.parse(block), "my_family")}
    found = {p.name: private_names(notebook_source(p.read_text(encoding="utf-8")), published) for p in NOTEBOOKS}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("path", FAMILIES, ids=relative)
def test_one_family_a_file(path: Path) -> None:
    assert family_faults(path.read_text(encoding="utf-8"), path.stem) == []


def test_every_family_file_is_built_in() -> None:
    from sciflow_hf.families import BUILT_IN, load_family

    assert set(BUILT_IN) == {path.stem for path in FAMILIES}
    for name in BUILT_IN:
        assert load_family(name).name == name


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_file_of_the_package(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    assert assert_lines(source) == [], "users get a SciflowError, never an assert"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in tree.body[1:])
    assert ast.get_docstring(tree) and lines <= 80


def test_top_level() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    names = {path.name for path in ROOT.iterdir()} - {".git"}
    names = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert names - TOP_LEVEL == set()


def test_metadata_is_in_setup_cfg() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "project" not in pyproject, "a [project] table silently drops the dependencies of setup.cfg"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    required = lower_bounds(setup["options"]["install_requires"])
    nine = {"torch", "transformers", "diffusers", "peft", "datasets", "accelerate"}
    nine |= {"prodigyopt", "safetensors", "wandb"}
    assert nine <= set(required)
    required |= lower_bounds(setup["options.extras_require"]["test"])
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    minimum = pins((ROOT / "constraints-min.txt").read_text(encoding="utf-8"))
    assert set(required) <= set(tested)
    for name, version in required.items():
        assert minimum[name] == version or minimum[name] == f"{version}.0", name
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {sciflow_hf.__version__}\n" in citation


# ---- the checkers themselves ----


@pytest.mark.parametrize(
    ("source", "module", "allowed", "found"),
    [
        ("import torch", "sciflow_hf.diffusion.losses", "diffusion", []),
        ("from .randomness import randn", "sciflow_hf.diffusion.losses", "diffusion", []),
        ("from . import randomness", "sciflow_hf.diffusion.losses", "diffusion", []),
        ("from ..errors import X", "sciflow_hf.diffusion.losses", "diffusion", ["sciflow_hf.errors.X"]),
        ("def f():\n    from .. import trainer", "sciflow_hf.data.cache", "data", ["sciflow_hf.training.trainer"]),
        ("import sciflow_hf.families", "sciflow_hf.data.cache", "data", ["sciflow_hf.families"]),
        ("import sciflow_hf", "sciflow_hf.data.cache", "data", ["sciflow_hf"]),
        ("from sciflow_hf import __version__", "sciflow_hf.data.cache", "data", []),
        ("if TYPE_CHECKING:\n    from ..trainer import X", "sciflow_hf.families.a", "families", []),
        (
            "if typing.TYPE_CHECKING:\n    import x\nelse:\n    from .b import X",
            "sciflow_hf.families.a",
            "families",
            ["sciflow_hf.families.b.X"],
        ),
        (
            "from .base_two import X",
            "sciflow_hf.families.a",
            "families",
            ["sciflow_hf.families.base_two.X"],
        ),
        ("try:\n    from ..data import cache\nfinally: 0", "sciflow_hf.families.a", "families", None),
    ],
)
def test_forbidden_imports(source: str, module: str, allowed: str, found: list[str] | None) -> None:
    expected = ["sciflow_hf.data.cache"] if found is None else found
    assert forbidden_imports(source, module, MAY_IMPORT[allowed]) == expected


def test_forbidden_imports_of_a_package() -> None:
    source = "from .cache import load_cache\nfrom ..trainer import X"
    found = forbidden_imports(source, "sciflow_hf.data", MAY_IMPORT["data"], is_package=True)
    assert found == ["sciflow_hf.training.trainer.X"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sciflow_hf as sf\nsf.load_cache('x')", []),
        ("from sciflow_hf import load_cache", []),
        ("import sciflow_hf as sf\nsf.trainer.DiffusionTrainer", ["sciflow_hf.training.trainer"]),
        ("import sciflow_hf\nsciflow_hf._x", ["sciflow_hf._x"]),
        ("from sciflow_hf.training.trainer import DiffusionTrainer", ["sciflow_hf.training.trainer.DiffusionTrainer"]),
        ("import sciflow_hf.training.trainer", ["sciflow_hf.training.trainer"]),
    ],
)
def test_private_names(source: str, found: list[str]) -> None:
    assert private_names(source) == found


def test_notebook_source() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["from sciflow_hf import secret"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!ls\n", "import sciflow_hf._x"]},
    ]
    assert notebook_source(json.dumps({"cells": cells})) == "import sciflow_hf._x"


FAMILY = """
class Helper:
    pass

class Tiny(ModelFamily):
    name: ClassVar[str] = "tiny"

    def compute_loss(self):
        '''Says

        a lot.'''
{body}
    def load_model(self):
        pass
"""


def test_family_faults() -> None:
    good = FAMILY.format(body="        x = 1\n" * 39)  # with `def` 40 lines
    assert family_faults(good, "tiny") == []
    assert family_faults(good, "other") == ["`name` is ['tiny'], the file is called other"]
    assert family_faults(good.replace('    name: ClassVar[str] = "tiny"\n', ""), "tiny") != []
    long = FAMILY.format(body="        x = 1\n" * 40)
    assert family_faults(long, "tiny") == ["compute_loss has 41 lines"]
    late = good.replace("    def compute_loss", "    def helper(self):\n        pass\n\n    def compute_loss")
    assert family_faults(late, "tiny") == ["helper stands before compute_loss"]
    assert family_faults(good + good.replace("Tiny", "Second"), "tiny") == ["2 classes with compute_loss"]


def test_small_checkers() -> None:
    assert assert_lines("def f(x):\n    assert x") == [2] and assert_lines("x = 'assert'") == []
    assert lower_bounds("a>=1.2\n\nB_c >= 3; sys_platform == 'linux'\nd") == {"a": "1.2", "b-c": "3", "d": ""}
    assert pins("# x\nA_b==1.0\n\nc==2") == {"a-b": "1.0", "c": "2"}
