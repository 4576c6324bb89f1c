"""DiT (Peebles and Xie 2023), class-conditional and from scratch: rectified flow or DDPM, on pixels or VAE latents."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diffusion.arguments import LossArguments
from ..diffusion.objectives import BETA_SCHEDULES
from ..diffusion.process import OBJECTIVES, PREDICTIONS, Noised, NoiseProcess, current_name
from ..diffusion.randomness import sample_keys, uniform
from ..errors import SciflowError
from ..options import arguments, option
from .base import ModelFamily, SamplingArguments, network_dtype
from .loading import SINGLE_FILE, explain_loading, load_vae, vae_config

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

PRESETS = {  # hidden size, blocks, heads, parameters at patch 2, 4 channels, 1,000 classes (Peebles and Xie, table 1)
    "S": (384, 12, 6),  # 33 M
    "B": (768, 12, 12),  # 130 M
    "L": (1024, 24, 16),  # 458 M
    "XL": (1152, 28, 16),  # 675 M
}


def _check_prediction(family: "DiT") -> None:
    if (family.objective, family.prediction_type) == ("flow", "v_prediction"):
        raise SciflowError("`prediction_type` v_prediction needs `--objective ddpm`: that of a flow is velocity.")


def _check_variance(family: "DiT") -> None:
    if family.learn_sigma and family.objective == "flow":
        raise SciflowError("`learn_sigma` needs `--objective ddpm`: a flow has no variance to predict.")


@arguments
class DiT(ModelFamily):
    """A diffusion transformer trained from scratch on images with class labels, or without."""

    heading: ClassVar[str] = "DiT"

    pretrained_model_name_or_path: str = option(
        "",
        "A saved run to fine-tune, folder or Hub repository; its network and objective then count, not the options "
        "here. By default the initial weights are random.",
    )
    vae_name_or_path: str | None = option(
        None,
        "`AutoencoderKL` of diffusers, folder or Hub repository: the network works on its latents. By default, "
        "on pixels.",
    )
    preset: str = option("S", "Hidden size, blocks and heads of the network.", choices=tuple(PRESETS))
    hidden_size: int | None = option(None, "Width of a token, instead of the preset's.", within="[1, inf)")
    num_hidden_layers: int | None = option(None, "Blocks, instead of the preset's.", within="[1, inf)")
    num_attention_heads: int | None = option(None, "Attention heads, instead of the preset's.", within="[1, inf)")
    image_size: int = option(
        32, "Side of the images in pixels; they are cut to a square and resized.", within="[1, inf)"
    )
    patch_size: int = option(2, "Side of a patch, in pixels or latents.", within="[1, inf)")
    in_channels: int | None = option(
        None, "Channels of the input; by default those of the data, or of the VAE's latents.", within="[1, inf)"
    )
    num_classes: int | None = option(
        None, "Classes, by default as many as the data has; 0 trains without.", within="[0, inf)"
    )
    class_dropout_prob: float = option(
        0.1,
        "Share of the samples, chosen by their keys, that are trained without their class, which guidance needs.",
        within="[0, 1)",
    )
    objective: str = option(
        "flow",
        "flow: rectified flow, noisy = (1 - sigma) data + sigma noise. ddpm: noisy = sqrt(a) data + sqrt(1 - a) noise.",
        choices=OBJECTIVES,
    )
    prediction_type: str = option(
        "velocity",
        "Prediction of the network: velocity (noise - data), under ddpm v_prediction (sqrt(a) noise - sqrt(1 - a) "
        "data), epsilon (the noise) or sample (the data). Under ddpm, velocity means v_prediction.",
        choices=PREDICTIONS,
        check=_check_prediction,
    )
    learn_sigma: bool = option(
        False, "Also predict the variance of the steps (Nichol and Dhariwal 2021); ddpm only.", check=_check_variance
    )
    num_train_timesteps: int = option(1000, "Timesteps of ddpm.", within="[1, inf)")
    beta_schedule: str = option("linear", "Noise schedule of ddpm.", choices=BETA_SCHEDULES)
    init_seed: int = option(0, "Seed of the initial weights.", within="[0, inf)")

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The prediction of type `prediction_type`, (B, C, h, w). Batch: `class_labels` (B,) where there are classes.

        With `learn_sigma` it puts `variance_fraction` (B, C, h, w) into the batch: what the network says of that.
        """
        model_pred: torch.Tensor = model(
            hidden_states=noisy_latents.to(network_dtype(model)),
            timestep=self.process.timestep(levels),
            class_labels=self.dropped_labels(batch, training=model.training),
            return_dict=False,
        )[0].float()
        if self.learn_sigma:
            model_pred, batch["variance_fraction"] = model_pred.chunk(2, dim=1)
        return model_pred

    def compare(
        self, model_pred: torch.Tensor, noised: Noised, batch: dict[str, Any], args: LossArguments
    ) -> torch.Tensor:
        """Compares the prediction with the target; with `learn_sigma`, adds the loss of the variance."""
        loss = super().compare(model_pred, noised, batch, args)
        if not self.learn_sigma:
            return loss
        mask = batch.get("loss_mask")
        mask = None if mask is None else self.element_mask(mask, noised.target)
        return loss + self.process.variance_loss(noised, model_pred, batch["variance_fraction"], mask)

    name: ClassVar[str] = "dit"
    task: ClassVar[str] = "unconditional-image-generation"
    whole_pipeline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prediction_type = current_name(self.prediction_type, self.objective)
        width, blocks, heads = PRESETS[self.preset]
        self.hidden_size = width if self.hidden_size is None else self.hidden_size
        self.num_hidden_layers = blocks if self.num_hidden_layers is None else self.num_hidden_layers
        self.num_attention_heads = heads if self.num_attention_heads is None else self.num_attention_heads
        if self.hidden_size % (4 * self.num_attention_heads):
            raise SciflowError(
                f"`hidden_size` {self.hidden_size}: a multiple of 4 x `num_attention_heads` "
                f"({4 * self.num_attention_heads}) is needed."
            )
        self.class_names: list[str] = []

    @classmethod
    def renamed_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of an older checkpoint in today's words: velocity of DDPM is v_prediction."""
        return options | {"prediction_type": current_name(options["prediction_type"], options["objective"])}

    @property
    def from_scratch(self) -> bool:
        """True unless a saved run is loaded (`pretrained_model_name_or_path`)."""
        return not self.pretrained_model_name_or_path

    # -- the step --------------------------------------------------------------------------------------------------

    def clean_latents(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Pixels as they are; latents as the VAE's pipelines scale them: (latents - shift) scaling_factor."""
        if "pixel_values" in batch:
            return batch["pixel_values"].float()
        shift, scale = self._shift_and_scale
        return (batch["latents"].float() - shift) * scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image, by the VAE's channels and halvings."""
        return self._channels, height // self._pixels_per_latent, width // self._pixels_per_latent

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel of the VAE, (1, C, 1, 1); refused for pixels."""
        if not self.has_vae:
            return super().latent_statistics()
        shift, scale = self._shift_and_scale
        return torch.full((1, self._channels, 1, 1), shift), torch.full((1, self._channels, 1, 1), 1 / scale)

    @property
    def _shift_and_scale(self) -> tuple[float, float]:
        return float(self._vae_config.get("shift_factor") or 0), float(self._vae_config["scaling_factor"])

    def image_seq_len(self, latents: torch.Tensor) -> int:
        """Patches of (B, C, H, W): H W / patch_size^2."""
        return latents[0, 0].numel() // self.patch_size**2

    def dropped_labels(self, batch: dict[str, torch.Tensor], *, training: bool) -> torch.Tensor | None:
        """(B,), in training with `num_classes`, no class instead of some; None without classes."""
        if not self.num_classes:
            return None
        labels = batch["class_labels"]
        if not training or not self.class_dropout_prob:
            return labels
        dropped = uniform(sample_keys(batch, len(labels)), stream="class_dropout") < self.class_dropout_prob
        return labels.masked_fill(dropped.to(labels.device, non_blocking=True), self.num_classes)

    @functools.cached_property
    def process(self) -> NoiseProcess:
        """How the network is trained."""
        return NoiseProcess(self.objective, self.prediction_type, self.num_train_timesteps, self.beta_schedule)

    # -- the network -----------------------------------------------------------------------------------------------

    def load_model(self, *, dtype: torch.dtype, meta: bool = False) -> torch.nn.Module:
        """A network of random weights in `dtype`, or that of a saved run, whose options then count."""
        from ..networks.dit import DiTForImageDiffusion

        if self.pretrained_model_name_or_path:
            return self._saved_model(dtype, meta)
        config = {
            "image_size": self.image_size // self._pixels_per_latent,
            "patch_size": self.patch_size,
            "in_channels": self._channels,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_classes": self.num_classes or 0,
            "learn_sigma": self.learn_sigma,
            "id2label": {str(number): name for number, name in enumerate(self.class_names)} or None,
        }
        self.check_size(self.image_size)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.manual_seed(self.init_seed)
            return torch.nn.Module.to(DiTForImageDiffusion(**config), dtype)

    def _saved_model(self, dtype: torch.dtype, meta: bool) -> torch.nn.Module:
        """The network of a saved run; takes over its options."""
        from ..networks.dit import DiTForImageDiffusion

        path, where = self.pretrained_model_name_or_path, {"revision": self.revision}
        with explain_loading(path, "network"):
            config: Any = DiTForImageDiffusion.load_config(path, subfolder=self.component, **where)
            if meta:
                with torch.device("meta"):
                    model = torch.nn.Module.to(DiTForImageDiffusion.from_config(config), dtype)
            else:
                model = DiTForImageDiffusion.from_pretrained(path, subfolder=self.component, dtype=dtype, **where)
        if self.num_classes not in (None, model.config.num_classes):
            raise SciflowError(
                f"`pretrained_model_name_or_path` {path!r} has {model.config.num_classes} classes, but the data (or "
                f"`num_classes`) {self.num_classes}."
            )
        for name in ("patch_size", "in_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, model.config[name])
        self.num_classes, self.learn_sigma = model.config.num_classes, model.config.learn_sigma
        for name in ("objective", "prediction_type", "num_train_timesteps", "beta_schedule"):
            setattr(self, name, self._saved_index[name])
        self.prediction_type = current_name(self.prediction_type, self.objective)
        self.__dict__.pop("process", None)
        logger.info("Continuing from %s: %s, it predicts the %s.", path, self.objective, self.prediction_type)
        return model

    @property
    def _channels(self) -> int:
        if self.has_vae:
            return int(self._vae_config["latent_channels"])
        return 3 if self.in_channels is None else self.in_channels

    def check_size(self, *sides: int) -> None:
        """Raises SciflowError for sides in pixels that the patches do not divide."""
        if any(side % self.bucket_step() for side in sides):
            raise SciflowError(
                f"`image_size` {'x'.join(map(str, sides))}: a multiple of {self.bucket_step()} is needed, "
                f"`--patch_size {self.patch_size}`"
                + (f" times {self._pixels_per_latent} pixels of a latent." if self.has_vae else ".")
            )

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """Raises SciflowError where channels, sides or class labels of a sample do not fit the network."""
        key = "latents" if self.has_vae else "pixel_values"
        if key not in sample:
            raise SciflowError(f"a sample of `{self.name}` needs `{key}`; it has {sorted(sample)}.")
        shape, channels, patch = tuple(sample[key].shape), model.config.in_channels, model.config.patch_size
        if len(shape) != 3 or shape[0] != channels:
            raise SciflowError(f"`{key}` {shape}: this network takes ({channels}, height, width).")
        if shape[1] % patch or shape[2] % patch:
            raise SciflowError(f"`{key}` {shape}: its patches are {patch}x{patch}, which does not divide the sides.")
        if model.config.num_classes and "class_labels" not in sample:
            raise SciflowError(
                f"this network has {model.config.num_classes} classes, but the data has no labels. Name their column "
                "by `--label_column`, or train without classes by `--num_classes 0`."
            )
        self.check_latent_extras(sample)

    # -- the VAE ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _saved_index(self) -> dict[str, Any]:
        """`model_index.json` of a saved run; {} from scratch."""
        path = self.pretrained_model_name_or_path
        if not path:
            return {}
        with explain_loading(path, "pipeline configuration"):
            return dict(self.pipeline_class().load_config(path, revision=self.revision))

    @property
    def has_vae(self) -> bool:
        """Whether the network works on latents: of `vae_name_or_path`, or of the VAE of a saved run."""
        return bool(self.vae_name_or_path) or (self._saved_index.get("vae") or [None])[0] is not None

    @property
    def _vae_place(self) -> dict[str, Any]:
        if (self.vae_name_or_path or "").endswith(SINGLE_FILE):
            raise SciflowError(
                f"`vae_name_or_path` {self.vae_name_or_path!r}: a file does not say how its VAE is built. Give a "
                "folder or a Hub repository in diffusers layout."
            )
        own = {"path": self.pretrained_model_name_or_path, "subfolder": "vae", "revision": self.revision}
        return {"path": self.vae_name_or_path} if self.vae_name_or_path else own

    @functools.cached_property
    def _vae_config(self) -> dict[str, Any]:
        return vae_config(**self._vae_place)

    @property
    def _pixels_per_latent(self) -> int:
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1) if self.has_vae else 1

    def load_encoders(
        self, *, device: torch.device | str, dtype: torch.dtype, images: bool = True, text: bool = True
    ) -> Any:
        """The VAE, frozen, as `vae`; None without one."""
        if not self.has_vae:
            return super().load_encoders(device=device, dtype=dtype)
        return SimpleNamespace(vae=load_vae(**self._vae_place, dtype=dtype).to(device))

    def encoder_settings(self) -> dict[str, Any]:
        """VAE and posterior, on which a cache of latents depends."""
        return {"family": self.name, "vae_name_or_path": self.vae_name_or_path, "posterior": self.posterior}

    def bucket_step(self) -> int:
        """Pixels: `patch_size`, times the VAE's halvings where there is one."""
        return self.patch_size * self._pixels_per_latent

    # -- sampling --------------------------------------------------------------------------------------------------

    def pipeline_class(self) -> Any:
        """`DiTImagePipeline` of this package, whose code a saved run carries along."""
        from ..pipelines.dit import DiTImagePipeline

        return DiTImagePipeline

    def load_pipeline(
        self,
        model: torch.nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        with_text_encoder: bool = False,
    ) -> Any:
        """The sampling pipeline around `model`, with the VAE where there is one."""
        network = self.load_model(dtype=torch.float32) if model is None else model
        vae = load_vae(**self._vae_place) if self.has_vae else None
        return self._pipeline(network, vae).to(device)

    def _pipeline(self, network: Any, vae: Any = None) -> Any:
        pipeline = self.pipeline_class()(
            network,
            vae,
            objective=self.objective,
            prediction_type=self.prediction_type,
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_network(self, model: Any, folder: Path) -> None:
        """As a pipeline; the VAE, where there is one, only in the run's folder, not in each checkpoint."""
        with_vae = self.has_vae and not folder.name.startswith("checkpoint-")
        self._pipeline(model, load_vae(**self._vae_place) if with_vae else None).save_pretrained(folder)

    def call_arguments(self, args: SamplingArguments) -> list[str]:
        """Classes, steps and guidance of the pipeline's call, for the model card."""
        labels = [f"class_labels=[{self.num_classes - 1}]"] if self.num_classes else []
        steps, scale = f"num_inference_steps={args.num_inference_steps}", args.validation_guidance_scale
        return [*labels, steps, *([f"guidance_scale={scale}"] if labels else [])]

    def encode_validation_prompts(
        self, prompts: Sequence[str], *, device: torch.device | str, dtype: torch.dtype, encoders: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Class labels, by numbers or names."""
        from ..pipelines.dit import class_id

        try:
            return [
                {"class_labels": torch.tensor([class_id(p, self.num_classes or 0, self.class_names)])} for p in prompts
            ]
        except ValueError as error:
            raise SciflowError(str(error)) from error

    def generate(self, pipeline: Any, prompt_inputs: dict[str, torch.Tensor], **options: Any) -> list["Image"]:
        """Images of one class label."""
        images: list[Image] = pipeline(**prompt_inputs, **options).images
        return images
