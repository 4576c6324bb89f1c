"""A cache of VAE latents with the class of each image, in the index column `label`."""

from functools import cached_property
from typing import Any

import torch

from ..data.build.sources import Record
from ..data.cache import LatentCache
from ..errors import CacheError
from .class_source import ClassSource

LABEL = "label"


class ClassLatents(LatentCache):
    """A `LatentCache` whose samples have `class_labels`, too."""

    @classmethod
    def of(cls, cache: LatentCache) -> "ClassLatents":
        """The same rows, with labels."""
        return cls(cache._index, dtype=cache.dtype, rows=cache._rows)

    @cached_property
    def class_labels(self) -> torch.Tensor:
        """(N,), int64.

        Raises:
            CacheError: the index has no labels, or none in some row.
        """
        table = self._index.read_columns([LABEL])
        if LABEL not in table.column_names or table.column(LABEL).null_count:
            raise CacheError(
                f"the index has no `{LABEL}` (class of the image) in every row. Build the cache by `sciflow-hf cache "
                "build --family dit`, or train without classes by `--num_classes 0`."
            )
        return torch.from_numpy(table.column(LABEL).to_numpy()[self._rows].astype("int64"))

    @property
    def class_names(self) -> list[str]:
        """As the build noted them; numbers where it did not."""
        names: list[str] = self.metadata.get("class_names") or []
        return names or [str(number) for number in range(int(self.class_labels.max()) + 1)]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(i) | {"class_labels": self.class_labels[i]}

    def shapes(self, i: int) -> dict[str, torch.Tensor]:
        return super().shapes(i) | {"class_labels": self.class_labels[i]}


def class_records(source: ClassSource, num_classes: int | None) -> tuple[list[Record], list[str]]:
    """The images of a source for `build_cache`, with `label` in their columns, and the names of the classes."""
    labels, names = source.labels(num_classes)
    records = []
    for row, (name, size) in enumerate(zip(source.names, source.sizes(), strict=True)):
        columns: dict[str, Any] = {} if labels is None else {LABEL: int(labels[row])}
        caption = "image" if labels is None else names[int(labels[row])]
        records.append(Record(name, caption, size, lambda row=row: source.open(row), columns))  # type: ignore[misc]
    return records, names
