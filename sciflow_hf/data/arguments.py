"""`DataArguments`: where the data of a run is, and what of it is trained on."""

import os
from pathlib import Path
from typing import ClassVar

from ..errors import SciflowError
from ..options import Options, arguments, option
from .batches.sizes import BUCKETS, FITS, MAX_ASPECT_RATIO
from .build.sources.edits import EDIT_MASKS
from .layouts import PAYLOADS
from .row_filter import RowFilter

ENCODINGS = ("cached", "online")
CROP_FROM = ("resized", "original")


def _check_input(args: "DataArguments") -> None:
    if len(args.dataset_dir) > 1:
        raise SciflowError(f"`dataset_dir` {args.dataset_dir}: with `--input_dir` it is the one cache to build.")


def _check_weights(args: "DataArguments") -> None:
    caches = max(len(args.dataset_dir), 1)
    if len(args.dataset_weights) != caches:
        raise SciflowError(
            f"`dataset_weights` {args.dataset_weights}: {len(args.dataset_weights)} numbers for {caches} "
            f"cache{'s' * (caches > 1)} in `--dataset_dir`. Give one for each."
        )


def _check_prior(args: "DataArguments") -> None:
    if args.prior_dataset_dir is None:
        return
    if args.streaming:
        raise SciflowError("`prior_dataset_dir` does not go with `--streaming`: read the complete index.")
    if any(_same_place(args.prior_dataset_dir, folder) for folder in args.dataset_dir):
        raise SciflowError(
            f"`prior_dataset_dir` {args.prior_dataset_dir!r} is also in `--dataset_dir`. It must hold other images: "
            "of the general kind that the network shall not unlearn."
        )


def _check_prior_weight(args: "DataArguments") -> None:
    if args.prior_dataset_dir is None:
        raise SciflowError(
            f"`prior_loss_weight` {args.prior_loss_weight:g} weighs nothing: name the cache of prior preservation by "
            "`--prior_dataset_dir`."
        )


def _check_online(args: "DataArguments") -> None:
    if args.image_encoding == "cached":
        given = {"random_crop": args.random_crop, "random_flip": args.random_flip, "image_dir": args.image_dir}
        name = next(name for name, value in given.items() if value)
        at_build = {"random_crop": "--crops N", "random_flip": "--flip"}.get(name)
        also = f", or draw views once: `sciflow-hf cache build {at_build}`" if at_build else ""
        raise SciflowError(f"`{name}`: stored latents are of fixed views. Add `--image_encoding online`{also}.")
    caches = (not args.input_dir) * len(args.dataset_dir) + (args.prior_dataset_dir is not None)
    if args.image_dir and len(args.image_dir) not in (1, caches):
        raise SciflowError(
            f"`image_dir` {args.image_dir}: {len(args.image_dir)} folders for {caches} caches. Give one for all, or "
            "one for each of `--dataset_dir` and then of `--prior_dataset_dir`."
        )


def _check_sources(args: "DataArguments") -> None:
    if not args.input_dir:
        given = {"source_dir": args.source_dir, "source_column": args.source_column, "edit_masks": args.edit_masks}
        name = next(name for name in given if given[name] not in ([], EDIT_MASKS[0]))
        raise SciflowError(f"`{name}` {given[name]} is for `--input_dir`: a cache that is built already has its edits.")


def _check_row_filter(args: "DataArguments") -> None:
    RowFilter(args.row_filter)


def _check_shapes(args: "DataArguments") -> None:
    if args.input_dir:
        return
    for name, value in (("buckets", BUCKETS[0]), ("max_aspect_ratio", MAX_ASPECT_RATIO), ("fit", FITS[0])):
        if (given := getattr(args, name)) != value:
            raise SciflowError(f"`{name}` {given} is for `--input_dir`: a cache that is built already has its buckets.")


def _check_fit(args: "DataArguments") -> None:
    _check_shapes(args)
    if args.random_crop and args.fit == "pad":
        raise SciflowError("`fit` pad shows complete images, and `--random_crop` windows: leave one of the two out.")


def _check_crop_from(args: "DataArguments") -> None:
    if not args.random_crop:
        raise SciflowError(f"`crop_from` {args.crop_from} is for `--random_crop`: add it, or leave this out.")


def _check_max_train_samples(args: "DataArguments") -> None:
    if args.streaming and args.max_train_samples:
        raise SciflowError("`max_train_samples` does not go with `--streaming`, which sees no row before it comes.")


def _same_place(one: str, other: str) -> bool:
    """Whether two folders or URLs are the same."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


@arguments
class DataArguments(Options):
    """Data of a run: caches of latents and text embeddings, or the images that a cache is built from first."""

    heading: ClassVar[str] = "Data"

    dataset_dir: list[str] = option(
        [],
        "One or more caches: folders that hold an index (parquet) and its payload.",
        required_unless="input_dir",
        advice="give `--dataset_dir` (a cache) or `--input_dir` (a folder of captioned images).",
    )
    dataset_weights: list[float] = option(
        [],
        "One number for each cache: how many of its samples an epoch draws, in proportion. Every sample is drawn at "
        "least once, and the epoch is as short as that allows.",
        within="(0, inf)",
        advice="Leave a cache out of `--dataset_dir` where none of it is wanted.",
        check=_check_weights,
    )
    payload_dir: str | None = option(
        None,
        "Where `cache_path` of the index is rooted; by default `--dataset_dir`, then the folder of the index file.",
    )
    text_encoding: str = option(
        "cached",
        "cached reads stored embeddings; online encodes captions in training, by the frozen text encoder next to the "
        "network, and needs none.",
        choices=ENCODINGS,
    )
    image_encoding: str = option(
        "cached",
        "cached reads stored latents; online reads images and encodes them in training, by the frozen VAE next to the "
        "network, and needs none. With it crops and mirror images can be drawn anew each epoch.",
        choices=ENCODINGS,
    )
    image_dir: list[str] = option(
        [],
        "Where the images of an index (`image_path`) lie, for --image_encoding online: one folder for all caches, or "
        "one for each of --dataset_dir and then of --prior_dataset_dir; by default that of the cache. Images of "
        "--input_dir are known.",
        check=_check_online,
    )
    random_crop: bool = option(
        False,
        "Show each image of training, in each epoch, through a window of its bucket's size at a random place; by "
        "default the centre, as --center_crop of diffusers' scripts. Held-out images always show the centre.",
        check=_check_online,
    )
    crop_from: str = option(
        "resized",
        "Source of --random_crop: resized, the image resized until it covers its bucket, as kohya's and "
        "diffusers' scripts; original, its own pixels, as torchvision's RandomCrop, unless they are too few.",
        choices=CROP_FROM,
        check=_check_crop_from,
    )
    random_flip: bool = option(
        False,
        "Mirror half of the images of training, drawn anew each epoch. Mirrored letters cannot be read, and captions "
        "that say left or right become wrong: not for figures with text.",
        check=_check_online,
    )
    input_dir: str | None = option(
        None,
        "Folder of captioned images, or a data set; a cache is built from it first in `--dataset_dir` (by default "
        "<output_dir>/cache). Samples of an earlier run are not built again.",
        check=_check_input,
    )
    payload: str = option(
        "shards",
        "Layout of that cache: shards (each distinct prompt's embeddings once), inline (streams) or npz.",
        choices=PAYLOADS,
    )
    caption_column: str = option("caption", "Column of `--input_dir` with the captions.")
    split: str | None = option(
        None,
        "Split of `--input_dir` to take: a name, several as in train+validation, or all; by default train, or the only "
        "one.",
    )
    row_filter: list[str] = option(
        [],
        "Conditions that a row must meet, by the columns of `--input_dir` or of the index: column=value, "
        "column=value,other, column>=number, column<=number, such as quality_tier=High is_tikz=false. The value none "
        "stands for rows without one.",
        check=_check_row_filter,
    )
    source_dir: list[str] = option(
        [],
        "Folders with a reference image for each image of `--input_dir`, of the same file name; the first holds source "
        "0. With it a row is an edit: image, instruction, source.",
        check=_check_sources,
    )
    source_column: list[str] = option(
        [],
        "Columns of `--input_dir` with reference images; by default `source_image`, where there is one.",
        check=_check_sources,
    )
    edit_masks: str = option(
        "given",
        "computed: where an edit has no mask of its changed region (`edit_mask`, `edit_bboxes`), take what differs "
        "between the image and its first source, if that has its size.",
        choices=EDIT_MASKS,
        check=_check_sources,
    )
    resolution: int = option(
        1024,
        "Images are resized to about resolution x resolution pixels, in aspect-ratio buckets; small ones to a half, a "
        "quarter, ... of that.",
        within="[1, inf)",
    )
    buckets: str = option(
        BUCKETS[0],
        "Sizes of images from `--input_dir`: resolution, of about its area, in steps of 1/16 of the side; "
        "equal_tokens, of one number of tokens, so that compiled blocks and memory see one length; given, those in the "
        "columns `bucket_w` and `bucket_h` of each row, as in SciForma's data.",
        choices=BUCKETS,
        check=_check_shapes,
    )
    max_aspect_ratio: float = option(
        MAX_ASPECT_RATIO,
        "Longest side over shortest of those sizes.",
        within="[1, 4]",
        check=_check_shapes,
    )
    fit: str = option(
        FITS[0],
        "How an image of `--input_dir` is brought to such a size: cut, it loses the excess at two edges; pad, it "
        "stays complete, with the colour of its page around it, where there is no loss.",
        choices=FITS,
        check=_check_fit,
    )
    enlarge: bool = option(False, "Also bring small images of `--input_dir` to about resolution x resolution pixels.")
    encode_batch_size: int = option(1, "Images encoded at once for the cache.", within="[1, inf)")
    text_batch_size: int = option(
        8, "Prompts encoded at once for the cache; each takes memory of the text encoder.", within="[1, inf)"
    )
    strict: bool = option(False, "Stop at an image of `--input_dir` that cannot be used instead of skipping it.")
    eval_fraction: float = option(
        0.05,
        "Share of the groups (`paper_id`, else the image) held out for eval_loss; by hash, so it never moves.",
        within="[0, 1)",
    )
    caption_dropout: float = option(0.0, "Share of samples trained with the empty prompt.", within="[0, 1)")
    source_dropout: float = option(
        0.0,
        "Share of the optimizer steps that train edits without their source images, as text-to-image.",
        within="[0, 1)",
    )
    prior_dataset_dir: str | None = option(
        None,
        "A cache for prior preservation (Ruiz et al. 2023): images of the general kind that the network shall not "
        "unlearn. An epoch draws as many of them as of the others; none is held out.",
        check=_check_prior,
    )
    prior_loss_weight: float = option(
        1.0,
        "The loss is the mean over the other samples + this x the mean over those of `--prior_dataset_dir`, as in the "
        "scripts of diffusers.",
        within="[0, inf)",
        check=_check_prior_weight,
    )
    max_train_samples: int | None = option(
        None,
        "Train on so many rows only, spread over the cache; for a first try.",
        within="[1, inf)",
        check=_check_max_train_samples,
    )
    streaming: bool = option(
        False, "Also read the index row by row, for caches on a Hub or in object storage; needs `--max_steps`."
    )
    shuffle_buffer: int = option(
        10_000, "Index rows that a stream holds to shuffle them; 0 keeps the order of the files.", within="[0, inf)"
    )
    remote_cache_dir: str | None = option(None, "Folder for copies of what is read from URLs; by default none.")
    remote_cache_gb: float = option(50.0, "Most gigabytes that `--remote_cache_dir` may take.", within="(0, inf)")

    def names(self) -> list[str]:
        """Names of the data for a model card: the last part of each folder."""
        return [Path(folder).resolve().name for folder in ([self.input_dir] if self.input_dir else self.dataset_dir)]
