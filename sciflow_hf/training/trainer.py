"""`DiffusionTrainer`: transformers.Trainer with one step per model family."""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..adapters.adapter import adapter_disabled, adapter_layers
from ..adapters.export import check_run
from ..adapters.text_encoders import NetworkWithText, network_of, use_captions, with_text
from ..data.batches.buckets import BucketBatchSampler
from ..data.batches.loader import BucketLoader, batch_keys_of, evaluation_keys, row_ids_of
from ..data.batches.samples import collate, describe_row
from ..data.batches.threads import release
from ..data.cache import LatentCache
from ..data.prior import loss_weights
from ..data.stream.loader import StreamLoader
from ..data.stream.stream import StreamingCache
from ..diffusion.randomness import hash64
from ..engines.offload import offload_blocks
from ..engines.optimizers import effective_learning_rate, group_rates, rates_of
from ..engines.quantisation import check_loaded, keep_from_broadcast
from ..engines.sharding import check_sharding
from ..errors import SciflowError
from ..families.base import ModelFamily
from ..report import run_facts
from . import checkpoints
from .arguments import DiffusionTrainingArguments
from .callbacks.ema import EMACallback
from .callbacks.preemption import PreemptionCallback
from .evaluation import summarise
from .loaders import loader_options, training_loader
from .loss_log import LossLog
from .resume import Place, same_total_batch
from .trainer_hooks import EVAL_BASE, STREAM, HookedTrainer

logger = logging.getLogger(__name__)


class DiffusionTrainer(HookedTrainer):
    """Trains a diffusion network of one family. What `transformers.Trainer` does, it does unchanged.

    Args:
        model: the network, with adapters already added (`add_adapter`), or all of it trainable.
        args: training options.
        family: how this kind of network is stepped, saved and sampled.
        train_dataset, eval_dataset: map-style data sets of dicts of tensors, such as `load_cache` returns. A list
            attribute `buckets` (or `batch_keys`) says which rows may share a batch; `row_ids` and `groups` name them.
        data_collator: list of samples -> batch; stacks by default.
        model_init: makes a model with adapters, for `hyperparameter_search`.
        compute_metrics: gets the losses (N, levels) and row numbers (N,) of an evaluation; its metrics are added.
        caption_dropout: share of samples trained with the empty prompt (chosen by sample key).
        dataset_names: what the model card calls the data.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in the parent.

    Raises:
        SciflowError: nothing to train, trained weights in 16 bit, or data that does not fit the network.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` returns a mean; the step divides by the accumulation itself

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: DiffusionTrainingArguments | None = None,
        *,
        family: ModelFamily,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]] = collate,
        model_init: Callable[..., torch.nn.Module] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        caption_dropout: float = 0.0,
        dataset_names: Sequence[str] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    ) -> None:
        args = args or DiffusionTrainingArguments(output_dir="tmp_trainer")
        self.family, self.caption_dropout, self.dataset_names = family, caption_dropout, list(dataset_names)
        self.running_pushes: list[Future[Any]] = []
        self.pushed_checkpoint: Path | None = None
        self._user_metrics = compute_metrics
        prior, weights = getattr(train_dataset, "prior", None), loss_weights(train_dataset)
        self._losses = LossLog(None if prior is None else prior.rows)
        self._loss_weights = None if weights is None else torch.from_numpy(weights)
        self._eval_base: dict[str, list[float]] = {}  # row id -> losses of the base model
        self._eval_rows: list[str] = []
        self._measure_base = False
        if isinstance(train_dataset, StreamingCache) and args.max_steps <= 0:
            raise SciflowError("`max_steps` is missing: a stream has no end. Say after how many steps to stop.")
        run_facts.prepare_wandb(args)
        if args.ema_decay is not None:  # before those that look at weights
            callbacks = [EMACallback(args.ema_decay, args.ema_warmup), *(callbacks or [])]
        self._preemption = PreemptionCallback()
        if model is not None:
            self._check_model(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            model_init=model_init,
            compute_metrics=self._summarise,
            callbacks=[self._preemption, *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        check_sharding(self)
        for dataset in (train_dataset, *_as_datasets(eval_dataset)):
            self._check_data(dataset)
        if args.validation_prompts or args.validation_class_labels:
            self.add_callback(run_facts.validation_callback(self))

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
            """What the parent calls for `--activation_checkpointing`, in diffusers' words."""
            model.enable_gradient_checkpointing()

        model.activation_checkpointing_enable = activation_checkpointing_enable
        network = network_of(model)
        if isinstance(network, ConfigMixin):  # transformers' TensorBoardCallback asks the configuration for it
            vars(network.config)["to_json_string"] = network.to_json_string
        rates_of(model, args, learning_rate=args.learning_rate or 0.0)
        check_loaded(network, args.quantize_base)
        keep_from_broadcast(model)
        if args.offload:
            offload_blocks(network, args.device)

    def _check_data(self, dataset: Any) -> None:
        if dataset is None:
            return
        if len(dataset) == 0:
            raise SciflowError("the data set is empty.")
        if callable(getattr(dataset, "check_family", None)):
            dataset.check_family(self.family.encoder_settings())
        if self.model is None:
            return
        if isinstance(self.model, NetworkWithText):
            use_captions(dataset)
        sample = dataset.first_sample() if isinstance(dataset, StreamingCache) else dataset[0]
        self.family.check_sample(self.model, with_text(self.model, sample))
        if isinstance(dataset, LatentCache) and dataset.online_text is None:  # of every bucket the shapes
            for row in {key[:2]: i for i, key in enumerate(dataset.batch_keys)}.values():
                self.family.check_sample(self.model, dataset.shapes(row))

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
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
        """Mean loss of a batch by the family's step; the losses per sample are kept until the next log."""
        loss, levels = self.family.compute_loss(model, inputs, self.args)
        if model.training:
            self._losses.note(loss, levels, inputs.get("row"))
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
            logs.update(self._losses.means(self.accelerator, self.family.level_range()))
            rate = effective_learning_rate(self.optimizer.param_groups) if self.optimizer is not None else None
            if rate is not None:
                logs["effective_learning_rate"] = rate
            if self.optimizer is not None and "learning_rate" in logs:
                logs.update(group_rates(self.optimizer.param_groups, logs["learning_rate"]))
        super().log(logs, start_time)

    def _check_finite(self) -> None:
        bad_rows = self._losses.bad_rows(self.accelerator)
        if bad_rows is None:
            return
        names = sorted({describe_row(self.train_dataset, row) for row in bad_rows})
        raise SciflowError(
            f"the loss was not finite before step {self.state.global_step}. "
            f"Rows: {'; '.join(names[:10]) or 'on another rank'}. "
            "Look for NaN or Inf in them; checkpoints from before are whole. "
            "Where the data is clean, lower `--learning_rate` or train in `--bf16` instead of fp16."
        )

    # -- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Batches of one bucket, sharded and keyed by our own sampler; says what each bucket gives."""
        if self.train_dataset is None:
            raise SciflowError("`train_dataset` is missing.")
        loader = training_loader(
            self.train_dataset, self.args, self.family, self.data_collator, caption_dropout=self.caption_dropout
        )
        if isinstance(loader, StreamLoader):
            self._stream = loader
            if self._stream_state is not None:
                loader.load_state_dict(self._stream_state)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Evaluation batches in row order, their noise keyed by the row's name."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise SciflowError("`eval_dataset` is missing: hold some out with `--eval_fraction`.")
        sampler = BucketBatchSampler(
            batch_keys_of(dataset, pads_text=self.family.pads_text),
            batch_size=self.args.per_device_eval_batch_size,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            shuffle=False,
        )
        self._eval_rows = row_ids_of(dataset)
        self._eval_groups = dict(zip(self._eval_rows, getattr(dataset, "groups", self._eval_rows), strict=True))
        known = all(row in self._eval_base for row in self._eval_rows)
        self._measure_base = not known and self._base_is_at_hand()
        options = loader_options(self.args, self.family, self.data_collator)
        return BucketLoader(dataset, sampler, key_of=evaluation_keys(self._eval_rows), **options)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As for evaluation."""
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
        """Losses of a batch on the fixed grid: (B, 2K), trained and base side by side, and the row numbers (B,)."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = base = self._grid_losses(model, batch)
            if not self._measure_base:
                base = torch.full_like(losses, torch.nan)
            elif adapter_layers(self.model):
                with adapter_disabled(self.model):
                    base = self._grid_losses(model, batch)
        release(inputs)
        return None, torch.cat([losses, base], dim=1), batch["row"].to(losses.device)

    def _grid_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        columns = []
        for number, level in enumerate(self.family.evaluation_levels(self.args.eval_levels)):
            keys = [hash64(int(key), number) for key in inputs["noise_key"]]
            levels = level.expand(len(keys))
            loss, _ = self.family.compute_loss(model, inputs | {"noise_key": keys}, self.args, levels=levels)
            columns.append(loss.float())
        return torch.stack(columns, dim=1)

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        both, rows = prediction.predictions, [self._eval_rows[int(i)] for i in prediction.label_ids]
        losses, base = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        if self._measure_base:
            self._eval_base.update({row: values.tolist() for row, values in zip(rows, base, strict=True)})
        levels = self.family.evaluation_levels(self.args.eval_levels).numpy() / self.family.level_range()
        known = self._eval_base if all(row in self._eval_base for row in rows) else None
        metrics = summarise(losses, levels, rows, self._eval_groups, known)
        if self._user_metrics is not None:
            metrics |= self._user_metrics(EvalPrediction(predictions=losses, label_ids=prediction.label_ids))
        return metrics

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The parent's; the objective is `eval_loss` unless given (the parent would add up all our metrics)."""
        objective = compute_objective or (lambda metrics: metrics["eval_loss"])
        return super().hyperparameter_search(hp_space, objective, *args, **kwargs)

    # -- training, saving, publishing ----------------------------------------------------------------------------

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
        if trial is None:
            if self.args.should_save:
                checkpoints.check_output_dir(output_dir, resume=value, overwrite=self.args.overwrite_output_dir)
                checkpoints.remove_unfinished(output_dir)
            self.accelerator.wait_for_everyone()
        folder = checkpoints.resolve_checkpoint(value, output_dir)
        self._place = None if folder is None else Place.saved_in(folder)
        if folder is not None:
            advice = {"total_train_batch_size": lambda before: same_total_batch(before, self.args)}
            checkpoints.check_run_facts(folder, run_facts.identity(self), advice)
            if (folder / STREAM).is_file():
                self._stream_state = json.loads((folder / STREAM).read_text(encoding="utf-8"))
            if (folder / EVAL_BASE).is_file():
                self._eval_base = json.loads((folder / EVAL_BASE).read_text(encoding="utf-8"))
            logger.info("Going on from %s.", folder)
        fresh = folder is None and self.model_init is None and not adapter_layers(self.model)
        self._measure_first = fresh and self.eval_dataset is not None
        before = self._weight_sums()
        try:
            with self._preemption.listening(), checkpoints.explain_unpickling(folder):
                output = super().train(str(folder) if folder else None, trial, ignore_keys_for_eval)
        finally:
            self.model_wrapped.__dict__.pop("zero_grad", None)  # see `_prepare_for_training`
        if before and self._weight_sums() == before:
            logger.warning("No trained weight moved in %d steps: look at the learning rate.", self.state.global_step)
        return output

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

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository and checks the right to write, before training."""
        if self.is_world_process_zero():
            self.hub_model_id = run_facts.check_hub(self.args, token=token, private=private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md from the facts of this run into `output_dir`."""
        if self.is_world_process_zero():
            run_facts.save_model_card(self)

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
        return run_facts.upload(self, commit_message, token=token, revision=revision, blocking=blocking)


def _as_datasets(datasets: Any) -> list[Any]:
    if datasets is None:
        return []
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]
