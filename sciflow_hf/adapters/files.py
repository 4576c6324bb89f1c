"""Adapter files: where one lies, and reading and writing it in the layout of the family's pipeline or of PEFT."""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError, first_line
from ..files import atomic_file, write_json
from .arguments import ADAPTER_TYPES, PIPELINE_TYPES, check_weights
from .formats import diffusers, kohya
from .formats.names import FAMILIES, names_of
from .initial import FROM_BASE, INITIAL, as_plain_lora, split_state
from .layers import ADAPTER_NAME, adapter_layers, fill_adapter, network_of, to_float32, trained_parts, type_of
from .text_encoders import NetworkWithText

if TYPE_CHECKING:
    from ..families.base import ModelFamily

WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # as diffusers' pipelines call it
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""Path of the network inside a `PeftModel`: prefix of the names in its files."""
FACTS_NAMES = ("run.json", "run_facts.json")
"""Files of a run, in its folder and on the Hub, that name the family."""

_NAMES = (WEIGHT_NAME, PEFT_WEIGHT_NAME, PEFT_CONFIG_NAME, *FACTS_NAMES)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)")  # user/repository
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# -- where an adapter lies -----------------------------------------------------------------------------------------


@contextmanager
def local_adapter(path: str) -> Iterator[Path]:
    """The safetensors file that `path` names, inside the block; files that belong to it lie next to it.

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
        raise SciflowError(f"`adapter_path` {url!r} cannot be read: {first_line(error)}") from error


def _downloaded(repo_id: str) -> Path:
    """The adapter's file of a Hub repository, or of the Hub's cache, with files that belong to it next to it."""
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
        raise SciflowError(f"`adapter_path` {repo_id!r} cannot be read from the Hub: {first_line(error)}.") from error


def is_peft(file: Path) -> bool:
    """Whether a file of weights has PEFT's configuration next to it."""
    return file.name == PEFT_WEIGHT_NAME and (file.parent / PEFT_CONFIG_NAME).is_file()


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
        reason = first_line(error)
        raise SciflowError(
            f"`adapter_path` {path!r} cannot be read: it is no complete safetensors file ({reason})."
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
    """The family that the run with an adapter's file trained; None where there are no facts of a run."""
    for name in FACTS_NAMES:
        facts = file.parent / name
        try:
            found = json.loads(facts.read_text(encoding="utf-8")).get("family")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, str):
            return found
    return None


# -- writing -------------------------------------------------------------------------------------------------------


def weight_name(adapter_type: str) -> str:
    """Name of the file that holds the weights of an adapter of this type."""
    return WEIGHT_NAME if adapter_type in PIPELINE_TYPES else PEFT_WEIGHT_NAME


def save_adapter(model: Any, folder: str | os.PathLike, *, family: "ModelFamily") -> Path:
    """Writes the adapter, complete or not at all: a folder holds one. Returns the file of the weights.

    LoRA and DoRA are `pytorch_lora_weights.safetensors` as the family's pipeline writes it, alpha in its metadata; the
    other types `adapter_model.safetensors` and `adapter_config.json` as PEFT does.
    """
    network, folder = network_of(model), Path(folder)
    pipeline_type = type_of(network.peft_config[ADAPTER_NAME]) in PIPELINE_TYPES
    others = (PEFT_CONFIG_NAME, PEFT_WEIGHT_NAME) if pipeline_type else (WEIGHT_NAME,)
    saved = _save_lora(model, network, folder, family) if pipeline_type else _save_peft(network, folder)
    for other in others:
        (folder / other).unlink(missing_ok=True)
    return saved


def _save_lora(model: Any, network: Any, folder: Path, family: "ModelFamily") -> Path:
    """The network's adapter and those of the text encoders in one file, by the family's pipeline."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER_NAME)
    options = network.peft_config[ADAPTER_NAME].to_dict()
    if options["init_lora_weights"] != "gaussian":  # another name would make PEFT initialise again at loading
        options["init_lora_weights"] = True
    if INITIAL in network.peft_config:
        state, options = as_plain_lora(network, state, options)
    if family.component == "unet":
        state = {diffusers.unet_name(key): value for key, value in state.items()}
    parts = {
        f"{family.component}_lora_layers": {k: v.detach().cpu().contiguous() for k, v in state.items()},
        f"{family.component}_lora_adapter_metadata": _without_sets(options),
        **text_states(model),
    }
    with atomic_file(folder / WEIGHT_NAME) as temporary:
        family.pipeline_class().save_lora_weights(str(folder), weight_name=temporary.name, **parts)
    return folder / WEIGHT_NAME


def _save_peft(network: Any, folder: Path) -> Path:
    """PEFT's two files: first the weights, then the configuration, which announces them."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER_NAME)
    tensors = {f"{PEFT_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_file(folder / PEFT_WEIGHT_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / PEFT_CONFIG_NAME, _without_sets(network.peft_config[ADAPTER_NAME].to_dict()))
    return folder / PEFT_WEIGHT_NAME


def text_states(model: torch.nn.Module) -> dict[str, Any]:
    """Adapters of the text encoders as arguments of the pipeline's `save_lora_weights`; empty without any."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    if not isinstance(model, NetworkWithText):
        return {}
    arguments: dict[str, Any] = {}
    for name in model.family.trained_text_parts:
        encoder: Any = model.get_submodule(name)
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(encoder, adapter_name=ADAPTER_NAME))
        # transformers 5.6 took `text_model.` from one of the two CLIP classes; LoRA files keep it.
        state = {f"text_model.{k.removeprefix('text_model.')}": v.detach().cpu() for k, v in state.items()}
        arguments[f"{name}_lora_layers"] = state
        arguments[f"{name}_lora_adapter_metadata"] = _without_sets(encoder.peft_config[ADAPTER_NAME].to_dict())
    return arguments


def _without_sets(options: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that JSON can hold."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in options.items()}


# -- reading -------------------------------------------------------------------------------------------------------


def load_adapter_weights(model: torch.nn.Module, folder: str | os.PathLike, *, family: "ModelFamily") -> None:
    """Puts the saved weights into the adapter that `model` already has, bit for bit."""
    network, *encoders = trained_parts(model, family).items()
    kind = type_of(network[1].peft_config[ADAPTER_NAME])
    state, _ = _read(Path(folder) / weight_name(kind), str(folder), network[1], family)
    try:
        _put(network[1], state, family)
        for name, encoder in encoders:
            fill_text_encoder(encoder, name, state)
    except (ValueError, RuntimeError) as error:
        raise SciflowError(
            f"{folder}: its adapter does not fit this one: {_brief(error)}. Resume with the same adapter "
            "options, or start a new run from it with `--adapter_path`."
        ) from error


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


def _put(model: Any, state: dict[str, torch.Tensor], family: "ModelFamily") -> None:
    """Fills the adapter of `model`; ValueError where a tensor is left over or left out."""
    prefix = family.component + "."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    parts = {ADAPTER_NAME: own}
    if INITIAL in model.peft_config:
        parts = dict(zip((ADAPTER_NAME, INITIAL), split_state(own), strict=True))
    for name, part in parts.items():
        fill_adapter(model, part, name)


def fill_text_encoder(encoder: Any, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Fills the adapter of the text encoder `name`; ValueError where a tensor is left over or left out."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if "text_model" not in dict(encoder.named_children()):
        own = {key.removeprefix("text_model."): value for key, value in own.items()}
    own = {key: value for key, value in own.items() if not key.endswith(".alpha")}
    fill_adapter(encoder, own)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _read(file: Path, path: str, model: Any, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict in PEFT's names, and how to add its layers: `metadata`, alphas by layer, or PEFT's `config`.

    Takes any layout that the family's pipeline reads, and those of kohya's tools and ComfyUI; safetensors only.

    Args:
        path: what the user calls `file`.
    """
    if not is_peft(file) and _is_foreign(file, path, family):
        return _read_foreign(file, path, model, family)
    try:
        return _read_peft(file, family) if is_peft(file) else _read_lora(file, model, family)
    except Exception as error:  # the Hub's HTTP client has errors of its own
        raise SciflowError(
            f"`adapter_path` {path!r} cannot be read ({first_line(error)}). It is a safetensors file, a folder with "
            f"{WEIGHT_NAME} or with PEFT's two files, a Hub repository, or an fsspec URL."
        ) from error


def _read_lora(file: Path, model: Any, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A file of diffusers, or another one that the family's pipeline converts."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    unet = {"unet_config": model.config} if family.component == "unet" else {}  # for the block numbers of kohya's files
    state, *alphas, metadata = family.pipeline_class().lora_state_dict(
        str(file), use_safetensors=True, return_lora_metadata=True, **unet
    )
    if unet:
        state = convert_unet_state_dict_to_peft(state)
    return state, {"metadata": metadata or None, "network_alphas": alphas[0] if alphas and not metadata else None}


def _read_peft(file: Path, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """PEFT's two files.

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
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
    return {f"{family.component}.{key}": value for key, value in state.items()}, {"config": config}


def _is_foreign(file: Path, path: str, family: "ModelFamily") -> bool:
    """Whether the file is one of kohya's tools, LyCORIS or ComfyUI, for a family that has a table of their names."""
    names, metadata = read_header(file, path)
    # Diffusers' names with an alpha each, as ComfyUI takes them, are read by some pipelines only.
    with_alphas = any(name.startswith("transformer.") and name.endswith(".alpha") for name in names)
    kohya_file = kohya.is_kohya_file(names, configured=diffusers.METADATA in metadata)
    return names_of(family.name) in FAMILIES and (with_alphas or kohya_file)


def _read_foreign(
    file: Path, path: str, model: Any, family: "ModelFamily"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A file of kohya's tools, LyCORIS or ComfyUI.

    Raises:
        SciflowError: it holds layers or types of adapters that this family or PEFT does not have.
    """
    state, metadata = read_tensors(file, path)
    names = names_of(family.name)
    if (other := kohya.family_of(metadata) or names) != names:
        raise SciflowError(f"`adapter_path` {path!r} is a file for `{other}`, not for `{family.name}`.")
    try:
        adapter = kohya.read(state, names, config=dict(model.config))
        state, config = diffusers.write(adapter)
    except SciflowError as error:
        raise SciflowError(f"`adapter_path` {path!r}: {error}") from error
    if next(iter(adapter.values())).kind in PIPELINE_TYPES:
        return state, {"metadata": config, "network_alphas": None}
    return state, {"config": diffusers.peft_config(config, family.component)}


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
