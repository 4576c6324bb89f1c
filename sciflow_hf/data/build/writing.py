"""Files of a cache that appear whole or not at all, and the form of its index and payloads."""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from ...errors import SciflowError
from ..parquet import METADATA_KEY, same_setting

if TYPE_CHECKING:
    import pyarrow as pa

SETTINGS_FILE = "build.json"
# Columns of every index that `build` writes; free columns of the input stand before them.
OWN_COLUMNS = {
    "image_path": "text",
    "caption": "text",
    "variant": "text",
    "cache_path": "text",
    "latent_shape": "shape",
    "prompt_embeds_shape": "shape",
    "bucket_w": "whole",
    "bucket_h": "whole",
    "aspect_ratio": "text",
    "original_h": "whole",
    "original_w": "whole",
    "crop_top": "whole",
    "crop_left": "whole",
}


def write_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that, whenever the process is killed, is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as handle:
                write(handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise cannot_write(file, error) from error


def cannot_write(file: Path, error: OSError) -> SciflowError:
    """What to say when the disk is full, or the folder cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SciflowError(
            f"{file} cannot be written: the disk is full ({error}). Make room for `output_dir` and repeat the same "
            "command: it goes on from here."
        )
    return SciflowError(f"{file} cannot be written ({error}). Is `output_dir` writable?")


def write_payload(file: Path, sample: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """An npz of tensors: floating ones in `dtype` (bfloat16 as bits in uint16), masks as they are, other int64."""
    arrays = {name: _array(value, dtype) for name, value in sample.items()}
    write_whole(file, lambda handle: np.savez(handle, **arrays))  # type: ignore[arg-type]


def _array(value: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    value = value.detach().cpu()
    if not value.is_floating_point():
        return (value if value.dtype in (torch.bool, torch.uint8) else value.to(torch.int64)).numpy()
    value = value.to(dtype).contiguous()
    if dtype == torch.bfloat16:  # numpy has no bfloat16
        return value.view(torch.int16).numpy().view(np.uint16)
    return value.numpy()


def index_schema(
    columns: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any], own: Mapping[str, str] = OWN_COLUMNS
) -> "pa.Schema":
    """Schema of an index whose rows have free `columns` before their `own`: the same for all parts.

    A free column of whole numbers, numbers or truth values keeps its type; any other becomes a string.
    """
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    for row in columns:
        for name, value in row.items():
            if name not in own:
                kinds.setdefault(name, set()).update(() if value is None else {type(value)})
    fields = []
    for name, kind in sorted(kinds.items()):
        if kind == {bool}:
            fields.append(pa.field(name, pa.bool_()))
        elif kind == {int}:
            fields.append(pa.field(name, pa.int64()))
        elif kind and kind <= {int, float}:
            fields.append(pa.field(name, pa.float64()))
        else:
            fields.append(pa.field(name, pa.string()))
    types = {"text": pa.string(), "whole": pa.int64(), "shape": pa.list_(pa.int64())}
    fields += [pa.field(name, types[kind]) for name, kind in own.items()]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(metadata).encode()})


def index_table(rows: Sequence[Mapping[str, Any]], schema: "pa.Schema") -> "pa.Table":
    """Rows as a table; what is not a text where one belongs becomes JSON."""
    import pyarrow as pa

    texts = {name for name in schema.names if pa.types.is_string(schema.field(name).type)}
    plain = [{k: _text(v) if k in texts else v for k, v in row.items() if k in schema.names} for row in rows]
    return pa.Table.from_pylist(plain, schema=schema)


def write_index(file: Path, rows: Sequence[Mapping[str, Any]], schema: "pa.Schema") -> None:
    """One part of an index; left alone if it says just that already."""
    import pyarrow.parquet as pq

    if not rows:
        file.unlink(missing_ok=True)
        return
    table = index_table(rows, schema)
    if not (file.is_file() and pq.read_table(file).equals(table)):
        write_whole(file, lambda handle: pq.write_table(table, handle))


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def readable_bytes(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


# What the settings of a cache say that was built before there were other layouts than npz.
_NPZ = {"payload": "npz", "embeds": "bf16", "codec": "none"}


def check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a folder that is not a cache of these settings."""
    file = output / SETTINGS_FILE
    if output.exists() and not output.is_dir():
        raise SciflowError(f"`output_dir` is {str(output)!r}, which is a file. Name a folder.")
    if not file.is_file():
        if output.is_dir() and next(output.rglob("*.parquet"), None) is not None:
            raise SciflowError(
                f"`output_dir` is {str(output)!r}, which holds parquet files, but no {SETTINGS_FILE}: it was "
                "not made by `sciflow-hf cache build`. Name another folder."
            )
        return
    try:
        before = _NPZ | json.loads(file.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise SciflowError(f"{file} is not the settings of a build ({error!r}). Name another `output_dir`.") from error
    differ = [
        f"`{key}` was {before.get(key)!r} and is now {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if not same_setting(key, before.get(key), settings.get(key))
    ]
    if differ:
        raise SciflowError(
            f"`output_dir` is {str(output)!r}, which was built with other settings: {'; '.join(differ)}. Use "
            "those, or name another folder."
        )
