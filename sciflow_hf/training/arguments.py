"""`DiffusionTrainingArguments`: transformers' TrainingArguments plus what diffusion training adds."""

import dataclasses
import math
import os
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..adapters.formats.names import FORMATS
from ..diffusion.losses import EDIT_LOSSES, LOSSES
from ..diffusion.process import WEIGHTING_SCHEMES
from ..engines.attention import AttentionArguments
from ..engines.checkpointing import CheckpointingArguments
from ..engines.compilation import CompilationArguments
from ..engines.memory import MemoryArguments
from ..engines.offload import OffloadArguments
from ..engines.optimizers import DEFAULT_LEARNING_RATE, OPTIMIZERS, OptimizerArguments
from ..engines.quantisation import QuantisationArguments
from ..errors import SciflowError
from ..options import arguments, check_options, check_range, option
from .callbacks.profile import ProfilingArguments


def _check_timestep_shift(args: Any) -> None:
    if args.timestep_shift == "none":
        return
    try:
        shift = float(args.timestep_shift)
    except ValueError:
        shift = math.nan
    if not 0 < shift < math.inf:
        raise SciflowError(f"`timestep_shift` {args.timestep_shift!r}: resolution, none, or a finite number above 0.")


def _check_negative_prompt(args: Any) -> None:
    if not args.validation_prompts:
        raise SciflowError("`validation_negative_prompt` without `validation_prompts` draws nothing: give both.")


def _check_edit_loss(args: Any) -> None:
    for name, kind in (("edit_weight", "weighted"), ("edit_balance", "balanced")):
        if getattr(args, name) != getattr(type(args), name) and args.edit_loss != kind:
            raise SciflowError(
                f"`{name}` {getattr(args, name):g} is for `--edit_loss {kind}`, and that is {args.edit_loss}: change "
                "one of them."
            )


def _check_source_images(args: Any) -> None:
    prompts, sources = args.validation_prompts, args.validation_source_images
    if not prompts:
        raise SciflowError("`validation_source_images` without `validation_prompts` edits nothing: give both.")
    if len(sources) < len(prompts):
        raise SciflowError(
            f"`validation_source_images`: {len(sources)} for {len(prompts)} `validation_prompts`; the first without "
            f'is {prompts[len(sources)]!r}. Give one entry for each prompt: a file, several joined by ",", or none '
            "for a prompt that draws without."
        )
    if len(sources) > len(prompts):
        raise SciflowError(
            f"`validation_source_images`: {len(sources)} for {len(prompts)} `validation_prompts`; "
            f"{sources[len(prompts)]!r} has no prompt. Give one entry for each prompt."
        )


def _check_target_images(args: Any) -> None:
    prompts, targets = args.validation_prompts, args.validation_target_images
    if len(targets) != len(prompts):
        raise SciflowError(
            f"`validation_target_images`: {len(targets)} for {len(prompts)} `validation_prompts`. Give one entry for "
            "each prompt: a file, or none."
        )


def _check_figure_metrics(args: Any) -> None:
    if not args.validation_prompts:
        raise SciflowError("`figure_metrics` are scores of `validation_prompts`, of which there are none: give both.")


def _check_loss_scale(args: Any) -> None:
    if args.fp16 and args.deepspeed:
        raise SciflowError("`loss_scale` is a part of DeepSpeed's own configuration (`fp16`): set it there.")
    if not args.fp16:
        raise SciflowError("`loss_scale` and `dynamic_loss_scale` are for `--fp16`: add it, or leave them out.")


_BELOW_ONE, _ABOVE_ONE = math.nextafter(1, 0), math.nextafter(1, 2)
"""Factors, of which GradScaler refuses 1 itself, that leave a float32 as it is."""


def _check_validation_size(args: Any) -> None:
    if len(args.validation_size) != 2:
        raise SciflowError(f"`validation_size` {args.validation_size}: height and width, two numbers.")


_SEED = "[0, 4294967295]"  # what numpy takes
_MODE = "Beyond that the density is none: equation 20 of Esser et al. 2024 is monotonic only within it."
_STOCK_RANGES = {
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "dataloader_num_workers"), "[0, inf)"
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "[0, 1)"),
    **dict.fromkeys(("adam_epsilon", "num_train_epochs", "eval_steps", "save_steps", "logging_steps"), "(0, inf)"),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), "[1, inf)"),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), "[1, inf)"),
    "torch_empty_cache_steps": "[1, inf)",
}
"""Ranges of the parent's options, which the parent does not check."""


@arguments
class NoiseLevelArguments:
    """Which noise levels are trained on."""

    heading: ClassVar[str] = "Noise levels"

    weighting_scheme: str = option(
        "logit_normal",
        "Density of the noise level (logit_normal, mode, else uniform) and weight of the loss (sigma_sqrt, cosmap, "
        "else 1), as in diffusers' scripts.",
        choices=WEIGHTING_SCHEMES,
    )
    logit_mean: float = option(
        0.0, "Mean of logit_normal; a positive one moves towards noise (Esser et al. 2024).", within="(-inf, inf)"
    )
    logit_std: float = option(1.0, "Standard deviation of logit_normal.", within="(0, inf)")
    mode_scale: float = option(1.29, "Scale of mode.", within="[-1, 1.7519]", advice=_MODE)
    stratified_levels: bool = option(
        False,
        "Spread the noise levels of every optimizer step evenly over the density: one in each of as many equal parts "
        "of it as the step has samples. The gradient varies less, its mean is the same.",
    )
    timestep_shift: str = option(
        "resolution",
        "resolution (the family's line over image tokens), none, or the shift factor itself (SD3: 3.0).",
        check=_check_timestep_shift,
    )


@arguments
class LossArguments:
    """How the prediction is compared with the target."""

    heading: ClassVar[str] = "Loss"

    loss_type: str = option("mse", "Loss of an element.", choices=LOSSES)
    huber_delta: float = option(1.0, "Where the huber loss turns linear.", within="(0, inf)")
    min_snr_gamma: float | None = option(
        None,
        "Weight by min(SNR, gamma) on the x0 loss (Hang et al. 2023), which some call SNR weighting; a very large one "
        "weights by the SNR itself. No such weight when not given. Works with every --loss_type.",
        within="(0, inf)",
    )
    edit_loss: str = option(
        "uniform",
        "Where an edit is looked at closer, by the mask of its changed region (`edit_mask` of the data): nowhere; "
        "weighted counts the tokens inside --edit_weight times; balanced takes the mean outside and the mean inside, "
        "the latter with the weight --edit_balance. A mask that is empty or full counts as uniform.",
        choices=EDIT_LOSSES,
    )
    edit_weight: float = option(
        4.0,
        "How often a token of the changed region counts, for --edit_loss weighted; the weights of an image have the "
        "mean 1.",
        within="(0, inf)",
        check=_check_edit_loss,
    )
    edit_balance: float = option(
        0.5,
        "Share of the changed region in the loss, whatever its size, for --edit_loss balanced.",
        within="[0, 1]",
        check=_check_edit_loss,
    )


@arguments
class EvaluationArguments:
    """The fixed grid on which held-out samples are measured."""

    heading: ClassVar[str] = "Evaluation"

    eval_levels: int = option(4, "Noise levels at which each evaluation sample is measured.", within="[1, inf)")


@arguments
class AverageArguments:
    """Averaged weights, see `EMACallback`."""

    heading: ClassVar[str] = "Averaged weights"

    ema_decay: float | None = option(
        None,
        "Decay of an exponential moving average of the trained weights, which is evaluated, drawn with and saved in "
        "--output_dir; usually 0.99 to 0.9999. No average is kept when not given.",
        within="[0, 1)",
        advice="Usually 0.99 to 0.9999; leave it out for no average.",
    )
    ema_warmup: bool = option(True, "Let that decay grow with the updates as (1 + n) / (10 + n) up to it.")
    ema_update_every: int = option(1, "Optimizer steps between updates of that average.", within="[1, inf)")
    ema_device: str = option(
        "auto",
        "Where that average lies: auto is where the weights are, cpu spares the memory of a GPU.",
        choices=("auto", "cpu"),
    )


@arguments
class ValidationArguments:
    """Images drawn during training."""

    heading: ClassVar[str] = "Validation images"

    validation_prompts: list[str] = option([], "Prompts drawn at the start, every --validation_steps, and at the end.")
    validation_negative_prompt: list[str] = option(
        [],
        "Prompt that guidance leads away from in validation images: one for all --validation_prompts, or one for each.",
        check=_check_negative_prompt,
    )
    validation_source_images: list[str] = option(
        [],
        "The image that each of --validation_prompts edits: one entry for each prompt, in order; several images of one "
        'prompt joined by ",", and none for a prompt that draws without.',
        check=_check_source_images,
    )
    validation_target_images: list[str] = option(
        [],
        "The image that each of --validation_prompts should become, shown next to it on the contact sheet: one entry "
        "for each prompt, in order, none for a prompt without.",
        check=_check_target_images,
    )
    figure_metrics: list[str] = option(
        [],
        "Metrics of `sciflow-hf evaluate`, such as ocr and chart: in every evaluation --validation_prompts are drawn "
        "and scored, as `eval_ocr` and so on. Also dotted paths of reward functions.",
        check=_check_figure_metrics,
    )
    validation_class_labels: list[str] = option(
        [], "Classes, by number or name, drawn instead of prompts by families that have classes."
    )
    validation_steps: int = option(500, "Optimizer steps between validation images.", within="[1, inf)")
    num_inference_steps: int = option(28, "Sampling steps of validation images.", within="[1, inf)")
    validation_guidance_scale: float = option(3.5, "Guidance of validation images.", within="[0, inf)")
    validation_seeds: list[int] = option([0], "One image for each prompt and seed.", within=_SEED)
    validation_size: list[int] = option(
        [],
        "Height and width in pixels; the commonest bucket when not given.",
        within="[1, inf)",
        check=_check_validation_size,
    )


@arguments
class LossScaleArguments:
    """Loss scale, which keeps small gradients from vanishing in 16 bit floats, see `torch.amp.GradScaler`."""

    heading: ClassVar[str] = "Loss scale of --fp16"

    loss_scale: float = option(
        65536.0, "Factor of the loss in backward, with which --fp16 begins.", within="(0, inf)", check=_check_loss_scale
    )
    dynamic_loss_scale: bool = option(
        True,
        "Halve it at each gradient that overflows, whose step is left out, and double it after 2000 steps without. "
        "False keeps it.",
        check=_check_loss_scale,
    )

    @property
    def loss_scaling(self) -> dict[str, float]:
        """Arguments of `accelerate.GradScalerKwargs`."""
        fixed = {} if self.dynamic_loss_scale else {"growth_factor": _ABOVE_ONE, "backoff_factor": _BELOW_ONE}
        return {"init_scale": self.loss_scale} | fixed


@arguments
class ReadingArguments:
    """How batches are read."""

    heading: ClassVar[str] = "Reading"

    dataloader_threads: int = option(
        2,
        "Threads that read a cache ahead into reused buffers; 0 reads in the main thread, and "
        "--dataloader_num_workers above 0 uses processes instead.",
        within="[0, 4]",
        advice="More would not read faster.",
    )


@arguments
class OutputArguments:
    """Files that a run writes besides checkpoints, and runs that only print."""

    heading: ClassVar[str] = "Output"

    export_formats: list[str] = option(
        [],
        "Other programs for which the adapter is also written into --output_dir, see `export_adapter`; what a format "
        "cannot hold is refused before training.",
        choices=FORMATS,
    )
    overwrite_output_dir: bool = option(
        False, "Remove the checkpoints of an earlier run in --output_dir and start anew."
    )
    dry_run: bool = option(False, "Print options, matched layers, buckets, steps, memory and disk, then stop.")
    debug_batch: bool = option(False, "Print shapes, position ids and gradient norms of one batch, then stop.")


@arguments
class DiffusionTrainingArguments(
    NoiseLevelArguments,
    LossArguments,
    OptimizerArguments,
    AverageArguments,
    EvaluationArguments,
    ValidationArguments,
    LossScaleArguments,
    ReadingArguments,
    OutputArguments,
    CheckpointingArguments,
    QuantisationArguments,
    OffloadArguments,
    MemoryArguments,
    CompilationArguments,
    AttentionArguments,
    ProfilingArguments,
    TrainingArguments,
):
    """Every option of `transformers.TrainingArguments`, and those of diffusion training.

    Defaults that differ from the parent's, each with its reason:
        learning_rate: 1e-4, usual for LoRA; 1.0 with `--optim prodigy`, which finds the rate itself.
        lr_scheduler_type: constant, as Prodigy needs and diffusers' scripts use.
        per_device_train_batch_size, per_device_eval_batch_size: 1, images are large.
        logging_steps: 10, runs are short.
        remove_unused_columns: False, a batch is not the arguments of `model.forward`.
        ddp_find_unused_parameters: False, every trained parameter takes part; True costs a graph walk a step.
        logging_nan_inf_filter: False, it is a device sync per micro-batch and hides what we stop for.
    """

    heading: ClassVar[str] = "Training, with other defaults than those of transformers"

    lr_scheduler_type: SchedulerType | str = option("constant", "Learning rate schedule.")
    per_device_train_batch_size: int = option(1, "Samples per device and micro-batch.", within="[1, inf)")
    per_device_eval_batch_size: int = option(1, "Samples per device in evaluation.", within="[1, inf)")
    logging_steps: float = option(10, "Log every so many steps, or that share of the run.")
    remove_unused_columns: bool = option(False, "Must stay False: a batch is not the arguments of `model.forward`.")
    ddp_find_unused_parameters: bool | None = option(
        False, "Passed to DDP. Every trained parameter takes part in each step; True costs a graph walk a step."
    )
    logging_nan_inf_filter: bool = option(
        False, "Hide non-finite losses in the logs. True costs a device sync a micro-batch."
    )

    def __post_init__(self) -> None:
        for name, within in _STOCK_RANGES.items():
            if isinstance(value := getattr(self, name), int | float):
                check_range(name, value, within)
        if self.max_steps != -1:
            check_range("max_steps", self.max_steps, "[1, inf)", "-1 leaves the length to `num_train_epochs`.")
        if self.learning_rate is None:
            self.learning_rate = OPTIMIZERS.get(self.optim, DEFAULT_LEARNING_RATE)
        if not torch.accelerator.is_available() and (self.bf16 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            self.use_cpu = True  # or every rank would train on its own, as if it were alone, and bf16 be refused
        self.enable_jit_checkpoint = False  # `PreemptionCallback` does it, always and on all ranks at once
        optim = self.optim
        if optim not in list(OptimizerNames):
            self.optim = "adamw_torch"  # the parent turns it into an enum that does not know ours
        if self.activation_checkpointing_share is not None:
            self.activation_checkpointing = self.activation_checkpointing_share > 0
        super().__post_init__()
        if optim not in list(OptimizerNames):
            self.optim = optim
        check_options(self)
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise SciflowError("`fp16` True cannot work on the CPU: use `--bf16`, or a GPU.")
        for name, allowed, why in _REFUSED:
            if getattr(self, name) not in allowed:
                raise SciflowError(f"`{name}` {getattr(self, name)!r} cannot work here: {why}")
        for name in ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"):
            value, default = (getattr(config, name) for config in (self.accelerator_config, AcceleratorConfig()))
            if value != default:
                raise SciflowError(
                    f"`accelerator_config` {name} {value!r} cannot work here: batches are made, and divided among "
                    "processes, by our own sampler."
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
        for each in dataclasses.fields(self):
            made = each.default_factory
            default[each.name] = each.default if made is dataclasses.MISSING else made()
        now = self.to_dict()
        hidden = ("output_dir", "hub_", "run_name", "resume_from_checkpoint", "overwrite_output_dir")
        derived: tuple[str, ...] = ("do_eval", "greater_is_better", "accelerator_config", "gradient_checkpointing")
        derived += ("disable_tqdm", "dry_run", "debug_batch", "profile_steps", "memory_gb")
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
    (
        "activation_checkpointing_kwargs",
        (None, {}, {"use_reentrant": False}),
        "blocks are checkpointed without reentrance; for some of them use `--activation_checkpointing_share`.",
    ),
    ("neftune_noise_alpha", (None,), "it hooks token embeddings, and text arrives here already embedded."),
    ("use_liger_kernel", (False,), "its kernels are for language models."),
    ("remove_unused_columns", (False,), "a batch is not the arguments of `model.forward`."),
    ("fp16_full_eval", (False,), "it would cut trained weights to 16 bit for good; evaluation computes as training."),
    ("bf16_full_eval", (False,), "it would cut trained weights to 16 bit for good; evaluation computes as training."),
    ("dataloader_persistent_workers", (False,), "the workers of an epoch end with it."),
    (
        "train_sampling_strategy",
        ("random", "sequential"),
        "buckets decide which samples share a batch; `random` or `sequential` is their order.",
    ),
    ("batch_eval_metrics", (False,), "the interval of `eval_gain` needs all samples at once."),
)
