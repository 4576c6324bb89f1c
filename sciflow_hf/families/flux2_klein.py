"""FLUX.2 [klein] base, 4B and 9B (Black Forest Labs): rectified flow on patchified, batch-normalised latents."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..diffusion.losses import flow_weight, sample_loss
from ..diffusion.randomness import randn, sample_keys
from ..errors import SciflowError
from ..options import arguments, option
from .base import LossArguments, PipelineFamily
from .loading import explain_loading, network_dtype

logger = logging.getLogger(__name__)

TEXT_ENCODER_LAYERS = (9, 18, 27)  # as the pipeline; diffusers' training script takes (10, 20, 30)
PATCH = 2


@arguments
class Flux2Klein(PipelineFamily):
    """FLUX.2 klein: `black-forest-labs/FLUX.2-klein-base-9B` or `-base-4B`.

    Train the base weights, not the distilled ones. `mini_klein`, a small one for figures, comes with this package.
    """

    heading: ClassVar[str] = "FLUX.2 klein"

    max_sequence_length: int = option(
        512,
        "Tokens of a prompt, chat template included. All of them, padding too, take part in attention: sample with the "
        "same length.",
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

        Batch: `latents` (B, 32, h, w) raw, `prompt_embeds` (B, L, D), perhaps `loss_mask` (B, h, w).
        Noise: (B, 128, h/2, w/2). Levels: sigmas.
        """
        latents = self.normalise(patchify(batch["latents"].float()))  # (B, 128, h/2, w/2)
        batch_size, _, height, width = latents.shape

        keys = sample_keys(batch, batch_size)
        if noise is None:
            noise = randn(keys, latents.shape, device=latents.device, draw_on_cpu=not model.training)
        if levels is None:
            levels = self.sample_levels(keys, args, image_seq_len=height * width, batch=batch)
        sigmas = levels.to(latents.device, non_blocking=True)
        sigma = sigmas.view(-1, 1, 1, 1)

        noisy_latents = (1 - sigma) * latents + sigma * noise

        dtype = network_dtype(model)
        prompt_embeds = batch["prompt_embeds"].to(dtype)
        model_pred = model(
            hidden_states=pack(noisy_latents).to(dtype),
            timestep=sigmas,  # the network multiplies by 1000 itself
            guidance=None,
            encoder_hidden_states=prompt_embeds,
            txt_ids=position_ids(1, 1, prompt_embeds.shape[1], batch_size, latents.device),
            img_ids=position_ids(height, width, 1, batch_size, latents.device),
            return_dict=False,
        )[0]

        target = pack(noise - latents)
        mask = batch.get("loss_mask")  # (B, h, w): every channel of a latent pixel counts alike
        mask = None if mask is None else pack(patchify(mask[:, None].expand_as(batch["latents"])))
        loss = sample_loss(model_pred, target, loss_type=args.loss_type, huber_delta=args.huber_delta, mask=mask)
        weight = flow_weight(sigmas, weighting_scheme=args.weighting_scheme, min_snr_gamma=args.min_snr_gamma)
        return weight * loss, sigmas

    name: ClassVar[str] = "flux2_klein"
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_k,to_q,to_v,to_out.0",
        "standard": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out",
        "full": "to_k,to_q,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
        "linear_in,linear_out,to_qkv_mlp_proj,attn.to_out",
    }

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4C, h, w): per channel by the running statistics of the VAE's batch norm, eps inside the root."""
        mean, std = self._statistics_on(latents.device)
        return (latents - mean) / std

    @functools.cached_property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        vae = self._load_vae()
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        return mean, std

    def _statistics_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._statistics[0].device != device:
            self.__dict__["_statistics"] = tuple(t.to(device) for t in self._statistics)
        return self._statistics

    def _load_vae(self) -> Any:
        from diffusers import AutoencoderKLFlux2

        with explain_loading(self.pretrained_model_name_or_path, "VAE"):
            return AutoencoderKLFlux2.from_pretrained(self.source, subfolder="vae", revision=self.revision)

    def pipeline_class(self) -> Any:
        from diffusers import Flux2KleinPipeline

        return Flux2KleinPipeline

    def network_class(self) -> Any:
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        if self.config().get("is_distilled", False):
            logger.warning(
                "`%s` is step-distilled: training moves it away from its few-step sampler. Train the base weights "
                "(FLUX.2-klein-base-*) and use the LoRA on the distilled ones if you like.",
                self.pretrained_model_name_or_path,
            )
        return super().load_model(dtype=dtype, meta=meta, quantize=quantize)

    def shorten_text_encoder(self, pipeline: Any) -> None:
        truncate(pipeline.text_encoder, max(TEXT_ENCODER_LAYERS))

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": prompt["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}

    # The pipeline's call takes no text.
    negative_argument: ClassVar[str] = (
        "negative_prompt_embeds=pipeline.encode_prompt({!r}, max_sequence_length={length})[0]"
    )

    def check_negative_prompt(self, guidance_scale: float) -> None:
        if self.config().get("is_distilled", False):
            raise SciflowError(
                f"`validation_negative_prompt`: {self.pretrained_model_name_or_path!r} is step-distilled and draws "
                "without guidance, so it takes no negative prompt. Leave it out, or train the base weights."
            )
        super().check_negative_prompt(guidance_scale)

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            prompt_embeds, text_ids = encoders.encode_prompt(
                list(prompts),
                max_sequence_length=self.max_sequence_length,
                text_encoder_out_layers=TEXT_ENCODER_LAYERS,
            )
        return {"prompt_embeds": prompt_embeds, "text_ids": text_ids}

    def encoder_settings(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "revision": self.revision,
            "max_sequence_length": self.max_sequence_length,
            "text_encoder_layers": list(TEXT_ENCODER_LAYERS),
            "padding_side": "right",
            **({"posterior": self.posterior} if self.posterior != "mode" else {}),
        }

    def bucket_step(self) -> int:
        return PATCH * 2 ** (len(self.setting("vae", "block_out_channels")) - 1)

    def resolution_mu(self, image_seq_len: int) -> float:
        """The line of BFL's sampler for many steps, `compute_empirical_mu` in diffusers; training has no steps."""
        return 0.00016927 * image_seq_len + 0.45666666

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        missing = [key for key in ("latents", "prompt_embeds") if key not in sample]
        if missing:
            raise SciflowError(f"a sample of `{self.name}` needs {missing}; it has {sorted(sample)}.")
        channels, dim = model.config.in_channels // PATCH**2, model.config.joint_attention_dim
        latents, prompt_embeds = sample["latents"], sample["prompt_embeds"]
        if latents.ndim != 3 or latents.shape[0] != channels or latents.shape[1] % PATCH or latents.shape[2] % PATCH:
            raise SciflowError(
                f"`latents` {tuple(latents.shape)}: `{self.name}` takes ({channels}, h, w) with even h and w, "
                "before patchify. Was the cache built by another family or VAE?"
            )
        self.check_latent_extras(sample)
        if prompt_embeds.ndim != 2 or prompt_embeds.shape[1] != dim:
            raise SciflowError(
                f"`prompt_embeds` {tuple(prompt_embeds.shape)}: this network takes (L, {dim}). klein 4B and 9B differ "
                "here: build the cache with the model that you train."
            )
        expected = position_ids(1, 1, prompt_embeds.shape[0], 1, latents.device)[0]
        if "txt_ids" in sample and not torch.equal(sample["txt_ids"], expected):
            raise SciflowError("`text_ids`: FLUX.2 takes (0, 0, 0, l) for text token l; the cache stores other ids.")


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """2x2 pixels become channels, in the order (c, ph, pw): (B, C, h, w) -> (B, 4C, h/2, w/2)."""
    batch_size, channels, height, width = latents.shape
    latents = latents.view(batch_size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return latents.permute(0, 1, 3, 5, 2, 4).reshape(batch_size, -1, height // PATCH, width // PATCH)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return latents.flatten(2).transpose(1, 2)


def truncate(text_encoder: Any, depth: int) -> None:
    """Takes away what hidden state `depth` of a Qwen3 does not need: the layers above, vocabulary projection, norm.

    The norm must go: a model's last hidden state is the normed one, an inner one is not.
    """
    text_encoder.model.layers = text_encoder.model.layers[:depth]
    text_encoder.model.norm = text_encoder.lm_head = torch.nn.Identity()
    text_encoder.config.num_hidden_layers = len(text_encoder.model.layers)
    text_encoder.config.layer_types = text_encoder.config.layer_types[:depth]


@functools.lru_cache(maxsize=256)
def _position_ids(height: int, width: int, length: int, device: torch.device) -> torch.Tensor:
    axes = [torch.arange(size, device=device) for size in (1, height, width, length)]
    return torch.cartesian_prod(*axes)


def position_ids(height: int, width: int, length: int, batch_size: int, device: torch.device) -> torch.Tensor:
    """Rotary position ids (t, h, w, l): (B, height * width * length, 4), int64; images (0,h,w,0), text (0,0,0,l)."""
    return _position_ids(height, width, length, device).expand(batch_size, -1, -1)
