"""The contract of a model family: how one kind of network is loaded, encoded for, trained and sampled."""

import functools
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from ..diffusion.arguments import LossArguments
from ..diffusion.losses import edit_weights, sample_loss
from ..diffusion.process import Noised, NoiseLevels
from ..diffusion.randomness import randn, sample_keys
from ..diffusion.sources import source_name, source_names_in
from ..engines.quantisation import check_quantization, load_quantized
from ..errors import SciflowError
from ..options import Options, arguments, option
from .loading import (
    PIPELINE,
    Place,
    check_kind,
    check_part,
    describe_part,
    empty_part,
    explain_loading,
    load_part,
    model_source,
    part_class,
    place_of,
    quiet_loading,
    read_config,
    refuse_code,
    start_place,
)
from .tokens import PATCH, patchify, token_counts

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

POSTERIORS = ("mode", "sample")


class SamplingArguments(Protocol):
    """The options of training that say how images are drawn, as in `DiffusionTrainingArguments`."""

    seed: int
    num_inference_steps: int
    validation_prompts: list[str]
    validation_negative_prompt: list[str]
    validation_guidance_scale: float


def posterior_option(default: str) -> Any:
    """The option `posterior` of a family."""
    return option(
        default,
        "Latents of training: `mode`, the mean of the VAE's posterior, or `sample`, a fresh draw in each step. For "
        "that a cache also stores the standard deviation, which doubles the bytes of its latents.",
        choices=POSTERIORS,
    )


def _check_start(family: Any) -> None:
    if family.network_name_or_path:
        raise SciflowError(
            f"`init_weights` {family.init_weights!r} and `network_name_or_path` {family.network_name_or_path!r} both "
            "name the weights that training starts from: give one of them."
        )


def part_option(part: str, *, what: str = "") -> Any:
    """The option of a part of the pipeline with a path of its own."""
    return option(
        None,
        f"Folder or Hub repository of the {part}, or of a pipeline that has one, or a single safetensors file, instead "
        f"of the pipeline's.{what}",
    )


@arguments
class ModelFamily(NoiseLevels, Options, ABC):
    """One model family. The fields are its command-line flags; the methods are all that the rest needs of it."""

    heading: ClassVar[str] = "Model"

    pretrained_model_name_or_path: str = option(help="Folder or Hub repository of the pipeline, in diffusers layout.")
    revision: str | None = option(None, "Branch, tag or commit of the Hub repository.")
    posterior: str = posterior_option("mode")

    name: ClassVar[str]
    """Command-line name; equals the file name."""
    component: ClassVar[str] = "transformer"
    """Name of the trained network in the pipeline: prefix of LoRA keys, subfolder of full checkpoints."""
    patch: ClassVar[int] = 1
    """Side of an image token in latents."""
    pads_text: ClassVar[bool] = False
    """False: text of different lengths never shares a batch. True: padded to the longest, with a mask."""
    stores_time_ids: ClassVar[bool] = False
    """True: a cache has `time_ids` (6,) for each sample: original size, crop, size (see `build_cache`)."""
    task: ClassVar[str] = "text-to-image"
    """The Hub task shown on model cards."""
    whole_pipeline: ClassVar[bool] = False
    """True where `save_network` writes a pipeline that loads by itself."""
    max_sources: ClassVar[int] = 0
    """Reference images ("sources") that an edit may have; 0: the family draws from text alone."""
    text_reads_sources: ClassVar[bool] = False
    """True: `encode_prompts` takes `sources`, so that a text belongs to a caption and its sources."""
    lora_presets: ClassVar[dict[str, str]] = {}
    """Names for `--lora_layers`, each comma-separated names of layers."""

    @classmethod
    def renamed_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The fields of a family as an earlier version wrote them into a checkpoint, in today's words."""
        return options

    def resumed(self, network: dict[str, Any]) -> None:
        """Takes over what an interrupted run had found in its data, from the fields in its checkpoint."""

    # -- the step --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        batch: dict[str, torch.Tensor],
        args: LossArguments,
        *,
        noise: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One training step: (loss (B,), levels (B,)), both float32. Calls `model` exactly once.

        Args:
            model: the network, possibly wrapped (DDP, compile, PEFT).
            batch: collated samples, the family's keys; `noise_key` (B,) int64 where the loader gave keys; `loss_mask`
                (B, h, w) where the elements of the latents do not count alike; of edits `source_latents` (B, C, h, w),
                `source_latents_1`, ..., raw, and perhaps `edit_mask` (B, h, w), 255 inside the changed region.
            noise: shape of `clean_latents`; drawn from the keys unless given.
            levels: final noise levels (B,), after any shift: sigmas, or timesteps of DDPM; drawn from the keys unless
                given.
        """
        batch, noised = self.noised(batch, args, training=model.training, noise=noise, levels=levels)

        model_pred = self.predict(model, batch, noised.noisy_latents, noised.levels)

        return self.compare(model_pred, noised, batch, args), noised.levels.float()

    def noised(
        self,
        batch: dict[str, torch.Tensor],
        args: LossArguments,
        *,
        training: bool,
        noise: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], Noised]:
        """The batch with its keys, and its clean latents mixed with noise: what `predict` and `compare` are given.

        Args:
            batch, args, noise, levels: as in `compute_loss`.
            training: whether noise is drawn on the device, see `draw_noise`.
        """
        batch = self.prepare(batch, training=training)
        keys, latents = batch["noise_key"], self.clean_latents(batch)

        if noise is None:
            noise = self.draw_noise(keys, latents, training=training)
        if levels is None:
            levels = self.sample_levels(keys, args, self.image_seq_len(latents), batch)
        noise = noise.reshape(latents.shape)
        levels = levels.to(latents.device, self.process.level_dtype, non_blocking=True)

        noisy_latents = self.process.mix(latents, noise, levels)
        return batch, Noised(latents, noise, noisy_latents, levels, self.process.target(latents, noise, levels))

    def draw_noise(self, keys: Any, latents: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Noise of the shape of `clean_latents`, by key: on their device in training, else on the CPU."""
        return randn(keys, latents.shape, device=latents.device, draw_on_cpu=not training)

    def prepare(self, batch: dict[str, Any], *, training: bool) -> dict[str, Any]:
        """A copy of `batch` with `noise_key` (B,), fresh keys where the loader gave none: what the step is made of."""
        self.check_source_names(batch)
        return batch | {"noise_key": sample_keys(batch, len(next(iter(batch.values()))))}

    @abstractmethod
    def clean_latents(self, batch: dict[str, Any]) -> torch.Tensor:
        """The latents to mix with noise: (B, C, h, w), float32, normalised."""

    def clean_sources(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        """The sources of edits, in order, as `clean_latents` of themselves; [] where the batch has none."""
        return [self.clean_latents({"latents": batch[name]}) for name in source_names_in(batch)]

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, as the checkpoint says them: (1, C, 1, 1), float32.

        The network is trained on (latents - mean) / std, which is what `clean_latents` makes of the VAE's latents.
        The network itself is not loaded.

        Raises:
            SciflowError: the family trains on images as they are.
        """
        raise SciflowError(f"`{self.name}` trains on images as they are: there are no latents with statistics.")

    def image_seq_len(self, latents: torch.Tensor) -> int:
        """How many image tokens the network makes of `clean_latents`; the resolution's shift depends on it."""
        return latents[0, 0].numel() // self.patch**2

    @abstractmethod
    def predict(
        self, model: torch.nn.Module, batch: dict[str, Any], noisy_latents: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The network's prediction for `noisy_latents`: same shape, float32. Calls `model` exactly once.

        Of a flow that is the velocity noise - latents, else what `process.prediction_type` says. Gradients flow where
        they are enabled.

        Args:
            model: the network, possibly wrapped (DDP, compile, PEFT).
            batch: as in `compute_loss`. With `noise_key` what is random in here (class dropout) follows from the keys.
            noisy_latents: shape of `clean_latents`, float32.
            levels: (B,), on the same device: sigmas, float32, or timesteps, int64.
        """

    def compare(
        self, model_pred: torch.Tensor, noised: Noised, batch: dict[str, Any], args: LossArguments
    ) -> torch.Tensor:
        """The loss of every sample, (B,), float32: the mean over the elements, times the weight of the level.

        A family whose objective compares something else, or something more, overrides this hook. The mean, weighted by
        `loss_mask`, is taken in the order in which the network answers (`pack`): float32 rounds otherwise in another.

        Args:
            model_pred: of `predict`.
            noised: what was mixed, and the target that follows: latents, noise, noisy latents and target (B, C, h, w),
                levels (B,).
            batch: as in `compute_loss`, with `noise_key`, and with what `predict` has put into it.
        """
        mask = batch.get("loss_mask")
        if "edit_mask" in batch:
            mask = edit_weights(batch["edit_mask"], mask, args)
        loss = sample_loss(
            self.pack(model_pred),
            self.pack(noised.target),
            loss_type=args.loss_type,
            huber_delta=args.huber_delta,
            mask=None if mask is None else self.pack(self.element_mask(mask, noised.target)),
        )
        scheme, gamma = args.weighting_scheme, args.min_snr_gamma
        return self.process.weight(noised.levels, weighting_scheme=scheme, min_snr_gamma=gamma) * loss

    def element_mask(self, mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """`loss_mask` (B, h, w) in the shape of `latents`: every channel of a latent pixel counts alike."""
        return mask[:, None].expand_as(latents)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """`clean_latents` as the network takes them: (B, L, D) where it takes tokens."""
        return latents

    # -- the model -------------------------------------------------------------------------------------------------

    @abstractmethod
    def load_model(self, *, dtype: torch.dtype, meta: bool = False) -> torch.nn.Module:
        """The network to train, in `dtype`; with `meta` without weights, for `--dry_run`."""

    @property
    def source(self) -> str:
        """Where weights and configurations are loaded from: the package's own folder for `mini_klein`."""
        return model_source(self.pretrained_model_name_or_path)

    @property
    def own_places(self) -> Mapping[str, Place]:
        """The parts of the pipeline that have a path of their own, by name."""
        return {}

    def part_facts(self) -> list[dict[str, Any]]:
        """The same for model cards, with what loads them."""
        return []

    @property
    def from_scratch(self) -> bool:
        """True where the initial weights are random, so that there is no base model to compare with."""
        return False

    def load_encoders(
        self, *, device: torch.device | str, dtype: torch.dtype, images: bool = True, text: bool = True
    ) -> Any:
        """VAE (with `images`) and text encoder (with `text`), frozen: for building caches."""
        raise SciflowError(f"`{self.name}` trains on images as they are: it takes no cache of latents.")

    def load_text_encoder(self, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """Only the parts that `encode_prompts` needs, for encoding prompts in training."""
        return self.load_encoders(device=device, dtype=dtype, images=False)

    def encode_images(self, pixel_values: torch.Tensor, encoders: Any) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> what a cache stores of them."""
        with torch.no_grad():
            pixel_values = pixel_values.to(encoders.vae.device, encoders.vae.dtype)
            return self.posterior_tensors(encoders.vae.encode(pixel_values).latent_dist)

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels at which the pipeline shows the network a source of that size."""
        raise SciflowError(f"`{self.name}` takes no reference images.")

    def source_resized(self, height: int, width: int) -> tuple[int, int]:
        """The size to which the pipeline resizes a source before it cuts `source_size` out of its centre."""
        return self.source_size(height, width)

    def check_source(self, height: int, width: int) -> str:
        """Why the pipeline refuses a source of that size in pixels; "" where it takes it."""
        return ""

    def encode_source_images(self, pixel_values: torch.Tensor, encoders: Any) -> torch.Tensor:
        """Sources (B, 3, H, W) in [-1, 1], of `source_size` -> their raw latents (B, C, h, w): the posterior's mode."""
        return self.encode_images(pixel_values, encoders)["latents"]

    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """Prompts -> `prompt_embeds` (B, L, D) and the family's extras."""
        raise SciflowError(f"`{self.name}` takes no prompts.")

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int] | None:
        """How many tokens each prompt has, and how many of them `encode_prompts` reads; None: unknown."""
        return None

    @abstractmethod
    def encoder_settings(self) -> dict[str, Any]:
        """Settings that determine the content of a cache, as plain JSON values."""

    @abstractmethod
    def bucket_step(self) -> int:
        """Height and width of images must be multiples of this many pixels."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape (C, h, w) of what `encode_images` makes of an image of that many pixels."""
        raise SciflowError(
            f"`image_encoding` online, or `dry_run`: the family `{self.name}` does not say how large its latents "
            "are. Give it a method `latent_shape(height, width)`, or build its cache with latents."
        )

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
        """A diffusers pipeline around `model` itself (no copy), in its dtype; without one, all of it in float32."""

    @abstractmethod
    def encode_validation_prompts(
        self, prompts: Sequence[str], *, device: torch.device | str, dtype: torch.dtype, encoders: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Text inputs of `generate`, one dict a prompt, by `encoders`, or by some that are loaded and freed again.

        If `check_negative_prompt` accepts them, it also takes `negative_prompts`: one per prompt.
        """

    def check_negative_prompt(self, guidance_scale: float) -> None:
        """Raises SciflowError where `--validation_negative_prompt` would change nothing."""
        raise SciflowError(f"`validation_negative_prompt`: `{self.name}` takes no negative prompt. Leave it out.")

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
        source_images: Sequence["Image"] = (),
    ) -> list["Image"]:
        """Images of one prompt, edits of `source_images` where given."""

    def call_arguments(self, args: SamplingArguments) -> list[str]:
        """Code of further arguments in the pipeline's call, for the model card."""
        return []

    @abstractmethod
    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """Raises SciflowError where a sample does not fit the network (channels, text width, ids)."""

    def save_network(self, model: Any, folder: Path) -> None:
        """Writes the trained network in diffusers layout below `folder`."""
        model.save_pretrained(folder / self.component)

    def idle_layers(self, model: Any) -> tuple[str, ...]:
        """Paths of layers whose output is read by nothing: without a gradient, so neither adapted nor trained."""
        return ()

    def posterior_tensors(self, distribution: Any) -> dict[str, torch.Tensor]:
        """Arrays that a cache stores for diffusers' `DiagonalGaussianDistribution`: (B, C, h, w) each.

        `latents`, its mean, and with `posterior="sample"` `latents_std`, its standard deviation.
        """
        mean = {"latents": distribution.mode()}
        return mean | {"latents_std": distribution.std} if self.posterior == "sample" else mean

    def check_latent_extras(self, sample: dict[str, torch.Tensor]) -> None:
        """Raises SciflowError where `latents_std` is missing or does not fit `latents`, or masks or sources do not."""
        key = "latents" if "latents" in sample else "pixel_values"
        latents = tuple(sample[key].shape)
        if key == "latents" and self.posterior == "sample" and "latents_std" not in sample:
            raise SciflowError(
                "`posterior` 'sample': this cache holds no standard deviation (`latents_std`). Build it again by "
                "`sciflow-hf cache build --posterior sample`, or train on the mode."
            )
        spatial = latents[-2:]
        for name, expected in (("latents_std", latents), ("loss_mask", spatial), ("edit_mask", spatial)):
            if name in sample and tuple(sample[name].shape) != expected:
                raise SciflowError(f"`{name}` {tuple(sample[name].shape)}: `{key}` {latents} need {expected}.")
        for name in self.check_source_names(sample):
            shape = tuple(sample[name].shape)
            if len(shape) != 3 or shape[0] != latents[0] or any(side % self.patch for side in shape[1:]):
                raise SciflowError(
                    f"`{name}` {shape}: `{self.name}` takes ({latents[0]}, h, w), h and w multiples of {self.patch}. "
                    "Was the cache built by another family or VAE?"
                )

    def check_source_names(self, names: Iterable[str]) -> list[str]:
        """The sources among `names`, in order; SciflowError where they are more than the family takes."""
        sources = source_names_in(names)
        if len(sources) > self.max_sources:
            takes = f"at most {self.max_sources}" if self.max_sources else "none"
            raise SciflowError(
                f"`{sources[self.max_sources]}`: this is an edit of {len(sources)} reference "
                f"image{'s' * (len(sources) > 1)}, and `{self.name}` takes {takes}. Train a family that reads them, or "
                "build the cache without them."
            )
        return sources


@arguments
class PipelineFamily(ModelFamily):
    """A family whose parts diffusers loads and saves as one pipeline folder. Its files name the classes."""

    heading: ClassVar[str] = "Pipeline"

    trust_remote_code: bool = option(
        False, "Load a model folder that brings code of its own for parts other than the network, and run that code."
    )
    network_name_or_path: str | None = part_option("network to train", what=" A file is in its published form.")
    init_weights: str | None = option(
        None,
        "Weights of the network to start from, such as those of an earlier stage: the folder of a run that trained all "
        "weights, a folder or Hub repository in diffusers layout, of a pipeline or of the network alone, or a "
        "safetensors file of a network.",
        check=_check_start,
    )
    vae_name_or_path: str | None = part_option("VAE")
    text_encoder_name_or_path: str | None = part_option("text encoder", what=" Its tokenizer stays the pipeline's.")

    exact_pipeline: ClassVar[bool] = False
    """True: models of other pipelines are refused, also where the kind of network is the same."""
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """Parts of the pipeline that encode prompts."""

    @abstractmethod
    def network_class(self) -> Any:
        """The diffusers class of the trained network."""

    def config(self, subfolder: str = "") -> dict[str, Any]:
        """The configuration of one part of the pipeline ("vae", "transformer", "scheduler"), or of the pipeline.

        Raises:
            SciflowError: it cannot be read, belongs to another kind of network, or without `trust_remote_code` brings
                code of its own.
        """
        found = self._configs
        if subfolder not in found:
            place = self.configured(subfolder)
            config = read_config(place)
            if place.option != PIPELINE:
                check_part(place, config, self.part_class(subfolder))
            found[subfolder] = config
        return found[subfolder]

    @functools.cached_property
    def own_places(self) -> Mapping[str, Place]:
        """The parts whose `--<part>_name_or_path` is given: name of the part -> where its weights are."""
        names = {f"{part}_name_or_path": part for part in ("vae", *self.text_parts)}
        names["network_name_or_path"] = self.component
        given = [(part, vars(self).get(name), name) for name, part in names.items()]
        found = {part: place_of(part, path, name) for part, path, name in given if path}
        return found | ({self.component: start_place(self.component, self.init_weights)} if self.init_weights else {})

    def place(self, part: str) -> Place:
        """Where the weights of a part are."""
        base = Place(part, self.pretrained_model_name_or_path, part, self.revision)
        return self.own_places.get(part, base)

    def configured(self, part: str) -> Place:
        """Where the configuration of a part is: that of a single file is the pipeline's."""
        place = self.place(part)
        return Place(part, self.pretrained_model_name_or_path, part, self.revision) if place.is_file else place

    def part_class(self, part: str) -> Any:
        """The class of a part; SciflowError where the pipeline has none."""
        kind = self.network_class() if part == self.component else part_class(self.config(), part)
        if kind is None:
            raise SciflowError(f"`{self.place(part).option}`: {self.source!r} holds no {part}. Leave it out.")
        return kind

    def part_facts(self) -> list[dict[str, Any]]:
        """The parts with a path of their own for model cards, with what loads them."""
        return [describe_part(place, self.part_class(part)) for part, place in self.own_places.items()]

    def load_part(self, part: str, *, dtype: torch.dtype, **options: Any) -> Any:
        """One part of the pipeline, from its own path where it has one."""
        place = self.place(part)
        if part in self.own_places and not place.is_file:
            self.config(part)  # refuses another kind
        return load_part(self.part_class(part), place, self.configured(part), dtype=dtype, **options)

    def empty_part(self, part: str) -> torch.nn.Module:
        """The same without weights, on the meta device."""
        return empty_part(self.part_class(part), self.configured(part), self.config(part))

    @functools.cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        """Those read by now, first that of the pipeline, "", which may be refused."""
        path = self.pretrained_model_name_or_path
        index = read_config(Place("", path, revision=self.revision))
        classes = [(index.get(part) or [None, None])[1] for part in (self.component, "transformer", "unet")]
        found = next(filter(None, classes), "pipeline without a network")
        check_kind(path, found, family=self.name, network=self.network_class().__name__)
        wanted, kind = self.pipeline_class().__name__ if self.exact_pipeline else None, index.get("_class_name")
        if wanted not in (None, kind):
            raise SciflowError(
                f"`pretrained_model_name_or_path` {path!r} holds a {kind}, but `{self.name}` trains a {wanted}, whose "
                "network, of the same class, has learned other inputs. Take the family of that model."
            )
        if not self.trust_remote_code:
            refuse_code(path, index, revision=self.revision)
        return {"": index}

    def read_pipeline(self, what: str, *, dtype: Any = torch.float32, **parts: Any) -> Any:
        """The pipeline with these `parts` instead of its own, None for none; `what` is how errors call it."""
        path, options = self.pretrained_model_name_or_path, {"trust_remote_code": self.trust_remote_code}
        dtypes: dict[str, torch.dtype] = dtype if isinstance(dtype, dict) else {"default": dtype}
        options["dtype"] = dtype
        with explain_loading(path, what), quiet_loading():
            for part in self.own_places.keys() - parts.keys():
                parts[part] = self.load_part(part, dtype=dtypes.get(part) or dtypes["default"])
            return self.pipeline_class().from_pretrained(self.source, revision=self.revision, **options, **parts)

    def setting(self, part: str, name: str) -> Any:
        """A value of the configuration of one part; SciflowError where the checkpoint does not say it."""
        value = self.config(part).get(name)
        if value is None:
            place = self.configured(part)
            raise SciflowError(
                f"`{place.option}` {place.path!r}: the configuration of its {part} has no `{name}`, which "
                f"`{self.name}` needs. Is it another kind of model?"
            )
        return value

    # -- the step --------------------------------------------------------------------------------------------------

    def clean_latents(self, batch: dict[str, Any]) -> torch.Tensor:
        """`normalise` of the batch's `latents`: (B, C, h, w), float32."""
        return self.normalise(batch["latents"].float())

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the VAE as the network is trained on them, (B, C, h, w), float32: (latents - shift) scale."""
        return (latents - self.latents_shift) * self.latents_scale

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, (1, C, 1, 1), float32: those of `normalise`."""
        if self.statistics:
            mean, std = self.statistics
            return mean.cpu(), std.cpu()
        shape = (1, self.setting("vae", "latent_channels"), 1, 1)
        return torch.full(shape, self.latents_shift), torch.full(shape, 1 / self.latents_scale)

    @property
    def latents_shift(self) -> float:
        """Subtracted by `normalise`: `shift_factor` of the VAE, 0 where it has none."""
        return float(self.config("vae").get("shift_factor") or 0)

    @property
    def latents_scale(self) -> float:
        """Factor of `normalise`: `scaling_factor` of the VAE."""
        return float(self.setting("vae", "scaling_factor"))

    @functools.cached_property
    def statistics(self) -> tuple[torch.Tensor, ...]:
        """Mean and deviation, (1, C, 1, 1) each, where `normalise` needs them; see `statistics_on`."""
        return ()

    def statistics_on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """`statistics`, kept on `device`."""
        if self.statistics[0].device != device:
            self.__dict__["statistics"] = tuple(t.to(device) for t in self.statistics)
        return self.statistics

    def text_inputs(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `model` that hold the text; of `NetworkWithText`, which encodes captions itself, the batch."""
        text = {n: batch[n] for n in ("captions", "latents", "time_ids") if n in batch}  # DDP would move the keys
        return {"batch": text, "dtype": dtype} if "captions" in batch else self.text_arguments(batch, dtype)

    def text_arguments(self, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the network that hold the text of `batch`. Needed where `trained_text_parts` are named."""
        raise NotImplementedError

    # -- the checkpoint --------------------------------------------------------------------------------------------

    base_weights: ClassVar[str] = ""
    """The weights to train instead of step-distilled ones, whose names have "turbo"; "" where there are none."""

    def load_model(self, *, dtype: torch.dtype, meta: bool = False, quantize: str | None = None) -> torch.nn.Module:
        """The network in `dtype`: without weights if `meta`, packed as `quantize` says (`--quantize_base`).

        Raises:
            SciflowError: another kind of model, weights that cannot be loaded, or a package that packing needs.
        """
        if self.base_weights and "turbo" in self.pretrained_model_name_or_path.lower():  # no configuration says so
            logger.warning(
                "`%s` is step-distilled: training moves it away from its few-step sampler. Train %s and use the LoRA "
                "on turbo if you like.",
                self.pretrained_model_name_or_path,
                self.base_weights,
            )
        path, found = self.configured(self.component).path, self.setting(self.component, "_class_name")
        check_kind(path, found, family=self.name, network=self.network_class().__name__)
        if meta:
            return torch.nn.Module.to(self.empty_part(self.component), dtype)
        _ = self.statistics  # read with the weights, not in the first step
        load = functools.partial(self.load_part, self.component, dtype=dtype)
        if quantize is not None:
            check_quantization(quantize)
            empty = PipelineFamily.load_model(self, dtype=dtype, meta=True)
            load = functools.partial(load_quantized, load, quantize, empty=empty, dtype=dtype)
        with explain_loading(path, self.component):
            return load()

    def load_encoders(
        self, *, device: torch.device | str, dtype: torch.dtype, images: bool = True, text: bool = True
    ) -> Any:
        """The pipeline without its network, frozen: VAE (with `images`), text encoders and tokenizers (with `text`)."""
        self.config()  # refuses another kind of pipeline
        without = [self.component, *(() if images else ("vae",)), *(self.unread_parts() if text else self.text_parts)]
        pipeline = self.read_pipeline("VAE and text encoder", dtype=dtype, **dict.fromkeys(without))
        if text:
            self.shorten_text_encoder(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        return pipeline.to(device)

    unnamed_posterior: ClassVar[str] = ""
    """The `posterior` that caches of this family do not name, for the older ones."""

    text_settings: ClassVar[dict[str, Any]] = {"padding_side": "right"}
    """How texts are encoded, where no field says it: a part of `encoder_settings`."""

    def encoder_settings(self) -> dict[str, Any]:
        """Model, revision, text length and layers, and the posterior; training refuses a cache with others."""
        names = ("pretrained_model_name_or_path", "revision", "max_sequence_length")
        found = {"family": self.name} | {name: vars(self).get(name) for name in names} | self.text_settings
        found |= {place.option: place.identity for part, place in self.own_places.items() if part != self.component}
        return found | ({} if self.posterior == self.unnamed_posterior else {"posterior": self.posterior})

    def bucket_step(self) -> int:
        """Pixels: `patch` times the VAE's halvings."""
        return self.patch * 2 ** (len(self.setting("vae", "block_out_channels")) - 1)

    def scheduler_line(self, image_seq_len: int) -> float:
        """`resolution_mu` as the scheduler's configuration has it: a line through its two lengths and shifts."""
        config = self.config("scheduler")
        base_length, max_length = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (max_shift - base_shift) / (max_length - base_length)
        return float(slope * image_seq_len + (base_shift - slope * base_length))

    @property
    def pixels_per_latent(self) -> int:
        """Side of a latent in pixels."""
        return self.bucket_step() // self.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image, by the network's channels and the VAE's halvings."""
        widths, side = self.widths(SimpleNamespace(**self.config(self.component))), self.pixels_per_latent
        return widths["latents"], height // side, width // side

    @abstractmethod
    def widths(self, config: Any) -> dict[str, int]:
        """Sizes that a network of this configuration takes: channels of `latents`, width of `prompt_embeds` etc."""

    def positions(self, config: Any) -> int | None:
        """Image tokens on a side that a network of this configuration has positions for, where that is limited."""
        return None

    def check_sample(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        """Compares one sample of a cache with the configuration of `model`: arrays, channels, widths, positions.

        Raises:
            SciflowError: an array that is missing or does not fit; names both shapes.
        """
        widths = self.widths(model.config)
        missing = [key for key in widths if key not in sample]
        if missing:
            raise SciflowError(f"a sample of `{self.name}` needs {missing}; it has {sorted(sample)}.")
        shape = tuple(sample["latents"].shape)
        if len(shape) != 3 or shape[0] != widths["latents"] or any(side % self.patch for side in shape[1:]):
            even = " with even h and w" if self.patch == 2 else ""
            raise SciflowError(
                f"`latents` {shape}: `{self.name}` takes ({widths['latents']}, h, w){even}. Was the cache built by "
                "another family or VAE?"
            )
        tokens = self.positions(model.config)
        if tokens is not None and max(shape[1:]) > self.patch * tokens:
            raise SciflowError(
                f"`latents` {shape}: this network has positions for {tokens} x {tokens} tokens (`pos_embed_max_size`), "
                f"so for sides of at most {tokens * self.bucket_step()} pixels. Build the cache with a smaller "
                "`--resolution`."
            )
        self.check_latent_extras(sample)
        for name, length in (("prompt_embeds", "L, "), ("pooled_prompt_embeds", "")):
            if name in widths and (sample[name].ndim, sample[name].shape[-1]) != (1 + bool(length), widths[name]):
                layers = self.text_settings.get("text_encoder_layers", ())
                one_state = name == "prompt_embeds" and sample[name].shape[-1] * len(layers) == widths[name]
                why = (
                    " That is one hidden state of the text encoder, as SciForma's published script for caches takes; "
                    f"the network reads {len(layers)} of them side by side, {', '.join(map(str, layers))}. Encode the "
                    "captions in training (`--text_encoding online`), or"
                )
                raise SciflowError(
                    f"`{name}` {tuple(sample[name].shape)}: this network takes ({length}{widths[name]})."
                    f"{f'{why} build' if one_state else ' Build'} the cache with the model that you train."
                )

    prompt_tokenizer: ClassVar[str] = ""
    """The part of the pipeline whose tokens `max_sequence_length` limits, if prompts have no template."""

    def count_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int] | None:
        """Tokens of each prompt by the `prompt_tokenizer`, and how many of them are read; None where none is named."""
        if not self.prompt_tokenizer:
            return None
        if (tokenizer := getattr(self.tokenizers, self.prompt_tokenizer)) is not None:
            return token_counts(prompts, tokenizer), vars(self)["max_sequence_length"]
        return token_counts(prompts, self.tokenizers.tokenizer), self.tokenizers.tokenizer.model_max_length

    @functools.cached_property
    def tokenizers(self) -> Any:
        """The pipeline with its tokenizers alone, for `count_tokens`."""
        without = (name for name, kind in self.config().items() if isinstance(kind, list) and "tokenizer" not in name)
        return self.read_pipeline("tokenizers", **dict.fromkeys([*without, *self.unread_parts()]))

    def unread_parts(self) -> tuple[str, ...]:
        """Those of `text_parts` that `encode_prompts` leaves out."""
        return ()

    def shorten_text_encoder(self, pipeline: Any) -> None:
        """Takes away the parts of the text encoder that `encode_prompts` does not need."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], encoders: Any) -> dict[str, torch.Tensor]:
        """Prompts -> `prompt_embeds` (B, L, D) and the family's extras, as the pipeline encodes them."""

    def load_pipeline(
        self,
        model: torch.nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        with_text_encoder: bool = False,
    ) -> Any:
        """The diffusers pipeline around `model` (no copy, its dtype); without one, all of it in float32."""
        self.config()  # refuses another kind of pipeline
        without: dict[str, Any] = {} if with_text_encoder else dict.fromkeys(self.text_parts)
        # One dtype for all parts: left alone, transformers takes that of the files and diffusers float32.
        given: dict[str, Any] = {}
        if model is not None:
            given = {self.component: model, "dtype": network_dtype(model)}
        pipeline = self.read_pipeline("pipeline", **without, **given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    no_prompt: ClassVar[str] = ""
    """Guidance leads away from this if there is no `--validation_negative_prompt`."""

    def encode_validation_prompts(
        self,
        prompts: Sequence[str],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        encoders: Any = None,
        negative_prompts: Sequence[str] | None = None,
        source_images: Sequence[Sequence["Image"]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """One dict of `pipeline_inputs` a prompt, on the CPU. Each distinct text is encoded once.

        Args:
            prompts: what to draw.
            device: of the text encoders, where they are loaded here.
            dtype: of the text encoders, where they are loaded here.
            encoders: those of `load_encoders`, if they are loaded already.
            negative_prompts: one a prompt; None: guidance away from `no_prompt`.
            source_images: the RGB images that each prompt edits, none for a prompt without. Read by families with
                `text_reads_sources`; the negative prompt of an edit reads them too.
        """
        encoders = encoders or self.load_text_encoder(device=device, dtype=dtype)
        away = [self.no_prompt] * len(prompts) if negative_prompts is None else negative_prompts
        given = source_images if source_images and self.text_reads_sources else [()] * len(prompts)
        ids = [tuple(map(id, images)) for images in given]
        wanted, unwanted = list(zip(prompts, ids, strict=True)), list(zip(away, ids, strict=True))
        texts = dict(zip([*wanted, *unwanted], [*given, *given], strict=True))  # each once, with what it reads
        options = {"sources": list(texts.values())} if self.text_reads_sources else {}
        encoded = self.encode_prompts([text for text, _ in texts], encoders, **options)
        rows = {text: {k: v[i : i + 1].cpu() for k, v in encoded.items()} for i, text in enumerate(texts)}
        negatives = [rows[text] for text in unwanted]
        if negative_prompts is None:
            negatives = [self.unconditional(row) for row in negatives]
        return [self.pipeline_inputs(rows[text], row) for text, row in zip(wanted, negatives, strict=True)]

    def unconditional(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs that guidance leads away from without a negative prompt, from the row (1, ...) of `no_prompt`."""
        return row

    no_guidance: ClassVar[float] = 1
    """The pipeline draws without guidance up to this scale."""

    def check_negative_prompt(self, guidance_scale: float) -> None:
        """Raises SciflowError where guidance is off, so that a negative prompt would change nothing."""
        if guidance_scale <= self.no_guidance:
            raise SciflowError(
                f"`validation_negative_prompt` does nothing at `validation_guidance_scale` {guidance_scale:g}: there "
                f"`{self.name}` draws without. Give more than {self.no_guidance:g}, or leave the negative prompt out."
            )

    trained_text_parts: ClassVar[tuple[str, ...]] = ()
    """Text encoders whose LoRA the pipeline can load: what `--train_text_encoder` trains."""
    idle_text_layers: ClassVar[dict[str, int]] = {}
    """How many of the last layers of a text encoder nothing reads."""

    def pipeline_inputs(
        self, prompt: dict[str, torch.Tensor], negative: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Arguments of the pipeline's call from rows (1, ...) of `encode_prompts`: a prompt's and a negative one's."""
        return prompt | {f"negative_{name}": value for name, value in negative.items()}

    guidance_argument: ClassVar[str] = "guidance_scale"
    """The pipeline's argument for the guidance of `--validation_guidance_scale`."""
    negative_argument: ClassVar[str] = "negative_prompt={!r}"
    """How a user gives the pipeline's call a negative prompt; `length` is that of the prompts."""

    def call_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call in validation, plain values."""
        return {}

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it draw an image of that many pixels."""
        return {"height": height, "width": width}

    def source_options(self, source_images: Sequence["Image"]) -> dict[str, Any]:
        """Arguments of the pipeline's call that hold the sources of an edit; SciflowError where there are too many."""
        self.check_source_names(source_name(i) for i in range(len(source_images)))
        return {"image": list(source_images)} if source_images else {}

    def needs_negative_prompt(self) -> bool:
        """Whether the pipeline's call has guidance only where it is given a negative prompt."""
        return False

    def call_arguments(self, args: SamplingArguments) -> list[str]:
        """The length of text where it is not the usual one, and what validation images were drawn with."""
        found, length = [], vars(self).get("max_sequence_length")
        takes_length = "max_sequence_length" in inspect.signature(self.pipeline_class().__call__).parameters
        if takes_length and length != vars(type(self)).get("max_sequence_length"):
            found = [f"max_sequence_length={length}"]
        options = {self.guidance_argument: args.validation_guidance_scale, **self.call_options()}
        found += [f"{name}={value!r}" for name, value in options.items() if args.validation_prompts]
        negative = [*args.validation_negative_prompt, *([self.no_prompt] if self.needs_negative_prompt() else [])]
        return found + [self.negative_argument.format(text, length=length) for text in negative[:1]]

    def generate(
        self,
        pipeline: Any,
        prompt_inputs: dict[str, torch.Tensor],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator],
        source_images: Sequence["Image"] = (),
        **options: Any,
    ) -> list["Image"]:
        """Images of one prompt by the pipeline's own call, in the dtype and on the device of its network.

        Args:
            pipeline: of `load_pipeline`.
            prompt_inputs: one dict of `encode_validation_prompts`.
            height: pixels, a multiple of `bucket_step`.
            width: pixels, a multiple of `bucket_step`.
            num_inference_steps: denoising steps.
            guidance_scale: passed as `guidance_argument`.
            generator: all randomness of the image; of several images one each.
            source_images: RGB images to edit, which the pipeline resizes by its own rule.
            options: further arguments of the call.
        """
        network = getattr(pipeline, self.component)
        dtype, device = network_dtype(network), next(network.parameters()).device
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in prompt_inputs.items()
        }

        def as_network(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            # Mixed precision returns float32, in which the scheduler continues; the VAE takes its own dtype.
            return {"latents": state["latents"].to(dtype)}

        images: list[Image] = pipeline(
            **inputs,
            **self.size_options(height, width),
            **self.source_options(source_images),
            num_inference_steps=num_inference_steps,
            generator=generator,
            **{self.guidance_argument: guidance_scale},
            **self.call_options(),
            **{"callback_on_step_end": as_network} | options,
        ).images
        return images

    def draw(
        self,
        pipeline: Any,
        encoded: Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generators: Sequence[torch.Generator],
        source_images: Sequence["Image"] = (),
        **options: Any,
    ) -> tuple[torch.Tensor, list["Image"]]:
        """B images in one call of the pipeline, and their latents: (B, C, h, w), as a cache holds them.

        For one image the call of `generate`. Several differ from images drawn one by one by the rounding of larger
        batches.

        Args:
            pipeline: of `load_pipeline`.
            encoded: of `encode_validation_prompts`: one dict for all images, or one each, of texts of one shape.
            height: pixels, a multiple of `bucket_step`.
            width: pixels, a multiple of `bucket_step`.
            num_inference_steps: denoising steps.
            guidance_scale: passed as `guidance_argument`.
            generators: one for each of the B images.
            source_images: RGB images that all of them edit, see `generate`.
            options: further arguments of the call.

        Returns:
            The latents, raw, in the dtype in which the VAE was given them to decode, and the images.

        Raises:
            SciflowError: texts of different shapes, or another number of them than of generators.
        """
        rows = [encoded] * len(generators) if isinstance(encoded, Mapping) else encoded
        shapes = [{name: tuple(value.shape) for name, value in row.items()} for row in rows]
        if len(rows) != len(generators) or any(shape != shapes[0] for shape in shapes):
            raise SciflowError(
                f"`encoded`: {len(generators)} images in one call need one text, or one each of the same shape, but "
                f"there are {len(rows)}, of {[shape['prompt_embeds'] for shape in shapes]}. Draw them in several calls."
            )
        with decoded_latents(pipeline.vae) as found:
            images = self.generate(
                pipeline,
                {name: torch.cat([row[name] for row in rows]) for name in rows[0]},
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=list(generators),
                source_images=source_images,
                **options,
            )
        latents = torch.cat(found)
        return latents.squeeze(2) if latents.ndim == 5 else latents, images  # a video VAE's axis of frames


@arguments
class PatchedFamily(PipelineFamily):
    """A family on the latents of FLUX.2's VAE: 2x2 pixels become channels, which the VAE's batch norm normalises."""

    patch: ClassVar[int] = PATCH
    batch_norm_eps: ClassVar[float | None] = None
    """Inside the root; that of the VAE's configuration where it is None."""
    unnamed_posterior: ClassVar[str] = "mode"

    def clean_latents(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, 4C, h/2, w/2)."""
        return self.normalise(patchify(batch["latents"].float()))

    def element_mask(self, mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """`loss_mask` (B, h, w) patchified as the latents are: (B, 4C, h/2, w/2)."""
        return patchify(mask[:, None].expand(-1, latents.shape[1] // PATCH**2, -1, -1))

    def image_seq_len(self, latents: torch.Tensor) -> int:
        """Image tokens of patchified latents (B, 4C, h/2, w/2)."""
        return latents[0, 0].numel()  # 2x2 pixels are channels by now

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4C, h, w): per channel by the running statistics of the VAE's batch norm."""
        mean, std = self.statistics_on(latents.device)
        return (latents - mean) / std

    @functools.cached_property
    def statistics(self) -> tuple[torch.Tensor, ...]:
        """Mean and deviation of the VAE's batch norm, (1, 4C, 1, 1), eps inside the root."""
        vae = self.load_part("vae", dtype=torch.float32)
        eps = vae.config.batch_norm_eps if self.batch_norm_eps is None else self.batch_norm_eps
        return vae.bn.running_mean.view(1, -1, 1, 1), (vae.bn.running_var.view(1, -1, 1, 1) + eps).sqrt()


@contextmanager
def decoded_latents(vae: Any) -> Iterator[list[torch.Tensor]]:
    """Collects what `vae` decodes within the block: every pipeline undoes packing and normalisation before that."""
    decode, own = vae.decode, vars(vae).get("decode")
    found: list[torch.Tensor] = []

    def keeping(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        found.append(latents.detach())
        return decode(latents, *args, **options)

    vae.decode = keeping
    try:
        yield found
    finally:
        del vae.decode
        if own is not None:
            vae.decode = own


def network_dtype(model: torch.nn.Module) -> torch.dtype:
    """dtype of the network's own weights, through any wrapper (`model.dtype` fails under DDP).

    Where they are packed in integers, that of what is not: norms and biases. An adapter's, float32, is another.
    """
    first = next(model.parameters())
    if first.is_floating_point():
        return first.dtype
    floating = [p for p in model.parameters() if p.is_floating_point()]
    return next((p for p in floating if not p.requires_grad), floating[0]).dtype
