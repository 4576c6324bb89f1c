"""Names of the latents of reference images ("sources") in samples and batches."""

import re
from collections.abc import Iterable

_NAME = re.compile(r"source_latents(?:_([1-9]\d*))?")


def source_name(number: int) -> str:
    """Name of the latents (C, h, w) of source `number`, from 0: source_latents, source_latents_1, ..."""
    return f"source_latents_{number}" if number else "source_latents"


def source_names_in(names: Iterable[str]) -> list[str]:
    """Those of `names` that are latents of sources, in the order of the sources."""
    found = [(int(match[1] or 0), name) for name in names if (match := _NAME.fullmatch(name))]
    return [name for _, name in sorted(found)]
