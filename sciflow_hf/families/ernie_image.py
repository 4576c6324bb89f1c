"""ERNIE-Image (Baidu): rectified flow on FLUX.2's latents in one stream of image and text, which keeps its length."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..options import arguments
from .base import PatchedFamily, SamplingArguments, network_dtype
from .tokens import PATCH, alone, padded, token_counts

ENHANCER = ("pe", "pe_tokenizer")  # a language model that rewrites prompts: never loaded


@arguments
class ErnieImage(PatchedFamily):
    """ERNIE-Image: `baidu/ERNIE-Image`. Train this one, not the step-distilled ERNIE-Image-Turbo."""

    heading: ClassVar[str] = "ERNIE-Image"

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (B, 128, h/2, w/2). Batch: `prompt_embeds` (B, L, D), `prompt_embeds_mask` (B, L) if padded."""
        dtype, mask = network_dtype(model), batch.get("prompt_embeds_mask")
        prompt_embeds = batch["prompt_embeds"].to(dtype)
        whole = torch.full((len(prompt_embeds),), prompt_embeds.shape[1], device=prompt_embeds.device)
        prediction: torch.Tensor = model(
            hidden_states=noisy_latents.to(dtype),
            timestep=1000 * levels,  # float32; the network takes 0 to 1000
            text_bth=prompt_embeds,
            text_lens=whole if mask is None else mask.sum(1),
            return_dict=False,
        )[0]
        return prediction.float()

    name: ClassVar[str] = "ernie_image"
    base_weights: ClassVar[str] = "baidu/ERNIE-Image"
    batch_norm_eps: ClassVar[float | None] = 1e-5  # as the pipeline, whatever the VAE's configuration says
    pads_text: ClassVar[bool] = True
    text_settings: ClassVar[dict[str, Any]] = {"text_encoder_layers": [-2], "padding_side": "none"}
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_q,to_k,to_v,to_out.0",
        "standard": "to_q,to_k,to_v,to_out.0",
        "full": "to_q,to_k,to_v,to_out.0,mlp.gate_proj,mlp.up_proj,mlp.linear_fc2",
    }

    def resolution_mu(self, image_seq_len: int) -> float:
        """That of the scheduler's configuration, the same at every resolution."""
        return math.log(self.setting("scheduler", "shift"))

    def pipeline_class(self) -> Any:
        """`ErnieImagePipeline`."""
        from diffusers import ErnieImagePipeline

        return ErnieImagePipeline

    def network_class(self) -> Any:
        """`ErnieImageTransformer2DModel`."""
        from diffusers import ErnieImageTransformer2DModel

        return ErnieImageTransformer2DModel

    def read_pipeline(self, what: str, **parts: Any) -> Any:
        """Without the prompt enhancer, which would change what is asked for."""
        return super().read_pipeline(what, **dict.fromkeys(ENHANCER) | parts)

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Without its vision tower."""
        pipeline.text_encoder.vision_tower = pipeline.text_encoder.multi_modal_projector = torch.nn.Identity()

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """`prompt_embeds` (B, L, D), the encoder's hidden state -2, padded with zeros to the longest, and the mask."""
        return padded(encoders.encode_prompt(list(prompts), encoders.text_encoder.device))

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each prompt, and how many of them are read: the pipeline cuts where the tokenizer says."""
        tokenizer = self.tokenizers.tokenizer
        return token_counts(prompts, tokenizer), tokenizer.model_max_length

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Embeddings of both prompts, (1, l, D), without padding."""
        return alone(prompt, negative)

    def call_arguments(self, args: SamplingArguments) -> list[str]:
        """Without the prompt enhancer, which a stock pipeline has."""
        return [*super().call_arguments(args), "use_pe=False"]

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents before patches, and width of the text."""
        return {"latents": config.in_channels // PATCH**2, "prompt_embeds": config.text_in_dim}
