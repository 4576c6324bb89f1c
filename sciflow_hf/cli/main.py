"""`sciflow-hf`: caches of latents and text embeddings, images of trained networks, LoRA files, and the environment."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import SciflowError
from . import cache as cache_cli
from . import export as export_cli
from . import push as push_cli
from . import sample as sample_cli

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Exit status: 0; 1 where `cache verify` found problems; 2 for a user's mistake (one line on stderr); 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    first_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first_rank else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return args.run(args) or 0
    except SciflowError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sciflow-hf", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    cache_cli.add_commands(
        commands.add_parser("cache", help="caches of latents and text embeddings", allow_abbrev=False)
    )
    sample_cli.add_command(commands.add_parser("sample", help="draw images of classes or prompts", allow_abbrev=False))
    export_cli.add_command(
        commands.add_parser("export", help="an adapter as a file of another program", allow_abbrev=False)
    )
    push_cli.add_command(commands.add_parser("push", help="a finished run to the Hub", allow_abbrev=False))
    env = commands.add_parser("env", help="versions and devices, for bug reports", allow_abbrev=False)
    env.set_defaults(run=_env)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
