"""`sciflow-hf export`: an adapter as a LoRA file of diffusers, kohya's tools or ComfyUI."""

import argparse
import sys
from typing import Any

from ..adapters.formats.names import DTYPES, FORMATS
from ..errors import SciflowError
from .devices import named


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf export`, and its function as `run`."""
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("--adapter_path", required=True, help="file, folder of a run or checkpoint, Hub repository or fsspec URL")
    add("--format", required=True, choices=FORMATS, help="format of the new file")
    add("--output_file", required=True, help="the new file, ending in .safetensors")
    add("--family", help="model family, such as flux2_klein (default: as the run's facts or the layers' names say)")
    add("--dtype", choices=DTYPES, help="dtype of the stored weights (default: unchanged)")
    add("--overwrite", action="store_true", help="replace --output_file")
    add(
        "--pretrained_model_name_or_path",
        help="the network, for its configuration: where a UNet is not SDXL's, or for the DoRA of sd3",
    )
    add("--revision", help="branch, tag or commit of that network's Hub repository")


def _export(args: argparse.Namespace) -> None:
    from ..adapters.export import export_adapter

    options = named(args, "family dtype overwrite") | {"file_format": args.format, "network": _configuration(args)}
    done = export_adapter(args.adapter_path, args.output_file, **options)
    size = done.file.stat().st_size / 2**20
    sys.stdout.write(
        f"{done.file}: {done.adapter_type} of {done.layers} layers"
        f"{f' ({done.family})' if done.family else ''}, {size:.1f} MiB, for {done.readers}.\n"
    )


def _configuration(args: argparse.Namespace) -> dict[str, Any] | None:
    """The network's configuration, where `--pretrained_model_name_or_path` names it."""
    from ..families import load_family

    if args.pretrained_model_name_or_path is None:
        return None
    if args.family is None:
        raise SciflowError("`pretrained_model_name_or_path` needs `--family`, which says what kind of network it is.")
    family: Any = load_family(args.family)(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path, revision=args.revision
    )
    found: dict[str, Any] = family.config(family.component)
    return found
