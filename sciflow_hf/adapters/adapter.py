"""Adapters by PEFT: which layers, added in float32. Types: `adapter_types`; files: `adapter_files`."""

import difflib
import fnmatch
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError
from .initial import initialise
from .types import (
    ADAPTER_TYPES,
    adapter_config,
    check_options,
    checked_init,
    config_facts,
    parse_pattern,
    title,
    without_numbers,
)

if TYPE_CHECKING:
    from ..families.base import ModelFamily

logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"


@dataclass
class AdapterArguments:
    """What is trained.

    Args:
        adapter_type: `lora` (Hu et al. 2021), `dora` (Liu et al. 2024: LoRA with a magnitude of its own), `lokr`
            (Kronecker product; Yeh et al. 2024), `loha` (Hadamard product; Hyeon-Woo et al. 2022) or `oft` (Qiu et
            al. 2023: blocks of inputs are rotated). Pipelines load files of the first two; for the others PEFT does.
        rank: inner dimension, 16 when not given. 16-32 for subtle changes, 64-128 balanced, 256 and more for high
            capacity. Not for `oft`.
        lora_alpha: the update is scaled by lora_alpha / rank; equal to `rank` when not given. Not for `oft`.
        lora_dropout: on the input of a `lora` or `dora`. Equal results over ranks are promised at 0 only.
        use_rslora: scale by lora_alpha / sqrt(rank) (Kalajdzievski 2023).
        init_lora_weights: `gaussian`; `kaiming` (PEFT's own default); `orthogonal`; or out of the base weights: `pissa`
            (singular vectors; slow for wide layers), `pissa_niter_N` (the same by N iterations, fast), `olora` (QR).
            The saved file of the last three has twice the rank.
        rank_pattern: ranks of single layers, as "ff=4,single_transformer_blocks.*=8", or a mapping in YAML. A name
            stands for one or more whole parts of a layer's path; of two that match the last one counts. Without
            `lora_alpha` the alpha of a layer is its rank; a given `lora_alpha` holds for all.
        alpha_pattern: the same for alpha.
        lokr_factor: size of the first factor of `lokr`; -1 takes the one nearest to the square root of each width. A
            second factor narrower than twice the rank is trained whole.
        lokr_decompose_both: `lokr` with low rank in the first factor, too.
        oft_block_size: inputs that `oft` rotates together; must divide the width of every layer.
        lora_layers: a preset of the family (`attention`, `standard`, `full`) or a comma list of layer names,
            each matching the end of a layer's path.
        adapter_path: LoRA to go on from: file, folder, Hub repository, or any fsspec URL. Its rank, alpha and
            layers then count.
        no_adapter: train the whole network.
        train_text_encoder: LoRA for the text encoders, too (sdxl, sd3, flux: CLIP), of the same rank and alpha; needs
            `--text_encoding online`.
        text_encoder_layers: comma list of the layers of a text encoder that get one.
    """

    adapter_type: str = field(default="lora", metadata={"help": f"One of {', '.join(ADAPTER_TYPES)}."})
    rank: int | None = field(default=None, metadata={"help": "Inner dimension of the adapter; 16 when not given."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale is lora_alpha / rank; default: rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(rank)."})
    init_lora_weights: str = field(
        default="gaussian",
        metadata={"help": "gaussian, kaiming, orthogonal, pissa, pissa_niter_N (N iterations, such as 4), or olora."},
    )
    rank_pattern: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Ranks of single layers: 'single_transformer_blocks.*=8,ff=4'."}
    )
    alpha_pattern: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Alphas of single layers, written like --rank_pattern."}
    )
    lokr_factor: int = field(
        default=-1, metadata={"help": "Size of the first factor of lokr; -1: near the square root of each width."}
    )
    lokr_decompose_both: bool = field(default=False, metadata={"help": "Low rank in both factors of lokr."})
    oft_block_size: int = field(default=32, metadata={"help": "Inputs that oft rotates together."})
    lora_layers: str = field(
        default="full", metadata={"help": "attention, standard, full, or a comma list of layer names."}
    )
    adapter_path: str | None = field(
        default=None, metadata={"help": "LoRA to go on from: file, folder, Hub repository or fsspec URL."}
    )
    no_adapter: bool = field(default=False, metadata={"help": "Train the whole network, without adapter."})
    train_text_encoder: bool = field(
        default=False, metadata={"help": "LoRA for the text encoders, too; needs --text_encoding online."}
    )
    text_encoder_layers: str = field(
        default="q_proj,k_proj,v_proj,out_proj", metadata={"help": "Comma list of layers of the text encoders."}
    )

    def __post_init__(self) -> None:
        if self.adapter_type not in ADAPTER_TYPES:
            allowed = ", ".join(ADAPTER_TYPES)
            raise SciflowError(f"`adapter_type` {self.adapter_type!r}: use one of {allowed}.")
        check_options(self)
        self.alpha_is_rank = self.lora_alpha is None
        if self.adapter_type != "oft":
            self.rank = 16 if self.rank is None else self.rank
            self.lora_alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        if self.rank is not None and self.rank < 1:
            raise SciflowError(f"`rank` {self.rank}: at least 1.")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise SciflowError(f"`lora_alpha` {self.lora_alpha}: at least 1; the scale is lora_alpha / rank.")
        if not 0 <= self.lora_dropout < 1:
            raise SciflowError(f"`lora_dropout` {self.lora_dropout}: in [0, 1).")
        self.init_lora_weights = checked_init(self.init_lora_weights, self.adapter_type)
        self.rank_pattern = parse_pattern("rank_pattern", self.rank_pattern)
        self.alpha_pattern = parse_pattern("alpha_pattern", self.alpha_pattern)
        if self.lokr_factor != -1 and self.lokr_factor < 2:
            raise SciflowError(f"`lokr_factor` {self.lokr_factor}: at least 2, or -1.")
        if self.oft_block_size < 2:
            raise SciflowError(f"`oft_block_size` {self.oft_block_size}: at least 2.")
        if self.no_adapter and self.adapter_path:
            raise SciflowError("`no_adapter` and `adapter_path` exclude each other.")
        if self.no_adapter and self.train_text_encoder:
            raise SciflowError("`no_adapter` and `train_text_encoder` exclude each other: text encoders train by LoRA.")


def add_adapter(model: Any, args: AdapterArguments, *, family: "ModelFamily", seed: int = 42) -> Any:
    """Freezes `model`, adds the adapter in place and returns it; with `no_adapter` leaves everything trainable.

    With `train_text_encoder` a `NetworkWithText` is returned: the network and the text encoders.

    Adapter weights are float32 whatever the dtype of the base: in bfloat16 an AdamW step of 1e-4 rounds to
    nothing.

    Args:
        seed: of the adapter's initial weights; torch's generator is left as it was.

    Raises:
        SciflowError: no layer matches, or the file of `adapter_path` does not fit.
    """
    if args.no_adapter:
        model.requires_grad_(True)
        _freeze_idle(model, family)
        return model
    model.requires_grad_(False)
    saved: Any = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if args.adapter_path:
            from .files import load_from

            saved = load_from(args.adapter_path, model, family)
        else:
            idle = _inside(family.idle_layers(model))
            matched = match_layers(model, args.lora_layers, family.lora_presets)
            layers = [name for name in matched if not f"{name}.".startswith(idle)]
            if not layers:
                raise SciflowError(f"`lora_layers` {args.lora_layers!r}: nothing reads what {matched[0]} gives here.")
            model.add_adapter(adapter_config(args, model, layers), adapter_name=ADAPTER_NAME)
            initialise(model, ADAPTER_NAME, args.init_lora_weights)
        to_float32(model)
        _freeze_idle(model, family)
        if args.train_text_encoder:
            from .text_encoders import with_text_adapters

            model = with_text_adapters(model, args, family=family, saved=saved)
        elif saved is not None and any(key.startswith("text_encoder") for key in saved[0]):
            logger.warning(
                "`adapter_path` %r holds an adapter of the text encoder, too, which is left out: the text here is that "
                "of the encoders as they were. `--train_text_encoder` takes it along.",
                args.adapter_path,
            )
    facts = adapter_facts(model) or {}
    logger.info("Training %s.", title(facts))
    return model


def _inside(layers: tuple[str, ...]) -> tuple[str, ...]:
    """How the paths of these layers' parameters begin."""
    return tuple(f"{layer}." for layer in layers)


def _freeze_idle(model: torch.nn.Module, family: "ModelFamily") -> None:
    """A trained parameter without a gradient is an error in DistributedDataParallel."""
    idle = _inside(family.idle_layers(model))
    for name, parameter in model.named_parameters():
        if name.startswith(idle):
            parameter.requires_grad_(False)


def match_layers(model: torch.nn.Module, layers: str, presets: dict[str, str]) -> list[str]:
    """Full paths of the linear and convolution layers whose path ends in one of the names.

    Args:
        layers: a preset's name or a comma list; `*` stands for anything. `attn.to_out` means linear layers only, so
            on FLUX.2 it finds the single blocks', not the ModuleList of the double blocks.
    """
    if layers in ("attention", "standard", "full") and layers not in presets:
        raise SciflowError(
            f"`lora_layers` {layers!r}: this family has no preset of that name"
            + (", but " + ", ".join(presets) if presets else "")
            + ". Or write a comma list of layer names, such as 'to_q,to_k,to_v'; `*` stands for anything."
        )
    names = [name.strip() for name in presets.get(layers, layers).split(",") if name.strip()]
    candidates = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    found = {name: [c for c in candidates if fnmatch.fnmatchcase(f".{c}", f"*.{name}")] for name in names}
    unmatched = [name for name, paths in found.items() if not paths]
    matched = set().union(*found.values()) if found else set()
    if not matched:
        ends = sorted({re.sub(r"^.*\.(?=\D)", "", c) for c in candidates})  # `to_q`, `to_out.0`
        close = difflib.get_close_matches(names[0], ends, n=3, cutoff=0.3) if names else []
        raise SciflowError(
            f"`lora_layers` {layers!r} matches no layer. Presets: {', '.join(presets) or 'none'}; "
            f"layer names here: {', '.join(close or ends[:8])}."
        )
    if unmatched:
        logger.warning("`lora_layers`: no layer is called %s here.", ", ".join(unmatched))
    return [c for c in candidates if c in matched]


def adapter_layers(model: torch.nn.Module) -> dict[str, Any]:
    """PEFT's layers by path; empty where there is no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_parameters(model: torch.nn.Module, adapter_name: str = ADAPTER_NAME) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by full name."""
    found = {}
    for path, layer in adapter_layers(model).items():
        for name, parameter in layer.named_parameters():
            part, adapter, *_ = name.split(".")  # `lora_A.default.weight`
            if part in layer.adapter_layer_names and adapter == adapter_name:
                found[f"{path}.{name}"] = parameter
    return found


def fill_adapter(model: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str = ADAPTER_NAME) -> None:
    """Puts a state dict of PEFT into the adapter `name`; ValueError where a tensor is left over or left out."""
    from peft.utils import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, dict(state), adapter_name=name)
    missing = sorted(adapter_parameters(model, name).keys() & set(result.missing_keys))
    for what, keys in (("the network has no layer for", result.unexpected_keys), ("the file lacks", missing)):
        if keys:
            raise ValueError(f"{what} {len(keys)} of its tensors, such as {keys[0]}")


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """Type, options, layers and size of the adapter, for logs and resume checks; None without one."""
    layers = adapter_layers(model)
    if not layers:
        return None
    return {
        **config_facts(_config_of(model), layers, ADAPTER_NAME),
        "layers": sorted({without_numbers(name) for name in layers}),
        "matched": len(layers),
        "trainable_parameters": sum(p.numel() for p in adapter_parameters(model).values()),
    }


def _config_of(model: Any) -> Any:
    """PEFT's configuration of the network's adapter."""
    from .text_encoders import network_of

    return network_of(model).peft_config[ADAPTER_NAME]


@contextmanager
def adapter_disabled(model: torch.nn.Module) -> Iterator[None]:
    """The base model for a while: adapters switched off, then on again."""
    layers = adapter_layers(model).values()
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trained:  # PEFT has made every adapter trainable, frozen ones included
            parameter.requires_grad_(flag)


def to_float32(model: torch.nn.Module) -> None:
    """What an adapter trains is float32, whatever it was loaded or made as."""
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
