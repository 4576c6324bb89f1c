"""Adapters as files: saved in the layout of the family's pipeline, loaded bit for bit."""

import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapters import ADAPTER_NAME, adapter_layers, to_float32
from .errors import SciflowError

if TYPE_CHECKING:
    from .families.base import ModelFamily

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)")  # user/repository


def save_adapter(model: Any, folder: str | os.PathLike, *, family: "ModelFamily") -> Path:
    """Writes `pytorch_lora_weights.safetensors` as the family's pipeline does, alpha in it; whole or not."""
    from peft.utils import get_peft_model_state_dict

    options = model.peft_config[ADAPTER_NAME].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    if family.component == "unet":  # the names that LoRA files of UNets have had since before PEFT
        state = {k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for k, v in state.items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    target = Path(folder) / WEIGHT_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        family.pipeline_class().save_lora_weights(
            temporary,
            **{
                f"{family.component}_lora_layers": state,
                f"{family.component}_lora_adapter_metadata": config,
            },
        )
        os.replace(Path(temporary) / WEIGHT_NAME, target)
    return target


def load_adapter_weights(model: torch.nn.Module, folder: str | os.PathLike, *, family: "ModelFamily") -> None:
    """Puts the saved weights into the adapter that `model` already has, bit for bit."""
    state, _ = _read(str(Path(folder) / WEIGHT_NAME), model, family)
    try:
        _put(model, state, family)
    except (ValueError, RuntimeError) as error:
        raise SciflowError(
            f"{folder}: its adapter does not fit this one: {_brief(error)}. Resume with the same adapter "
            "options, or start a new run from it with `--adapter_path`."
        ) from error


def _put(model: torch.nn.Module, state: dict[str, torch.Tensor], family: "ModelFamily") -> None:
    """Fills the adapter of `model`; ValueError where a tensor is left over or left out."""
    from peft.utils import set_peft_model_state_dict

    prefix = family.component + "."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    result = set_peft_model_state_dict(model, own, adapter_name=ADAPTER_NAME)
    missing = [key for key in result.missing_keys if "lora_" in key]
    for what, keys in (("the network has no layer for", result.unexpected_keys), ("the file lacks", missing)):
        if keys:
            raise ValueError(f"{what} {len(keys)} of its tensors, such as {keys[0]}")


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _read(path: str, model: Any, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict in PEFT's names, and what `load_lora_adapter` needs beside it: metadata, or alphas by layer.

    Takes any layout that the family's pipeline reads; safetensors only.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    unet = {"unet_config": model.config} if family.component == "unet" else {}  # for the block numbers of kohya's files
    try:
        state, *alphas, metadata = family.pipeline_class().lora_state_dict(
            path, use_safetensors=True, return_lora_metadata=True, **unet
        )
        if unet:
            state = convert_unet_state_dict_to_peft(state)
        return state, {"metadata": metadata or None, "network_alphas": alphas[0] if alphas and not metadata else None}
    except Exception as error:  # the Hub's HTTP client has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SciflowError(
            f"`adapter_path` {path!r} cannot be read ({reason}). It is a safetensors file, a folder with "
            f"{WEIGHT_NAME}, a Hub repository, or an fsspec URL of a file."
        ) from error


def load_from(path: str, model: Any, family: "ModelFamily") -> None:
    """Adds the adapter of an existing LoRA file, its rank, alpha and layers included."""
    if Path(path).suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise SciflowError(f"`adapter_path` {path!r}: a pickle can run code, so only safetensors are loaded.")
    with tempfile.TemporaryDirectory() as temporary:
        local = os.path.expanduser(path)
        if "://" in path:
            import fsspec

            local = str(Path(temporary) / WEIGHT_NAME)
            try:
                with fsspec.open(path, "rb") as source:
                    Path(local).write_bytes(source.read())
            except (OSError, ValueError, ImportError) as error:
                raise SciflowError(f"`adapter_path` {path!r} cannot be read: {_brief(error)}") from error
        elif not os.path.exists(local) and not _HUB_NAME.fullmatch(path):
            raise SciflowError(f"`adapter_path` {path!r}: there is no such file, folder or Hub repository.")
        state, options = _read(local, model, family)
    with warnings.catch_warnings():
        # Without weights (`--dry_run`) torch warns of every tensor that there is nothing to copy to.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        try:
            model.load_lora_adapter(dict(state), prefix=family.component, adapter_name=ADAPTER_NAME, **options)
            if adapter_layers(model):
                to_float32(model)
                _put(model, state, family)  # again: into a 16-bit base PEFT loads the weights rounded
        except (ValueError, RuntimeError, KeyError) as error:
            reason = _brief(error)
            raise SciflowError(f"`adapter_path` {path!r} does not fit this network: {reason}") from error
    if not adapter_layers(model):
        raise SciflowError(f"`adapter_path` {path!r} holds no layer of this network (`{family.name}`).")
