"""Z-Image (Alibaba Tongyi Lab): rectified flow in one stream of image and text, each text with its own length."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import arguments, option
from .base import PipelineFamily, network_dtype
from .tokens import PATCH, alone, chat_counts, own_tokens, padded

if TYPE_CHECKING:
    from PIL.Image import Image


@arguments
class ZImage(PipelineFamily):
    """Z-Image: `Tongyi-MAI/Z-Image`. Train this one, not the step-distilled Z-Image-Turbo."""

    heading: ClassVar[str] = "Z-Image"

    max_sequence_length: int = option(
        512,
        "Tokens of a prompt, chat template included; longer prompts are cut. Shorter ones are stored as they are and "
        "share a batch, so this length does not change what short prompts learn.",
        within="[1, inf)",
    )

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (B, 16, h, w). Batch: `prompt_embeds` (B, L, D), `prompt_embeds_mask` (B, L) of padded texts."""
        dtype = network_dtype(model)
        # It takes lists, images with an axis of frames and 1 for data, and returns latents - noise.
        velocities = model(
            x=list(noisy_latents.to(dtype).unsqueeze(2)),
            t=1 - levels,  # float32; the network multiplies by 1000 itself
            cap_feats=own_tokens(batch["prompt_embeds"].to(dtype), batch.get("prompt_embeds_mask")),
            return_dict=False,
        )[0]
        return -torch.stack(list(velocities)).squeeze(2).float()

    name: ClassVar[str] = "z_image"
    patch: ClassVar[int] = PATCH
    base_weights: ClassVar[str] = "Tongyi-MAI/Z-Image"
    pads_text: ClassVar[bool] = True
    text_settings: ClassVar[dict[str, Any]] = {"text_encoder_layers": [-2], "padding_side": "none"}
    no_guidance: ClassVar[float] = 0  # prediction + scale * (prediction - that without the prompt)
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "layers.*.attention.to_q,layers.*.attention.to_k,layers.*.attention.to_v,"
        "layers.*.attention.to_out.0",
        "standard": "to_q,to_k,to_v,to_out.0",
        "full": "to_q,to_k,to_v,to_out.0,feed_forward.w1,feed_forward.w2,feed_forward.w3",
    }

    def resolution_mu(self, image_seq_len: int) -> float:
        """That of the scheduler's configuration, as published the same at every resolution."""
        if self.config("scheduler").get("use_dynamic_shifting"):
            return self.scheduler_line(image_seq_len)
        return math.log(self.setting("scheduler", "shift"))

    def pipeline_class(self) -> Any:
        """`ZImagePipeline`."""
        from diffusers import ZImagePipeline

        return ZImagePipeline

    def network_class(self) -> Any:
        """`ZImageTransformer2DModel`."""
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        """Refuses Z-Image-Omni, which also sees images; see `PipelineFamily.load_model`."""
        path = self.pretrained_model_name_or_path
        if self.config(self.component).get("siglip_feat_dim") is not None:
            raise SciflowError(
                f"`pretrained_model_name_or_path` {path!r}: `siglip_feat_dim` in its {self.component}'s configuration "
                "says that it also sees images (Z-Image-Omni). `z_image` trains Z-Image."
            )
        return super().load_model(dtype=dtype, meta=meta, quantize=quantize)

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """`prompt_embeds` (B, L, D), Qwen3's hidden state -2, padded with zeros to the longest, and the mask (B, L)."""
        with torch.no_grad():
            texts, _ = encoders.encode_prompt(
                list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
        return padded(texts)

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each prompt in the chat template, and how many of them are read."""
        return chat_counts(prompts, self.tokenizers.tokenizer, enable_thinking=True), self.max_sequence_length

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Embeddings of both prompts, (1, l, D), without padding."""
        return alone(prompt, negative)

    def generate(self, pipeline: Any, prompt_inputs: dict[str, torch.Tensor], **options: Any) -> list["Image"]:
        """Gives the pipeline its texts as lists; its latents stay float32."""
        network = pipeline.transformer
        place = {"device": next(network.parameters()).device, "dtype": network_dtype(network)}
        options |= {name: list(value.to(**place)) for name, value in prompt_inputs.items()}
        return super().generate(pipeline, {}, **options | {"callback_on_step_end": None})

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents and width of the text."""
        return {"latents": config.in_channels, "prompt_embeds": config.cap_feat_dim}
