"""What the recipes' demo needs and no download gives: drawn figures and a tiny pipeline of each family."""

from importlib import import_module
from pathlib import Path

from .figures import make_figures
from .tiny_klein import make_tiny_klein

__all__ = ["demo_figures", "demo_pipeline", "make_figures", "make_tiny_klein"]

# Part of the folders' names: raise it when figures or weights change, so that an old folder is not used.
_VERSION = 1


def demo_figures(folder: str | Path) -> Path:
    """The demo's 100 figures (`input_dir: demo`): drawn below `folder` at first use, then found."""
    target = Path(folder) / f"figures-v{_VERSION}"
    return target if target.is_dir() else make_figures(target)


def demo_pipeline(folder: str | Path, family: str = "flux2_klein") -> Path:
    """A family's tiny pipeline (`pretrained_model_name_or_path: demo`): made below `folder` at first use."""
    target = Path(folder) / f"tiny-{family.replace('_', '-')}-v{_VERSION}"
    if target.is_dir():
        return target
    if family == "flux2_klein":
        return make_tiny_klein(target, size="demo")
    made: Path = import_module(f".tiny_{family}", __name__).make_tiny(target, size="demo")
    return made
