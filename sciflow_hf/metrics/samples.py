"""How good drawn images are as a set: Frechet and kernel distance to held-out ones, and whether their class is seen."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..diffusion.randomness import hash64
from ..errors import SciflowError
from ..options import Options, arguments, option
from .classifier import class_accuracy, train_classifier
from .frechet import frechet_distance, image_features, kernel_distance

if TYPE_CHECKING:
    from ..families.base import SamplingArguments
    from ..families.dit import DiT

logger = logging.getLogger(__name__)


def _check_number(metrics: "SampleMetrics") -> None:
    if metrics.metric_images == 1:
        raise SciflowError("`metric_images` 1: 0 or at least 2, for one image is no set.")


@arguments
class SampleMetrics(Options):
    """Scores of images that are drawn in every evaluation, class after class, as `eval_fid`, `eval_kid` and so on.

    The distances are to the held-out images. By default their feature space is that of a small classifier, trained on
    the training images before the first evaluation (`train_classifier`), which also says whether a drawn image shows
    the class that was asked for. Such numbers compare runs on one data set; they are not those of papers, which take
    Inception-v3: name a function that makes it by `metric_network`.
    """

    heading: ClassVar[str] = "Metrics of drawn images"

    metric_images: int = option(
        0,
        "Images drawn and scored in each evaluation, shared among ranks; 0 for none, else at least 2.",
        within="[0, inf)",
        check=_check_number,
    )
    metric_batch_size: int = option(100, "Images drawn at once for that.", within="[1, inf)")
    metric_network: str | None = option(
        None,
        "Dotted path of a function without arguments that makes the feature network, images (B, C, H, W) in [-1, 1] to "
        "(B, D). By default a small classifier, trained here.",
    )
    metric_classifier: str | None = option(
        None,
        "The same for a classifier, to (B, classes). By default the same one.",
    )

    def of(
        self, family: "DiT", model: torch.nn.Module, train: Any, held_out: Any, args: "SamplingArguments"
    ) -> Callable[[Any], dict[str, float]] | None:
        """`compute_metrics` for a trainer: draws with the current `model` (averaged, if EMA is on)."""
        if not self.metric_images or held_out is None:
            return None
        if "pixel_values" not in held_out[0]:
            raise SciflowError("`metric_images` needs images, but this data holds latents: leave it out.")
        own = self.metric_network is None or (self.metric_classifier is None and bool(family.num_classes))
        makers = [made(path) for path in (self.metric_network, self.metric_classifier)]  # a wrong path shows now

        @functools.cache
        def judges() -> tuple[Any, Any, np.ndarray]:
            """Feature network, classifier, features of the held-out images."""
            trained = train_classifier(train, num_classes=family.num_classes or 0) if own else None
            network = makers[0] or trained.features  # type: ignore[union-attr]
            real = torch.stack([held_out[row]["pixel_values"] for row in range(len(held_out))])
            return network, makers[1] or trained, image_features(network, real.split(256))

        def measure(prediction: Any) -> dict[str, float]:
            network, classifier, real = judges()
            labels = even_labels(self.metric_images, family.num_classes or 0)
            images = draw(
                family, model, labels, steps=args.num_inference_steps, seed=args.seed,
                guidance_scale=args.validation_guidance_scale, batch_size=self.metric_batch_size,
            )  # fmt: skip
            features = image_features(network, images.split(256))
            found = {"fid": frechet_distance(features, real)}
            found["kid"], found["kid_std"] = kernel_distance(features, real)
            if labels is not None and classifier is not None:
                found["class_accuracy"] = class_accuracy(classifier, images, labels)
            return found

        return measure


def made(path: str | None) -> Any:
    """The result of the function at a dotted path; None for None."""
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SciflowError(
            f"`metric_network` or `metric_classifier` {path!r} cannot be made ({error}). Give the dotted path of a "
            "function without arguments, in a module that Python finds."
        ) from error


def even_labels(number: int, num_classes: int) -> torch.Tensor | None:
    """Every class equally often, (number,): 0, 1, ..., and from the start again; None without classes."""
    return torch.arange(number) % num_classes if num_classes else None


def draw(
    family: "DiT",
    model: torch.nn.Module,
    labels: torch.Tensor | None,
    *,
    steps: int,
    seed: int,
    guidance_scale: float,
    batch_size: int,
    number: int = 0,
) -> torch.Tensor:
    """Images (N, C, H, W) in [-1, 1], on the CPU, one for each of `labels` (or `number`); each rank draws a share.

    The noise of image i follows from `seed` and i alone.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    was_training = model.training
    pipeline = family.load_pipeline(model.eval(), device=next(model.parameters()).device)
    state, found = PartialState(), []
    count = number if labels is None else len(labels)
    for start in range(state.process_index * batch_size, count, state.num_processes * batch_size):
        rows = range(start, min(start + batch_size, count))
        generators = [torch.Generator().manual_seed(hash64(seed, "metric image", row) & 0xFFFFFFFF) for row in rows]
        images = pipeline(
            None if labels is None else labels[list(rows)],
            num_images=len(rows),
            num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="pt",
        ).images  # fmt: skip
        found.append((start, (2 * images - 1).cpu()))
    model.train(was_training)
    gathered = gather_object(found) if state.num_processes > 1 else found
    return torch.cat([images for _, images in sorted(gathered, key=lambda pair: pair[0])])
