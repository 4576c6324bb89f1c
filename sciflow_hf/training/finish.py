"""The end of a run, the same for every recipe."""

import logging
import sys
from pathlib import Path

from ..errors import first_line
from ..report.page import write_page
from ..report.page_data import page_of
from ..report.summary import summary
from .run_lock import hold, let_go
from .trainer import DiffusionTrainer

logger = logging.getLogger(__name__)


def finish(trainer: DiffusionTrainer) -> None:
    """Evaluates on the held-out data, saves the weights, the model card and the page, and prints a summary of the run.

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
            _write_page(folder)
            sys.stdout.write(f"{summary(trainer)}\n")
    finally:
        let_go(folder)


def _write_page(folder: str | None) -> None:
    """`report.html`, which may fail: the run is saved."""
    try:
        write_page(page_of(Path(str(folder))), str(folder))
    except Exception as error:  # the run is saved, and a page can be written later
        logger.warning("report.html was not written (%s). Try `sciflow-hf page %s --write`.", first_line(error), folder)
