"""Experiment trackers: W&B gets the project of `--project`, and without a login logs offline."""

import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def prepare_wandb(args: TrainingArguments) -> None:
    """Without a login W&B would stop the run and ask: log offline instead, and say so.

    Its callback in transformers (5.23) takes the project from the environment and passes over `--project`.
    """
    if "wandb" not in args.report_to:
        return
    if args.project != TrainingArguments.project:
        os.environ["WANDB_PROJECT"] = args.project
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not _has_wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning("No W&B login found: logging offline. Run `wandb login` before, or `wandb sync` afterwards.")


def _has_wandb_login() -> bool:
    """Where `wandb login` and its documentation put credentials; asking wandb itself would fix its settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [Path(os.environ.get("NETRC", "~/.netrc")).expanduser(), Path("~/_netrc").expanduser()]
    return any(file.is_file() and host in file.read_text(encoding="utf-8", errors="replace") for file in files)
