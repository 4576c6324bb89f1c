"""SciForma's own caches: a table of images, and next to each image `<stem>_flux_h.npz` with what was encoded of it."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...diffusion.sources import source_name
from ...errors import CacheError
from .. import storage
from .base import INT32, REBUILD, Columns, Member, as_objects, same_everywhere
from .npz import NpzReader, npz_members

_SUFFIX = "_flux_h.npz"
_IMAGES = ("image_path", "target_image_path")  # of generations, of edits
_SOURCE = "source_image_path"
_BUCKETS = (("bucket_h", "bucket_w"), ("height", "width"))  # the latter in older tables
_FEW = 8


def is_table_of_images(columns: Collection[str]) -> bool:
    """Whether an index with these columns lists images with their buckets, and says nothing of payloads."""
    names = set(columns)
    named = not names.isdisjoint(_IMAGES) and any(names.issuperset(sides) for sides in _BUCKETS)
    return named and names.isdisjoint(("cache_path", "latent_shape", "group_id"))


class FluxHReader(NpzReader):
    """Rows whose payloads lie next to their images; of an edit, the source's next to the source."""

    told = "the first npz with the bucket of the row says of `{}`"

    def __init__(self, columns: Columns, root: str, payload: Mapping[str, Any], *shapes: np.ndarray) -> None:
        super().__init__(columns, root, payload, *shapes)
        self._sources = columns.table.column(_SOURCE) if _SOURCE in columns.names else None

    @classmethod
    def columns(cls, payload: Mapping[str, Any]) -> list[str]:
        return [*_IMAGES, _SOURCE, *_BUCKETS[0], *_BUCKETS[1]]

    @classmethod
    def completed(cls, table: pa.Table) -> pa.Table:
        """The table with `image_path` and `cache_path` of every row, `bucket_h` and `bucket_w`."""
        images = [table.column(name).cast(pa.large_string()) for name in _IMAGES if name in table.column_names]
        image = pc.coalesce(*images)
        made = {"image_path": image, "cache_path": _cache_path(image)}
        sides = next(names for names in _BUCKETS if set(names) <= {*table.column_names})
        made |= {name: table.column(side) for name, side in zip(_BUCKETS[0], sides, strict=True)}
        for name, column in made.items():
            at = table.schema.get_field_index(name)
            table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
        return table

    @classmethod
    def row_shapes(cls, columns: Columns, root: str) -> tuple[np.ndarray, ...]:
        """As `row_shapes` of an index that says them: text and channels are those of the first existing file.

        Every file is held against them when it is read.

        Raises:
            CacheError: that file does not hold what it should, or a bucket does not fit it.
        """
        sides = [columns.numbers(name, least=1, most=INT32, unit=" of pixels") for name in _BUCKETS[0]]
        sizes, paths = np.stack(sides, axis=1).astype(np.int32), columns.column("cache_path")
        few = np.unique(np.linspace(0, len(paths) - 1, min(_FEW, len(paths))).astype(int)).tolist()
        first = next(row for row in few if storage.exists(storage.join(root, paths[row].as_py())))
        where, file = f"Row {columns.start + first} (in {columns.file})", storage.join(root, paths[first].as_py())
        members = npz_members(file, where)
        if missing := {"latents", "prompt_embeds"} - members.keys():
            raise CacheError(f"{where}: {file} holds no {sorted(missing)}, but {sorted(members)}. {REBUILD}.")
        channels, *shape = members["latents"].shape
        factor = int(sizes[first, 0]) // shape[0]
        if sizes[first].tolist() != [factor * side for side in shape]:
            raise CacheError(
                f"{where}: its bucket is {sizes[first].tolist()}, its latents are {shape}, of another shape."
            )
        if (odd := sizes % factor > 0).any():
            column = int(odd.any(axis=0).argmax())
            raise columns.error(odd[:, column], _BUCKETS[0][column], f"a multiple of {factor} pixels, as a latent is")
        latents = np.concatenate([np.full((len(sizes), 1), channels, np.int32), sizes // factor], axis=1)
        texts = np.broadcast_to(np.array(members["prompt_embeds"].shape, np.int32), (len(sizes), 2))
        sources = same_everywhere((), len(sizes))
        if _SOURCE in columns.names:
            is_edit = columns.table.column(_SOURCE).is_valid().to_numpy()
            distinct, which = np.unique(latents, axis=0, return_inverse=True)
            shapes = as_objects([(tuple(row),) for row in distinct.tolist()])[which.reshape(-1)]
            sources = np.where(is_edit, shapes, sources) if is_edit.any() else sources
        return latents, texts, sources, sizes

    def members(self, i: int, where: object) -> dict[str, Member]:
        found = super().members(i, where)
        source = None if self._sources is None else self._sources[i].as_py()
        if source is None:
            return found
        path = _cache_path(pa.array([source]))[0].as_py()
        file = storage.join(self.root, path)
        if storage.inside(path, self.root) is None or not storage.exists(file):
            raise CacheError(
                f"{where}: it is an edit, and {file}, which would hold the latents of its source, is missing. Leave "
                "edits out by `--row_filter` (split=gen_768, by the column `split`), or build a cache of them from "
                "the images (`sciflow-hf cache build`)."
            )
        latents = npz_members(file, where).get("latents")
        return found if latents is None else found | {source_name(0): latents.renamed(source_name(0))}


def _cache_path(images: Any) -> Any:
    """The npz files of a column of images: "a/b.png" -> "a/b_flux_h.npz"."""
    return pc.replace_substring_regex(images, r"(\.[^./\\]*)?$", _SUFFIX, max_replacements=1)
