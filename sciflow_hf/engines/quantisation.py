"""A frozen base in 8 or 4 bits, by bitsandbytes or torchao, loaded with diffusers' own configurations of them."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate import PartialState

from ..errors import SciflowError
from ..options import arguments, option
from .checkpointing import share_of

QUANTIZATIONS = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "torchao_int8": "torchao", "torchao_fp8": "torchao"}
"""Values of `--quantize_base`, and the package of each."""
BLOCK = 64
"""Weights that share a scale in nf4, consecutive in a row."""


def check_quantization(kind: str) -> None:
    """Raises SciflowError for an unknown value of `--quantize_base`, a missing package, or a device without it."""
    if kind not in QUANTIZATIONS:
        raise SciflowError(f"`quantize_base` {kind!r}: use one of {', '.join(QUANTIZATIONS)}, or leave it out.")
    package = QUANTIZATIONS[kind]
    if importlib.util.find_spec(package) is None:
        raise SciflowError(f"`quantize_base` {kind!r} needs {package}: `pip install {package}`, or leave it out.")
    device = PartialState().device
    if device.type not in ("cuda", "xpu", "cpu"):
        raise SciflowError(
            f"`quantize_base` {kind!r} cannot work on {device.type!r}: {package} computes on GPUs of NVIDIA, AMD and "
            "Intel, and on CPUs. Leave it out."
        )


def check(args: Any) -> None:
    """Raises SciflowError for options that `--quantize_base` cannot work with, or not save anything with."""
    check_quantization(args.quantize_base)
    for name in ("fsdp", "deepspeed", "torch_compile"):
        value = getattr(args, name)
        if value:
            raise SciflowError(
                f"`quantize_base` {args.quantize_base!r} cannot work with `{name}` {value!r}: leave one of the two out."
            )
    if args.quantize_base.startswith("torchao") and share_of(args) < 1:
        raise SciflowError(
            f"`quantize_base` {args.quantize_base!r} saves nothing without `--activation_checkpointing` of all blocks: "
            "torchao unpacks the weights of every layer, and those of other blocks would stay for the backward pass. "
            "Add it, or take int8 or nf4."
        )


@arguments
class QuantisationArguments:
    """How the frozen weights are stored."""

    heading: ClassVar[str] = "Quantisation"

    quantize_base: str | None = option(
        None,
        "Keep the frozen network in 8 or 4 bits (see `load_quantized`); in the dtype that it computes in when not "
        "given.",
        choices=tuple(QUANTIZATIONS),
        advice="Leave it out for no quantisation.",
        check=check,
    )


def load_quantized(load: Callable[..., Any], kind: str, *, empty: torch.nn.Module, dtype: torch.dtype) -> Any:
    """A network of diffusers with the weights of its linear layers packed; bitsandbytes': on this process's device.

    As diffusers does, all linear layers are packed, those in and out of the network included; norms, biases, position
    tables and convolutions stay in `dtype`, and so does what the network's class keeps in float32.

    - `int8`: LLM.int8() (Dettmers et al. 2022), a scale per row; features above 6 are multiplied in 16 bits.
    - `nf4`: QLoRA's 4-bit normal float (Dettmers et al. 2023) with double quantisation, 4.13 bits a weight. Layers
      whose width is no multiple of 64 stay as they are.
    - `torchao_int8`, `torchao_fp8` (e4m3): a scale per row; multiplied in `dtype`.

    Args:
        load: `from_pretrained` with the path; takes `quantization_config`.
        empty: the same network without weights.
        dtype: what is computed in.
    """
    on_cpu = PartialState().device.type == "cpu"
    with _bitsandbytes_on_cpu() if on_cpu and QUANTIZATIONS[kind] == "bitsandbytes" else nullcontext():
        network = load(quantization_config=_configuration(kind, empty, dtype))
    if kind == "int8":  # it says once a layer and step that activations are rounded by way of float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if on_cpu and kind == "nf4":
        for layer in _linear(network).values():  # or an evaluation would pack them once more, with rounded scales
            layer.support_avx512bf16_for_cpu = False
    return network


def _configuration(kind: str, empty: torch.nn.Module, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[path for path, layer in _linear(empty).items() if not _is_packed(layer, kind)],
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao_int8" else Float8WeightOnlyConfig())


@contextmanager
def _bitsandbytes_on_cpu() -> Iterator[None]:
    """diffusers 0.42 asks for a GPU, which bitsandbytes 0.50 itself does not need."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    kinds: tuple[Any, ...] = (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer)
    stock = [(kind.validate_environment, kind.update_device_map) for kind in kinds]
    for kind in kinds:
        kind.validate_environment = lambda self, *args, **kwargs: None
        kind.update_device_map = lambda self, device_map: {"": "cpu"}
    try:
        yield
    finally:
        for kind, (validate_environment, update_device_map) in zip(kinds, stock, strict=True):
            kind.validate_environment, kind.update_device_map = validate_environment, update_device_map


def _linear(network: torch.nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}


def _is_packed(layer: torch.nn.Linear, kind: str) -> bool:
    """bitsandbytes on a CPU (0.50) reads nf4 wrongly where a block of weights goes over the end of a row."""
    return kind != "nf4" or layer.in_features % BLOCK == 0


def check_loaded(network: torch.nn.Module, kind: str | None) -> None:
    """Raises SciflowError where `--quantize_base` was given and nobody passed it to `load_model`."""
    if kind is not None and not getattr(network, "is_quantized", False):
        raise SciflowError(
            f"`quantize_base` {kind!r}, but the network was not loaded so: `family.load_model(dtype=..., "
            "quantize=args.quantize_base)`. One that is trained from random weights has no base to pack: leave it out."
        )


def keep_from_broadcast(model: torch.nn.Module) -> None:
    """DistributedDataParallel starts by sending weights around. torchao's cannot be sent; each rank has loaded them."""
    packed = [name for name, p in model.named_parameters() if type(p).__module__.startswith("torchao")]
    if packed:
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, packed)


def saved_bytes(network: torch.nn.Module, kind: str) -> float:
    """Bytes that the frozen weights of a network would save if `kind` packed them; for estimates."""
    total = 0.0
    for layer in _linear(network).values():
        if not layer.weight.requires_grad and _is_packed(layer, kind):
            # nf4: half a byte, one for the scale of 64, four for the scale of 256 scales
            packed = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256) if kind == "nf4" else 1 + 4 / layer.in_features
            total += layer.weight.numel() * (layer.weight.element_size() - packed)
    return total
