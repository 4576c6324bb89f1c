"""LoRA files of kohya's tools, LyCORIS and ComfyUI as `--adapter_path`: turned into what PEFT loads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError
from .formats import plain, tools
from .formats.names import FAMILIES
from .sources import read_header, read_tensors

if TYPE_CHECKING:
    from ..families.base import ModelFamily


def read_tools_file(
    file: Path, path: str, model: Any, family: "ModelFamily"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """State dict and options of `adapter_files.load_from`, or None where the file is in diffusers' own layout.

    Args:
        file: a local file.
        path: what the user calls it.

    Raises:
        SciflowError: it is no safetensors file, or holds what this family or PEFT does not have.
    """
    names, metadata = read_header(file, path)
    # Diffusers' names with an alpha each, as ComfyUI takes them, are read by some pipelines only.
    foreign = tools.is_tools_file(names, configured=plain.METADATA in metadata) or any(
        name.startswith("transformer.") and name.endswith(".alpha") for name in names
    )
    if family.name not in FAMILIES or not foreign:
        return None
    if (other := tools.family_of(metadata) or family.name) != family.name:
        raise SciflowError(f"`adapter_path` {path!r} is a file for `{other}`, not for `{family.name}`.")
    state, _ = read_tensors(file, path)
    try:
        adapter = tools.read(state, family.name, config=dict(model.config))
        state, config = plain.write(adapter)
    except SciflowError as error:
        raise SciflowError(f"`adapter_path` {path!r}: {error}") from error
    if next(iter(adapter.values())).kind in ("lora", "dora"):
        return state, {"metadata": config, "network_alphas": None}
    return state, {"config": plain.peft_config(config, family.component)}
