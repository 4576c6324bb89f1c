"""What shards and inline files share: index columns that say where the tensors of each row lie, and their reader."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import CacheError
from .. import storage
from ..parquet import Columns
from . import CODECS
from .members import DTYPES, Member

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_TENSORS = ("prompt_embeds", "prompt_embeds_scale", "pooled_prompt_embeds", "prompt_embeds_mask", "txt_ids")
"""What follows from the prompt alone."""
CONVERT = "Run `sciflow-hf cache convert` or `cache build` again"


def shape_column(name: str) -> str:
    """The index column that holds the shape of a tensor."""
    return "latent_shape" if name in ("latents", "latents_std") else f"{name}_shape"


def payload_columns(payload: Mapping[str, Any]) -> set[str]:
    """All index columns that say where and how large the tensors of a payload ({} for npz) are."""
    tensors = payload.get("tensors", {})
    places = {f"{name}_{end}" for name in tensors for end in ("offset", "nbytes", "crc32", "path")}
    shapes = {shape_column(name) for name in ("latents", "prompt_embeds", *tensors)}
    return {"cache_path", "inline_row"} | places | shapes


def stored_columns(tensor: str, found: Sequence[tuple[Sequence[int], int, int]]) -> dict[str, "pa.Array"]:
    """Index columns of one tensor from (shape, nbytes, crc32) of each row."""
    import pyarrow as pa

    columns = {
        f"{tensor}_nbytes": pa.array([nbytes for _, nbytes, _ in found], pa.int64()),
        f"{tensor}_crc32": pa.array([crc32 for _, _, crc32 in found], pa.int64()),
    }
    if not tensor.endswith("_scale") and tensor != "latents_std":  # which has the shape of the latents
        columns = {shape_column(tensor): pa.array([list(s) for s, _, _ in found], pa.list_(pa.int64()))} | columns
    return columns


def with_scales(tensors: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Says of each fp8 tensor which one holds its scales."""
    return {
        name: spec | ({"scale": f"{name}_scale"} if spec["dtype"] == "F8_E4M3" else {})
        for name, spec in tensors.items()
    }


class StoredPart:
    """The rows of one index file whose payloads lie in files of many samples; N rows.

    Args:
        file: the index file.
        root: where paths are rooted; a folder or URL.
        table: at least its columns `columns(payload)`, those of them that it has.
        payload: of its metadata.
        latent_shapes: (N, 3).
        text_shapes: (N, 2).

    Raises:
        CacheError: if columns or metadata are not what the library writes.
    """

    def __init__(
        self,
        file: str,
        root: str,
        table: "pa.Table",
        payload: Mapping[str, Any],
        latent_shapes: np.ndarray,
        text_shapes: np.ndarray,
    ) -> None:
        self.file, self.root = file, root
        self.tensors: dict[str, dict[str, Any]] = _checked_tensors(payload, file)
        columns = Columns(table, file, 0)
        self._nbytes = {name: numbers(columns, f"{name}_nbytes") for name in self.tensors}
        scales = {spec["scale"] for spec in self.tensors.values() if "scale" in spec}
        known = {"latents": latent_shapes, "latents_std": latent_shapes, "prompt_embeds": text_shapes}
        self._shapes = {
            name: known[name] if name in known else _shapes(columns, shape_column(name))
            for name in self.tensors
            if name not in scales
        }

    @classmethod
    def columns(cls, payload: Mapping[str, Any]) -> list[str]:
        """The index columns that a reader needs, where a file has them; without the checksums."""
        ends = ("offset", "nbytes", "path", "shape")
        return ["cache_path", "inline_row", *(f"{name}_{end}" for name in payload.get("tensors", {}) for end in ends)]

    def members(self, i: int, where: str) -> dict[str, Member]:
        """The tensors of row `i`; `where` names the row in errors."""
        found = {}
        for name, shapes in self._shapes.items():
            shape = tuple(shapes[i].tolist())
            scale = self.tensors[name].get("scale")
            below = None if scale is None else self._member(scale, i, shape[:1], None, where)
            found[name] = self._member(name, i, shape, below, where)
        return found

    def _member(self, name: str, i: int, shape: tuple[int, ...], scale: Member | None, where: str) -> Member:
        spec, nbytes = self.tensors[name], int(self._nbytes[name][i])
        file, offset = self._place(name, i, nbytes, where)
        return Member(name, file, offset, nbytes, spec["dtype"], shape, spec["codec"], scale=scale)

    def _place(self, name: str, i: int, nbytes: int, where: str) -> tuple[str, int]:
        """File and offset of a tensor's bytes."""
        raise NotImplementedError

    def _files(self, columns: Columns, name: str) -> tuple[list[str], np.ndarray]:
        """Distinct files of a column of paths below the root, and which of them each row has."""
        import pyarrow as pa

        paths = _column(columns, name)
        try:
            encoded = paths.cast(pa.large_string()).combine_chunks().dictionary_encode()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise columns.error(0, name, "a path") from error
        return [storage.join(self.root, path) for path in encoded.dictionary.to_pylist()], encoded.indices.to_numpy()


def _checked_tensors(payload: Mapping[str, Any], file: str) -> dict[str, dict[str, Any]]:
    tensors = payload.get("tensors")
    if not isinstance(tensors, dict) or "latents" not in tensors:
        raise CacheError(
            f"The schema metadata of the index {file}: `payload` is {payload!r}, which does not name `latents` among "
            f"its `tensors`. {CONVERT}."
        )
    for name, spec in tensors.items():
        known = isinstance(spec, dict) and spec.get("dtype") in DTYPES and spec.get("codec") in CODECS
        if not known or spec.get("scale", name) not in tensors:
            raise CacheError(
                f"The schema metadata of the index {file} says of `{name}`: {spec!r}. Known are the dtypes "
                f"{', '.join(DTYPES)} and the codecs {', '.join(CODECS)}. {CONVERT}, or use a newer sciflow-hf."
            )
    return tensors


def _column(columns: Columns, name: str) -> "pa.ChunkedArray":
    if name not in columns.table.column_names:
        raise CacheError(f"The index {columns.file} lacks the column {name!r}. {CONVERT}.")
    return columns.column(name)


def numbers(columns: Columns, name: str) -> np.ndarray:
    """(N,) int64, none of them negative."""
    import pyarrow as pa

    try:
        values = _column(columns, name).cast(pa.int64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise columns.error(0, name, "a whole number") from error
    if (values < 0).any():
        raise columns.error(int(np.argmax(values < 0)), name, "0 or more")
    return _compact(values)


def _shapes(columns: Columns, name: str) -> np.ndarray:
    """(N, dimensions) int32; any number of them."""
    lists = _column(columns, name)
    first = lists[0].as_py() if len(lists) else []
    if not isinstance(first, list):
        raise columns.error(0, name, "a list")
    if not first:
        return np.zeros((len(lists), 0), dtype=np.int32)
    return _compact(columns.shapes(name, ",".join("n" * len(first))))


def _compact(values: np.ndarray) -> np.ndarray:
    """The same array without memory for its rows where they are all alike, as in most caches."""
    return np.broadcast_to(values[:1].copy(), values.shape) if len(values) and (values == values[0]).all() else values
