"""The private parts of transformers.Trainer that we touch, in one place. Checked against transformers 5.23.

`tests/test_trainer_hooks.py` fails where one of them is renamed or changes its arguments.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate.optimizer
import torch
import transformers.trainer
from accelerate.utils import DistributedType
from transformers import Trainer

from . import run_facts
from .adapter_files import load_adapter_weights, save_adapter
from .adapters import adapter_layers
from .callbacks.ema import EMACallback
from .checkpoints import RUN_FACTS, rotate, write_json, write_manifest
from .data.loader import BucketLoader
from .data.stream_loader import StreamLoader
from .data.threads import release
from .export import Exported, export_run
from .families.base import ModelFamily, network_dtype
from .optimizers import OPTIMIZERS, optimizer_class, rates_of, split_groups
from .text_training import network_of

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
    exported: Sequence[Exported] = ()
    _stream: StreamLoader | None = None
    _stream_state: dict[str, Any] | None = None

    def _run_epoch(self, model: Any, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        with _position_exact_resume(), _optional_packages_looked_up_once(), _closed_after(train_dataloader):
            super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The parent's, of the averaged weights where there are any; no reader thread outlives it."""
        with _closed_after(dataloader), self.averaged_weights():
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        moved = super()._prepare_inputs({k: v for k, v in inputs.items() if k not in HOST_KEYS})
        return {**moved, **{k: inputs[k] for k in HOST_KEYS if k in inputs}}

    def _prepare_input(self, data: Any) -> Any:
        """The parent's, but the copy of page-locked memory is queued: its loader waits until it is done."""
        pinned = isinstance(data, torch.Tensor) and data.is_pinned()
        return super()._prepare_input(data.to(self.args.device, non_blocking=True) if pinned else data)

    # -- a step: walk over the trained parameters, not over every module of the network --------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        trained = self._trained = [p for p in model.parameters() if p.requires_grad]
        model.train()

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in trained:
                parameter.grad = None

        model.zero_grad = zero_grad  # on the instance; `train` removes it
        return model, loader

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The parent's, without walking all modules for `train()` when they are in that mode already.

        Gives the batch back to its loader, which empties it.
        """
        if not (model.training and self.model.training):
            model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free: back from the average
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch) / self.current_gradient_accumulation_steps
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
        release(inputs)  # here and not in the loader: a step holds all of its micro-batches
        return loss.detach()

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

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The parent's, but old checkpoints go only once the new one is whole: its manifest is written last."""
        self._check_finite()
        self._to_average()  # on every rank, so that all go on from the same bits
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # left over from a save that was killed
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self._stream is not None:
                (folder / STREAM).write_text(json.dumps(self._stream.state_dict()), encoding="utf-8")
            write_manifest(folder)
            rotate(run_dir, limit=limit, newest=folder, best=self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter as the family's LoRA file, or the network in diffusers layout. Never the frozen base.

        A checkpoint gets the weights as trained and the average beside them, any other folder the averaged weights.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        is_checkpoint = folder.name.startswith("checkpoint-")
        with nullcontext() if is_checkpoint else self.averaged_weights():
            self._save_weights(folder)
        if not is_checkpoint:
            network = network_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
            self.exported = export_run(folder, self.args.export_formats, self.family, network)
        if is_checkpoint and self._ema is not None:
            self._ema.save(folder)
        write_json(folder / RUN_FACTS, run_facts.identity(self))
        if self._eval_base and is_checkpoint:
            write_json(folder / EVAL_BASE, self._eval_base)

    def _save_weights(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if adapter_layers(model):
            save_adapter(model, folder, family=self.family)
        else:
            self.family.save_network(model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        network: Any = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        folder = Path(resume_from_checkpoint)
        if adapter_layers(network):
            load_adapter_weights(network, folder, family=self.family)
        else:
            saved = type(network).from_pretrained(folder / self.family.component, dtype=network_dtype(network))
            network.load_state_dict(saved.state_dict())
        if self._ema is not None:
            self._ema.load(folder, network)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        run_facts.push_checkpoint(self)

    def _finish_current_push(self) -> None:
        run_facts.finish_push(self)

    def _check_finite(self) -> None:
        """Stops the run where a loss was not finite since the last look."""
        raise NotImplementedError
