"""From flags to the data of a run: the demo's own, caches that are built first, images with classes, microscopes."""

import atexit
import dataclasses
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import PartialState

from ..data.arguments import DataArguments
from ..data.build.build import SHAPES, BuildReport, Plan, build_cache
from ..data.build.cut import find_cut, folders_of, noted_cut, warn_of_cut
from ..data.build.references import SourceRules
from ..data.build.views import MIRRORED
from ..data.cache import LatentCache
from ..data.load import load_cache, load_data, repeats_for
from ..data.online import OnlineImages
from ..data.preference_groups import PreferenceGroups, load_groups
from ..data.preferences import TupleArguments
from ..data.row_filter import RowFilter
from ..data.split import spread
from ..data.stream.stream import StreamingCache
from ..demo import DEMO_FIGURES, demo_figures, demo_pipeline
from ..demo.digits import DIGITS, write_digits
from ..errors import SciflowError, counted
from ..families.base import ModelFamily, PipelineFamily
from ..families.dit import DiT
from ..families.microscopy_unet import MicroscopyUNet
from ..images.class_source import ClassImageArguments, ClassSource, class_records
from ..images.classes import ClassLatents, load_class_images
from ..images.microscopes import MicroscopyDataArguments, MicroscopyTiles, load_microscopy_images
from ..images.optics import ForwardModel
from .arguments import DiffusionTrainingArguments
from .checkpoints import check_output_dir
from .prompts import prompts_of
from .reward_prompts import PromptArguments, Prompts, prompts_for
from .run_lock import hold

logger = logging.getLogger(__name__)

DEMO = "demo"


def _processes(args: DiffusionTrainingArguments, make_demo: Callable[[], object]) -> PartialState:
    """The processes of the run, once the first of them has looked at the output folder and made what a demo needs."""
    _ = args.device  # sets up the process group as TrainingArguments does
    state = PartialState()
    if state.is_main_process:
        if not (args.dry_run or args.debug_batch):  # say so before hours of encoding and loading
            check_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir)
            hold(args.output_dir)  # for this process, until `finish` has written the result
        make_demo()
    state.wait_for_everyone()
    return state


def build_cache_for(
    family: ModelFamily,
    input_dir: str,
    output_dir: str,
    *,
    device: Any = "cpu",
    encoder_dtype: Any = None,
    **options: Any,
) -> BuildReport:
    """Builds a cache of `input_dir` with the encoders of `family`, or continues one.

    The encoders are loaded at first use: where nothing is left to encode, they never are.

    Args:
        family: its VAE and text encoder are run.
        input_dir: figures with captions, see `build_cache`.
        output_dir: the cache.
        device: where the encoders run.
        encoder_dtype: theirs; float32 by default.
        options: further options of `build_cache`.

    Raises:
        SciflowError: encoders that cannot be loaded, or as `build_cache`.
    """

    @functools.cache
    def encoders() -> Any:
        text = options.get("embeds") != "none"
        return family.load_encoders(device=device, dtype=encoder_dtype or torch.float32, text=text)

    return build_cache(
        input_dir,
        output_dir,
        encode_images=lambda pixel_values: family.encode_images(pixel_values, encoders()),
        encode_prompts=lambda prompts, **sources: family.encode_prompts(prompts, encoders(), **sources),
        settings=family.encoder_settings(),
        bucket_step=family.bucket_step(),
        time_ids=family.stores_time_ids,
        count_tokens=family.count_tokens,
        sources=source_rules(family, encoders),
        **options,
    )


def source_rules(family: ModelFamily, encoders: Callable[[], Any]) -> SourceRules | None:
    """How a family takes reference images; None where it takes none. `encoders` loads its VAE."""
    if not family.max_sources:
        return None
    return SourceRules(
        family.max_sources,
        family.source_size,
        family.source_resized,
        family.check_source,
        lambda pixel_values: family.encode_source_images(pixel_values, encoders()),
        text=family.text_reads_sources,
    )


def online_text(
    family: ModelFamily, *, device: Any, dtype: Any, watch: bool = False
) -> Callable[[list[str]], dict[str, torch.Tensor]]:
    """A function: captions -> what `family.encode_prompts` makes of them, (B, ...) on `device`, without gradients.

    A caption that a batch has twice is encoded once. The encoder is loaded at first use: a dry run needs none. With
    `watch` the first batch with a caption that is cut is told.
    """
    told = not watch

    @functools.cache
    def encoders() -> Any:
        return family.load_text_encoder(device=device, dtype=dtype)

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        nonlocal told
        distinct = list(dict.fromkeys(captions))
        if not told:
            found = find_cut(zip(distinct, distinct, strict=True), family.count_tokens)
            warn_of_cut(found, len(distinct))
            told = found is None or found["count"] > 0
        rows = [distinct.index(caption) for caption in captions]
        return {name: value[rows] for name, value in family.encode_prompts(distinct, encoders()).items()}

    return encode


def online_images(family: ModelFamily, *, device: Any, dtype: Any) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function: images (B, 3, H, W) -> what `family.encode_images` makes of them, on `device`, without gradients.

    The VAE is loaded at first use: a dry run needs none.
    """

    @functools.cache
    def encoders() -> Any:
        return family.load_encoders(device=device, dtype=dtype, text=False)

    return lambda pixel_values: family.encode_images(pixel_values, encoders())


def resolve_demo(family: ModelFamily, data_args: DataArguments, output_dir: str) -> None:
    """Replaces `demo` (figures: one of `DEMO_FIGURES`) in the options by what is made in `output_dir` at first use."""
    folder = Path(output_dir) / "demo"
    if family.pretrained_model_name_or_path == DEMO:
        family.pretrained_model_name_or_path = str(demo_pipeline(folder, family.name))
    if data_args.input_dir in DEMO_FIGURES:
        data_args.input_dir = str(demo_figures(folder, data_args.input_dir))


def _below(entry: str, folder: str) -> str:
    """An entry of `--validation_source_images` or `--validation_target_images`, as named or else in `input_dir`."""
    files = [entry] if Path(entry).is_file() else entry.split(",")
    inside = [Path(folder, name.strip()) for name in files]
    found = zip(files, inside, strict=True)
    return ",".join(str(path) if path.is_file() and not Path(name).is_file() else name for name, path in found)


def prepare_data(
    data_args: DataArguments, family: ModelFamily, args: DiffusionTrainingArguments
) -> tuple[LatentCache | StreamingCache, LatentCache | None]:
    """The training and the held-out data of a run, from caches.

    With `--input_dir` the cache is built first, by all ranks; the same call continues after a kill.

    Args:
        data_args: caches or figures, and what is held out.
        family: encodes what is not cached.
        args: the options of the run: device, dtype, ranks.

    Returns:
        The data to train on, and what is held out or None.

    Raises:
        SciflowError: an output folder with checkpoints and no word on them, a cache of another family or encoder, or
            data that cannot be used.
    """
    state = _processes(args, lambda: resolve_demo(family, data_args, args.output_dir))
    resolve_demo(family, data_args, args.output_dir)
    if data_args.input_dir:
        for name in ("validation_source_images", "validation_target_images"):
            setattr(args, name, [_below(entry, data_args.input_dir) for entry in getattr(args, name)])
    online, built = data_args.text_encoding == "online", bool(data_args.input_dir)
    live = data_args.image_encoding == "online"
    if online and family.text_reads_sources:
        raise SciflowError(
            f"`text_encoding` online: the text encoder of `{family.name}` also reads the reference images, so text is "
            "stored with the cache. Leave the option out."
        )
    places: list[Any] = list(data_args.image_dir) or [None]
    if data_args.input_dir:
        directory = data_args.dataset_dir[0] if data_args.dataset_dir else str(Path(args.output_dir) / "cache")
        report = build_cache_for(
            family,
            data_args.input_dir,
            directory,
            device=args.device,
            encoder_dtype=args.weight_dtype,
            resolution=data_args.resolution,
            enlarge=data_args.enlarge,
            **{name: getattr(data_args, name) for name in SHAPES},
            caption_column=data_args.caption_column,
            split=data_args.split,
            source_dir=data_args.source_dir,
            source_column=data_args.source_column,
            edit_masks=data_args.edit_masks,
            row_filter=data_args.row_filter,
            batch_size=data_args.encode_batch_size,
            text_batch_size=data_args.text_batch_size,
            strict=data_args.strict,
            payload=data_args.payload,
            embeds="none" if online else "bf16",
            latent_shape=family.latent_shape if live else None,
            plan=_plan_of(family) if args.dry_run else None,
            rank=state.process_index,
            world_size=state.num_processes,
            barrier=state.wait_for_everyone,
        )
        state.wait_for_everyone()
        directory = str(report.output_dir)
        places = [{record.name: record for record in report.records}]
        places += ([*data_args.image_dir, None][:1]) * (data_args.prior_dataset_dir is not None)
        row_filter = tuple(data_args.row_filter)  # by which the cache has been built
        of_input: dict[str, Any] = {"source_dir": [], "source_column": [], "edit_masks": DataArguments.edit_masks}
        of_input |= {"row_filter": [], **SHAPES}
        data_args = dataclasses.replace(data_args, input_dir=None, dataset_dir=[directory], **of_input)
    where = {"device": args.device, "dtype": args.weight_dtype}
    encode = online_text(family, **where, watch=data_args.streaming and not built) if online else None
    images = None
    if live:
        images = OnlineImages(
            online_images(family, **where),
            places,
            batch_size=data_args.encode_batch_size,
            time_ids=family.stores_time_ids,
            crop=data_args.crop_from if data_args.random_crop else "",
            flip=data_args.random_flip,
        )
        if images.flip and state.is_main_process:
            logger.warning("`random_flip`: %s", MIRRORED)
    data = load_data(data_args, dtype=args.weight_dtype, online_text=encode, online_images=images)
    if built:
        data[0].row_filter = row_filter
    if online and not data_args.streaming and not built and state.is_main_process:
        _tell_cut([cache for cache in data if isinstance(cache, LatentCache)], family)
    return data


def _plan_of(family: ModelFamily) -> Plan:
    """For a dry run: an index of what is known of images and captions, deleted at the end of the process."""
    length, width, unknown = 0, 0, ""
    if isinstance(family, PipelineFamily):
        counted_to = family.count_tokens([""])
        length = vars(family).get("max_sequence_length") or (counted_to[1] if counted_to else 1)
        width = family.widths(SimpleNamespace(**family.config(family.component)))["prompt_embeds"]
        unknown = f", and the lengths of texts, of which each is taken as {length} tokens, the most"
    folder = Path(tempfile.mkdtemp(prefix="sciflow_hf_plan_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        "`dry_run`: nothing is encoded and no cache is built. Samples, buckets and sizes of latents follow from the "
        "headers of the images. Not known before the build: images that are broken after their header%s.",
        unknown,
    )
    return Plan(folder, family.latent_shape, (length, width) if length else None)


def _tell_cut(caches: Sequence[LatentCache], family: ModelFamily) -> None:
    """Warns of captions that are cut; where `cache build` has counted them with the same limit, by its note."""
    noted, limit = noted_cut(folders_of(caches[0].index_files)), family.count_tokens([""])
    rows = sum(map(len, caches))
    known = noted is not None and limit is not None and noted["kept"] == limit[1]
    if not (noted and known and (not noted["count"] or sum(noted["lengths"].values()) == rows)):
        captions = [pair for cache in caches for pair in zip(cache.row_ids, cache.captions, strict=True)]
        noted = find_cut(captions, family.count_tokens)
    warn_of_cut(noted, rows)


def prepare_groups(
    data_args: DataArguments, tuple_args: TupleArguments, family: ModelFamily, args: DiffusionTrainingArguments
) -> tuple[PreferenceGroups, PreferenceGroups | None]:
    """The groups of candidates to train on, and those held out, of caches with a row a candidate.

    Caches are built first as by `prepare_data`. Groups are made of complete indexes: their
    columns are read first, with `--streaming` as well; latents and embeddings are read when their group comes, from
    wherever the caches lie. `--eval_fraction`, `--max_train_samples` and `--dataset_weights` are of groups.

    Args:
        data_args: caches or figures of candidates.
        tuple_args: which candidates are compared.
        family: encodes what is not cached.
        args: the options of the run.

    Returns:
        The groups to train on, and those held out or None.

    Raises:
        SciflowError: as `prepare_data` and `load_groups`; options of data that groups do not have.
    """
    for name, given in (
        ("prior_dataset_dir", data_args.prior_dataset_dir is not None),
        ("image_encoding", data_args.image_encoding == "online"),
    ):
        if given:
            raise SciflowError(
                f"`{name}` {getattr(data_args, name)!r} does not go with preferences, which compare stored latents of "
                "candidates: leave it out."
            )
    if data_args.streaming:
        logger.info("`streaming`: the index is read at once, to find the groups; latents and text as they come.")
    of_rows: Any = {"eval_fraction": 0.0, "max_train_samples": None, "dataset_weights": [], "streaming": False}
    cache, _ = prepare_data(dataclasses.replace(data_args, **of_rows), family, args)
    train = load_groups(cast(LatentCache, cache), tuple_args)
    held_out: PreferenceGroups | None = None
    if data_args.eval_fraction:
        train, held_out = train.split(data_args.eval_fraction)
    if data_args.max_train_samples and data_args.max_train_samples < len(train):
        train = train.select(spread(len(train), data_args.max_train_samples))
    if data_args.dataset_weights:
        train.repeats = repeats_for(train.source_of_row, data_args.dataset_weights, data_args.dataset_dir)
    logger.info("%s to train on, %d held out.", counted(len(train), "group"), len(held_out or []))
    return train, held_out or None


def prepare_prompts(
    prompt_args: PromptArguments, family: ModelFamily, args: DiffusionTrainingArguments
) -> tuple[Prompts, Prompts | None]:
    """The prompts that a network learns from by rewards, and those held out.

    Args:
        prompt_args: where they are, and what is held out.
        family: which sizes it draws.
        args: the options of the run.

    Returns:
        The prompts to train on, and those held out or None.

    Raises:
        SciflowError: an output folder with checkpoints and no word on them; prompts that cannot be read or drawn.
    """
    if prompt_args.prompts_file is None:
        raise SciflowError("`prompts_file` is missing: a file or data set of the prompts to draw, one a row.")
    pipeline = Path(args.output_dir) / DEMO
    is_demo = family.pretrained_model_name_or_path == DEMO
    _processes(args, lambda: demo_pipeline(pipeline, family.name) if is_demo else None)
    if is_demo:
        family.pretrained_model_name_or_path = str(demo_pipeline(pipeline, family.name))
    rows = prompts_of(prompt_args.prompts_file, split=prompt_args.prompts_split)
    train, held_out = prompts_for(rows, family, prompt_args.rollout_size).split(prompt_args.eval_fraction)
    logger.info("%s to train on, %d held out.", counted(len(train), "prompt"), len(held_out))
    return train, held_out if len(held_out) else None


def prepare_class_images(
    data_args: ClassImageArguments, family: DiT, args: DiffusionTrainingArguments
) -> tuple[Any, Any]:
    """The training and the held-out images; tells `family` the number of channels and the names of the classes.

    Args:
        data_args: where the images are, and what is held out.
        family: a DiT, on pixels or on latents.
        args: the options of the run.

    Returns:
        The data to train on, and what is held out or None.

    Raises:
        SciflowError: an output folder with checkpoints and no word on them, or data that cannot be used.
    """
    folder = Path(args.output_dir) / "data" / DIGITS
    state = _processes(args, lambda: write_digits(folder) if data_args.input_dir == DIGITS else None)
    if data_args.input_dir == DIGITS:
        data_args.input_dir, data_args.eval_split = str(folder), "test"
    family.check_size(family.image_size)
    if family.has_vae:
        return _class_latents(data_args, family, args, state)
    if not data_args.input_dir:
        raise SciflowError("`dataset_dir` holds latents: name their VAE (`--vae_name_or_path`), or give `--input_dir`.")
    with state.main_process_first():  # `datasets` writes its own cache
        train, held_out = load_class_images(data_args, image_size=family.image_size, num_classes=family.num_classes)
    if family.in_channels not in (None, train.channels):
        raise SciflowError(
            f"`in_channels` {family.in_channels}: the images have {train.channels}. Leave it out, or convert them by "
            "`--image_mode`."
        )
    family.in_channels, family.num_classes, family.class_names = train.channels, train.num_classes, train.class_names
    return train, held_out


def build_class_cache(
    data_args: ClassImageArguments,
    family: DiT,
    output_dir: str,
    *,
    split: str | None = None,
    device: Any = "cpu",
    encoder_dtype: Any = None,
    **options: Any,
) -> BuildReport:
    """Builds a cache of one split with the VAE of `family`: squares of `image_size`, classes in the column `label`.

    Args:
        split: default `data_args.train_split`.
        options: of `build_cache`.
    """
    family.check_size(family.image_size)
    records, names = class_records(ClassSource(data_args, split or data_args.train_split), family.num_classes)

    @functools.cache
    def encoders() -> Any:
        return family.load_encoders(device=device, dtype=encoder_dtype or torch.float32)

    side = family.image_size
    return build_cache(
        str(data_args.input_dir),
        output_dir,
        encode_images=lambda pixel_values: family.encode_images(pixel_values, encoders()),
        encode_prompts=lambda prompts: family.encode_prompts(prompts, None),  # never: nothing of text is stored
        settings=family.encoder_settings() | {"class_names": names},
        bucket_step=family.bucket_step(),
        resolution=side,
        records=records,
        buckets=[(side, side)],
        embeds="none",
        **options,
    )


def _class_latents(
    data_args: ClassImageArguments, family: DiT, args: DiffusionTrainingArguments, state: Any
) -> tuple[Any, Any]:
    """The training and the held-out latents; with `input_dir` the caches are built first, by all ranks, resumable."""
    folders = {data_args.train_split: data_args.dataset_dir}
    if data_args.input_dir:
        if len(data_args.dataset_dir) > 1:
            raise SciflowError(f"`dataset_dir` {data_args.dataset_dir}: with `--input_dir` it is the one to build.")
        root = Path(data_args.dataset_dir[0] if data_args.dataset_dir else Path(args.output_dir) / "cache")
        splits = [split for split in (data_args.train_split, data_args.eval_split) if split]
        folders = {split: [str(root / split)] for split in splits}
        for split, (folder,) in folders.items():
            report = build_class_cache(
                data_args,
                family,
                folder,
                split=split,
                device=args.device,
                encoder_dtype=args.weight_dtype,
                batch_size=data_args.encode_batch_size,
                flip=data_args.flip and split == data_args.train_split,
                plan=_plan_of(family) if args.dry_run else None,
                rank=state.process_index,
                world_size=state.num_processes,
                barrier=state.wait_for_everyone,
            )
            state.wait_for_everyone()
            folders[split] = [str(report.output_dir)]
    stored = () if data_args.input_dir else data_args.row_filter  # else the caches have been built by it
    caches: Any = [load_cache(folder, dtype=args.weight_dtype, row_filter=stored) for folder in folders.values()]
    train, held_out = caches if len(caches) == 2 else caches[0].split(data_args.eval_fraction)
    if data_args.max_train_samples and data_args.max_train_samples < len(train):
        train = train.select(spread(len(train), data_args.max_train_samples))
    train.row_filter = RowFilter(data_args.row_filter).texts
    if family.num_classes != 0:
        train, held_out = (ClassLatents.of(cache) for cache in (train, held_out))
        _check_classes(family, train, held_out)
    rows, classes = counted(len(train), "image"), counted(family.num_classes or 0, "class")
    logger.info("Latents of %s of %s to train on, %d held out.", rows, classes, len(held_out))
    return train, held_out if len(held_out) else None


def _check_classes(family: DiT, *caches: ClassLatents) -> None:
    """Takes the classes from the caches; refuses labels beyond `num_classes`."""
    names = caches[0].class_names
    largest = max(int(cache.class_labels.max()) for cache in caches if len(cache))
    family.num_classes = len(names) if family.num_classes is None else family.num_classes
    if largest >= family.num_classes:
        raise SciflowError(
            f"`num_classes` {family.num_classes}: the cache has the label {largest}. Raise it, or correct the labels."
        )
    family.class_names = [*names, *map(str, range(len(names), family.num_classes))][: family.num_classes]


def prepare_microscopy(
    data_args: MicroscopyDataArguments,
    optics: ForwardModel,
    family: MicroscopyUNet,
    args: DiffusionTrainingArguments,
) -> tuple[MicroscopyTiles, MicroscopyTiles | None]:
    """The training and held-out tiles; tells `family` their channels, intensities and optics.

    With `input_dir` "demo" the images of scikit-image's wheel are written below `output_dir` first.

    Args:
        data_args: where the images are, how they are cut, and what is held out.
        optics: makes measured images of sharp ones, where there are no pairs.
        family: the UNet that will see them.
        args: the options of the run.

    Returns:
        The tiles to train on, and those held out or None.

    Raises:
        SciflowError: see `load_microscopy_images`; a `tile_size` that the network cannot halve often enough.
    """
    folder = Path(args.output_dir) / DEMO
    _processes(args, lambda: _write_microscope_images(folder) if data_args.input_dir == DEMO else None)
    if data_args.input_dir == DEMO:
        data_args.input_dir = str(folder)
    known = family.take_over() if family.pretrained_model_name_or_path else None
    step = family.bucket_step()
    if data_args.tile_size % step:
        raise SciflowError(
            f"`tile_size` {data_args.tile_size}: the {len(family.block_out_channels)} levels of `block_out_channels` "
            f"halve it, so it must be a multiple of {step}."
        )
    train, held_out = load_microscopy_images(data_args, optics, transforms=known)
    family.describe_data(train)
    return train, held_out


def _write_microscope_images(folder: Path) -> None:
    from ..demo.microscope_images import microscope_images  # scikit-image, which no other run needs

    microscope_images(folder)
