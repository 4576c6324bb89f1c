"""klein's real shapes under our trainer: step time, share of the device's peak, memory. Part of `step.py`."""

import contextlib
import gc
import io
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState

from sciflow_hf.adapters.adapter import add_adapter
from sciflow_hf.adapters.arguments import AdapterArguments
from sciflow_hf.families.flux2_klein import Flux2Klein
from sciflow_hf.training.arguments import DiffusionTrainingArguments
from sciflow_hf.training.trainer import DiffusionTrainer

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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and logs are made, but go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


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
    """Matrix products of one step, forward and backward, counted on tensors without values."""
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
    config: dict[str, Any],
    options: dict[str, Any],
    *,
    device: str,
    pixels: int,
    tokens: int,
    steps: int = 8,
) -> dict[str, float]:
    """Our trainer on one sample a step: median in ms after three steps of warm-up, and peak memory in GB."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    model = make_klein(config, device)
    latents = torch.randn(32, pixels // 8, pixels // 8)
    prompt_embeds = torch.randn(tokens, config["joint_attention_dim"], dtype=torch.bfloat16)
    samples, times = [{"latents": latents, "prompt_embeds": prompt_embeds}] * (steps + 3), StepTimes()
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = DiffusionTrainingArguments(
            output_dir=folder, use_cpu=device == "cpu", bf16=True, max_steps=steps + 3, save_strategy="no",
            report_to="none", **options,
        )  # fmt: skip
        trainer = DiffusionTrainer(model, args, family=BareKlein("none"), train_dataset=samples, callbacks=[times])
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    durations = [after - before for before, after in itertools.pairwise(times.times[2:])]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {"step_ms": 1e3 * statistics.median(durations), "peak_memory_gb": peak}


def report_klein(peak_tflops: float | None, *, tiny: bool = False) -> list[dict[str, Any]]:
    """Prints and returns a row per network and variant. `tiny`: small shapes on the CPU, to try the path."""
    device = "cpu" if tiny else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    peak = peak_tflops or next((value for key, value in PEAKS.items() if key in name), 989.0)
    pixels, tokens = (64, 8) if tiny else (1024, 512)
    print(f"\nklein on {name}, one sample of {pixels} px and {tokens} text tokens, LoRA of rank 16")
    print(f"Share of {peak:g} TFLOP/s, dense bfloat16, by the FLOP of a step without activation checkpointing")
    rows = []
    for size, config in {"tiny": TINY}.items() if tiny else KLEIN.items():
        model = make_klein(config, "meta")
        parameters = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        useful = count_flops(config, pixels, tokens, checkpointing=False)
        executed = count_flops(config, pixels, tokens, checkpointing=True)
        print(
            f"{size}: {parameters:,} parameters, {len(list(model.modules()))} modules with the adapter, "
            f"{useful / 1e12:.4g} TFLOP a step, {executed / 1e12:.4g} with activation checkpointing"
        )
        for variant, options in VARIANTS.items():
            gc.collect()
            torch.cuda.empty_cache()
            row: dict[str, Any] = {"network": size, "variant": variant, "parameters": parameters}
            try:
                row |= measure_klein(config, options, device=device, pixels=pixels, tokens=tokens)
            except torch.OutOfMemoryError:
                print(f"  {variant:<26}does not fit")
                rows.append(row | {"step_ms": None})
                continue
            row["share"] = useful / (row["step_ms"] * 1e-3) / (peak * 1e12)
            print(
                f"  {variant:<26}{row['step_ms']:9.1f} ms a step{100 * row['share']:7.1f} % of the peak"
                f"{row['peak_memory_gb']:8.1f} GB"
            )
            rows.append(row)
    return rows
