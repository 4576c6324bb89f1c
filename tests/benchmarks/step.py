"""What a training loop costs beside the network: `python -m tests.benchmarks.step`."""

import argparse
import gc
import itertools
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, ClassVar

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sciflow_hf.diffusion.randomness import noise_keys, randn
from sciflow_hf.families.base import ModelFamily
from sciflow_hf.families.flux2_klein import Flux2Klein
from sciflow_hf.training.arguments import DiffusionTrainingArguments
from sciflow_hf.training.trainer import DiffusionTrainer

from .klein import quiet, report_klein

WIDTH, BATCH_SIZE, LOGGING_STEPS, MAX_GRAD_NORM, LEARNING_RATE, WARMUP = 16, 2, 10, 1.0, 1e-4, 20
Loop = Callable[["Network", list[dict[str, torch.Tensor]]], None]
NETWORKS = {"small": (100, 48, 0.35), "klein-sized": (1282, 160, 1.0)}  # modules, trained tensors, goal in ms
LOOPS = ("bare torch loop", "DiffusionTrainer", "transformers.Trainer", "accelerate loop")
COLUMNS = {
    "step_ms": "step, by the clock", "over_ms": "over bare, by the clock",
    "over_cpu_ms": "over bare, processor time", "over_cpu_mean_ms": "the same, mean with logs",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "diffusers", "peft")


class LowRank(torch.nn.Module):
    """A frozen linear layer and a trained update of rank 2: four modules, two trained tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = torch.nn.Linear(WIDTH, 2, bias=False), torch.nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x) + self.up(self.down(x)))


class Network(torch.nn.Module):
    """`modules` modules of which `trained // 2` adapted layers compute; it notes when it is called.

    The rest are frozen layers that are never called: a walk over all modules costs what it costs in a large
    network, and the forward pass stays short beside what is measured.
    """

    def __init__(self, modules: int, trained: int) -> None:
        super().__init__()
        self.times: list[tuple[float, float]] = []  # by the clock, and of the processor, in seconds
        self.layers = torch.nn.ModuleList(LowRank() for _ in range(trained // 2))
        idle = modules - len(list(self.modules())) - 1
        self.idle = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(idle)).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times.append((time.perf_counter(), time.process_time()))
        for layer in self.layers:
            x = layer(x)
        return x


def sample_losses(network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The work that all loops share: loss of every sample, (B,)."""
    return mse_loss(network(batch["x"]), batch["target"], reduction="none").mean(dim=1)


def unused(*args: Any, **kwargs: Any) -> Any:
    """What this benchmark does not ask of a family."""
    raise NotImplementedError


class SmallFamily(ModelFamily):
    """The least that the trainer needs: a step."""

    name: ClassVar[str] = "small"
    from_scratch: ClassVar[bool] = True
    load_model = load_encoders = encode_images = encode_prompts = bucket_step = pipeline_class = unused
    load_pipeline = encode_validation_prompts = generate = clean_latents = predict = unused

    def compute_loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], args: Any, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sample_losses(model, batch), batch["level"]

    def encoder_settings(self) -> dict[str, Any]:
        return {"family": self.name}

    def check_sample(self, model: torch.nn.Module, sample: dict[str, torch.Tensor]) -> None:
        pass


# -- the four loops: each trains `network` for `len(samples) // BATCH_SIZE` steps ----------------------------


def stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def trained_parameters(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def adamw(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_parameters(network), lr=LEARNING_RATE, fused=True)


def bare(network: Network, samples: list[dict[str, torch.Tensor]]) -> None:
    """Batches stacked beforehand, no schedule, no log."""
    batches = [stack(samples[i : i + BATCH_SIZE]) for i in range(0, len(samples), BATCH_SIZE)]
    optimizer, trained = adamw(network), trained_parameters(network)
    network.train()
    for batch in batches:
        sample_losses(network, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def trainer_options(samples: list[dict[str, torch.Tensor]], folder: str) -> dict[str, Any]:
    return dict(
        output_dir=folder, use_cpu=True, max_steps=len(samples) // BATCH_SIZE, optim="adamw_torch_fused",
        per_device_train_batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM, weight_decay=0.01, logging_steps=LOGGING_STEPS, save_strategy="no",
        report_to="none", disable_tqdm=False, remove_unused_columns=False,
    )  # fmt: skip


def ours(network: Network, samples: list[dict[str, torch.Tensor]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionTrainingArguments(**trainer_options(samples, folder))
        family = SmallFamily(pretrained_model_name_or_path="none")
        DiffusionTrainer(network, args, family=family, train_dataset=samples).train()


class StockTrainer(transformers.Trainer):
    """transformers' own, told only what the loss is."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return sample_losses(model, inputs).mean()


def stock(network: Network, samples: list[dict[str, torch.Tensor]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(**trainer_options(samples, folder))
        StockTrainer(network, args, train_dataset=samples, data_collator=stack).train()


def accelerated(network: Network, samples: list[dict[str, torch.Tensor]]) -> None:
    """The loop of diffusers' training scripts."""
    accelerator, trained = Accelerator(cpu=True, gradient_accumulation_steps=1), trained_parameters(network)
    optimizer = adamw(network)
    loader = DataLoader(samples, batch_size=BATCH_SIZE, shuffle=True, collate_fn=stack)
    scheduler = get_scheduler("constant", optimizer=optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    progress = tqdm(total=len(loader), desc="Steps", disable=not accelerator.is_local_main_process)
    model.train()
    for step, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = sample_losses(model, batch).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            progress.update(1)
        logs = {"loss": loss.detach().item(), "lr": scheduler.get_last_lr()[0]}
        progress.set_postfix(**logs)
        accelerator.log(logs, step=step)
    accelerator.end_training()


# -- measuring the loops -------------------------------------------------------------------------------------


def time_loop(loop: Loop, modules: int, trained: int, steps: int) -> tuple[float, float, float]:
    """One run with fresh weights, ms a step: median by the clock, median and mean of the processor's time.

    The mean holds the steps that log; the median does not.
    """
    torch.manual_seed(0)
    network = Network(modules, trained)
    values = torch.randn(2, (steps + WARMUP) * BATCH_SIZE, WIDTH)
    samples = [{"x": x, "target": y, "level": torch.tensor(0.5)} for x, y in zip(*values, strict=True)]
    AcceleratorState._reset_state(reset_partial_state=True)  # each loop makes its own
    gc.collect()
    with quiet():
        loop(network, samples)
    pairs = itertools.pairwise(network.times[WARMUP:])
    wall, processor = zip(*((1e3 * (b[0] - a[0]), 1e3 * (b[1] - a[1])) for a, b in pairs), strict=True)
    return statistics.median(wall), statistics.median(processor), statistics.fmean(processor)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure_loops(modules: int, trained: int, *, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Every loop once a round, in an order that turns; the bare loop of the same round is taken off."""
    loops = dict(zip(LOOPS, (bare, ours, stock, accelerated), strict=True))
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in LOOPS}
    for number in range(rounds):
        start = number % len(LOOPS)
        for name in LOOPS[start:] + LOOPS[:start]:
            runs[name].append(time_loop(loops[name], modules, trained, steps))
    result: dict[str, dict[str, Any]] = {}
    for name in LOOPS:
        pairs = zip(runs[name], runs[LOOPS[0]], strict=True)
        rows = [(run[0], *(a - b for a, b in zip(run, base, strict=True))) for run, base in pairs]
        result[name] = {key: spread(values) for key, *values in zip(COLUMNS, *rows, strict=True)}
    return result


def measure_draw(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds for the keyed noise and the levels of two samples of 1024 px in klein."""
    family, shape = Flux2Klein(pretrained_model_name_or_path="none"), (2, 128, 64, 64)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = DiffusionTrainingArguments(output_dir=folder, use_cpu=True, report_to="none")
    keys = noise_keys(0, 0, range(2))
    draws = {
        "keyed noise": lambda: randn(keys, shape),
        "one torch.randn of that shape": lambda: torch.randn(shape),
        "levels": lambda: family.sample_levels(keys, args, 64 * 64),
    }
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(repeats):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: spread(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a loop in a round")
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the GPU; default: by name")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--tiny_klein", action="store_true", help=argparse.SUPPRESS)  # the CUDA part on a CPU
    options = parser.parse_args()

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    load = os.getloadavg()
    result: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "rounds": options.rounds, "steps": options.steps, "load_before": load, "networks": {},
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in result["versions"].items()))
    print(f"{options.rounds} alternating rounds of {options.steps} steps, one thread; load {load[0]:.1f} at the start")
    print("Milliseconds a step: median over the rounds (min to max)")
    for name, (modules, trained, goal) in NETWORKS.items():
        found = measure_loops(modules, trained, rounds=options.rounds, steps=options.steps)
        result["networks"][name] = found
        print(f"\n{name}: {modules} modules, {trained} trained tensors; goal: +{goal} over the bare loop, or less")
        print(f"  {'':<21}" + "".join(f"{title:>28}" for title in COLUMNS.values()))
        for loop, figures in found.items():
            cells = [f"{f['median']:.3f} ({f['min']:.3f} to {f['max']:.3f})" for f in figures.values()]
            print(f"  {loop:<21}" + "".join(f"{cell:>28}" for cell in cells))
    result["draw_ms"] = measure_draw(100)
    print("\nklein's draws for two samples of 1024 px, on the CPU: part of the family's step in any loop")
    for name, f in result["draw_ms"].items():
        print(f"  {name:<32}{f['median']:.3f} ({f['min']:.3f} to {f['max']:.3f})")
    if options.tiny_klein:
        result["klein"] = report_klein(options.peak_tflops, tiny=True)
    elif torch.cuda.is_available():
        result["klein"] = report_klein(options.peak_tflops)
    else:
        print("\nNo CUDA device: the step of klein 4B and 9B is not measured.")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result | {"load_after": os.getloadavg()}, file, indent=1)


if __name__ == "__main__":
    main()
