"""Images of a class by a DiT: rectified flow or DDPM, on pixels or on the latents of a VAE."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..diffusion.process import NoiseProcess, current_name
from ..diffusion.sampling import (
    DDPM_SAMPLERS,
    FLOW_SAMPLERS,
    ddpm_timesteps,
    flow_sigmas,
    guide,
    sample_ddpm,
    sample_flow,
)
from .standalone import add_code

LATENT_RANGE = 5.0  # deviations; normalised latents rarely lie beyond


class DiTImagePipeline(DiffusionPipeline):
    """Class-conditional images.

    Args:
        transformer: `DiTForImageDiffusion`.
        vae: `AutoencoderKL`; None for a network of pixels.
        objective: "flow" (noisy = (1 - sigma) data + sigma noise) or "ddpm".
        prediction_type: what the network predicts: "velocity" (noise - data) of a flow, "v_prediction" (Salimans and Ho
            2022) of ddpm, "epsilon" or "sample".
        num_train_timesteps, beta_schedule: of ddpm.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        objective: str = "flow",
        prediction_type: str = "velocity",
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
    ) -> None:
        super().__init__()
        prediction_type = current_name(prediction_type, objective)
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            objective=objective,
            prediction_type=prediction_type,
            num_train_timesteps=num_train_timesteps,
            beta_schedule=beta_schedule,
        )
        self._process = NoiseProcess(objective, prediction_type, num_train_timesteps, beta_schedule)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        *,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image for each of `class_labels`, or `num_images` of no class.

        Args:
            class_labels: numbers or names of classes; None for images of no class.
            num_images: how many, without `class_labels`.
            height, width: in pixels; by default what the network was trained on.
            num_inference_steps: steps; Heun calls the network twice in each but the last.
            guidance_scale: 1 for none; more needs a network trained with class dropout.
            sampler: "euler" (the default) or "heun" for flow; "ddpm" (the default), "ddim" or "ancestral" for ddpm.
            generator: of the noise, one or one an image.
            latents: the initial noise, (B, C, h, w), instead of a drawn one.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], or "pt" (B, C, H, W) in [0, 1].
            return_dict: an `ImagePipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: unknown classes, a size that the patches do not divide, an unknown sampler.
        """
        device, config = self._execution_device, self.transformer.config
        labels = self._class_ids(class_labels, num_images).to(device)
        shape = (len(labels), config.in_channels, *self._latent_size(height, width))
        noise = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device)
        options: dict[str, Any] = {"labels": labels, "guidance_scale": guidance_scale, "steps": num_inference_steps}
        if self.config.objective == "flow":
            found = self._flow(noise, sampler or FLOW_SAMPLERS[0], **options)
        else:
            found = self._ddpm(noise, sampler or DDPM_SAMPLERS[0], generator, **options)
        images: Any = (self._decode(found) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            images = images if output_type == "np" else [_to_pil(image) for image in images]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The parent's, and the code: the folder loads elsewhere with `trust_remote_code=True`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        add_code(save_directory, self, "transformer")

    def _flow(
        self, noise: torch.Tensor, sampler: str, *, labels: torch.Tensor, guidance_scale: float, steps: int
    ) -> torch.Tensor:
        with self.progress_bar(total=2 * steps - 1 if sampler == "heun" else steps) as progress:

            def velocity(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
                pred, _ = self._predict(noisy, sigmas, labels, guidance_scale)
                progress.update()
                if self.config.prediction_type == "velocity":
                    return pred
                return (noisy - self._clean(pred, noisy, sigmas)) / sigmas.view(-1, 1, 1, 1)

            return sample_flow(velocity, noise, flow_sigmas(steps), sampler=sampler)

    def _ddpm(
        self, noise: torch.Tensor, sampler: str, generator: Any,
        *, labels: torch.Tensor, guidance_scale: float, steps: int,
    ) -> torch.Tensor:  # fmt: skip
        alpha_bar = self._process.alpha_bar.cpu()
        with self.progress_bar(total=steps) as progress:

            def denoise(noisy: torch.Tensor, timesteps: torch.Tensor) -> Any:
                pred, fraction = self._predict(noisy, timesteps, labels, guidance_scale)
                progress.update()
                latents = self._clean(pred, noisy, timesteps)
                return latents if fraction is None else (latents, fraction)

            def step_noise(step: int) -> torch.Tensor:
                return randn_tensor(noise.shape, generator=generator, device=noise.device)

            times = ddpm_timesteps(len(alpha_bar), steps)
            return sample_ddpm(denoise, noise, alpha_bar, times, sampler=sampler, step_noise=step_noise)

    def _predict(
        self, noisy: torch.Tensor, levels: torch.Tensor, labels: torch.Tensor, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The guided prediction, and the variance's fraction where the network predicts it; both (B, C, h, w)."""
        config, dtype, size = self.transformer.config, self.transformer.dtype, len(noisy)
        guided = guidance_scale != 1 and bool((labels != config.num_classes).any())
        if guided:
            noisy, levels = torch.cat([noisy, noisy]), torch.cat([levels, levels])
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        found = self.transformer(noisy.to(dtype), self._process.timestep(levels), labels, return_dict=False)[0].float()
        pred, fraction = found.chunk(2, dim=1) if config.learn_sigma else (found, None)
        if guided:
            pred = guide(pred[:size], pred[size:], guidance_scale)
        return pred, None if fraction is None else fraction[:size]

    def _clean(self, pred: torch.Tensor, noisy: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The latents that a prediction means, in the range that latents have."""
        limit = 1.0 if self.vae is None else LATENT_RANGE
        return self._process.clean(pred, noisy, levels).clamp(-limit, limit)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, C, h, w) to pixels in [-1, 1], (B, C', H, W), float32."""
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def _class_ids(self, class_labels: Any, num_images: int) -> torch.Tensor:
        """(B,), int64; `num_classes` stands for none."""
        config = self.transformer.config
        if class_labels is None:
            return torch.full((num_images,), config.num_classes)
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        labels = config.id2label or {}
        names = [labels[str(number)] for number in range(len(labels))]
        return torch.tensor([class_id(label, config.num_classes, names) for label in class_labels])

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config = self.transformer.config
        default = config.image_size if not isinstance(config.image_size, int) else [config.image_size] * 2
        scale = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        step = scale * config.patch_size
        size = (height or default[0] * scale, width or default[1] * scale)
        if any(side < step or side % step for side in size):
            raise ValueError(f"`height` and `width` {size[0]}x{size[1]}: multiples of {step} for this network.")
        return size[0] // scale, size[1] // scale


def class_id(label: Any, num_classes: int, names: Sequence[str] = ()) -> int:
    """The number of a class, of itself, its decimal digits, or its name.

    Raises:
        ValueError: there is no such class.
    """
    text = str(int(label)) if isinstance(label, torch.Tensor) else str(label)
    number = names.index(text) if text in names else int(text) if text.isdecimal() else -1
    if not num_classes:
        raise ValueError(f"`class_labels` {text!r}: this network knows no classes; leave them out.")
    if not 0 <= number < num_classes:
        some = f", or a name: {', '.join(names[:10])}{' ...' * (len(names) > 10)}" if names else ""
        raise ValueError(f"`class_labels` {text!r}: use a number from 0 to {num_classes - 1}{some}.")
    return number


def _to_pil(image: np.ndarray) -> Image.Image:
    """(H, W, C) in [0, 1], of 1, 3 or 4 channels."""
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"`output_type` 'pil' has no images of {image.shape[2]} channels: use 'np' or 'pt'.")
    levels = (image * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
