"""Let a text-to-image model learn from rewards of the figures that it draws itself: DiffusionNFT.

Your own prompts, a file with one a line, of FLUX.2 klein, with the texts in their quotes to be readable (extra `ocr`):
    python recipes/train_reward.py --family flux2_klein --config recipes/configs/flux2klein_9b_ocr_reward.yaml \
        --prompts_file my_prompts.txt --output_dir my_readable_lora
A reward of your own is a function, named by its dotted path: PYTHONPATH=. ... --reward_funcs my_rewards.bright
Several GPUs: put `accelerate launch` (or `torchrun --nproc_per_node N`) instead of `python`.
First look: add --dry_run (options, layers, steps, memory) or --debug_batch (draws a rollout; gradients of one batch).

Hardware: see the header of each file in recipes/configs.
"""

import sciflow_hf as sf


def main() -> None:
    _, family, prompt_args, adapter_args, args = sf.parse_args(
        sf.FamilyArguments, sf.chosen_family(), sf.PromptArguments, sf.AdapterArguments, sf.RewardTrainingArguments,
        description=__doc__,
    )  # fmt: skip
    train_prompts, eval_prompts = sf.prepare_prompts(prompt_args, family, args)
    sf.fit_memory(args, family, train_prompts, adapter_args)

    model = family.load_model(dtype=args.load_dtype(trained=False), meta=args.dry_run, quantize=args.quantize_base)
    model = sf.add_adapter(model, adapter_args, family=family, seed=args.seed)
    if args.dry_run:
        print(sf.plan(model, family, args, train_prompts, eval_prompts))
        return

    trainer = sf.DiffusionRewardTrainer(
        model, args, family=family, train_dataset=train_prompts, eval_dataset=eval_prompts,
        dataset_names=[str(prompt_args.prompts_file)],
    )  # fmt: skip
    if args.debug_batch:
        print(sf.debug_batch(trainer))
        return

    trainer.train()
    sf.finish(trainer)


if __name__ == "__main__":
    sf.run(main)
