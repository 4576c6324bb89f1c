"""The log of a run as a file of its own, which a page can follow between checkpoints."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import first_line
from ...files import atomic_file
from ...report.page_data import LOG_NAME

logger = logging.getLogger(__name__)


class LogCallback(TrainerCallback):
    """Writes each entry of the log as a line of `output_dir/log.jsonl`; a resumed run begins with those it resumes.

    A disk that cannot be written costs the file, not the run.
    """

    def __init__(self) -> None:
        self._writes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._writes = state.is_world_process_zero
        if self._writes:
            self._try(Path(args.output_dir) / LOG_NAME, state.log_history, anew=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._writes and state.log_history:
            self._try(Path(args.output_dir) / LOG_NAME, state.log_history[-1:])

    def _try(self, file: Path, entries: list[dict[str, Any]], *, anew: bool = False) -> None:
        text = "".join(f"{json.dumps(entry, default=str)}\n" for entry in entries)
        try:
            if anew:
                with atomic_file(file, durable=False) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            else:
                with file.open("a", encoding="utf-8") as log:
                    log.write(text)
        except OSError as error:
            self._writes = False
            logger.warning("%s is not written any further (%s).", file, first_line(error))
