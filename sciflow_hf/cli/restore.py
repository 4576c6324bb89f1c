"""`sciflow-hf sample --input_dir`: a folder of measured images, restored by a trained microscopy network."""

import argparse
import sys

from ..errors import SciflowError

RESTORATION_PIPELINE = "MicroscopyRestorationPipeline"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `sample` takes for restoration alone."""
    add = parser.add_argument_group("microscopy, with --input_dir").add_argument
    add("--input_dir", help="folder of measured images, each restored in its own format and type")
    add("--num_samples", type=int, default=8, help="drawn for each image, whose mean is written (default 8)")
    add("--save_std", action="store_true", help="also write their spread, <name>_std.tif in float32")
    add("--tile_size", type=int, help="pixels (default: that of the training)")
    add("--tile_overlap", type=int, help="pixels that tiles share (default: a quarter)")
    add("--cascade", type=int, nargs="+", default=[1], help="block sizes from coarse to fine, such as 4 2 1")
    add("--data_consistency", type=float, default=0.0, help="1 pulls samples to the measurement, by the optics")
    add("--timestep_spacing", default="quadratic", help="quadratic (default: more steps at little noise) or trailing")
    add("--self_ensemble", action="store_true", help="draw samples in the eight orientations of the image in turn")


def restore(args: argparse.Namespace) -> None:
    """Restores `args.input_dir` into `args.output_dir`."""
    import torch

    from ..families.microscopy_unet import MicroscopyUNet

    if not args.input_dir:
        raise SciflowError(f"`input_dir` is missing: {args.model_path!r} restores a folder of measured images.")
    for name in ("class_labels", "prompts", "guidance_scale", "height", "width"):
        if getattr(args, name):
            raise SciflowError(f"`{name}` does not go with a network that restores images: leave it out.")
    if args.num_samples < 1:
        raise SciflowError(f"`num_samples` {args.num_samples}: at least 1.")
    family = MicroscopyUNet(pretrained_model_name_or_path=args.model_path)
    pipeline = family.load_pipeline(family.load_model(dtype=torch.float32).eval(), device=args.device)
    pipeline.set_progress_bar_config(disable=False, desc="images")
    written = pipeline.restore_folder(
        args.input_dir,
        args.output_dir,
        num_samples=args.num_samples,
        save_std=args.save_std,
        num_inference_steps=args.num_inference_steps,
        sampler=args.sampler or "ddpm",
        seed=args.seed,
        batch_size=args.batch_size,
        tile_size=args.tile_size,
        tile_overlap=args.tile_overlap,
        cascade=args.cascade,
        data_consistency=args.data_consistency,
        self_ensemble=args.self_ensemble,
        timestep_spacing=args.timestep_spacing,
    )
    sys.stdout.write(f"{len(written)} images in {args.output_dir}\n")
