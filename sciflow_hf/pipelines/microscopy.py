"""Sharp images from measured ones: samples of a conditional diffusion network, for arrays and for folders of files."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from ..diffusion.objectives import convert_prediction, shift_snr
from ..diffusion.randomness import hash64, randn
from ..diffusion.sampling import DDPM_SAMPLERS, TIMESTEP_SPACINGS, ddpm_timesteps, sample_ddpm
from ..errors import SciflowError
from ..images.consistency import towards_measurement
from ..images.files import ImageFile, find_images, read_image, to_dtype, write_image
from ..images.optics import ForwardModel
from ..images.tiles import padded, tiled, turned, turned_back
from ..images.transforms import IntensityTransform
from .standalone import add_code

VALUE_RANGE = 4.0  # of images in the network's units, where the training images lie in about [-1, 1]


@dataclass
class RestorationOutput(BaseOutput):
    """Samples of sharp images, (S, B, C, H, W), float32, in the intensities of the training files."""

    samples: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """(B, C, H, W): the estimate of least squared error."""
        return self.samples.mean(dim=0)

    @property
    def std(self) -> torch.Tensor:
        """(B, C, H, W): how far the samples differ, pixel by pixel; needs two."""
        return self.samples.std(dim=0)


class MicroscopyRestorationPipeline(DiffusionPipeline):
    """Draws sharp images consistent with a measured one; their mean restores it, their spread shows the uncertainty.

    Args:
        unet: `UNet2DModel`, of the noisy image and the measured one on the channel axis.
        scheduler: any of diffusers' that has `alphas_cumprod`; says what the network predicts.
        intensity, conditioning_intensity: `IntensityTransform.to_dict` of the sharp and of the measured images.
        optics: fields of the `ForwardModel` that made the measured images; None for paired ones.
        tile_size: pixels of a training tile; larger images are restored in tiles of this size.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        intensity: dict[str, Any] | None = None,
        conditioning_intensity: dict[str, Any] | None = None,
        optics: dict[str, Any] | None = None,
        tile_size: int = 64,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            intensity=intensity, conditioning_intensity=conditioning_intensity, optics=optics, tile_size=tile_size
        )

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | np.ndarray,
        *,
        num_samples: int = 1,
        num_inference_steps: int = 50,
        sampler: str = "ddpm",
        eta: float = 0.0,
        timestep_spacing: str = "quadratic",
        seed: int = 0,
        batch_size: int = 16,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        cascade: Sequence[int] = (1,),
        cascade_strength: float = 0.5,
        data_consistency: float = 0.0,
        self_ensemble: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Samples for measured images (B, C, H, W).

        Args:
            images: in the intensities of the files; any height and width.
            num_samples: for each image.
            sampler: "ddpm", "ddim" (with `eta`) or "ancestral".
            timestep_spacing: "quadratic" or "trailing". A measurement leaves little open, which is decided at little
                noise: with even steps ("trailing") few fall there, and the samples differ too little.
            seed: of all noise; image, sample and step have their own, so that `batch_size` changes nothing.
            batch_size: tiles, or small images, of one call of the network.
            tile_size: pixels; default: that of the training.
            tile_overlap: pixels that tiles share; default: a quarter of their size.
            cascade: block sizes, falling to 1, e.g. (4, 2, 1): the image is drawn at a quarter of its resolution
                first, enlarged and gone on with; for networks trained with `--progressive_resolutions`.
            cascade_strength: share of the noise levels that each further resolution goes through again.
            data_consistency: 1 moves the clean image at each step to where it explains the measurement best, along
                the gradient of the Poisson likelihood of `optics`; 0 does not.
            self_ensemble: draw the samples in the eight orientations of the image in turn, and turn them back (Lim et
                al. 2017, EDSR): what the network gets wrong in one of them averages out in the mean, and is seen in
                the spread. For networks trained with `--augment`, and a PSF that looks the same in all eight.

        Raises:
            SciflowError: channels that the network does not take, or options out of range.
        """
        tensor = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images, np.float32))
        measured = tensor.float().to(self._execution_device)
        self._check(measured, sampler, timestep_spacing, cascade, cascade_strength)
        if self_ensemble:
            self._check_symmetry()
        size, step = tile_size or self.config.tile_size, 2 ** (len(self.unet.config.block_out_channels) - 1)
        height, width = measured.shape[-2:]
        turns = 8 if self_ensemble else 1
        groups = [
            (turn, [(image, sample) for sample in range(turn, num_samples, turns) for image in range(len(measured))])
            for turn in range(min(turns, num_samples))
        ]
        together = batch_size if max(height, width) <= size else 1
        network = tiled(
            self._network, tile_size=size, overlap=size // 4 if tile_overlap is None else tile_overlap,
            batch_size=batch_size,
        )  # fmt: skip
        found: dict[tuple[int, int], torch.Tensor] = {}
        calls = sum(math.ceil(len(jobs) / together) for _, jobs in groups) * num_inference_steps
        with self.progress_bar(total=calls) as progress:
            for turn, jobs in groups:
                for first in range(0, len(jobs), together):
                    chosen = jobs[first : first + together]
                    sampling = _Sampling(
                        self, network, keys=[hash64(seed, *job) for job in chosen], steps=num_inference_steps,
                        sampler=sampler, eta=eta, spacing=timestep_spacing, consistency=data_consistency,
                        done=progress.update,
                    )  # fmt: skip
                    seen = turned(padded(measured[[image for image, _ in chosen]], step * max(cascade)), turn)
                    latents = turned_back(sampling.cascade(seen, cascade, cascade_strength), turn)
                    found |= dict(zip(chosen, self.intensity.inverse(latents[..., :height, :width]), strict=True))
        self.maybe_free_model_hooks()
        samples = torch.stack(
            [torch.stack([found[image, sample] for image in range(len(measured))]) for sample in range(num_samples)]
        )
        return RestorationOutput(samples=samples) if return_dict else (samples,)

    def restore_folder(
        self, input_dir: str | Path, output_dir: str | Path, *, num_samples: int = 4, save_std: bool = False,
        **options: Any,
    ) -> list[Path]:  # fmt: skip
        """Restores every image below a folder: the mean of `num_samples`, in the file's own format and type.

        Args:
            input_dir: png, tif, ome.tif, npy, npz; each is checked before the first is restored.
            output_dir: gets files of the same names, another folder.
            save_std: also write the spread of the samples as `<name>_std.tif`, float32.
            options: of the call.

        Raises:
            SciflowError: files that the network cannot take; names file and remedy.
        """
        source, target = Path(input_dir), Path(output_dir)
        files = find_images(source)
        if target.resolve() == source.resolve():
            raise SciflowError(f"`output_dir` {str(output_dir)!r}: the restored images need a folder of their own.")
        for file in files:
            self._check_file(read_image(file))
        written = []
        bar = self.progress_bar
        for file in bar(files):
            image, place = read_image(file), target / file.relative_to(source)
            with self._quiet():
                planes = [self(plane[None], num_samples=num_samples, **options) for plane in image.planes]
            restored = np.concatenate([found.mean.cpu().numpy() for found in planes])
            written.append(write_image(image.with_planes(restored), place))
            if save_std and num_samples > 1:
                spread = to_dtype(np.concatenate([found.std.cpu().numpy() for found in planes]), np.float32)
                stem = place.name.split(".")[0]
                axes = "QCYX"
                written.append(
                    write_image(ImageFile(place, spread, axes, spread.shape), place.with_name(f"{stem}_std.tif"))
                )
        return written

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The parent's, and the code: the folder loads elsewhere with `trust_remote_code=True`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        add_code(save_directory, self)

    @property
    def intensity(self) -> IntensityTransform:
        """The transform of the sharp images."""
        return IntensityTransform.from_dict(self.config.intensity)

    @property
    def conditioning_intensity(self) -> IntensityTransform:
        """The transform of the measured images."""
        return IntensityTransform.from_dict(self.config.conditioning_intensity)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """No bar of the steps inside that of the files."""
        before = getattr(self, "_progress_bar_config", {})
        self.set_progress_bar_config(**{**before, "disable": True})
        try:
            yield
        finally:
            self._progress_bar_config = before

    def _network(self, inputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.unet(sample=inputs.to(self.unet.dtype), timestep=timesteps, return_dict=False)[0]
        return found.float()

    def _check(
        self, measured: torch.Tensor, sampler: str, timestep_spacing: str, cascade: Sequence[int], strength: float
    ) -> None:
        channels = len(self.config.conditioning_intensity["low"])
        if measured.ndim != 4 or measured.shape[1] != channels:
            raise SciflowError(f"`images` {tuple(measured.shape)}: this network takes (B, {channels}, H, W).")
        for name, value, allowed in (
            ("sampler", sampler, DDPM_SAMPLERS),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ):
            if value not in allowed:
                raise SciflowError(f"`{name}` {value!r}: use one of {', '.join(allowed)}.")
        if not cascade or cascade[-1] != 1 or list(cascade) != sorted(set(cascade), reverse=True):
            raise SciflowError(f"`cascade` {list(cascade)}: block sizes that fall to 1, such as 4 2 1.")
        if not 0 < strength <= 1:
            raise SciflowError(f"`cascade_strength` {strength}: above 0, at most 1.")

    def _check_symmetry(self) -> None:
        if self.config.optics is None:
            return
        kernel = ForwardModel(**self.config.optics).kernel
        if any(not torch.allclose(turned(kernel, turn), kernel, atol=1e-6) for turn in range(8)):
            raise SciflowError(
                "`self_ensemble`: the point-spread function of this network looks different when it is turned. Leave "
                "it out."
            )

    def _check_file(self, image: ImageFile) -> None:
        channels = len(self.config.conditioning_intensity["low"])
        if image.planes.shape[1] != channels:
            raise SciflowError(
                f"{image.path}: {image.planes.shape[1]} channels, but this network was trained on {channels}. Take the "
                "image out, or split its channels into files."
            )
        if image.dtype.kind == "f" and not np.isfinite(image.planes).all():
            raise SciflowError(f"{image.path}: pixels are NaN or infinite. Fill them, or take the image out.")


@dataclass
class _Sampling:
    """One batch of samples: the network, its noise by keys, and what is done at every step."""

    pipeline: MicroscopyRestorationPipeline
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    keys: Sequence[int]
    steps: int
    sampler: str
    eta: float
    spacing: str
    consistency: float
    done: Callable[[], Any]

    @functools.cached_property
    def optics(self) -> ForwardModel:
        """The forward model of the measured images."""
        if self.pipeline.config.optics is None:
            raise SciflowError("`data_consistency`: this network learned from pairs, and knows no optics. Use 0.")
        return ForwardModel(**self.pipeline.config.optics)

    def cascade(self, measured: torch.Tensor, blocks: Sequence[int], strength: float) -> torch.Tensor:
        """From coarse to fine; each further resolution begins from the enlarged one before, noised again."""
        alpha_bar = self.pipeline.scheduler.alphas_cumprod
        latents: torch.Tensor | None = None
        conditioning = self.pipeline.conditioning_intensity(measured)
        for block in blocks:
            coarse = F.avg_pool2d(conditioning, block)
            bars = shift_snr(alpha_bar, block**2)
            timesteps = ddpm_timesteps(len(alpha_bar), self.steps, spacing=self.spacing)
            channels = len(self.pipeline.config.intensity["low"])
            shape = (len(coarse), channels, *coarse.shape[-2:])
            x = randn(self.keys, shape, stream=f"noise {block}", device=coarse.device)
            if latents is not None:
                timesteps = timesteps[self.steps - math.ceil(self.steps * strength) :]
                bar = float(bars[timesteps[0]])
                enlarged = F.interpolate(latents, coarse.shape[-2:], mode="bilinear", align_corners=False)
                x = bar**0.5 * enlarged + (1 - bar) ** 0.5 * x
            latents = self.run(coarse, measured, x, bars.to(x.device), timesteps, block)
        if latents is None:
            raise SciflowError("`cascade` is empty.")
        return latents

    def run(
        self, conditioning: torch.Tensor, measured: torch.Tensor, x: torch.Tensor, bars: torch.Tensor,
        timesteps: torch.Tensor, block: int,
    ) -> torch.Tensor:  # fmt: skip
        """Samples of one resolution, in the network's units."""
        pipeline = self.pipeline
        kind = pipeline.scheduler.config.prediction_type

        def denoise(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            pred = self.network(torch.cat([noisy, conditioning], dim=1), timestep)
            bar = bars[timestep]
            latents = convert_prediction(
                pred, noisy, signal=bar.sqrt(), noise_scale=(1 - bar).sqrt(), source=kind, target="sample"
            ).clamp(-VALUE_RANGE, VALUE_RANGE)
            self.done()
            if self.consistency and block == 1:
                variance = float(1 - bar[0])
                latents = towards_measurement(
                    latents, measured, pipeline.intensity, self.optics, variance=variance, strength=self.consistency
                )
            return latents

        def step_noise(step: int) -> torch.Tensor:
            return randn(self.keys, x.shape, stream=f"step {block} {step}", device=x.device)

        return sample_ddpm(denoise, x, bars, timesteps, sampler=self.sampler, eta=self.eta, step_noise=step_noise)
