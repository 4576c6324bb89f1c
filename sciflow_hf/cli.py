"""`sciflow-hf`: build caches of latents and text embeddings, look at them, and report the environment."""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import SciflowError

if TYPE_CHECKING:
    from .data.cache import LatentCache

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
_DTYPES = ("bf16", "fp16", "fp32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        args.run(args)
    except SciflowError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sciflow-hf", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    cache = commands.add_parser("cache", help="caches of latents and text embeddings", allow_abbrev=False)
    actions = cache.add_subparsers(title="actions", required=True, metavar="ACTION")

    build = actions.add_parser(
        "build", help="encode captioned images; the same command goes on after a kill", allow_abbrev=False
    )
    add = build.add_argument
    add("--family", required=True, help="model family, such as flux2_klein, or a dotted path to a class")
    add("--pretrained_model_name_or_path", required=True, help="folder or Hub repository of the pipeline")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--input_dir", required=True, help="folder of captioned images, parquet files, or a data set")
    add("--output_dir", required=True, help="the cache")
    add("--resolution", type=int, default=1024, help="images become about N x N pixels (default 1024)")
    add("--caption_column", default="caption", help="metadata column with the captions (default caption)")
    add("--max_sequence_length", type=int, help="text tokens per prompt (default: the family's)")
    add("--batch_size", type=int, default=1, help="images encoded at once (default 1)")
    add("--dtype", choices=_DTYPES, default="bf16", help="of the stored arrays (default bf16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    add("--payload", choices=("npz",), default="npz", help="layout of the payloads")
    add("--strict", action="store_true", help="stop at an image that cannot be used instead of skipping it")
    build.set_defaults(run=_build)

    info = actions.add_parser("info", help="samples, buckets, bytes, encoder settings", allow_abbrev=False)
    info.add_argument("--dataset_dir", required=True, nargs="+", help="one or more caches")
    info.add_argument("--payload_dir", help="where `cache_path` is rooted (default: --dataset_dir)")
    info.set_defaults(run=_info)

    env = commands.add_parser("env", help="versions and devices, for bug reports", allow_abbrev=False)
    env.set_defaults(run=_env)
    return parser


def _build(args: argparse.Namespace) -> None:
    import torch

    from .families import load_family
    from .prepare import build_cache_for

    options: dict[str, Any] = {"revision": args.revision}
    if args.max_sequence_length is not None:
        options["max_sequence_length"] = args.max_sequence_length
    family = load_family(args.family)(pretrained_model_name_or_path=args.pretrained_model_name_or_path, **options)
    device = _device(args.device)
    report = build_cache_for(
        family,
        args.input_dir,
        args.output_dir,
        device=device,
        encoder_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        resolution=args.resolution,
        caption_column=args.caption_column,
        batch_size=args.batch_size,
        strict=args.strict,
        dtype=args.dtype,
    )
    if report.skipped:
        sys.stdout.write(f"{len(report.skipped)} images skipped:\n")
        sys.stdout.writelines(f"  {name}: {reason}\n" for name, reason in report.skipped)
    sys.stdout.write(f"{report.samples} samples in {report.output_dir}\n")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SciflowError(f"`device` is {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SciflowError(f"`device` is {name!r}, but no CUDA device is there. Use `--device cpu`.")
    return device


def _info(args: argparse.Namespace) -> None:
    from .data.cache import load_cache

    sys.stdout.write(describe_cache(load_cache(args.dataset_dir, payload_dir=args.payload_dir)) + "\n")


def describe_cache(cache: "LatentCache") -> str:
    """What `sciflow-hf cache info` says about a cache."""
    from .data.writing import readable_bytes

    size, missing = cache.payload_bytes()
    lines = [
        f"samples       {len(cache)}",
        f"groups        {len(set(cache.groups))}",
        f"payload       {readable_bytes(size)}" + (f", {missing} files missing" if missing else ""),
        f"text lengths  {_ranges(cache.text_lengths)}",
        f"fingerprint   {cache.fingerprint}",
        f"empty prompt  {'stored' if cache.empty_prompt else 'not stored (no caption dropout)'}",
    ]
    lines += ["", "bucket (height x width)  samples"]
    for (height, width), count in sorted(Counter(cache.buckets).items()):
        lines.append(f"{f'{height} x {width}':<23}  {count:>7}")
    lines += ["", "encoder settings"] if cache.metadata else ["", "encoder settings: unknown (no metadata)"]
    lines += [f"  {name}: {value}" for name, value in cache.metadata.items()]
    return "\n".join(lines)


def _ranges(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low} tokens" if low == high else f"{low} to {high} tokens ({len(set(lengths))} different)"


def _env(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from . import __version__

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
