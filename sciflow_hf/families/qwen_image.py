"""Qwen-Image (Alibaba Qwen team): rectified flow on the latents of a video VAE, text of any length under a mask."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import SciflowError
from ..options import arguments, option
from .base import PipelineFamily, network_dtype, posterior_option
from .tokens import PATCH, pack, token_counts, unpack

if TYPE_CHECKING:
    from PIL.Image import Image

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

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (B, 16, h, w). Batch: `prompt_embeds` (B, L, D), `prompt_embeds_mask` (B, L) of padded texts.

        And `source_latents` (B, 16, h, w) of edits, for `qwen_image_edit`.
        """
        dtype, (height, width) = network_dtype(model), noisy_latents.shape[2:]
        images = [noisy_latents, *self.clean_sources(batch)]
        shapes = [(1, image.shape[2] // PATCH, image.shape[3] // PATCH) for image in images]
        tokens = model(
            hidden_states=torch.cat([pack(image) for image in images], dim=1).to(dtype),
            timestep=levels,  # the network multiplies by 1000 itself
            encoder_hidden_states=batch["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=batch.get("prompt_embeds_mask"),
            img_shapes=[shapes] * len(noisy_latents),  # the positions follow from them
            return_dict=False,
        )[0][:, : self.image_seq_len(noisy_latents)]
        return unpack(tokens.float(), height, width)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """2x2 patches as tokens: (B, C, h, w) -> (B, h/2 * w/2, 4C)."""
        return pack(latents)

    def clean_latents(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, 16, h, w), without the video VAE's axis of frames, which a batch may have."""
        latents = batch["latents"]
        return self.normalise((latents.squeeze(2) if latents.ndim == 5 else latents).float())

    name: ClassVar[str] = "qwen_image"
    patch: ClassVar[int] = PATCH
    text_settings: ClassVar[dict[str, Any]] = {"text_encoder_layers": [-1], "padding_side": "none"}
    unnamed_posterior: ClassVar[str] = "mode"
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
        """(B, C, h, w): per channel by the statistics in the VAE's configuration."""
        mean, std = self.statistics_on(latents.device)
        return (latents - mean) / std

    @functools.cached_property
    def statistics(self) -> tuple[torch.Tensor, ...]:
        """`latents_mean` and `latents_std` of the VAE's configuration, (1, 16, 1, 1)."""
        config = self.config("vae")
        for name in ("latents_mean", "latents_std"):
            if len(config.get(name) or []) != config.get("z_dim"):
                raise SciflowError(
                    f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r}: the configuration of "
                    f"its VAE has `z_dim` {config.get('z_dim')} and {len(config.get(name) or [])} numbers in `{name}`. "
                    "Qwen-Image needs one a channel; is this an AutoencoderKLQwenImage?"
                )
        return tuple(torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))

    def pipeline_class(self) -> Any:
        """`QwenImagePipeline`."""
        from diffusers import QwenImagePipeline

        return QwenImagePipeline

    def network_class(self) -> Any:
        """`QwenImageTransformer2DModel`."""
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        """Refuses networks of other pipelines that take further inputs; see `PipelineFamily.load_model`."""
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

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int] | None:
        """Tokens of each prompt after those of the template, and how many of them are read."""
        pipe, texts = self.tokenizers, map(self.tokenizers.prompt_template_encode.format, prompts)
        return token_counts(texts, pipe.tokenizer, pipe.prompt_template_encode_start_idx), self.max_sequence_length

    def needs_negative_prompt(self) -> bool:
        """True: the pipeline has guidance only with a negative prompt."""
        return True

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Embeddings and masks of both prompts, (1, l, D) and (1, l), without padding."""
        (embeds, mask), (negative_embeds, negative_mask) = without_padding(prompt), without_padding(negative)
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": negative_embeds,
            "negative_prompt_embeds_mask": negative_mask,
        }

    def generate(
        self, pipeline: Any, prompt_inputs: dict[str, torch.Tensor], *, guidance_scale: float, **options: Any
    ) -> list["Image"]:
        """Passes the negative prompt if there is guidance, and `max_sequence_length`, at which the pipeline cuts."""
        inputs = {n: value for n, value in prompt_inputs.items() if guidance_scale > 1 or not n.startswith("negative_")}
        options |= {"max_sequence_length": self.max_sequence_length, "callback_on_step_end": None}
        return super().generate(pipeline, inputs, guidance_scale=guidance_scale, **options)

    def bucket_step(self) -> int:
        """Pixels: 2x2 patches of a VAE that halves three times, 16."""
        return PATCH * 2 ** len(self.setting("vae", "temperal_downsample"))

    def resolution_mu(self, image_seq_len: int) -> float:
        """The line of the pipeline's scheduler: from 0.5 at 256 to 0.9 at 8192 tokens in the published one."""
        return self.scheduler_line(image_seq_len)

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents and width of the text."""
        return {"latents": config.in_channels // PATCH**2, "prompt_embeds": config.joint_attention_dim}

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """As `PipelineFamily.check_sample`; latents may have the axis of frames, a mask one value a token."""
        framed = [name for name in ("latents", "latents_std") if name in sample and sample[name].shape[1:-2] == (1,)]
        super().check_sample(model, sample | {name: sample[name].squeeze(1) for name in framed})
        tokens, mask = len(sample["prompt_embeds"]), sample.get("prompt_embeds_mask")
        if mask is not None and (tuple(mask.shape) != (tokens,) or not mask.any()):
            raise SciflowError(f"`prompt_embeds_mask` {tuple(mask.shape)}: one value a token, ({tokens},), not all 0.")


def without_padding(row: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (1, l, D) of one prompt's own tokens, and their mask, all ones."""
    embeds, mask = row["prompt_embeds"], row.get("prompt_embeds_mask")
    embeds = embeds if mask is None else embeds[:, mask[0].bool()]
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
