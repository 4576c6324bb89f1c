"""Planned: a cache that is not built, of which a dry run knows the rows and shapes, but holds no payload."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...diffusion.sources import source_name
from .base import Columns, Member, Reader


class PlannedReader(Reader):
    """Says the shapes of the members that would be stored."""

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(columns, root, payload, *shapes)
        self._latents, self._texts, self._sources = shapes

    @classmethod
    def columns(cls, payload: Mapping[str, Any]) -> list[str]:
        return []

    def members(self, i: int, where: object) -> dict[str, Member]:
        shapes = {"latents": tuple(self._latents[i].tolist())}
        shapes |= {"prompt_embeds": tuple(self._texts[i].tolist())} if self._texts[i, 0] else {}
        shapes |= {source_name(number): shape for number, shape in enumerate(self._sources[i])}
        return {name: Member(name, self.file, 0, 0, "BF16", shape) for name, shape in shapes.items()}
