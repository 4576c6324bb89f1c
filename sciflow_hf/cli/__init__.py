"""`sciflow-hf`: one file a command. May import everything; nothing imports it."""

from .main import main

__all__ = ["main"]
