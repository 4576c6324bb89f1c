"""Drawn figures and tiny pipelines, where nothing is downloaded. May import `images`, `diffusion` and `files`."""

from collections.abc import Callable
from pathlib import Path

from .figures import make_figures
from .mini_edits import edit_figures, edit_pairs, make_edit_pairs, mixed_figures
from .mini_figures import (
    SIZES,
    make_mini_figures,
    mini_figures,
    night_figures,
    pretraining_figures,
    pretraining_parts,
    ring_figures,
    unnamed_figures,
)
from .mini_klein import TEXT_LENGTH, start_mini_klein
from .mini_prompts import house_prompts, ring_prompts
from .mini_vae import train_mini_vae
from .tiny import make_tiny

__all__ = [
    "DEMO_FIGURES",
    "SIZES",
    "TEXT_LENGTH",
    "demo_figures",
    "demo_pipeline",
    "edit_pairs",
    "house_prompts",
    "make_edit_pairs",
    "make_figures",
    "make_mini_figures",
    "make_tiny",
    "mini_figures",
    "night_figures",
    "pretraining_figures",
    "pretraining_parts",
    "ring_figures",
    "ring_prompts",
    "start_mini_klein",
    "train_mini_vae",
    "unnamed_figures",
]

DEMO_FIGURES: dict[str, Callable[[Path], Path]] = {
    "demo": make_figures,
    "demo_night": lambda folder: make_mini_figures(folder, night_figures()),
    "demo_edits": edit_figures,
    "demo_rings": lambda folder: make_mini_figures(folder, ring_figures(600, seed=1, sizes=((64, 64),))),
    "demo_mixed": mixed_figures,
}
"""Name as `input_dir` -> what draws the figures into an empty folder."""
# Part of the folders' names: raise it when figures or weights change, so that an old folder is not used.
_VERSION = 3


def demo_figures(folder: str | Path, name: str = "demo") -> Path:
    """The demo's figures (`input_dir` one of `DEMO_FIGURES`): drawn below `folder` at first use, then found.

    "demo" has 100 of twelve kinds. The others are small ones, for `mini_klein`: "demo_night" 60, 42 of them in a style
    that it has never seen, "demo_edits" 400 pairs with an instruction and 60 figures, "demo_rings" 600, 360 of them
    of a kind that it has never seen, and "demo_mixed" 400 pairs and 200 figures.
    """
    target = Path(folder) / f"{name.replace('demo', 'figures').replace('_', '-')}-v{_VERSION}"
    return target if target.is_dir() else DEMO_FIGURES[name](target)


def demo_pipeline(folder: str | Path, family: str = "flux2_klein") -> Path:
    """A family's tiny pipeline (`pretrained_model_name_or_path: demo`): made below `folder` at first use."""
    target = Path(folder) / f"tiny-{family.replace('_', '-')}-v{_VERSION}"
    return target if target.is_dir() else make_tiny(target, family)
