"""From flags to tiles: the demo's images, the data of a run, and what the family must know of them."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SciflowError
from ..families.microscopy_unet import MicroscopyUNet
from ..images.microscopes import MicroscopyDataArguments, MicroscopyTiles, load_microscopy_images
from ..images.optics import ForwardModel
from .checkpoints import check_output_dir
from .prepare import DEMO

if TYPE_CHECKING:
    from .arguments import DiffusionTrainingArguments

logger = logging.getLogger(__name__)


def prepare_microscopy(
    data_args: MicroscopyDataArguments,
    optics: ForwardModel,
    family: MicroscopyUNet,
    args: "DiffusionTrainingArguments",
) -> tuple[MicroscopyTiles, MicroscopyTiles | None]:
    """The training and held-out tiles; tells `family` their channels, intensities and optics.

    With `input_dir` "demo" the images of scikit-image's wheel are written below `output_dir` first.

    Raises:
        SciflowError: see `load_microscopy_images`; a `tile_size` that the network cannot halve often enough.
    """
    from accelerate import PartialState

    device = args.device  # sets up the process group in the way of TrainingArguments
    state = PartialState()
    logger.debug("Training on %s.", device)
    if state.is_main_process:
        if not (args.dry_run or args.debug_batch):
            check_output_dir(args.output_dir, resume=args.resume_from_checkpoint, overwrite=args.overwrite_output_dir)
        if data_args.input_dir == DEMO:
            from ..demo.microscope_images import microscope_images

            microscope_images(Path(args.output_dir) / "demo")
    state.wait_for_everyone()
    if data_args.input_dir == DEMO:
        data_args.input_dir = str(Path(args.output_dir) / "demo")
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
