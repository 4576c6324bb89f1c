"""`DiffusionTrainer`: transformers.Trainer with one step per model family."""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import accelerate.optimizer
import numpy as np
import torch
import transformers.trainer
from accelerate.utils import GradScalerKwargs, TorchDynamoPlugin, broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from diffusers import ConfigMixin
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import HubStrategy, SaveStrategy, TrainOutput

from ..adapters.export import Exported, check_run, export_run
from ..adapters.files import load_adapter_weights, save_adapter
from ..adapters.initial import INITIAL
from ..adapters.layers import adapter_disabled, adapter_facts, adapter_layers, adapter_parameters, network_of
from ..adapters.text_encoders import CAPTIONS, NetworkWithText, use_captions, with_text
from ..data.batches.buckets import BucketBatchSampler
from ..data.batches.loader import (
    BatchLoader,
    BucketLoader,
    batch_keys_of,
    collate,
    describe_row,
    evaluation_keys,
    first_batch,
    groups_of,
    is_stream,
    row_ids_of,
    training_sampler,
)
from ..data.batches.threads import release
from ..data.cache import LatentCache
from ..data.layouts.base import ATTENTION_MASK
from ..data.prior import loss_weights, without_prior
from ..data.source_images import EditViews, source_files
from ..data.split import spread
from ..data.stream.loader import StreamLoader
from ..data.stream.own import OwnStreamLoader
from ..data.stream.stream import StreamingCache
from ..diffusion.randomness import hash64
from ..diffusion.sources import source_name
from ..engines import checkpointing, sharding
from ..engines.attention import set_backend
from ..engines.compilation import compile_blocks
from ..engines.offload import offload_blocks
from ..engines.optimizers import (
    OPTIMIZERS,
    effective_learning_rate,
    group_rates,
    optimizer_class,
    rates_of,
    split_groups,
    state_bytes,
)
from ..engines.quantisation import check_loaded, keep_from_broadcast
from ..errors import DiskFullError, SciflowError, counted
from ..families.base import ModelFamily, network_dtype
from ..files import disk_full_named, follow_umask, write_json
from ..hub.upload import check_access, upload, upload_checkpoint
from ..report.plan import image_tokens
from ..report.summary import save_model_card
from .arguments import DiffusionTrainingArguments
from .callbacks.console import ConsoleCallback
from .callbacks.ema import EMACallback
from .callbacks.log_file import LogCallback
from .callbacks.preemption import PreemptionCallback
from .callbacks.profile import ProfileCallback, steps_of
from .callbacks.validation import ValidationCallback, commonest_size
from .checkpoints import (
    STAGING,
    check_output_dir,
    check_room,
    explain_unpickling,
    publish,
    remove_unfinished,
    resolve_checkpoint,
    rotate,
    write_manifest,
)
from .evaluation import summarise
from .figure_metrics import FigureMetrics
from .loss_log import LossLog
from .out_of_memory import MicroBatches
from .resume import (
    FORMAT,
    IDENTITY_NAME,
    MEASURED,
    Place,
    apply_rates,
    changed_options,
    check_format,
    check_identity,
    check_ranks,
    check_states,
    data_fingerprint,
    options_of,
    rates,
    same_total_batch,
    saved_facts,
    versions,
)
from .run_lock import check_held, holding
from .trackers import prepare_wandb

logger = logging.getLogger(__name__)

EVAL_BASE = "eval_base.json"
STREAM = "stream.json"
HOST_KEYS = ("noise_key", "step_key", "position", "row")
"""Entries of a batch that stay on the host: they seed generators and name rows, which on a GPU would be a sync."""


class DiffusionTrainer(Trainer):
    """Trains a diffusion network of one family. The features of `transformers.Trainer` work unchanged.

    Args:
        model: the network, with adapters already added (`add_adapter`), or all of it trainable.
        args: training options.
        family: how this kind of network is stepped, saved and sampled.
        train_dataset: what `load_cache` returns, or any map-style data set of dicts, or an iterable one; see
            docs/own_data.md. List attributes of a map-style one: `buckets` says which rows may share a batch,
            `row_ids` and `groups` name them.
        eval_dataset: the held-out rows, likewise, or a dict of several data sets.
        data_collator: list of samples -> batch (see `ModelFamily.compute_loss`); stacks by default. Samples hold
            also `noise_key`, `row` and `position`; a batch without them gets them back.
        model_init: makes a model with adapters, for `hyperparameter_search`.
        compute_metrics: gets the losses (N, levels) and row numbers (N,) of an evaluation; its metrics are added.
        caption_dropout: share of samples trained with the empty prompt (chosen by sample key).
        source_dropout: share of optimizer steps whose edits train without their sources (chosen by step key).
        dataset_names: what the model card calls the data.
        callbacks: further `TrainerCallback`s.
        optimizers: (optimizer, scheduler), each made from the options if it is None.
        optimizer_cls_and_kwargs: another optimizer class and its arguments.

    Raises:
        SciflowError: nothing to train, trained weights in 16 bit, or data that does not fit the network.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` returns a mean; the step divides by the accumulation itself

    is_fsdp_enabled: bool
    exported: Sequence[Exported] = ()
    _trained: list[torch.nn.Parameter]
    _stream: StreamLoader | OwnStreamLoader | None = None
    _stream_state: dict[str, Any] | None = None
    _gathered: sharding.GatheredNetwork | None = None  # of a network that FSDP spreads over the ranks
    _saving = False
    _disk_full: DiskFullError | None = None
    _measure_first = False
    _profile: ProfileCallback | None = None
    _resumed: Path | None = None
    _place: Place | None = None  # of the checkpoint that was resumed
    _total_loss_scalar, _tr_loss = 0.0, torch.zeros(())  # the parent's, from the first step on
    _loss_before: float | None = 0.0  # sum of the losses of the steps up to there; None where it does not say
    _options_changed: Mapping[str, tuple[Any, Any]] = MappingProxyType({})  # since then

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: DiffusionTrainingArguments | None = None,
        *,
        family: ModelFamily,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]] | None = collate,
        model_init: Callable[..., torch.nn.Module] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        caption_dropout: float = 0.0,
        source_dropout: float = 0.0,
        dataset_names: Sequence[str] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ) -> None:
        args = args or DiffusionTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, DiffusionTrainingArguments):
            raise SciflowError(
                f"`args` is a `{type(args).__name__}`: give a `sciflow_hf.DiffusionTrainingArguments`, which takes all "
                "options of `transformers.TrainingArguments` under the same names, and those of diffusion."
            )
        if args.auto_memory and not args.memory_is_fitted:
            raise SciflowError(
                "`auto_memory` is for before the network is loaded: call `sciflow_hf.fit_memory(args, family, "
                "train_dataset, adapter_args)` there, or leave it out."
            )
        self.family, self.dataset_names = family, list(dataset_names)
        self.caption_dropout, self.source_dropout = caption_dropout, source_dropout
        self.running_pushes: list[Future[Any]] = []
        self.pushed_checkpoint: Path | None = None
        self._user_metrics = compute_metrics
        prior, weights = getattr(train_dataset, "prior", None), loss_weights(train_dataset)
        self._losses = LossLog(None if prior is None else prior.rows)
        self._loss_weights = None if weights is None else torch.from_numpy(weights)
        if source_dropout and not family.max_sources:
            raise SciflowError(f"`source_dropout` {source_dropout:g}: `{family.name}` takes no source images.")
        self._eval_base: dict[str, list[float]] = {}  # row id -> losses of the base model
        self._eval_rows: list[str] = []
        self._measure_base = False
        self._check_kind("train_dataset", train_dataset)
        for dataset in _as_datasets(eval_dataset):
            self._check_kind("eval_dataset", dataset)
        if train_dataset is not None and is_stream(train_dataset):
            if args.max_steps <= 0:
                raise SciflowError("`max_steps` is missing: a stream has no end. Say after how many steps to stop.")
            if args.train_sampling_strategy == "sequential" and getattr(train_dataset, "shuffle_buffer", 0):
                raise SciflowError(
                    "`train_sampling_strategy` sequential: this stream is shuffled. Add `--shuffle_buffer 0`."
                )
        prepare_wandb(args)
        if args.ema_decay is not None:  # before those that look at weights
            device = None if args.ema_device == "auto" else args.ema_device
            average = EMACallback(args.ema_decay, args.ema_warmup, args.ema_update_every, device)
            callbacks = [average, *(callbacks or [])]
        self._preemption = PreemptionCallback()
        if args.profile_steps and args.process_index == 0:
            self._profile = ProfileCallback(steps_of(args.profile_steps), Path(str(args.output_dir), "profile"))
        if model is not None:
            self._check_model(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            model_init=model_init,
            compute_metrics=self._summarise,
            callbacks=[self._preemption, *filter(None, [self._profile]), LogCallback(), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if (stock := self.pop_callback(ProgressCallback)) is not None:
            self.add_callback(ConsoleCallback() if type(stock) is ProgressCallback else stock)
        if self.is_fsdp_enabled:
            plugin, with_text_encoder = self.accelerator.state.fsdp_plugin, isinstance(self.model, NetworkWithText)
            sharding.check(self.args, plugin, self.model, trains_text_encoder=with_text_encoder)
            sharding.configure(plugin, self.args.weight_dtype, self.model)
        for dataset in (train_dataset, *_as_datasets(eval_dataset)):
            self._check_data(dataset)
        self._fingerprint = (train_dataset, data_fingerprint(train_dataset))
        if args.validation_prompts or args.validation_class_labels:
            validation = self._validation_callback()
            self.add_callback(validation)
            if args.figure_metrics:
                if eval_dataset is None:
                    raise SciflowError(
                        "`figure_metrics` are measured in evaluations, for which there is no held-out data: hold some "
                        "out by `--eval_fraction`, or leave them out."
                    )
                self._user_metrics = FigureMetrics(
                    args.figure_metrics, validation, args, lambda: (self.model, self.state.global_step), compute_metrics
                )

    def _check_model(self, model: Any, args: DiffusionTrainingArguments) -> None:
        check_run(model, args.export_formats, self.family)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise SciflowError("`model` has no parameter that requires a gradient: call `add_adapter` first.")
        half = next((n for n, p in trained if p.dtype in (torch.bfloat16, torch.float16)), None)
        if half is not None:
            raise SciflowError(
                f"`model`: {half} is trained in 16 bit, where an update of 1e-4 rounds to nothing. Load the network in "
                "float32 and use `--bf16`, or add an adapter (its weights are float32)."
            )

        def activation_checkpointing_enable(**options: Any) -> None:
            """`Trainer` calls `gradient_checkpointing_enable`; diffusers names it `enable_gradient_checkpointing`."""
            checkpointing.enable(model, network_of(model), checkpointing.share_of(args))

        model.activation_checkpointing_enable = activation_checkpointing_enable
        network = network_of(model)
        if isinstance(network, ConfigMixin):  # transformers' TensorBoardCallback asks the configuration for it
            vars(network.config)["to_json_string"] = network.to_json_string
        rates_of(model, args, learning_rate=args.learning_rate or 0.0)
        check_loaded(network, args.quantize_base)
        keep_from_broadcast(model)
        if args.offload:
            offload_blocks(network, args.device)
        self._set_attention(network, args)

    def _set_attention(self, network: Any, args: DiffusionTrainingArguments) -> None:
        """Applies `--attention_backend`."""
        if args.attention_backend is not None:
            most = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
            trusted = getattr(self.family, "trust_remote_code", False)
            set_backend(network, args, masked=self.family.pads_text and most > 1, trust_remote_code=trusted)

    @staticmethod
    def _check_kind(name: str, dataset: Any) -> None:
        """Refuses what is no data set, and an iterable that cannot be read twice, or not by each rank."""
        if isinstance(dataset, Mapping):
            raise SciflowError(
                f"`{name}` is a {type(dataset).__name__} of {sorted(map(str, dataset))}: give one of them."
            )
        if dataset is None or (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            return
        if isinstance(dataset, Iterator) or not hasattr(dataset, "__iter__"):
            raise SciflowError(
                f"`{name}` is a {type(dataset).__name__}: give a data set of dicts with `__len__` and `__getitem__`, "
                "or one that can be iterated over again, such as `datasets.IterableDataset.from_generator(function)`."
            )
        if getattr(dataset, "_distributed", None) is not None:
            raise SciflowError(
                f"`{name}` is split by `split_dataset_by_node`: give the complete stream, of which each rank takes its "
                "own samples."
            )

    def _check_data(self, dataset: Any) -> None:
        is_cache = isinstance(dataset, LatentCache | StreamingCache)
        if dataset is None or (is_stream(dataset) and not is_cache):
            return  # of a stream the first batch is looked at once it is read
        if len(dataset) == 0:
            raise SciflowError("the data set is empty.")
        if callable(getattr(dataset, "check_family", None)):
            dataset.check_family(self.family.encoder_settings())
        if self.model is None:
            return
        if is_cache and isinstance(self.model, NetworkWithText):
            use_captions(dataset)
        rows = dataset.first() if isinstance(dataset, StreamingCache) else dataset
        if not is_cache or self.data_collator is not collate:
            size = self.args.train_batch_size if dataset is self.train_dataset else self.args.eval_batch_size
            self._check_batch(first_batch(rows, batch_size=size, **self._loader_options()), rows)
            return
        sample = rows[0]
        self.family.check_sample(self.model, with_text(self.model, sample))
        if ATTENTION_MASK in sample and dataset is self.train_dataset:
            logger.info(
                "`%s` of this cache is not used: the network of `%s` takes no mask, so padding takes part in it.",
                ATTENTION_MASK, self.family.name,
            )  # fmt: skip
        if isinstance(dataset, LatentCache) and dataset.online_text is None:  # of every bucket the shapes
            for row in {(*key[:2], *key[3:]): i for i, key in enumerate(dataset.batch_keys)}.values():
                self.family.check_sample(self.model, dataset.shapes(row))
        if isinstance(dataset, LatentCache) and dataset is self.train_dataset:
            self._check_masks(dataset)
        else:
            self._warn_of_masks(sample)

    def _warn_of_masks(self, sample: Mapping[str, Any]) -> None:
        """Says so where the first sample is an edit without the mask that the loss asks for."""
        if self.args.edit_loss != "uniform" and source_name(0) in sample and "edit_mask" not in sample:
            logger.warning(
                "`edit_loss` %s: the first sample has source images, but no mask of its changed region (`edit_mask`); "
                "without one the loss counts alike everywhere.", self.args.edit_loss,
            )  # fmt: skip

    def _check_masks(self, cache: LatentCache) -> None:
        """Refuses a loss of the changed region where no edit has one."""
        if self.args.edit_loss == "uniform":
            return
        edits = [row for row, sources in enumerate(cache.source_shapes) if sources]
        looked_at = [edits[i] for i in spread(len(edits), min(len(edits), 100))]
        if not any("edit_mask" in cache.members(row) for row in looked_at):
            raise SciflowError(
                f"`edit_loss` {self.args.edit_loss}: none of {counted(len(looked_at), 'edit')} of this data has a mask "
                "of its changed region (`edit_mask`). Build the cache with masks, boxes, or `--edit_masks computed` "
                "(docs/editing.md), or leave this out."
            )

    def _check_batch(self, batch: dict[str, Any], dataset: Any = None) -> None:
        """Refuses a collated batch that does not fit the network; `dataset` may have drawn its latents already."""
        batch = {name: value for name, value in batch.items() if name not in HOST_KEYS}
        sample = {name: value[0] for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim}
        if isinstance(dataset, LatentCache) and self.family.posterior == "sample":
            sample |= {name: value for name, value in dataset.shapes(0).items() if name == "latents_std"}
        kinds = {n: tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__ for n, v in batch.items()}
        held = ", ".join(f"`{name}` {kind}" for name, kind in kinds.items()) or "nothing"
        told = f"The first batch has {held}; see docs/own_data.md for what `data_collator` returns."
        if isinstance(self.model, NetworkWithText) != (CAPTIONS in batch):
            needs = "`captions`, a list of B strings" if CAPTIONS not in batch else "`prompt_embeds`, not `captions`"
            raise SciflowError(f"this network takes {needs}. {told}")
        sample |= {CAPTIONS: batch[CAPTIONS][0]} if CAPTIONS in batch else {}
        self._warn_of_masks(sample)
        try:
            self.family.check_sample(self.model, with_text(self.model, sample))
        except SciflowError as error:
            raise SciflowError(f"{error} {told}") from error

    def _validation_callback(self) -> ValidationCallback:
        """Images of `--validation_prompts` or `--validation_class_labels` during training."""
        args = self.args
        size = tuple(args.validation_size) or commonest_size(without_prior(self.train_dataset))
        if size is None:
            raise SciflowError("`validation_size`: give height and width, the data has no buckets to take them from.")
        views = EditViews()
        if any(map(source_files, args.validation_source_images)):
            views = EditViews.of(without_prior(self.train_dataset), self.family)
        return ValidationCallback(
            family=self.family,
            prompts=args.validation_prompts or args.validation_class_labels,
            negative_prompts=args.validation_negative_prompt,
            source_images=args.validation_source_images,
            target_images=args.validation_target_images,
            edits=dataclasses.replace(views, sizes=()) if args.validation_size else views,
            seeds=args.validation_seeds,
            steps=args.validation_steps,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            size=(int(size[0]), int(size[1])),
            output_dir=args.output_dir,
            trackers=lambda: self.callback_handler.callbacks,
            weights=self.averaged_weights,
        )

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """The model of a trial of `hyperparameter_search`, checked as the first one was."""
        model = super().call_model_init(trial)
        self._check_model(model, self.args)
        return model

    # -- the step ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a batch by the family's step; with `return_outputs` also `loss` and `levels` of each sample."""
        loss, levels = self.family.compute_loss(model, inputs, self.args)
        mean = self.mean_loss(loss, inputs.get("row"))
        return (mean, {"loss": loss, "levels": levels}) if return_outputs else mean

    def mean_loss(self, loss: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The mean of losses (B,); with prior preservation weighted by the kind of each row."""
        if self._loss_weights is None or rows is None:
            return loss.mean()
        return (self._loss_weights[rows].to(loss.device, non_blocking=True) * loss).mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss per quarter of the noise range and other learning rates; stops at a loss that is not finite."""
        if "loss" in logs:
            self._check_finite()
            logs.update(self._step_metrics())
            rate = effective_learning_rate(self.optimizer.param_groups) if self.optimizer is not None else None
            if rate is not None:
                logs["effective_learning_rate"] = rate
            if self.optimizer is not None and "learning_rate" in logs:
                logs.update(group_rates(self.optimizer.param_groups, logs["learning_rate"]))
        if "train_loss" in logs and self._loss_before is not None and self.state.global_step:  # the parent's: this call
            logs["train_loss"] = (self._loss_before + self._total_loss_scalar) / self.state.global_step
        super().log(logs, start_time)

    def _step_metrics(self) -> dict[str, float]:
        """Means over the samples since the last log."""
        return self._losses.means(self.accelerator, self.family.level_range())

    def _check_finite(self) -> None:
        found = self._losses.not_finite(self.accelerator)
        if found is None:
            return
        lower = "lower `--learning_rate`, or train in `--bf16` instead of fp16"
        if found.rows is None:
            raise SciflowError(
                f"the gradient was not finite at step {found.step}, though the loss was: a value overflowed on the way "
                f"back, and the weights after it are spoilt. Checkpoints of earlier steps are complete: resume from "
                f"one and {lower}."
            )
        names = sorted({describe_row(self.train_dataset, row) for row in found.rows})
        raise SciflowError(
            f"the loss was not finite at step {found.step}. "
            f"Rows: {'; '.join(names[:10]) or 'on another rank'}. "
            "Look for NaN or Inf in them; checkpoints of earlier steps are complete. "
            f"Where the data is clean, {lower}."
        )

    @staticmethod
    def _check_weights(model: torch.nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        finite = torch.stack([torch.isfinite(p).all() for p in trained.values()])
        if not finite.all():
            bad = [name for name, good in zip(trained, finite.tolist(), strict=True) if not good]
            raise SciflowError(
                f"the trained weights hold NaN or infinity ({len(bad)} of {len(trained)} tensors, the first {bad[0]}): "
                "they are not saved. Resume from a checkpoint of an earlier step with a lower `--learning_rate`."
            )

    # -- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> BucketLoader | StreamLoader | OwnStreamLoader:
        """Batches of one bucket, sharded and keyed by our own sampler.

        Raises:
            SciflowError: no data; worker processes for a stream.
        """
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise SciflowError("`train_dataset` is missing.")
        options = self._loader_options() | {"caption_dropout": self.caption_dropout}
        options["source_dropout"] = self.source_dropout
        options["step_keys"] = args.stratified_levels
        # A step holds its batches until it is done (`MicroBatches`), while those of the next are read.
        options["buffers"] = 2 * args.gradient_accumulation_steps + 1
        if not is_stream(dataset):
            sampler = training_sampler(dataset, args, pads_text=self.family.pads_text)
            return BucketLoader(dataset, sampler, **options)
        del options["prefetch_factor"]
        if options.pop("num_workers"):
            raise SciflowError("`dataloader_num_workers` does not go with a stream: see `--dataloader_threads`.")
        options |= {
            "batch_size": args.train_batch_size,
            "num_replicas": args.world_size,
            "rank": args.process_index,
            "accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.order_seed,
        }
        if isinstance(dataset, StreamingCache):
            self._stream = StreamLoader(dataset, drop_last=args.dataloader_drop_last, **options)
        else:
            self._stream = OwnStreamLoader(dataset, check=self._check_batch, **options)
        if self._stream_state is not None:
            self._stream.load_state_dict(self._stream_state)
        return self._stream

    def _loader_options(self) -> dict[str, Any]:
        """How training and evaluation read alike."""
        args, workers = self.args, self.args.dataloader_num_workers
        return {
            "collate_fn": self.data_collator,
            "threads": args.dataloader_threads,
            "pads_text": self.family.pads_text,
            "posterior": self.family.posterior == "sample",
            "num_workers": workers,
            "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
            "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
        }

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Evaluation batches in row order, their noise keyed by the row's name."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise SciflowError("`eval_dataset` is missing: hold some out with `--eval_fraction`.")
        if is_stream(dataset):
            self._check_kind("eval_dataset", dataset)
            dataset = list(dataset)
            self._check_data(dataset)
        sampler = BucketBatchSampler(
            batch_keys_of(dataset, pads_text=self.family.pads_text),
            batch_size=self.args.per_device_eval_batch_size,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            shuffle=False,
        )
        self._eval_rows = row_ids_of(dataset)
        self._eval_groups = dict(zip(self._eval_rows, groups_of(dataset), strict=True))
        known = all(row in self._eval_base for row in self._eval_rows)
        self._measure_base = not known and self._base_is_at_hand()
        return BucketLoader(dataset, sampler, key_of=evaluation_keys(self._eval_rows), **self._loader_options())

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Batches of `test_dataset` as for evaluation: in row order, noise keyed by the row's name."""
        return self.get_eval_dataloader(test_dataset)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _base_is_at_hand(self) -> bool:
        """With an adapter always (switched off); in full fine-tuning before step 1; from scratch never."""
        if adapter_layers(self.model):
            return True
        return not self.family.from_scratch and self.state.global_step == 0

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Losses of a batch on the fixed grid and the row numbers (B,).

        (B, 2K + 1): trained and base side by side, then 1 for edits and 0 for rows without sources.
        """
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = base = self._grid_losses(model, batch)
            if not self._measure_base:
                base = torch.full_like(losses, torch.nan)
            elif adapter_layers(self.model):
                with adapter_disabled(self.model):
                    base = self._grid_losses(model, batch)
        edits = torch.full_like(losses[:, :1], float(source_name(0) in batch))
        release(inputs)
        return None, torch.cat([losses, base, edits], dim=1), batch["row"].to(losses.device)

    def _grid_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        columns = []
        for number, level in enumerate(self.family.evaluation_levels(self.args.eval_levels)):
            keys = [hash64(int(key), number) for key in inputs["noise_key"]]
            levels = level.expand(len(keys))
            loss, _ = self.family.compute_loss(model, inputs | {"noise_key": keys}, self.args, levels=levels)
            columns.append(loss.float())
        return torch.stack(columns, dim=1)

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        measured, rows = prediction.predictions, [self._eval_rows[int(i)] for i in prediction.label_ids]
        (losses, base), edits = np.split(measured[:, :-1], 2, axis=1), measured[:, -1].astype(bool)
        if self._measure_base:
            self._eval_base.update({row: values.tolist() for row, values in zip(rows, base, strict=True)})
        bad = sorted({row for row, finite in zip(rows, np.isfinite(losses).all(axis=1), strict=True) if not finite})
        if bad:
            logger.warning(
                "The loss of %d of %d evaluated rows is not finite: %s.", len(bad), len(rows), ", ".join(bad[:5])
            )
        levels = self.family.evaluation_levels(self.args.eval_levels).numpy() / self.family.level_range()
        known = self._eval_base if all(row in self._eval_base for row in rows) else None
        metrics = summarise(losses, levels, rows, self._eval_groups, known, edits)
        if self._user_metrics is not None:
            metrics |= self._user_metrics(EvalPrediction(predictions=losses, label_ids=prediction.label_ids))
        return metrics

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Searches as `Trainer` does, for the smallest `eval_loss` unless `compute_objective` says otherwise."""
        objective = compute_objective or (lambda metrics: metrics["eval_loss"])
        return super().hyperparameter_search(hp_space, objective, *args, **kwargs)

    # -- training ----------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; resumes where `resume_from_checkpoint` (or the option of that name) says: see `resolve_checkpoint`.

        Raises:
            SciflowError: an output folder with checkpoints and no word on them, a checkpoint of another run, a loss
                that is not finite.
            Preempted: SIGTERM or SIGUSR1 has come to any rank, and the run is saved.
        """
        value = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        output_dir = self.args.output_dir
        if trial is None and self.args.should_save:
            check_output_dir(output_dir, resume=value, overwrite=self.args.overwrite_output_dir)
        with holding(output_dir) if trial is None and self.is_world_process_zero() else nullcontext():
            return self._train(value, trial, ignore_keys_for_eval)

    def _train(self, value: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """`train`, in a folder that is this run's alone."""
        output_dir = self.args.output_dir
        if trial is None:
            if self.args.should_save:
                remove_unfinished(output_dir)
                if self.args.save_strategy != SaveStrategy.NO:
                    check_room(output_dir, self._checkpoint_bytes())
            self.accelerator.wait_for_everyone()
        folder = self._resumed = resolve_checkpoint(value, output_dir)
        self._place = None if folder is None else Place.saved_in(folder)
        if folder is not None:
            check_format(folder)
            self.family.resumed(saved_facts(folder).get("network") or {})
            advice = {"total_train_batch_size": lambda before: same_total_batch(before, self.args)}
            check_identity(folder, self._identity(), advice, renamed_options=self.family.renamed_options)
            if (folder / STREAM).is_file():
                self._stream_state = json.loads((folder / STREAM).read_text(encoding="utf-8"))
            self._apply_options(folder)
            logger.info("Going on from %s.", folder)
            if not (folder / OPTIMIZER_NAME).exists() and not self.is_deepspeed_enabled:
                logger.warning(
                    "%s holds weights alone (`--save_only_model`): the optimizer and the schedule of its learning rate "
                    "begin anew, and the result is not that of an uninterrupted run.", folder.name,
                )  # fmt: skip
        else:
            self._options_changed, self._loss_before = {}, 0.0
        self._losses.clear()  # of an earlier call that ended with an error
        self._measure_first = self.eval_dataset is not None and self.model_init is None and not self._eval_base
        self._measure_first = self._measure_first and not adapter_layers(self.model)
        if self.args.world_size > 1:
            held_out = [data_fingerprint(dataset) for dataset in _as_datasets(self.eval_dataset)]
            check_ranks({**self._identity(), "eval_data": held_out, **self._options()})
        before = self._weight_sums()
        try:
            watched = self._profile.watching(self) if self._profile else nullcontext()
            with self._preemption.listening(), explain_unpickling(folder), watched:
                output = super().train(str(folder) if folder else None, trial, ignore_keys_for_eval)
        finally:
            self.model_wrapped.__dict__.pop("zero_grad", None)  # see `_prepare_for_training`
        if before and self._weight_sums() == before:
            logger.warning("No trained weight moved in %d steps: look at the learning rate.", self.state.global_step)
        return output

    def _checkpoint_bytes(self) -> float:
        """About what a checkpoint takes: trained weights, their average, and the optimizer's state."""
        numbers = sum(p.numel() for p in self.model.parameters() if p.requires_grad) if self.model is not None else 0
        return numbers * (4 + 4 * (self._ema is not None) + state_bytes(self.args.optim))

    def _apply_options(self, folder: Path) -> None:
        """Says which options differ from those of the checkpoint; the base is measured anew where it has to be."""
        saved = saved_facts(folder)
        self._loss_before = saved.get("loss_sum")
        options = self._options()
        changed = self._options_changed = changed_options(folder, options)
        check_states(changed, options["lr_scheduler_type"])
        self._eval_base = {}
        if (folder / EVAL_BASE).is_file():
            self._eval_base = json.loads((folder / EVAL_BASE).read_text(encoding="utf-8"))
        levels = {len(losses) for losses in self._eval_base.values()}
        measured = [name for name in changed if name in MEASURED or name.startswith("family.")]
        if self._eval_base and (measured or levels != {self.args.eval_levels}):
            logger.warning(
                "The losses of the base model are measured again: %s changed, and with it `eval_loss`.",
                ", ".join(measured) or "`eval_levels`",
            )
            self._eval_base = {}
        if changed:
            told = "; ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in sorted(changed.items()))
            logger.warning("Other options than in %s apply from here on: %s.", folder.name, told)

    def _identity(self) -> dict[str, Any]:
        """The facts that must be the same to resume a checkpoint of this run; plain JSON values."""
        if self._fingerprint[0] is not self.train_dataset:
            self._fingerprint = (self.train_dataset, data_fingerprint(self.train_dataset))
        family, args, path = self.family, self.args, self.family.pretrained_model_name_or_path
        return {
            "family": family.name,
            "network": dataclasses.asdict(family) if family.from_scratch else None,
            "pretrained_model_name_or_path": Path(path).name if os.path.isdir(path) else path,
            "revision": family.revision,
            "adapter": adapter_facts(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)),
            "data": self._fingerprint[1],
            "row_filter": sorted(getattr(self.train_dataset, "row_filter", ())) or None,
            "total_train_batch_size": self.get_total_train_batch_size(args),
            "seed": args.order_seed,
            "optim": str(getattr(args.optim, "value", args.optim)),
            "lora_plus_ratio": args.lora_plus_ratio,
            "text_encoder_learning_rate": args.text_encoder_learning_rate,
            "quantize_base": args.quantize_base,
            "parts": {place.option: place.name for place in family.own_places.values()},
        }

    def _options(self) -> dict[str, Any]:
        """Options that a checkpoint records, including those of the data that change a step."""
        prior = getattr(self.train_dataset, "prior", None)
        weight = None if prior is None else prior.loss_weight
        images = getattr(self.train_dataset, "online_images", None)
        mine: dict[str, Any] = {"caption_dropout": self.caption_dropout, "source_dropout": self.source_dropout}
        mine["prior_loss_weight"] = weight
        mine |= {"image_encoding": "cached" if images is None else "online", "image_views": images and str(images)}
        return options_of(self.args, self.family) | mine

    def _weight_sums(self) -> list[float]:
        """A sum per trained parameter, enough to see that none moved; empty where weights are sharded or not made."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.model_init is not None:
            return []
        return torch.stack([p.detach().double().sum() for p in self.model.parameters() if p.requires_grad]).tolist()

    def _measure_initial_weights(self) -> None:
        """Full fine-tuning: the losses of the initial weights, the base that later evaluations compare with."""
        for dataset in _as_datasets(self.eval_dataset):
            loader = self.get_eval_dataloader(dataset)
            if self._measure_base:
                self.evaluation_loop(loader, "Evaluation of the initial weights")

    # -- publishing ----------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository and checks the right to write, before training."""
        args = self.args
        if self.is_world_process_zero():
            self.hub_model_id = check_access(
                args.hub_model_id or Path(args.output_dir).resolve().name,
                token=token or args.hub_token,
                private=args.hub_private_repo if private is None else private,
                revision=args.hub_revision,
            )

    def method_facts(self) -> dict[str, Any]:
        """Fields of `CardFacts` for a method beyond the loss of single samples."""
        return {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md from the facts of this run into `output_dir`."""
        if self.is_world_process_zero():
            save_model_card(self)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Saves, writes the card and uploads what a user needs: weights, card, sample images."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        return self._upload(commit_message, token=token, revision=revision, blocking=blocking)

    def _upload(
        self, message: str | None, *, token: str | None = None, revision: str | None = None, blocking: bool = False
    ) -> Any:
        """Uploads the files of the output folder that users need, in one commit."""
        return upload(
            str(self.hub_model_id),
            self.args.output_dir,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=message or "End of training",
            run_as_future=not blocking,
        )

    def _push_checkpoint(self, folder: Path) -> None:
        """`--hub_strategy`: weights and card so far in the background, and the checkpoint `folder` where asked for.

        On all ranks, since sharded weights are gathered. A push under way makes it pass, unless `--hub_always_push`,
        which waits for it: no file changes while it is read. A failure is logged, not fatal.
        """
        args, state = self.args, self.state
        busy = any(not push.done() for push in self.running_pushes)
        if args.hub_strategy == HubStrategy.END or broadcast_object_list([busy and not args.hub_always_push])[0]:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        self.create_model_card()
        steps = args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {state.global_step}' if steps else f'epoch {int(state.epoch or 0)}'}"
        self.running_pushes.append(self._upload(message))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            self.running_pushes.append(
                upload_checkpoint(
                    str(self.hub_model_id),
                    folder,
                    place,
                    token=args.hub_token,
                    revision=args.hub_revision,
                    commit_message=f"{message}, checkpoint",
                )
            )
            self.pushed_checkpoint = folder

    # -- averaged weights ----------------------------------------------------------------------------------------

    @property
    def _ema(self) -> EMACallback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, EMACallback)), None)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Context manager: swap in the EMA weights, if there are any and training has begun."""
        self._to_average()
        return nullcontext() if self._ema is None else self._ema.swapped()

    def _to_average(self) -> None:
        """A schedule-free optimizer puts its average in place, where it stays until the next step."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    # ==== hooks of transformers.Trainer ====
    #
    # All that follows in this class overrides what the parent calls, mostly private, in transformers 5.23.
    # tests/training/test_trainer_hooks.py fails where one is renamed, no longer called, or changes its arguments.

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Counts epochs and steps from the place in the epoch that was saved."""
        epochs, per_epoch, *numbers, max_steps = super().set_initial_training_values(args, dataloader)
        if self._place is not None:
            by_steps = args.max_steps > 0
            epochs, max_steps = self._place.length_of_run(epochs, max_steps, per_epoch, by_steps=by_steps)
        return epochs, per_epoch, *numbers, max_steps

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        self._find_best()
        if self._place is not None:
            epochs, steps = self._place.in_steps(num_update_steps_per_epoch)
            batches = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
        return epochs, batches

    def _find_best(self) -> None:
        """The best checkpoint by its name: the folder of the run may have been moved, or copied."""
        if self._resumed is None:
            return
        saved = json.loads((self._resumed / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_model_checkpoint"]
        here = saved and Path(self.args.output_dir) / Path(saved).name
        if here and here.is_dir() and self.state.best_model_checkpoint != str(here):
            logger.info("The best checkpoint is %s.", here)
            self.state.best_model_checkpoint = str(here)
        elif saved and self.state.best_model_checkpoint is None:
            logger.warning("The best checkpoint, %s, is gone: the best is that of the evaluations from here on.", saved)
            self.state.best_metric = self.state.best_global_step = None

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the parent would train a step more
            logger.info("Nothing left to train: step %d of %d.", self.state.global_step, self.state.max_steps)
            self.control.should_training_stop = True
            return
        with _position_exact_resume(), _optional_packages_looked_up_once(), _closed_after(train_dataloader):
            super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Ends a training, but keeps the newest checkpoint: without it the same command would train its steps again."""
        self._check_finite()
        self._to_average()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the averaged weights where there are any; no reader thread outlives it."""
        gathered = sharding.resharded(self.model) if self.is_fsdp_enabled else nullcontext()
        with _closed_after(dataloader), self.averaged_weights(), gathered:
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        moved = super()._prepare_inputs({k: v for k, v in inputs.items() if k not in HOST_KEYS})
        return {**moved, **{k: inputs[k] for k in HOST_KEYS if k in inputs}}

    def _prepare_input(self, data: Any) -> Any:
        """Copies to the device; from page-locked memory the copy is queued, and its loader waits for it."""
        pinned = isinstance(data, torch.Tensor) and data.is_pinned()
        return super()._prepare_input(data.to(self.args.device, non_blocking=True) if pinned else data)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Keeps accelerate from compiling all of the network: `compile_blocks` compiles less."""
        built = super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}
        if self.args.fp16:
            built["kwargs_handlers"].append(GradScalerKwargs(**self.args.loss_scaling))
        return built

    # -- a step: walk over the trained parameters, not over every module of the network --------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and self._gathered is None:
            # By the names in the network: those in its state dict are the same.
            saved = adapter_parameters(self.model) | adapter_parameters(self.model, INITIAL)
            self._gathered = sharding.GatheredNetwork(self.model, saved or dict(self.model.named_parameters()))
        if self.args.torch_compile:
            compile_blocks(network_of(self.accelerator.unwrap_model(self.model)), self.args)
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if isinstance(loader, BucketLoader):
            tokens = image_tokens(self.train_dataset, self.family)
            title = f"Buckets of an epoch, {tokens}" if tokens else "Buckets of an epoch"
            logger.info("%s:\n%s", title, loader.sampler.table(max_rows=12))
        trained = self._trained = [p for p in model.parameters() if p.requires_grad]
        self._micro_batches = MicroBatches(self)
        model.train()

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in trained:
                parameter.grad = None

        model.zero_grad = zero_grad  # on the instance; `train` removes it
        if self._measure_first:
            self._measure_initial_weights()
            model.train()
        return model, loader

    @functools.cached_property
    def _micro_batches(self) -> MicroBatches:
        return MicroBatches(self)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward pass of a micro-batch; modules that are in training mode already are not walked again.

        A batch that does not fit into memory is taken in parts. After the last one of an optimizer step all are given
        back to their loader, which empties them.
        """
        if not (model.training and self.model.training):
            model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free: back from the average
            self.optimizer.train()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return self._micro_batches.run(model, inputs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            grad_norm = self.accelerator.clip_grad_norm_(self._trained, float("inf"))
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # with one, a step whose gradient overflows is left out
            self._losses.note_norm(norm, self.state.global_step + 1)
        return norm

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Class and arguments of `--optim`: those of this package, else those of `Trainer`."""
        if args.optim in OPTIMIZERS:
            cls, kwargs = optimizer_class(args.optim, args.learning_rate, args.optim_args)
            return cls, kwargs
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Any:
        """Makes the optimizer; `--lora_plus_ratio` and `--text_encoder_learning_rate` divide its groups."""
        is_new, trained = self.optimizer is None, self.model if model is None else model
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.lora_plus_ratio or self.args.text_encoder_learning_rate):
            split_groups(optimizer, trained, rates_of(trained, self.args, learning_rate=optimizer.defaults["lr"]))
        return optimizer

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """The run's folder; while a checkpoint is written, the folder in it from which it is moved to its place."""
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING) if self._saving else run_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint, which appears once it is complete and on the disk; old ones go only then.

        A disk that is full, on any rank, costs this checkpoint, not the run.
        """
        self._check_finite()
        check_held(self._get_output_dir(trial=trial))
        self._to_average()  # on every rank, so that all continue from the same bits
        run_dir, best = self._get_output_dir(trial=trial), self.state.best_model_checkpoint
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        staged = Path(run_dir) / STAGING / folder.name
        if self.args.should_save:
            remove_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saving, self._disk_full = True, None
        try:
            with self._full_disk_noted(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self._saving, self.args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()
        if is_best := self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save and self._disk_full is None:
            with self._full_disk_noted(folder):
                if is_best:
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                if self._stream is not None:
                    (staged / STREAM).write_text(json.dumps(self._stream.state_dict()), encoding="utf-8")
                write_manifest(staged)
        failed = torch.tensor(float(self._disk_full is not None), device=self.args.device)
        self._preemption.saved = not self.accelerator.reduce(failed, "sum").item()
        if not self._preemption.saved:
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                remove_unfinished(run_dir)
                why = self._disk_full or f"{folder} could not be written, the disk of another rank is full."
                logger.warning("No checkpoint of step %d: %s The next save tries again.", self.state.global_step, why)
            return
        if self.args.should_save:
            publish(staged, folder)
            busy = self.pushed_checkpoint if any(not push.done() for push in self.running_pushes) else None
            rotate(run_dir, limit=limit, newest=folder, best=self.state.best_model_checkpoint, busy=busy)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            with self._full_disk_noted(run_dir):
                self._push_checkpoint(folder)
            if self._disk_full is not None:
                logger.warning("Step %d is not pushed: %s", self.state.global_step, self._disk_full)

    @contextmanager
    def _full_disk_noted(self, folder: str | Path) -> Iterator[None]:
        """Notes a full disk instead of raising: the other ranks would wait for a rank that leaves here."""
        try:
            with disk_full_named(folder):
                yield
        except DiskFullError as error:
            self._disk_full = self._disk_full or error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what users load: the adapter, the network or the pipeline. All ranks call it, under FSDP too."""
        folder = output_dir or str(self.args.output_dir)
        check_held(folder)
        alone = sharding.as_one_process(self) if self.is_fsdp_enabled else nullcontext()
        with alone, self._full_disk_noted(folder) if self._saving else disk_full_named(folder):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP writes the files that one process would write, instead of all weights and shards."""
        if self._gathered is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = sharding.gathered_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restores their states, but with the learning rate and the like of the options now."""
        asked = rates(self.optimizer)
        if self._gathered is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            sharding.load_gathered_state(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        if checkpoint is not None and not self.is_deepspeed_enabled:
            new_rate = "learning_rate" in self._options_changed
            apply_rates(self.optimizer, self.lr_scheduler, asked, new_rate=new_rate)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter as the family's LoRA file, or the network in diffusers layout. Never the frozen base.

        A checkpoint gets the weights as trained and the average as well, any other folder the averaged weights.
        """
        if not (self.args.should_save or self._gathered):
            return
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = folder.name.startswith("checkpoint-")
        with nullcontext() if is_checkpoint else self.averaged_weights():
            model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if self._gathered is not None:
                model = self._gathered.gather(model)
            if self.args.should_save:
                self._check_weights(model)
                folder.mkdir(parents=True, exist_ok=True)
                self._save_weights(model, folder)
        if is_checkpoint and self._ema is not None:
            self._ema.save(folder)
        if not self.args.should_save:
            return
        if not is_checkpoint:
            self.exported = export_run(folder, self.args.export_formats, self.family, network_of(model))
        loader = self.callback_handler.train_dataloader
        is_map_style = isinstance(loader, BucketLoader)  # a stream keeps its own place
        place = Place.of(self.state, loader, self.args.gradient_accumulation_steps) if is_map_style else None
        facts: dict[str, Any] = {"place": place, "options": self._options()}
        facts |= {"format": FORMAT, "versions": versions()}
        if is_checkpoint and self._loss_before is not None:
            facts["loss_sum"] = self._loss_before + self._total_loss_scalar + self._tr_loss.item()
        write_json(folder / IDENTITY_NAME, self._identity() | facts)
        if self._eval_base and is_checkpoint:
            write_json(folder / EVAL_BASE, self._eval_base)

    def _save_weights(self, model: Any, folder: Path) -> None:
        if adapter_layers(model):
            save_adapter(model, folder, family=self.family)
        else:
            self.family.save_network(model, folder)
            for file in folder.glob("*/*.safetensors"):  # a pipeline of our own also has its VAE
                follow_umask(file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._measure_first:
            self._measure_initial_weights()
            self._measure_first = False
        network: Any = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        folder = Path(resume_from_checkpoint)
        if self._gathered is None:
            self._load_weights(network, folder)
        else:
            gathered = self._gathered.gather(network)
            if self.is_world_process_zero():
                self._load_weights(gathered, folder)
            self._gathered.scatter(network)
        if self._ema is not None:
            self._ema.load(folder, network)

    def _load_weights(self, network: Any, folder: Path) -> None:
        if adapter_layers(network):
            load_adapter_weights(network, folder, family=self.family)
        else:
            saved = type(network).from_pretrained(folder / self.family.component, dtype=network_dtype(network))
            network.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `_save_checkpoint` pushes later, once the checkpoint is complete."""

    def _finish_current_push(self) -> None:
        """Waits for pushes under way, so that no file changes below them. Their failure was logged when it happened."""
        wait(self.running_pushes)
        self.running_pushes.clear()


@contextmanager
def _position_exact_resume() -> Iterator[None]:
    """Lets our loader skip by itself: accelerate's `skip_first_batches` rebuilds a plain DataLoader, without epochs."""
    stock: Callable[..., Any] = transformers.trainer.skip_first_batches

    def skip(loader: Any, num_batches: int = 0) -> Any:
        return loader.skip(num_batches) if isinstance(loader, BatchLoader) else stock(loader, num_batches)

    transformers.trainer.skip_first_batches = skip
    try:
        yield
    finally:
        transformers.trainer.skip_first_batches = stock


@contextmanager
def _optional_packages_looked_up_once() -> Iterator[None]:
    """accelerate 1.15 searches the import path for `lomo_optim` twice an optimizer step: here once an epoch."""
    stock: Callable[[], bool] = accelerate.optimizer.is_lomo_available
    accelerate.optimizer.is_lomo_available = functools.cache(stock)
    try:
        yield
    finally:
        accelerate.optimizer.is_lomo_available = stock


@contextmanager
def _closed_after(loader: Any) -> Iterator[None]:
    """Ends the threads of our loader however an epoch ends: a traceback would keep its iterator alive."""
    try:
        yield
    finally:
        if isinstance(loader, BatchLoader):
            loader.close()


def _as_datasets(datasets: Any) -> list[Any]:
    if datasets is None:
        return []
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]
