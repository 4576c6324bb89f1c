"""How far one has to read: files and functions of the package that a batch, an adapter and an option enter.

    python -m tests.benchmarks.ways [--files]

On the smallest klein, in a temporary folder. A function counts once, by its file and qualified name; generated code,
the bodies of modules and classes, lambdas and comprehensions do not count.
"""

import argparse
import importlib
import inspect
import pkgutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import sciflow_hf as sf
from sciflow_hf import demo
from sciflow_hf.adapters.export import export_adapter
from sciflow_hf.cli import main as sciflow_hf

PACKAGE = Path(sf.__file__).parent


class Way:
    """Collects the functions of the package that are entered while `walk` runs, in any thread."""

    def __init__(self, name: str) -> None:
        self.name, self.entered = name, set[tuple[str, str]]()

    def walk(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        threading.settrace(self._note)
        sys.settrace(self._note)
        try:
            return function(*args, **options)
        finally:
            sys.settrace(None)
            threading.settrace(None)

    def _note(self, frame: FrameType, event: str, arg: Any) -> None:
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE) and code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<"):
            self.entered.add((file.relative_to(PACKAGE).as_posix(), code.co_qualname))

    def print(self, *, with_files: bool) -> None:
        files = sorted({file for file, _ in self.entered})
        print(f"{self.name:8} {len(files):3} files, {len(self.entered):3} functions")
        if with_files:
            print(*(f"         {file}" for file in files), sep="\n")


def ways(folder: Path) -> list[Way]:
    """From a cache to gradients; from `add_adapter` to a kohya file; from a flag to the sigmas."""
    batch, adapter, option = Way("batch"), Way("adapter"), Way("option")
    klein = str(demo.make_tiny(folder / "klein", size="test"))
    figures, cache = demo.make_figures(folder / "figures", num_figures=4, pixels_per_unit=0.3), folder / "cache"
    model_flags = ["--pretrained_model_name_or_path", klein, "--max_sequence_length", "16"]
    sciflow_hf(["cache", "build", "--family", "flux2_klein", *model_flags, "--resolution", "64",
                "--input_dir", str(figures), "--output_dir", str(cache)])  # fmt: skip
    parts = (sf.Flux2Klein, sf.DataArguments, sf.AdapterArguments, sf.DiffusionTrainingArguments)
    flags = [*model_flags, "--dataset_dir", str(cache), "--output_dir", str(folder / "run"), "--use_cpu", "True",
             "--max_steps", "1", "--report_to", "none", "--dataloader_threads", "0"]  # fmt: skip
    family, _, adapter_args, args = sf.parse_args(*parts, argv=flags)
    model = family.load_model(dtype=torch.float32)

    data = batch.walk(sf.load_cache, str(cache), dtype=torch.float32)
    model = adapter.walk(sf.add_adapter, model, adapter_args, family=family)
    trainer = sf.DiffusionTrainer(model, args, family=family, train_dataset=data)

    def gradients() -> None:
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(trainer.model.train(), inputs).backward()

    def sigmas() -> torch.Tensor:
        args = sf.parse_args(*parts, argv=[*flags, "--timestep_shift", "3.0"])[-1]
        return family.sample_levels(torch.arange(2), args, image_seq_len=24)

    batch.walk(gradients)
    adapter.walk(trainer.save_model, str(folder / "lora"))
    adapter.walk(export_adapter, str(folder / "lora"), folder / "kohya.safetensors", file_format="kohya")
    option.walk(sigmas)
    return [batch, adapter, option]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="Name the files, too.")
    with_files = parser.parse_args().files
    for module in pkgutil.walk_packages(sf.__path__, "sciflow_hf."):  # what runs at import is not on the way
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory() as folder:
        for way in ways(Path(folder)):
            way.print(with_files=with_files)


if __name__ == "__main__":
    main()
