"""LoRA files of kohya's tools, LyCORIS and ComfyUI: written from an adapter's layers, and read into them."""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import SciflowError
from .diffusers import DORA, LOHA, LOKR, LORA, MAGNITUDE, OFT, Adapter, Layer, kind_of
from .names import (
    ARCHITECTURES,
    CLIP,
    COMFY,
    FAMILIES,
    MLP_RATIO,
    MUSUBI,
    SDXL_UNET,
    TABLES,
    TEXT_ENCODERS,
    TWO_PARTS,
    Row,
    architecture_of,
    unet_rows,
)

_KOHYA_NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", MAGNITUDE: "dora_scale"}
_COMFY_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_OUR_NAMES = {name: ours for names in (_KOHYA_NAMES, _COMFY_NAMES) for ours, name in names.items()}
_KEY = re.compile(r"(.+?)\.(lora_(?:down|up|A|B)(?:\.default)?\.weight|dora_scale|alpha|(?:hada|lokr)_\w+)")

# How a tensor's name ends -> what it is, of what adapters here are not: ComfyUI, comfy/lora.py, comfy/weight_adapter.
_OTHER_KINDS: Mapping[str, str] = {
    ".diff": "changes of complete weights",
    ".diff_b": "changes of biases",
    ".set_weight": "complete weights",
    ".w_norm": "changes of the weights of norms",
    ".b_norm": "changes of the biases of norms",
    ".reshape_weight": "new shapes of layers",
    ".lora_mid.weight": "the middle matrices of a LoCon",
    ".oft_blocks": "an OFT that turns the output of a layer",
    ".oft_diag": "an OFT that turns the output of a layer",
    ".rescale": "scales of an OFT",
    ".a1.weight": "a GLoRA",
    ".a2.weight": "a GLoRA",
    ".b1.weight": "a GLoRA",
    ".b2.weight": "a GLoRA",
    ".on_input": "an (IA)^3",
    ".lora_up.bias": "biases of a LoRA",
    ".lora_B.bias": "biases of a LoRA",
}

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
    "pipe.dit.": (None, False),
    "pipe.unet.": (None, False),
    "transformer.": (None, False),
    "unet.": (None, False),
    "text_encoder.": ("text_encoder", False),
    "text_encoder_2.": ("text_encoder_2", False),
    "text_encoders.clip_l.transformer.": ("text_encoder", False),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", False),
}
_DIFFUSERS_PREFIXES = ("transformer.", "unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_FOREIGN_PREFIXES = tuple(prefix for prefix in _PREFIXES if prefix not in _DIFFUSERS_PREFIXES)


# -- names ---------------------------------------------------------------------------------------------------------


def component_of(family: str) -> str:
    """Name of the network in the family's pipeline."""
    return "unet" if family == "sdxl" else "transformer"


@dataclass(frozen=True)
class Place:
    """Where a diffusers layer lies in the original network.

    Args:
        layer: path of the original layer.
        parts: paths of all diffusers layers that are its rows, top to bottom.
    """

    layer: str
    parts: tuple[str, ...]


def rows_of(family: str, config: Mapping[str, Any] | None = None) -> tuple[Row, ...]:
    """The table of a family.

    Args:
        config: configuration of the network, for the numbers of a UNet's blocks; default: SDXL as published.

    Raises:
        SciflowError: there is no convention for this family.
    """
    if family == "sdxl":
        config = SDXL_UNET if config is None else config
        return unet_rows(
            int(config["layers_per_block"]), *(tuple(config[n]) for n in ("down_block_types", "up_block_types"))
        )
    if family not in TABLES:
        raise SciflowError(
            f"`family` {family!r}: kohya's tools and ComfyUI have no names for its layers, only for those of "
            f"{', '.join(FAMILIES)}. The files of the run are for diffusers and PEFT."
        )
    return TABLES[family]


def idle_layers(family: str, config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Layers whose output is read by nothing, so that they are not adapted: known with the network's configuration."""
    if family != "sd3" or config is None:
        return ()
    return (f"transformer.transformer_blocks.{config['num_layers'] - 1}.attn.add_q_proj",)


def place_of(path: str, rows: tuple[Row, ...]) -> Place | None:
    """Where the diffusers layer `path` is found in the original network; None where the table does not have it."""
    for pattern, layer, parts in _by_part(rows):
        if found := pattern.fullmatch(path):
            return Place(*_filled(layer, parts, found.groups()))
    return None


def find(name: str, rows: tuple[Row, ...], *, flat: bool) -> Place | None:
    """The layer that a file calls `name`: in the original's spelling or in diffusers'.

    Args:
        flat: dots are written as underscores, as in kohya's files.
    """
    for pattern, layer, parts in _by_name(rows, flat):
        if found := pattern.fullmatch(name):
            return Place(*_filled(layer, parts, found.groups()))
    return None


def _filled(layer: str, parts: tuple[str, ...], numbers: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    def fill(name: str) -> str:
        left = iter(numbers)
        return "".join(next(left) if piece == "*" else piece for piece in re.split(r"(\*)", name))

    return fill(layer), tuple(map(fill, parts))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)"))


@functools.cache
def _by_part(rows: tuple[Row, ...]) -> tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...]:
    return tuple((_pattern(part), layer, parts) for layer, parts in rows for part in parts)


@functools.cache
def _by_name(rows: tuple[Row, ...], flat: bool) -> tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...]:
    """The original's names first, then diffusers' own: a part is then a row of its own."""
    both = [*rows, *((part, (part,)) for _, parts in rows for part in parts)]
    return tuple((_pattern(name.replace(".", "_") if flat else name), name, parts) for name, parts in both)


# -- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A layer of a file.

    Args:
        name: what its tensors' names begin with.
        parts: full paths of our layers that are its rows.
        original: whether the file is for the original network, whose modulations may be turned round.
    """

    name: str
    parts: tuple[str, ...]
    original: bool = False


def plan(
    kinds: Mapping[str, str], file_format: str, family: str, *, config: Mapping[str, Any] | None = None
) -> list[Target]:
    """The layers of a file in `file_format`; needs no values, so that a run can ask before it trains.

    Args:
        kinds: full path of each of our layers -> type of its adapter.
        config: configuration of the network: see `rows_of` and `idle_layers`.

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
            original = place.parts != (place.layer,)
            targets[name] = Target(name, tuple(f"{component}.{part}" for part in place.parts), original)
    if unknown:
        raise SciflowError(
            f"`format` {file_format!r} has no name for {len(unknown)} of these layers in `{family}`, such as "
            f"{', '.join(unknown[:3])}. Is it an adapter of this family? If so, {elsewhere(set(kinds.values()))} Or "
            "train without these layers (`--lora_layers`)."
        )
    for target in targets.values():
        _refuse_fusing(target, kinds, idle_layers(family, config))
    return list(targets.values())


def _table(component: str, family: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    if component == component_of(family):
        return rows
    return CLIP if component in TEXT_ENCODERS.get(family, ()) else ()


def elsewhere(kinds: set[str]) -> str:
    """Advice for adapters that a format cannot hold; it never names a format that also refuses them."""
    if kinds & {LOHA, OFT}:
        return "take the folder that training wrote, PEFT's own format: `PeftModel.from_pretrained` reads it as it is."
    return "use `--format diffusers`."


def _refuse_kinds(kinds: set[str], file_format: str) -> None:
    if OFT in kinds:
        raise SciflowError(
            f"`format` {file_format!r} cannot hold OFT: PEFT turns the input of a layer, `oft_blocks` of kohya's tools "
            f"and ComfyUI its output. For this adapter, {elsewhere(kinds)} Or train lora or loha."
        )
    if DORA in kinds and file_format == COMFY:
        raise SciflowError(
            "`format` 'comfy' cannot hold DoRA: ComfyUI divides by the norm of the base weight, DoRA by that of the "
            "sum (`weight_decompose` in its comfy/weight_adapter/base.py), so the images would differ. Use `--format "
            "diffusers`, or train lora."
        )


def _refuse_fusing(target: Target, kinds: Mapping[str, str], idle: tuple[str, ...]) -> None:
    """Refuses adapters that cannot be written as rows of one matrix."""
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
        if target.original and target.parts[0].endswith(TWO_PARTS):
            layer = layer.turned()
        if not target.name.startswith("lora_"):  # of ComfyUI, which diffusers reads too: there alpha is metadata
            names, layer = _COMFY_NAMES, layer.scaled(layer.scale)
        else:
            names = _KOHYA_NAMES
            if layer.kind in (LOHA, LOKR):  # LyCORIS 4.1 multiplies by the scale twice where it merges these
                layer = _with_whole_w1(layer.scaled(layer.scale))
            state[f"{target.name}.alpha"] = torch.tensor(layer.alpha)
        for name, value in layer.weights.items():
            value = value.reshape(-1, *[1] * (layer.weights["lora_A"].ndim - 1)) if name == MAGNITUDE else value
            state[f"{target.name}.{names.get(name, name)}"] = value
    return state


def metadata(state: Mapping[str, torch.Tensor], adapter: Adapter, file_format: str, family: str) -> dict[str, str]:
    """Metadata of a file, which these programs show: what is known, and nothing else.

    Args:
        state: the tensors of the file, see `write`.
        adapter: the layers that were written.
    """
    known = architecture_of(family)
    facts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{known.name}/lora",
        "modelspec.implementation": f"https://github.com/{known.repository}",
    }
    if file_format == COMFY and family != "sdxl":
        return facts
    kind = next(iter(adapter.values())).kind
    ranks = {value.shape[0] for name, value in state.items() if name.endswith((".lora_down.weight", "_w1_b", "_w2_b"))}
    alphas = {float(value) for name, value in state.items() if name.endswith(".alpha")}
    facts["ss_network_module"] = known.network_module if kind == LORA else "lycoris.kohya"
    if kind in (LOHA, LOKR) and known.trainer == MUSUBI:
        facts["ss_network_module"] = f"networks.{kind}"
    elif kind != LORA:
        facts["ss_network_args"] = json.dumps({"algo": LORA, "dora_wd": True} if kind == DORA else {"algo": kind})
    facts["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    facts["ss_network_alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    return facts


def readers(kind: str, file_format: str, family: str) -> str:
    """The programs that read such a file."""
    if file_format == COMFY:
        return "ComfyUI"
    if kind == DORA:
        return "LyCORIS; not for ComfyUI, which would draw other images"
    known = architecture_of(family)
    return f"{known.trainer if kind == LORA or known.trainer == MUSUBI else 'LyCORIS'} and {known.other_reader}"


def _with_whole_w1(layer: Layer) -> Layer:
    """The same LoKr, its first factor multiplied out: musubi-tuner and sd-scripts pass over one of two matrices."""
    if "lokr_w1_a" not in layer.weights:
        return layer
    others = {name: value for name, value in layer.weights.items() if not name.startswith("lokr_w1")}
    return replace(layer, weights={"lokr_w1": layer.weights["lokr_w1_a"] @ layer.weights["lokr_w1_b"], **others})


def _with_one_alpha(adapter: Adapter) -> Adapter:
    """The same updates, all with the commonest alpha: diffusers 0.42 loses those of SDXL's attention that differ."""
    alpha = Counter(layer.alpha for layer in adapter.values()).most_common(1)[0][0]
    return {path: layer.scaled(layer.scale * (layer.rank or 1) / alpha) for path, layer in adapter.items()}


def _ratios(parts: Sequence[str]) -> list[int]:
    return [MLP_RATIO if part.endswith(".proj_mlp") else 1 for part in parts]


# -- reading -------------------------------------------------------------------------------------------------------


def is_kohya_file(names: Iterable[str], *, configured: bool) -> bool:
    """Whether these tensors' names are those of kohya's tools, LyCORIS or ComfyUI, not of diffusers.

    Args:
        configured: the file has PEFT's configuration in its metadata.
    """
    return any(
        name.startswith(_FOREIGN_PREFIXES)
        or name.endswith((".dora_scale", ".lora_down.weight", ".default.weight", *_OTHER_KINDS))
        or (not name.startswith(_DIFFUSERS_PREFIXES) and _KEY.fullmatch(name))
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
            kind = found[2].replace(".default", "")  # PEFT's name of an adapter, which DiffSynth leaves in
            groups.setdefault(found[1], {})[_OUR_NAMES.get(kind, kind)] = value
    if strange:
        raise SciflowError(_strange(strange))
    places = {name: _resolve(name, family, config) for name in groups}
    if unknown := [name for name, place in places.items() if place is None]:
        others = [other for other in FAMILIES if other != family and not _unknown(groups, other)]
        raise SciflowError(
            f"{len(unknown)} of its layers are none of `{family}`, such as {', '.join(unknown[:3])}."
            + (f" It is a file for {' or '.join(others)}." if others else "")
            + (
                " No pipeline loads those of T5 (`lora_te3_`)."
                if any(n.startswith("lora_te3_") for n in unknown)
                else ""
            )
        )
    adapter: Adapter = {}
    for name, tensors in groups.items():
        place: Any = places[name]
        layer = _layer(name, tensors)
        if place.parts[0].endswith(TWO_PARTS) and not place.parts[0].endswith(place.layer):  # not diffusers' own name
            layer = layer.turned()
        layers = [layer] if len(place.parts) == 1 else split(layer, _ratios(place.parts), name)
        for part, own in zip(place.parts, layers, strict=True):
            if part in adapter:
                raise SciflowError(f"two of its layers are {part}; the second is {name}.")
            if own is not None and part not in idle_layers(family, config):
                adapter[part] = own
    return adapter


def _strange(names: Sequence[str]) -> str:
    """Says what tensors are that no adapter here has."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = next((words for end, words in _OTHER_KINDS.items() if name.endswith(end)), "of no known kind")
        found.setdefault(words, []).append(name)
    listed = "; ".join(f"{len(them)} are {words}, such as {', '.join(them[:3])}" for words, them in found.items())
    return (
        f"of its tensors {listed}. The adapters here (lora, dora, lokr, loha) have none of these, and without them the "
        "file would draw other images: use it in the program that made it."
    )


def families_of_names(names: Iterable[str]) -> list[str]:
    """The families that have layers of all these tensors' names."""
    groups = {found[1] for name in names if (found := _KEY.fullmatch(name))}
    return [family for family in FAMILIES if groups and not _unknown(groups, family)]


def families_of_layers(adapter: Adapter) -> list[str]:
    """The families that have layers of these paths, which are diffusers'."""
    paths = [path.partition(".")[::2] for path in adapter if not path.startswith("text_encoder")]
    return [
        family
        for family in FAMILIES
        if paths and all(c == component_of(family) and place_of(path, rows_of(family)) for c, path in paths)
    ]


def family_of(metadata: Mapping[str, str]) -> str | None:
    """The family that the metadata of kohya's tools name; None where they name none of ours."""
    found = metadata.get("modelspec.architecture", "").lower()
    return next((family for family in FAMILIES if found.startswith(ARCHITECTURES[family].beginnings)), None)


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
    kind = kind_of(tensors)
    needed = {
        LORA: {"lora_A", "lora_B"},
        DORA: {"lora_A", "lora_B", MAGNITUDE},
        LOHA: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    }.get(kind, set())
    if kind == LOKR:
        for factor in ("lokr_w1", "lokr_w2"):
            needed |= {factor} if factor in tensors else {f"{factor}_a", f"{factor}_b"}
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


# -- fused matrices ------------------------------------------------------------------------------------------------


_ROWS = {LORA: ("lora_B",), DORA: ("lora_B", MAGNITUDE), LOHA: ("hada_w1_a", "hada_w2_a")}
_COLUMNS = {LORA: ("lora_A",), DORA: ("lora_A",), LOHA: ("hada_w1_b", "hada_w2_b")}
"""Factors of an update (rows, rank) and (rank, columns), in the same order; the magnitude has rows only."""


def fuse(layers: Sequence[Layer | None], ratios: Sequence[int]) -> Layer:
    """One adapter for a matrix whose rows are several layers; those without adapter get zeros (norms: ones).

    The ranks add up: a block of the new factor (rows, rank) for each layer, zero elsewhere. Where all layers share
    the factor on the input side (a fused adapter that was split), it stays one.

    Args:
        ratios: rows of the layers relative to each other.
    """
    there = [layer for layer in layers if layer is not None]
    kind, scale = there[0].kind, there[0].scale
    there = [layer.scaled(layer.scale / scale) for layer in there]
    weights: dict[str, torch.Tensor] = {}
    shared = len(there) == len(layers) and all(
        torch.equal(layer.weights[name], there[0].weights[name]) for layer in there[1:] for name in _COLUMNS[kind]
    )
    for name in _COLUMNS[kind]:
        factors = [layer.weights[name] for layer in there]
        weights[name] = factors[0] if shared else torch.cat(factors)
    for name in _ROWS[kind]:
        factors = [layer.weights[name] for layer in there]
        if shared:
            weights[name] = torch.cat(factors)
            continue
        pairs = list(zip(layers, ratios, strict=True))
        unit = next(len(layer.weights[name]) // ratio for layer, ratio in pairs if layer is not None)
        if name == MAGNITUDE:  # a row that nothing reads may have any norm
            weights[name] = torch.cat(
                [factors[0].new_ones(unit * r) if x is None else x.weights[name] for x, r in pairs]
            )
            continue
        fused = factors[0].new_zeros(unit * sum(ratios), sum(factor.shape[1] for factor in factors))
        row = column = 0
        for layer, ratio in pairs:
            if layer is not None:
                factor = factors.pop(0)
                fused[row : row + len(factor), column : column + factor.shape[1]] = factor
                column += factor.shape[1]
            row += unit * ratio
        weights[name] = fused
    return Layer(kind, weights, scale)


def split(layer: Layer, ratios: Sequence[int], name: str) -> list[Layer | None]:
    """The adapters of several layers out of that of the matrix they are the rows of; None for one without.

    Where the layers use columns of their own, as after `fuse`, each keeps those only; otherwise all of them.

    Args:
        name: of the matrix, for errors.

    Raises:
        SciflowError: the update is a Kronecker product, whose rows are none.
    """
    if layer.kind not in _ROWS:
        raise SciflowError(
            f"{name}: a {layer.kind} of the fused matrix is none of the {len(ratios)} layers that it is made of "
            "here (query, key, value). Train such an adapter on networks in diffusers' layout."
        )
    rows = len(layer.weights[_ROWS[layer.kind][0]])
    if rows % sum(ratios):
        raise SciflowError(f"{name}: {rows} rows cannot be cut in the ratio {':'.join(map(str, ratios))}.")
    sizes = [rows // sum(ratios) * ratio for ratio in ratios]
    cut = {key: layer.weights[key].split(sizes) for key in _ROWS[layer.kind]}
    used = {key: [part.ne(0).any(dim=0) for part in parts] for key, parts in cut.items() if key != MAGNITUDE}
    apart = _apart(used, len(ratios))
    found: list[Layer | None] = []
    for i in range(len(ratios)):
        weights = {key: parts[i] for key, parts in cut.items()}
        weights |= {key: layer.weights[key] for key in _COLUMNS[layer.kind]}
        if apart:
            for row, column in zip((n for n in _ROWS[layer.kind] if n != MAGNITUDE), _COLUMNS[layer.kind], strict=True):
                mask = used[row][i]
                if layer.kind == DORA and not mask.any():  # its norms count all the same
                    mask = torch.ones_like(mask)
                weights[row], weights[column] = weights[row][:, mask], weights[column][mask]
        nothing = not weights[_COLUMNS[layer.kind][0]].shape[0]
        found.append(None if nothing else replace(layer, weights=weights))
    return found


def _apart(used: dict[str, list[torch.Tensor]], parts: int) -> bool:
    """Whether no column belongs to two layers. An adapter of zeros, not yet trained, is cut into equal pieces."""
    for masks in used.values():
        rank = len(masks[0])
        if not any(bool(mask.any()) for mask in masks):
            if rank % parts:
                return False
            for i, mask in enumerate(masks):
                mask[i * rank // parts : (i + 1) * rank // parts] = True
    counts = [[int(mask.sum()) for mask in masks] for masks in used.values()]
    return all(counts[0] == other for other in counts) and all(
        int(torch.stack(masks).sum(dim=0).max()) <= 1 for masks in used.values()
    )
