"""The layout of the repository: import directions, one family a file, metadata in setup.cfg alone."""

import ast
import configparser
import fnmatch
import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

import sciflow_hf

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sciflow_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))
FAMILIES = [
    p for p in sorted((PACKAGE / "families").glob("*.py")) if p.stem not in ("__init__", "base", "loading", "tokens")
]
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))

# The rooms of `sciflow_hf`, lowest first: what a module of each may import beside its own room, in functions and for
# type checkers too. Whoever needs the type of an upper room is given the value, or has a small Protocol.
FOUNDATIONS = {"errors", "files", "options"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "options": {"errors", "files"},
    "diffusion": set(),
    "networks": set(),
    "engines": {*FOUNDATIONS, "diffusion"},
    "data": {*FOUNDATIONS, "diffusion"},
    "images": {*FOUNDATIONS, "diffusion", "data"},
    "pipelines": {"errors", "diffusion", "images"},
    "families": {*FOUNDATIONS, "diffusion", "networks", "engines", "images", "pipelines"},
    "adapters": {*FOUNDATIONS, "diffusion", "engines", "families"},
    "metrics": {*FOUNDATIONS, "diffusion", "images", "families"},
    "report": {*FOUNDATIONS, "diffusion", "data", "engines", "families", "adapters", "metrics"},
    "hub": {*FOUNDATIONS, "report"},
    "demo": {*FOUNDATIONS, "diffusion", "images"},
}
MAY_IMPORT["training"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

TOP_LEVEL = {
    *("sciflow_hf", "recipes", "tests", "notebooks", "docs", ".ci", ".github"),
    *("setup.cfg", "pyproject.toml", "constraints.txt", "constraints-min.txt", "mkdocs.yml"),
    *("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"),
    *(".gitignore", ".pre-commit-config.yaml"),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- checkers: source text in, complaints out ----


def imports(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Full names of all that is imported, inside functions and for type checkers too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def import_graph(sources: Mapping[str, str], packages: Collection[str] = ()) -> dict[str, set[str]]:
    """{module: the modules of `sources` that it imports}; a package is not imported by what lies in it."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = imports(ast.parse(source), module, is_package=module in packages)
        found = {next((n for n in (name, name.rpartition(".")[0]) if n in sources), module) for name in names}
        graph[module] = {name for name in found if not f"{module}.".startswith(f"{name}.")}
    return graph


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """The modules along a circle, the first one again at the end; [] where there is none."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for name in sorted(graph[path[-1]] - done):
            if name in path:
                return [*path[path.index(name) :], name]
            if found := walk([*path, name]):
                return found
        done.add(path[-1])
        return []

    return next((found for name in sorted(graph) if name not in done and (found := walk([name]))), [])


def room(module: str) -> str:
    """`data` of `sciflow_hf.data.build.plan`, `errors` of `sciflow_hf.errors`; "" is the face of the package."""
    return [*module.split("."), ""][1]


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
    """What is wrong with the file of a family: the step is the base's, a family predicts or is built on another."""
    tree = ast.parse(source)
    siblings = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module not in ("base", "loading", "tokens")
        for alias in node.names
    }
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and (
            any(isinstance(m, ast.FunctionDef) and m.name == "predict" for m in node.body)
            or siblings & {ast.unparse(base) for base in node.bases}
        )
    ]
    if len(classes) != 1:
        return [f"{len(classes)} classes with predict"]
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
    if methods[0].name != "predict" and "predict" in {method.name for method in methods}:
        faults.append(f"{methods[0].name} stands before predict")
    if any(method.name == "compute_loss" for method in methods):
        faults.append("writes the step out again")
    return faults


def code_lines(source: str) -> int:
    """Lines that are neither blank nor comments nor docstrings."""
    documented = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    ]
    prose = {line for text in documented for line in range(text.lineno, (text.end_lineno or 0) + 1)}
    written = [number for number, line in enumerate(source.splitlines(), 1) if re.match(r"\s*[^\s#]", line)]
    return len([number for number in written if number not in prose])


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


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in MODULES}
    return import_graph(sources, {module_name(path) for path in MODULES if path.name == "__init__.py"})


@pytest.mark.promise("C37")
def test_no_circles(graph: dict[str, set[str]]) -> None:
    assert " -> ".join(circle(graph)) == ""


@pytest.mark.promise("C38")
@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_what_the_table_allows(name: str, graph: dict[str, set[str]]) -> None:
    assert any(room(module) == name for module in graph), "no such room"
    allowed = MAY_IMPORT[name] | {name}
    edges = [(module, other) for module, others in graph.items() if room(module) == name for other in sorted(others)]
    assert [f"{module} -> {other}" for module, other in edges if room(other) not in allowed] == []


@pytest.mark.promise("C38")
def test_the_rooms_are_the_folders() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | files == set(MAY_IMPORT) and len(files) < 5
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{relative(path)} says what lives there"


def test_no_test_module_imports_another() -> None:
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    names = {name: imports(ast.parse(path.read_text(encoding="utf-8")), name) for name, path in tests.items()}
    assert [f"{n}: {i}" for n, found in names.items() for i in found if tests.keys() & set(i.split("."))] == []


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_use_public_names(path: Path) -> None:
    assert private_names(path.read_text(encoding="utf-8")) == []


def test_notebooks_use_public_names() -> None:
    """Or those that docs/add_a_family.md shows to who writes a family, or the `main` of `sciflow-hf`."""
    page = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
    shown = [b for b in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "class MyFamily" in b]
    published = {name for block in shown for name in imports(ast.parse(block), "my_family")} | {"sciflow_hf.cli.main"}
    found = {p.name: private_names(notebook_source(p.read_text(encoding="utf-8")), published) for p in NOTEBOOKS}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.promise("C37")
@pytest.mark.parametrize("path", FAMILIES, ids=relative)
def test_one_family_a_file(path: Path) -> None:
    assert family_faults(path.read_text(encoding="utf-8"), path.stem) == []


def test_the_step_is_short_and_stands_once() -> None:
    """In the base, in five paragraphs; a family of flow matching is two pages."""
    tree = ast.parse((PACKAGE / "families" / "base.py").read_text(encoding="utf-8"))
    steps = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "compute_loss"]
    assert len(steps) == 1
    body = "\n".join(ast.unparse(node) for node in steps[0].body[1:])
    assert len(body.splitlines()) <= 20
    for stem in ("flux", "flux2_klein", "qwen_image", "sd3", "z_image", "ernie_image", "flux2"):
        assert code_lines((PACKAGE / "families" / f"{stem}.py").read_text(encoding="utf-8")) <= 140, stem


@pytest.mark.promise("C08", "C09")
def test_every_family_file_is_built_in() -> None:
    from sciflow_hf.families import BUILT_IN, load_family

    assert set(BUILT_IN) == {path.stem for path in FAMILIES}
    for name in BUILT_IN:
        assert load_family(name).name == name


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_file_of_the_package(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert assert_lines(source) == [], "users get a SciflowError, never an assert"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in tree.body[1:])
    assert ast.get_docstring(tree) and lines <= 80


def test_top_level() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    names = {path.name for path in ROOT.iterdir()} - {".git"}
    names = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert names - TOP_LEVEL == set()


@pytest.mark.promise("B25")
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
    ("source", "found"),
    [
        ("import torch", []),
        ("from .b import f", ["x.p.b"]),
        ("from . import b", ["x.p.b"]),
        ("from .. import q", ["x.q"]),
        ("from ..q import deep", ["x.q.deep"]),
        ("from ..q.deep import f", ["x.q.deep"]),
        ("import x.q.deep", ["x.q.deep"]),
        ("from x import __version__", []),
        ("def f():\n    from .b import g", ["x.p.b"]),
        ("if TYPE_CHECKING:\n    from .b import T", ["x.p.b"]),
        ("try:\n    from .b import g\nfinally: 0", ["x.p.b"]),
    ],
)
def test_import_graph(source: str, found: list[str]) -> None:
    sources = dict.fromkeys(("x", "x.p", "x.p.b", "x.q", "x.q.deep"), "") | {"x.p.a": source}
    assert sorted(import_graph(sources)["x.p.a"]) == found
    assert import_graph({"x": "", "x.p": "from .a import g", "x.p.a": ""}, {"x", "x.p"})["x.p"] == {"x.p.a"}


def test_circle() -> None:
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]
    assert room("sciflow_hf.data.build.plan") == "data" and room("sciflow_hf.errors") == "errors"
    assert room("sciflow_hf") == ""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sciflow_hf as sf\nsf.load_cache('x')", []),
        ("from sciflow_hf import load_cache", []),
        ("import sciflow_hf as sf\nsf.training.DiffusionTrainer", ["sciflow_hf.training"]),
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

    def predict(self):
        pass

    def load_model(self):
        pass
"""


def test_family_faults() -> None:
    assert family_faults(FAMILY, "tiny") == []
    assert family_faults(FAMILY, "other") == ["`name` is ['tiny'], the file is called other"]
    assert family_faults(FAMILY.replace('    name: ClassVar[str] = "tiny"\n', ""), "tiny") != []
    assert family_faults(FAMILY.replace("load_model", "compute_loss"), "tiny") == ["writes the step out again"]
    late = FAMILY.replace("    def predict", "    def helper(self):\n        pass\n\n    def predict")
    assert family_faults(late, "tiny") == ["helper stands before predict"]
    assert family_faults(FAMILY + FAMILY.replace("Tiny", "Second"), "tiny") == ["2 classes with predict"]
    built_on = 'from .tiny import Tiny\n\n\nclass Edit(Tiny):\n    name = "edit"\n\n    def network_class(self): ...\n'
    assert family_faults(built_on, "edit") == []
    assert family_faults(built_on.replace(".tiny", ".base"), "edit") == ["0 classes with predict"]
    assert code_lines('"""a\n\nb\n"""\n# c\n\nx = """\nd"""\n    # e\ndef f():\n    """g"""\n    return 1\n') == 4


def test_small_checkers() -> None:
    assert assert_lines("def f(x):\n    assert x") == [2] and assert_lines("x = 'assert'") == []
    assert lower_bounds("a>=1.2\n\nB_c >= 3; sys_platform == 'linux'\nd") == {"a": "1.2", "b-c": "3", "d": ""}
    assert pins("# x\nA_b==1.0\n\nc==2") == {"a-b": "1.0", "c": "2"}


def test_test_files_have_names_of_their_own() -> None:
    """Of two with one name pytest collects the first, and calls the second an error."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
