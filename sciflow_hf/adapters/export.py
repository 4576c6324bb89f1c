"""Adapters for other programs: written as LoRA files of diffusers, of kohya's tools, or of ComfyUI."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..errors import SciflowError
from ..files import atomic_file
from .files import (
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    WEIGHT_NAME,
    family_of_run,
    is_peft,
    local_adapter,
    read_tensors,
)
from .formats import diffusers, kohya
from .formats.diffusers import LOHA, LOKR, OFT, Adapter
from .formats.names import DIFFUSERS, DTYPES, FAMILIES, FORMATS, names_of
from .layers import ADAPTER_NAME, adapter_layers, network_of, trained_parts, type_of

if TYPE_CHECKING:
    from ..families.base import ModelFamily

LOKR_PIPELINES = ("flux2_klein", "z_image")
"""Families whose pipelines load a LoKr, not only their networks."""

logger = logging.getLogger(__name__)

_SOFTWARE = {"name": "sciflow_hf", "version": __version__}


@dataclass(frozen=True)
class Exported:
    """An exported file.

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
            by_pipeline = self.adapter_type != LOKR or self.family in LOKR_PIPELINES
            return f"diffusers ({'`load_lora_weights`' if by_pipeline else '`load_lora_adapter` of the network'})"
        return kohya.readers(self.adapter_type, self.format, str(self.family))


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
    """Writes an adapter as one file of another format, complete or not at all.

    Args:
        adapter_path: file, folder (a run's, a checkpoint), Hub repository or fsspec URL; of this library, diffusers,
            PEFT, kohya's tools or ComfyUI.
        output_file: a `.safetensors` file.
        file_format: `diffusers`, `kohya` or `comfy`.
        family: model family, as `load_family` takes it; found from the run's facts next to the adapter or from its
            layers' names when not given.
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
        known, component, own = _family(family, family_of_run(file), adapter_path)
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
                state, config = diffusers.write(adapter)
            facts |= {diffusers.METADATA: json.dumps(config, indent=2, sort_keys=True)} if config else {}
            state = {diffusers.unet_name(name) if name.startswith("unet.") else name: v for name, v in state.items()}
        else:
            known = known or _only(kohya.families_of_layers(adapter))
            if known is None:
                raise SciflowError(_which_family(adapter_path, adapter))
            state = kohya.write(adapter, file_format, known, config=network)
            facts |= kohya.metadata(state, adapter, file_format, own or known)
            facts |= {"modelspec.title": target.stem, "software": json.dumps(_SOFTWARE)}
        _save(_cast(state, dtype), target, facts)
    kind = next(iter(adapter.values())).kind
    return Exported(target, file_format, known, kind, len(adapter))


def check_run(model: Any, formats: Sequence[str], family: "ModelFamily") -> None:
    """Raises SciflowError where the adapter of `model` cannot be exported to one of the formats: before it trains."""
    kinds = {}
    for component, part in trained_parts(model, family).items():
        for path in adapter_layers(part):
            # transformers 5.6 took `text_model.` from one of the two CLIP classes; LoRA files keep it.
            full = path if component == family.component else f"text_model.{path.removeprefix('text_model.')}"
            kinds[f"{component}.{full}"] = type_of(part.peft_config[ADAPTER_NAME])
    for file_format in formats:
        try:
            if not kinds:
                raise SciflowError("only adapters are exported, and the complete network is trained. Leave it out.")
            if file_format == DIFFUSERS:
                _refuse_for_diffusers(set(kinds.values()))
            else:
                kohya.plan(kinds, file_format, names_of(family.name), config=dict(network_of(model).config))
        except SciflowError as error:
            raise SciflowError(f"`export_formats` {file_format!r}: {error}") from error


def other_formats(model: Any, family: "ModelFamily") -> list[str]:
    """The formats of other programs that can hold the adapter of `model`."""
    found = []
    for file_format in FORMATS:
        with contextlib.suppress(SciflowError):
            check_run(model, [file_format], family)
            found.append(file_format)
    return [file_format for file_format in found if file_format != DIFFUSERS]


def export_run(folder: Path, formats: Sequence[str], family: "ModelFamily", network: Any) -> list[Exported]:
    """Writes the adapter in a run's folder next to it in these formats, and removes those of an earlier run.

    Nothing is written for `diffusers` where the adapter is a lora or dora: its file has that format.
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


def _family(given: str | type | None, of_run: str | None, path: str) -> tuple[str | None, str, str | None]:
    """The family whose layers' names these are, as far as it is said, its pipeline's name of the network, its own."""
    own, component = of_run, kohya.component_of(names_of(of_run or ""))
    if given is not None:
        from ..families import load_family

        found: Any = load_family(given)
        if of_run is not None and names_of(of_run) != names_of(found.name):
            raise SciflowError(
                f"`family` {found.name!r}: the run of `adapter_path` {path!r} trained {names_of(of_run)!r}. Leave "
                "`--family` out."
            )
        own, component = of_run or found.name, found.component
    return own and names_of(own), component, own


def _read(
    state: dict[str, torch.Tensor], metadata: Mapping[str, str], family: str | None, network: Any
) -> tuple[dict[str, Any] | None, Adapter, str | None]:
    """Configuration where the file is as diffusers has it, its layers, and its family as far as it can be told."""
    config = diffusers.config_of(metadata)
    if kohya.is_kohya_file(state, configured=bool(config)):
        candidates = kohya.families_of_names(state)
        family = family or kohya.family_of(metadata) or _only(candidates)
        if family is None:
            raise SciflowError(
                f"its names are of other programs, and {', '.join(candidates) or 'none of the families'} "
                f"{'have' if len(candidates) != 1 else 'has'} them all. Say which it is by `--family`."
            )
        return None, kohya.read(state, family, config=network), family
    adapter = diffusers.read(state, config)
    if family in FAMILIES and not all(path.startswith(_components(family)) for path in adapter):
        there = ", ".join(sorted({path.partition(".")[0] for path in adapter}))
        raise SciflowError(f"it holds layers of {there}, which are none of `{family}`.")
    return (None if any(name.endswith(".alpha") for name in state) else config), adapter, family


def _read_peft(file: Path, state: Mapping[str, torch.Tensor], component: str) -> Adapter:
    """PEFT's own folder: paths of the network alone, and a configuration next to them."""
    text = (file.parent / PEFT_CONFIG_NAME).read_text(encoding="utf-8")
    config = {f"{component}.{name}": value for name, value in json.loads(text).items()}
    named = {f"{component}.{name.removeprefix(PEFT_PREFIX)}": value for name, value in state.items()}
    return diffusers.read(named, config)


def _components(family: str) -> tuple[str, ...]:
    return (f"{kohya.component_of(family)}.", "text_encoder")


def _only(families: Sequence[str]) -> str | None:
    return families[0] if len(families) == 1 else None


def _which_family(path: str, adapter: Adapter) -> str:
    candidates = kohya.families_of_layers(adapter)
    return (
        f"`adapter_path` {path!r}: its layers' names do not say of which family it is"
        + (f"; {', '.join(candidates)} have all of them" if candidates else "")
        + ". Say so by `--family`."
    )


def _refuse_for_diffusers(kinds: set[str]) -> None:
    if refused := kinds & {LOHA, OFT}:
        raise SciflowError(
            f"`format` 'diffusers' cannot hold {' or '.join(sorted(refused))}: diffusers loads lora, dora and lokr. "
            f"For this adapter, {kohya.elsewhere(refused)}"
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


def _save(state: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_file(target) as temporary:
            save_file(state, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SciflowError(f"`output_file` {str(target)!r} cannot be written: {reason}.") from error
