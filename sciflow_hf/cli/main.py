"""`sciflow-hf`: trainings, caches of latents and text embeddings, images of trained networks, and LoRA files."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import cache, configs, env, evaluate, export, init, page, prefer, push, sample, train
from .run import explained, outlast_readers, quieten

COMMANDS = {
    "train": (train, "train a model family by its recipe"),
    "configs": (configs, "the configs that come with the package"),
    "init": (init, "inspect a folder of images and write a config that trains on it"),
    "cache": (cache, "caches of latents and text embeddings"),
    "evaluate": (evaluate, "score the images of a base model and of adapters on the same prompts"),
    "prefer": (prefer, "candidates for prompts, their scores, and pairs of them for preference training"),
    "sample": (sample, "draw images of classes or prompts, or restore measured images"),
    "page": (page, "look at a training or an evaluation in a browser"),
    "export": (export, "export an adapter for another program"),
    "push": (push, "push a finished run to the Hub"),
    "env": (env, "versions and devices, for bug reports"),
}
"""Name -> its module, whose `add_options` gives a parser the options and the function to `run`, and its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Exit status: 0; 1 where `cache verify` found problems; 2 for a user's mistake (one line on stderr); 130 for Ctrl-C.
    """
    if argv is None:  # a process of its own
        outlast_readers()
        quieten()
    args = _parser().parse_args(argv)
    if args.run is not train.run:  # a recipe sets up its own
        _set_up_logging()
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    except Exception as error:  # a user's mistake gets one line, any other its traceback
        message = explained(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 2


def _set_up_logging() -> None:
    first_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first_rank else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "datasets", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr, without argparse's page of usage; exit status 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sciflow-hf", description=__doc__, allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="also show what other packages say as they are imported")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=text, description=module.__doc__, allow_abbrev=False))
    return parser


if __name__ == "__main__":
    sys.exit(main())
