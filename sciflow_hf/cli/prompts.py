"""Prompts of a file or a data set, or those of the demo by their name."""

from typing import Any

DEMO = "demo_preferences"
_NUMBER = 120  # of the demo's prompts


def prompts_of(source: str, *, split: str | None = None, option: str = "prompts_file") -> list[dict[str, Any]]:
    """Rows of `read_prompts`; for `demo_preferences` those of small charts of which half name no colour.

    Raises:
        SciflowError: as `read_prompts`.
    """
    from ..data.prompts import read_prompts
    from ..demo import house_prompts

    return house_prompts(_NUMBER, seed=1) if source == DEMO else read_prompts(source, split=split, option=option)
