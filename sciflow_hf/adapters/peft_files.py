"""Adapters that no pipeline loads (LoKr, LoHa, OFT) as files of PEFT, which `PeftModel.from_pretrained` reads."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import SciflowError
from .sources import PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME
from .types import ADAPTER_TYPES, type_of

_PREFIX = "base_model.model."  # the path of the network inside a PeftModel


def save_peft(network: Any, name: str, folder: Path) -> Path:
    """Writes the adapter `name` and its configuration: first the weights, then what says that they are there."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(network, adapter_name=name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        tensors = {f"{_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, Path(temporary) / PEFT_WEIGHT_NAME, metadata={"format": "pt"})
        network.peft_config[name].save_pretrained(temporary)
        for file in (PEFT_WEIGHT_NAME, PEFT_CONFIG_NAME):
            os.replace(Path(temporary) / file, folder / file)
    return folder / PEFT_WEIGHT_NAME


def is_peft(file: Path) -> bool:
    """Whether a file of weights has PEFT's configuration beside it."""
    return file.name == PEFT_WEIGHT_NAME and (file.parent / PEFT_CONFIG_NAME).is_file()


def read_peft(file: Path, component: str) -> tuple[dict[str, torch.Tensor], Any]:
    """State dict, its keys beginning with `component`, and PEFT's configuration.

    Raises:
        SciflowError: another kind of adapter, or one with more than adapter weights.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(file.parent))
    if type_of(config) not in ADAPTER_TYPES:
        raise SciflowError(f"it is a {type_of(config)}, not one of {', '.join(ADAPTER_TYPES)}")
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise SciflowError("its `modules_to_save` or `bias` train weights of the network itself")
    config.inference_mode = False
    state = load_file(file)
    return {f"{component}.{key.removeprefix(_PREFIX)}": value for key, value in state.items()}, config
