"""Drawn figures and tiny pipelines, where nothing is downloaded. May import `images`, `diffusion` and `files`."""

from pathlib import Path

from .figures import make_figures
from .mini_edits import edit_pairs, make_edit_pairs
from .mini_figures import (
    SIZES,
    make_mini_figures,
    mini_figures,
    night_figures,
    pretraining_figures,
    pretraining_parts,
    unnamed_figures,
)
from .mini_klein import TEXT_LENGTH, start_mini_klein
from .mini_prompts import house_prompts
from .mini_vae import train_mini_vae
from .tiny import make_tiny

__all__ = [
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
    "start_mini_klein",
    "train_mini_vae",
    "unnamed_figures",
]

# Part of the folders' names: raise it when figures or weights change, so that an old folder is not used.
_VERSION = 2


def demo_figures(folder: str | Path, name: str = "demo") -> Path:
    """The demo's figures (`input_dir` demo, demo_night or demo_edits): drawn below `folder` at first use, then found.

    "demo" has 100 of twelve kinds, "demo_night" 60 small ones, 42 of them in a style that `mini_klein` has never seen,
    and "demo_edits" 400 pairs of small ones with an instruction.
    """
    target = Path(folder) / f"{name.replace('demo', 'figures').replace('_', '-')}-v{_VERSION}"
    if target.is_dir():
        return target
    if name == "demo_edits":
        return make_edit_pairs(target, list(edit_pairs(400, seed=1)))
    return make_figures(target) if name == "demo" else make_mini_figures(target, night_figures())


def demo_pipeline(folder: str | Path, family: str = "flux2_klein") -> Path:
    """A family's tiny pipeline (`pretrained_model_name_or_path: demo`): made below `folder` at first use."""
    target = Path(folder) / f"tiny-{family.replace('_', '-')}-v{_VERSION}"
    return target if target.is_dir() else make_tiny(target, family)
