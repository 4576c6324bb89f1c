"""`--family`: for recipes that train any family, which one the command line or its config names."""

import argparse
import sys
from collections.abc import Sequence
from typing import ClassVar

from ..families import load_family
from ..families.base import ModelFamily
from ..options import Options, arguments, option, read_yaml


@arguments
class FamilyArguments(Options):
    """Which model family is trained."""

    heading: ClassVar[str] = "Family"

    family: str = option(
        "flux2_klein", "Model family: a name, as of `sciflow-hf train`, or the dotted path of one of your own."
    )


def chosen_family(argv: Sequence[str] | None = None) -> type[ModelFamily]:
    """The class of the family that the command line names, or else its `--config`.

    Args:
        argv: default `sys.argv[1:]`.

    Raises:
        SciflowError: no such family, or a config that cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--family", "--config"):
        parser.add_argument(flag)
    found, _ = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    name = found.family or (read_yaml(found.config).get("family") if found.config else None)
    return load_family(str(name or FamilyArguments.family))
