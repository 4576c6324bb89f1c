"""Train a model family by its recipe. `sciflow-hf train FAMILY --help` prints all of its flags.

Several GPUs: `accelerate launch -m sciflow_hf.cli train FAMILY ...`, or `torchrun --nproc_per_node N -m` likewise.
"""

import argparse
import difflib
import importlib
import os
import sys

from ..errors import SciflowError
from ..files import recipes_folder

RECIPES = {
    "flux2_klein": "train_flux2klein",
    "flux2": "train_flux2",
    "qwen_image": "train_qwen_image",
    "qwen_image_edit": "train_qwen_image_edit",
    "z_image": "train_z_image",
    "ernie_image": "train_ernie_image",
    "sd3": "train_sd3",
    "flux": "train_flux",
    "flux_kontext": "train_flux_kontext",
    "sdxl": "train_sdxl",
    "dit": "train_dit",
    "microscopy_unet": "train_microscopy",
    "mini_klein": "pretrain_mini_klein",
    "dpo": "train_dpo",
    "reward": "train_reward",
}
"""Family -> its file in recipes/, whose steps are run. mini_klein is the small klein of the demo, made from nothing;
dpo and reward train the family that `--family` names, on comparisons and by rewards of its own images."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sciflow-hf train FAMILY [--config NAME_OR_FILE] [--OPTION VALUE ...]"
    text = f"{', '.join(RECIPES)}; or the dotted path of a family of your own, such as my_package.MyFamily."
    parser.add_argument("family", metavar="FAMILY", help=text)
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, help="`sciflow-hf configs` lists configs with their hardware."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the recipe's `main` as if the file had been called by its name; exits as it does."""
    if args.family not in RECIPES and "." not in args.family:
        near = difflib.get_close_matches(args.family, RECIPES, n=1, cutoff=0.5)
        meant = f"; did you mean `{near[0]}`?" if near else "."
        raise SciflowError(f"family {args.family!r}: use one of {', '.join(RECIPES)}, or a dotted path{meant}")
    import sciflow_hf as sf

    sys.argv = [f"sciflow-hf train {args.family}", *args.flags]
    sys.path.insert(0, str(recipes_folder()))
    sys.path.append(os.getcwd())  # where a family of the user's own may lie
    if args.family in RECIPES:
        sf.run(importlib.import_module(RECIPES[args.family]).main)
    steps, family = importlib.import_module("train_flux2klein").main, sf.load_family(args.family)
    sf.run(lambda: steps(family, None))
