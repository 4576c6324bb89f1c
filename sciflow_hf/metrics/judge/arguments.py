"""`JudgeArguments`: which model judges, and within what limits."""

import os
import re

from ...errors import SciflowError
from ...options import Options, arguments, option

BACKENDS = ("endpoint", "local")
SCORINGS = ("complete", "published")
KEY_ENV = "SCIFLOW_JUDGE_KEY"


def _check_key_env(args: "JudgeArguments") -> None:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", args.judge_key_env):  # perhaps the key itself, which is not repeated
        raise SciflowError(
            "`judge_key_env` is the name of an environment variable, in capitals, that holds the key, such as "
            f"{KEY_ENV}; never the key itself."
        )
    if args.judge_key_env != KEY_ENV and not os.environ.get(args.judge_key_env):
        raise SciflowError(f"`judge_key_env` {args.judge_key_env}: this environment variable is not set.")


@arguments
class JudgeArguments(Options):
    """Options of the judge, an image-text model that lists the errors of drawn figures."""

    heading = "Judge"

    judge_backend: str = option(
        "endpoint",
        "endpoint: an OpenAI-compatible server. local: an image-text model by transformers, on this machine.",
        choices=BACKENDS,
    )
    judge_url: str | None = option(
        None, "Address of the server, up to /v1; default: the environment variable SCIFLOW_JUDGE_URL."
    )
    judge_model: str | None = option(
        None,
        "Name of the model on the server; folder or Hub name of a local one. Default: the environment variable "
        "SCIFLOW_JUDGE_MODEL.",
    )
    judge_key_env: str = option(
        KEY_ENV,
        "Environment variable that holds the server's key, which is written nowhere; without it none is sent.",
        check=_check_key_env,
    )
    judge_timeout: float = option(120.0, "Seconds until a call is given up and tried again.", within="(0, inf)")
    judge_parallel: int = option(8, "Calls to the server at the same time.", within="[1, 256]")
    max_calls: int | None = option(
        None,
        "Most calls of this process, repeated ones included: more are refused before any is made.",
        within="[1, inf)",
    )
    rubric: str | None = option(None, "YAML file with the texts of the judge; default: those of the package.")
    scoring: str = option(
        "complete",
        "complete: an axis whose call failed is left out, and the row is called incomplete. published: it counts as "
        "free of errors, as in the published scorer of SciFormaBench.",
        choices=SCORINGS,
    )
    judge_cache_dir: str | None = option(
        None, "Folder of the answers, which are asked for once; default: sciflow_hf/judge in HF_HOME."
    )
