"""The documentation site lists every flag, public name and page, and every public name says what it does."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from documents import ROOT, option_strings, read

import sciflow_hf
from sciflow_hf.cli.main import COMMANDS
from sciflow_hf.cli.train import RECIPES
from sciflow_hf.families import BUILT_IN

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, as mkdocs loads it; mkdocs itself is not needed."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(hooks: ModuleType) -> str:
    return hooks.flags()


def test_every_flag_is_listed(flags: str) -> None:
    """With what it means, in a group that names its recipe; `--a-b` is `--a_b`."""
    assert set(BUILT_IN) < set(RECIPES)
    found: dict[str, set[str]] = {}
    for section in flags.split("\n## "):
        rows = re.findall(r"^\| (`--[^|]+) \| .* \| \S.* \|$", section, re.M)
        taken = re.search(r"^Recipes: (.*)\.$", section, re.M)
        assert taken, section
        for family in RECIPES if taken[1] == "all" else re.findall(r"`(\w+)`", taken[1]):
            found.setdefault(family, set()).update(flag for row in rows for flag in re.findall(r"`(--\w+)`", row))
    for family, recipe in RECIPES.items():
        known = option_strings(ROOT / "recipes" / f"{recipe}.py") - {"-h", "--help"}
        assert found[family] == {"--" + flag.lstrip("-").replace("-", "_") for flag in known}, family


def test_a_flag_has_its_default_and_its_range(flags: str) -> None:
    row = r"^\| `--mode_scale`\{ #--mode_scale \} \| `1.29` \| .*-1 to 1\.7519\. \|$"
    assert len(re.findall(row, flags, re.M)) == 1


def test_every_command_is_listed(hooks: ModuleType) -> None:
    text = hooks.commands()
    listed = re.findall(r"^## sciflow-hf ([\w-]+)( \w+)?$", text, re.M)
    assert {first for first, _ in listed} == set(COMMANDS) and ("cache", " verify") in listed
    assert re.search(r"^\| `--repair`.* \| `False` \| \S", text, re.M)


def test_every_public_name_has_its_place() -> None:
    """Once, in the reference; and the index of the reference names the same page."""
    files = (DOCS / "reference").glob("*.md")
    pages = {page.name: re.findall(r"^::: sciflow_hf\.(\w+)$", read(page), re.M) for page in files}
    placed = [name for names in pages.values() for name in names]
    assert sorted(placed) == sorted(set(sciflow_hf.__all__) - {"__version__"})
    index = dict(re.findall(r"^\| \[[^]]+\]\((\w+\.md)\) \| (.*) \|$", read(DOCS / "reference" / "index.md"), re.M))
    told = {page: set(re.findall(r"`(\w+)`", cell)) for page, cell in index.items()}
    assert told == {page: set(names) for page, names in pages.items() if page != "index.md"}


def test_every_page_is_in_the_navigation(hooks: ModuleType) -> None:
    nav = read(ROOT / "mkdocs.yml").partition("\nnav:\n")[2]
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(hooks.MADE)
    assert sorted(re.findall(r"[\w/]+\.md", nav)) == sorted(pages)


@pytest.mark.parametrize(
    ("page", "link", "found"),
    [
        ("index.md", "memory.md#x", "memory.md#x"),
        ("index.md", "https://x.org/a.md", "https://x.org/a.md"),
        ("index.md", "../notebooks/05_microscopy.ipynb", "notebooks/05_microscopy.md"),
        ("index.md", "../CONTRIBUTING.md#code", "contributing.md#code"),
        ("dit.md", "../recipes/configs/dit_digits.yaml", "configs.md#dit_digits"),
        ("contributing.md", "docs/memory.md", "memory.md"),
        ("contributing.md", "LICENSE", "../LICENSE"),  # which mkdocs reports
        ("reference/index.md", "../../CHANGELOG.md", "../changelog.md"),
    ],
)
def test_links_are_those_of_the_site(hooks: ModuleType, page: str, link: str, found: str) -> None:
    """From a page, or from a file elsewhere that becomes one."""
    assert hooks.linked(f"[a]({link})", page) == f"[a]({found})"


# ---- docstrings ----


def undocumented(source: str, public: set[str]) -> Iterator[str]:
    """Functions, classes and public methods of those named in `public` that have no docstring."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
            if ast.get_docstring(node) is None:
                yield node.name
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for method in methods:
                hidden = not isinstance(method, ast.FunctionDef) or method.name.startswith("_")
                if not hidden and ast.get_docstring(method) is None:
                    yield f"{node.name}.{method.name}"


def test_every_public_name_and_method_has_a_docstring() -> None:
    package = ROOT / "sciflow_hf"
    public: dict[Path, set[str]] = {}
    for name, module in sciflow_hf._PUBLIC.items():
        path = package / module.replace(".", "/")
        public.setdefault(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"), set()).add(name)
    assert sum(map(len, public.values())) > 40
    assert [name for file, names in public.items() for name in undocumented(read(file), names)] == []


def test_undocumented_can_fail() -> None:
    source = 'class A:\n    """a"""\n    def b(self): pass\n    def _c(self): pass\ndef d(): pass\ndef e(): pass\n'
    assert list(undocumented(source, {"A", "d"})) == ["A.b", "d"]
