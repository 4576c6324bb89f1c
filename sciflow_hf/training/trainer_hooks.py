"""The private parts of transformers.Trainer that we touch, in one place. Checked against transformers 5.23.

`tests/training/test_trainer_hooks.py` fails where one of them is renamed or changes its arguments.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate.optimizer
import torch
import transformers.trainer
from accelerate.utils import TorchDynamoPlugin
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..adapters.adapter import adapter_layers
from ..adapters.export import Exported, export_run
from ..adapters.files import load_adapter_weights, save_adapter
from ..adapters.text_encoders import network_of
from ..data.batches.loader import BucketLoader
from ..data.stream.loader import StreamLoader
from ..engines.compilation import compile_blocks
from ..engines.optimizers import OPTIMIZERS, optimizer_class, rates_of, split_groups
from ..engines.sharding import WholeWeights, as_without_fsdp, load_whole_state, resharded, whole_state
from ..errors import DiskFullError
from ..families.base import ModelFamily, network_dtype
from ..report import run_facts
from .callbacks.ema import EMACallback
from .checkpoints import (
    RUN_FACTS,
    STAGING,
    disk_full_named,
    publish,
    remove_unfinished,
    rotate,
    write_json,
    write_manifest,
)
from .loss_log import LossLog
from .out_of_memory import MicroBatches
from .resume import Place

logger = logging.getLogger(__name__)

EVAL_BASE = "eval_base.json"
STREAM = "stream.json"
HOST_KEYS = ("noise_key", "step_key", "position", "row")
"""Entries of a batch that stay on the host: they seed generators and name rows, which on a GPU would be a sync."""


@contextmanager
def _position_exact_resume() -> Iterator[None]:
    """Lets our loader skip by itself: accelerate's `skip_first_batches` rebuilds a plain DataLoader, without epochs."""
    stock: Callable[..., Any] = transformers.trainer.skip_first_batches

    def skip(loader: Any, num_batches: int = 0) -> Any:
        return (
            loader.skip(num_batches) if isinstance(loader, BucketLoader | StreamLoader) else stock(loader, num_batches)
        )

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
        if isinstance(loader, BucketLoader | StreamLoader):
            loader.close()


class HookedTrainer(Trainer):
    """A `transformers.Trainer` whose step touches only what is trained, and whose checkpoints are whole or ignored."""

    family: ModelFamily
    _eval_base: dict[str, list[float]]
    _losses: LossLog
    _trained: list[torch.nn.Parameter]
    is_fsdp_enabled: bool
    exported: Sequence[Exported] = ()
    _stream: StreamLoader | None = None
    _stream_state: dict[str, Any] | None = None
    _whole: WholeWeights | None = None  # beside a network that FSDP spreads over the ranks
    _saving = False
    _disk_full: DiskFullError | None = None
    _measure_first = False
    _place: Place | None = None  # of the checkpoint that was resumed

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """The parent's, of which epochs and steps are counted from the place in the epoch that was saved."""
        epochs, per_epoch, *numbers, max_steps = super().set_initial_training_values(args, dataloader)
        if self._place is not None:
            by_steps = args.max_steps > 0
            epochs, max_steps = self._place.length_of_run(epochs, max_steps, per_epoch, by_steps=by_steps)
        return epochs, per_epoch, *numbers, max_steps

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        if self._place is not None:
            epochs, steps = self._place.in_steps(num_update_steps_per_epoch)
            batches = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
        return epochs, batches

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        with _position_exact_resume(), _optional_packages_looked_up_once(), _closed_after(train_dataloader):
            super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The parent's, of the averaged weights where there are any; no reader thread outlives it."""
        with _closed_after(dataloader), self.averaged_weights(), resharded(self.model):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        moved = super()._prepare_inputs({k: v for k, v in inputs.items() if k not in HOST_KEYS})
        return {**moved, **{k: inputs[k] for k in HOST_KEYS if k in inputs}}

    def _prepare_input(self, data: Any) -> Any:
        """The parent's, but the copy of page-locked memory is queued: its loader waits until it is done."""
        pinned = isinstance(data, torch.Tensor) and data.is_pinned()
        return super()._prepare_input(data.to(self.args.device, non_blocking=True) if pinned else data)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """The parent's, but accelerate compiles nothing: it would compile all of the network, `compile_blocks` less."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # -- a step: walk over the trained parameters, not over every module of the network --------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and self._whole is None:
            self._whole = WholeWeights(self.model)
        if self.args.torch_compile:
            compile_blocks(network_of(self.accelerator.unwrap_model(self.model)), self.args)
        model, loader = super()._prepare_for_training(*args, **kwargs)
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
        """The parent's, without walking all modules for `train()` when they are in that mode already.

        A batch that does not fit into memory is taken in parts. After the last one of an optimizer step all are given
        back to their loader, which empties them.
        """
        if not (model.training and self.model.training):
            model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free: back from the average
            self.optimizer.train()
        return self._micro_batches.run(model, inputs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            grad_norm = self.accelerator.clip_grad_norm_(self._trained, float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if args.optim in OPTIMIZERS:
            cls, kwargs = optimizer_class(args.optim, args.learning_rate, args.optim_args)
            return cls, kwargs
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Any:
        """The parent's, its groups divided where `--lora_plus_ratio` or `--text_encoder_learning_rate` ask for it."""
        is_new, trained = self.optimizer is None, self.model if model is None else model
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.lora_plus_ratio or self.args.text_encoder_learning_rate):
            split_groups(optimizer, trained, rates_of(trained, self.args, learning_rate=optimizer.defaults["lr"]))
        return optimizer

    # -- averaged weights ----------------------------------------------------------------------------------------

    @property
    def _ema(self) -> EMACallback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, EMACallback)), None)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the network has its averaged weights, if there are any and training has begun."""
        self._to_average()
        return nullcontext() if self._ema is None else self._ema.swapped()

    def _to_average(self) -> None:
        """A schedule-free optimizer puts its average in place, where it stays until the next step."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._to_average()
        return super()._finalize_training(*args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """The parent's; while a checkpoint is written, the folder in it from which it is moved to its place."""
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING) if self._saving else run_dir

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The parent's, but a checkpoint is there only once it is whole, and old ones go only then.

        A disk that is full, on any rank, costs this checkpoint, not the run.
        """
        self._check_finite()
        self._to_average()  # on every rank, so that all go on from the same bits
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
        if self.accelerator.reduce(failed, "sum").item():
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                remove_unfinished(run_dir)
                why = self._disk_full or f"{folder} could not be written, the disk of another rank is full."
                logger.warning("No checkpoint of step %d: %s The next save tries again.", self.state.global_step, why)
            return
        if self.args.should_save:
            publish(staged, folder)
            busy = run_facts.checkpoint_in_push(self)
            rotate(run_dir, limit=limit, newest=folder, best=self.state.best_model_checkpoint, busy=busy)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            with self._full_disk_noted(run_dir):
                run_facts.push_checkpoint(self, folder)
            if self._disk_full is not None:
                logger.warning("Step %d is not pushed: %s", self.state.global_step, self._disk_full)

    @contextmanager
    def _full_disk_noted(self, folder: str | Path) -> Iterator[None]:
        """In place of raising: a rank that left here would be waited for elsewhere."""
        try:
            with disk_full_named(folder):
                yield
        except DiskFullError as error:
            self._disk_full = self._disk_full or error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; under FSDP, too, all ranks come to `_save`, and nothing else is gathered."""
        folder = output_dir or str(self.args.output_dir)
        with as_without_fsdp(self), self._full_disk_noted(folder) if self._saving else disk_full_named(folder):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The parent's; under FSDP the files that one process would write, in place of all weights and shards."""
        if self._whole is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._whole is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_whole_state(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter as the family's LoRA file, or the network in diffusers layout. Never the frozen base.

        A checkpoint gets the weights as trained and the average beside them, any other folder the averaged weights.
        """
        if not (self.args.should_save or self._whole):
            return
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = folder.name.startswith("checkpoint-")
        with nullcontext() if is_checkpoint else self.averaged_weights():
            model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if self._whole is not None:
                model = self._whole.gather(model)
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self._save_weights(model, folder)
        if is_checkpoint and self._ema is not None:
            self._ema.save(folder)
        if not self.args.should_save:
            return
        if not is_checkpoint:
            self.exported = export_run(folder, self.args.export_formats, self.family, network_of(model))
        loader = self.callback_handler.train_dataloader
        place = Place.of(self.state, loader, self.args.gradient_accumulation_steps)
        write_json(folder / RUN_FACTS, run_facts.identity(self) | {"place": place})
        if self._eval_base and is_checkpoint:
            write_json(folder / EVAL_BASE, self._eval_base)

    def _save_weights(self, model: Any, folder: Path) -> None:
        if adapter_layers(model):
            save_adapter(model, folder, family=self.family)
        else:
            self.family.save_network(model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        network: Any = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        folder = Path(resume_from_checkpoint)
        if self._whole is None:
            self._load_weights(network, folder)
        else:
            whole = self._whole.gather(network)
            if self.is_world_process_zero():
                self._load_weights(whole, folder)
            self._whole.scatter(network)
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
        """Later, by `_save_checkpoint`, once the checkpoint is whole."""

    def _finish_current_push(self) -> None:
        run_facts.finish_push(self)

    def _measure_initial_weights(self) -> None:
        """Keeps the losses of the network before step 1."""
        raise NotImplementedError

    def _check_finite(self) -> None:
        """Stops the run where a loss was not finite since the last look."""
        raise NotImplementedError
