"""Encode some samples of a cache afresh and compare: does it hold what the encoders make of these images?"""

import heapq
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...diffusion.randomness import hash64
from ...diffusion.sources import source_name
from ...errors import SciflowError
from ..batches.sizes import FITS
from ..build.reading import read_source
from ..build.references import SourceRules, SourceView, source_view
from ..build.sources.find import find_records
from ..build.sources.pixels import oriented_size, to_rgb
from ..build.sources.record import Record
from ..build.views import View, fit_pixels, view_of
from ..cache import LatentCache

TOLERANCE, FP8_TOLERANCE = 2e-2, 5e-2  # relative L2; storing alone costs about 2e-3 (bf16) and 2.7e-2 (fp8)


@dataclass
class Difference:
    """How far a stored tensor is from the one encoded afresh, over all samples that were compared.

    Attributes:
        name: of the tensor.
        stored: dtype on disk.
        samples: how many were compared.
        absolute: largest difference of a value.
        relative: largest relative L2 difference of a sample.
        worst: the sample that has it.
    """

    name: str
    stored: str
    samples: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    worst: str = ""

    @property
    def tolerance(self) -> float:
        """Tolerance for rounding to the stored dtype and encoding on another device."""
        return FP8_TOLERANCE if self.stored == "F8_E4M3" else TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether the tensor is what the encoders make (also false for NaN)."""
        return self.relative <= self.tolerance


def compare_afresh(
    cache: LatentCache,
    count: int,
    *,
    input_dir: str | os.PathLike[str],
    encode_images: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    encode_prompts: Callable[..., dict[str, torch.Tensor]],
    caption_column: str = "caption",
    split: str | None = None,
    sources: SourceRules | None = None,
    source_dir: Sequence[str | os.PathLike[str]] = (),
    source_column: Sequence[str] = (),
) -> list[Difference]:
    """Encodes `count` samples, spread over the cache by a hash of their names, from their images and captions.

    Args:
        cache: loaded in float32, so that what is compared is what is stored.
        input_dir: what the cache was built from.
        encode_images: as in `build_cache`.
        encode_prompts: as in `build_cache`.
        caption_column, split, sources, source_dir, source_column: as in `build_cache`.

    Returns:
        One difference for each tensor that is both stored and encoded.

    Raises:
        SciflowError: `count` is less than 1, or `input_dir` has none of the cache's images.
        CacheError: a sample cannot be read.
    """
    if count < 1:
        raise SciflowError(f"`sample` is {count}, but must be at least 1.")
    found_records, _ = find_records(
        input_dir, caption_column=caption_column, split=split, source_dir=source_dir, source_column=source_column
    )
    records = {(record.name, record.source_names): record for record in found_records}
    images, kinds, named = cache.strings("image_path") or [], cache.strings("variant"), cache.column("source_images")
    shown = [()] * len(images) if named is None else [tuple(names or ()) for names in named.to_pylist()]
    there = {i: records[key] for i, key in enumerate(zip(images, shown, strict=True)) if key in records}
    if not there:
        raise SciflowError(
            f"`input_dir` is {os.fspath(input_dir)!r}, which has none of the images of this cache (column "
            f"`image_path`, such as {images[:1]}) with the same reference images. Give the folder that the cache was "
            "built from."
        )
    ids = cache.row_ids
    chosen = sorted(heapq.nsmallest(count, there, key=lambda i: hash64(ids[i], "verify")))
    found: dict[str, Difference] = {}
    for i in chosen:
        record = there[i]
        with record.image.open() as image:
            variant = (kinds[i] if kinds else None) or ""
            view = view_of(
                variant, record.name, oriented_size(image), cache.buckets[i], cache.metadata.get("fit", FITS[0])
            )
            pixels = fit_pixels(to_rgb(image), view)
        members = cache.members(i)
        fresh = encode_images(torch.from_numpy(np.ascontiguousarray(pixels))[None])
        views = [] if sources is None else _source_views(record, view, sources)
        if "prompt_embeds" in members:
            reads = {"sources": [[source.window() for source in views]]} if sources is not None and sources.text else {}
            fresh |= encode_prompts([cache.caption(i)], **reads)
        fresh |= {} if sources is None else {source_name(s.number): _encoded(s, sources) for s in views}
        fresh = {"txt_ids" if name == "text_ids" else name: value[0] for name, value in fresh.items()}
        stored = cache[i]
        for name in sorted(fresh.keys() & stored.keys()):
            _compare(found.setdefault(name, Difference(name, members[name].dtype)), ids[i], stored[name], fresh[name])
    return list(found.values())


def _source_views(record: Record, view: View, rules: SourceRules) -> list[SourceView]:
    """The views of the sources of an image that is shown as `view`."""
    found = []
    for number, file in enumerate(record.sources):
        with file.open() as image:
            found.append(source_view(record, number, "", oriented_size(image), view, rules))
    return found


def _encoded(source: SourceView, rules: SourceRules) -> torch.Tensor:
    """(1, C, h, w). SciflowError where the source cannot be used."""
    pixels = read_source(source)
    if isinstance(pixels, str):
        raise SciflowError(f"{source.record.name}: its source {source.name}: {pixels}.")
    return rules.encode(torch.from_numpy(np.ascontiguousarray(pixels))[None])


def _compare(difference: Difference, row_id: str, stored: torch.Tensor, fresh: torch.Tensor) -> None:
    difference.samples += 1
    if stored.shape != fresh.shape:
        difference.absolute = difference.relative = float("inf")
        difference.worst = f"{row_id}: {tuple(stored.shape)} is stored, {tuple(fresh.shape)} encoded"
        return
    expected = fresh.detach().cpu().double()
    error = stored.double() - expected
    relative = float(error.norm() / expected.norm().clamp(min=1e-12))
    difference.absolute = max(difference.absolute, float(error.abs().max()))
    if not relative <= difference.relative:  # NaN counts as the worst
        difference.relative, difference.worst = relative, row_id
