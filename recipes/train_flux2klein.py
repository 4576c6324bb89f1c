"""Fine-tune FLUX.2 klein base (4B, 9B) on figures: LoRA, DoRA, or all weights of the network.

The demo, on any CPU, nothing downloaded:
    python recipes/train_flux2klein.py --config recipes/configs/flux2klein_demo.yaml
Your own figures (a folder of images with metadata.jsonl or .txt captions):
    python recipes/train_flux2klein.py --config recipes/configs/flux2klein_9b_lora.yaml \
        --input_dir my_figures --dataset_dir my_cache --output_dir my_lora
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, layers, buckets, memory) or --debug_batch (ids, gradients of one batch).

Hardware: see the header of each file in recipes/configs.
"""

import sciflow_hf as sf


def main(family_class: type[sf.PipelineFamily] = sf.Flux2Klein, description: str | None = __doc__) -> None:
    family, data_args, adapter_args, args = sf.parse_args(
        family_class, sf.DataArguments, sf.AdapterArguments, sf.DiffusionTrainingArguments, description=description
    )
    train_dataset, eval_dataset = sf.prepare_data(data_args, family, args)
    sf.fit_memory(args, family, train_dataset, adapter_args)

    dtype = args.load_dtype(trained=adapter_args.no_adapter)
    model = family.load_model(dtype=dtype, meta=args.dry_run, quantize=args.quantize_base)
    model = sf.add_adapter(model, adapter_args, family=family, seed=args.seed)
    if args.dry_run:
        print(sf.plan(model, family, args, train_dataset, eval_dataset))
        return

    trainer = sf.DiffusionTrainer(
        model, args, family=family, train_dataset=train_dataset, eval_dataset=eval_dataset,
        caption_dropout=data_args.caption_dropout, source_dropout=data_args.source_dropout,
        dataset_names=data_args.names(),
    )  # fmt: skip
    if args.debug_batch:
        print(sf.debug_batch(trainer))
        return

    trainer.train()
    sf.finish(trainer)


if __name__ == "__main__":
    sf.run(main)
