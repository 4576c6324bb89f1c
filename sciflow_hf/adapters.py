"""LoRA and DoRA by PEFT: which layers, added in float32, saved and loaded as diffusers files."""

import difflib
import fnmatch
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import SciflowError

if TYPE_CHECKING:
    from .families.base import ModelFamily

logger = logging.getLogger(__name__)

ADAPTER_TYPES = ("lora", "dora")
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "default"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)")  # user/repository


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
            _load_from(args.adapter_path, model, family)
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
    _to_float32(model)
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


def save_adapter(model: Any, folder: str | os.PathLike, *, family: "ModelFamily") -> Path:
    """Writes `pytorch_lora_weights.safetensors` as the family's pipeline does, alpha in it; whole or not."""
    from peft.utils import get_peft_model_state_dict

    options = model.peft_config[ADAPTER_NAME].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    if family.component == "unet":  # the names that LoRA files of UNets have had since before PEFT
        state = {k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for k, v in state.items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    target = Path(folder) / WEIGHT_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        family.pipeline_class().save_lora_weights(
            temporary,
            **{
                f"{family.component}_lora_layers": state,
                f"{family.component}_lora_adapter_metadata": config,
            },
        )
        os.replace(Path(temporary) / WEIGHT_NAME, target)
    return target


def load_adapter_weights(model: torch.nn.Module, folder: str | os.PathLike, *, family: "ModelFamily") -> None:
    """Puts the saved weights into the adapter that `model` already has, bit for bit."""
    state, _ = _read(str(Path(folder) / WEIGHT_NAME), model, family)
    try:
        _put(model, state, family)
    except (ValueError, RuntimeError) as error:
        raise SciflowError(
            f"{folder}: its adapter does not fit this one: {_brief(error)}. Resume with the same adapter "
            "options, or start a new run from it with `--adapter_path`."
        ) from error


def _put(model: torch.nn.Module, state: dict[str, torch.Tensor], family: "ModelFamily") -> None:
    """Fills the adapter of `model`; ValueError where a tensor is left over or left out."""
    from peft.utils import set_peft_model_state_dict

    prefix = family.component + "."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    result = set_peft_model_state_dict(model, own, adapter_name=ADAPTER_NAME)
    missing = [key for key in result.missing_keys if "lora_" in key]
    for what, keys in (("the network has no layer for", result.unexpected_keys), ("the file lacks", missing)):
        if keys:
            raise ValueError(f"{what} {len(keys)} of its tensors, such as {keys[0]}")


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _read(path: str, model: Any, family: "ModelFamily") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict in PEFT's names, and what `load_lora_adapter` needs beside it: metadata, or alphas by layer.

    Takes any layout that the family's pipeline reads; safetensors only.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    unet = {"unet_config": model.config} if family.component == "unet" else {}  # for the block numbers of kohya's files
    try:
        state, *alphas, metadata = family.pipeline_class().lora_state_dict(
            path, use_safetensors=True, return_lora_metadata=True, **unet
        )
        if unet:
            state = convert_unet_state_dict_to_peft(state)
        return state, {"metadata": metadata or None, "network_alphas": alphas[0] if alphas and not metadata else None}
    except Exception as error:  # the Hub's HTTP client has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SciflowError(
            f"`adapter_path` {path!r} cannot be read ({reason}). It is a safetensors file, a folder with "
            f"{WEIGHT_NAME}, a Hub repository, or an fsspec URL of a file."
        ) from error


def _load_from(path: str, model: Any, family: "ModelFamily") -> None:
    """Adds the adapter of an existing LoRA file, its rank, alpha and layers included."""
    if Path(path).suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise SciflowError(f"`adapter_path` {path!r}: a pickle can run code, so only safetensors are loaded.")
    with tempfile.TemporaryDirectory() as temporary:
        local = os.path.expanduser(path)
        if "://" in path:
            import fsspec

            local = str(Path(temporary) / WEIGHT_NAME)
            try:
                with fsspec.open(path, "rb") as source:
                    Path(local).write_bytes(source.read())
            except (OSError, ValueError, ImportError) as error:
                raise SciflowError(f"`adapter_path` {path!r} cannot be read: {_brief(error)}") from error
        elif not os.path.exists(local) and not _HUB_NAME.fullmatch(path):
            raise SciflowError(f"`adapter_path` {path!r}: there is no such file, folder or Hub repository.")
        state, options = _read(local, model, family)
    with warnings.catch_warnings():
        # Without weights (`--dry_run`) torch warns of every tensor that there is nothing to copy to.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        try:
            model.load_lora_adapter(dict(state), prefix=family.component, adapter_name=ADAPTER_NAME, **options)
            if adapter_layers(model):
                _to_float32(model)
                _put(model, state, family)  # again: into a 16-bit base PEFT loads the weights rounded
        except (ValueError, RuntimeError, KeyError) as error:
            reason = _brief(error)
            raise SciflowError(f"`adapter_path` {path!r} does not fit this network: {reason}") from error
    if not adapter_layers(model):
        raise SciflowError(f"`adapter_path` {path!r} holds no layer of this network (`{family.name}`).")


def _to_float32(model: torch.nn.Module) -> None:
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
