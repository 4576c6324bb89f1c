"""FLUX.2 [dev] (Black Forest Labs): klein's latents and positions, text of Mistral Small, guidance-distilled."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import arguments, option
from .flux2_klein import Flux2Klein, truncate
from .loading import explain_loading

TEXT_ENCODER_LAYERS = (10, 20, 30)  # as the pipeline


@arguments
class Flux2(Flux2Klein):
    """FLUX.2 dev: `black-forest-labs/FLUX.2-dev`, 32 billion parameters."""

    heading: ClassVar[str] = "FLUX.2"

    guidance_scale: float = option(
        1.0,
        "Input of the guidance embedding in training. At 1.0 the network's own guidance stays as it is in sampling "
        "(4.0 there).",
        within="[0, inf)",
    )

    name: ClassVar[str] = "flux2"
    exact_pipeline: ClassVar[bool] = True
    text_settings: ClassVar[dict[str, Any]] = {
        "text_encoder_layers": list(TEXT_ENCODER_LAYERS),
        "padding_side": "the tokenizer's",
    }

    def guidance(self, sigmas: torch.Tensor) -> torch.Tensor | None:
        """(B,), float32: `guidance_scale` for each sample."""
        return torch.full_like(sigmas, self.guidance_scale)

    def pipeline_class(self) -> Any:
        """`Flux2Pipeline`."""
        from diffusers import Flux2Pipeline

        return Flux2Pipeline

    def read_pipeline(self, what: str, **parts: Any) -> Any:
        """With the tokenizer alone: its processor also reads images, for which transformers needs torchvision."""
        from transformers import AutoTokenizer

        pipeline = super().read_pipeline(what, **{"tokenizer": None} | parts)
        if "tokenizer" not in parts:
            with explain_loading(self.pretrained_model_name_or_path, "tokenizer"):
                where = {"subfolder": "tokenizer", "revision": self.revision}
                pipeline.tokenizer = AutoTokenizer.from_pretrained(self.source, **where)
        return pipeline

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Without vision tower and vocabulary projection, and what the deepest layer that is read does not need."""
        encoder = pipeline.text_encoder
        truncate(encoder.model.language_model, max(TEXT_ENCODER_LAYERS))
        encoder.model.vision_tower = encoder.model.multi_modal_projector = encoder.lm_head = torch.nn.Identity()

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each prompt with the system message, and how many of them are read."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(list(prompts), self.tokenizers.system_message)
        ids = self.tokenizers.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        return [len(row) for row in ids], self.max_sequence_length

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`prompt_embeds` alone: guidance is embedded."""
        return {"prompt_embeds": prompt["prompt_embeds"]}

    def check_negative_prompt(self, guidance_scale: float) -> None:
        """The embedded guidance has no second side."""
        raise SciflowError(
            f"`validation_negative_prompt`: `{self.name}` has its guidance embedded, and its pipeline takes no "
            "negative prompt. Leave it out."
        )
