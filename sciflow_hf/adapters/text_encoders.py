"""Text encoders trained together with the network: one module that holds them all and has one forward."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import SciflowError
from ..families.base import ModelFamily, PipelineFamily
from ..families.loading import model_source, network_dtype
from .adapter import ADAPTER_NAME, AdapterArguments, fill_adapter, to_float32
from .types import adapter_config

CAPTIONS = "captions"


class NetworkWithText(torch.nn.Module):
    """A network and the text encoders that are trained with it, each under its name in the pipeline.

    The batch of such a run holds `captions`, a list of B strings, in place of embeddings. The family's `compute_loss`
    hands it to `forward`, where the captions are encoded with gradients: so that `compute_loss` calls one module once,
    as DistributedDataParallel and mixed precision need it.

    Args:
        network: the network, with its adapter.
        family: has `trained_text_parts`, `encode_prompts` and `text_arguments`.
        encoders: what `family.encode_prompts` takes; parts of it that are not trained (T5) stay frozen in it.
    """

    def __init__(self, network: torch.nn.Module, family: PipelineFamily, encoders: Any) -> None:
        super().__init__()
        self.add_module(family.component, network)
        for name in family.trained_text_parts:
            self.add_module(name, getattr(encoders, name))
        self.family, self.encoders = family, encoders

    @property
    def network(self) -> Any:
        """The network without the text encoders."""
        return self.get_submodule(self.family.component)

    @property
    def config(self) -> Any:
        """The network's."""
        return self.network.config

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What `family.encode_prompts` makes of the captions, with gradients of what is trained."""
        device = next(self.network.parameters()).device
        for part in self.encoders.components.values():  # what is frozen is no part of this module, which was moved
            if isinstance(part, torch.nn.Module) and part.device != device:
                part.to(device)
        return self.family.encode_prompts(captions, self.encoders)

    def forward(self, *, batch: Mapping[str, Any], dtype: torch.dtype, **inputs: Any) -> Any:
        """The network on `inputs` and the text of `batch`, in `dtype`."""
        text = self.encode(batch[CAPTIONS])
        return self.network(**inputs, **self.family.text_arguments({**batch, **text}, dtype))

    def enable_gradient_checkpointing(self) -> None:
        """Of the network and the encoders."""
        self.network.enable_gradient_checkpointing()
        for name in self.family.trained_text_parts:
            encoder: Any = self.get_submodule(name)
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def network_of(model: torch.nn.Module) -> Any:
    """The network itself, without text encoders beside it."""
    return model.network if isinstance(model, NetworkWithText) else model


def trained_parts(model: torch.nn.Module, family: Any) -> dict[str, Any]:
    """Name in the pipeline -> module, of what may hold an adapter: the network, then trained text encoders."""
    if not isinstance(model, NetworkWithText):
        return {family.component: model}
    return {name: model.get_submodule(name) for name in (family.component, *family.trained_text_parts)}


def with_text_adapters(
    network: torch.nn.Module, args: AdapterArguments, *, family: ModelFamily, saved: Any = None
) -> NetworkWithText:
    """`network` and the family's text encoders, frozen but for new adapters in `args.text_encoder_layers`.

    Args:
        saved: (state dict, options) of a LoRA file, as `load_from` returns them: where it holds a text encoder's
            adapter, that is taken.

    Raises:
        SciflowError: the pipeline cannot load such adapters, or no layer matches.
    """
    if not isinstance(family, PipelineFamily) or not family.trained_text_parts:
        raise SciflowError(
            f"`train_text_encoder`: the pipeline of `{family.name}` cannot load a LoRA of its text encoder. Leave it "
            "out."
        )
    if args.adapter_type not in ("lora", "dora"):
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
            put_text_states(encoder, name, state)  # again: into a 16-bit base they were loaded rounded
            continue
        layers = _text_layers(encoder, args.text_encoder_layers, family.idle_text_layers.get(name, 0))
        encoder.add_adapter(adapter_config(alike, encoder, layers), adapter_name=ADAPTER_NAME)
        to_float32(encoder)
    return NetworkWithText(network, family, encoders)


def _without_weights(family: PipelineFamily) -> Any:
    """The trained text encoders on the meta device, for `--dry_run`."""
    import transformers

    made: dict[str, Any] = {}
    where = {"revision": family.revision}
    for name in family.trained_text_parts:
        encoder_class = getattr(transformers, family.config()[name][1])
        path = model_source(family.pretrained_model_name_or_path)
        config = encoder_class.config_class.from_pretrained(path, subfolder=name, **where)
        with torch.device("meta"):
            made[name] = encoder_class(config)
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


def text_states(model: torch.nn.Module) -> dict[str, Any]:
    """Adapters of the text encoders as arguments of the pipeline's `save_lora_weights`; nothing without any."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    if not isinstance(model, NetworkWithText):
        return {}
    arguments: dict[str, Any] = {}
    for name in model.family.trained_text_parts:
        encoder: Any = model.get_submodule(name)
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(encoder, adapter_name=ADAPTER_NAME))
        # transformers 5.6 took `text_model.` from one of the two CLIP classes; LoRA files go on having it.
        state = {f"text_model.{k.removeprefix('text_model.')}": v.detach().cpu() for k, v in state.items()}
        options = encoder.peft_config[ADAPTER_NAME].to_dict()
        arguments[f"{name}_lora_layers"] = state
        arguments[f"{name}_lora_adapter_metadata"] = {
            k: sorted(v) if isinstance(v, set) else v for k, v in options.items()
        }
    return arguments


def put_text_states(encoder: Any, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Fills the adapter of the text encoder `name`; ValueError where a tensor is left over or left out."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if "text_model" not in dict(encoder.named_children()):
        own = {key.removeprefix("text_model."): value for key, value in own.items()}
    own = {key: value for key, value in own.items() if not key.endswith(".alpha")}
    fill_adapter(encoder, own)


def with_text(model: torch.nn.Module, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of captions with what its caption becomes; any other sample as it is."""
    if not isinstance(model, NetworkWithText):
        return sample
    with torch.no_grad():
        return sample | {name: value[0] for name, value in model.encode([sample[CAPTIONS]]).items()}


def use_captions(dataset: Any) -> None:
    """Makes a cache give captions in place of embeddings.

    Raises:
        SciflowError: it was opened to give stored embeddings.
    """
    if getattr(dataset, "online_text", None) is None:
        raise SciflowError(
            "`train_text_encoder`: stored embeddings know nothing of what the text encoders learn. Add "
            "`--text_encoding online`, so that captions are encoded in training."
        )
    dataset.online_text = lambda captions: {CAPTIONS: list(captions)}
