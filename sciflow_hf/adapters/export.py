"""Adapters for other programs: written as LoRA files of diffusers, of kohya's tools, or of ComfyUI."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError
from .formats import plain, tools
from .formats.layers import DORA, LOHA, LOKR, LORA, OFT, Adapter
from .formats.names import COMFY, DIFFUSERS, DTYPES, FAMILIES, FORMATS, place_of, rows_of, unet_name
from .peft_files import is_peft
from .sources import PEFT_CONFIG_NAME, WEIGHT_NAME, family_of_run, local_adapter, read_tensors

if TYPE_CHECKING:
    from ..families.base import ModelFamily

logger = logging.getLogger(__name__)

# What kohya's tools write of the network they trained: train_network.py, library/sai_model_spec.py; musubi-tuner alike.
_MODULES = {
    "sdxl": "networks.lora",
    "sd3": "networks.lora_sd3",
    "flux": "networks.lora_flux",
    "flux2_klein": "networks.lora_flux_2",
    "qwen_image": "networks.lora_qwen_image",
}
_MUSUBI = ("flux2_klein", "qwen_image")
_ARCHITECTURES = {
    "sdxl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
    "sd3": ("stable-diffusion-3", "https://github.com/Stability-AI/sd3-ref"),
    "flux": ("flux-1-dev", "https://github.com/black-forest-labs/flux"),
    "flux2_klein": ("Flux.2-klein", "https://github.com/black-forest-labs/flux2"),
    "qwen_image": ("Qwen-Image", "https://github.com/QwenLM/Qwen-Image"),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        file: the file.
        format: `diffusers`, `kohya` or `comfy`.
        family: name of the model family; None where it was not needed.
        adapter_type: `lora`, `dora`, `loha` or `lokr`.
        layers: adapted layers, as diffusers counts them.
    """

    file: Path
    format: str
    family: str | None
    adapter_type: str
    layers: int

    @property
    def readers(self) -> str:
        """The programs that read it."""
        if self.format == DIFFUSERS:
            whole = self.adapter_type != LOKR or self.family == "flux2_klein"
            return "diffusers (`load_lora_weights`)" if whole else "diffusers (`load_lora_adapter` of the network)"
        if self.format == COMFY:
            return "ComfyUI"
        if self.adapter_type == DORA:
            return "LyCORIS; not for ComfyUI, which would draw other images"
        trainer = "musubi-tuner" if self.family in _MUSUBI else "sd-scripts" if self.adapter_type == LORA else "LyCORIS"
        return f"{trainer} and ComfyUI"


def export_adapter(
    adapter_path: str,
    output_file: str | os.PathLike,
    *,
    file_format: str,
    family: str | type | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    network: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes an adapter as one file of another format, whole or not at all.

    Args:
        adapter_path: file, folder (a run's, a checkpoint), Hub repository or fsspec URL; of this library, diffusers,
            PEFT, kohya's tools or ComfyUI.
        output_file: a `.safetensors` file.
        file_format: `diffusers`, `kohya` or `comfy`.
        family: model family, as `load_family` takes it; found by the facts beside the adapter or by its layers' names
            when not given.
        dtype: `float32`, `bfloat16` or `float16`; as stored when not given.
        overwrite: replace `output_file`.
        network: configuration of the network (`config.json`), where its blocks are not those of published SDXL, or for
            SD3 with DoRA.

    Raises:
        SciflowError: a wrong option, a file that is no adapter or one of another family, or an adapter that the format
            cannot hold; it says what can.
    """
    target = _checked_target(output_file, file_format, dtype, overwrite)
    with local_adapter(adapter_path) as file:
        state, metadata = read_tensors(file, adapter_path)
        known, component = _family(family, family_of_run(file), adapter_path)
        try:
            if is_peft(file):
                config, adapter = None, _read_peft(file, state, component)
            else:
                config, adapter, known = _read(state, metadata, known, network)
        except SciflowError as error:
            raise SciflowError(f"`adapter_path` {adapter_path!r}: {error}") from error
        facts: dict[str, str] = {"format": "pt"}
        if file_format == DIFFUSERS:
            _refuse_for_diffusers({layer.kind for layer in adapter.values()})
            if config is None:  # it came in another layout
                state, config = plain.write(adapter)
            facts |= {plain.METADATA: json.dumps(config, indent=2, sort_keys=True)} if config else {}
            state = {unet_name(name) if name.startswith("unet.") else name: v for name, v in state.items()}
        else:
            known = known or _only(_families(adapter))
            if known is None:
                raise SciflowError(_which_family(adapter_path, adapter))
            state = tools.write(adapter, file_format, known, config=network)
            facts |= _facts(state, adapter, file_format, known, target.stem)
        _save(_cast(state, dtype), target, facts)
    kind = next(iter(adapter.values())).kind
    return Exported(target, file_format, known, kind, len(adapter))


def check_run(model: Any, formats: Sequence[str], family: "ModelFamily") -> None:
    """Raises SciflowError where the adapter of `model` cannot be exported to one of the formats: before it trains."""
    from .adapter import ADAPTER_NAME, adapter_layers
    from .text_encoders import network_of, trained_parts
    from .types import type_of

    kinds = {}
    for component, part in trained_parts(model, family).items():
        for path in adapter_layers(part):
            # LoRA files go on having what transformers 5.6 took from one of its CLIP classes.
            full = path if component == family.component else f"text_model.{path.removeprefix('text_model.')}"
            kinds[f"{component}.{full}"] = type_of(part.peft_config[ADAPTER_NAME])
    for file_format in formats:
        try:
            if not kinds:
                raise SciflowError("only adapters are exported, and the whole network is trained. Leave it out.")
            if file_format == DIFFUSERS:
                _refuse_for_diffusers(set(kinds.values()))
            else:
                tools.plan(kinds, file_format, family.name, config=dict(network_of(model).config))
        except SciflowError as error:
            raise SciflowError(f"`export_formats` {file_format!r}: {error}") from error


def export_run(folder: Path, formats: Sequence[str], family: "ModelFamily", network: Any) -> list[Exported]:
    """Writes the adapter in a run's folder in these formats beside it, and takes away those of an earlier run.

    `diffusers` is there already for lora and dora.
    """
    done = []
    for file_format in FORMATS:
        target = folder / export_name(file_format)
        if file_format not in formats or (file_format == DIFFUSERS and (folder / WEIGHT_NAME).is_file()):
            target.unlink(missing_ok=True)
            continue
        config = dict(network.config)
        done.append(
            export_adapter(
                str(folder), target, file_format=file_format, family=type(family), overwrite=True, network=config
            )
        )
        logger.info("For %s: %s", done[-1].readers, target)
    return done


def export_name(file_format: str) -> str:
    """File in a run's folder."""
    return f"lora_{file_format}.safetensors"


def _checked_target(output_file: str | os.PathLike, file_format: str, dtype: str | None, overwrite: bool) -> Path:
    if file_format not in FORMATS:
        raise SciflowError(f"`format` {file_format!r}: use one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise SciflowError(f"`dtype` {dtype!r}: use one of {', '.join(DTYPES)}.")
    target = Path(output_file).expanduser()
    if target.suffix != ".safetensors":
        raise SciflowError(f"`output_file` {str(output_file)!r}: give a file name that ends in .safetensors.")
    if target.is_dir() or (target.exists() and not overwrite):
        raise SciflowError(f"`output_file` {str(output_file)!r} exists. Name another file, or add `--overwrite`.")
    return target


def _family(given: str | type | None, of_run: str | None, path: str) -> tuple[str | None, str]:
    """Name of the family as far as it is said, and what its pipeline calls the network."""
    if given is None:
        return of_run, tools.component_of(of_run or "")
    from ..families import load_family

    found: Any = load_family(given)
    if of_run is not None and of_run != found.name:
        raise SciflowError(
            f"`family` {found.name!r}: the run of `adapter_path` {path!r} trained {of_run!r}. Leave `--family` out."
        )
    return found.name, found.component


def _read(
    state: dict[str, torch.Tensor], metadata: Mapping[str, str], family: str | None, network: Any
) -> tuple[dict[str, Any] | None, Adapter, str | None]:
    """Configuration where the file is as diffusers has it, its layers, and its family as far as it can be told."""
    config = plain.config_of(metadata)
    if tools.is_tools_file(state, configured=bool(config)):
        candidates = tools.families_of(state)
        family = family or tools.family_of(metadata) or _only(candidates)
        if family is None:
            raise SciflowError(
                f"its names are of other programs, and {', '.join(candidates) or 'none of the families'} "
                f"{'have' if len(candidates) != 1 else 'has'} them all. Say which it is by `--family`."
            )
        return None, tools.read(state, family, config=network), family
    adapter = plain.read(state, config)
    if family in FAMILIES and not all(path.startswith(_components(family)) for path in adapter):
        there = ", ".join(sorted({path.partition(".")[0] for path in adapter}))
        raise SciflowError(f"it holds layers of {there}, which are none of `{family}`.")
    return (None if any(name.endswith(".alpha") for name in state) else config), adapter, family


def _read_peft(file: Path, state: Mapping[str, torch.Tensor], component: str) -> Adapter:
    """PEFT's own folder: paths of the network alone, and a configuration beside them."""
    text = (file.parent / PEFT_CONFIG_NAME).read_text(encoding="utf-8")
    config = {f"{component}.{name}": value for name, value in json.loads(text).items()}
    named = {f"{component}.{name.removeprefix('base_model.model.')}": value for name, value in state.items()}
    return plain.read(named, config)


def _components(family: str) -> tuple[str, ...]:
    return (f"{tools.component_of(family)}.", "text_encoder")


def _only(families: Sequence[str]) -> str | None:
    return families[0] if len(families) == 1 else None


def _families(adapter: Adapter) -> list[str]:
    """The families that have layers of these names."""
    paths = [path.partition(".")[::2] for path in adapter if not path.startswith("text_encoder")]
    return [
        family
        for family in FAMILIES
        if paths and all(c == tools.component_of(family) and place_of(path, rows_of(family)) for c, path in paths)
    ]


def _which_family(path: str, adapter: Adapter) -> str:
    candidates = _families(adapter)
    return (
        f"`adapter_path` {path!r}: its layers' names do not say of which family it is"
        + (f"; {', '.join(candidates)} have all of them" if candidates else "")
        + ". Say so by `--family`."
    )


def _refuse_for_diffusers(kinds: set[str]) -> None:
    if refused := kinds & {LOHA, OFT}:
        raise SciflowError(
            f"`format` 'diffusers' cannot hold {' or '.join(sorted(refused))}: diffusers loads lora, dora and lokr. "
            "The folder that training wrote is PEFT's own format; `PeftModel.from_pretrained` reads it as it is."
        )


def _cast(state: dict[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """`state` in `dtype`, its alphas as they are: they are few, and scale all."""
    wanted = None if dtype is None else getattr(torch, dtype)
    found = {}
    for name, value in state.items():
        new = value.dtype if wanted is None or name.endswith(".alpha") else wanted
        found[name] = value.to(new, copy=True).contiguous()  # layers of a fused matrix share memory
        if not torch.isfinite(found[name]).all():
            why = f"too large for {dtype}" if torch.isfinite(value).all() else "not finite"
            raise SciflowError(f"{name} has values that are {why}." + (" Use bfloat16." if "large" in why else ""))
    return found


def _facts(
    state: Mapping[str, torch.Tensor], adapter: Adapter, file_format: str, family: str, title: str
) -> dict[str, str]:
    """Metadata that users' programs show: what is known, and nothing else."""
    from .. import __version__

    architecture, implementation = _ARCHITECTURES[family]
    facts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "software": json.dumps({"name": "sciflow_hf", "version": __version__}),
    }
    if file_format == COMFY and family != "sdxl":
        return facts
    kind = next(iter(adapter.values())).kind
    ranks = {value.shape[0] for name, value in state.items() if name.endswith((".lora_down.weight", "_w1_b", "_w2_b"))}
    alphas = {float(value) for name, value in state.items() if name.endswith(".alpha")}
    facts["ss_network_module"] = _MODULES[family] if kind == LORA else "lycoris.kohya"
    if kind in (LOHA, LOKR) and family in _MUSUBI:
        facts["ss_network_module"] = f"networks.{kind}"
    elif kind != LORA:
        facts["ss_network_args"] = json.dumps({"algo": LORA, "dora_wd": True} if kind == DORA else {"algo": kind})
    facts["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    facts["ss_network_alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    return facts


def _save(state: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Writes the file under a temporary name and renames it: it is there whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, metadata=metadata)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SciflowError(f"`output_file` {str(target)!r} cannot be written: {reason}.") from error
    finally:
        temporary.unlink(missing_ok=True)
