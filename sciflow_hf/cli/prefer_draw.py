"""`sciflow-hf prefer draw`: several candidates for each prompt, with their latents."""

import argparse

from ..errors import SciflowError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf prefer draw`, and its function as `run`."""
    parser.set_defaults(run=_draw)


def _draw(args: argparse.Namespace) -> None:
    raise SciflowError("`prefer draw` is not there yet.")
