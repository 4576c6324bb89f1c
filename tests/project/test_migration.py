"""docs/migration.md: a row for each capability of the older code, kept by a test; every name is one of today."""

import ast
import functools
import re
from pathlib import Path

import pytest
from documents import mentioned_flags, option_strings
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
# Capabilities that their documents name.
FINE_TUNING = {"OpenSciDraw": 42, "ScienceFlow": 27, "EriDiffusion": 31}
FROM_SCRATCH = {"PKL diffusion": 38, "EasyDeL image diffusion": 26}
PROMISED = FINE_TUNING | FROM_SCRATCH
LETTERS = dict(zip(("OpenSciDraw", "ScienceFlow", "PKL diffusion", "EasyDeL image diffusion", "EriDiffusion"), "ABCDE",
                   strict=True))  # fmt: skip
JUDGED: dict[str, str] = {
    "B26": "whether a README has what a reader looks for is for readers to say",
}
"""Rows that no test can keep -> why."""
# Of other libraries and of the shell, and what a placeholder stands for.
FOREIGN = {"Dataset", "GradScaler", "CUDA_VISIBLE_DEVICES", "grad_norm", "loss_q1", "loss_q4"} | {
    "my_package",
    "my_module",
}


def table(title):
    """(id, there, here) of the table below a heading."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    assert section is not None
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.group(1).splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in row) for row in cells[2:]]


def rows(title):
    """(there, here) of the table below a heading."""
    return [(there, here) for _, there, here in table(title)]


def promises(source):
    """{name of a function: the ids of its `@pytest.mark.promise(...)`}."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        for mark in getattr(node, "decorator_list", []):
            if ast.unparse(mark).startswith("pytest.mark.promise("):
                found[node.name] = [argument.value for argument in mark.args]
    return found


@functools.cache
def names_of_the_package():
    """Everything that the package defines, is called with, or says as a word: names, arguments, attributes, strings."""
    names = set()
    for file in [*(ROOT / "sciflow_hf").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.arg):
                names.add(node.id if isinstance(node, ast.Name) else node.arg)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
                names.add(node.value)
    return names


def named(here):
    """Identifiers in the code spans of a cell: of `a.b(c=d)` a, b and c; flags, paths, files and commands apart."""
    for span in re.findall(r"`([^`]+)`", here):
        if re.match(r"--|[\w<>-]+/|pip |sciflow-hf|torchrun|accelerate|<", span) or re.search(
            r"\.(md|cfg|json|py|yaml)$", span
        ):
            continue
        yield from re.findall(r"[A-Za-z_]\w*(?=$|[.(=,)\s:])", span)


@pytest.mark.parametrize("title", PROMISED)
def test_each_capability_has_its_row(title):
    found = rows(title)
    assert len(found) == PROMISED[title]
    assert all(there and here for there, here in found) and len({there for there, _ in found}) == len(found)
    nothing = [here for _, here in found if here.startswith("none")]
    assert all(":" in here for here in nothing), "what is not there is said with its reason"


def test_each_row_is_kept_by_a_test_or_judged():
    """By a test that `pytest` collects and runs, which `pytest -m promise` runs, too."""
    ids = [name for title in PROMISED for name, *_ in table(title)]
    assert sorted(ids) == [f"{LETTERS[t]}{n:02d}" for t in LETTERS for n in range(1, PROMISED[t] + 1)]
    kept = {}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        for test, named in promises(source).items() if "mark.promise(" in source else ():
            where = f"{file.relative_to(ROOT)}::{test}"
            assert file.name.startswith("test_") and test.startswith("test_") and named, f"{where} is no test"
            for name in named:
                kept.setdefault(name, []).append(where)
    assert sorted(kept.keys() - set(ids)) == [], "no such row"
    assert not kept.keys() & JUDGED.keys()
    assert sorted(set(ids) - kept.keys() - JUDGED.keys()) == [], "kept by no test"


@pytest.mark.parametrize("title", PROMISED)
def test_each_name_is_one_of_today(title):
    known = names_of_the_package() | FOREIGN
    known |= {name for kind in (Trainer, TrainerCallback, TrainerState, TrainingArguments) for name in dir(kind)}
    known |= set(TrainingArguments.__dataclass_fields__) | set(TrainerState.__dataclass_fields__)
    found = [name for _, here in rows(title) for name in named(here)]
    assert len(found) >= 8
    assert sorted(set(found) - known) == []


def test_names_stand_in_the_files_that_are_named_with_them():
    """Of "`name(...)` in `sciflow_hf/file.py`", and patterns of files."""
    found = re.findall(r"`(\w+)[^`]*` in `(sciflow_hf/[^`]+\.py)`", TEXT)
    assert len(found) >= 6
    assert [(name, file) for name, file in found if name not in (ROOT / file).read_text(encoding="utf-8")] == []
    patterns = re.findall(r"`(\w[\w./]*\*[\w.*]*)`", TEXT)
    assert patterns and all(any(ROOT.glob(pattern)) for pattern in patterns)


def test_each_flag_is_of_a_recipe_or_command():
    """By `tests/project/test_readme.py`, too; here, that every family's recipe takes those of training."""
    recipes = [option_strings(ROOT / "recipes" / f"train_{name}.py")
               for name in ("flux2klein", "qwen_image", "sd3", "flux", "sdxl")]  # fmt: skip
    shared = set.intersection(*recipes)
    flags = flags_in(FINE_TUNING)
    assert len(flags) > 50
    of_one_family = {"--no_use_t5", "--guidance_scale"}
    of_building = {"--crops", "--flip"}
    assert flags - shared - of_one_family - of_building == set()
    both = option_strings(ROOT / "recipes" / "train_dit.py") | option_strings(ROOT / "recipes" / "train_microscopy.py")
    of_sampling = {"--cascade", "--data_consistency", "--help"}
    assert flags_in(FROM_SCRATCH) - both - of_sampling == set()


def flags_in(titles):
    """Flags that the tables below these headings name."""
    return mentioned_flags("\n".join(here for title in titles for _, here in rows(title)))


def test_the_checker_can_fail():
    marked = "@pytest.mark.slow\n@pytest.mark.promise('A01', 'B02')\ndef test_x(): ...\n\ndef test_y(): ..."
    assert promises(marked) == {"test_x": ["A01", "B02"]}
    assert list(named("`a.b(c=1)`, `--flag`, `docs/x.md`, `sciflow-hf cache build`, `trainer.train()`")) == [
        *("a", "b", "c", "trainer", "train"),
    ]
    assert "load_cache" in names_of_the_package() and "load_cash" not in names_of_the_package()
    assert not re.search(r"seeds/|/work|CHECKLIST", TEXT)
