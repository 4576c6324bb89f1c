"""Train a conditional pixel DDPM that restores microscope images: from pairs, or from sharp images and optics.

The demo, on any CPU, real images of scikit-image's wheel, nothing downloaded:
    python recipes/train_microscopy.py --config recipes/configs/microscopy_demo.yaml
Sharp images of your own, measured ones made by the forward model:
    python recipes/train_microscopy.py --config recipes/configs/microscopy_2p.yaml \
        --input_dir my_images --output_dir my_model
Pairs (files of the same names): add --conditioning_dir my_measured_images
Restore a folder afterwards:
    sciflow-hf sample --model_path my_model --input_dir measured --output_dir restored
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, tiles, steps) or --debug_batch (shapes, gradients of one batch).

Hardware: see the header of each file in recipes/configs.
"""

import sciflow_hf as sf


def main() -> None:
    family, data_args, optics, stages, metrics, args = sf.parse_args(
        sf.MicroscopyUNet,
        sf.MicroscopyDataArguments,
        sf.ForwardModel,
        sf.ProgressiveResolution,
        sf.RestorationMetrics,
        sf.DiffusionTrainingArguments,
        description=__doc__,
    )
    train_dataset, eval_dataset = sf.prepare_microscopy(data_args, optics, family, args)
    sf.fit_memory(args, family, train_dataset)

    model = family.load_model(dtype=args.load_dtype(trained=True), meta=args.dry_run)
    if args.dry_run:
        print(sf.plan(model, family, args, train_dataset, eval_dataset))
        return

    trainer = sf.DiffusionTrainer(
        model, args, family=family, train_dataset=train_dataset, eval_dataset=eval_dataset,
        compute_metrics=metrics.of(family, model, eval_dataset), dataset_names=data_args.names(),
        callbacks=stages.callbacks(family, tile_size=data_args.tile_size),
    )  # fmt: skip
    if args.debug_batch:
        print(sf.debug_batch(trainer))
        return

    trainer.train()
    sf.finish(trainer)


if __name__ == "__main__":
    sf.run(main)
