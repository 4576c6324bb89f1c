"""`sciflow-hf prefer`: draw candidates for prompts, score them, and choose winners and losers."""

import argparse

from . import prefer_draw, prefer_pairs, prefer_score

_ACTIONS = {
    "draw": (prefer_draw, "draw several candidates for each prompt; the same command continues after a kill"),
    "score": (prefer_score, "score candidates by reward functions; the same command continues after a kill"),
    "pairs": (prefer_pairs, "choose a winner and its losers among the scored candidates of each prompt"),
}


def add_options(prefer: argparse.ArgumentParser) -> None:
    """Adds the actions of `sciflow-hf prefer`, each with its function as `run`."""
    actions = prefer.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, (module, text) in _ACTIONS.items():
        module.add_options(actions.add_parser(name, help=text, description=module.__doc__, allow_abbrev=False))
