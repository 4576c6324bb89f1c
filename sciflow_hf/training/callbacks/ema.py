"""Exponential moving average of the trained weights: kept in float32, used wherever weights are looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...engines.sharding import gathered_like, local, local_like
from ...errors import SciflowError

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

EMA_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps `average = decay * average + (1 - decay) * weights` of what is trained, after optimizer steps.

    The decay of update n = 1, 2, ... is min(decay, (1 + n) / (10 + n)) with warm-up: the default of diffusers'
    `EMAModel`, which does the arithmetic, and of TensorFlow's `ExponentialMovingAverage`. An average over the last
    n / 9 updates or so, until `decay` is reached: 0.999 at n = 8,990, 0.9999 at n = 89,990. (Karras et al. 2022
    and 2024 ramp up by the half-life in images seen: the same idea, another formula.)

    `DiffusionTrainer` evaluates, draws validation images and saves what users load with the average instead of the
    weights (`DiffusionTrainer.averaged_weights`). Checkpoints hold the weights as trained, and the average next to
    them as `ema.safetensors`: parameter name -> float32, with the number of updates in its metadata. Ranks compute
    the same average, each its own, or under FSDP each that of its shards. An update needs as much memory again for a
    moment.

    Args:
        decay: from 0 (the newest weights) to below 1. `--ema_decay` of the trainer.
        warmup: start with a smaller decay; otherwise `decay` holds from the first update. `--ema_warmup`.
        update_every: optimizer steps between updates. `--ema_update_every`.
        device: where the average lies between updates, which move the weights there; None: where they are.
            `--ema_device`.

    Raises:
        SciflowError: a value outside its range; weights that DeepSpeed spreads over ranks; a schedule-free optimizer;
            a checkpoint without its average.
    """

    def __init__(
        self, decay: float = 0.9999, warmup: bool = True, update_every: int = 1, device: str | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise SciflowError(f"`ema_decay` {decay}: from 0 to below 1, usually 0.99 to 0.9999, or leave it out.")
        if update_every < 1:
            raise SciflowError(f"`ema_update_every` {update_every}: optimizer steps, at least 1.")
        self.decay, self.warmup, self.update_every, self.device = decay, warmup, update_every, device
        self._trained: dict[str, torch.nn.Parameter] = {}
        self._average: EMAModel | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises SciflowError under DeepSpeed and with a schedule-free optimizer."""
        if PartialState().distributed_type == DistributedType.DEEPSPEED:
            raise SciflowError(
                f"`ema_decay` {self.decay} cannot work with DeepSpeed, which spreads the weights over the ranks in a "
                "way of its own: leave it out, or use FSDP2."
            )
        optim = str(getattr(args.optim, "value", args.optim))
        if optim.startswith("schedule_free"):
            raise SciflowError(
                f"`ema_decay` {self.decay} cannot work with `--optim {optim}`, which averages the weights itself: "
                "leave one of the two out."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new run starts at the weights as they are; a resumed one has been given its average by `load`."""
        if state.global_step == 0 or self._average is None:
            self._average = self._start(kwargs["model"])
        self._average.to(device=self.device or self._values[0].device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the average towards the weights, every `update_every` optimizer steps."""
        if self._average is not None and state.global_step % self.update_every == 0:
            self._average.step([value.to(self.device or value.device) for value in self._values])

    @property
    def _values(self) -> list[torch.Tensor]:
        return [local(p) for p in self._trained.values()]

    def _start(self, model: torch.nn.Module) -> "EMAModel":
        """An average that equals the trained weights of `model`, after 0 updates."""
        from diffusers.training_utils import EMAModel

        network = extract_model_from_parallel(model, keep_torch_compile=False)
        self._trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        average = EMAModel(
            self._values,
            decay=self.decay,
            min_decay=0.0 if self.warmup else self.decay,
            update_after_step=-1,  # EMAModel counts from 0 and would throw the start away at the first update
            foreach=True,
        )
        average.to(dtype=torch.float32)
        return average

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The network has the average for weights; afterwards, also after an error, its own again, bit for bit.

        Before training there is no average, and inside another `swapped` nothing is left to do.
        """
        average = self._average
        if average is None or average.temp_stored_params is not None:
            yield
            return
        average.store(self._values)
        try:
            average.copy_to(self._values)
            yield
        finally:
            average.restore(self._values)

    def save(self, folder: str | Path) -> None:
        """Writes `ema.safetensors` into a checkpoint, where training has begun. Under FSDP for all ranks at once."""
        if self._average is None:
            return
        average = zip(self._trained.items(), self._average.shadow_params, strict=True)
        tensors = {name: gathered_like(values, p) for (name, p), values in average}
        if PartialState().is_main_process:
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            save_file(tensors, Path(folder) / EMA_NAME, metadata={"updates": str(self._average.optimization_step)})

    def load(self, folder: str | Path, model: torch.nn.Module) -> None:
        """Takes the average of the trained weights of `model` from a checkpoint."""
        path, average = Path(folder) / EMA_NAME, self._start(model)
        if not path.is_file():
            raise SciflowError(
                f"`ema_decay` {self.decay}, but {path} is missing: the checkpoint was saved without an average. Resume "
                f"from one that has {EMA_NAME}, leave out `--ema_decay`, or start a new run from these weights."
            )
        with safe_open(path, framework="pt") as file:
            updates, saved = int(file.metadata()["updates"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wrong = {n for n, p in self._trained.items() if n not in saved or saved[n].shape != p.shape}
        wrong |= saved.keys() - self._trained.keys()
        if wrong:
            raise SciflowError(
                f"{path} does not fit what is trained: {len(wrong)} names or shapes differ, such as {min(wrong)}. "
                "Resume with the adapter options of that run."
            )
        average.shadow_params = [local_like(saved[name], p) for name, p in self._trained.items()]
        average.optimization_step = updates
        self._average = average
