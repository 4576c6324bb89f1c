"""FLUX.1 [dev] (Black Forest Labs): rectified flow on packed latents, guidance-distilled; CLIP and T5 for the text."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..diffusion.losses import flow_weight, sample_loss
from ..diffusion.randomness import randn, sample_keys
from ..errors import SciflowError
from ..options import arguments, option
from .base import LossArguments, PipelineFamily, posterior_option
from .loading import network_dtype

logger = logging.getLogger(__name__)

PATCH = 2
LONGEST_TEXT = 512  # T5 tokens that the pipeline takes


@arguments
class Flux(PipelineFamily):
    """FLUX.1: `black-forest-labs/FLUX.1-dev`. Train dev, not the step-distilled schnell.

    Networks that take further channels (Fill, Depth, Canny) are not trained here.
    """

    heading: ClassVar[str] = "FLUX.1"

    posterior: str = posterior_option("sample")  # as in the published training
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
    )
    validation_true_cfg_scale: float = option(
        1.0,
        "Above 1, validation images are also drawn with true classifier-free guidance, away from "
        "`--validation_negative_prompt` (default: the empty prompt), in twice the time. `--validation_guidance_scale` "
        "stays the input of the embedding.",
    )

    def compute_loss(
        self,
        model: torch.nn.Module,
        batch: dict[str, torch.Tensor],
        args: LossArguments,
        *,
        noise: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rectified flow (Liu et al. 2022; Esser et al. 2024, equation 13): the network predicts noise - latents.

        Batch: `latents` (B, 16, h, w) raw, `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P), perhaps
        `loss_mask` (B, h, w). Noise: as `latents`. Levels: sigmas.
        """
        latents = (batch["latents"].float() - self.latents_shift) * self.latents_scale  # (B, 16, h, w)
        size, height, width = len(latents), latents.shape[2] // PATCH, latents.shape[3] // PATCH

        keys = sample_keys(batch, size)
        if noise is None:
            noise = randn(keys, latents.shape, device=latents.device, draw_on_cpu=not model.training)
        if levels is None:
            levels = self.sample_levels(keys, args, image_seq_len=height * width, batch=batch)
        sigmas = levels.to(latents.device, non_blocking=True)
        sigma = sigmas.view(-1, 1, 1, 1)

        noisy_latents = (1 - sigma) * latents + sigma * noise

        dtype = network_dtype(model)
        model_pred = model(
            hidden_states=pack(noisy_latents).to(dtype),
            timestep=sigmas,  # the network multiplies by 1000 itself
            guidance=self.guidance(sigmas),
            img_ids=image_ids(height, width, latents.device),
            return_dict=False,
            **self.text_inputs(batch, dtype),
        )[0]

        target = pack(noise - latents)
        mask = batch.get("loss_mask")  # (B, h, w): every channel of a latent pixel counts alike
        mask = None if mask is None else pack(mask[:, None].expand_as(latents))
        loss = sample_loss(model_pred, target, loss_type=args.loss_type, huber_delta=args.huber_delta, mask=mask)
        weight = flow_weight(sigmas, weighting_scheme=args.weighting_scheme, min_snr_gamma=args.min_snr_gamma)
        return weight * loss, sigmas

    def text_arguments(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        prompt_embeds = batch["prompt_embeds"].to(dtype)
        return {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": batch["pooled_prompt_embeds"].to(dtype),
            "txt_ids": text_ids(prompt_embeds.shape[1], prompt_embeds.device),
        }

    name: ClassVar[str] = "flux"
    trained_text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_k,to_q,to_v,to_out.0",
        "standard": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out",
        # `proj_out` alone would be the last layer of the network, too.
        "full": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,ff.net.0.proj,ff.net.2,"
        "ff_context.net.0.proj,ff_context.net.2,proj_mlp,single_transformer_blocks.*.proj_out",
    }

    def guidance(self, sigmas: torch.Tensor) -> torch.Tensor | None:
        """(B,), float32: `guidance_scale` for each sample, or None where the network has no guidance embedding."""
        return torch.full_like(sigmas, self.guidance_scale) if self._has_guidance else None

    @functools.cached_property
    def latents_shift(self) -> float:
        return float(self.setting("vae", "shift_factor"))

    @functools.cached_property
    def latents_scale(self) -> float:
        return float(self.setting("vae", "scaling_factor"))

    @functools.cached_property
    def _has_guidance(self) -> bool:
        return bool(self.setting(self.component, "guidance_embeds"))

    def resolution_mu(self, image_seq_len: int) -> float:
        """The line of BFL's sampler: 0.5 for 256 image tokens, 1.15 for 4096 (`calculate_shift` in diffusers)."""
        return 0.00016927 * image_seq_len + 0.45666666

    def pipeline_class(self) -> Any:
        from diffusers import FluxPipeline

        return FluxPipeline

    def network_class(self) -> Any:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        path, config = self.pretrained_model_name_or_path, self.config(self.component)
        channels = config.get("out_channels") or config.get("in_channels")
        if channels != config.get("in_channels"):
            raise SciflowError(
                f"`pretrained_model_name_or_path` {path!r}: its network takes `in_channels` "
                f"{config.get('in_channels')} and returns `out_channels` {channels}, so it sees a second image (Fill, "
                f"Depth, Canny). `{self.name}` trains text-to-image networks such as FLUX.1-dev."
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

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The negative prompt counts only with `validation_true_cfg_scale` above 1."""
        return prompt | {f"negative_{name}": value for name, value in negative.items()}

    def call_options(self) -> dict[str, Any]:
        return {"true_cfg_scale": self.validation_true_cfg_scale} if self.validation_true_cfg_scale > 1 else {}

    def needs_negative_prompt(self) -> bool:
        return self.validation_true_cfg_scale > 1

    def check_negative_prompt(self, guidance_scale: float) -> None:
        """The embedded guidance has no second side: only true guidance has."""
        if self.validation_true_cfg_scale <= 1:
            raise SciflowError(
                f"`validation_negative_prompt` does nothing at `validation_true_cfg_scale` "
                f"{self.validation_true_cfg_scale:g}: `{self.name}` has its guidance embedded. Give more than 1 for "
                "true guidance, which takes twice the time, or leave the negative prompt out."
            )

    def encoder_settings(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "revision": self.revision,
            "max_sequence_length": self.max_sequence_length,
            "padding_side": "right",
            "posterior": self.posterior,
        }

    def bucket_step(self) -> int:
        return PATCH * 2 ** (len(self.setting("vae", "block_out_channels")) - 1)

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        missing = [key for key in ("latents", "prompt_embeds", "pooled_prompt_embeds") if key not in sample]
        if missing:
            raise SciflowError(f"a sample of `{self.name}` needs {missing}; it has {sorted(sample)}.")
        config, latents, prompt_embeds = model.config, sample["latents"], sample["prompt_embeds"]
        channels = config.in_channels // PATCH**2
        if latents.ndim != 3 or latents.shape[0] != channels or latents.shape[1] % PATCH or latents.shape[2] % PATCH:
            raise SciflowError(
                f"`latents` {tuple(latents.shape)}: `{self.name}` takes ({channels}, h, w) with even h and w, before "
                "packing. Was the cache built by another family or VAE?"
            )
        self.check_latent_extras(sample)
        widths = {"prompt_embeds": (2, config.joint_attention_dim)}
        widths["pooled_prompt_embeds"] = (1, config.pooled_projection_dim)
        for name, (ndim, width) in widths.items():
            if sample[name].ndim != ndim or sample[name].shape[-1] != width:
                raise SciflowError(
                    f"`{name}` {tuple(sample[name].shape)}: this network takes ({'L, ' * (ndim - 1)}{width}). Build "
                    "the cache with the model that you train."
                )
        if "txt_ids" in sample and not torch.equal(
            sample["txt_ids"].long(), text_ids(prompt_embeds.shape[0], prompt_embeds.device)
        ):
            raise SciflowError("`text_ids`: FLUX.1 takes (0, 0, 0) for every text token; the cache stores other ids.")


def pack(latents: torch.Tensor) -> torch.Tensor:
    """2x2 pixels become a token, in the order (c, ph, pw): (B, C, h, w) -> (B, h/2 * w/2, 4C)."""
    size, channels, height, width = latents.shape
    patches = latents.reshape(size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@functools.lru_cache(maxsize=256)
def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Rotary position ids (0, h, w) of the image tokens: (height * width, 3), int64, without a batch axis."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, height, width)))


def text_ids(length: int, device: torch.device) -> torch.Tensor:
    """(length, 3), int64: text tokens have no position of their own."""
    return torch.zeros(length, 3, dtype=torch.int64, device=device)


def token_ids(prompts: Sequence[str], tokenizer: Any, length: int) -> torch.Tensor:
    """(B, length): padded or cut; the end token stays."""
    ids: torch.Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
