"""Where an adapter lies: a file, a folder, a Hub repository or a URL, brought here as one safetensors file."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import SciflowError

WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # as diffusers' pipelines call it
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
FACTS_NAMES = ("run.json", "run_facts.json")
"""Files of a run, in its folder and on the Hub, that name the family."""

_NAMES = (WEIGHT_NAME, PEFT_WEIGHT_NAME, PEFT_CONFIG_NAME, *FACTS_NAMES)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)")  # user/repository
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def local_adapter(path: str) -> Iterator[Path]:
    """The safetensors file that `path` names, inside the block; what belongs to it lies beside it.

    Args:
        path: file, folder, Hub repository, or any fsspec URL. Of a folder or repository: diffusers' LoRA file, PEFT's,
            or the only safetensors file there is.

    Raises:
        SciflowError: there is none, or it is a pickle.
    """
    if Path(path).suffix in _PICKLES:
        raise SciflowError(f"`adapter_path` {path!r}: a pickle can run code, so only safetensors are loaded.")
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(path).expanduser()
        if "://" in path:
            local = _fetched(path, Path(temporary))
        elif not local.exists():
            if not _HUB_NAME.fullmatch(path):
                raise SciflowError(f"`adapter_path` {path!r}: there is no such file, folder or Hub repository.")
            local = _downloaded(path)
        if local.is_dir():
            local = local / _chosen(path, [file.name for file in local.iterdir() if file.is_file()])
        yield local


def _chosen(path: str, names: list[str]) -> str:
    """Which file of a folder holds the adapter."""
    for name in (WEIGHT_NAME, PEFT_WEIGHT_NAME):
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if len(others) == 1:
        return others[0]
    reason = (
        f"several safetensors files, {', '.join(others[:5])}: name one" if others else f"no file named {WEIGHT_NAME}"
    )
    raise SciflowError(f"`adapter_path` {path!r} cannot be read: it has {reason}.")


def _fetched(url: str, folder: Path) -> Path:
    """A local copy of the file, or of an adapter's files in the folder, that an fsspec URL names."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
        if not files.isdir(root):
            files.get_file(root, str(folder / WEIGHT_NAME))
            return folder / WEIGHT_NAME
        names = [os.path.basename(name) for name in files.ls(root, detail=False)]
        for name in {_chosen(url, names), *(name for name in _NAMES if name in names)}:
            files.get_file(f"{root}/{name}", str(folder / name))
        return folder
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, SciflowError):
            raise
        raise SciflowError(f"`adapter_path` {url!r} cannot be read: {_first_line(error)}") from error


def _downloaded(repo_id: str) -> Path:
    """The adapter's file of a Hub repository, or of the Hub's cache, with what belongs to it beside it."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo_id, name))
        except EntryNotFoundError:
            return None

    try:
        file = get(WEIGHT_NAME) or get(PEFT_WEIGHT_NAME)
        if file is None:
            file = Path(hf_hub_download(repo_id, _chosen(repo_id, HfApi().list_repo_files(repo_id))))
        for name in (PEFT_CONFIG_NAME, *FACTS_NAMES):
            get(name)
        return file
    except SciflowError:
        raise
    except Exception as error:  # the Hub's HTTP client has errors of its own
        raise SciflowError(f"`adapter_path` {repo_id!r} cannot be read from the Hub: {_first_line(error)}.") from error


def read_header(file: Path, path: str) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors and metadata of a safetensors file that the user calls `path`.

    Raises:
        SciflowError: it is none, or has no tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = _first_line(error)
        raise SciflowError(
            f"`adapter_path` {path!r} cannot be read: it is no whole safetensors file ({reason})."
        ) from error
    if not names:
        raise SciflowError(f"`adapter_path` {path!r} cannot be read: it is a safetensors file without tensors.")
    return names, metadata


def read_tensors(file: Path, path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata: see `read_header`."""
    from safetensors.torch import load_file

    _, metadata = read_header(file, path)
    return load_file(file), metadata


def family_of_run(file: Path) -> str | None:
    """The family that the run beside an adapter's file trained; None where there are no facts of a run."""
    for name in FACTS_NAMES:
        facts = file.parent / name
        try:
            found = json.loads(facts.read_text(encoding="utf-8")).get("family")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, str):
            return found
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
