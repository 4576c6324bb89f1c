"""Prompts of a file or a data set, or those of the demos by their name."""

from typing import Any

DEMO_PROMPTS = ("demo_preferences", "demo_rings")


def prompts_of(source: str, *, split: str | None = None, option: str = "prompts_file") -> list[dict[str, Any]]:
    """Rows of `read_prompts`; for one of `DEMO_PROMPTS` those of small charts.

    `demo_preferences` has 120, of which half name no colour; `demo_rings` 60 of a kind that mini_klein does not know.

    Raises:
        SciflowError: as `read_prompts`.
    """
    from ..data.prompts import read_prompts
    from ..demo import house_prompts, ring_prompts

    if source == "demo_preferences":
        return house_prompts(120, seed=1)
    return ring_prompts(60, seed=1) if source == "demo_rings" else read_prompts(source, split=split, option=option)
