"""Phrases to avoid in documents, notebooks, headers of configs, help texts, docstrings and messages."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import CONFIGS, DOCUMENTS, ROOT, prose_of, read, relative

PHRASES = {
    r"\bgo(?:es)? on\b": "continue, resume",
    r"\bin place of\b": "instead of",
    r"\bbeside\b": "next to, in addition to",
    r"\bas seen\b": "name the observation",
    r"\bon paper\b": "estimated",
    r"\bwhole\b(?! numbers?\b)": "complete (whole numbers are fine)",
    r"\bnothing of ours\b": "without this package",
    r"\bby hand\b": "manually",
    r"\bthe other way round\b": "say both cases",
    r"\bso ha(?:s|ve) ": "also",
    r", too(?=[.,;:)]|$| (?!few|high|large|little|long|low|many|much|short|small))": "also",
    r"\b(?:is|are) there(?=[.;]|$)": "exists",
    r"(?:^|[.!?:] |\| |\n\s*)[-#>* ]*(?:What|Whatever|Where it is|That which)\b[^.?!|\n]*(?:[.!|\n]|$)": "a noun",
    r"^Of [^.]*\.": "the noun first",
}
"""Phrase -> better."""
ALLOWED: dict[str, str] = {}
"""A sentence with such a phrase -> why it stays."""
HISTORY = ROOT / "CHANGELOG.md"  # keeps the words of its time
CARDS = sorted((ROOT / "sciflow_hf" / "assets").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LAUNCHERS = sorted((ROOT / "recipes" / "launch").iterdir())
SOURCES = [*sorted((ROOT / "recipes").glob("*.py")), *sorted((ROOT / "sciflow_hf").rglob("*.py"))]


def texts(path: Path) -> Iterator[str]:
    """The prose of a file, without code: of a module its strings, which are docstrings, help texts and messages."""
    if path.suffix == ".py":
        nodes = (node.value for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.Constant))
        found = (value for value in nodes if isinstance(value, str) and " " in value)
    elif path.suffix == ".ipynb":
        found = ("".join(cell["source"]) for cell in json.loads(read(path))["cells"] if cell["cell_type"] == "markdown")
    elif path.suffix == ".md":
        found = iter([read(path)])
    else:
        found = iter([prose_of(path) if path.suffix == ".yaml" else read(path)])
    for text in found:
        text = re.sub(r"```.*?```|`[^`]*`", "`x`", text.strip(), flags=re.S)
        yield re.sub(r" *\n *(?![ \n|#>*-])", " ", text)  # a line per paragraph, item, heading and row of a table


def ticks(text: str) -> list[str]:
    """The phrases of `PHRASES` in a text, with some of their surroundings."""
    found = []
    for phrase in PHRASES:
        for match in re.finditer(phrase, text):
            around = " ".join(text[max(match.start() - 30, 0) : match.end() + 30].split())
            found += [around] * (not any(allowed in around for allowed in ALLOWED))
    return found


@pytest.mark.parametrize(
    "files",
    [[f for f in DOCUMENTS if f != HISTORY], CARDS, NOTEBOOKS, [*CONFIGS, *LAUNCHERS], SOURCES],
    ids=["documents", "cards", "notebooks", "headers", "sources"],
)
def test_plain_english(files: list[Path]) -> None:
    assert files
    found = {relative(file): [tick for text in texts(file) for tick in ticks(text)] for file in files}
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize(
    "text",
    ["The run goes on.", "64 in place of 128", "beside it", "It works, too.", "no file is there.", "the whole cache",
     "What it holds.", "It stops. Whatever ends it, resume.", "# What is where", "| What it does |", "Of the images.",
     "a\n\nWhat is held out (x): all", "So it is, so have these."],
)  # fmt: skip
def test_the_checker_can_fail(text: str) -> None:
    assert ticks(text)


@pytest.mark.parametrize("text", ["a whole number", "too many, too few", "What now?", "what it holds", "Of 2 files, 1"])
def test_other_words_pass(text: str) -> None:
    assert not ticks(text)
