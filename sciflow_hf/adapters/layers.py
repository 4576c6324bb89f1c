"""Adapter layers in a network, by PEFT: found, filled, switched off for a while, and described for logs."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .arguments import PIPELINE_TYPES, TAKEN_BY
from .text_encoders import NetworkWithText

ADAPTER_NAME = "default"


def network_of(model: torch.nn.Module) -> Any:
    """The network itself, without the text encoders that are trained with it."""
    return model.network if isinstance(model, NetworkWithText) else model


def trained_parts(model: torch.nn.Module, family: Any) -> dict[str, Any]:
    """Name in the pipeline -> module that may hold an adapter: the network, then trained text encoders."""
    if not isinstance(model, NetworkWithText):
        return {family.component: model}
    return {name: model.get_submodule(name) for name in (family.component, *family.trained_text_parts)}


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


def to_float32(model: torch.nn.Module) -> None:
    """Makes the adapter's parameters trainable and float32, whatever they were loaded or made as."""
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()


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


# -- descriptions for logs, resume checks and the model card -------------------------------------------------------


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """Type, options, layers and size of the adapter; None without one."""
    layers = adapter_layers(model)
    if not layers:
        return None
    return {
        **_config_facts(network_of(model).peft_config[ADAPTER_NAME], layers, ADAPTER_NAME),
        "layers": sorted({_without_numbers(name) for name in layers}),
        "matched": len(layers),
        "trainable_parameters": sum(p.numel() for p in adapter_parameters(model).values()),
    }


def type_of(config: Any) -> str:
    """`adapter_type` of a PEFT configuration."""
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return "dora" if kind == "lora" and config.use_dora else kind


def _config_facts(config: Any, layers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Type and options of the adapter `name` in these layers of PEFT; options at their default are left out."""
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


def _without_numbers(path: str) -> str:
    """`transformer_blocks.3.attn.to_q` -> `transformer_blocks.*.attn.to_q`."""
    return re.sub(r"\.\d+\.", ".*.", path)


def _by_layer(values: Mapping[str, int], usual: int) -> dict[str, int]:
    """Values that differ from `usual`; one entry for the layers of all blocks where they agree."""
    seen: dict[str, set[int]] = defaultdict(set)
    for path, value in values.items():
        seen[_without_numbers(path)].add(value)
    return {
        _without_numbers(path) if len(seen[_without_numbers(path)]) == 1 else path: value
        for path, value in values.items()
        if value != usual
    }


def title(facts: Mapping[str, Any]) -> str:
    """`lora rank 16 alpha 8 on 32 layers, 4,096 parameters`."""
    kind = f"{facts['type']} rank {facts['rank']} alpha {facts['alpha']}" if "rank" in facts else facts["type"]
    options = (option for option in (*TAKEN_BY, "init") if option in facts and option != "rank")
    kind += "".join(f", {option} {option_text(facts[option])}" for option in options)
    layers = f"{facts['matched']} layer{'s' * (facts['matched'] != 1)}"
    return f"{kind} on {layers}, {facts['trainable_parameters']:,} parameters in float32"


def option_text(value: Any) -> str:
    """The value of an option in words; a pattern as it is written on the command line."""
    return ",".join(f"{name}={number}" for name, number in value.items()) if isinstance(value, dict) else str(value)
