"""What a training loop costs beside the network: `python -m tests.benchmarks.step`. See docs/performance.md."""

import argparse
import contextlib
import gc
import io
import itertools
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
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

from sciflow_hf.adapters import AdapterArguments, add_adapter
from sciflow_hf.diffusion.randomness import noise_keys, randn
from sciflow_hf.families.base import ModelFamily
from sciflow_hf.families.flux2_klein import Flux2Klein
from sciflow_hf.trainer import DiffusionTrainer
from sciflow_hf.training_args import DiffusionTrainingArguments

WIDTH, BATCH_SIZE, LOGGING_STEPS, MAX_GRAD_NORM, LEARNING_RATE, WARMUP = 16, 2, 10, 1.0, 1e-4, 20
NETWORKS = {"small": (100, 48, 0.35), "klein-sized": (1282, 160, 1.0)}  # modules, trained tensors, goal in ms
LOOPS = ("bare torch loop", "DiffusionTrainer", "transformers.Trainer", "accelerate loop")
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

    The rest are frozen layers that are never called: walking over modules costs what it costs in a large network,
    and the forward pass stays short beside what is measured.
    """

    def __init__(self, modules: int, trained: int) -> None:
        super().__init__()
        self.times: list[float] = []
        self.layers = torch.nn.ModuleList(LowRank() for _ in range(trained // 2))
        rest = modules - len(list(self.modules())) - 1
        self.rest = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(rest))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
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
    load_pipeline = encode_validation_prompts = generate = unused

    def compute_loss(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], args: Any, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sample_losses(model, batch), batch["level"]

    def encoder_settings(self) -> dict[str, Any]:
        return {"family": self.name}

    def check_sample(self, model: torch.nn.Module, sample: dict[str, torch.Tensor]) -> None:
        pass


# -- the four loops: each trains `network` for `len(samples) // BATCH_SIZE` steps -------------------------------------


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
        output_dir=folder, use_cpu=True, max_steps=len(samples) // BATCH_SIZE, per_device_train_batch_size=BATCH_SIZE,
        optim="adamw_torch_fused", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.01,
        max_grad_norm=MAX_GRAD_NORM, logging_steps=LOGGING_STEPS, save_strategy="no", report_to="none",
        disable_tqdm=False, remove_unused_columns=False,
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


# -- measuring the loops ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and logs are made, but go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def time_loop(loop: Callable[..., None], modules: int, trained: int, steps: int) -> tuple[float, float]:
    """Median and mean time of a step in ms, of one run with fresh weights; the mean holds the steps that log."""
    torch.manual_seed(0)
    network = Network(modules, trained)
    values = torch.randn(2, (steps + WARMUP) * BATCH_SIZE, WIDTH)
    samples = [{"x": x, "target": y, "level": torch.tensor(0.5)} for x, y in zip(*values, strict=True)]
    AcceleratorState._reset_state(reset_partial_state=True)  # each loop makes its own
    gc.collect()
    with quiet():
        loop(network, samples)
    times = network.times[WARMUP:]
    durations = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    return statistics.median(durations), statistics.fmean(durations)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure_loops(modules: int, trained: int, *, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Every loop once a round, in an order that turns by one each round; the bare loop of the same round taken off."""
    loops = dict(zip(LOOPS, (bare, ours, stock, accelerated), strict=True))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in LOOPS}
    for number in range(rounds):
        start = number % len(LOOPS)
        for name in LOOPS[start:] + LOOPS[:start]:
            runs[name].append(time_loop(loops[name], modules, trained, steps))
    medians = {name: [median for median, _ in values] for name, values in runs.items()}
    return {
        name: {
            "step_ms": spread(medians[name]),
            "over_bare_ms": spread([a - b for a, b in zip(medians[name], medians[LOOPS[0]], strict=True)]),
            "mean_over_bare_ms": spread([a[1] - b[1] for a, b in zip(runs[name], runs[LOOPS[0]], strict=True)]),
        }
        for name in LOOPS
    }


def measure_draw(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds for the keyed noise and levels of two samples of 1024 px in klein: the family's, in any loop."""
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


# -- with a CUDA device: klein's real shapes under our trainer -------------------------------------------------------

KLEIN = {
    "4B": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
    "9B": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
}
TINY = dict(
    num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=48, attention_head_dim=32,
    axes_dims_rope=(8, 8, 8, 8),
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "torch.compile": {"torch_compile": True},
    "both": {"activation_checkpointing": True, "torch_compile": True},
}
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}  # dense bf16, TFLOP/s


class BareKlein(Flux2Klein):
    """klein without files: latents count as normalised."""

    @property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return torch.zeros(1), torch.ones(1)

    def _statistics_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, device=device), torch.ones(1, device=device)


class StepTimes(transformers.TrainerCallback):
    """When each optimizer step was done, on the device too."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def make_klein(config: dict[str, Any], device: str) -> torch.nn.Module:
    """The network with random bfloat16 weights, and our LoRA of rank 16 on the `full` preset."""
    from diffusers import Flux2Transformer2DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Flux2Transformer2DModel(**({"mlp_ratio": 3.0, "guidance_embeds": False} | config))
            return add_adapter(model, AdapterArguments(rank=16), family=BareKlein("none"))
    finally:
        torch.set_default_dtype(default)


def count_flops(config: dict[str, Any], pixels: int, tokens: int, *, checkpointing: bool) -> int:
    """Matrix products of one step, forward and backward, counted on tensors that have a shape and no values."""
    from torch.utils.flop_counter import FlopCounterMode

    model, side = make_klein(config, "meta").train(), pixels // 8
    if checkpointing:
        model.enable_gradient_checkpointing()
    batch = {
        "latents": torch.empty(1, 32, side, side, device="meta"),
        "prompt_embeds": torch.empty(1, tokens, config["joint_attention_dim"], device="meta"),
    }
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        args = DiffusionTrainingArguments(output_dir=folder, use_cpu=True, report_to="none")
        noise = torch.empty(1, 128, side // 2, side // 2, device="meta")
        loss, _ = BareKlein("none").compute_loss(model, batch, args, noise=noise, levels=torch.tensor([0.5]))
        loss.mean().backward()
    return counter.get_total_flops()


def measure_klein(
    config: dict[str, Any], options: dict[str, Any], *, device: str, pixels: int = 1024, tokens: int = 512, steps: int = 8
) -> dict[str, float]:
    """Median step in ms and peak memory in GB of our trainer on one sample a step, after three steps of warm-up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    model = make_klein(config, device)
    latents, embeds = torch.randn(32, pixels // 8, pixels // 8), torch.randn(tokens, config["joint_attention_dim"])
    samples, times = [{"latents": latents, "prompt_embeds": embeds.bfloat16()}] * (steps + 3), StepTimes()
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = DiffusionTrainingArguments(
            output_dir=folder, use_cpu=device == "cpu", bf16=True, max_steps=steps + 3, save_strategy="no",
            report_to="none", **options,
        )  # fmt: skip
        trainer = DiffusionTrainer(
            model, args, family=BareKlein("none"), train_dataset=samples, callbacks=[times]
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    durations = [after - before for before, after in itertools.pairwise(times.times[2:])]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else math.nan
    return {"step_ms": 1e3 * statistics.median(durations), "peak_memory_gb": peak}


def report_klein(peak_tflops: float | None, *, device: str = "cuda", tiny: bool = False) -> list[dict[str, Any]]:
    """Prints and returns a row per network and variant. `tiny`: the same path on small shapes, to try it anywhere."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    peak = peak_tflops or next((value for key, value in PEAKS.items() if key in name), 989.0)
    pixels, tokens = (64, 8) if tiny else (1024, 512)
    print(f"\nklein on {name}, {pixels} px, {tokens} text tokens, batch 1, LoRA of rank 16; peak {peak:g} TFLOP/s (bf16)")
    rows = []
    for size, config in {"tiny": TINY}.items() if tiny else KLEIN.items():
        model = make_klein(config, "meta")
        parameters = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        useful = count_flops(config, pixels, tokens, checkpointing=False)
        executed = count_flops(config, pixels, tokens, checkpointing=True)
        print(
            f"{size}: {parameters / 1e9:.2f} B parameters, {len(list(model.modules()))} modules with the adapter, "
            f"{useful / 1e12:.4g} TFLOP a step, {executed / 1e12:.4g} with activation checkpointing"
        )
        for variant, options in VARIANTS.items():
            gc.collect()
            torch.cuda.empty_cache()
            row: dict[str, Any] = {"network": size, "variant": variant, "parameters": parameters, "flop": useful}
            try:
                row |= measure_klein(config, options, device=device, pixels=pixels, tokens=tokens)
            except torch.OutOfMemoryError:
                print(f"  {variant:<26}does not fit")
                rows.append(row | {"step_ms": None})
                continue
            row["share_of_peak"] = useful / (row["step_ms"] * 1e-3) / (peak * 1e12)
            print(
                f"  {variant:<26}{row['step_ms']:9.1f} ms a step{100 * row['share_of_peak']:7.1f} % of peak (useful FLOP)"
                f"{row['peak_memory_gb']:8.1f} GB"
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a loop in a round")
    parser.add_argument("--peak_tflops", type=float, help="dense bf16 peak of the device; default: by its name")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--tiny_klein", action="store_true", help=argparse.SUPPRESS)  # the CUDA part on a CPU
    options = parser.parse_args()

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "rounds": options.rounds, "steps": options.steps, "load_before": os.getloadavg(), "networks": {},
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in result["versions"].items()))
    print(f"{options.rounds} alternating rounds of {options.steps} steps, one thread; milliseconds, median (min to max)")
    for name, (modules, trained, goal) in NETWORKS.items():
        found = result["networks"][name] = measure_loops(modules, trained, rounds=options.rounds, steps=options.steps)
        print(f"\n{name}: {modules} modules, {trained} trained tensors; goal: at most +{goal} over the bare loop")
        print(f"  {'':<22}{'step':>24}{'over the bare loop':>28}{'and with the steps that log':>32}")
        for loop, figures in found.items():
            cells = [f"{f['median']:+.3f} ({f['min']:+.3f} to {f['max']:+.3f})" for f in figures.values()]
            print(f"  {loop:<22}{cells[0].replace('+', ''):>24}{cells[1]:>28}{cells[2]:>32}")
    result["draw_ms"] = measure_draw(100)
    print("\nklein's draws for two samples of 1024 px, on the CPU; part of the family's step, whatever the loop")
    for name, f in result["draw_ms"].items():
        print(f"  {name:<32}{f['median']:.3f} ({f['min']:.3f} to {f['max']:.3f})")
    if options.tiny_klein:
        result["klein"] = report_klein(options.peak_tflops, device="cpu", tiny=True)
    elif torch.cuda.is_available():
        result["klein"] = report_klein(options.peak_tflops)
    else:
        print("\nNo CUDA device: the step of klein 4B and 9B is not measured.")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result | {"load_after": os.getloadavg()}, file, indent=1)


if __name__ == "__main__":
    main()
