"""Saved pipelines that load without this package: `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`."""

import ast
import importlib
import inspect
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

PIPELINE_FILE = "pipeline.py"


def standalone_source(module: ModuleType) -> str:
    """The source of `module`, with that of the modules it imports relatively instead of the imports.

    Raises:
        ValueError: two of them define the same name, or one imports another's under a new one.
    """
    done: dict[str, str] = {}
    _collect(module, done)
    names = Counter(name for source in done.values() for name in _defined(source))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{', '.join(done)} define {', '.join(twice)} more than once, and are to be one file.")
    return "\n\n".join(done.values())


def _defined(source: str) -> set[str]:
    """Names of the functions, classes and variables of a module."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def _collect(module: ModuleType, done: dict[str, str]) -> None:
    if module.__name__ in done:
        return
    source = inspect.getsource(module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{module.__name__}, line {node.lineno}: an import of ours under another name.")
            _collect(importlib.import_module("." * node.level + (node.module or ""), module.__package__), done)
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    done[module.__name__] = "\n".join(lines).strip() + "\n"


def add_code(folder: str | Path, pipeline: Any, *components: str) -> None:
    """Puts the code of `pipeline` and of its `components` next to their weights, where diffusers looks for it.

    Args:
        folder: a saved pipeline; its model_index.json is rewritten.
        components: names of those whose classes diffusers does not have.
    """
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = type(pipeline)
    (folder / PIPELINE_FILE).write_text(standalone_source(sys.modules[kind.__module__]), encoding="utf-8")
    index["_class_name"] = [PIPELINE_FILE.removesuffix(".py"), kind.__name__]
    for name in components:
        network = type(getattr(pipeline, name))
        module = sys.modules[network.__module__]
        # diffusers takes a bare `dit` for its own package of that name.
        stem = "modeling_" + module.__name__.rpartition(".")[2].removeprefix("modeling_")
        (folder / name / f"{stem}.py").write_text(standalone_source(module), encoding="utf-8")
        index[name] = [stem, network.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
