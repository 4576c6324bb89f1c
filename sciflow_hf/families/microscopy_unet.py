"""Conditional DDPM on pixels for microscopy: a UNet sees the noisy sharp image and the measured one side by side."""

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from ..diffusion import objectives
from ..diffusion.arguments import LossArguments
from ..diffusion.image_losses import HierarchicalFeatures, fourier_loss, multiscale_loss, perceptual_loss
from ..diffusion.process import GivenSchedule, Noised, TimestepLevels
from ..errors import SciflowError
from ..images.microscopes import fit_to_samples
from ..images.transforms import IntensityTransform
from ..options import arguments, option
from .base import ModelFamily, SamplingArguments, network_dtype
from .loading import explain_loading

logger = logging.getLogger(__name__)

SCHEDULES = ("linear", "cosine", "sigmoid", "exponential")
IMAGE_WEIGHTS = ("fourier_weight", "multiscale_weight", "perceptual_weight", "hierarchical_weight")
_OF_DIFFUSERS = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


def _check_widths(family: "MicroscopyUNet") -> None:
    if not family.block_out_channels or any(width % 8 or width < 8 for width in family.block_out_channels):
        raise SciflowError(f"`block_out_channels` {family.block_out_channels}: one or more multiples of 8.")


def _check_attention(family: "MicroscopyUNet") -> None:
    if not 0 <= family.attention_levels <= len(family.block_out_channels):
        raise SciflowError(f"`attention_levels` {family.attention_levels}: 0 to {len(family.block_out_channels)}.")


def _alike(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether two transforms are of one kind and number of channels."""
    return other is not None and (one["kind"], len(one["low"])) == (other["kind"], len(other["low"]))


def _check_features(family: "MicroscopyUNet") -> None:
    if family.perceptual_weight and family.feature_network is None:
        raise SciflowError("`perceptual_weight` needs `feature_network`: `package.module:callable`, or a file.")


@arguments
class MicroscopyUNet(TimestepLevels, ModelFamily):
    """p(sharp image | measured image) by DDPM, on images of one or more channels (Saharia et al. 2022, SR3).

    The losses in Fourier space, over scales and of features (`IMAGE_WEIGHTS`) are on the clean image that the
    prediction means, added to `--loss_type`'s; they make images crisper, and the spread of the samples less honest.
    """

    heading: ClassVar[str] = "Restoration network"

    pretrained_model_name_or_path: str = option(
        "", "A saved pipeline of this kind to continue from. By default a new network."
    )
    block_out_channels: list[int] = option(
        [32, 64, 96, 128],
        "Width of each level of a new network, multiples of 8; each level halves the image.",
        check=_check_widths,
    )
    layers_per_block: int = option(1, "Residual blocks of a level.", within="[1, inf)")
    attention_levels: int = option(0, "How many of the lowest levels have self-attention.", check=_check_attention)
    dropout: float = option(0.0, "Dropout in the residual blocks.", within="[0, 1)")
    init_seed: int = option(0, "Seed of the weights of a new network.", within="[0, inf)")
    beta_schedule: str = option("cosine", "Noise schedule.", choices=SCHEDULES)
    num_train_timesteps: int = option(1000, "Noise levels of the schedule.", within="[2, inf)")
    prediction_type: str = option("v_prediction", "Prediction of the network.", choices=objectives.PREDICTION_TYPES)
    fourier_weight: float = option(0.0, "Weight of the loss in Fourier space.", within="[0, inf)")
    multiscale_weight: float = option(0.0, "Weight of the loss over several scales.", within="[0, inf)")
    perceptual_weight: float = option(
        0.0, "Weight of the loss of `--feature_network`.", within="[0, inf)", check=_check_features
    )
    hierarchical_weight: float = option(
        0.0,
        "Weight of the multi-scale consistency loss: features of the image averaged over blocks of 1, 2, 4 and 8 "
        "pixels, of `--feature_network` where it is given, else values and derivatives.",
        within="[0, inf)",
    )
    feature_network: str | None = option(
        None,
        "Network of the perceptual and the multi-scale consistency loss: `package.module:callable`, which returns a "
        "torch module, or a TorchScript file. It gets images in the network's units, about [-1, 1].",
    )

    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The prediction of type `prediction_type` for the sharp image, (B, C, H, W).

        Batch: `conditioning_pixel_values` (B, C', H, W), the measured image, in about [-1, 1].
        """
        conditioning = batch["conditioning_pixel_values"].float()
        inputs = torch.cat([noisy_latents, conditioning], dim=1).to(network_dtype(model))
        prediction: torch.Tensor = model(sample=inputs, timestep=levels, return_dict=False)[0]
        return prediction.float()

    def clean_latents(self, batch: dict[str, Any]) -> torch.Tensor:
        """The sharp image, (B, C, H, W), in about [-1, 1]."""
        return batch["pixel_values"].float()

    name: ClassVar[str] = "microscopy_unet"
    component: ClassVar[str] = "unet"
    task: ClassVar[str] = "image-to-image"
    whole_pipeline: ClassVar[bool] = True
    lora_presets: ClassVar[dict[str, str]] = {
        "full": "conv1,conv2,conv_shortcut,time_emb_proj,to_q,to_k,to_v,to_out.0",
    }

    block = 1  # side of the blocks that are averaged in training: set by `ProgressiveResolutionCallback`
    holds_intensities = False  # whether batches hold intensities, and not the network's units: set by `describe_data`
    intensity: dict[str, Any] | None = field(default=None, init=False, repr=False)
    conditioning_intensity: dict[str, Any] | None = field(default=None, init=False, repr=False)
    optics: dict[str, Any] | None = field(default=None, init=False, repr=False)
    tile_size: int = field(default=64, init=False, repr=False)

    def describe_data(self, dataset: Any, **options: Any) -> None:
        """Takes what the network must know of its images: channels, intensities, optics.

        A `MicroscopyTiles` says it, and its images are in the network's units. Any other data set of dicts, map-style
        or a stream, holds `pixel_values` (C, H, W) and `conditioning_pixel_values` (C', H, W) in intensities of their
        own: the transforms are fitted to them (`fit_to_samples`), or are those of the pipeline that training starts
        from, and each step applies them. A resumed run takes those of its checkpoint.

        Args:
            dataset: to train on.
            options: of `IntensityTransform.fit`: `kind`, `percentiles`, `gain`.
        """
        tiles: Any = dataset.dataset if isinstance(dataset, Subset) else dataset
        self.holds_intensities = not isinstance(getattr(tiles, "transform", None), IntensityTransform)
        if not self.holds_intensities:
            self.tile_size, self.optics = tiles.tile_size, asdict(tiles.optics) if tiles.optics else None
            self._transforms = tiles.transform, tiles.conditioning_transform
        elif self.pretrained_model_name_or_path:
            self.take_over()
        else:
            *self._transforms, self.tile_size = fit_to_samples(dataset, **options)

    @property
    def _transforms(self) -> list[IntensityTransform]:
        """The transforms of the sharp and of the measured images."""
        self._channels()
        return [IntensityTransform.from_dict(found) for found in (self.intensity, self.conditioning_intensity) if found]

    @_transforms.setter
    def _transforms(self, found: Sequence[IntensityTransform]) -> None:
        self.intensity, self.conditioning_intensity = (transform.to_dict() for transform in found)

    def resumed(self, network: dict[str, Any]) -> None:
        """Takes the transforms that the checkpoint's run had fitted: samples may be drawn otherwise now."""
        names = ("intensity", "conditioning_intensity")
        if self.holds_intensities and all(network.get(n) and _alike(network[n], getattr(self, n)) for n in names):
            self.intensity, self.conditioning_intensity, self.tile_size = (network[n] for n in (*names, "tile_size"))

    @classmethod
    def renamed_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of an older checkpoint, from before `hierarchical_weight`."""
        return {"hierarchical_weight": 0.0} | options

    # -- the step --------------------------------------------------------------------------------------------------

    def prepare(self, batch: dict[str, Any], *, training: bool) -> dict[str, Any]:
        """Images in the network's units.

        Under `--progressive_resolutions` those of training are averaged over blocks, at the noise that fits them.
        """
        block = self.block if training else 1
        self.process.snr_factor = block**2
        names = ("pixel_values", "conditioning_pixel_values")
        if self.holds_intensities:
            batch = batch | {name: f(batch[name]) for name, f in zip(names, self._transforms, strict=True)}
        coarse = {name: F.avg_pool2d(batch[name].float(), block) for name in names}
        if "loss_mask" in batch:
            coarse["loss_mask"] = F.avg_pool2d(batch["loss_mask"].float(), block)
        return super().prepare(batch, training=training) | coarse

    def compare(
        self, model_pred: torch.Tensor, noised: Noised, batch: dict[str, Any], args: LossArguments
    ) -> torch.Tensor:
        """Also by the image losses, where they have a weight."""
        loss = super().compare(model_pred, noised, batch, args)
        if not any(getattr(self, name) for name in IMAGE_WEIGHTS):
            return loss
        if "loss_mask" in batch:
            raise SciflowError(
                f"`loss_mask` does not go with {', '.join(f'`{name}`' for name in IMAGE_WEIGHTS)}: these compare "
                "complete images. Leave the masks or the weights out."
            )
        return loss + self.image_loss(model_pred, noised)

    def image_loss(self, prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
        """The losses on the clean image that a prediction means, times their weights and sqrt(alpha_bar): (B,)."""
        images, total = noised.latents, torch.zeros(len(prediction), device=prediction.device)
        found = self.process.clean(prediction, noised.noisy_latents, noised.levels)
        if self.fourier_weight:
            total = total + self.fourier_weight * fourier_loss(found, images)
        if self.multiscale_weight:
            total = total + self.multiscale_weight * multiscale_loss(found, images)
        if self.perceptual_weight:
            total = total + self.perceptual_weight * perceptual_loss(found, images, self.features_on(images.device))
        if self.hierarchical_weight:
            network = self.features_on(images.device) if self.feature_network else None
            total = total + self.hierarchical_weight * perceptual_loss(found, images, HierarchicalFeatures(network))
        signal, _ = self.process.mixture(noised.levels)
        return signal * total  # an image guessed from noise alone is no image to compare

    def features_on(self, device: torch.device) -> torch.nn.Module:
        """`--feature_network`, frozen, on `device`."""
        return self._features.to(device)

    @functools.cached_property
    def _features(self) -> torch.nn.Module:
        path = self.feature_network or ""
        try:
            if path.endswith((".pt", ".ts")):
                found = torch.jit.load(path, map_location="cpu")
            else:
                module, _, name = path.partition(":")
                found = getattr(importlib.import_module(module), name)()
        except Exception as error:  # whatever the user's own code raises
            raise SciflowError(f"`feature_network` {path!r}: cannot be loaded ({error}).") from error
        if not isinstance(found, torch.nn.Module):
            raise SciflowError(f"`feature_network` {path!r}: gives {type(found).__name__}, not a torch module.")
        return found.eval().requires_grad_(False)

    # -- the noise schedule ----------------------------------------------------------------------------------------

    @functools.cached_property
    def process(self) -> GivenSchedule:
        """DDPM by `beta_schedule` and `prediction_type`."""
        betas = objectives.beta_schedule(self.beta_schedule, self.num_train_timesteps)
        return GivenSchedule(objectives.alphas_cumprod(betas), self.prediction_type)

    # -- the network and its pipeline ------------------------------------------------------------------------------

    @property
    def from_scratch(self) -> bool:
        """True unless a saved run is loaded (`pretrained_model_name_or_path`)."""
        return not self.pretrained_model_name_or_path

    def take_over(self) -> tuple[IntensityTransform, IntensityTransform]:
        """Reads a saved pipeline: its intensities, which it returns, noise schedule and widths count, not the options.

        Raises:
            SciflowError: no such pipeline, or one of another kind.
        """
        path, where = self.pretrained_model_name_or_path, {"revision": self.revision}
        with explain_loading(path, "pipeline"):
            from diffusers import DDPMScheduler, UNet2DModel

            index: dict[str, Any] = self.pipeline_class().load_config(path, **where)
            unet: dict[str, Any] = UNet2DModel.load_config(path, subfolder="unet", **where)
            schedule: dict[str, Any] = DDPMScheduler.load_config(path, subfolder="scheduler", **where)
        if not index.get("intensity") or not index.get("conditioning_intensity"):
            raise SciflowError(
                f"`pretrained_model_name_or_path` {path!r} is no restoration pipeline: it holds no intensity "
                "transforms. Take what `recipes/train_microscopy.py` wrote."
            )
        for name in ("intensity", "conditioning_intensity", "optics", "tile_size"):
            setattr(self, name, index[name])
        self.block_out_channels = list(unet["block_out_channels"])
        self.prediction_type, self.num_train_timesteps = schedule["prediction_type"], schedule["num_train_timesteps"]
        named = {theirs: ours for ours, theirs in _OF_DIFFUSERS.items()}
        self.beta_schedule = "exponential" if schedule["trained_betas"] else named[schedule["beta_schedule"]]
        self.__dict__.pop("process", None)
        sharp, measured = self._transforms
        return sharp, measured

    def load_model(self, *, dtype: torch.dtype, meta: bool = False) -> torch.nn.Module:
        """A UNet of random weights in `dtype`, or that of a saved run."""
        from diffusers import UNet2DModel

        path = self.pretrained_model_name_or_path
        if path and self.intensity is None:
            self.take_over()
        if path and not meta:
            with explain_loading(path, "unet"):
                return UNet2DModel.from_pretrained(path, subfolder="unet", revision=self.revision, dtype=dtype)
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.manual_seed(self.init_seed)
            config = UNet2DModel.load_config(path, subfolder="unet") if path else self.network_config()
            return torch.nn.Module.to(UNet2DModel.from_config(config), dtype)

    def network_config(self) -> dict[str, Any]:
        """Arguments of `UNet2DModel`."""
        channels, conditioning = self._channels()
        plain = len(self.block_out_channels) - self.attention_levels
        kinds = ["DownBlock2D"] * plain + ["AttnDownBlock2D"] * self.attention_levels
        return {
            "sample_size": self.tile_size,
            "in_channels": channels + conditioning,
            "out_channels": channels,
            "block_out_channels": tuple(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "down_block_types": tuple(kinds),
            "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            "norm_num_groups": 8,
            "add_attention": self.attention_levels > 0,
            "dropout": self.dropout,
        }

    def _channels(self) -> tuple[int, int]:
        if self.intensity is None or self.conditioning_intensity is None:
            raise SciflowError(
                "`microscopy_unet` has not seen its images: call `prepare_microscopy` before, or, with a data set of "
                "your own, `family.describe_data(dataset)`."
            )
        return len(self.intensity["low"]), len(self.conditioning_intensity["low"])

    def scheduler(self) -> Any:
        """diffusers' scheduler with the noise schedule of the training."""
        from diffusers import DDPMScheduler

        named = _OF_DIFFUSERS.get(self.beta_schedule)
        betas = None if named else objectives.beta_schedule(self.beta_schedule, self.num_train_timesteps).tolist()
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=named or "linear",
            trained_betas=betas,
            prediction_type=self.prediction_type,
            clip_sample=False,
            timestep_spacing="trailing",
        )

    def pipeline_class(self) -> Any:
        """`MicroscopyRestorationPipeline` of this package, whose code a saved run carries along."""
        from ..pipelines.microscopy import MicroscopyRestorationPipeline

        return MicroscopyRestorationPipeline

    def load_pipeline(
        self,
        model: torch.nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        with_text_encoder: bool = False,
    ) -> Any:
        """The restoring pipeline around `model`: its schedule and intensity transforms."""
        model = self.load_model(dtype=torch.float32) if model is None else model
        self._channels()
        pipeline = self.pipeline_class()(
            unet=model,
            scheduler=self.scheduler(),
            intensity=self.intensity,
            conditioning_intensity=self.conditioning_intensity,
            optics=self.optics,
            tile_size=self.tile_size,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def save_network(self, model: Any, folder: Path) -> None:
        """The complete pipeline: network, schedule, intensity transforms."""
        self.load_pipeline(model, device=model.device).save_pretrained(folder)

    def encoder_settings(self) -> dict[str, Any]:
        """The name alone: images are not encoded."""
        return {"family": self.name}

    def bucket_step(self) -> int:
        """Pixels: the UNet halves the sides that often."""
        return 2 ** (len(self.block_out_channels) - 1)

    def call_arguments(self, args: SamplingArguments) -> list[str]:
        """The measured images and the number of samples, for the model card."""
        return ["images", "num_samples=16"]  # images: (B, C, H, W), in their own intensities

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """Raises SciflowError where channels or sides of a pair of images do not fit the network."""
        missing = [key for key in ("pixel_values", "conditioning_pixel_values") if key not in sample]
        if missing:
            raise SciflowError(f"a sample of `{self.name}` needs {missing}; it has {sorted(sample)}.")
        images, conditioning = sample["pixel_values"], sample["conditioning_pixel_values"]
        if images.shape[1:] != conditioning.shape[1:]:
            raise SciflowError(
                f"`conditioning_pixel_values` {tuple(conditioning.shape)}: its height and width must be those of "
                f"`pixel_values`, {tuple(images.shape)}."
            )
        found = images.shape[0], images.shape[0] + conditioning.shape[0]
        wanted = model.config.out_channels, model.config.in_channels
        if found != wanted:
            raise SciflowError(
                f"`pixel_values` and `conditioning_pixel_values` have {found[0]} and {found[1] - found[0]} channels; "
                f"this network was made for {wanted[0]} and {wanted[1] - wanted[0]}."
            )
        step = 2 ** (len(model.config.block_out_channels) - 1)
        if any(side % step for side in images.shape[1:]):
            raise SciflowError(f"`tile_size` {tuple(images.shape[1:])}: a multiple of {step} for this network.")
        self.check_latent_extras(sample)

    def encode_validation_prompts(
        self, prompts: Sequence[str], *, device: torch.device | str, dtype: torch.dtype, encoders: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Refused: images are restored, not prompted for."""
        raise SciflowError(f"`validation_prompts`: `{self.name}` takes no prompts; its restorations are scored.")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: images are restored by `MicroscopyRestorationPipeline`."""
        raise SciflowError(f"`{self.name}` restores images: use its pipeline.")
