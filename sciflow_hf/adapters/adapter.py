"""Adapters added to a network, and to text encoders, in place: which layers get one, and how it starts."""

import dataclasses
import difflib
import fnmatch
import logging
import re
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import SciflowError
from ..families.base import ModelFamily, PipelineFamily, network_dtype
from .arguments import PIPELINE_TYPES, RANDOM, AdapterArguments, adapter_config
from .files import fill_text_encoder, load_from
from .initial import initialise
from .layers import ADAPTER_NAME, adapter_facts, title, to_float32
from .text_encoders import NetworkWithText

logger = logging.getLogger(__name__)


def add_adapter(model: Any, args: AdapterArguments, *, family: ModelFamily, seed: int = 42, quiet: bool = False) -> Any:
    """Freezes `model`, adds the adapter in place and returns it; with `no_adapter` leaves everything trainable.

    Adapter weights are float32 whatever the dtype of the base: in bfloat16 an AdamW step of 1e-4 rounds to zero.

    Args:
        model: the network, of `family.load_model`.
        args: type, rank, layers, and where to continue from.
        family: its layer presets, and how its adapters are read.
        seed: seed of the adapter's initial weights; torch's generator keeps its state.
        quiet: does not log what is trained.

    Returns:
        `model`; with `train_text_encoder` a `NetworkWithText`, the network and the text encoders.

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
            saved = load_from(args.adapter_path, model, family)
        else:
            _add_new(model, args, family)
        to_float32(model)
        _freeze_idle(model, family)
        if args.train_text_encoder:
            model = with_text_adapters(model, args, family=family, saved=saved)
        elif saved is not None and any(key.startswith("text_encoder") for key in saved[0]):
            logger.warning(
                "`adapter_path` %r holds an adapter of the text encoder too, which is left out: the text here is that "
                "of the original encoders. `--train_text_encoder` loads it.",
                args.adapter_path,
            )
    if not quiet:
        logger.info("Training %s.", title(adapter_facts(model) or {}))
    return model


def _add_new(model: Any, args: AdapterArguments, family: ModelFamily) -> None:
    idle = _inside(family.idle_layers(model))
    matched = match_layers(model, args.lora_layers, family.lora_presets)
    layers = [name for name in matched if not f"{name}.".startswith(idle)]
    if not layers:
        raise SciflowError(f"`lora_layers` {args.lora_layers!r}: nothing reads what {matched[0]} gives here.")
    model.add_adapter(adapter_config(args, model, layers), adapter_name=ADAPTER_NAME)
    if args.init_lora_weights not in RANDOM:
        initialise(model, ADAPTER_NAME, args.init_lora_weights)


def _inside(layers: tuple[str, ...]) -> tuple[str, ...]:
    """How the paths of these layers' parameters begin."""
    return tuple(f"{layer}." for layer in layers)


def _freeze_idle(model: torch.nn.Module, family: ModelFamily) -> None:
    """A trained parameter without a gradient is an error in DistributedDataParallel."""
    idle = _inside(family.idle_layers(model))
    for name, parameter in model.named_parameters():
        if name.startswith(idle):
            parameter.requires_grad_(False)


def match_layers(model: torch.nn.Module, layers: str, presets: dict[str, str]) -> list[str]:
    """Full paths of the linear and convolution layers whose path ends in one of the names.

    Args:
        layers: a preset's name or comma-separated names; `*` matches anything. `attn.to_out` means linear layers, so
            on FLUX.2 it finds the single blocks', not the ModuleList of the double blocks.
    """
    if layers in ("attention", "standard", "full") and layers not in presets:
        raise SciflowError(
            f"`lora_layers` {layers!r}: this family has no preset of that name"
            + (", but " + ", ".join(presets) if presets else "")
            + ". Or write comma-separated layer names, such as 'to_q,to_k,to_v'; `*` stands for anything."
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


# -- text encoders -------------------------------------------------------------------------------------------------


def with_text_adapters(
    network: torch.nn.Module, args: AdapterArguments, *, family: ModelFamily, saved: Any = None
) -> NetworkWithText:
    """`network` and the family's text encoders, frozen except for new adapters in `args.text_encoder_layers`.

    Args:
        saved: (state dict, options) of a LoRA file, as `load_from` returns them: a text encoder's adapter in it is
            loaded instead of making a new one.

    Raises:
        SciflowError: the pipeline cannot load such adapters, or no layer matches.
    """
    if not isinstance(family, PipelineFamily) or not family.trained_text_parts:
        raise SciflowError(
            f"`train_text_encoder`: the pipeline of `{family.name}` cannot load a LoRA of its text encoder. Leave it "
            "out."
        )
    if args.adapter_type not in PIPELINE_TYPES:
        raise SciflowError(
            f"`train_text_encoder` with `adapter_type` {args.adapter_type!r}: pipelines load lora and dora of text "
            "encoders. Take one of them, or leave the text encoders as they are."
        )
    # Patterns name layers of the network, and the other initialisations would need a second adapter.
    alike = dataclasses.replace(args, rank_pattern=None, alpha_pattern=None, init_lora_weights="gaussian")
    state, options = saved or ({}, {})
    on_meta = next(network.parameters()).is_meta
    encoders = (
        _without_weights(family) if on_meta else family.load_text_encoder(device="cpu", dtype=network_dtype(network))
    )
    for name in family.trained_text_parts:
        encoder = getattr(encoders, name).requires_grad_(False)
        if any(key.startswith(f"{name}.") for key in state):
            family.pipeline_class().load_lora_into_text_encoder(
                dict(state),
                text_encoder=encoder,
                prefix=name,
                adapter_name=ADAPTER_NAME,
                **{"network_alphas": None, **options},
            )
            to_float32(encoder)
            fill_text_encoder(encoder, name, state)  # again: into a 16-bit base they were loaded rounded
            continue
        layers = _text_layers(encoder, args.text_encoder_layers, family.idle_text_layers.get(name, 0))
        encoder.add_adapter(adapter_config(alike, encoder, layers), adapter_name=ADAPTER_NAME)
        to_float32(encoder)
    return NetworkWithText(network, family, encoders)


def _without_weights(family: PipelineFamily) -> Any:
    """The trained text encoders on the meta device, for `--dry_run`."""
    made = {name: family.empty_part(name) for name in family.trained_text_parts}
    return SimpleNamespace(**made, components=made)


def _text_layers(encoder: Any, layers: str, idle: int) -> list[str]:
    """Paths of the linear layers with these names, without those in the last `idle` blocks."""
    names = [name.strip() for name in layers.split(",") if name.strip()]
    linear = [path for path, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)]
    depth = encoder.config.num_hidden_layers
    unread = tuple(f"encoder.layers.{depth - 1 - i}." for i in range(idle))
    found = [
        path
        for path in linear
        if path.rpartition(".")[2] in names and not path.removeprefix("text_model.").startswith(unread)
    ]
    if not found:
        there = sorted({path.rpartition(".")[2] for path in linear})
        raise SciflowError(f"`text_encoder_layers` {layers!r} matches no layer. There are {', '.join(there)}.")
    return found
