"""The end of a run, the same for every recipe."""

import sys

from ..report.summary import summary
from .run_lock import hold, let_go
from .trainer import DiffusionTrainer


def finish(trainer: DiffusionTrainer) -> None:
    """Evaluates on the held-out data, saves the weights and the model card, and prints a summary of the run.

    With `--push_to_hub`, weights and card are also published. The folder is held until then, see `run_lock`.

    Args:
        trainer: after `train()`.
    """
    folder = trainer.args.output_dir
    if trainer.is_world_process_zero():
        hold(folder)
    try:
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()  # saves and writes the card
        else:
            trainer.save_model()
            trainer.create_model_card()
        if trainer.is_world_process_zero():
            sys.stdout.write(f"{summary(trainer)}\n")
    finally:
        let_go(folder)
