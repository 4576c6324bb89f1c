"""Validation images: the same prompts and seeds over the course of training, by the family's own pipeline."""

import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...adapters.layers import network_of
from ...adapters.text_encoders import NetworkWithText
from ...data.batches.buckets import image_sizes
from ...data.source_images import NONE, EditViews, read_sources, read_target
from ...engines.compilation import uncompiled
from ...engines.sharding import resharded
from ...errors import SciflowError
from ...families.base import ModelFamily
from ...report.contact_sheet import (
    STEP_FOLDER,
    image_name,
    names_of,
    read_image,
    save_image,
    save_sources,
    save_targets,
    step_folders,
    write_contact_sheet,
)
from ...report.summary import final_step

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class ValidationCallback(TrainerCallback):
    """Draws one image per prompt and seed before training, every `steps` optimizer steps, and at the end.

    The images come from the network that is being trained, not from a copy, in evaluation mode and without
    gradients; afterwards modes and random number generators are as before. The noise of a seed is drawn on
    the CPU, so it is the same at every step and on every machine. Written are

    - `output_dir/validation/step-000500/p00_seed42.png`, with prompt, seed and step in its text fields;
    - `output_dir/validation/contact_sheet.png`: a row per prompt and seed, a column per step.

    Edits are drawn one by one, as the pipeline gives all its sources to every prompt of a call; their sources, as they
    are shown, lie in `output_dir/validation/sources`, and are the first columns of the sheet. Targets, where prompts
    have one, lie in `output_dir/validation/targets` and are its last column.

    Where a checkpoint is due at the same step, it is saved first. Several ranks share the work and write to
    one `output_dir`; on several machines that takes a shared file system.

    Args:
        family: loads the pipeline and encodes the prompts.
        prompts: at least one.
        negative_prompts: what guidance leads away from: one for all prompts, or one each; by default what the family
            takes where there is none.
        source_images: the images that the prompts edit: one entry each, see `source_files`; by default none.
        target_images: files of what the prompts should become, one entry each; by default none.
        edits: at which size edits are drawn, and what is shown of their sources; by default at `size`, by the
            pipeline's own rule.
        seeds: distinct integers; every prompt is drawn with each of them.
        steps: optimizer steps between validations.
        num_inference_steps: sampling steps of one image.
        guidance_scale: classifier-free guidance of the pipeline.
        size: (height, width) in pixels, multiples of `family.bucket_step()`.
        output_dir: the run's folder.
        trackers: returns the trainer's callbacks (`lambda: trainer.callback_handler.callbacks`); those of W&B
            and TensorBoard are given the images.
        weights: makes a context in which the network has the weights to draw with (`trainer.averaged_weights`).

    Raises:
        SciflowError: no prompts, equal seeds, a size that the network cannot draw, sources that cannot be read or
            are not taken, or that encoding or drawing failed.
    """

    def __init__(
        self,
        *,
        family: ModelFamily,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] = (),
        source_images: Sequence[str] = (),
        target_images: Sequence[str] = (),
        edits: EditViews = EditViews(),  # noqa: B008 (frozen)
        seeds: Sequence[int],
        steps: int = 500,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        size: tuple[int, int],
        output_dir: str | Path,
        trackers: Callable[[], Iterable[TrainerCallback]] | None = None,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise SciflowError(f"`validation_prompts` {list(prompts)}: give at least one and no empty one.")
        if negative_prompts and len(negative_prompts) not in (1, len(prompts)):
            raise SciflowError(
                f"`validation_negative_prompt` {list(negative_prompts)}: {len(negative_prompts)} for {len(prompts)} "
                "`validation_prompts`. Give one for all, or one for each."
            )
        if negative_prompts:
            family.check_negative_prompt(guidance_scale)
        if not seeds or len(set(seeds)) != len(seeds):
            raise SciflowError(f"`validation_seeds` {list(seeds)}: give at least one and none twice.")
        if source_images and len(source_images) != len(prompts):
            raise SciflowError(
                f"`validation_source_images`: {len(source_images)} for {len(prompts)} `validation_prompts`. Give one "
                f"entry for each, {NONE} for a prompt that draws without."
            )
        sources = read_sources(source_images, family, option="validation_source_images")
        self.sources = sources or [[] for _ in prompts]
        self.targets = [read_target(entry, option="validation_target_images") for entry in target_images]
        self.sizes = [edits.size_of(images[0], size) if images else size for images in self.sources]
        self.sources = [
            edits.shown(images, drawn, family) if images else []
            for images, drawn in zip(self.sources, self.sizes, strict=True)
        ]
        pixels = family.bucket_step()
        odd = next((s for s in (size, *self.sizes) if any(side < pixels or side % pixels for side in s)), None)
        if odd is not None:
            raise SciflowError(
                f"validation size {odd[0]}x{odd[1]} (height x width): both must be multiples of {pixels} "
                f"for `{family.name}`."
            )
        self.family = family
        self.prompts = list(prompts)
        self.negative_prompts = list(negative_prompts) * (len(prompts) if len(negative_prompts) == 1 else 1)
        self.seeds = list(seeds)
        self.steps = steps
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.folder = Path(output_dir) / "validation"
        self.trackers = trackers
        self.weights = weights
        self._pairs = [(prompt, seed) for prompt in range(len(self.prompts)) for seed in self.seeds]
        self._prompt_inputs: dict[int, dict[str, torch.Tensor]] = {}
        self._last_step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, self._last_step = state.global_step, None
        if state.is_world_process_zero:
            _drop_steps(self.folder, after=step if step > 0 else -1)
            save_sources(self.folder, self.sources)
            save_targets(self.folder, self.targets)
        PartialState().wait_for_everyone()
        # A run that was killed between a checkpoint and its images makes up for them.
        if step == 0 or (step % self.steps == 0 and not self._is_complete(step)):
            self.run(args, state, kwargs["model"])
        else:  # a prompt that cannot be encoded shows now, not hours later
            self._encode(args, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_due(state, control) and not control.should_save:
            self.run(args, state, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_due(state, control):
            self.run(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = final_step(args, state)
        if step != self._last_step and not self._is_complete(step):
            self.run(args, state, kwargs["model"], step=step)

    def run(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, *, step: int | None = None
    ) -> None:
        """Draws, writes and logs the images of now under `step` (default: the current one). All ranks."""
        step = state.global_step if step is None else step
        for prompt, seed, image in self.images(args, model, step):
            about = {"prompt": self.prompts[prompt], "seed": str(seed), "step": str(step)}
            about |= {"negative_prompt": self.negative_prompts[prompt]} if self.negative_prompts else {}
            about |= {"source_images": names_of(self.sources[prompt])} if self.sources[prompt] else {}
            save_image(image, self._path(step, prompt, seed), about)
        self._last_step = step
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            write_contact_sheet(self.folder, prompts=self.prompts, seeds=self.seeds)
            if self.trackers is not None:
                log_images(self.trackers(), self._images(step), step=step)

    def images(self, args: TrainingArguments, model: torch.nn.Module, step: int) -> Iterator[tuple[int, int, "Image"]]:
        """Number of the prompt, seed and image of all that this rank draws with the weights of now.

        All ranks must go to its end. Of a sharded network all draw everything, and the first has the images.
        """
        self._encode(args, model)
        with self.weights(), at_rest(model) as network:
            if isinstance(network, NetworkWithText):
                self._encode_with(network)
            sharded = _is_sharded(network)
            share = _share(self._pairs, sharded)
            with self._explained(f"validation at step {step}: cannot load the pipeline"):
                pipeline = self.family.load_pipeline(network_of(network), device=next(network.parameters()).device)
            for prompt, seed in share:
                image = self._draw(pipeline, prompt, seed, step)
                if PartialState().process_index == 0 or not sharded:
                    yield prompt, seed, image
            del pipeline
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # sampling leaves blocks of other sizes than training's

    def _is_due(self, state: TrainerState, control: TrainerControl) -> bool:
        """Also where training stops: TensorBoard's callback closes its file before our `on_train_end`."""
        wanted = state.global_step % self.steps == 0 or control.should_training_stop
        return wanted and state.global_step != self._last_step

    def _path(self, step: int, prompt: int, seed: int) -> Path:
        return self.folder / STEP_FOLDER.format(step) / image_name(prompt, seed)

    def _is_complete(self, step: int) -> bool:
        """Whether all images of `step` are on disk; no rank writes before all have looked."""
        complete = all(self._path(step, *pair).is_file() for pair in self._pairs)
        PartialState().wait_for_everyone()
        return complete

    def _encode(self, args: TrainingArguments, model: torch.nn.Module) -> None:
        """Encodes this rank's prompts, once; what is kept lies on the CPU. Not where text encoders are trained."""
        if self._prompt_inputs:
            return
        with at_rest(model) as network:
            if isinstance(network, NetworkWithText):
                return
            wanted = sorted({prompt for prompt, _ in _share(self._pairs, _is_sharded(network))})
            if not wanted:
                return
            weights = next(p for p in network.parameters() if p.is_floating_point())
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weights.dtype
            with self._explained("cannot encode `validation_prompts`"):
                encoded = self.family.encode_validation_prompts(
                    [self.prompts[prompt] for prompt in wanted],
                    device=weights.device,
                    dtype=dtype,
                    **self._read_with(wanted),
                )
        for prompt, inputs in zip(wanted, encoded, strict=True):
            self._prompt_inputs[prompt] = {key: value.cpu() for key, value in inputs.items()}

    def _encode_with(self, model: NetworkWithText) -> None:
        """Encodes all prompts by the text encoders that are being trained, as they are now."""
        weights = next(model.parameters())
        with self._explained("cannot encode `validation_prompts`"):
            encoded = self.family.encode_validation_prompts(
                self.prompts,
                device=weights.device,
                dtype=weights.dtype,
                encoders=model.encoders,
                **self._read_with(range(len(self.prompts))),
            )
        self._prompt_inputs = dict(enumerate(encoded))

    def _read_with(self, prompts: Sequence[int]) -> dict[str, Any]:
        """The negative prompts of some prompts, and the sources where the text encoder reads them, as arguments."""
        found: dict[str, Any] = {}
        if self.negative_prompts:
            found["negative_prompts"] = [self.negative_prompts[i] for i in prompts]
        if any(self.sources) and self.family.text_reads_sources:
            found["source_images"] = [self.sources[i] for i in prompts]
        return found

    def _draw(self, pipeline: Any, prompt: int, seed: int, step: int) -> "Image":
        height, width = self.sizes[prompt]
        sources = {"source_images": self.sources[prompt]} if self.sources[prompt] else {}
        with self._explained(f"validation at step {step}, prompt {self.prompts[prompt]!r}, seed {seed}"):
            return self.family.generate(
                pipeline,
                self._prompt_inputs[prompt],
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                **sources,
            )[0]

    def _images(self, step: int) -> dict[str, tuple["Image", str]]:
        """Tag -> (image, caption) of the images of `step`, those of other ranks included."""
        missing = [str(path) for pair in self._pairs if not (path := self._path(step, *pair)).is_file()]
        if missing:
            raise SciflowError(
                f"validation at step {step}: {missing[0]!r} of another rank is not here. `--output_dir` must "
                "be on a file system that all machines share."
            )
        return {
            f"validation/p{prompt:02d}_seed{seed}": (
                read_image(self._path(step, prompt, seed)),
                f"{self.prompts[prompt]} (seed {seed})",
            )
            for prompt, seed in self._pairs
        }

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failure into an error that says what was drawn and what to do."""
        try:
            yield
        except SciflowError:
            raise
        except Exception as error:  # whatever it was, the error says what was drawn
            remedy = "Without `--validation_prompts` training resumes from the last checkpoint and draws nothing."
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                height, width = max(self.sizes, key=math.prod)
                remedy = (
                    f"During training there is no memory for {height}x{width} pixels: validate "
                    "at a smaller size or with fewer `--num_inference_steps`, or switch validation off by "
                    "leaving out `--validation_prompts`."
                )
            raise SciflowError(f"{what} ({type(error).__name__}: {str(error).strip()[:300]}). {remedy}") from error


def commonest_size(dataset: Any) -> tuple[int, int] | None:
    """Height and width of the bucket with most rows; None for data without buckets."""
    return next((size for size, _ in image_sizes(dataset).most_common(1)), None)


def log_images(callbacks: Iterable[TrainerCallback], images: dict[str, tuple["Image", str]], *, step: int) -> None:
    """Gives images, tag -> (PIL image, caption), to the W&B and TensorBoard callbacks among `callbacks`."""
    from transformers.integrations import TensorBoardCallback, WandbCallback

    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                pictures = {tag: wandb.Image(image, caption=caption) for tag, (image, caption) in images.items()}
                wandb.log({**pictures, "train/global_step": step})
        elif isinstance(callback, TensorBoardCallback) and callback.logging_dir is not None:
            writer = callback.tb_writer
            if writer is None:  # closed when training ended; TensorBoard reads the files of a folder as one run
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(log_dir=callback.logging_dir)
            for tag, (image, _) in images.items():
                writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
            writer.flush()
            if writer is not callback.tb_writer:
                writer.close()


@contextmanager
def at_rest(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The bare network, in evaluation mode, without gradients; then modes and random states are as before."""
    # Keeps accelerate's mixed-precision forward.
    network = extract_model_from_parallel(model, keep_torch_compile=False)
    modes = {module: module.training for module in network.modules()}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        gathered = resharded(network) if _is_sharded(network) else nullcontext()
        with torch.no_grad(), torch.random.fork_rng(devices=devices), uncompiled(network), gathered:
            network.eval()
            yield network
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes.items():
            module.training = mode


def _is_sharded(model: torch.nn.Module) -> bool:
    """Whether the parameters are spread over the ranks (FSDP)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _share(pairs: list[tuple[int, int]], sharded: bool) -> list[tuple[int, int]]:
    """The images that this rank draws. A sharded network's forward needs all ranks, so there all draw everything."""
    ranks = PartialState()
    return pairs if sharded else pairs[ranks.process_index :: ranks.num_processes]


def _drop_steps(folder: Path, *, after: int) -> None:
    """Removes images of steps that this run has yet to make: an earlier run's, or from before a resume."""
    later = {step: path for step, path in step_folders(folder).items() if step > after}
    if later:
        logger.info("Removing the validation images of later steps: %s.", ", ".join(map(str, later)))
    for path in later.values():
        for image in path.iterdir():
            if re.fullmatch(r"p\d+_seed-?\d+\.png", image.name):
                image.unlink()
        if not any(path.iterdir()):
            path.rmdir()
