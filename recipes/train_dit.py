"""Train a class-conditional DiT from scratch: rectified flow or DDPM, on pixels or on the latents of a VAE.

scikit-learn's digits, on any CPU, nothing downloaded, about 10 minutes of processor time:
    python recipes/train_dit.py --config recipes/configs/dit_digits.yaml
CIFAR-10, one GPU:
    python recipes/train_dit.py --config recipes/configs/dit_cifar10.yaml
ImageNet at 256 pixels in the latents of Stable Diffusion's VAE:
    accelerate launch recipes/train_dit.py --config recipes/configs/dit_imagenet256.yaml --input_dir my_imagenet
Your own images, in one folder per class:
    python recipes/train_dit.py --input_dir my_images --image_size 64 --preset S --output_dir my_dit
First look: add --dry_run (options, buckets, memory) or --debug_batch (shapes, gradients of one batch).

The output folder is a pipeline: `sciflow-hf sample --model_path my_dit --output_dir drawn --num_images 16 --seed 0`,
or in Python `DiffusionPipeline.from_pretrained("my_dit", trust_remote_code=True)`, also without this package.
"""

import sciflow_hf as sf


def main() -> None:
    family, data_args, metrics, args = sf.parse_args(
        sf.DiT,
        sf.ClassImageArguments,
        sf.SampleMetrics,
        sf.DiffusionTrainingArguments,
        description=__doc__,
    )
    train_dataset, eval_dataset = sf.prepare_class_images(data_args, family, args)
    sf.fit_memory(args, family, train_dataset)

    model = family.load_model(dtype=args.load_dtype(trained=True), meta=args.dry_run)
    if args.dry_run:
        print(sf.plan(model, family, args, train_dataset, eval_dataset))
        return

    trainer = sf.DiffusionTrainer(
        model, args, family=family, train_dataset=train_dataset, eval_dataset=eval_dataset,
        compute_metrics=metrics.of(family, model, train_dataset, eval_dataset, args), dataset_names=data_args.names(),
    )  # fmt: skip
    if args.debug_batch:
        print(sf.debug_batch(trainer))
        return

    trainer.train()
    sf.finish(trainer)


if __name__ == "__main__":
    sf.run(main)
