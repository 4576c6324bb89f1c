"""Options of an adapter, and PEFT's configuration made of them: what each type takes and each layer allows."""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import Options, arguments, option
from .initial import FROM_BASE

ADAPTER_TYPES = ("lora", "dora", "lokr", "loha", "oft")
PIPELINE_TYPES = ("lora", "dora")
"""Types whose files diffusers pipelines load; PEFT loads those of the others."""
RANDOM = ("gaussian", "kaiming")
"""Values of `init_lora_weights` that PEFT's configuration is enough for."""

_RANKED = ("lora", "dora", "lokr", "loha")
TAKEN_BY = {
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
"""Option -> the types that take it."""
_INITS = "gaussian, kaiming, orthogonal, pissa, pissa_niter_N (N: a small number, such as 4), olora"
_REFUSED_INITS = {
    "eva": "it needs the activations of the training data",
    "corda": "it needs the activations of the training data",
    "lora_ga": "it needs gradients of the training data",
    "loftq": "it quantises the base weights itself",
}


# -- checks of options, each called where its option is given ------------------------------------------------------


def _check_type(args: "AdapterArguments") -> None:
    """Raises SciflowError for an option that the chosen type does not take."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, types in TAKEN_BY.items():
        value = getattr(args, name)
        if value and value != defaults[name] and args.adapter_type not in types:
            raise SciflowError(
                f"`{name}` {value!r} does not go with `adapter_type` {args.adapter_type!r}: it is an option of "
                f"{', '.join(types)}. Leave it out."
            )


def _check_init(args: "AdapterArguments") -> None:
    _check_type(args)
    name = _init_name(args.init_lora_weights)
    if name in _REFUSED_INITS:
        why = _REFUSED_INITS[name]
        raise SciflowError(f"`init_lora_weights` {name!r} cannot work here: {why}. Use one of {_INITS}.")
    if not re.fullmatch(r"gaussian|kaiming|orthogonal|pissa(_niter_[1-9]\d*)?|olora", name):
        raise SciflowError(f"`init_lora_weights` {name!r}: use one of {_INITS}.")
    if name.startswith(FROM_BASE) and args.adapter_type == "dora":
        raise SciflowError(
            f"`init_lora_weights` {name!r} does not go with `adapter_type` 'dora', whose magnitudes are those of the "
            "base weights. Use gaussian, kaiming or orthogonal, or train a lora."
        )


def _init_name(name: str) -> str:
    """PEFT's True, which may come out of a YAML file, is its Kaiming initialisation."""
    return "kaiming" if name.lower() in ("true", "kaiming") else name


def _check_lokr_factor(args: "AdapterArguments") -> None:
    _check_type(args)
    if args.lokr_factor < 2:
        raise SciflowError(f"`lokr_factor` {args.lokr_factor}: at least 2, or -1.")


def _check_no_adapter(args: "AdapterArguments") -> None:
    if args.adapter_path:
        raise SciflowError("`no_adapter` and `adapter_path` exclude each other.")
    if args.train_text_encoder:
        raise SciflowError("`no_adapter` and `train_text_encoder` exclude each other: text encoders train by LoRA.")


def _parse_pattern(name: str, value: Mapping[str, Any] | str | None) -> dict[str, int]:
    """`"single_transformer_blocks.*=8,ff=4"`, or the same as a mapping -> {layers: number}."""
    given = value or {}
    if isinstance(given, str):
        parts = [part.rpartition("=") for part in given.split(",") if part.strip()]
        given = {layers.strip(): number for layers, _, number in parts}
    found = {}
    for layers, number in given.items():
        if not layers or isinstance(number, bool) or not re.fullmatch(r"[1-9]\d*", str(number).strip()):
            raise SciflowError(
                f"`{name}` {value!r}: write name=number, with whole numbers of at least 1, separated by commas: "
                "'single_transformer_blocks.*=8,ff=4'."
            )
        found[str(layers)] = int(number)
    return found


@arguments
class AdapterArguments(Options):
    """The adapter: which layers get one, of which type and size. See `add_adapter`."""

    heading: ClassVar[str] = "Adapter"

    adapter_type: str = option(
        "lora",
        "Type of the adapter: lora (Hu et al. 2021), dora (Liu et al. 2024: LoRA with a trained magnitude for each "
        "row), lokr (Kronecker product; Yeh et al. 2024), loha (Hadamard product; Hyeon-Woo et al. 2022) or oft (Qiu "
        "et al. 2023: rotates blocks of inputs). Pipelines load files of the first two, PEFT those of the others.",
        choices=ADAPTER_TYPES,
        check=_check_type,
    )
    rank: int | None = option(
        None,
        "Inner dimension of the adapter; default: 16. 16-32 for subtle changes, 64-128 balanced, 256 and more for high "
        "capacity. Not for oft.",
        within="[1, inf)",
        check=_check_type,
    )
    lora_alpha: int | None = option(
        None,
        "The update is scaled by lora_alpha / rank; default: rank. Not for oft.",
        within="[1, inf)",
        advice="The scale is lora_alpha / rank.",
        check=_check_type,
    )
    lora_dropout: float = option(
        0.0,
        "Dropout on the input of a lora or dora. Equal results for any number of ranks are promised at 0 only.",
        within="[0, 1)",
        check=_check_type,
    )
    use_rslora: bool = option(
        False, "Scale by lora_alpha / sqrt(rank) (Kalajdzievski 2023); lora and dora only.", check=_check_type
    )
    init_lora_weights: str = option(
        "gaussian",
        "How a lora or dora starts: gaussian; kaiming (PEFT's own default); orthogonal; or from the base weights: "
        "pissa (singular vectors; slow for wide layers), pissa_niter_N (the same by N iterations, such as 4; fast) or "
        "olora (QR). The saved file of the last three has twice the rank.",
        check=_check_init,
    )
    rank_pattern: dict[str, Any] | str | None = option(
        None,
        "Ranks of single layers: 'single_transformer_blocks.*=8,ff=4', or a mapping in YAML. A name stands for one or "
        "more complete parts of a layer's path; of several that match, the last one counts. Without --lora_alpha the "
        "alpha of a layer is its rank; a given --lora_alpha holds for all layers.",
        check=_check_type,
    )
    alpha_pattern: dict[str, Any] | str | None = option(
        None, "Alphas of single layers, written like --rank_pattern.", check=_check_type
    )
    lokr_factor: int = option(
        -1,
        "Size of the first factor of a lokr, at least 2; -1: near the square root of each width. A second factor "
        "narrower than twice the rank is trained without decomposition.",
        check=_check_lokr_factor,
    )
    lokr_decompose_both: bool = option(False, "Low rank in both factors of a lokr.", check=_check_type)
    oft_block_size: int = option(
        32,
        "Number of inputs that an oft rotates together; must divide the width of every layer.",
        within="[2, inf)",
        check=_check_type,
    )
    lora_layers: str = option(
        "full",
        "Layers that get an adapter: a preset of the family (attention, standard, full) or a comma-separated list of "
        "layer names, each matching the end of a layer's path.",
    )
    adapter_path: str | None = option(
        None,
        "Adapter to continue from: file, folder, Hub repository or fsspec URL. Its type, rank, alpha and layers are "
        "used.",
    )
    no_adapter: bool = option(False, "Train the complete network, without an adapter.", check=_check_no_adapter)
    train_text_encoder: bool = option(
        False,
        "Also train a LoRA of the text encoders (the CLIP encoders of sdxl, sd3 and flux), with the same rank and "
        "alpha; needs --text_encoding online.",
    )
    text_encoder_layers: str = option(
        "q_proj,k_proj,v_proj,out_proj", "Comma-separated layers of a text encoder that get one."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha_is_rank = self.lora_alpha is None
        if self.adapter_type != "oft":
            self.rank = 16 if self.rank is None else self.rank
            self.lora_alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        self.init_lora_weights = _init_name(self.init_lora_weights)
        self.rank_pattern = _parse_pattern("rank_pattern", self.rank_pattern)
        self.alpha_pattern = _parse_pattern("alpha_pattern", self.alpha_pattern)


# -- PEFT's configuration -------------------------------------------------------------------------------------------


def adapter_config(args: AdapterArguments, model: torch.nn.Module, layers: list[str]) -> Any:
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
    ranks = dict.fromkeys(layers, rank) | _match_pattern("rank_pattern", args.rank_pattern, layers)
    alphas = ranks if args.alpha_is_rank else dict.fromkeys(layers, alpha)
    alphas = alphas | _match_pattern("alpha_pattern", args.alpha_pattern, layers)
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
    if args.init_lora_weights not in RANDOM:
        _check_kernels(f"`init_lora_weights` {args.init_lora_weights!r}", modules)
    return LoraConfig(
        lora_alpha=alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.adapter_type == "dora",
        use_rslora=args.use_rslora,
        init_lora_weights="gaussian" if args.init_lora_weights == "gaussian" else True,
        **options,
    )


def _match_pattern(name: str, value: Mapping[str, Any] | str | None, paths: list[str]) -> dict[str, int]:
    """{layer's path: number} of the layers that have a name as complete parts of their path; the last name counts."""
    found: dict[str, int] = {}
    for layers, number in _parse_pattern(name, value).items():
        matched = [path for path in paths if fnmatch.fnmatchcase(f".{path}.", f"*.{layers}.*")]
        if not matched:
            parts = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
            close = difflib.get_close_matches(layers, parts, n=3, cutoff=0.3) or parts[:8]
            raise SciflowError(
                f"`{name}` {layers!r} matches no layer with an adapter. Parts of their names: {', '.join(close)}."
            )
        found |= dict.fromkeys(matched, number)
    return found


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
    """Refuses convolutions; with `larger_than` 1 allows those of 1 x 1.

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
