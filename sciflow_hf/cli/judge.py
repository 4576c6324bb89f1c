"""The options of the judge as flags of commands: those of `JudgeArguments`, which checks them."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import SciflowError

if TYPE_CHECKING:
    from ..metrics.judge.judge import Judge

# Written out, because `--help` must not import transformers, which `JudgeArguments` needs; a test compares them.
_FLAGS: dict[str, tuple[type, str]] = {
    "judge_backend": (str, "endpoint: an OpenAI-compatible server; local: a model by transformers (default endpoint)"),
    "judge_url": (str, "address of the server, up to /v1 (default: the variable SCIFLOW_JUDGE_URL)"),
    "judge_model": (str, "its model; folder or Hub name of a local one (default: the variable SCIFLOW_JUDGE_MODEL)"),
    "judge_key_env": (str, "environment variable that holds the server's key (default SCIFLOW_JUDGE_KEY)"),
    "judge_timeout": (float, "seconds until a call is given up and tried again (default 120)"),
    "judge_parallel": (int, "calls to the server at the same time (default 8)"),
    "max_calls": (int, "most calls, repeated ones included (default: no limit)"),
    "rubric": (str, "YAML file with the texts of the judge (default: those of the package)"),
    "scoring": (str, "complete: leave a failed axis out; published: count it as free of errors (default complete)"),
    "judge_cache_dir": (str, "folder of the answers (default: sciflow_hf/judge in HF_HOME)"),
}


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the judge, in a group of their own."""
    group = parser.add_argument_group("the judge")
    for name, (kind, text) in _FLAGS.items():
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)


def judge_of(args: argparse.Namespace, rewards: Sequence[str]) -> "Judge | None":
    """The judge that the flags describe; None where none of the `rewards` asks one.

    Raises:
        SciflowError: a flag out of its range, or without a reward that asks the judge.
    """
    from ..metrics.rewards.base import asks_judge

    given: dict[str, Any] = {name: getattr(args, name) for name in _FLAGS if hasattr(args, name)}
    if not any(map(asks_judge, rewards)):
        if given:
            raise SciflowError(f"`{next(iter(given))}` is for the judge, whom no reward asks. Leave it out.")
        return None
    from ..metrics.judge.arguments import JudgeArguments
    from ..metrics.judge.judge import Judge

    return Judge(JudgeArguments(**given))
