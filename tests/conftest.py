"""Fixtures shared by the tests: a tiny klein pipeline, drawn figures, and a cache written by hand."""

import os

# Before any import of the libraries that read them.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# So that every test file can say `from caches import write_cache`.
for _folder in Path(__file__).parent.iterdir():
    sys.path.insert(0, str(_folder))

from caches import encoder_settings, write_cache  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: results do not depend on the number of cores, and small tensors are faster."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the smallest klein pipeline; a token is 8x8 pixels, `bucket_step` 8. Read only."""
    from sciflow_hf.demo import make_tiny_klein

    return make_tiny_klein(tmp_path_factory.mktemp("klein") / "tiny", size="test")


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 24 drawn figures in three aspect ratios, with metadata.jsonl. Read only."""
    from sciflow_hf.demo import make_figures

    return make_figures(tmp_path_factory.mktemp("figures") / "drawn", num_figures=24, pixels_per_unit=0.3)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path) -> Path:
    """A cache of 24 samples in three non-square buckets whose shapes fit `tiny_klein`. Read only."""
    return write_cache(tmp_path_factory.mktemp("cache"), settings=encoder_settings(tiny_klein))
