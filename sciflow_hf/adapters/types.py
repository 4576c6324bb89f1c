"""The types of adapter: PEFT's configuration of each, and what a type or a layer does not allow."""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError

if TYPE_CHECKING:
    from .adapter import AdapterArguments

ADAPTER_TYPES = ("lora", "dora", "lokr", "loha", "oft")
PIPELINE_TYPES = ("lora", "dora")
"""Those whose file a diffusers pipeline loads; files of the others are PEFT's."""
FROM_BASE = ("pissa", "olora")
"""How `init_lora_weights` begins that take their first values out of the base weights."""

_RANKED = ("lora", "dora", "lokr", "loha")
_TAKEN_BY = {
    "rank": _RANKED,
    "lora_alpha": _RANKED,
    "rank_pattern": _RANKED,
    "alpha_pattern": _RANKED,
    "lora_dropout": PIPELINE_TYPES,
    "use_rslora": PIPELINE_TYPES,
    "init_lora_weights": PIPELINE_TYPES,
    "lokr_factor": ("lokr",),
    "lokr_decompose_both": ("lokr",),
    "oft_block_size": ("oft",),
}
_INITS = "gaussian, kaiming, orthogonal, pissa, pissa_niter_N (N: a small number, such as 4), olora"
_REFUSED_INITS = {
    "eva": "it needs the activations of the training data",
    "corda": "it needs the activations of the training data",
    "lora_ga": "it needs gradients of the training data",
    "loftq": "it quantises the base weights itself",
}


def check_options(args: "AdapterArguments") -> None:
    """Raises SciflowError for an option that the chosen type does not take."""
    defaults = {option.name: option.default for option in dataclasses.fields(args)}
    for option, types in _TAKEN_BY.items():
        value = getattr(args, option)
        if args.adapter_type not in types and value != defaults[option]:
            raise SciflowError(
                f"`{option}` {value!r} does not go with `adapter_type` {args.adapter_type!r}: it is an option of "
                f"{', '.join(types)}. Leave it out."
            )


def checked_init(name: str, adapter_type: str) -> str:
    """The value of `init_lora_weights`, PEFT's True as "kaiming"."""
    if name.lower() in ("true", "kaiming"):
        return "kaiming"
    if name in _REFUSED_INITS:
        why = _REFUSED_INITS[name]
        raise SciflowError(f"`init_lora_weights` {name!r} cannot work here: {why}. Use one of {_INITS}.")
    if not re.fullmatch(r"gaussian|orthogonal|pissa(_niter_[1-9]\d*)?|olora", name):
        raise SciflowError(f"`init_lora_weights` {name!r}: use one of {_INITS}.")
    if name.startswith(FROM_BASE) and adapter_type == "dora":
        raise SciflowError(
            f"`init_lora_weights` {name!r} does not go with `adapter_type` 'dora', whose magnitudes are those of the "
            "base weights. Use gaussian, kaiming or orthogonal, or train a lora."
        )
    return name


def parse_pattern(option: str, value: Mapping[str, Any] | str | None) -> dict[str, int]:
    """`"single_transformer_blocks.*=8,ff=4"`, or the same as a mapping -> {name: number}."""
    given = value or {}
    if isinstance(given, str):
        parts = [part.rpartition("=") for part in given.split(",") if part.strip()]
        given = {name.strip(): number for name, _, number in parts}
    found = {}
    for name, number in given.items():
        if not name or isinstance(number, bool) or not re.fullmatch(r"[1-9]\d*", str(number).strip()):
            raise SciflowError(
                f"`{option}` {value!r}: write name=number, the numbers whole and at least 1, with commas between: "
                "'single_transformer_blocks.*=8,ff=4'."
            )
        found[str(name)] = int(number)
    return found


def match_pattern(option: str, value: Mapping[str, Any] | str | None, layers: list[str]) -> dict[str, int]:
    """{layer's path: number} of the layers that have the name as whole parts of their path; the last name counts."""
    found: dict[str, int] = {}
    for name, number in parse_pattern(option, value).items():
        matched = [path for path in layers if fnmatch.fnmatchcase(f".{path}.", f"*.{name}.*")]
        if not matched:
            parts = sorted({part for path in layers for part in path.split(".") if not part.isdigit()})
            close = difflib.get_close_matches(name, parts, n=3, cutoff=0.3) or parts[:8]
            raise SciflowError(
                f"`{option}` {name!r} matches no layer with an adapter. Parts of their names: {', '.join(close)}."
            )
        found |= dict.fromkeys(matched, number)
    return found


def adapter_config(args: "AdapterArguments", model: torch.nn.Module, layers: list[str]) -> Any:
    """PEFT's configuration for an adapter in these layers (full paths).

    Raises:
        SciflowError: a layer cannot have such an adapter: its kind, its width or how its weights are stored.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    modules = {path: model.get_submodule(path) for path in layers}
    check_weights(args.adapter_type, modules)
    if args.adapter_type == "oft":
        _check_kernels("`adapter_type` 'oft'", modules, larger_than=1)
        _check_divides("oft_block_size", args.oft_block_size, {path: _channels(m)[:1] for path, m in modules.items()})
        return OFTConfig(oft_block_size=args.oft_block_size, target_modules=layers)

    rank: Any = args.rank
    alpha: Any = args.lora_alpha
    ranks = dict.fromkeys(layers, rank) | match_pattern("rank_pattern", args.rank_pattern, layers)
    alphas = ranks if args.alpha_is_rank else dict.fromkeys(layers, alpha)
    alphas = alphas | match_pattern("alpha_pattern", args.alpha_pattern, layers)
    _check_ranks(ranks, rank, modules)
    options: dict[str, Any] = {
        "r": rank,
        "target_modules": layers,
        "rank_pattern": {f"^{path}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{path}": value for path, value in alphas.items() if value != alpha},
    }
    if args.adapter_type == "loha":
        return LoHaConfig(alpha=alpha, **options)
    if args.adapter_type == "lokr":
        if args.lokr_factor > 0:
            _check_divides("lokr_factor", args.lokr_factor, {path: _channels(m) for path, m in modules.items()})
        options |= {"decompose_factor": args.lokr_factor, "decompose_both": args.lokr_decompose_both}
        return LoKrConfig(alpha=alpha, **options)
    if args.init_lora_weights == "orthogonal":
        odd = [path for path, value in ranks.items() if value % 2]
        if odd:
            raise SciflowError(f"`init_lora_weights` 'orthogonal' needs even ranks: {_named(odd)} have odd ones.")
    if args.init_lora_weights not in ("gaussian", "kaiming"):
        _check_kernels(f"`init_lora_weights` {args.init_lora_weights!r}", modules)
    return LoraConfig(
        lora_alpha=alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.adapter_type == "dora",
        use_rslora=args.use_rslora,
        init_lora_weights="gaussian" if args.init_lora_weights == "gaussian" else True,
        **options,
    )


def _channels(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear or convolution layer."""
    if isinstance(module, torch.nn.Conv2d):
        return module.in_channels // module.groups, module.out_channels
    return module.in_features, module.out_features


def _named(layers: Iterable[str]) -> str:
    """The first three of these layers, and how many more."""
    layers = list(layers)
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _check_ranks(ranks: Mapping[str, int], usual: int, modules: Mapping[str, torch.nn.Module]) -> None:
    """A rank above a layer's width buys nothing: the update of the layer has no more than `width` dimensions."""
    widths = {}
    for path, module in modules.items():
        inputs, outputs = _channels(module)
        kernel = math.prod(module.kernel_size) if isinstance(module, torch.nn.Conv2d) else 1
        widths[path] = min(inputs * kernel, outputs)
    over = [path for path in modules if ranks[path] > widths[path]]
    if over:
        worst = min(over, key=lambda path: widths[path])
        rank = ranks[worst]
        raise SciflowError(
            f"`{'rank' if rank == usual else 'rank_pattern'}` {rank} is above the width of {worst}, {widths[worst]}"
            + (f" (and of {len(over) - 1} more layers)" if len(over) > 1 else "")
            + ". Lower it, give such layers a rank of their own by `--rank_pattern`, or leave them out of "
            "`--lora_layers`."
        )


def _check_divides(option: str, number: int, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """PEFT would quietly take another number where this one does not divide a layer's width."""
    over = {path: next(s for s in size if s % number) for path, size in sizes.items() if any(s % number for s in size)}
    if over:
        path, size = next(iter(over.items()))
        common = math.gcd(*(s for size in sizes.values() for s in size))
        divisors = [str(n) for n in range(2, common + 1) if common % n == 0]
        raise SciflowError(
            f"`{option}` {number} does not divide {size}, a width of {path}"
            + (f" (and of {len(over) - 1} more layers)" if len(over) > 1 else "")
            + f". All of these layers allow {', '.join(divisors) or 'none'}; or leave some out of `--lora_layers`."
        )


def _check_kernels(what: str, modules: Mapping[str, torch.nn.Module], larger_than: int = 0) -> None:
    """For what linear layers only can have; 1 x 1 convolutions, too, with `larger_than` 1.

    PEFT's OFT of a larger kernel adds up overlapping patches, so that it changes the output before it has learnt.
    """
    found = [p for p, m in modules.items() if isinstance(m, torch.nn.Conv2d) and max(m.kernel_size) > larger_than]
    if found:
        raise SciflowError(
            f"{what} does not go with convolutions: {_named(found)}. Name other layers by `--lora_layers`; `standard` "
            "and `attention` have linear ones only."
        )


def check_weights(adapter_type: str, modules: Mapping[str, Any]) -> None:
    """Quantised weights that an adapter of this type cannot read."""
    from peft.utils.integrations import get_bnb_param_type

    for path, module in modules.items():
        packed = get_bnb_param_type(module.weight)
        if packed == "4bit" and adapter_type in ("lokr", "loha"):
            raise SciflowError(
                f"`adapter_type` {adapter_type!r} cannot work on 4-bit weights ({path}), whose shape is not the "
                "layer's. Take lora, dora or oft, or an 8-bit base."
            )
        if packed == "8bit" and adapter_type == "dora" and module.weight.device.type == "cpu":
            raise SciflowError(
                f"`adapter_type` 'dora' cannot read the 8-bit weights of bitsandbytes on a CPU ({path}). Take lora, a "
                "4-bit base, or a GPU."
            )


# -- what a run says of its adapter --------------------------------------------------------------------------------


def type_of(config: Any) -> str:
    """`adapter_type` of a configuration of PEFT."""
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return "dora" if kind == "lora" and config.use_dora else kind


def config_facts(config: Any, layers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Type and options of the adapter `name` in these layers of PEFT; what is at its default stays out."""
    kind = type_of(config)
    if kind == "oft":
        return {"type": kind, "oft_block_size": config.oft_block_size}
    lora = kind in PIPELINE_TYPES
    facts = {"type": kind, "rank": config.r, "alpha": config.lora_alpha if lora else config.alpha}
    if lora:
        facts["dropout"] = config.lora_dropout
    ranks = {path: layer.r[name] for path, layer in layers.items()}
    alphas = {path: (layer.lora_alpha if lora else layer.alpha)[name] for path, layer in layers.items()}
    given = {
        "rank_pattern": _by_layer(ranks, facts["rank"]),
        "alpha_pattern": _by_layer(alphas, facts["alpha"]),
        "use_rslora": lora and config.use_rslora,
        "init": lora and config.init_lora_weights not in (True, "gaussian") and config.init_lora_weights,
        "lokr_factor": kind == "lokr" and max(config.decompose_factor, 0),
        "lokr_decompose_both": kind == "lokr" and config.decompose_both,
    }
    return facts | {option: value for option, value in given.items() if value}


def without_numbers(path: str) -> str:
    """`transformer_blocks.3.attn.to_q` -> `transformer_blocks.*.attn.to_q`."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _by_layer(values: Mapping[str, int], usual: int) -> dict[str, int]:
    """Those that differ from `usual`; layers of all blocks as one where they agree."""
    seen: dict[str, set[int]] = defaultdict(set)
    for path, value in values.items():
        seen[without_numbers(path)].add(value)
    return {
        without_numbers(path) if len(seen[without_numbers(path)]) == 1 else path: value
        for path, value in values.items()
        if value != usual
    }


def title(facts: Mapping[str, Any]) -> str:
    """`lora rank 16 alpha 8 on 32 layers, 4,096 parameters`."""
    kind = f"{facts['type']} rank {facts['rank']} alpha {facts['alpha']}" if "rank" in facts else facts["type"]
    options = (option for option in (*_TAKEN_BY, "init") if option in facts and option != "rank")
    kind += "".join(f", {option} {option_text(facts[option])}" for option in options)
    return f"{kind} on {facts['matched']} layers, {facts['trainable_parameters']:,} parameters in float32"


def option_text(value: Any) -> str:
    """The value of an option of an adapter in words; of a pattern as it is written on the command line."""
    return ",".join(f"{name}={number}" for name, number in value.items()) if isinstance(value, dict) else str(value)
