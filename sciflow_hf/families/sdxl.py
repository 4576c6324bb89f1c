"""Stable Diffusion XL (Podell et al. 2023): DDPM with a UNet on scaled latents, told of sizes and crops."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..diffusion import objectives
from ..diffusion.arguments import LevelArguments
from ..diffusion.process import GivenSchedule, TimestepLevels
from ..errors import SciflowError
from ..options import arguments, option
from .base import PipelineFamily, network_dtype, part_option, posterior_option

logger = logging.getLogger(__name__)

PIPELINE_STEP = 8  # pixels: the pipeline takes no other heights and widths
TIME_IDS = ("original height", "original width", "crop top", "crop left", "height", "width")


@arguments
class SDXL(TimestepLevels, PipelineFamily):
    """Stable Diffusion XL, `stabilityai/stable-diffusion-xl-base-1.0` or fine-tuned ones.

    They predict epsilon or v, as the checkpoint's scheduler says.

    Timesteps are integers, drawn uniformly, and the loss has weight 1 or `--min_snr_gamma`'s: the densities, weights
    and shifts of flow matching have no meaning here. `--weighting_scheme none` says so; its default, logit_normal,
    is passed over with a warning, any other value is refused, and so is a number for `--timestep_shift`.
    """

    heading: ClassVar[str] = "Stable Diffusion XL"

    posterior: str = posterior_option("sample")  # as in the published training
    text_encoder_2_name_or_path: str | None = part_option("second text encoder")
    max_sequence_length: int = option(
        77,
        "Tokens of a prompt, at most the 77 that the text encoders read. Fewer mean less padding, which takes part in "
        "attention: the pipeline's own encoding always has 77.",
        within="[1, inf)",
    )

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The noise, or v = sqrt(a) noise - sqrt(1 - a) latents, as the checkpoint's scheduler says: (B, 4, h, w).

        Batch: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P), perhaps `time_ids` (B, 6).
        """
        dtype = network_dtype(model)
        prediction: torch.Tensor = model(
            sample=noisy_latents.to(dtype),
            timestep=levels,
            return_dict=False,
            **self.text_inputs(batch, dtype),
        )[0]
        return prediction.float()

    def text_arguments(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Embeddings (B, L, D) of both CLIPs, the pooled one (B, P) and `time_ids` (B, 6), float32."""
        return {
            "encoder_hidden_states": batch["prompt_embeds"].to(dtype),
            "added_cond_kwargs": {
                "text_embeds": batch["pooled_prompt_embeds"].to(dtype),
                "time_ids": self.time_ids(batch).float(),  # 1024 + 1 is 1024 in bfloat16
            },
        }

    name: ClassVar[str] = "sdxl"
    prompt_tokenizer: ClassVar[str] = "tokenizer"
    trained_text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    idle_text_layers: ClassVar[dict[str, int]] = {"text_encoder": 1}  # its penultimate state alone is read
    component: ClassVar[str] = "unet"
    stores_time_ids: ClassVar[bool] = True
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    # standard: all of the attention blocks, which kohya's scripts train; full: also the convolutions.
    lora_presets: ClassVar[dict[str, str]] = {
        "attention": "to_k,to_q,to_v,to_out.0",
        "standard": "to_k,to_q,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2",
        "full": "to_k,to_q,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,"
        "conv1,conv2,conv_shortcut,time_emb_proj,downsamplers.0.conv,upsamplers.0.conv",
    }

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w): times the VAE's scaling factor, after its mean and deviation per channel where it has them."""
        if self.statistics:
            mean, std = self.statistics_on(latents.device)
            latents = (latents - mean) / std
        return latents * self._vae_config["scaling_factor"]

    @functools.cached_property
    def statistics(self) -> tuple[torch.Tensor, ...]:
        """`latents_mean` and `latents_std` of the VAE, (1, 4, 1, 1); () where it has none."""
        found = [self._vae_config.get(name) for name in ("latents_mean", "latents_std")]
        return () if None in found else tuple(torch.tensor(values).view(1, -1, 1, 1) for values in found)

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, (1, 4, 1, 1), with the scaling factor."""
        mean, std = super().latent_statistics()
        return (mean, std / self._vae_config["scaling_factor"]) if self.statistics else (mean, std)

    def time_ids(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, 6) in pixels: original height and width, top and left of the crop, height and width.

        A batch without has images that were neither resized nor cropped.
        """
        if "time_ids" in batch:
            return batch["time_ids"]
        latents, scale = batch["latents"], self.pixels_per_latent
        height, width = (side * scale for side in latents.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width])
        return ids.to(latents.device, non_blocking=True).expand(len(latents), -1)

    # -- the noise schedule ----------------------------------------------------------------------------------------

    def sample_levels(
        self,
        keys: torch.Tensor,
        args: LevelArguments,
        image_seq_len: int,
        batch: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Timesteps (B,), int64, uniform from the keys; refuses densities and shifts of flow matching."""
        check_density(args.weighting_scheme, args.timestep_shift)
        return super().sample_levels(keys, args, image_seq_len, batch)

    @functools.cached_property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample."""
        kind: str = self.setting("scheduler", "prediction_type")
        if kind not in objectives.PREDICTION_TYPES:
            raise self._cannot("scheduler", "prediction_type", kind, objectives.PREDICTION_TYPES)
        return kind

    @functools.cached_property
    def process(self) -> GivenSchedule:
        """DDPM by the scheduler's configuration, whatever its class."""
        config = self.config("scheduler")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        else:
            schedule = self.setting("scheduler", "beta_schedule")
            if schedule not in objectives.BETA_SCHEDULES:
                raise self._cannot("scheduler", "beta_schedule", schedule, objectives.BETA_SCHEDULES)
            betas = objectives.beta_schedule(
                schedule,
                self.setting("scheduler", "num_train_timesteps"),
                beta_start=self.setting("scheduler", "beta_start"),
                beta_end=self.setting("scheduler", "beta_end"),
            )
        alpha_bar = objectives.alphas_cumprod(betas, zero_terminal_snr=config.get("rescale_betas_zero_snr", False))
        return GivenSchedule(alpha_bar, self.prediction_type)

    # -- the checkpoint --------------------------------------------------------------------------------------------

    def _cannot(self, part: str, name: str, value: Any, allowed: Sequence[Any]) -> SciflowError:
        return SciflowError(
            f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r}: `{name}` in its {part} "
            f"configuration is {value!r}, but `{self.name}` takes {' or '.join(map(repr, allowed))}."
        )

    @functools.cached_property
    def _vae_config(self) -> dict[str, Any]:
        vae = self.config("vae")
        if vae.get("shift_factor") is not None:  # the pipeline would decode without it
            raise self._cannot("vae", "shift_factor", vae["shift_factor"], (None,))
        return vae | {"scaling_factor": self.setting("vae", "scaling_factor")}

    @functools.cached_property
    def pixels_per_latent(self) -> int:
        """Side of a latent in pixels: the VAE's halvings, without those of the UNet."""
        return 2 ** (len(self.setting("vae", "block_out_channels")) - 1)

    def pipeline_class(self) -> Any:
        """`StableDiffusionXLPipeline`."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    def network_class(self) -> Any:
        """`UNet2DConditionModel`."""
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    def _check_kind(self) -> None:
        """Refuses relatives of SDXL: the refiner, inpainting networks (9 channels), UNets that take no sizes."""
        if self.config().get("requires_aesthetics_score", False):
            raise self._cannot("pipeline", "requires_aesthetics_score", True, (False,))
        channels = self.setting("vae", "latent_channels")
        for name, allowed in (("addition_embed_type", "text_time"), ("in_channels", channels)):
            value = self.setting("unet", name)
            if value != allowed:
                raise self._cannot("unet", name, value, (allowed,))

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        """Refuses relatives of SDXL, such as the refiner; see `PipelineFamily.load_model`."""
        self._check_kind()
        kind, steps = self.prediction_type, self.process.num_train_timesteps
        scale = self._vae_config["scaling_factor"]
        logger.info("The network predicts %s at %d timesteps; latents are scaled by %g.", kind, steps, scale)
        return super().load_model(dtype=dtype, meta=meta, quantize=quantize)

    def load_encoders(
        self, *, device: torch.device | str, dtype: torch.dtype, images: bool = True, text: bool = True
    ) -> Any:
        """VAE, in float32 where its configuration says so, and both text encoders, frozen."""
        self._check_kind()
        dtypes: Any = dtype
        if images and self.config("vae").get("force_upcast", True):  # its activations overflow in float16
            dtypes = {"default": dtype, "vae": torch.float32}
        pipeline = super().load_encoders(device=device, dtype=dtypes, images=images, text=text)
        if text:
            self._set_length(pipeline)
        return pipeline

    def _set_length(self, pipeline: Any) -> None:
        """The prompts' length, which the pipeline takes from its tokenizers."""
        tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        longest = min(tokenizer.model_max_length for tokenizer in tokenizers)
        if not 3 <= self.max_sequence_length <= longest:
            raise SciflowError(
                f"`max_sequence_length` {self.max_sequence_length}: the text encoders of this checkpoint read 3 to "
                f"{longest} tokens."
            )
        for tokenizer in tokenizers:
            tokenizer.model_max_length = self.max_sequence_length

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """`prompt_embeds` (B, L, D), both CLIPs side by side, and the second's `pooled_prompt_embeds` (B, P)."""
        prompt_embeds, _, pooled_prompt_embeds, _ = encoders.encode_prompt(
            list(prompts), do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def load_pipeline(self, model: torch.nn.Module | None = None, **options: Any) -> Any:
        """As `PipelineFamily.load_pipeline`; the VAE decodes in its own dtype."""
        pipeline = super().load_pipeline(model, **options)
        vae, decode = pipeline.vae, pipeline.vae.decode
        # In mixed precision the network answers in float32, and the pipeline gives that to a bfloat16 VAE.
        vae.decode = lambda latents, **options: decode(latents.to(vae.dtype), **options)
        return pipeline

    def unconditional(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Guidance away from nothing: zeros where the pipeline is set to `force_zeros_for_empty_prompt`, as SDXL is."""
        zeros = self.config().get("force_zeros_for_empty_prompt", True)
        return {name: torch.zeros_like(value) if zeros else value for name, value in row.items()}

    def bucket_step(self) -> int:
        """Multiple of the images' sides in pixels: 32, because the UNet also halves the latents."""
        halvings = len(self.setting("unet", "block_out_channels")) - 1
        return max(self.pixels_per_latent * 2**halvings, PIPELINE_STEP)

    def widths(self, config: Any) -> dict[str, int]:
        """Channels of the latents, widths of both text encoders together and of the pooled text."""
        pooled = config.projection_class_embeddings_input_dim - len(TIME_IDS) * config.addition_time_embed_dim
        return {
            "latents": config.in_channels,
            "prompt_embeds": config.cross_attention_dim,  # both text encoders side by side
            "pooled_prompt_embeds": pooled,  # of the second
        }

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """As `PipelineFamily.check_sample`; warns where `time_ids` are missing."""
        super().check_sample(model, sample)
        if "time_ids" not in sample:
            logger.warning(
                "This cache has no `time_ids`: every image counts as one that was neither resized nor cropped. "
                "`sciflow-hf cache build` stores them."
            )
        elif tuple(sample["time_ids"].shape) != (len(TIME_IDS),):
            raise SciflowError(
                f"`time_ids` {tuple(sample['time_ids'].shape)}: `{self.name}` takes ({len(TIME_IDS)},) numbers, "
                f"{', '.join(TIME_IDS)}."
            )


@functools.cache  # a warning a process is enough
def check_density(weighting_scheme: str, timestep_shift: str) -> None:
    """Refuses what belongs to flow matching; its default, logit_normal, is passed over with a warning."""
    if weighting_scheme not in ("none", "logit_normal"):
        raise SciflowError(
            f"`weighting_scheme` {weighting_scheme!r} is for flow matching. `sdxl` draws timesteps uniformly: use "
            "none, with `--min_snr_gamma 5` if the loss is to have a weight."
        )
    if timestep_shift not in ("none", "resolution"):
        raise SciflowError(
            f"`timestep_shift` {timestep_shift!r} is for flow matching. `sdxl` takes the noise schedule of its "
            "checkpoint as it is: use none."
        )
    if weighting_scheme == "logit_normal":
        logger.warning(
            "`weighting_scheme` logit_normal, the default, is for flow matching: `sdxl` draws timesteps uniformly. "
            "`--weighting_scheme none` says the same without this warning."
        )
