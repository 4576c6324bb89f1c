"""Out of memory: a micro-batch that does not fit is taken in parts, and the gradient stays what it would have been."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import find_batch_size, release_memory
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..data.batches.threads import release
from ..errors import SciflowError, counted, first_line

logger = logging.getLogger(__name__)

LADDER = """To make a run smaller, try in this order (docs/memory.md lists the costs, and
--auto_memory chooses among 2, 3 and 5):
  1. --bf16: the frozen network in 2 bytes a weight
  2. --activation_checkpointing: the activations of one block at a time
  3. --per_device_train_batch_size 1, and as many more --gradient_accumulation_steps: the same samples a step
  4. --optim adamw_bnb_8bit in full fine-tuning; a lower --rank for an adapter
  5. --quantize_base nf4: the frozen network in half a byte a weight; or --offload: in host memory
  6. smaller images: `sciflow-hf cache build` with a smaller --resolution
  7. more GPUs, over which FSDP2 spreads the network (docs/scale.md)"""

HOST_LADDER = """To make it smaller:
  1. --dataloader_num_workers 0 (the default): threads read instead of processes, without /dev/shm
  2. --dataloader_threads 1, and fewer --gradient_accumulation_steps: fewer batches are held ready
  3. a cache of shards (`sciflow-hf cache convert --payload shards`): its index is the smallest
  4. without --offload; or more memory for the job: `--mem` of Slurm, `--shm-size` of docker for /dev/shm"""

_BUCKET = 25 * 2**20  # bytes reduced at once, as in DistributedDataParallel


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or torch's allocator on the host, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


def memory_message(error: BaseException) -> str | None:
    """The message for an error that means too little memory; None for any other error."""
    text = str(error).strip() or repr(error)
    shared = isinstance(error, RuntimeError) and ("shared memory" in text or "DataLoader worker" in text)
    beside = is_out_of_memory(error) and "DefaultCPUAllocator" in text and torch.accelerator.is_available()
    if isinstance(error, MemoryError) or shared or beside:
        return f"{'/dev/shm or the' if shared else 'the'} memory of the host is used up ({text}). {HOST_LADDER}"
    return f"out of memory ({first_line(error)}). {LADDER}" if is_out_of_memory(error) else None


class MicroBatches:
    """Runs the micro-batches of optimizer steps; one that does not fit into memory is taken in parts.

    The loss of a part is weighted by its share of the samples, and noise and levels come from the keys of the samples:
    their gradients add up to that of the micro-batch, in another order of addition. After an out-of-memory error the
    gradients of the step are dropped, and its micro-batches run again in parts of at most half the size; this size
    is kept for the rest of the run. Nothing is copied for the case of an error: the batches of a step are kept, on
    the host, until its last one is done.

    Under DistributedDataParallel a rank runs on its own (`no_sync`), however often it has to repeat, and the ranks
    meet once in a step, to take the mean of the gradients.

    Args:
        trainer: a `DiffusionTrainer`: gives the loss (`compute_loss`), and has `_trained`, `_losses` and `accelerator`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.largest: int | None = None  # samples of one pass
        self._step: list[Mapping[str, Any]] = []  # the batches of this optimizer step so far

    def run(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Forward and backward of a micro-batch: its loss, divided by the accumulation.

        Raises:
            SciflowError: a single sample does not fit; any out-of-memory error under FSDP or DeepSpeed.
        """
        trainer = self.trainer
        if not self._step:
            self._noted = trainer._losses.notes
        self._step.append(inputs)
        loss = self._pass(model, [inputs])
        while loss is None:
            release_memory()
            for parameter in trainer._trained:
                parameter.grad = None
            trainer._losses.notes = self._noted
            loss = self._pass(model, self._step)
        if trainer.accelerator.sync_gradients:
            if _is_replicated(model):
                average_gradients(trainer._trained)
            for batch in self._step:
                release(batch)  # here and not in the loader: a step holds all of its micro-batches
            self._step = []
        return loss

    def _pass(self, model: torch.nn.Module, batches: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        """The loss of the last of the batches; None where memory ran out, after the smaller size is set."""
        for batch in batches:
            size = _size(batch)
            largest, loss = min(self.largest or size, size), None
            try:
                for part in _parts(batch, size, largest):
                    part_loss = self._backward(model, part, _size(part) / size)
                    loss = part_loss if loss is None else loss + part_loss
            except RuntimeError as error:  # to be left before the next try: its traceback holds what the pass made
                if not is_out_of_memory(error):
                    raise
                self._halve(largest, error)
                return None
        return loss

    def _backward(self, model: Any, part: Mapping[str, Any], share: float) -> torch.Tensor:
        trainer = self.trainer
        inputs = trainer._prepare_inputs(part)
        with model.no_sync() if _is_replicated(model) else nullcontext():
            with trainer.compute_loss_context_manager():
                mean, found = trainer.compute_loss(model, inputs, return_outputs=True)
                loss = mean / (trainer.current_gradient_accumulation_steps / share)
            step, numbers = trainer.state.global_step + 1, found.get("numbers")
            trainer._losses.note(found["loss"], found["levels"], inputs.get("row"), step, numbers)
            # DeepSpeed would divide by the accumulation once more
            trainer.accelerator.backward(loss, **({"scale_wrt_gas": False} if trainer.is_deepspeed_enabled else {}))
        return loss.detach()

    def _halve(self, largest: int, error: RuntimeError) -> None:
        trainer, first = self.trainer, self.largest is None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            engine = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
            raise SciflowError(
                f"`per_device_train_batch_size` {trainer.args.per_device_train_batch_size} does not fit into memory, "
                f"and under {engine} a step cannot be repeated on one rank ({first_line(error)}). {LADDER}"
            ) from error
        if largest == 1:
            raise SciflowError(f"one sample does not fit into memory ({first_line(error)}). {LADDER}") from error
        self.largest = -(-largest // 2)
        logger.warning(
            "Out of memory at step %d with %s at once (%s). The step is repeated and the run continues with at "
            "most %d; losses and gradients stay the same.%s",
            trainer.state.global_step + 1,
            counted(largest, "sample"),
            first_line(error),
            self.largest,
            f" {LADDER}" if first else "",
        )


def _is_replicated(model: Any) -> bool:
    return isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel)  # compiled or not


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Mean over ranks of the gradients, in place; one that is missing on a rank counts as zero there. All ranks."""
    for group in _buckets(parameters):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        means = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, mean in zip(group, gradients, means, strict=True):
            parameter.grad = gradient.copy_(mean.view_as(gradient))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.nbytes > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def _size(batch: Mapping[str, Any]) -> int:
    keys = batch.get("noise_key")
    return len(keys) if keys is not None else int(find_batch_size(batch))


def _parts(batch: Mapping[str, Any], size: int, largest: int) -> Iterator[Mapping[str, Any]]:
    if size == largest:
        yield batch
        return
    for start in range(0, size, largest):
        yield _rows(batch, slice(start, start + largest), size)


def _rows(value: Any, rows: slice, size: int) -> Any:
    """The given rows of tensors and lists with an entry for each sample; anything else is shared by all samples."""
    if isinstance(value, Mapping):
        return {name: _rows(entry, rows, size) for name, entry in value.items()}
    has_rows = (isinstance(value, torch.Tensor) and value.ndim > 0) or isinstance(value, list | tuple)
    return value[rows] if has_rows and len(value) == size else value
