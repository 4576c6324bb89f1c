"""Contents of a cache, as text tables: `sciflow-hf cache info`."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from ...diffusion.sources import source_name, source_names_in
from ...errors import CacheError
from ..build.cut import cut_text, folders_of, lengths_text, noted_cut
from ..cache import CAPTION_COLUMNS, LatentCache
from ..layouts.base import MASKS, Member
from ..writing import readable_bytes, text_table

_LOOKED_INTO = 8  # npz files: the index does not say what is in them


@dataclass
class StoredArrays:
    """The arrays of one name in a cache; one that several rows share counts once."""

    dtypes: set[str] = field(default_factory=set)
    codecs: set[str] = field(default_factory=set)
    count: int = 0
    bytes: float = 0.0
    estimated: bool = False


def describe_cache(cache: LatentCache, names: Sequence[str]) -> str:
    """Says of a cache what `sciflow-hf cache info` prints: samples, buckets, bytes, arrays, encoder settings.

    Args:
        cache: of `load_cache`, not a stream.
        names: what to call its folders, the entries of `dataset_dir`.
    """
    arrays, lengths = stored_arrays(cache), cache.text_lengths
    captions = any(cache.column(name) is not None for name in CAPTION_COLUMNS)
    low, high = min(lengths), max(lengths)
    tokens = f"{low} tokens" if low == high else f"{low} to {high} tokens ({len(set(lengths))} different)"
    size, missing = cache.payload_bytes()
    cut = noted_cut(folders_of(cache.index_files))
    masks, regions = (arrays.get(name, StoredArrays()).count for name in MASKS)
    numbers = [len(shapes) for shapes in cache.source_shapes if shapes]
    facts = [
        ("samples", f"{len(cache)}"),
        ("groups", f"{len(set(cache.groups))}"),
        ("layout", " and ".join(sorted({reader.payload.get("layout", "npz") for reader in cache.readers}))),
        ("payload", readable_bytes(size) + (f", {missing} files missing" if missing else "")),
        ("distinct prompts", f"{len(set(cache.captions))}" if captions else "unknown (no captions)"),
        ("text lengths", tokens if high else "no embeddings: prompts are encoded in training"),
        ("empty prompt", cache.empty_prompt_file or "not stored (no caption dropout)"),
        *([] if cut is None else [("cut captions", cut_text(cut))]),
        *([("captions by their tokens", lengths_text(cut))] if cut and cut["lengths"] else []),
        ("posterior", "sample (latents_std is stored)" if "latents_std" in arrays else "mode"),
        ("loss masks", f"{masks}" if masks else "none"),
        *([("edits", _edits(numbers, len(cache)))] if numbers else []),
        *([("changed regions", f"{regions}" if regions else "none")] if numbers else []),
        *([] if arrays.get("latents") else [("latents", "none: images are encoded in training")]),
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
    shown = Counter(" and ".join(f"{h} x {w}" for _, h, w in shapes) for shapes in cache.source_shapes)
    kinds = [("source latents (height x width)", "samples", "share")] + [
        (sizes or "none", f"{count}", f"{count / len(cache):.1%}") for sizes, count in shown.most_common()
    ]
    settings = [(f"  {key}", f"{value}") for key, value in cache.metadata.items() if key != "payload"]
    tables = [
        text_table(facts),
        text_table(sources, right=[1]),
        text_table(tensors, right=[3, 4]),
        text_table(buckets, right=[1, 2, 3]),
        *([text_table(kinds, right=[1, 2])] if numbers else []),
        "encoder settings\n" + text_table(settings) if settings else "encoder settings: unknown (no metadata)",
    ]
    return "\n\n".join(tables)


def _edits(numbers: Sequence[int], rows: int) -> str:
    """Rows with sources in words, from how many sources each has."""
    low, high = min(numbers), max(numbers)
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{len(numbers)} of {rows} samples, of {each} source{'s' * (high > 1)}"


def stored_arrays(cache: LatentCache) -> dict[str, StoredArrays]:
    """The arrays of a complete cache by name, as its index lists them; those of npz files from a look into a few."""
    found: dict[str, StoredArrays] = {}
    places: dict[str, dict[tuple[str, int], int]] = {}
    for reader in cache.readers:
        for tensor, spec in reader.tensors.items():
            name = _name(tensor)
            arrays = found.setdefault(name, StoredArrays())
            arrays.dtypes.add(spec["dtype"])
            arrays.codecs.add(spec["codec"])
            places.setdefault(name, {}).update(reader.places(tensor))
    for name, there in places.items():
        found[name].count, found[name].bytes = len(there), float(sum(there.values()))

    npz = [i for i in range(len(cache)) if not cache.reader(i).tensors]
    shapes = cache.source_shapes
    edits = [i for i in npz if shapes[i]]
    for rows, of_sources in ((npz, False), (edits, True)):
        looked = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, _LOOKED_INTO).astype(int))] if rows else []
        seen: list[Member] = []
        for i in looked:
            with suppress(CacheError):  # `cache verify` is for broken files
                seen += [m for m in cache.members(i).values() if (_name(m.name) == source_name(0)) == of_sources]
        total = sum(len(shapes[i]) for i in edits) if of_sources else len(npz)
        for member in seen:
            arrays = found.setdefault(_name(member.name), StoredArrays())
            arrays.estimated = True
            arrays.dtypes.add(member.dtype)
            arrays.codecs.add("none" if member.codec == "none" else "npz")
            arrays.bytes += member.nbytes * total / (len(seen) if of_sources else len(looked))
        for name in {_name(member.name) for member in seen}:
            found[name].count += total
    return found


def _name(tensor: str) -> str:
    """The name under which a tensor is listed: all sources of a row have one."""
    return source_name(0) if source_names_in([tensor]) else tensor
