"""Columns of an index as arrays, with errors that name row and file."""

import re
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError

if TYPE_CHECKING:
    import pyarrow as pa


class Columns:
    """Columns of one index file, whose first row is row `start` of the whole index; N rows."""

    def __init__(self, table: "pa.Table", file: str, start: int) -> None:
        self.table, self.file, self.start = table, file, start

    def error(self, row: int, name: str, needed: str) -> CacheError:
        value = self.table.column(name)[row].as_py()
        return CacheError(
            f"Row {self.start + row} (in {self.file}): column `{name}` is {value!r}, but must be "
            f"{needed}. Mend the index, or run `sciflow-hf cache build` again."
        )

    def column(self, name: str) -> "pa.ChunkedArray":
        import pyarrow.types as types

        column = self.table.column(name)
        if not len(column):
            return column
        if column.null_count:
            raise self.error(int(np.argmax(column.is_null().to_numpy())), name, "given")
        if name == "cache_path" and not (types.is_string(column.type) or types.is_large_string(column.type)):
            raise self.error(0, name, "a path")
        return column

    def sizes(self, name: str) -> np.ndarray:
        import pyarrow as pa

        column = self.column(name)
        try:
            values = column.cast(pa.int64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self.error(0, name, f"a whole number of pixels in every row ({first_line(error)})") from error
        if (values <= 0).any():
            raise self.error(int(np.argmax(values <= 0)), name, "a positive number of pixels")
        return values.astype(np.int32)

    def shapes(self, name: str, form: str) -> np.ndarray:
        """Lists or strings ("(32, 64, 48)", "[32, 64, 48]", "32,64,48") -> (N, numbers in `form`), int32."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.types as types

        column, size = self.column(name), form.count(",") + 1
        if not len(column):
            return np.zeros((0, size), dtype=np.int32)
        needed = f"{size} positive whole numbers {form}"
        if types.is_string(column.type) or types.is_large_string(column.type):
            encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()  # few distinct shapes
            parsed = np.array([_parse_shape(text, size) for text in encoded.dictionary.to_pylist()], dtype=np.int64)
            shapes = parsed.reshape(-1, size)[encoded.indices.to_numpy()]
        elif types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
            odd = pc.not_equal(pc.list_value_length(column), size).to_numpy()
            if odd.any():
                raise self.error(int(np.argmax(odd)), name, needed)
            try:
                flat = pc.list_flatten(column).cast(pa.int64()).fill_null(0)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise self.error(0, name, f"{needed}, in every row ({first_line(error)})") from error
            shapes = flat.to_numpy().reshape(-1, size)
        else:
            raise self.error(0, name, f"{needed}, as a list or a string")
        odd = (shapes <= 0).any(axis=1)
        if odd.any():
            raise self.error(int(np.argmax(odd)), name, needed)
        return shapes.astype(np.int32)


def _parse_shape(text: str, size: int) -> list[int]:
    """The numbers of a shape in brackets or without; zeros, which no shape has, if it is none."""
    numbers = re.findall(r"\d+", text) if re.fullmatch(r"[\[(\s]*\d+(?:[,\s]+\d+)*[\])\s,]*", text) else []
    return [int(number) for number in numbers] if len(numbers) == size else [0] * size


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of its explanation."""
    return str(error).strip().partition("\n")[0]
