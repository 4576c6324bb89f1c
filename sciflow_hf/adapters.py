"""LoRA and DoRA by PEFT: which layers, added in float32. Their files: `adapter_files`."""

import difflib
import fnmatch
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .errors import SciflowError

if TYPE_CHECKING:
    from .families.base import ModelFamily

logger = logging.getLogger(__name__)

ADAPTER_TYPES = ("lora", "dora")
ADAPTER_NAME = "default"


@dataclass
class AdapterArguments:
    """What is trained.

    Args:
        adapter_type: `lora` (Hu et al. 2021) or `dora` (Liu et al. 2024).
        rank: inner dimension. 16-32 for subtle changes, 64-128 balanced, 256 and more for high capacity.
        lora_alpha: the update is scaled by lora_alpha / rank; equal to `rank` when not given.
        lora_dropout: on the input of the adapter. Equal results over ranks are promised at 0 only.
        lora_layers: a preset of the family (`attention`, `standard`, `full`) or a comma list of layer names,
            each matching the end of a layer's path.
        adapter_path: LoRA to go on from: file, folder, Hub repository, or any fsspec URL. Its rank, alpha and
            layers then count.
        no_adapter: train the whole network.
    """

    adapter_type: str = field(default="lora", metadata={"help": f"One of {', '.join(ADAPTER_TYPES)}."})
    rank: int = field(default=16, metadata={"help": "Inner dimension of the adapter."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale is lora_alpha / rank; default: rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_layers: str = field(
        default="full", metadata={"help": "attention, standard, full, or a comma list of layer names."}
    )
    adapter_path: str | None = field(
        default=None, metadata={"help": "LoRA to go on from: file, folder, Hub repository or fsspec URL."}
    )
    no_adapter: bool = field(default=False, metadata={"help": "Train the whole network, without adapter."})

    def __post_init__(self) -> None:
        if self.adapter_type not in ADAPTER_TYPES:
            allowed = ", ".join(ADAPTER_TYPES)
            raise SciflowError(f"`adapter_type` {self.adapter_type!r}: use one of {allowed}.")
        if self.rank < 1:
            raise SciflowError(f"`rank` {self.rank}: at least 1.")
        if self.lora_alpha is None:
            self.lora_alpha = self.rank
        if self.lora_alpha < 1:
            raise SciflowError(f"`lora_alpha` {self.lora_alpha}: at least 1; the scale is lora_alpha / rank.")
        if not 0 <= self.lora_dropout < 1:
            raise SciflowError(f"`lora_dropout` {self.lora_dropout}: in [0, 1).")
        if self.no_adapter and self.adapter_path:
            raise SciflowError("`no_adapter` and `adapter_path` exclude each other.")


def add_adapter(model: Any, args: AdapterArguments, *, family: "ModelFamily", seed: int = 42) -> Any:
    """Freezes `model` and adds the adapter in place; with `no_adapter` leaves everything trainable.

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if args.adapter_path:
            from .adapter_files import load_from

            load_from(args.adapter_path, model, family)
        else:
            from peft import LoraConfig

            idle = _inside(family.idle_layers(model))
            config = LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                use_dora=args.adapter_type == "dora",
                init_lora_weights="gaussian",
                target_modules=[
                    name
                    for name in match_layers(model, args.lora_layers, family.lora_presets)
                    if not f"{name}.".startswith(idle)
                ],
            )
            model.add_adapter(config, adapter_name=ADAPTER_NAME)
    to_float32(model)
    _freeze_idle(model, family)
    facts = adapter_facts(model) or {}
    logger.info(
        "%s on %d layers: rank %s, alpha %s, %s trained parameters (float32).",
        facts["type"], facts["matched"], facts["rank"], facts["alpha"], f"{facts['trainable_parameters']:,}",
    )  # fmt: skip
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


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by full name."""
    found = {}
    for path, layer in adapter_layers(model).items():
        for name, parameter in layer.named_parameters():
            if name.split(".")[0] in layer.adapter_layer_names:
                found[f"{path}.{name}"] = parameter
    return found


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """Type, rank, alpha, layers and size of the adapter, for logs and resume checks; None without one."""
    layers = adapter_layers(model)
    if not layers:
        return None
    config = model.peft_config[ADAPTER_NAME]
    return {
        "type": "dora" if config.use_dora else "lora",
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "layers": sorted({re.sub(r"\.\d+\.", ".*.", name) for name in layers}),
        "matched": len(layers),
        "trainable_parameters": sum(p.numel() for p in adapter_parameters(model).values()),
    }


@contextmanager
def adapter_disabled(model: torch.nn.Module) -> Iterator[None]:
    """The base model for a while: adapters switched off, then on again."""
    layers = adapter_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def to_float32(model: torch.nn.Module) -> None:
    """What an adapter trains is float32, whatever it was loaded or made as."""
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
