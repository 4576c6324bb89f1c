"""Stable Diffusion 3 and 3.5 (Stability AI): rectified flow, a joint transformer, two CLIP text encoders and T5."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..diffusion.arguments import LossArguments
from ..diffusion.process import Noised
from ..errors import SciflowError
from ..options import arguments, option
from .base import PipelineFamily, network_dtype, part_option, posterior_option
from .tokens import PATCH, token_ids

LONGEST_TEXT = 512  # T5 tokens that the pipeline takes
# What `prompt_embeds` is made of: inner states of both CLIPs, the last of T5.
TEXT_STATES = ("text_encoder -2", "text_encoder_2 -2", "text_encoder_3 -1")
T5 = ("text_encoder_3", "tokenizer_3")


@arguments
class SD3(PipelineFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large: `stabilityai/stable-diffusion-3.5-large` or `-medium`.

    Train these, not the distilled `-turbo`.
    """

    heading: ClassVar[str] = "Stable Diffusion 3"

    posterior: str = posterior_option("sample")  # as in the published training
    text_encoder_2_name_or_path: str | None = part_option("second text encoder")
    text_encoder_3_name_or_path: str | None = part_option("T5")
    max_sequence_length: int = option(
        256,
        "Tokens of a prompt that T5 reads. Padding is not masked: sample with the same length. CLIP always reads the "
        "first 77 tokens.",
        within=f"[1, {LONGEST_TEXT}]",
        advice="The pipeline takes no other number of T5 tokens.",
    )
    use_t5: bool = option(
        True,
        "Also encode prompts with T5 (4.8 billion parameters). Without it zeros replace its tokens, as in the pipeline "
        "without `text_encoder_3`, and what a caption says after CLIP's 77 tokens is lost.",
    )
    precondition_outputs: bool = option(
        False,
        "Compare x0 = noisy_latents - sigma * prediction with the latents, the default of diffusers' scripts. With "
        "`--loss_type mse` that weighs the loss on the velocity by sigma^2.",
    )

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (B, 16, h, w). Batch: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P)."""
        dtype = network_dtype(model)
        prediction: torch.Tensor = model(
            hidden_states=noisy_latents.to(dtype),
            timestep=1000 * levels,  # float32; the network takes 0 to 1000
            return_dict=False,
            **self.text_inputs(batch, dtype),
        )[0]
        return prediction.float()

    def compare(
        self, model_pred: torch.Tensor, noised: Noised, batch: dict[str, Any], args: LossArguments
    ) -> torch.Tensor:
        """With `precondition_outputs` x0 = noisy_latents - sigma * prediction and the latents."""
        if not self.precondition_outputs:
            return super().compare(model_pred, noised, batch, args)
        if args.min_snr_gamma is not None:
            raise SciflowError(
                f"`min_snr_gamma` {args.min_snr_gamma} does not go with `precondition_outputs`: it is a weight of the "
                "loss on the velocity. Leave one of them out."
            )
        clean = noised.noisy_latents - noised.levels.view(-1, 1, 1, 1) * model_pred
        return super().compare(clean, noised._replace(target=noised.latents), batch, args)

    def text_arguments(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Embeddings (B, L, D) of both CLIPs and T5, and the pooled ones of the CLIPs (B, P)."""
        return {
            "encoder_hidden_states": batch["prompt_embeds"].to(dtype),
            "pooled_projections": batch["pooled_prompt_embeds"].to(dtype),
        }

    name: ClassVar[str] = "sd3"
    patch: ClassVar[int] = PATCH
    base_weights: ClassVar[str] = "stable-diffusion-3.5-large"
    text_settings: ClassVar[dict[str, Any]] = {"text_encoder_layers": list(TEXT_STATES), "padding_side": "right"}
    prompt_tokenizer: ClassVar[str] = "tokenizer_3"
    trained_text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    text_parts: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    )
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_k,to_q,to_v,to_out.0",
        "standard": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out",
        "full": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
        "ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2",
    }

    @property
    def latents_shift(self) -> float:
        """`shift_factor` of the VAE, which SD3 must have."""
        return float(self.setting("vae", "shift_factor"))

    def resolution_mu(self, image_seq_len: int) -> float:
        """SD3's shift does not depend on the resolution: that of the scheduler's configuration, 3.0."""
        return math.log(self.setting("scheduler", "shift"))

    def pipeline_class(self) -> Any:
        """`StableDiffusion3Pipeline`."""
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    def network_class(self) -> Any:
        """`SD3Transformer2DModel`."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    def idle_layers(self, model: Any) -> tuple[str, ...]:
        """The queries of the text in the last block: their output is discarded."""
        last = f"transformer_blocks.{len(model.transformer_blocks) - 1}.attn"
        return f"{last}.add_q_proj", f"{last}.norm_added_q"

    def unread_parts(self) -> tuple[str, ...]:
        """T5 and its tokenizer with `--no_use_t5`."""
        if self.use_t5 and self.config().get(T5[0], [None])[0] is None:
            raise SciflowError(
                f"`use_t5`: {self.pretrained_model_name_or_path!r} holds no `{T5[0]}`. Give `--no_use_t5`."
            )
        return () if self.use_t5 else T5

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """As the pipeline's `encode_prompt`, without its warning for every caption beyond CLIP's 77 tokens.

        `prompt_embeds` (B, 77 + max_sequence_length, D): CLIP's states, padded with zeros to the width of T5's, then
        T5's. `pooled_prompt_embeds` (B, P): of both CLIPs.
        """
        length = encoders.tokenizer.model_max_length
        clips = (encoders.tokenizer, encoders.text_encoder), (encoders.tokenizer_2, encoders.text_encoder_2)
        one, two = (
            encoder(token_ids(prompts, tokenizer, length).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in clips
        )
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        if self.use_t5:
            ids = token_ids(prompts, encoders.tokenizer_3, self.max_sequence_length)
            t5 = encoders.text_encoder_3(ids.to(encoders.text_encoder_3.device))[0]
        else:
            width = self.setting(self.component, "joint_attention_dim")
            t5 = clip.new_zeros(len(prompts), self.max_sequence_length, width)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip, t5], dim=1),
            "pooled_prompt_embeds": torch.cat([one.text_embeds, two.text_embeds], dim=-1),
        }

    def encoder_settings(self) -> dict[str, Any]:
        """Without T5 the states of both CLIPs alone."""
        states = {} if self.use_t5 else {"text_encoder_layers": list(TEXT_STATES[:2])}
        return super().encoder_settings() | states | {"use_t5": self.use_t5}

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents, widths of the text and of the pooled text."""
        return {
            "latents": config.in_channels,
            "prompt_embeds": config.joint_attention_dim,
            "pooled_prompt_embeds": config.pooled_projection_dim,
        }

    def positions(self, config: Any) -> int | None:
        """`pos_embed_max_size`: the table of positions has that many tokens on a side."""
        return int(config.pos_embed_max_size)
