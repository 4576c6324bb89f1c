"""The contract of a model family: how one kind of network is loaded, encoded for, trained and sampled."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diffusion import timesteps
from ..diffusion.randomness import uniform
from ..errors import SciflowError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..training_args import DiffusionTrainingArguments


logger = logging.getLogger(__name__)

POSTERIORS = ("mode", "sample")


@dataclass
class ModelFamily(ABC):
    """One model family. The fields are its command-line flags; the methods are all that the rest needs of it.

    Args:
        pretrained_model_name_or_path: folder or Hub repository in diffusers layout.
        revision: branch, tag or commit of the Hub repository.
        posterior: "mode" stores the mean of the VAE's posterior as latents; "sample" its standard deviation, too
            (twice the bytes of the latents), and training draws a fresh latent per step.
    """

    pretrained_model_name_or_path: str = field(
        metadata={"help": "Folder or Hub repository of the pipeline, in diffusers layout."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})
    posterior: str = field(
        default="mode", metadata={"help": "Latents of training: mode (the VAE's mean), or sample (drawn each step)."}
    )

    name: ClassVar[str]
    """Command-line name; equals the file name."""
    component: ClassVar[str] = "transformer"
    """Name of the trained network in the pipeline: prefix of LoRA keys, subfolder of full checkpoints."""
    pads_text: ClassVar[bool] = False
    """False: text of different lengths never shares a batch. True: padded to the longest, with a mask."""
    stores_time_ids: ClassVar[bool] = False
    """True: a cache has `time_ids` (6,) for each sample: original size, crop, size (see `build_cache`)."""
    from_scratch: ClassVar[bool] = False
    """True where the initial weights are random, so that there is no base model to compare with."""
    lora_presets: ClassVar[dict[str, str]] = {}
    """Names for `--lora_layers`, each a comma list of layer names."""

    def __post_init__(self) -> None:
        if self.posterior not in POSTERIORS:
            raise SciflowError(f"`posterior` {self.posterior!r}: use one of {', '.join(POSTERIORS)}.")

    @abstractmethod
    def compute_loss(
        self,
        model: torch.nn.Module,
        batch: dict[str, torch.Tensor],
        args: "DiffusionTrainingArguments",
        *,
        noise: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One training step: (loss (B,), levels (B,)), both float32. Calls `model` exactly once.

        Args:
            model: the network, possibly wrapped (DDP, compile, PEFT).
            batch: collated samples; `noise_key` (B,) int64 where the loader gave keys; `loss_mask` (B, h, w) where
                the elements of the latents do not count alike.
            noise: shape of the normalised latents; drawn from the keys unless given.
            levels: final noise levels (B,), after any shift; drawn from the keys unless given.
        """

    @abstractmethod
    def load_model(self, *, dtype: torch.dtype, meta: bool = False) -> torch.nn.Module:
        """The network to train, in `dtype`; with `meta` without weights, for `--dry_run`."""

    @abstractmethod
    def load_encoders(
        self, *, device: torch.device | str, dtype: torch.dtype, images: bool = True, text: bool = True
    ) -> Any:
        """VAE (with `images`) and text encoder (with `text`), frozen: for building caches."""

    def load_text_encoder(self, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """What `encode_prompts` needs and no more, for encoding prompts in training."""
        return self.load_encoders(device=device, dtype=dtype, images=False)

    @abstractmethod
    def encode_images(self, pixel_values: torch.Tensor, encoders: Any) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> what a cache stores of them."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """Prompts -> `prompt_embeds` (B, L, D) and the family's extras."""

    @abstractmethod
    def encoder_settings(self) -> dict[str, Any]:
        """What the content of a cache depends on, as plain JSON values."""

    @abstractmethod
    def bucket_step(self) -> int:
        """Height and width of images must be multiples of this many pixels."""

    @abstractmethod
    def pipeline_class(self) -> Any:
        """The diffusers pipeline of this family."""

    @abstractmethod
    def load_pipeline(
        self,
        model: torch.nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        with_text_encoder: bool = False,
    ) -> Any:
        """A diffusers pipeline around `model` itself (no copy)."""

    @abstractmethod
    def encode_validation_prompts(
        self, prompts: Sequence[str], *, device: torch.device | str, dtype: torch.dtype
    ) -> list[dict[str, torch.Tensor]]:
        """Text inputs of `generate`, one dict a prompt; the encoders are freed before it returns."""

    @abstractmethod
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
        """Images of one prompt."""

    @abstractmethod
    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """Raises SciflowError where a sample does not fit the network (channels, text width, ids)."""

    def idle_layers(self, model: Any) -> tuple[str, ...]:
        """Paths of layers whose output is read by nothing: without a gradient, so neither adapted nor trained."""
        return ()

    def posterior_tensors(self, distribution: Any) -> dict[str, torch.Tensor]:
        """What a cache stores of diffusers' `DiagonalGaussianDistribution`: (B, C, h, w) each.

        `latents`, its mean, and with `posterior="sample"` `latents_std`, its standard deviation.
        """
        mean = {"latents": distribution.mode()}
        return mean | {"latents_std": distribution.std} if self.posterior == "sample" else mean

    def check_latent_extras(self, sample: dict[str, torch.Tensor]) -> None:
        """Raises SciflowError where `latents_std` is missing or does not fit `latents`, or `loss_mask` does not."""
        latents = tuple(sample["latents"].shape)
        if self.posterior == "sample" and "latents_std" not in sample:
            raise SciflowError(
                "`posterior` 'sample': this cache holds no standard deviation (`latents_std`). Build it again by "
                "`sciflow-hf cache build --posterior sample`, or train on the mode."
            )
        for name, expected in (("latents_std", latents), ("loss_mask", latents[-2:])):
            if name in sample and tuple(sample[name].shape) != expected:
                raise SciflowError(f"`{name}` {tuple(sample[name].shape)}: `latents` {latents} need {expected}.")

    def resolution_mu(self, image_seq_len: int) -> float:
        """Logarithm of the resolution-dependent shift for that many image tokens; 0 where a family has none."""
        return 0.0

    def sample_levels(self, keys: torch.Tensor, args: "DiffusionTrainingArguments", image_seq_len: int) -> torch.Tensor:
        """Noise levels of a batch, after the shift: sigmas in [0, 1], (B,), float32, on the CPU."""
        u = uniform(keys, stream="level")
        if args.weighting_scheme == "logit_normal":
            sigmas = timesteps.logit_normal_density(u, logit_mean=args.logit_mean, logit_std=args.logit_std)
        elif args.weighting_scheme == "mode":
            sigmas = timesteps.mode_density(u, mode_scale=args.mode_scale)
        else:
            sigmas = timesteps.uniform_density(u)
        return timesteps.shift_sigmas(sigmas, self.shift_mu(args, image_seq_len)).float()

    def shift_mu(self, args: "DiffusionTrainingArguments", image_seq_len: int) -> float:
        """mu of `--timestep_shift`: "resolution" asks the family, "none" is 0, a number is the shift e^mu."""
        if args.timestep_shift == "resolution":
            return self.resolution_mu(image_seq_len)
        return 0.0 if args.timestep_shift == "none" else math.log(float(args.timestep_shift))

    def level_range(self) -> float:
        """The level of pure noise, by which logs divide levels: 1 for sigmas, the timesteps for DDPM."""
        return 1.0

    def evaluation_levels(self, num_levels: int) -> torch.Tensor:
        """The fixed grid of `eval_loss`, (num_levels,); the same in every run."""
        return timesteps.level_grid(num_levels)


@dataclass
class PipelineFamily(ModelFamily):
    """A family whose parts diffusers loads and saves as one pipeline folder. Its files name the classes."""

    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """Parts of the pipeline that encode prompts."""

    @abstractmethod
    def network_class(self) -> Any:
        """The diffusers class of the trained network."""

    def config(self, subfolder: str = "") -> dict[str, Any]:
        """The configuration of one part of the pipeline ("vae", "transformer", "scheduler"), or of the pipeline."""
        from diffusers import ConfigMixin

        with explain_loading(self.pretrained_model_name_or_path, f"{subfolder or 'pipeline'} configuration"):
            names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
            reader: Any = type("Reader", (ConfigMixin,), {"config_name": names.get(subfolder, "config.json")})
            found: dict[str, Any] = reader.load_config(
                self.pretrained_model_name_or_path, subfolder=subfolder or None, revision=self.revision
            )
            return found

    def setting(self, part: str, name: str) -> Any:
        """A value of the configuration of one part; SciflowError where the checkpoint does not say it."""
        value = self.config(part).get(name)
        if value is None:
            raise SciflowError(
                f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r}: the configuration of its "
                f"{part} has no `{name}`, which `{self.name}` needs. Is it another kind of model?"
            )
        return value

    def load_model(self, *, dtype: torch.dtype, meta: bool = False) -> torch.nn.Module:
        found, wanted = self.setting(self.component, "_class_name"), self.network_class().__name__
        if found != wanted:
            raise SciflowError(
                f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r} holds a {found}, but "
                f"`{self.name}` trains a {wanted}. Take the family of that model."
            )
        if meta:
            with torch.device("meta"):
                network = self.network_class().from_config(self.config(self.component))
                return torch.nn.Module.to(network, dtype)
        with explain_loading(self.pretrained_model_name_or_path, self.component):
            return self.network_class().from_pretrained(
                self.pretrained_model_name_or_path, subfolder=self.component, revision=self.revision, dtype=dtype
            )

    def load_encoders(
        self, *, device: torch.device | str, dtype: torch.dtype, images: bool = True, text: bool = True
    ) -> Any:
        without = [self.component, *(() if images else ("vae",)), *(() if text else self.text_parts)]
        with explain_loading(self.pretrained_model_name_or_path, "VAE and text encoder"), quiet_loading():
            pipeline = self.pipeline_class().from_pretrained(
                self.pretrained_model_name_or_path, revision=self.revision, dtype=dtype, **dict.fromkeys(without)
            )
        if text:
            self.shorten_text_encoder(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        return pipeline.to(device)

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Takes away the parts of the text encoder that `encode_prompts` does not need."""

    def encode_images(self, pixel_values: torch.Tensor, encoders: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            pixel_values = pixel_values.to(encoders.vae.device, encoders.vae.dtype)
            return self.posterior_tensors(encoders.vae.encode(pixel_values).latent_dist)

    def load_pipeline(
        self,
        model: torch.nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        with_text_encoder: bool = False,
    ) -> Any:
        without: dict[str, Any] = {} if with_text_encoder else dict.fromkeys(self.text_parts)
        given = {} if model is None else {self.component: model, "dtype": network_dtype(model)}
        with explain_loading(self.pretrained_model_name_or_path, "pipeline"), quiet_loading():
            pipeline = self.pipeline_class().from_pretrained(
                self.pretrained_model_name_or_path, revision=self.revision, **without, **given
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def encode_validation_prompts(
        self, prompts: Sequence[str], *, device: torch.device | str, dtype: torch.dtype
    ) -> list[dict[str, torch.Tensor]]:
        encoders = self.load_text_encoder(device=device, dtype=dtype)
        encoded = self.encode_prompts([*prompts, ""], encoders)
        rows = [{name: value[i : i + 1].cpu() for name, value in encoded.items()} for i in range(len(prompts) + 1)]
        return [self.pipeline_inputs(row, rows[-1]) for row in rows[:-1]]

    trained_text_parts: ClassVar[tuple[str, ...]] = ()
    """Text encoders whose LoRA the pipeline can load: what `--train_text_encoder` trains."""

    def text_inputs(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `model` that hold the text; of `NetworkWithText`, which encodes captions itself, the batch."""
        return {"batch": batch, "dtype": dtype} if "captions" in batch else self.text_arguments(batch, dtype)

    def text_arguments(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the network that hold the text of `batch`. Needed where `trained_text_parts` are named."""
        raise NotImplementedError

    @abstractmethod
    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], empty: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Arguments of the pipeline's call from rows (1, ...) of `encode_prompts`: a prompt's and the empty one's."""

    guidance_argument: ClassVar[str] = "guidance_scale"
    """What the pipeline's call names the guidance of `--validation_guidance_scale`."""

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
        network = getattr(pipeline, self.component)
        dtype, device = network_dtype(network), next(network.parameters()).device
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in prompt_inputs.items()
        }
        images: list[Image] = pipeline(
            **inputs,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            generator=generator,
            # Mixed precision returns float32, in which the scheduler goes on; the VAE takes its own dtype.
            callback_on_step_end=lambda pipe, step, timestep, state: {"latents": state["latents"].to(dtype)},
            **{self.guidance_argument: guidance_scale},
        ).images
        return images


def network_dtype(model: torch.nn.Module) -> torch.dtype:
    """dtype of the network's own weights, through any wrapper (`model.dtype` fails under DDP)."""
    return next(p for p in model.parameters() if p.is_floating_point()).dtype


@contextmanager
def explain_loading(path: str, what: str) -> Iterator[None]:
    """Turns the many errors of a missing or gated repository into one that says what to do."""
    try:
        yield
    except Exception as error:  # every layer below has errors of its own, the HTTP client's included
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SciflowError(
            f"`pretrained_model_name_or_path` {path!r}: cannot load its {what} ({reason}). It must be a folder "
            "or a Hub repository in diffusers layout; for a gated one accept its licence and run `hf auth login`."
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of diffusers for a while: validation loads a small VAE again and again."""
    from diffusers.utils import logging as diffusers_logging

    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
