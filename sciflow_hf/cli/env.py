"""`sciflow-hf env`: versions of the libraries, and the devices, for bug reports."""

import argparse
import sys

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "prodigyopt",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """No options; its function as `run`."""
    parser.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .. import __version__

    rows = [
        ("sciflow_hf", __version__),
        ("python", platform.python_version()),
        ("system", platform.platform()),
    ]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("cuda", torch.version.cuda or "none in this torch"))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    width = max(len(name) for name, _ in rows)
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in rows)
