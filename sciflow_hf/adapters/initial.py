"""Initial weights of a LoRA beyond random ones: PiSSA, OLoRA, orthogonal. The base weights are not changed."""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

FROM_BASE = ("pissa", "olora")
"""Beginnings of the values of `init_lora_weights` that start from the base weights."""
INITIAL = "initial"
"""Name of the frozen adapter (A0, -B0) that subtracts the initial update of PiSSA and OLoRA."""


def initialise(network: Any, name: str, kind: str) -> None:
    """Initial weights of the adapter `name`, by PEFT: `orthogonal`, `pissa`, `pissa_niter_N` or `olora`.

    PiSSA (Meng et al. 2024: principal singular vectors) and OLoRA (Büyükakyüz 2024: QR decomposition) start with a part
    s B0 A0 of the base weight W, which PEFT then subtracts from W. Here W stays, and a second, frozen adapter subtracts
    it: W + s (B A - B0 A0). So no weight of the base is rounded, quantised ones can be used, the network without
    adapter is the base, and both adapters together are a plain LoRA of twice the rank (`as_plain_lora`).
    """
    layers = [module for module in network.modules() if name in getattr(module, "lora_A", {})]
    for layer in layers:
        base, layer.base_layer = layer.base_layer, _in_float32(layer.base_layer)
        try:
            if kind == "olora":
                layer.olora_init(name)
            elif kind == "orthogonal":
                layer.orthogonal_init(name)
            else:
                layer.pissa_init(name, kind)
        finally:
            layer.base_layer = base
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[name].to(base.weight.device)
    if kind.startswith(FROM_BASE):
        config = copy.deepcopy(network.peft_config[name])
        config.lora_dropout = 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            network.add_adapter(config, adapter_name=INITIAL)
        network.set_adapter([name, INITIAL])
        for layer in layers:
            for matrices, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
                frozen = sign * matrices[name].weight.detach()
                matrices[INITIAL].weight = torch.nn.Parameter(frozen, requires_grad=False)
    network.peft_config[name].init_lora_weights = kind


def _in_float32(layer: torch.nn.Module) -> torch.nn.Linear:
    """A linear layer with a copy of the weights, dequantised."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(copy.deepcopy(layer)).detach().to(torch.float32, copy=True)
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made


def as_plain_lora(
    network: Any, state: Mapping[str, torch.Tensor], options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The trained adapter and the `INITIAL` one as a single LoRA: [B, -B0] [A; A0] of rank 2r, at the same scale.

    Args:
        state: PEFT's state dict of the trained adapter.
        options: its configuration, which is changed.
    """
    from peft.utils import get_peft_model_state_dict

    frozen = get_peft_model_state_dict(network, adapter_name=INITIAL)
    scale = math.sqrt(2) if options["use_rslora"] else 2
    for option, pattern, factor in (("r", "rank_pattern", 2), ("lora_alpha", "alpha_pattern", scale)):
        options[option] *= factor
        options[pattern] = {path: value * factor for path, value in options[pattern].items()}
    return {key: torch.cat([value, frozen[key]], _rank_dim(key)) for key, value in state.items()}, options


def split_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Undoes `as_plain_lora`: the trained half and the `INITIAL` one."""
    halves = {key: value.tensor_split(2, _rank_dim(key)) for key, value in state.items()}
    return {key: half[0] for key, half in halves.items()}, {key: half[1] for key, half in halves.items()}


def _rank_dim(key: str) -> int:
    return 0 if ".lora_A." in key else 1
