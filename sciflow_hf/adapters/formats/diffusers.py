"""An adapter as its layers, in PEFT's names, and the LoRA files of diffusers' pipelines and of PEFT, which use them."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from ...errors import SciflowError

LORA, DORA, LOHA, LOKR, OFT = "lora", "dora", "loha", "lokr", "oft"
MAGNITUDE = "lora_magnitude_vector"

METADATA = "lora_adapter_metadata"
"""Key of the file's metadata with PEFT's configuration as JSON, each option behind the component's name."""

_NAMES = re.compile(r"(.+)\.(?:(lora_[AB])\.weight|(lora_magnitude_vector|oft_R)(?:\.weight)?|((?:hada|lokr)_\w+))")


@dataclass(frozen=True)
class Layer:
    """The adapter of one layer.

    Args:
        kind: `lora`, `dora`, `loha`, `lokr` or `oft`.
        weights: PEFT's names of its parameters, such as `lora_A`, and their values.
        scale: the update is multiplied by it: alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA.
    """

    kind: str
    weights: dict[str, torch.Tensor]
    scale: float

    @property
    def rank(self) -> int | None:
        """Inner dimension; None where nothing is decomposed (LoKr of two full matrices)."""
        for name in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.weights:
                return self.weights[name].shape[0]
        return None

    @property
    def alpha(self) -> float:
        """Factor that makes alpha / rank the scale; 1 without a rank."""
        return float(f"{self.scale * (self.rank or 1):.9g}")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the update of a linear layer."""
        if self.kind == LOKR:
            (rows, more_rows), (columns, more_columns) = _kronecker(self.weights)
            return rows * more_rows, columns * more_columns
        up, down = ("hada_w1_a", "hada_w1_b") if self.kind == LOHA else ("lora_B", "lora_A")
        return len(self.weights[up]), self.weights[down].shape[1]

    def turned(self) -> "Layer":
        """A modulation of two parts, scale and shift, with these swapped; other layers unchanged."""
        if self.shape[0] != 2 * self.shape[1]:
            return self
        weights = dict(self.weights)
        for name in ("lora_B", MAGNITUDE, "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a"):
            if name in weights:
                if len(weights[name]) % 2:
                    raise SciflowError(
                        f"a {self.kind} whose rows, {len(weights[name])} x {self.shape[0]}, have no half."
                    )
                weights[name] = torch.cat(weights[name].chunk(2)[::-1])
        return replace(self, weights=weights)

    def scaled(self, factor: float) -> "Layer":
        """The same update with `factor` less in its scale and more in its weights."""
        if factor == 1:
            return self
        weights = dict(self.weights)
        first = next(n for n in ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a") if n in weights)
        weights[first] = weights[first] * factor
        return replace(self, weights=weights, scale=self.scale / factor)


Adapter: TypeAlias = dict[str, Layer]
"""Full path of a layer, `transformer.` and the like included -> its adapter."""


# -- reading ----------------------------------------------------------------------------------------------------------


def config_of(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The flat configuration in a file's metadata, `transformer.r` and so on; empty without one."""
    text = (metadata or {}).get(METADATA)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SciflowError(f"the metadata `{METADATA}` of this file is no JSON: {error}.") from error
    return dict(found)


def read(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Adapter:
    """The layers of a file in this layout.

    Args:
        config: flat, see `config_of`. Without one the scale is that of its `.alpha` tensors, else 1.

    Raises:
        SciflowError: a tensor that is none of an adapter.
    """
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in state.items() if key.endswith(".alpha")}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, value in _in_peft_names({k: v for k, v in state.items() if not k.endswith(".alpha")}).items():
        if not (found := _NAMES.fullmatch(key)):
            unknown.append(key)
            continue
        path, *kinds = found.groups()
        weights.setdefault(path, {})[next(filter(None, kinds))] = value
    if unknown:
        raise SciflowError(f"{len(unknown)} tensors are none of an adapter, such as {', '.join(unknown[:3])}.")
    return {path: _layer(path, tensors, config, alphas.get(path)) for path, tensors in weights.items()}


def _in_peft_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`lora_A` for what UNets and text encoders call `lora.down` and `lora_linear_layer.down`, and older names."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = {key: value for key, value in state.items() if key.startswith("unet.")}
    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    rest = {key: value for key, value in state.items() if key not in unet and key not in text}
    if any(".lora_linear_layer." in key or "_lora." in key for key in text):
        text = convert_state_dict_to_peft(text)
    return {**rest, **convert_unet_state_dict_to_peft(unet), **text}


def _layer(path: str, weights: dict[str, torch.Tensor], config: Mapping[str, Any], alpha: float | None) -> Layer:
    kind = kind_of(weights)
    layer = Layer(kind, weights, 1.0)
    if kind == OFT:
        return layer
    component, _, inner = path.partition(".")
    if f"{component}.r" in config:
        options = {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
        rank = layer.rank or _by_pattern(options.get("rank_pattern"), inner, options["r"])
        alpha = _by_pattern(options.get("alpha_pattern"), inner, options.get("lora_alpha", options.get("alpha")))
        return Layer(kind, weights, float(alpha) / (rank**0.5 if options.get("use_rslora") else rank))
    return layer if alpha is None or layer.rank is None else Layer(kind, weights, alpha / layer.rank)


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), path), otherwise)


def kind_of(weights: Mapping[str, Any]) -> str:
    """Type of an adapter by the names of its parameters."""
    if MAGNITUDE in weights and "lora_A" in weights:
        return DORA
    beginning = next((name for name in weights if name != MAGNITUDE), LORA).partition("_")[0]
    return {"lora": LORA, "hada": LOHA, "lokr": LOKR, "oft": OFT}[beginning]


def write(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and flat configuration, as `read` takes them and as PEFT and diffusers load them."""
    state: dict[str, torch.Tensor] = {}
    components: dict[str, dict[str, Layer]] = {}
    for full, layer in adapter.items():
        component, _, path = full.partition(".")
        components.setdefault(component, {})[path] = layer
        for name, value in sorted(layer.weights.items()):  # diffusers looks at the first name: `lora_A`
            state[f"{full}.{name}" + (".weight" if name in ("lora_A", "lora_B") else "")] = value
    config = {
        f"{component}.{name}": value
        for component, layers in components.items()
        for name, value in _peft_options(layers).items()
    }
    return state, config


def _peft_options(layers: dict[str, Layer]) -> dict[str, Any]:
    """Options of PEFT's configuration that give these layers their ranks and scales."""
    # A text encoder has lost its `text_model.` in some versions of transformers; PEFT matches the end of a path.
    layers = {path.removeprefix("text_model."): layer for path, layer in layers.items()}
    kinds = {layer.kind for layer in layers.values()}
    if len(kinds) > 1:
        raise SciflowError(
            f"one file holds adapters of several types ({', '.join(sorted(kinds))}), which PEFT does not mix."
        )
    kind = kinds.pop()
    # PEFT stores a LoKr's second matrix undecomposed where the rank reaches half of its longer side.
    ranks = {path: layer.rank or max(layer.weights["lokr_w2"].shape[:2]) for path, layer in layers.items()}
    alphas = {path: float(f"{layer.scale * ranks[path]:.9g}") for path, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    options: dict[str, Any] = {
        "peft_type": {LORA: "LORA", DORA: "LORA", LOHA: "LOHA", LOKR: "LOKR"}[kind],
        "r": rank,
        "lora_alpha" if kind in (LORA, DORA) else "alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers),
    }
    if kind in (LORA, DORA):
        options["use_dora"] = kind == DORA
    else:
        options["use_effective_conv2d"] = any(
            n in layer.weights for layer in layers.values() for n in ("hada_t1", "lokr_t2")
        )
    if kind == LOKR:
        options["decompose_both"] = any("lokr_w1_a" in layer.weights for layer in layers.values())
        options["decompose_factor"] = _factor(layers)
    return options


def _factor(layers: dict[str, Layer]) -> int:
    """The `decompose_factor` with which PEFT makes matrices of these shapes."""
    from peft.tuners.lokr.layer import factorization

    shapes = {_kronecker(layer.weights) for layer in layers.values()}
    candidates = [-1, *sorted({side for (small, _), (other, _) in shapes for side in (small, other)})]
    for candidate in candidates:
        if all(factorization(a * b, candidate) == (a, b) for pairs in shapes for a, b in pairs):
            return candidate
    raise SciflowError(
        "its LoKr matrices have shapes that PEFT does not make, with no `decompose_factor`: "
        + ", ".join(f"{a}x{b} of {a * b}" for pairs in sorted(shapes)[:2] for a, b in pairs)
        + ". Train it on with the tool that made it."
    )


def _kronecker(weights: Mapping[str, torch.Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((rows of w1, rows of w2), (columns of w1, columns of w2))."""
    if "lokr_w1" in weights:
        rows, columns = weights["lokr_w1"].shape
    else:
        rows, columns = weights["lokr_w1_a"].shape[0], weights["lokr_w1_b"].shape[1]
    if "lokr_w2" in weights:
        return (rows, weights["lokr_w2"].shape[0]), (columns, weights["lokr_w2"].shape[1])
    if "lokr_t2" in weights:
        return (rows, weights["lokr_w2_a"].shape[1]), (columns, weights["lokr_w2_b"].shape[1])
    return (rows, weights["lokr_w2_a"].shape[0]), (columns, weights["lokr_w2_b"].shape[1])


def peft_config(config: Mapping[str, Any], component: str) -> Any:
    """PEFT's configuration object of one component, out of the flat one."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    options = {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
    return {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}[options.pop("peft_type")](**options)


def unet_name(name: str) -> str:
    """PEFT's name of a LoRA tensor as LoRA files of UNets have had it since before PEFT."""
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
