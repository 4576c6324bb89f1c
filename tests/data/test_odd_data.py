"""Builds of random data sets with oddities: all is in the cache as meant, or named; an edit leaves nothing old.

`pytest -m acceptance` builds 300; those that are done are kept in the folder of the variable SOAK_DIR, if it is set.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import odd_data
import pytest
from odd_data import KINDS, check, draw

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_what_is_meant_is_in_the_cache(seed: int, tmp_path: Path) -> None:
    """One of each kind of data set."""
    check(draw(seed), tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    generator = hashlib.sha256(Path(odd_data.__file__).read_bytes()).hexdigest()[:8]
    folder = Path(os.environ.get("SOAK_DIR") or tmp_path_factory.mktemp("soak")) / f"odd-data-{generator}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


@pytest.mark.acceptance
@pytest.mark.parametrize("seed", range(300))
def test_300_data_sets(seed: int, tmp_path: Path, done: Path) -> None:
    note = done / f"{seed}.txt"
    if not note.exists():
        note.write_text(check(draw(seed), tmp_path) + "\n", encoding="utf-8")
