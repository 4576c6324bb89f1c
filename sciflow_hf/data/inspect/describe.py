"""What a cache holds, as text tables: `sciflow-hf cache info`."""

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...errors import CacheError
from ..layouts.members import Member
from ..writing import readable_bytes

if TYPE_CHECKING:
    from ..cache import LatentCache

_LOOKED_INTO = 8  # npz files: the index does not say what is in them


@dataclass
class StoredArrays:
    """The arrays of one name in a cache; one that several rows share counts once."""

    dtypes: set[str] = field(default_factory=set)
    codecs: set[str] = field(default_factory=set)
    count: int = 0
    bytes: float = 0.0
    estimated: bool = False


def text_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lines of aligned columns; those numbered in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{c:>{w}}" if k in right else f"{c:<{w}}" for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def describe_cache(cache: "LatentCache", names: Sequence[str]) -> str:
    """All that `cache info` says of a complete cache; `names` are the entries of `dataset_dir`."""
    index, arrays, lengths = cache._index, stored_arrays(cache), cache.text_lengths
    size, missing = cache.payload_bytes()
    masks = arrays.get("loss_mask", StoredArrays()).count
    facts = [
        ("samples", f"{len(cache)}"),
        ("groups", f"{len(set(cache.groups))}"),
        ("layout", " and ".join(sorted({payload.get("layout", "npz") for payload in index.payloads}))),
        ("payload", readable_bytes(size) + (f", {missing} files missing" if missing else "")),
        ("distinct prompts", "unknown (no captions)" if index.captions is None else f"{len(set(cache.captions))}"),
        ("text lengths", _ranges(lengths) if max(lengths) else "no embeddings: prompts are encoded in training"),
        ("empty prompt", index.empty_prompt_file or "not stored (no caption dropout)"),
        ("posterior", "sample (latents_std is stored)" if "latents_std" in arrays else "mode"),
        ("loss masks", f"{masks}" if masks else "none"),
        ("fingerprint", cache.fingerprint),
    ]
    tensors = [("tensor", "dtype", "codec", "arrays", "bytes")] + [
        (name, *(" and ".join(sorted(kinds)) for kinds in (found.dtypes, found.codecs)), f"{found.count}",
         "about " * found.estimated + readable_bytes(found.bytes))
        for name, found in arrays.items()
    ]  # fmt: skip
    counts = np.bincount(cache.source_of_row, minlength=len(names))
    sources = [("source", "samples")] + [(name, f"{count}") for name, count in zip(names, counts, strict=True)]
    buckets = [("bucket (height x width)", "aspect", "samples", "share")] + [
        (f"{height} x {width}", f"{width / height:.2f}", f"{count}", f"{count / len(cache):.1%}")
        for (height, width), count in sorted(Counter(cache.buckets).items())
    ]
    settings = [(f"  {key}", f"{value}") for key, value in cache.metadata.items() if key != "payload"]
    tables = [
        text_table(facts),
        text_table(sources, right=[1]),
        text_table(tensors, right=[3, 4]),
        text_table(buckets, right=[1, 2, 3]),
        "encoder settings\n" + text_table(settings) if settings else "encoder settings: unknown (no metadata)",
    ]
    return "\n\n".join(tables)


def stored_arrays(cache: "LatentCache") -> dict[str, StoredArrays]:
    """The arrays of a complete cache by name, as its index lists them; those of npz files from a look into a few."""
    index = cache._index
    found: dict[str, StoredArrays] = {}
    for payload in index.payloads:
        for name, spec in payload.get("tensors", {}).items():
            arrays = found.setdefault(name, StoredArrays())
            arrays.dtypes.add(spec["dtype"])
            arrays.codecs.add(spec["codec"])
    parts = np.repeat(np.arange(len(index.parts)), np.diff(index.part_starts))
    roots = {root: number for number, root in enumerate(dict.fromkeys(index.part_roots))}
    root_of_row = np.array([roots[root] for root in index.part_roots])[parts]
    ends = ("path", "offset", "nbytes")
    table = index.read_columns(["cache_path", *(f"{name}_{end}" for name in found for end in ends)])
    for name, arrays in found.items():
        paths = f"{name}_path" if f"{name}_path" in table.column_names else "cache_path"
        columns = [c for c in (paths, f"{name}_offset", f"{name}_nbytes") if c in table.column_names]
        frame = table.select(columns).to_pandas().assign(root=root_of_row).dropna(subset=f"{name}_nbytes")
        if f"{name}_offset" in columns:  # inline rows have none, and share nothing
            frame = frame[frame[f"{name}_offset"].isna() | ~frame.duplicated(["root", paths, f"{name}_offset"])]
        arrays.count, arrays.bytes = len(frame), float(frame[f"{name}_nbytes"].sum())

    npz = np.flatnonzero(np.array([payload.get("layout", "npz") == "npz" for payload in index.payloads])[parts])
    seen: list[Member] = []
    looked = npz[np.unique(np.linspace(0, len(npz) - 1, _LOOKED_INTO).astype(int))] if len(npz) else npz
    for row in looked.tolist():
        with suppress(CacheError):  # `cache verify` is for broken files
            seen += index.members(row, f"row {row}").values()
    for member in seen:
        arrays = found.setdefault(member.name, StoredArrays())
        arrays.estimated = True
        arrays.dtypes.add(member.dtype)
        arrays.codecs.add("none" if member.codec == "none" else "npz")
        arrays.bytes += member.nbytes * len(npz) / len(looked)
    for name in {member.name for member in seen}:
        found[name].count += len(npz)
    return found


def _ranges(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low} tokens" if low == high else f"{low} to {high} tokens ({len(set(lengths))} different)"
