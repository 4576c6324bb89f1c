"""FLUX.2 [klein] base, 4B and 9B (Black Forest Labs): rectified flow on patchified, batch-normalised latents."""

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import arguments, option
from .base import PatchedFamily, network_dtype
from .tokens import PATCH, chat_counts, position_ids

logger = logging.getLogger(__name__)

TEXT_ENCODER_LAYERS = (9, 18, 27)  # as the pipeline; diffusers' training script takes (10, 20, 30)


@arguments
class Flux2Klein(PatchedFamily):
    """FLUX.2 klein: `black-forest-labs/FLUX.2-klein-base-9B` or `-base-4B`.

    Train the base weights, not the distilled ones. `mini_klein`, a small one for figures, comes with this package.
    """

    heading: ClassVar[str] = "FLUX.2 klein"

    max_sequence_length: int = option(
        512,
        "Tokens of a prompt, chat template included. All of them, padding too, take part in attention: sample with the "
        "same length.",
        within="[1, inf)",
    )

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (B, 128, h/2, w/2). Batch: `prompt_embeds` (B, L, D), perhaps `source_latents` (B, 32, h, w)."""
        dtype, (batch_size, _, height, width) = network_dtype(model), noisy_latents.shape
        prompt_embeds, device = batch["prompt_embeds"].to(dtype), noisy_latents.device
        images = [noisy_latents, *self.clean_sources(batch)]  # apart in time: 0, 10, 20, ...
        img_ids = [position_ids(*image.shape[2:], 1, device=device, time=10 * i) for i, image in enumerate(images)]
        tokens: torch.Tensor = model(
            hidden_states=torch.cat([self.pack(image) for image in images], dim=1).to(dtype),
            timestep=levels,  # the network multiplies by 1000 itself
            guidance=self.guidance(levels),
            encoder_hidden_states=prompt_embeds,
            txt_ids=position_ids(1, 1, prompt_embeds.shape[1], device=device).expand(batch_size, -1, -1),
            img_ids=torch.cat(img_ids).expand(batch_size, -1, -1),
            return_dict=False,
        )[0][:, : height * width]
        return tokens.float().transpose(1, 2).unflatten(2, (height, width))

    def guidance(self, sigmas: torch.Tensor) -> torch.Tensor | None:
        """The input of a guidance embedding, (B,); klein has none."""
        return None

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, H*W, C)."""
        return latents.flatten(2).transpose(1, 2)

    name: ClassVar[str] = "flux2_klein"
    max_sources: ClassVar[int] = 10
    text_settings: ClassVar[dict[str, Any]] = {
        "text_encoder_layers": list(TEXT_ENCODER_LAYERS),
        "padding_side": "right",
    }
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_k,to_q,to_v,to_out.0",
        "standard": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out",
        "full": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
        "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out",
    }

    def pipeline_class(self) -> Any:
        """`Flux2KleinPipeline`."""
        from diffusers import Flux2KleinPipeline

        return Flux2KleinPipeline

    def network_class(self) -> Any:
        """`Flux2Transformer2DModel`."""
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        """Warns of step-distilled weights, and refuses FLUX.2 [dev] here; see `PipelineFamily.load_model`."""
        if self.guidance(torch.zeros(1)) is None and self.config(self.component).get("guidance_embeds"):
            raise SciflowError(
                f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r}: `guidance_embeds` in its "
                f"{self.component}'s configuration says that it is FLUX.2 [dev]. Train it with the family `flux2`."
            )
        if self.config().get("is_distilled", False):
            logger.warning(
                "`%s` is step-distilled: training moves it away from its few-step sampler. Train the base weights "
                "(FLUX.2-klein-base-*) and use the LoRA on the distilled ones if you like.",
                self.pretrained_model_name_or_path,
            )
        return super().load_model(dtype=dtype, meta=meta, quantize=quantize)

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Takes away what the deepest layer that is read does not need."""
        truncate(pipeline.text_encoder.model, max(TEXT_ENCODER_LAYERS))
        pipeline.text_encoder.lm_head = torch.nn.Identity()

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Embeddings of the prompt and of the negative one, without text ids, which the pipeline makes."""
        return {"prompt_embeds": prompt["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}

    # The pipeline's call takes no text.
    negative_argument: ClassVar[str] = (
        "negative_prompt_embeds=pipeline.encode_prompt({!r}, max_sequence_length={length})[0]"
    )

    def check_negative_prompt(self, guidance_scale: float) -> None:
        """Raises SciflowError for distilled weights, which draw without guidance, and where guidance is off."""
        if self.config().get("is_distilled", False):
            raise SciflowError(
                f"`validation_negative_prompt`: {self.pretrained_model_name_or_path!r} is step-distilled and draws "
                "without guidance, so it takes no negative prompt. Leave it out, or train the base weights."
            )
        super().check_negative_prompt(guidance_scale)

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """`prompt_embeds` (B, L, D), Qwen3's hidden states 9, 18, 27 side by side, and `text_ids` (B, L, 4)."""
        layers = self.text_settings["text_encoder_layers"]
        with torch.no_grad():
            prompt_embeds, text_ids = encoders.encode_prompt(
                list(prompts), max_sequence_length=self.max_sequence_length, text_encoder_out_layers=layers
            )
        return {"prompt_embeds": prompt_embeds, "text_ids": text_ids}

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each prompt in the chat template, and how many of them are read."""
        counts = chat_counts(prompts, self.tokenizers.tokenizer, enable_thinking=False)  # as the pipeline
        return counts, self.max_sequence_length

    def source_resized(self, height: int, width: int) -> tuple[int, int]:
        """As the pipeline: as it is, or with its aspect ratio to 1024 x 1024 pixels where it has more."""
        scale = min(1.0, math.sqrt(1024 * 1024 / (height * width)))
        return int(height * scale), int(width * scale)

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """The same, cut to multiples of `bucket_step`."""
        (height, width), step = self.source_resized(height, width), self.bucket_step()
        return height // step * step, width // step * step

    def check_source(self, height: int, width: int) -> str:
        """Refuses what the pipeline's image processor refuses: sides under 64 pixels, aspect ratios above 8."""
        short, long = sorted((height, width))
        return f"{height} x {width} pixels: under 64, or beyond 8:1" if short < 64 or long > 8 * short else ""

    def resolution_mu(self, image_seq_len: int) -> float:
        """The line of BFL's sampler for many steps, `compute_empirical_mu` in diffusers; training has no steps."""
        return 0.00016927 * image_seq_len + 0.45666666

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents before patches, and width of the text."""
        return {"latents": config.in_channels // PATCH**2, "prompt_embeds": config.joint_attention_dim}

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """As `PipelineFamily.check_sample`; also refuses text ids other than (0, 0, 0, l)."""
        super().check_sample(model, sample)
        expected = position_ids(1, 1, len(sample["prompt_embeds"]), device=sample["latents"].device)
        if "txt_ids" in sample and not torch.equal(sample["txt_ids"], expected):
            raise SciflowError("`text_ids`: FLUX.2 takes (0, 0, 0, l) for text token l; the cache stores other ids.")


def truncate(decoder: Any, depth: int) -> None:
    """Takes away what hidden state `depth` of a language model does not need: the layers above, and the norm.

    The norm must go: a model's last hidden state is the normed one, an inner one is not.
    """
    decoder.layers, decoder.norm = decoder.layers[:depth], torch.nn.Identity()
    decoder.config.num_hidden_layers = len(decoder.layers)
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[:depth]
