"""Text encoders trained together with the network: one module that holds them all and has one forward."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SciflowError

if TYPE_CHECKING:
    from ..families.base import PipelineFamily

CAPTIONS = "captions"


class NetworkWithText(torch.nn.Module):
    """A network and the text encoders that are trained with it, each under its name in the pipeline.

    The batch of such a run holds `captions`, a list of B strings, instead of embeddings. The family's `compute_loss`
    hands it to `forward`, where the captions are encoded with gradients, so that `compute_loss` calls one module once,
    as DistributedDataParallel and mixed precision need it.

    Args:
        network: the network, with its adapter.
        family: has `trained_text_parts`, `encode_prompts` and `text_arguments`.
        encoders: what `family.encode_prompts` takes; parts of it that are not trained (T5) stay frozen in it.
    """

    def __init__(self, network: torch.nn.Module, family: "PipelineFamily", encoders: Any) -> None:
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
        """The configuration of the network."""
        return self.network.config

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The output of `family.encode_prompts` for the captions, with gradients of trained weights."""
        device = next(self.network.parameters()).device
        for part in self.encoders.components.values():  # what is frozen is no part of this module, which was moved
            if isinstance(part, torch.nn.Module) and part.device != device:
                part.to(device)
        return self.family.encode_prompts(captions, self.encoders)

    def forward(self, *, batch: Mapping[str, Any], dtype: torch.dtype, **inputs: Any) -> Any:
        """The network on `inputs` and the text of `batch`, in `dtype`."""
        text = self.encode(batch[CAPTIONS])
        return self.network(**inputs, **self.family.text_arguments({**batch, **text}, dtype))

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Checkpoints activations of the network, by that function if one is given, and of the encoders."""
        self.network.enable_gradient_checkpointing(gradient_checkpointing_func)
        for name in self.family.trained_text_parts:
            encoder: Any = self.get_submodule(name)
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def with_text(model: torch.nn.Module, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of captions with what its caption becomes; any other sample as it is."""
    if not isinstance(model, NetworkWithText):
        return sample
    with torch.no_grad():
        return sample | {name: value[0] for name, value in model.encode([sample[CAPTIONS]]).items()}


def use_captions(dataset: Any) -> None:
    """Makes a cache give captions instead of embeddings.

    Raises:
        SciflowError: it was opened to give stored embeddings.
    """
    if getattr(dataset, "online_text", None) is None:
        raise SciflowError(
            "`train_text_encoder`: stored embeddings know nothing of what the text encoders learn. Add "
            "`--text_encoding online`, so that captions are encoded in training."
        )
    dataset.online_text = lambda captions: {CAPTIONS: list(captions)}
