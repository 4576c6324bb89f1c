"""`sciflow-hf prefer pairs`: a winner and its losers of the scored candidates of each prompt."""

import argparse

from ..errors import SciflowError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer pairs`, and its function as `run`."""
    parser.set_defaults(run=_pairs)


def _pairs(args: argparse.Namespace) -> None:
    raise SciflowError("`prefer pairs` is not there yet.")
