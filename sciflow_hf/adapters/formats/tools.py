"""LoRA files of kohya's tools, LyCORIS and ComfyUI: written from an adapter's layers, and read into them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import SciflowError
from . import plain
from .layers import DORA, LOHA, LOKR, LORA, MAGNITUDE, OFT, Adapter, Layer, fuse, split
from .names import CLIP, COMFY, FAMILIES, MLP_RATIO, TEXT_ENCODERS, Place, Row, find, idle_layers, place_of, rows_of

_KOHYA_NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", MAGNITUDE: "dora_scale"}
_COMFY_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_OUR_NAMES = {name: ours for names in (_KOHYA_NAMES, _COMFY_NAMES) for ours, name in names.items()}
_KEY = re.compile(r"(.+?)\.(lora_(?:down|up|A|B)\.weight|dora_scale|alpha|(?:hada|lokr)_\w+)")

# How a name begins -> the component it belongs to (None: the network) and whether its dots are underscores.
_PREFIXES: Mapping[str, tuple[str | None, bool]] = {
    "lora_unet_": (None, True),
    "lora_transformer_": (None, True),
    "lycoris_": (None, True),
    "lora_te1_": ("text_encoder", True),
    "lora_te2_": ("text_encoder_2", True),
    "lora_te_": ("text_encoder", True),
    "diffusion_model.": (None, False),
    "base_model.model.": (None, False),
    "transformer.": (None, False),
    "unet.": (None, False),
    "text_encoder.": ("text_encoder", False),
    "text_encoder_2.": ("text_encoder_2", False),
    "text_encoders.clip_l.transformer.": ("text_encoder", False),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", False),
}
_PLAIN_PREFIXES = ("transformer.", "unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_TOOLS_PREFIXES = tuple(prefix for prefix in _PREFIXES if prefix not in _PLAIN_PREFIXES)
# How `modelspec.architecture` begins: library/sai_model_spec.py of sd-scripts, utils/sai_model_spec.py of musubi-tuner.
_ARCHITECTURES = {
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3": "sd3",
    "flux-1": "flux",
    "flux.1": "flux",
    "flux.2": "flux2_klein",
    "qwen-image": "qwen_image",
}


@dataclass(frozen=True)
class Target:
    """A layer of a file.

    Args:
        name: what its tensors' names begin with.
        parts: full paths of our layers that are its rows.
    """

    name: str
    parts: tuple[str, ...]


def component_of(family: str) -> str:
    """Name of the network in the family's pipeline."""
    return "unet" if family == "sdxl" else "transformer"


def plan(
    kinds: Mapping[str, str], file_format: str, family: str, *, config: Mapping[str, Any] | None = None
) -> list[Target]:
    """The layers of a file in `file_format`; needs no values, so that a run can ask before it trains.

    Args:
        kinds: full path of each of our layers -> type of its adapter.
        config: configuration of the network: see `names.rows_of` and `names.idle_layers`.

    Raises:
        SciflowError: the format has no name for a layer, or cannot hold such an adapter.
    """
    rows = rows_of(family, config)
    _refuse_kinds(set(kinds.values()), file_format)
    targets: dict[str, Target] = {}
    unknown = []
    for full in kinds:
        component, _, path = full.partition(".")
        place = place_of(path, _table(component, family, rows))
        if place is None:
            unknown.append(full)
        elif file_format == COMFY and family != "sdxl":
            targets[full] = Target(full, (full,))
        else:
            prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}.get(component, "lora_unet_")
            name = prefix + place.layer.replace(".", "_")
            targets[name] = Target(name, tuple(f"{component}.{part}" for part in place.parts))
    if unknown:
        raise SciflowError(
            f"`format` {file_format!r} has no name for {len(unknown)} of these layers in `{family}`, such as "
            f"{', '.join(unknown[:3])}. Is it an adapter of this family? If so, export it with `--format diffusers`, "
            "or train without these layers (`--lora_layers`)."
        )
    for target in targets.values():
        _refuse_fusing(target, kinds, idle_layers(family, config))
    return list(targets.values())


def _table(component: str, family: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    if component == component_of(family):
        return rows
    return CLIP if component in TEXT_ENCODERS.get(family, ()) else ()


def _refuse_kinds(kinds: set[str], file_format: str) -> None:
    if OFT in kinds:
        raise SciflowError(
            f"`format` {file_format!r} cannot hold OFT: PEFT turns the input of a layer, `oft_blocks` of kohya's tools "
            "and ComfyUI its output. Use `--format diffusers`, or train lora, loha or lokr."
        )
    if DORA in kinds and file_format == COMFY:
        raise SciflowError(
            "`format` 'comfy' cannot hold DoRA: ComfyUI divides by the norm of the base weight, DoRA by that of the "
            "sum (`weight_decompose` in its comfy/weight_adapter/base.py), so the images would differ. Use `--format "
            "diffusers`, `--format kohya` (read by LyCORIS), or train lora."
        )


def _refuse_fusing(target: Target, kinds: Mapping[str, str], idle: tuple[str, ...]) -> None:
    """What cannot be written as rows of one matrix."""
    there = [part for part in target.parts if part in kinds]
    if len(target.parts) == 1:
        return
    if any(kinds[part] == LOKR for part in there):
        raise SciflowError(
            f"`format` 'kohya' cannot hold the LoKr of {there[0]}: there {target.name} is one matrix for "
            f"{len(target.parts)} layers, and several Kronecker products are not one. Use `--format comfy` or "
            "`--format diffusers`, or train lora or loha."
        )
    missing = [part for part in target.parts if part not in kinds and part not in idle]
    if missing and any(kinds[part] == DORA for part in there):
        raise SciflowError(
            f"`format` 'kohya' cannot hold the DoRA of {there[0]} without one of {missing[0]}: there {target.name} is "
            "one matrix for both, and the norms of all of its rows would have to be known. Train both layers, or use "
            "`--format diffusers`. If the network does not read that layer, say which network it is "
            "(`--pretrained_model_name_or_path`)."
        )


def write(
    adapter: Adapter, file_format: str, family: str, *, config: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file in `file_format`: see `plan`."""
    state: dict[str, torch.Tensor] = {}
    kinds = {path: layer.kind for path, layer in adapter.items()}
    if family == "sdxl":
        adapter = _with_one_alpha(adapter)
    for target in plan(kinds, file_format, family, config=config):
        layers = [adapter.get(part) for part in target.parts]
        layer = layers[0] if len(layers) == 1 else fuse(layers, _ratios(target.parts))
        if layer is None:
            continue
        if not target.name.startswith("lora_"):  # ComfyUI's: as diffusers reads them, too, where alpha is metadata
            names, layer = _COMFY_NAMES, layer.scaled(layer.scale)
        else:
            names = _KOHYA_NAMES
            if layer.kind in (LOHA, LOKR):  # LyCORIS 4.1 multiplies by the scale twice where it merges these
                layer = layer.scaled(layer.scale)
            state[f"{target.name}.alpha"] = torch.tensor(layer.alpha)
        for name, value in layer.weights.items():
            value = value.reshape(-1, *[1] * (layer.weights["lora_A"].ndim - 1)) if name == MAGNITUDE else value
            state[f"{target.name}.{names.get(name, name)}"] = value
    return state


def _with_one_alpha(adapter: Adapter) -> Adapter:
    """The same updates, all with the commonest alpha: diffusers 0.42 loses those of SDXL's attention that differ."""
    alpha = Counter(layer.alpha for layer in adapter.values()).most_common(1)[0][0]
    return {path: layer.scaled(layer.scale * (layer.rank or 1) / alpha) for path, layer in adapter.items()}


def _ratios(parts: Sequence[str]) -> list[int]:
    return [MLP_RATIO if part.endswith(".proj_mlp") else 1 for part in parts]


def is_tools_file(names: Iterable[str], *, configured: bool) -> bool:
    """Whether these tensors' names are those of kohya's tools, LyCORIS or ComfyUI, not of diffusers.

    Args:
        configured: the file has PEFT's configuration in its metadata.
    """
    return any(
        name.startswith(_TOOLS_PREFIXES)
        or name.endswith((".dora_scale", ".lora_down.weight"))
        or (not name.startswith(_PLAIN_PREFIXES) and _KEY.fullmatch(name))
        or (not configured and (".hada_" in name or ".lokr_" in name))
        for name in names
    )


def read(state: Mapping[str, torch.Tensor], family: str, *, config: Mapping[str, Any] | None = None) -> Adapter:
    """The layers of a file of kohya's tools, LyCORIS or ComfyUI.

    Raises:
        SciflowError: names that the family does not have, or an adapter that PEFT does not have.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, value in state.items():
        found = _KEY.fullmatch(key)
        if found is None:
            strange.append(key)
        else:
            groups.setdefault(found[1], {})[_OUR_NAMES.get(found[2], found[2])] = value
    if strange:
        raise SciflowError(f"{len(strange)} of its tensors are of no known kind, such as {', '.join(strange[:3])}.")
    places = {name: _resolve(name, family, config) for name in groups}
    if unknown := [name for name, place in places.items() if place is None]:
        others = [other for other in FAMILIES if other != family and not _unknown(groups, other)]
        raise SciflowError(
            f"{len(unknown)} of its layers are none of `{family}`, such as {', '.join(unknown[:3])}."
            + (f" It is a file for {' or '.join(others)}." if others else "")
        )
    adapter: Adapter = {}
    for name, tensors in groups.items():
        place: Any = places[name]
        layer = _layer(name, tensors)
        layers = [layer] if len(place.parts) == 1 else split(layer, _ratios(place.parts), name)
        for part, own in zip(place.parts, layers, strict=True):
            if part in adapter:
                raise SciflowError(f"two of its layers are {part}; the second is {name}.")
            if own is not None and part not in idle_layers(family, config):
                adapter[part] = own
    return adapter


def families_of(names: Iterable[str]) -> list[str]:
    """The families that have layers of all these tensors' names."""
    groups = {found[1] for name in names if (found := _KEY.fullmatch(name))}
    return [family for family in FAMILIES if groups and not _unknown(groups, family)]


def family_of(metadata: Mapping[str, str]) -> str | None:
    """The family that the metadata of kohya's tools name; None where they name none of ours."""
    architecture = metadata.get("modelspec.architecture", "").lower()
    return next((family for start, family in _ARCHITECTURES.items() if architecture.startswith(start)), None)


def _unknown(groups: Iterable[str], family: str) -> list[str]:
    return [name for name in groups if _resolve(name, family, None) is None]


def _resolve(name: str, family: str, config: Mapping[str, Any] | None) -> Place | None:
    """Full paths of our layers that a file calls `name`."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    component, flat = _PREFIXES.get(prefix, (None, False))
    component = component or component_of(family)
    place = find(name.removeprefix(prefix), _table(component, family, rows_of(family, config)), flat=flat)
    return place and Place(place.layer, tuple(f"{component}.{part}" for part in place.parts))


def _layer(name: str, tensors: dict[str, torch.Tensor]) -> Layer:
    tensors = dict(tensors)
    alpha = tensors.pop("alpha", None)
    if not tensors:
        raise SciflowError(f"{name} has an alpha and no weights.")
    kind = plain.kind_of(tensors)
    needed = {
        LORA: {"lora_A", "lora_B"},
        DORA: {"lora_A", "lora_B", MAGNITUDE},
        LOHA: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    }.get(kind, set())
    if kind == LOKR:
        for whole in ("lokr_w1", "lokr_w2"):
            needed |= {whole} if whole in tensors else {f"{whole}_a", f"{whole}_b"}
    if lacking := sorted(needed - tensors.keys()):
        raise SciflowError(f"{name} lacks {', '.join(lacking)}.")
    if surplus := sorted(tensors.keys() - needed - {"hada_t1", "hada_t2", "lokr_t2"}):
        theirs = ", ".join(_KOHYA_NAMES.get(found, found) for found in surplus)
        raise SciflowError(f"{name} is a {kind} with {theirs}, which PEFT does not have.")
    if kind == DORA:
        tensors[MAGNITUDE] = _magnitude(name, tensors)
    layer = Layer(kind, tensors, 1.0)
    given = 0.0 if alpha is None or layer.rank is None else float(alpha)
    return layer if given == 0 else Layer(kind, tensors, given / (layer.rank or 1))


def _magnitude(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """PEFT's shape of a magnitude for each row: (rows,), or (1, rows, 1, 1) of a convolution."""
    value, rows, dims = tensors[MAGNITUDE], len(tensors["lora_B"]), tensors["lora_A"].ndim
    if value.shape[:1] != (rows,) or value.numel() != rows:
        raise SciflowError(
            f"{name}: its DoRA has a magnitude for each column (`dora_scale` {tuple(value.shape)}), PEFT's has one for "
            "each row. Train it on with the tool that made it."
        )
    return value.reshape(rows) if dims == 2 else value.reshape(1, rows, *[1] * (dims - 2))
