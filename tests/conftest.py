"""Fixtures shared by the tests: a tiny klein pipeline, drawn figures, and a cache written by hand."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# For `from caches import write_cache`, and for recipes that are run here: the folder of a script is on the path.
sys.path.insert(0, str(Path(__file__).parent / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from hub_server import HubServer, prepare_clients

# Before any import of the libraries that read them.
prepare_clients()
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, here and in all that the tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from caches import encoder_settings, write_cache, write_edits  # noqa: E402

STARTS_PROCESSES = {"subprocess", "recipe_runs", "ranks", "faults", "hub_server"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of modules that start processes as `slow`: importing the libraries takes each of them seconds."""
    for item in items:
        values = vars(getattr(item, "module", None) or item).values()
        origins = {getattr(value, "__module__", None) or getattr(value, "__name__", None) for value in values}
        if origins & STARTS_PROCESSES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: results do not depend on the number of cores, and small tensors are faster."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_power_failure() -> Iterator[None]:
    """Processes die here, machines do not: nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_no_garbage() -> None:
    """Each training collects garbage, and took longer for the objects of imported libraries than for its steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the smallest klein pipeline; a token is 8x8 pixels, `bucket_step` 8. Read only."""
    from sciflow_hf.demo import make_tiny

    return make_tiny(tmp_path_factory.mktemp("klein") / "tiny", size="test")


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The smallest pipeline of each family of `family_steps.FAMILIES`, by its name. Read only."""
    from family_steps import make_pipelines

    return make_pipelines(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 24 drawn figures in three aspect ratios, with metadata.jsonl. Read only."""
    from sciflow_hf.demo import make_figures

    return make_figures(tmp_path_factory.mktemp("figures") / "drawn", num_figures=24, pixels_per_unit=0.3)


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path) -> Path:
    """A cache of 24 samples in three non-square buckets whose shapes fit `tiny_klein`. Read only."""
    return write_cache(tmp_path_factory.mktemp("cache"), settings=encoder_settings(tiny_klein))


@pytest.fixture(scope="session")
def even_cache(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path) -> Path:
    """Three buckets whose sizes are multiples of 4: an epoch of total batch 4 has no tail. Read only."""
    buckets = {(32, 48): 12, (48, 32): 8, (24, 64): 4}
    return write_cache(tmp_path_factory.mktemp("even"), settings=encoder_settings(tiny_klein), buckets=buckets)


@pytest.fixture(scope="session")
def edits_cache(tmp_path_factory: pytest.TempPathFactory, tiny_klein: Path) -> Path:
    """24 rows without sources, with one and with two, in two buckets, and masks of what changes. Read only."""
    return write_edits(tmp_path_factory.mktemp("edits"), settings=encoder_settings(tiny_klein))


@pytest.fixture(scope="session")
def family(tiny_klein: Path) -> Any:
    """The tiny klein as a family; tests of another family have their own."""
    import sciflow_hf as sf

    return sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)


@pytest.fixture(autouse=True)
def family_is_shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that puts a spy into `family` works on a copy: other tests have the same object."""
    yield
    shared = request.node.funcargs.get("family")  # not asked for again: the fixture may be gone by now
    spies = [name for name in getattr(shared, "__dict__", ()) if callable(getattr(type(shared), name, None))]
    assert not spies, "a spy is left in the shared family"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A running Hub whose only token, "dummy", belongs to "user" of the organisation "lab"."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it reads of folders: not in the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
