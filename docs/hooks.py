"""What mkdocs cannot take from a file of docs/: flags, commands, configs, notebooks, links to the repository.

Imports the package and its recipes, and nothing of mkdocs: tests/project/test_site.py calls it without.
"""

import argparse
import html
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT / "tests" / "support"))

from documents import CONFIGS, parser_of, read  # noqa: E402

from sciflow_hf.cli.main import _parser  # noqa: E402
from sciflow_hf.cli.train import RECIPES  # noqa: E402
from sciflow_hf.options import RecipeParser  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MADE = {f"notebooks/{file.stem}.md": file for file in NOTEBOOKS} | {
    "mini_klein.md": ROOT / "sciflow_hf" / "assets" / "mini_klein" / "README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
}
"""Page of the site -> the file of the repository that it is made of."""
PLACES = {file: page for page, file in MADE.items()} | {ROOT / "notebooks": "notebooks.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `MADE`."""
    from mkdocs.structure.files import File

    for page, file in MADE.items():
        text = notebook(read(file)) if file.suffix == ".ipynb" else read(file)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in what `<!-- flags -->` and the like stand for, and turns links to other files into links to pages."""
    for name, make in (("flags", flags), ("commands", commands), ("configs", configs)):
        if (mark := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(mark, make())
    return linked(markdown, page.file.src_uri)


def linked(markdown: str, page: str) -> str:
    """`markdown` whose links, relative to the file that `page` is made of, are relative to the page."""
    source = MADE.get(page, DOCS / page)

    def place(link: re.Match[str]) -> str:
        target, anchor = link.group(1), link.group(2) or ""
        file = Path(os.path.normpath(source.parent / target))
        if file in CONFIGS:
            file, anchor = DOCS / "configs.md", f"#{file.stem}"
        found = DOCS / PLACES[file] if file in PLACES else file
        return f"]({Path(os.path.relpath(found, (DOCS / page).parent)).as_posix()}{anchor})"

    return re.sub(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", place, markdown)


# ---- flags and commands, from their parsers ----


def flags() -> str:
    """Every flag of every recipe, in the groups of `--help`; a group that several recipes have stands once."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for family, recipe in RECIPES.items():
        for title, rows in groups_of(parser_of(ROOT / "recipes" / f"{recipe}.py")):
            groups.setdefault((title, rows), []).append(family)
    sections = []
    for (title, rows), families in sorted(groups.items(), key=lambda item: -len(item[1])):
        taken = "all" if len(families) == len(RECIPES) else ", ".join(f"`{name}`" for name in families)
        sections.append(f"## {title}\n\nRecipes: {taken}.\n\n{table(rows)}")
    return "\n\n".join(sections)


def commands() -> str:
    """Every command of `sciflow-hf` with its description, usage and options."""
    return "\n\n".join(sections_of(_parser()))


def sections_of(parser: argparse.ArgumentParser) -> Iterable[str]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        usage = " ".join(parser.format_usage().split()).removeprefix("usage: ")
        rows = [row for _, found in groups_of(parser) for row in found]
        yield f"## {parser.prog}\n\n{parser.description}\n\n```text\n{usage}\n```\n\n{table(rows) if rows else ''}"
    for action in below:
        for command in dict.fromkeys(action.choices.values()):
            yield from sections_of(command)


def groups_of(parser: argparse.ArgumentParser) -> list[tuple[str, tuple[str, ...]]]:
    """(title, rows of a table) of each group of a parser that has options."""
    found = [(group.title or "", tuple(rows_of(group._group_actions))) for group in parser._action_groups]
    title = "The config" if isinstance(parser, RecipeParser) else ""
    return [(title if name == "options" else name, rows) for name, rows in found if rows]


def rows_of(actions: Iterable[argparse.Action]) -> Iterable[str]:
    for _, group in itertools.groupby(actions, lambda action: action.dest):  # `--x` and `--no_x` are one option
        action, *others = group
        if isinstance(action, argparse._HelpAction):
            continue
        written = [name for one in (action, *others) for name in one.option_strings]
        names = [name for name in written if "-" not in name.lstrip("-")]  # `--a-b` is `--a_b`
        shown_names = " ".join(f"`{name}`{{ #{name} }}" for name in names) or f"`{action.metavar or action.dest}`"
        default = getattr(action.default, "value", action.default)
        shown = "" if default in (None, "", argparse.SUPPRESS) else f"`{default!s}`"
        text = " ".join((action.help or "").split()) % {**vars(action), "prog": ""}
        yield f"| {shown_names} | {cell(shown)} | {cell(text)} |"


def table(rows: Iterable[str]) -> str:
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])


def cell(text: str) -> str:
    """Plain text as one cell of a table: only code spans are marked up."""
    parts = re.split(r"(`[^`]+`)", text.replace("|", "\\|"))
    plain = (re.sub(r"([*_\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2])
    return "".join(itertools.chain(*itertools.zip_longest(plain, parts[1::2], fillvalue="")))


# ---- files of the repository as pages ----


def configs() -> str:
    """Every config that comes with the package, as it is."""
    return "\n\n".join(f"## {file.stem}\n\n```yaml\n{read(file)}```" for file in CONFIGS)


def notebook(text: str) -> str:
    """The cells of a notebook as Markdown; nothing is run."""
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for source, kind in cells)
