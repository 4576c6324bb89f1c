"""Each engine is asked only where one of its options is given, and only once; without, none is entered or imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import sciflow_hf as sf
from sciflow_hf.engines import offload, optimizers, quantisation

ROOT = Path(sf.__file__).parent
ENGINES = {"offload": offload, "optimizers": optimizers, "quantisation": quantisation}


def entered(tmp_path, **options):
    """Files of the package whose functions run while arguments are made."""
    files = set()

    def note(frame, event, arg):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and frame.f_code.co_name not in ("<module>", "<genexpr>"):
            files.add(file.relative_to(ROOT).as_posix())

    sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)  # imports
    sys.settrace(note)
    try:
        sf.DiffusionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    finally:
        sys.settrace(None)
    return files


PLAIN = {"options.py", "training/arguments.py"}


@pytest.mark.promise("C27")
@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({}, None),
        ({"timestep_shift": "3.0", "weighting_scheme": "mode", "max_steps": 3, "activation_checkpointing": True}, None),
        ({"torch_compile": True}, None),
        ({"offload": True, "activation_checkpointing": True}, "offload"),
        ({"quantize_base": "nf4"}, "quantisation"),
        ({"optim": "prodigy"}, "optimizers"),
        ({"lora_plus_ratio": 16}, "optimizers"),
    ],
)
def test_only_engines_that_are_asked_for_are_entered(tmp_path, options, engine):
    assert entered(tmp_path, **options) == PLAIN | ({f"engines/{engine}.py"} if engine else set())


def test_the_check_of_several_options_runs_once(tmp_path, caplog):
    sf.DiffusionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, optim="schedule_free_adamw", lr_scheduler_type="cosine",
        lora_plus_ratio=16, text_encoder_learning_rate=1e-5,
    )  # fmt: skip
    assert caplog.text.count("is meant to go without") == 1


OPTIONAL = ("bitsandbytes", "torchao", "torch._dynamo", "pandas", "prodigyopt", "matplotlib", "wandb", "schedulefree")
IMPORTS = f"""
import sys, traceback
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in {OPTIONAL}:
            files = [frame.filename for frame in traceback.extract_stack()[:-1]]
            files = [file for file in files if "importlib" not in file and "<frozen" not in file]
            print(name, files[-1])
sys.meta_path.insert(0, Finder())
import sciflow_hf as sf
import importlib, pkgutil
for name in ("options", "training.trainer", "training.arguments", "families.flux2_klein", "adapters.adapter"):
    importlib.import_module("sciflow_hf." + name)
for module in pkgutil.iter_modules(importlib.import_module("sciflow_hf.engines").__path__):
    importlib.import_module("sciflow_hf.engines." + module.name)
"""


def test_no_module_of_a_plain_run_imports_optional_packages():
    """transformers and PEFT import some of them on their own account."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    found = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, file in found if Path(file).is_relative_to(ROOT)] == []
    assert "torch._dynamo" in dict(found), "the finder sees what is imported"
