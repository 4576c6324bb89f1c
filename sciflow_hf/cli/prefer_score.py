"""`sciflow-hf prefer score`: columns of scores for the candidates of `prefer draw`."""

import argparse

from ..errors import SciflowError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer score`, and its function as `run`."""
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    raise SciflowError("`prefer score` is not there yet.")
