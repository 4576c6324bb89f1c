"""Fine-tune a text-to-image or editing model on comparisons of figures: Diffusion-DPO, or M-DPO with several axes.

Your own comparisons, a cache with a row a candidate (`group_id`, `reward`; or `role`), of FLUX.2 klein:
    python recipes/train_dpo.py --family flux2_klein --config recipes/configs/flux2klein_9b_dpo.yaml \
        --dataset_dir my_candidates_cache --output_dir my_preferred_lora
Candidates are drawn by `sciflow-hf prefer draw`, scored by `prefer score` and built by `sciflow-hf cache build`.
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, layers, buckets, memory) or --debug_batch (shapes, gradients of one batch).

Hardware: see the header of each file in recipes/configs.
"""

import sciflow_hf as sf


def main() -> None:
    _, family, data_args, tuple_args, adapter_args, args = sf.parse_args(
        sf.FamilyArguments, sf.chosen_family(), sf.DataArguments, sf.TupleArguments, sf.AdapterArguments,
        sf.PreferenceTrainingArguments, description=__doc__,
    )  # fmt: skip
    train_dataset, eval_dataset = sf.prepare_groups(data_args, tuple_args, family, args)
    sf.fit_memory(args, family, train_dataset, adapter_args)

    dtype = args.load_dtype(trained=adapter_args.no_adapter)
    model = family.load_model(dtype=dtype, meta=args.dry_run, quantize=args.quantize_base)
    model = sf.add_adapter(model, adapter_args, family=family, seed=args.seed)
    if args.dry_run:
        print(sf.plan(model, family, args, train_dataset, eval_dataset))
        return

    trainer = sf.DiffusionDPOTrainer(
        model, args, family=family, train_dataset=train_dataset, eval_dataset=eval_dataset,
        reference_model=sf.load_reference(family, args, trained=adapter_args.no_adapter),
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
