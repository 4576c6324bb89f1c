"""Qwen-Image (Alibaba Qwen team): rectified flow on the latents of a video VAE, text of any length under a mask."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diffusion.losses import flow_weight, sample_loss
from ..diffusion.randomness import randn, sample_keys
from ..errors import SciflowError
from ..options import arguments, option
from .base import LossArguments, PipelineFamily, posterior_option
from .loading import network_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH = 2
MAX_TEXT_LENGTH = 1024  # what the pipeline allows
# Networks of other pipelines of the family that take further inputs, and what these are.
_OTHER_NETWORKS = {
    "guidance_embeds": "a guidance embedding, which diffusers' network does not have",
    "use_additional_t_cond": "a second timestep condition (Qwen-Image-Layered)",
    "use_layer3d_rope": "positions of several layers (Qwen-Image-Layered)",
}


@arguments
class QwenImage(PipelineFamily):
    """Qwen-Image: `Qwen/Qwen-Image` or `Qwen/Qwen-Image-2512`."""

    heading: ClassVar[str] = "Qwen-Image"

    posterior: str = posterior_option("sample")  # as in the published training
    max_sequence_length: int = option(
        512,
        "Tokens of a prompt, after the 34 of the template; longer prompts are cut. Shorter ones are stored as they are "
        "and share a batch, so this length does not change what short prompts learn.",
        within=f"[1, {MAX_TEXT_LENGTH}]",
        advice="Qwen-Image takes no other number of tokens.",
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

        Batch: `latents` (B, 16, 1, h, w) or (B, 16, h, w) raw, `prompt_embeds` (B, L, D), `prompt_embeds_mask` (B, L)
        where texts are padded, perhaps `loss_mask` (B, h, w). Noise: (B, 16, 1, h, w). Levels: sigmas.
        """
        latents = self.normalise(with_frame(batch["latents"].float()))  # (B, 16, 1, h, w)
        batch_size, _, _, height, width = latents.shape
        tokens = (1, height // PATCH, width // PATCH)

        keys = sample_keys(batch, batch_size)
        if noise is None:
            noise = randn(keys, latents.shape, device=latents.device, draw_on_cpu=not model.training)
        noise = with_frame(noise)
        if levels is None:
            levels = self.sample_levels(keys, args, image_seq_len=tokens[1] * tokens[2], batch=batch)
        sigmas = levels.to(latents.device, non_blocking=True)
        sigma = sigmas.view(-1, 1, 1, 1, 1)

        noisy_latents = (1 - sigma) * latents + sigma * noise

        dtype = network_dtype(model)
        model_pred = model(
            hidden_states=pack(noisy_latents).to(dtype),
            timestep=sigmas,  # the network multiplies by 1000 itself
            encoder_hidden_states=batch["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=batch.get("prompt_embeds_mask"),
            img_shapes=[[tokens]] * batch_size,  # the positions follow from them
            return_dict=False,
        )[0]

        target = pack(noise - latents)
        mask = batch.get("loss_mask")  # (B, h, w): every channel of a latent pixel counts alike
        mask = None if mask is None else pack(mask[:, None, None].expand_as(latents))
        loss = sample_loss(model_pred, target, loss_type=args.loss_type, huber_delta=args.huber_delta, mask=mask)
        weight = flow_weight(sigmas, weighting_scheme=args.weighting_scheme, min_snr_gamma=args.min_snr_gamma)
        return weight * loss, sigmas

    name: ClassVar[str] = "qwen_image"
    pads_text: ClassVar[bool] = True
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    no_prompt: ClassVar[str] = " "  # as the model's own examples have it
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_q,to_k,to_v,to_out.0",
        "standard": "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out",
        "full": "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,"
        "img_mlp.net.0.proj,img_mlp.net.2,txt_mlp.net.0.proj,txt_mlp.net.2",
    }

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, 1, h, w): per channel by the statistics in the VAE's configuration."""
        mean, std = self._statistics_on(latents.device)
        return (latents - mean) / std

    @functools.cached_property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config("vae")
        found = [torch.tensor(config.get(name) or []) for name in ("latents_mean", "latents_std")]
        channels = config.get("z_dim")
        for name, values in zip(("latents_mean", "latents_std"), found, strict=True):
            if values.shape != (channels,):
                raise SciflowError(
                    f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r}: the configuration of "
                    f"its VAE has `z_dim` {channels} and {values.numel()} numbers in `{name}`. Qwen-Image needs one "
                    "a channel; is this an AutoencoderKLQwenImage?"
                )
        mean, std = (values.view(1, -1, 1, 1, 1) for values in found)
        return mean, std

    def _statistics_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._statistics[0].device != device:
            self.__dict__["_statistics"] = tuple(t.to(device) for t in self._statistics)
        return self._statistics

    def pipeline_class(self) -> Any:
        from diffusers import QwenImagePipeline

        return QwenImagePipeline

    def network_class(self) -> Any:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        config = self.config(self.component)
        where = f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r}"
        for name, what in _OTHER_NETWORKS.items():
            if config.get(name):
                raise SciflowError(f"{where}: `{name}` in its {self.component}'s configuration asks for {what}.")
        return super().load_model(dtype=dtype, meta=meta, quantize=quantize)

    def idle_layers(self, model: Any) -> tuple[str, ...]:
        """The last block's text branch after its keys and values: what it makes is read by nothing."""
        last = f"transformer_blocks.{model.config.num_layers - 1}"
        return tuple(f"{last}.{end}" for end in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Without vision tower and vocabulary projection: 16.6 -> 14.1 GB in 16 bit, and no logits (L, 152064)."""
        pipeline.text_encoder.model.visual = pipeline.text_encoder.lm_head = torch.nn.Identity()

    def encode_images(self, pixel_values: torch.Tensor, encoders: Any) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> `latents` (B, 16, h, w), raw: the one frame has no axis in a cache."""
        encoded = super().encode_images(pixel_values.unsqueeze(2), encoders)
        return {name: value.squeeze(2) for name, value in encoded.items()}

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """`prompt_embeds` (B, L, D), padded with zeros to the longest, and where any is padded its mask (B, L)."""
        with torch.no_grad():
            prompt_embeds, mask = encoders.encode_prompt(list(prompts), max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": prompt_embeds} | ({} if mask is None else {"prompt_embeds_mask": mask})

    def needs_negative_prompt(self) -> bool:
        return True

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        (embeds, mask), (negative_embeds, negative_mask) = without_padding(prompt), without_padding(negative)
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": negative_embeds,
            "negative_prompt_embeds_mask": negative_mask,
        }

    def generate(
        self,
        pipeline: Any,
        prompt_inputs: dict[str, torch.Tensor],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> list["Image"]:
        """The negative prompt goes along where there is guidance; the pipeline cuts at `max_sequence_length`, too."""
        device, dtype = next(pipeline.transformer.parameters()).device, network_dtype(pipeline.transformer)
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in prompt_inputs.items()
            if guidance_scale > 1 or not name.startswith("negative_")
        }
        images: list[Image] = pipeline(
            **inputs,
            **{self.guidance_argument: guidance_scale},
            max_sequence_length=self.max_sequence_length,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            generator=generator,
        ).images
        return images

    def encoder_settings(self) -> dict[str, Any]:
        return {
            "family": self.name,
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "revision": self.revision,
            "max_sequence_length": self.max_sequence_length,
            "text_encoder_layers": [-1],
            "padding_side": "none",
            **({"posterior": self.posterior} if self.posterior != "mode" else {}),
        }

    def bucket_step(self) -> int:
        return PATCH * 2 ** len(self.setting("vae", "temperal_downsample"))

    @functools.cached_property
    def _shift_line(self) -> tuple[float, float]:
        """(slope, mu at 0 tokens) of the line through the scheduler's two points; diffusers' where it names none."""
        config = self.config("scheduler")
        base_length, max_length = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (max_shift - base_shift) / (max_length - base_length)
        return slope, base_shift - slope * base_length

    def resolution_mu(self, image_seq_len: int) -> float:
        """The pipeline's shift: from 0.5 at 256 to 0.9 at 8192 tokens in the published scheduler."""
        slope, start = self._shift_line
        return slope * image_seq_len + start

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        missing = [key for key in ("latents", "prompt_embeds") if key not in sample]
        if missing:
            raise SciflowError(f"a sample of `{self.name}` needs {missing}; it has {sorted(sample)}.")
        channels, dim = model.config.in_channels // PATCH**2, model.config.joint_attention_dim
        shape, prompt_embeds = tuple(sample["latents"].shape), sample["prompt_embeds"]
        frames = shape[1:-2]  # none, or one
        if len(shape) < 3 or shape[0] != channels or frames not in ((), (1,)) or shape[-2] % PATCH or shape[-1] % PATCH:
            raise SciflowError(
                f"`latents` {shape}: `{self.name}` takes ({channels}, h, w) or ({channels}, 1, h, w) with even h and "
                "w, before packing. Was the cache built by another family or VAE?"
            )
        self.check_latent_extras(sample)
        if prompt_embeds.ndim != 2 or prompt_embeds.shape[1] != dim:
            raise SciflowError(
                f"`prompt_embeds` {tuple(prompt_embeds.shape)}: this network takes (L, {dim}). Build the cache with "
                "the model that you train."
            )
        mask = sample.get("prompt_embeds_mask")
        if mask is not None and (tuple(mask.shape) != tuple(prompt_embeds.shape[:1]) or not mask.any()):
            raise SciflowError(
                f"`prompt_embeds_mask` {tuple(mask.shape)}: one value a token, ({prompt_embeds.shape[0]},), not all 0."
            )


def with_frame(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, 1, h, w); the video VAE's own shape stays as it is."""
    return latents.unsqueeze(2) if latents.ndim == 4 else latents


def pack(latents: torch.Tensor) -> torch.Tensor:
    """2x2 pixels become channels, in the order (c, ph, pw): (B, C, 1, h, w) -> (B, h/2 * w/2, 4C)."""
    batch_size, channels, _, height, width = latents.shape
    latents = latents.reshape(batch_size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, channels * PATCH**2)


def without_padding(row: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (1, l, D) of one prompt's own tokens, and their mask, all ones."""
    embeds, mask = row["prompt_embeds"], row.get("prompt_embeds_mask")
    embeds = embeds if mask is None else embeds[:, mask[0].bool()]
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
