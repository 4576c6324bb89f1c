"""Adapters as files: in the layout of the family's pipeline, or of PEFT where it has none; loaded bit for bit."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError
from .adapter import ADAPTER_NAME, adapter_layers, fill_adapter, to_float32
from .formats.names import unet_name
from .initial import INITIAL, plain_lora, split_state
from .peft_files import is_peft, read_peft, save_peft
from .sources import PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME, WEIGHT_NAME, local_adapter
from .text_encoders import network_of, put_text_states, text_states, trained_parts
from .tools_files import read_tools_file
from .types import FROM_BASE, PIPELINE_TYPES, check_weights, type_of

if TYPE_CHECKING:
    from ..families.base import ModelFamily


def weight_name(adapter_type: str) -> str:
    """Name of the file that holds an adapter of this type."""
    return WEIGHT_NAME if adapter_type in PIPELINE_TYPES else PEFT_WEIGHT_NAME


def save_adapter(model: Any, folder: str | os.PathLike, *, family: "ModelFamily") -> Path:
    """Writes the adapter, whole or not: a folder holds one. Returns the file of the weights.

    LoRA and DoRA are `pytorch_lora_weights.safetensors` as the family's pipeline writes it, alpha in it; the other
    types `adapter_model.safetensors` and `adapter_config.json` as PEFT does.
    """
    network, folder = network_of(model), Path(folder)
    if type_of(network.peft_config[ADAPTER_NAME]) not in PIPELINE_TYPES:
        saved = save_peft(network, ADAPTER_NAME, folder)
        (folder / WEIGHT_NAME).unlink(missing_ok=True)
        return saved
    state, options = plain_lora(network, ADAPTER_NAME)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
    if family.component == "unet":
        state = {unet_name(key): value for key, value in state.items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    target = folder / WEIGHT_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        family.pipeline_class().save_lora_weights(
            temporary,
            **{
                f"{family.component}_lora_layers": state,
                f"{family.component}_lora_adapter_metadata": config,
                **text_states(model),
            },
        )
        os.replace(Path(temporary) / WEIGHT_NAME, target)
    for other in (PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME):
        (folder / other).unlink(missing_ok=True)
    return target


def load_adapter_weights(model: torch.nn.Module, folder: str | os.PathLike, *, family: "ModelFamily") -> None:
    """Puts the saved weights into the adapter that `model` already has, bit for bit."""
    network, *encoders = trained_parts(model, family).items()
    kind = type_of(network[1].peft_config[ADAPTER_NAME])
    state, _ = _read(Path(folder) / weight_name(kind), str(folder), network[1], family)
    try:
        _put(network[1], state, family)
        for name, encoder in encoders:
            put_text_states(encoder, name, state)
    except (ValueError, RuntimeError) as error:
        raise SciflowError(
            f"{folder}: its adapter does not fit this one: {_brief(error)}. Resume with the same adapter "
            "options, or start a new run from it with `--adapter_path`."
        ) from error


def _put(model: Any, state: dict[str, torch.Tensor], family: "ModelFamily") -> None:
    """Fills the adapter of `model`; ValueError where a tensor is left over or left out."""
    prefix = family.component + "."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    parts = {ADAPTER_NAME: own}
    if INITIAL in model.peft_config:
        parts = dict(zip((ADAPTER_NAME, INITIAL), split_state(own), strict=True))
    for name, part in parts.items():
        fill_adapter(model, part, name)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _read(file: Path, path: str, model: Any, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict in PEFT's names, and what `load_lora_adapter` needs beside it: metadata, or alphas by layer.

    Takes any layout that the family's pipeline reads; safetensors only. Of a file in PEFT's layout the second is
    `config`, which says it all.

    Args:
        path: what the user calls `file`.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    if not is_peft(file) and (found := read_tools_file(file, path, model, family)) is not None:
        return found
    unet = {"unet_config": model.config} if family.component == "unet" else {}  # for the block numbers of kohya's files
    try:
        if is_peft(file):
            state, config = read_peft(file, family.component)
            return state, {"config": config}
        state, *alphas, metadata = family.pipeline_class().lora_state_dict(
            str(file), use_safetensors=True, return_lora_metadata=True, **unet
        )
        if unet:
            state = convert_unet_state_dict_to_peft(state)
        return state, {"metadata": metadata or None, "network_alphas": alphas[0] if alphas and not metadata else None}
    except Exception as error:  # the Hub's HTTP client has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SciflowError(
            f"`adapter_path` {path!r} cannot be read ({reason}). It is a safetensors file, a folder with "
            f"{WEIGHT_NAME} or with PEFT's two files, a Hub repository, or an fsspec URL."
        ) from error


def _check_base_is_meant(path: str, options: dict[str, Any], family: "ModelFamily") -> None:
    """Refuses an adapter of another program that goes with changed base weights, which PEFT would make at loading."""
    metadata = options.get("metadata") or {}
    config = options.get("config")
    init = metadata.get(f"{family.component}.init_lora_weights") or getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith((*FROM_BASE, "corda", "loftq", "lora_ga")):
        raise SciflowError(
            f"`adapter_path` {path!r} belongs to base weights that its training changed (`init_lora_weights` "
            f"{init!r}). Convert it to a plain LoRA first: PEFT's `save_pretrained` does, with "
            "`path_initial_model_for_weight_conversion`."
        )


def load_from(path: str, model: Any, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Adds the adapter of an existing file, its type, rank and layers included. Returns what the file holds."""
    with local_adapter(path) as file:
        state, options = _read(file, path, model, family)
    _check_base_is_meant(path, options, family)
    with warnings.catch_warnings():
        # Without weights (`--dry_run`) torch warns of every tensor that there is nothing to copy to.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        try:
            if "config" in options:
                model.add_adapter(options["config"], adapter_name=ADAPTER_NAME)
            else:
                model.load_lora_adapter(dict(state), prefix=family.component, adapter_name=ADAPTER_NAME, **options)
            layers = adapter_layers(model)
            if layers:
                bases = {name: layer.get_base_layer() for name, layer in layers.items()}
                check_weights(type_of(model.peft_config[ADAPTER_NAME]), bases)
                to_float32(model)
                _put(model, state, family)  # again: into a 16-bit base PEFT loads the weights rounded
        except (ValueError, RuntimeError, KeyError) as error:
            reason = _brief(error)
            raise SciflowError(f"`adapter_path` {path!r} does not fit this network: {reason}") from error
    if not adapter_layers(model):
        raise SciflowError(f"`adapter_path` {path!r} holds no layer of this network (`{family.name}`).")
    return state, options
