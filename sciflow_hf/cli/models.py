"""The model that `sample` and `prefer draw` draw with: a pipeline, or the LoRA or network of a run, and its options."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError
from .devices import add_parts, named_parts

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families.base import ModelFamily


def add_model(add: Any) -> None:
    """Adds the options of a model in addition to `--model_path`, and `--device`."""
    add("--base_model", help="folder or Hub repository of the pipeline that a LoRA or network belongs to")
    add_parts(add, network=True)
    add("--family", help="model family, if the run does not name it")
    add("--trust_remote_code", action="store_true", help="run the code of a text-to-image pipeline's folder")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def pipeline_kind(path: str) -> str | None:
    """Name of the pipeline's class, of a folder or Hub repository; None where there is no pipeline."""
    from diffusers import DiffusionPipeline

    from ..families.loading import model_source, unreachable

    try:
        name = DiffusionPipeline.load_config(model_source(path)).get("_class_name")
    except (OSError, ValueError) as error:  # a LoRA or a network alone, or nothing
        if away := unreachable(error):
            raise SciflowError(f"`model_path` {path!r} {away}") from error
        return None
    return name[1] if isinstance(name, list | tuple) else name


def run_facts(path: str) -> dict[str, Any]:
    """`run_facts.json` of a run's folder; {} where there is none."""
    file = Path(path) / "run_facts.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def text_family(args: argparse.Namespace, kind: str | None) -> "ModelFamily":
    """The family of a pipeline or of a run, with the base model."""
    from ..families import BUILT_IN, family_named_in, load_family
    from ..families.base import PipelineFamily

    facts = run_facts(args.model_path)
    name, base = args.family or facts.get("family"), args.model_path if kind else args.base_model
    if name is None and kind is not None:
        candidates: list[Any] = [k for k in map(load_family, BUILT_IN) if issubclass(k, PipelineFamily)]
        blank = [k(pretrained_model_name_or_path=args.model_path) for k in candidates]
        name = next((family.name for family in blank if family.pipeline_class().__name__ == kind), None)
    base = base or facts.get("base_model")
    if name is None or base is None:
        raise SciflowError(
            f"`model_path` {args.model_path!r} is no pipeline" + (f" of a family here ({kind})" if kind else "")
            + ", and does not say what it belongs to. Name `--family`"
            + ("." if kind else " and `--base_model`.")
        )  # fmt: skip
    trusted = {"trust_remote_code": True} if args.trust_remote_code else {}
    file = Path(args.model_path) / "run_facts.json"
    family: Any = load_family(name) if args.family else family_named_in(str(file), name)
    parts = facts.get("parts", [])  # but a network that the run has trained itself
    parts = {own["option"]: own["path"] for own in parts if not Path(args.model_path, own["part"]).is_dir()}
    parts |= named_parts(args)
    if "network_name_or_path" in parts:  # instead of the weights that the run started from
        parts.pop("init_weights", None)
    return family(pretrained_model_name_or_path=base, **trusted, **parts)


def load_network(family: Any, args: argparse.Namespace, kind: str | None, dtype: Any) -> Any:
    """The family's network: of the pipeline, with the adapter of the run, or the run's own.

    Raises:
        SciflowError: the run also trained text encoders, with which the commands cannot draw.
    """
    if kind is None and (Path(args.model_path) / family.component).is_dir():
        from ..families.loading import explain_loading

        with explain_loading(args.model_path, family.component):
            return family.network_class().from_pretrained(args.model_path, subfolder=family.component, dtype=dtype)
    network = family.load_model(dtype=dtype)
    if kind is None:
        from ..adapters.files import load_from

        state, _ = load_from(args.model_path, network, family)
        parts = [name for name in family.trained_text_parts if any(key.startswith(f"{name}.") for key in state)]
        if parts:
            raise SciflowError(
                f"`model_path` {args.model_path!r} also adapts {' and '.join(parts)}, which commands do not load: its "
                "images would be wrong. Draw with diffusers, as its model card shows."
            )
    return network


def image_size(args: argparse.Namespace, family: Any, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width: as asked, else `default`, that of most images of the run, or 1024 (512 is not a multiple)."""
    buckets = run_facts(args.model_path).get("dataset", {}).get("buckets") or {}
    commonest: Sequence[int] = default or (1024, 1024)
    if buckets and default is None:
        commonest = [int(side) for side in max(buckets, key=lambda size: buckets[size]).split("x")]
    size = (args.height or commonest[0], args.width or commonest[1])
    step = family.bucket_step()
    if any(side < step or side % step for side in size):
        raise SciflowError(f"`height` and `width` {size[0]}x{size[1]}: multiples of {step} for `{family.name}`.")
    return size


def call_of(args: argparse.Namespace, family: Any, images: "list[Image]") -> dict[str, Any]:
    """Size and sources of an image as arguments of `generate`; both as in training, where the run says it."""
    from ..data.batches.sizes import FITS
    from ..data.source_images import EditViews

    facts = run_facts(args.model_path).get("dataset", {})
    sizes = [(int(h), int(w)) for h, w in (size.split("x") for size in facts.get("buckets") or {})]
    views = EditViews(sizes, bool(facts.get("as_targets")), facts.get("fit", FITS[0]))
    default = family.source_size(*images[0].size[::-1]) if images and not sizes else None
    height, width = size = image_size(args, family, default)
    if images:
        height, width = size = image_size(args, family, views.size_of(images[0], size))
        images = views.shown(images, size, family)
    return {"height": height, "width": width} | ({"source_images": images} if images else {})
