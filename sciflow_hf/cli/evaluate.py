"""`sciflow-hf evaluate`: a base model and adapters draw the same prompts from the same seeds, and are scored.

The folder holds the images, scores.parquet (a row an image), summary.json (means, and paired differences with their
95 % interval over prompts), scores.png and report.html. The same command continues after a kill, without drawing or
asking anything twice; further metrics or adapters score and draw only what is new.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import SciflowError, counted
from .devices import inference_dtype, processes
from .drawing import RANGES, check_folder, check_ranges, identity_of, prompt_family
from .evaluation_prompts import draw_missing, facts_of, models_of, plan_prompts, read_rows
from .evaluation_scores import SETS, SUMMARY, Metrics
from .judge import add_judge
from .models import add_model, run_facts

OPTIONS = "evaluation.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sciflow-hf evaluate`, and its function as `run`."""
    from ..metrics.rewards.base import BUILT_IN, GROUPS

    add = parser.add_argument
    parser.set_defaults(run=_evaluate)
    add("--model_path", required=True, help="the base: a pipeline's folder or name, or the output of a recipe")
    add(
        "--adapters",
        nargs="+",
        default=[],
        metavar="RUN",
        help="outputs of recipes that belong to the base: LoRAs or networks, called by their folder or by NAME=RUN",
    )
    add(
        "--prompts",
        help=".txt with a prompt a line; .jsonl, .csv or .parquet with a column prompt (else caption, text), and "
        "perhaps width, height, seed, source_images, reference, rubric_text and further ones that metrics take",
    )
    add("--dataset", help="a Hub or saved data set with such columns instead; its column image is the reference")
    add("--benchmark", help="sciforma, sciforma:simple, sciforma:medium, sciforma:hard, or the folder of a copy")
    add("--split", help="split of the data set or benchmark")
    add("--output_dir", required=True, help="folder for images, scores and summary")
    add(
        "--metrics",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"{', '.join(dict.fromkeys([*GROUPS, *BUILT_IN, *SETS]))}, or the dotted path of a reward function",
    )
    add("--seed", type=int, default=0, help="decides an image with its prompt, where the row has no seed (default 0)")
    add("--num_images_per_prompt", type=int, default=1, help="images of each prompt and model (default 1)")
    add("--guidance_scale", type=float, help="1 is none (default: the benchmark's, else 3.5)")
    add("--num_inference_steps", type=int, help="sampling steps (default: the benchmark's, else 50)")
    add("--height", type=int, help="pixels (default: the row's; the commonest of training; of an edit its source's)")
    add("--width", type=int, help="pixels (default: the row's; the commonest of training; of an edit its source's)")
    add("--max_sequence_length", type=int, help="text tokens per prompt (default: the family's)")
    add("--training_images", help="folder or data set of training figures: drawn images that copy one are named")
    add(
        "--metric_network",
        help="for fid and kid: dotted path of a function without arguments that makes the feature network, images "
        "(B, 3, H, W) in [-1, 1] to (B, D)",
    )
    add("--card", action="store_true", help="put the scores into the model card of each adapter")
    add_judge(parser)
    add_model(add)


def _evaluate(args: argparse.Namespace) -> None:
    from ..data.build.blocks import remove_temporaries

    check_ranges(args, RANGES | {"num_images_per_prompt": "[1, inf)"})
    metrics = Metrics(args)
    models = models_of(args)
    rows, where, folder = read_rows(args)
    kind, family = prompt_family(args)
    _check_networks(models, args, family.component)
    output, prompts = Path(args.output_dir), plan_prompts(rows, where, folder, args, family, models)
    if args.card:
        _check_cards(models)
    with processes(args.device) as (device, ranks):
        rank, number = ranks.get("rank", 0), ranks.get("world_size", 1)
        barrier = ranks.get("barrier", lambda: None)
        dtype = inference_dtype(device)
        facts = facts_of(args, family, kind, prompts, dtype)
        check_folder(output, OPTIONS, facts, holds="another evaluation", write=rank == 0)
        for name, path in models.items():
            identity = {"model": facts["model_path"] if path is None else identity_of(path, family.component)}
            holds = f"images of another model called {name!r}"
            check_folder(output / "images" / name, "model.json", identity, holds=holds, write=rank == 0)
        if rank == 0:
            remove_temporaries(output)
        barrier()
        share = [prompt for prompt in prompts if prompt.index % number == rank]
        draw_missing(share, models, args, family, kind, device, dtype, shows=rank == 0)
        if number > 1:
            metrics.score_share(output, share, list(models))
        barrier()
        if rank == 0:
            summary = metrics.write(output, prompts, list(models), args)
            _report(output, summary, models, args)


def _report(output: Path, summary: dict[str, Any], models: Mapping[str, str | None], args: argparse.Namespace) -> None:
    """The plot, the page, model cards, and the table on the console."""
    from ..data.writing import text_table
    from ..metrics.comparison import comparison_rows
    from ..report.evaluation import add_to_card, plot_scores
    from ..report.page import write_page
    from ..report.page_data import page_of

    plot_scores(summary, output / "scores.png")
    write_page(page_of(output), output)
    if args.card:
        for name, path in models.items():
            if path is not None:
                add_to_card(Path(path), name, summary)
    table = comparison_rows(summary)
    number, of_each = len(summary["models"]), summary["prompts"]
    lines = [
        f"{counted(of_each, 'prompt')}, {counted(number, 'model')}, {counted(summary['images'], 'image')} in {output}",
        "",
        text_table(table, right=range(1, 1 + number)),
        *_notes(summary),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _notes(summary: Mapping[str, Any]) -> Iterator[str]:
    """Remarks below the table."""
    if len(summary["models"]) > 1:
        clear = any("low" in found for models in summary["paired"].values() for found in models.values())
        interval = "with their 95 % interval over prompts" if clear else "without an interval: it takes 10 prompts"
        yield f"\nDifferences are paired by prompt and seed, {interval}."
    if summary["lower_is_better"]:
        yield f"Lower is better: {', '.join(summary['lower_is_better'])}."
    for model, number in summary["incomplete"].items():
        if number:
            yield f"{model}: {counted(number, 'image')} incomplete, a metric failed on them."
    for model, share in summary.get("blank_share", {}).items():
        if share:
            yield f"{model}: {share:.1%} of the images are blank."
    for model, copies in summary.get("copies", {}).items():
        if copies:
            named = ", ".join(f"{c['image']} is like {c['training_image']} ({c['similarity']:.3f})" for c in copies[:5])
            more = f", and {len(copies) - 5} more in {SUMMARY}" if len(copies) > 5 else ""
            number = f"{len(copies)} near {'copy' if len(copies) == 1 else 'copies'}"
            yield f"{model}: {number} of training figures: {named}{more}."


def _check_networks(models: Mapping[str, str | None], args: argparse.Namespace, component: str) -> None:
    """Refuses an adapter of another network than the base's: on this one it would draw, and be wrong."""
    for path in filter(None, models.values()):
        parts = run_facts(path).get("parts", [])
        own = next((part for part in parts if part["part"] == component), None)
        if own and args.network_name_or_path is None and not (Path(path) / component).is_dir():
            raise SciflowError(
                f"`adapters` {path!r} was trained on the network of {own['path']!r} (`{own['option']}`), not on that "
                f"of {args.model_path!r}: evaluate it apart from others, with that one as `--network_name_or_path`."
            )


def _check_cards(models: Mapping[str, str | None]) -> None:
    for path in filter(None, models.values()):
        if not Path(path, "README.md").is_file():
            raise SciflowError(
                f"`card`: {path!r} has no README.md, the model card of a finished run. Leave `--card` out."
            )
    if len(models) == 1:
        raise SciflowError("`card` is for `--adapters`: a base has no model card here. Leave it out.")
