"""`sciflow-hf cache`: build, convert, info, verify."""

import argparse
import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.batches.sizes import BUCKETS, FITS, MAX_ASPECT_RATIO
from ..data.build.sources.edits import EDIT_MASKS
from ..data.layouts import CODECS, EMBEDS, PAYLOADS
from ..errors import SciflowError, counted
from .devices import add_parts, find_device, inference_dtype, named, named_parts, processes

if TYPE_CHECKING:
    from ..data.build.build import BuildReport
    from ..data.build.convert import ConvertReport
    from ..data.cache import LatentCache
    from ..data.inspect.recheck import Difference
    from ..data.inspect.verify import VerifyReport
    from ..families.base import ModelFamily

_DTYPES = ("bf16", "fp16", "fp32")
_CHART = "bucket_chart.png"
_SHOWN = 20  # problems; the JSON has all


def add_options(cache: argparse.ArgumentParser) -> None:
    """Adds the actions of `sciflow-hf cache`, each with its function as `run`."""
    actions = cache.add_subparsers(title="actions", required=True, metavar="ACTION")

    def action(name: str, run: Any, help: str) -> Any:
        parser = actions.add_parser(name, help=help, description=help, allow_abbrev=False)
        parser.set_defaults(run=run)
        return parser.add_argument

    add = action("build", _build, "encode captioned images; the same command continues after a kill")
    add("--family", required=True, help="model family, such as flux2_klein, or a dotted path to a class")
    add("--pretrained_model_name_or_path", help="folder or Hub repository of the pipeline")
    add_parts(add)
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--input_dir", required=True, help="folder of captioned images, parquet files, or a data set")
    add("--output_dir", required=True, help="the cache")
    add(
        "--resolution", type=int, default=1024, help="images become about N x N pixels, small ones fewer (default 1024)"
    )
    add(
        "--buckets",
        choices=BUCKETS,
        default=BUCKETS[0],
        help="equal_tokens: sizes of one number of tokens; given: columns bucket_w and bucket_h of each row",
    )
    add(
        "--max_aspect_ratio",
        type=float,
        default=MAX_ASPECT_RATIO,
        help=f"longest side over shortest, at most 4 (default {MAX_ASPECT_RATIO:g})",
    )
    add("--fit", choices=FITS, default=FITS[0], help="pad: complete images, with the page's colour around them")
    add("--enlarge", action="store_true", help="bring small images to about N x N pixels as well")
    add("--caption_column", default="caption", help="metadata column with the captions (default caption)")
    add("--image_column", default="image", help="dit: column with the images (default image)")
    add("--label_column", default="label", help="dit: column with the classes (default label)")
    add("--split", help="split of the input: a name, several as in train+validation, or all (default train)")
    _add_filter(add)
    _add_sources(add)
    add("--edit_masks", choices=EDIT_MASKS, default="given", help="computed: changed regions from source and target")
    add("--max_sequence_length", type=int, help="text tokens per prompt (default: the family's)")
    add("--no_use_t5", dest="use_t5", action="store_const", const=False, help="sd3: without its third text encoder")
    add("--trust_remote_code", action="store_true", default=None, help="run the code of the model folder")
    add("--posterior", choices=("mode", "sample"), help="sample: also store the VAE's standard deviation")
    add("--batch_size", type=int, default=1, help="images encoded at once (default 1)")
    add("--text_batch_size", type=int, default=8, help="prompts encoded at once (default 8)")
    add("--dtype", choices=_DTYPES, default="bf16", help="dtype of the stored arrays (default bf16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    _add_layout(add)
    add("--latents", choices=("stored", "none"), default="stored", help="none: encode images in training")
    add("--crops", type=int, default=0, help="windows of each image in addition to the complete one (default 0)")
    add("--flip", action="store_true", help="add mirror images (which also mirror the text in them)")
    add(
        "--strict",
        action="store_true",
        help="stop at unusable input (such as a broken image) instead of skipping it",
    )

    add = action("convert", _convert, "write a cache in another layout; the same command continues after a kill")
    add("--input_dir", required=True, nargs="+", help="one or more caches")
    add("--payload_dir", help="where their `cache_path` is rooted (default: --input_dir)")
    add("--output_dir", required=True, help="the new cache")
    _add_filter(add)
    _add_layout(add)
    add("--shard_size_mb", type=int, default=1024, help="MiB of one shard or inline file (default 1024)")

    add = action("info", _info, "samples, buckets, bytes and encoder settings as tables, and a chart of the buckets")
    add("--dataset_dir", required=True, nargs="+", help="one or more caches")
    add("--payload_dir", help="where `cache_path` is rooted (default: --dataset_dir)")
    add("--chart", help=f"PNG of samples per bucket (default: {_CHART} in the cache, where that can be written)")

    add = action("verify", _verify, "check every stored array; exit status 1 if anything is wrong")
    add("--dataset_dir", required=True, nargs="+", help="one or more caches")
    add("--payload_dir", help="where `cache_path` is rooted (default: --dataset_dir)")
    add("--threads", type=int, default=2, help="rows checked at the same time (default 2)")
    add("--json", help="file for the complete report")
    add("--repair", action="store_true", help="write an index without the bad rows to DATASET_DIR-repaired")
    add("--sample", type=int, default=0, help="encode N samples afresh and compare")
    add("--input_dir", help="with --sample: the input of the cache")
    add("--caption_column", default="caption", help="with --sample: as in `cache build` (default caption)")
    add("--split", help="with --sample: as in `cache build` (default train)")
    _add_sources(add)
    add("--family", help="with --sample (default: as the cache notes)")
    add("--pretrained_model_name_or_path", help="with --sample (default: as the cache notes)")
    add("--revision", help="with --sample (default: as the cache notes)")
    add_parts(add)
    add("--device", default="auto", help="with --sample: cpu, cuda, ...; auto takes a GPU if there is one")


def _add_sources(add: Any) -> None:
    add("--source_dir", nargs="+", default=[], help="folders of reference images, named as the images of --input_dir")
    add("--source_column", nargs="+", default=[], help="columns with reference images (default source_image)")


def _add_filter(add: Any) -> None:
    add("--row_filter", nargs="+", default=[], help="conditions on columns, such as quality_tier=High year>=2020")


def _add_layout(add: Any) -> None:
    add("--payload", choices=PAYLOADS, default="shards", help="layout of the payloads (default shards)")
    add("--embeds", choices=EMBEDS, default="bf16", help="fp8: half the bytes; none: encode in training")
    add("--codec", choices=CODECS, default="none", help="zstd: lossless compression (default none)")


# -- build and convert -----------------------------------------------------------------------------------------


def _build(args: argparse.Namespace) -> None:
    from ..training.prepare import build_cache_for

    if args.family == "dit":
        return _build_classes(args)
    if not args.pretrained_model_name_or_path:
        raise SciflowError("`pretrained_model_name_or_path` is missing: the pipeline whose encoders make the cache.")
    options = "pretrained_model_name_or_path revision max_sequence_length posterior use_t5 trust_remote_code"
    family = _family(args.family, **named(args, options), **named_parts(args))
    given = named(args, "resolution enlarge caption_column split batch_size strict dtype payload embeds codec crops")
    given |= named(args, "text_batch_size flip source_dir source_column edit_masks row_filter buckets max_aspect_ratio")
    given |= {"fit": args.fit}
    given |= {"latent_shape": family.latent_shape} if args.latents == "none" else {}
    with processes(args.device) as (device, ranks):
        where = {"device": device, "encoder_dtype": inference_dtype(device), **ranks}
        report = build_cache_for(family, args.input_dir, args.output_dir, **where, **given)
    if ranks.get("rank", 0) == 0:
        _say(report)


def _build_classes(args: argparse.Namespace) -> None:
    """A cache of VAE latents with classes, for `dit`."""
    from ..images.class_source import ClassImageArguments
    from ..training.prepare import build_class_cache

    if not args.vae_name_or_path:
        raise SciflowError("`vae_name_or_path` is missing: `dit` needs a cache only for the latents of a VAE.")
    for name, value in (("buckets", BUCKETS[0]), ("max_aspect_ratio", MAX_ASPECT_RATIO), ("fit", FITS[0])):
        if (given := getattr(args, name)) != value:
            raise SciflowError(f"`{name}` {given}: images of `dit` are squares of `--resolution`. Leave it out.")
    options = {"vae_name_or_path": args.vae_name_or_path, "image_size": args.resolution, "posterior": args.posterior}
    family: Any = _family("dit", **options | named_parts(args))
    data_args = ClassImageArguments(**named(args, "input_dir image_column label_column row_filter"))
    kept = named(args, "split batch_size strict dtype payload codec flip")
    with processes(args.device) as (device, ranks):
        where = {"device": device, "encoder_dtype": inference_dtype(device), **ranks}
        report = build_class_cache(data_args, family, args.output_dir, **where, **kept)
    if ranks.get("rank", 0) == 0:
        _say(report)


def _say(report: "BuildReport") -> None:
    sys.stdout.write(f"{report.samples} samples in {report.output_dir}\n")


def _convert(args: argparse.Namespace) -> None:
    from ..data.build.convert import convert_cache
    from ..data.load import load_cache

    if args.shard_size_mb < 1:
        raise SciflowError(f"`shard_size_mb` {args.shard_size_mb}: at least 1.")
    with processes("cpu") as (_, ranks):
        options = named(args, "payload embeds codec payload_dir") | {"shard_bytes": args.shard_size_mb << 20}
        source: Any = args.input_dir
        if args.row_filter:
            source = load_cache(args.input_dir, payload_dir=args.payload_dir, row_filter=args.row_filter)
        report = convert_cache(source, args.output_dir, **options, **ranks)
    if ranks.get("rank", 0) == 0:
        sys.stdout.write(_conversion(report) + "\n")


def _conversion(report: "ConvertReport") -> str:
    from ..data.writing import readable_bytes, text_table

    ratio = report.bytes_before / max(report.bytes_after, 1)
    rows = [
        ("samples", f"{report.samples} in {report.output_dir}"),
        ("blocks", f"{report.blocks}, {report.written} of them written now"),
        ("before", readable_bytes(report.bytes_before)),
        ("after", f"{readable_bytes(report.bytes_after)}, {ratio:.2f}x smaller"),
        ("distinct prompts", f"{report.prompts}"),
        *([("distinct sources", f"{report.sources}")] if report.sources else []),
    ]
    if report.own_copies:
        rows.append(("own copies", f"{report.own_copies} rows have other embeddings than the first with their caption"))
    if report.fp8_error_mean is not None:
        error = f"{report.fp8_error_mean:.2%} a token in the mean, {report.fp8_error_max:.2%} at most (relative L2)"
        rows.append(("fp8 error", error))
    if report.waiting:
        rows.append(("waiting", f"{report.waiting} blocks for other processes: repeat the command when they are done"))
    return text_table(rows)


def _family(name: str, *, named_in: str | None = None, **options: Any) -> "ModelFamily":
    """A family with the options that are given; SciflowError for one that it does not have.

    `named_in`: the file that names it, where it was not the user.
    """
    from dataclasses import fields

    from ..families import family_named_in, load_family

    kind = load_family(name) if named_in is None else family_named_in(named_in, name)
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := given.keys() - {field.name for field in fields(kind)}:
        raise SciflowError(f"`{min(unknown)}` is no option of the family {name!r}. Leave it out.")
    return kind(**given)


# -- info ------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    from ..data.inspect.chart import write_bucket_chart
    from ..data.inspect.describe import describe_cache

    cache = _load(args)
    sys.stdout.write(describe_cache(cache, args.dataset_dir) + "\n")
    folder = args.dataset_dir[0]
    chart = args.chart
    if chart is None and len(args.dataset_dir) == 1 and os.path.isdir(folder) and os.access(folder, os.W_OK):
        chart = os.path.join(folder, _CHART)
    if chart is None:
        sys.stdout.write("\nbucket chart: not written; name a file by --chart\n")
    else:
        sys.stdout.write(f"\nbucket chart: {write_bucket_chart(Counter(cache.buckets), chart)}\n")


def _load(args: argparse.Namespace, **options: Any) -> "LatentCache":
    from ..data.cache import LatentCache
    from ..data.load import load_cache

    cache = load_cache(args.dataset_dir, payload_dir=args.payload_dir, **options)
    if not isinstance(cache, LatentCache):
        raise SciflowError(f"`dataset_dir` {args.dataset_dir}: it can only be streamed. Download it first.")
    return cache


# -- verify ----------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    import torch

    from ..data.inspect.repair import write_repaired
    from ..data.inspect.verify import verify_cache
    from ..data.writing import check_file, output_file

    if args.json:
        check_file(Path(args.json))
    if args.repair and len(args.dataset_dir) > 1:
        raise SciflowError(f"`repair` takes one cache at a time, but `dataset_dir` names {len(args.dataset_dir)}.")
    cache = _load(args, dtype=torch.float32)
    compare = _comparison(args, cache) if args.sample else None
    report = verify_cache(cache, threads=args.threads)
    differences: list[Difference] = []
    if compare is not None:
        bad = set(report.bad_rows)
        differences = compare(cache.select([i for i in range(len(cache)) if i not in bad]))
    ok = report.clean and all(difference.ok for difference in differences)
    sys.stdout.write(_findings(report, differences, args) + "\n")
    if args.json:
        facts = report.as_dict() | {"afresh": [vars(d) | {"ok": d.ok} for d in differences], "clean": ok}
        text = json.dumps(facts, indent=2) + "\n"
        with output_file(Path(args.json)) as handle:
            handle.write(text.encode())
    if args.repair and report.bad_rows:
        empty_is_bad = any(problem.what == "the empty prompt" for problem in report.problems)
        folder, root = write_repaired(cache, args.dataset_dir[0], report.bad_rows, with_empty_prompt=not empty_is_bad)
        sys.stdout.write(
            f"\nAn index without the {len(report.bad_rows)} bad rows is in {folder}. Train on it with\n"
            f"  --dataset_dir {folder} --payload_dir {root}\n"
        )
    elif args.repair:
        sys.stdout.write("\nNo row is bad: there is no index to repair.\n")
    return 0 if ok else 1


def _comparison(args: argparse.Namespace, cache: "LatentCache") -> Any:
    """A function of a cache that encodes some of its samples afresh; checks the flags before the long scan."""
    from ..data.cache import PARTS
    from ..data.inspect.recheck import compare_afresh
    from ..training.prepare import source_rules

    if not args.input_dir:
        raise SciflowError("`sample` needs `--input_dir`, the images that the cache was built from.")
    facts = cache.metadata
    name = args.family or facts.get("family")
    model = args.pretrained_model_name_or_path or facts.get("pretrained_model_name_or_path")
    if not (name and model):
        raise SciflowError(
            "`sample`: the cache does not say which encoders made it. Name them by `--family` and "
            "`--pretrained_model_name_or_path`."
        )
    parts = {option: facts[option] for option in PARTS if facts.get(option)} | named_parts(args)
    family = _family(
        name,
        named_in=None if args.family else f"the cache {args.dataset_dir[0]}",
        pretrained_model_name_or_path=model,
        revision=args.revision or facts.get("revision"),
        max_sequence_length=facts.get("max_sequence_length"),
        posterior=facts.get("posterior"),
        use_t5=facts.get("use_t5"),
        **parts,
    )
    cache.check_family(family.encoder_settings())
    device = find_device(args.device)

    @functools.cache
    def encoders() -> Any:
        return family.load_encoders(device=device, dtype=inference_dtype(device), text=facts.get("embeds") != "none")

    return functools.partial(
        compare_afresh,
        count=args.sample,
        input_dir=args.input_dir,
        encode_images=lambda pixel_values: family.encode_images(pixel_values, encoders()),
        encode_prompts=lambda prompts, **sources: family.encode_prompts(prompts, encoders(), **sources),
        caption_column=args.caption_column,
        split=args.split,
        sources=source_rules(family, encoders),
        source_dir=args.source_dir,
        source_column=args.source_column,
    )


def _findings(report: "VerifyReport", differences: "list[Difference]", args: argparse.Namespace) -> str:
    from ..data.writing import readable_bytes, text_table

    lines = [f"{report.rows} samples, {report.arrays} arrays, {readable_bytes(report.bytes)} read."]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"  {problem}" for problem in report.problems[:_SHOWN]]
    if (more := len(report.problems) - _SHOWN) > 0:
        lines.append(f"  ... and {more} more" + ("" if args.json else "; --json FILE writes all of them"))
    if differences:
        head = ("tensor", "stored", "samples", "largest difference", "relative (L2)", "allowed", "", "in")
        rows = [
            (d.name, d.stored, f"{d.samples}", f"{d.absolute:.3g}", f"{d.relative:.3g}", f"{d.tolerance:g}",
             "ok" if d.ok else "DIFFERS", d.worst)
            for d in differences
        ]  # fmt: skip
        lines += ["", "Encoded afresh:", text_table([head, *rows], right=range(2, 6)), ""]
    if report.clean:
        return "\n".join([*lines, "Everything that is stored is intact."])
    lines.append(
        f"{counted(len(report.problems), 'problem')} in {len(report.bad_rows)} of {counted(report.rows, 'row')}."
    )
    if report.bad_files:
        lines.append("To make them anew, delete these files, and run the command that wrote them again:")
        lines += [f"  {file}" for file in report.bad_files[:_SHOWN]]
        if (more := len(report.bad_files) - _SHOWN) > 0:
            lines.append(f"  ... and {more} more")
    if report.bad_rows and not args.repair:
        lines.append("To train without the bad rows, add --repair.")
    return "\n".join(lines)
