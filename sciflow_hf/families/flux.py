"""FLUX.1 [dev] (Black Forest Labs): rectified flow on packed latents, guidance-distilled; CLIP and T5 for the text."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import arguments, option
from .base import PipelineFamily, network_dtype, part_option, posterior_option
from .tokens import PATCH, pack, position_ids, token_ids, unpack

logger = logging.getLogger(__name__)

LONGEST_TEXT = 512  # T5 tokens that the pipeline takes


@arguments
class Flux(PipelineFamily):
    """FLUX.1: `black-forest-labs/FLUX.1-dev`. Train dev, not the step-distilled schnell.

    Networks that take further channels (Fill, Depth, Canny) are not trained here.
    """

    heading: ClassVar[str] = "FLUX.1"

    posterior: str = posterior_option("sample")  # as in the published training
    text_encoder_2_name_or_path: str | None = part_option("T5")
    max_sequence_length: int = option(
        512,
        "Tokens of a prompt that T5 reads. Padding is not masked: sample with the same length. CLIP reads the first 77 "
        "tokens and gives the pooled embedding.",
        within=f"[1, {LONGEST_TEXT}]",
        advice="The pipeline takes no other number of T5 tokens.",
    )
    guidance_scale: float = option(
        1.0,
        "Input of the guidance embedding in training, where the network has one. At 1.0 the network's own guidance "
        "stays as it is in sampling (3.5 there).",
        within="[0, inf)",
    )
    validation_true_cfg_scale: float = option(
        1.0,
        "Above 1, validation images are also drawn with true classifier-free guidance, away from "
        "`--validation_negative_prompt` (default: the empty prompt), in twice the time. `--validation_guidance_scale` "
        "stays the input of the embedding.",
        within="[0, inf)",
    )

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (B, 16, h, w). Batch: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P).

        And `source_latents` (B, 16, h, w) of edits, for `flux_kontext`.
        """
        dtype, (height, width) = network_dtype(model), noisy_latents.shape[2:]
        images = [noisy_latents, *self.clean_sources(batch)]
        sides = [(image.shape[2] // PATCH, image.shape[3] // PATCH) for image in images]
        img_ids = [position_ids(*size, device=noisy_latents.device, time=i) for i, size in enumerate(sides)]
        tokens = model(
            hidden_states=torch.cat([pack(image) for image in images], dim=1).to(dtype),
            timestep=levels,  # the network multiplies by 1000 itself
            guidance=self.guidance(levels),
            img_ids=torch.cat(img_ids),
            return_dict=False,
            **self.text_inputs(batch, dtype),
        )[0][:, : self.image_seq_len(noisy_latents)]
        return unpack(tokens.float(), height, width)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """2x2 patches as tokens: (B, C, h, w) -> (B, h/2 * w/2, 4C)."""
        return pack(latents)

    def text_arguments(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """T5's embeddings (B, L, D), CLIP's pooled one (B, P), and text ids of zeros (L, 3)."""
        prompt_embeds = batch["prompt_embeds"].to(dtype)
        return {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": batch["pooled_prompt_embeds"].to(dtype),
            "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, dtype=torch.int64, device=prompt_embeds.device),
        }

    name: ClassVar[str] = "flux"
    patch: ClassVar[int] = PATCH
    trained_text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    prompt_tokenizer: ClassVar[str] = "tokenizer_2"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_k,to_q,to_v,to_out.0",
        "standard": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out",
        # `proj_out` alone would also match the last layer of the network.
        "full": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,ff.net.0.proj,ff.net.2,"
        "ff_context.net.0.proj,ff_context.net.2,proj_mlp,single_transformer_blocks.*.proj_out",
    }

    def guidance(self, sigmas: torch.Tensor) -> torch.Tensor | None:
        """(B,), float32: `guidance_scale` for each sample, or None where the network has no guidance embedding."""
        return torch.full_like(sigmas, self.guidance_scale) if self._has_guidance else None

    @property
    def latents_shift(self) -> float:
        """`shift_factor` of the VAE, which FLUX.1 must have."""
        return float(self.setting("vae", "shift_factor"))

    @property
    def _has_guidance(self) -> bool:
        return bool(self.setting(self.component, "guidance_embeds"))

    def resolution_mu(self, image_seq_len: int) -> float:
        """The line of BFL's sampler: 0.5 for 256 image tokens, 1.15 for 4096 (`calculate_shift` in diffusers)."""
        return 0.00016927 * image_seq_len + 0.45666666

    def pipeline_class(self) -> Any:
        """`FluxPipeline`."""
        from diffusers import FluxPipeline

        return FluxPipeline

    def network_class(self) -> Any:
        """`FluxTransformer2DModel`."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        """Refuses networks that see a second image, and warns of schnell; see `PipelineFamily.load_model`."""
        path, config = self.pretrained_model_name_or_path, self.config(self.component)
        channels = config.get("out_channels") or config.get("in_channels")
        if channels != config.get("in_channels"):
            raise SciflowError(
                f"`pretrained_model_name_or_path` {path!r}: its network takes `in_channels` "
                f"{config.get('in_channels')} and returns `out_channels` {channels}, so it sees a second "
                f"image in them (Fill, Depth, Canny). `{self.name}` trains networks such as FLUX.1-dev's."
            )
        if not self._has_guidance and not self.config("scheduler").get("use_dynamic_shifting", False):
            logger.warning(
                "`%s` looks like FLUX.1-schnell (no guidance embedding, no resolution shift), which is step-distilled: "
                "training moves it away from its few-step sampler. Train FLUX.1-dev.",
                path,
            )
        return super().load_model(dtype=dtype, meta=meta, quantize=quantize)

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """As the pipeline's `encode_prompt`, without its warning for every caption beyond CLIP's 77 tokens.

        `prompt_embeds` (B, max_sequence_length, D) of T5, `pooled_prompt_embeds` (B, P) of CLIP.
        """
        clip, t5 = encoders.text_encoder, encoders.text_encoder_2
        clip_ids = token_ids(prompts, encoders.tokenizer, encoders.tokenizer.model_max_length)
        t5_ids = token_ids(prompts, encoders.tokenizer_2, self.max_sequence_length)
        return {
            "prompt_embeds": t5(t5_ids.to(t5.device)).last_hidden_state,
            "pooled_prompt_embeds": clip(clip_ids.to(clip.device)).pooler_output,
        }

    def call_options(self) -> dict[str, Any]:
        """`true_cfg_scale` where `--validation_true_cfg_scale` is above 1."""
        return {"true_cfg_scale": self.validation_true_cfg_scale} if self.validation_true_cfg_scale > 1 else {}

    def needs_negative_prompt(self) -> bool:
        """True with true guidance: the pipeline has it only with a negative prompt."""
        return self.validation_true_cfg_scale > 1

    def check_negative_prompt(self, guidance_scale: float) -> None:
        """The embedded guidance has no second side: only true guidance has."""
        if self.validation_true_cfg_scale <= 1:
            raise SciflowError(
                f"`validation_negative_prompt` does nothing at `validation_true_cfg_scale` "
                f"{self.validation_true_cfg_scale:g}: `{self.name}` has its guidance embedded. Give more than 1 for "
                "true guidance, which takes twice the time, or leave the negative prompt out."
            )

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents, widths of T5's and of CLIP's pooled embeddings."""
        return {
            "latents": config.in_channels // PATCH**2,
            "prompt_embeds": config.joint_attention_dim,
            "pooled_prompt_embeds": config.pooled_projection_dim,
        }

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """As `PipelineFamily.check_sample`; also refuses text ids other than zeros."""
        super().check_sample(model, sample)
        if "txt_ids" in sample and sample["txt_ids"].any():
            raise SciflowError("`text_ids`: FLUX.1 takes (0, 0, 0) for every text token; the cache stores other ids.")
