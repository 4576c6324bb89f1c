"""`DiffusionTrainingArguments`: transformers' TrainingArguments plus what diffusion training adds."""

import dataclasses
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..adapters.formats.names import FORMATS
from ..diffusion.losses import LOSSES
from ..engines.compilation import check_compilation
from ..engines.offload import check_offload
from ..engines.optimizers import OPTIMIZERS, check_optimizer
from ..engines.quantisation import QUANTIZATIONS, check_quantized_training
from ..errors import SciflowError

logger = logging.getLogger(__name__)

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """Every option of `transformers.TrainingArguments`, and those of diffusion training.

    Defaults that differ from the parent's, each with its reason:
        learning_rate: 1e-4, usual for LoRA; 1.0 with `--optim prodigy`, which finds the rate itself.
        lr_scheduler_type: constant, as Prodigy needs and diffusers' scripts use.
        per_device_train_batch_size, per_device_eval_batch_size: 1, images are large.
        logging_steps: 10, runs are short.
        remove_unused_columns: False, a batch is not the arguments of `model.forward`.
        ddp_find_unused_parameters: False, every trained parameter takes part; True costs a graph walk a step.
        logging_nan_inf_filter: False, it is a device sync per micro-batch and hides what we stop for.

    Args:
        weighting_scheme: density of the noise level (`logit_normal`, `mode`, else uniform) and weight of the loss
            (`sigma_sqrt`, `cosmap`, else 1), as in diffusers' scripts.
        logit_mean, logit_std: of `logit_normal`; a positive mean moves towards noise (Esser et al. 2024).
        mode_scale: of `mode`.
        stratified_levels: spread the noise levels of every optimizer step evenly over the density: one in each of as
            many equal parts of it as the step has samples. The gradient varies less, its mean is the same.
        timestep_shift: `resolution` (the family's line over image tokens), `none`, or the factor itself (SD3: 3.0).
        loss_type: `mse`, `l1` or `huber`.
        huber_delta: where `huber` turns linear.
        min_snr_gamma: weight by min(SNR, gamma) on the x0 loss (Hang et al. 2023), which some call SNR weighting; a
            very large one weighs by the SNR itself. None for no such weight. It goes with every `loss_type`.
        eval_levels: noise levels at which every evaluation sample is measured.
        ema_decay: keep an exponential moving average of the trained weights, which is evaluated, drawn with and saved
            in `output_dir`; None for none. See `EMACallback`.
        ema_warmup: let its decay grow with the updates up to `ema_decay`.
        lora_plus_ratio: LoRA+ (Hayou et al. 2024): lora_B learns at this multiple of the rate; None for one rate.
        text_encoder_learning_rate: of trained text encoders; `learning_rate` when not given.
        quantize_base: keep the frozen network in 8 or 4 bits, see `load_quantized`; None for `weight_dtype`.
        offload: keep the frozen weights of its blocks in host memory, see `offload_blocks`.
        validation_prompts: prompts drawn at the start, every `validation_steps` and at the end.
        validation_negative_prompt: what guidance leads away from in those images: one for all prompts, or one for each.
        validation_class_labels: classes, by number or name, drawn in the same way where a family has no prompts.
        validation_size: height and width of those images in pixels; the commonest bucket by default.
        dataloader_threads: threads that read a cache ahead into reused buffers; 0 reads in the main thread, and
            `dataloader_num_workers` above 0 takes processes instead.
        export_formats: other programs for which the adapter is written into `output_dir`, too: `diffusers`, `kohya`,
            `comfy`. See `export_adapter`; what a format cannot hold is refused before training.
        overwrite_output_dir: remove the checkpoints of an earlier run in `output_dir`.
        dry_run: print options, matched layers, buckets, steps, memory and disk, then stop.
        debug_batch: print shapes, position ids and gradient norms of one batch, then stop.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Initial learning rate; 1e-4, or 1.0 with --optim prodigy, when not given."},
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={"help": f"Any optimizer of transformers' TrainingArguments, or {', '.join(OPTIMIZERS)}."},
    )
    lr_scheduler_type: SchedulerType | str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Samples per device in evaluation."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps, or that share of the run."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: see the docstring."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses in the logs."})

    weighting_scheme: str = field(
        default="logit_normal",
        metadata={"help": f"Density and weight of the noise level: {WEIGHTING_SCHEMES}."},
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of logit_normal; positive means more noise."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of logit_normal."})
    mode_scale: float = field(default=1.29, metadata={"help": "Scale of mode."})
    stratified_levels: bool = field(
        default=False, metadata={"help": "Spread the noise levels of every optimizer step evenly over the density."}
    )
    timestep_shift: str = field(
        default="resolution", metadata={"help": "resolution, none, or the shift factor as a number."}
    )
    loss_type: str = field(default="mse", metadata={"help": f"One of {LOSSES}."})
    huber_delta: float = field(default=1.0, metadata={"help": "Where the huber loss turns linear."})
    min_snr_gamma: float | None = field(default=None, metadata={"help": "min-SNR weighting (Hang et al. 2023)."})
    eval_levels: int = field(default=4, metadata={"help": "Noise levels at which each evaluation sample is measured."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of the moving average of the trained weights; none when not given."}
    )
    ema_warmup: bool = field(default=True, metadata={"help": "Let that decay grow as (1 + n) / (10 + n) up to it."})

    lora_plus_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: lora_B learns at this multiple of --learning_rate, such as 16."}
    )
    text_encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of trained text encoders; --learning_rate when not given."}
    )
    quantize_base: str | None = field(
        default=None, metadata={"help": f"Keep the frozen network packed: {', '.join(QUANTIZATIONS)}."}
    )
    offload: bool = field(
        default=False,
        metadata={"help": "Keep the frozen blocks in host memory; needs --activation_checkpointing."},
    )

    validation_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts drawn at the start, every --validation_steps, and at the end."},
    )
    validation_negative_prompt: list[str] = field(
        default_factory=list,
        metadata={"help": "What their guidance leads away from: one for all --validation_prompts, or one for each."},
    )
    validation_class_labels: list[str] = field(
        default_factory=list,
        metadata={"help": "Classes, by number or name, drawn in place of prompts by families that have classes."},
    )
    validation_steps: int = field(default=500, metadata={"help": "Optimizer steps between validation images."})
    num_inference_steps: int = field(default=28, metadata={"help": "Sampling steps of validation images."})
    validation_guidance_scale: float = field(default=3.5, metadata={"help": "Guidance of validation images."})
    validation_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One image a prompt and seed."})
    validation_size: list[int] = field(
        default_factory=list, metadata={"help": "Height and width in pixels; default: the commonest bucket."}
    )

    dataloader_threads: int = field(
        default=2, metadata={"help": "Threads that read a cache ahead, 1 to 4; 0 reads in the main thread."}
    )
    export_formats: list[str] = field(
        default_factory=list,
        metadata={"help": f"Write the adapter for other programs, too: {', '.join(FORMATS)}."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Remove the checkpoints of an earlier run in --output_dir and start anew."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Print what would be done, then stop."})
    debug_batch: bool = field(default=False, metadata={"help": "Print one batch, its ids and gradients, then stop."})

    def __post_init__(self) -> None:
        allowed = [*OPTIMIZERS, *(name.value for name in OptimizerNames)]
        if getattr(self.optim, "value", self.optim) not in allowed:
            raise SciflowError(f"`optim` {self.optim!r}: use one of {', '.join(allowed)}.")
        if self.learning_rate is None:
            self.learning_rate = 1.0 if self.optim in OPTIMIZERS else 1e-4
        ours, self.optim = self.optim, "adamw_torch" if self.optim in OPTIMIZERS else self.optim
        if not torch.accelerator.is_available() and (self.bf16 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            self.use_cpu = True  # or every rank would train on its own, as if it were alone, and bf16 be refused
        self.enable_jit_checkpoint = False  # `PreemptionCallback` does it, always and on all ranks at once
        super().__post_init__()  # turns `optim` into an enum that does not know ours
        if ours in OPTIMIZERS:
            self.optim = ours
        self._check_options()

    def _check_options(self) -> None:
        for name, allowed in (("weighting_scheme", WEIGHTING_SCHEMES), ("loss_type", LOSSES)):
            if getattr(self, name) not in allowed:
                raise SciflowError(f"`{name}` {getattr(self, name)!r}: use one of {', '.join(allowed)}.")
        for file_format in self.export_formats:
            if file_format not in FORMATS:
                raise SciflowError(f"`export_formats` {file_format!r}: use one or more of {', '.join(FORMATS)}.")
        for name, refused, why in _REFUSED:
            if getattr(self, name) not in refused:
                raise SciflowError(f"`{name}` {getattr(self, name)!r} cannot work here: {why}")
        check_optimizer(self)
        check_quantized_training(self)
        check_offload(self)
        check_compilation(self)
        if self.timestep_shift not in ("resolution", "none"):
            try:
                positive = float(self.timestep_shift) > 0
            except ValueError:
                positive = False
            if not positive:
                raise SciflowError(f"`timestep_shift` {self.timestep_shift!r}: resolution, none, or a number above 0.")
        if not 0 <= self.dataloader_threads <= 4:
            raise SciflowError(f"`dataloader_threads` {self.dataloader_threads}: 0 to 4; more would not read faster.")
        if self.eval_levels < 1:
            raise SciflowError(f"`eval_levels` {self.eval_levels}: at least 1.")
        if self.validation_negative_prompt and not self.validation_prompts:
            raise SciflowError("`validation_negative_prompt` without `validation_prompts` draws nothing: give both.")
        if self.validation_size and len(self.validation_size) != 2:
            raise SciflowError(f"`validation_size` {self.validation_size}: height and width, two numbers.")
        if self.optim in OPTIMIZERS and (self.learning_rate or 0) < 0.1:
            logger.warning(
                "`learning_rate` %g with `%s`: it is a factor here, usually 1.0.",
                self.learning_rate,
                self.optim,
            )

    @property
    def weight_dtype(self) -> torch.dtype:
        """dtype of frozen weights: what the network computes in. Trained weights are float32."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def load_dtype(self, *, trained: bool) -> torch.dtype:
        """dtype to load the network in: float32 where it is trained itself, else `weight_dtype`.

        Raises:
            SciflowError: it is trained, but shall be packed or offloaded, which is for frozen weights.
        """
        for name in ("quantize_base", "offload"):
            if trained and getattr(self, name):
                raise SciflowError(f"`{name}` is for frozen networks and cannot work with `no_adapter`: leave one out.")
        return torch.float32 if trained else self.weight_dtype

    @property
    def order_seed(self) -> int:
        """Seed of the order and of the sample keys: `data_seed`, else `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def total_batch(self) -> int:
        """Samples of an optimizer step: per device x ranks x accumulation."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    def changed_options(self) -> dict[str, Any]:
        """Options that differ from the defaults, without tokens and paths, for cards and reports."""
        default: dict[str, Any] = {}
        for option in dataclasses.fields(self):
            made = option.default_factory
            default[option.name] = option.default if made is dataclasses.MISSING else made()
        now = self.to_dict()
        hidden = ("output_dir", "hub_", "run_name", "resume_from_checkpoint", "overwrite_output_dir")
        derived: tuple[str, ...] = ("do_eval", "greater_is_better", "accelerator_config", "gradient_checkpointing")
        derived += ("disable_tqdm", "dry_run", "debug_batch")
        return {
            name: now[name]
            for name, value in default.items()
            if name in now
            and now[name] not in (value, None, [])
            and (now[name] or value is not None)  # False where the parent's default None means it
            and str(getattr(value, "value", value)) != str(now[name])
            and not name.startswith(hidden)
            and name not in derived
        }


_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("auto_find_batch_size", (False,), "it restarts the order of samples; lower the batch size."),
    ("label_smoothing_factor", (0, 0.0), "there are no class scores to smooth."),
    ("neftune_noise_alpha", (None,), "it hooks token embeddings, and text arrives here already embedded."),
    ("use_liger_kernel", (False,), "its kernels are for language models."),
    ("remove_unused_columns", (False,), "a batch is not the arguments of `model.forward`."),
    ("batch_eval_metrics", (False,), "the interval of `eval_gain` needs all samples at once."),
)
