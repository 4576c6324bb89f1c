"""Configs that come with the package: what each trains, on which hardware, in what time."""

import argparse
import itertools
import shutil
import textwrap
from pathlib import Path

from ..errors import SciflowError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy", metavar="NAME", help="Copy this config into --output_dir, to edit it.")
    parser.add_argument("--output_dir", type=Path, default=Path(), help="Folder of the copy (default: here).")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the list, or copies one config."""
    from ..options import shipped_configs

    configs = shipped_configs()
    if args.copy is None:
        width = shutil.get_terminal_size().columns
        for name, file in configs.items():
            print(name)
            print(textwrap.indent(textwrap.fill(header(file), width - 2, break_on_hyphens=False), "  "))
        print("\nsciflow-hf train FAMILY --config NAME; `--copy NAME` copies one here, to edit it.")
        return
    if args.copy not in configs:
        raise SciflowError(f"`copy` {args.copy!r}: use one of {', '.join(configs)}.")
    target = args.output_dir / configs[args.copy].name
    if target.exists():
        raise SciflowError(f"`copy` {args.copy}: {target} exists; delete it, or choose another --output_dir.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(configs[args.copy], target)
    print(f"Wrote {target}.")


def header(file: Path) -> str:
    """Purpose, hardware and time of a config: the first paragraph of the comment on its top."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return " ".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines))
