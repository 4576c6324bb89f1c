"""The Hub: the access check before training, and the upload of what a user needs and nothing else."""

import json
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..errors import SciflowError, first_line
from ..report.model_card import MASK, RUN_FACTS_NAME, SECRET_VALUE, model_card, read_facts, save_card

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_WAITS = (2.0, 8.0, 30.0)  # seconds before the second, third and last try
SILENCE = 60.0
"""Seconds without a byte from the Hub after which a try has failed; the client alone would wait for ever."""

_CARD_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
_IMAGE = re.compile(r"(\w[\w -]*/)*\w[\w. -]*\.png")
_WEIGHTS = re.compile(
    r"pytorch_lora_weights\.safetensors|adapter_model\.safetensors|adapter_config\.json"
    r"|lora_(diffusers|kohya|comfy)\.safetensors"
    r"|model_index\.json|pipeline\.py|scheduler/scheduler_config\.json"  # of what is a pipeline by itself
    r"|(transformer|unet|vae)/(config\.json|[\w.-]+\.safetensors|[\w.-]+\.safetensors\.index\.json|modeling_\w+\.py)"
)


def publishable_files(folder: str | Path) -> list[str]:
    """The files of a run's folder that may go to the Hub, as sorted relative paths with "/".

    The adapter's files, the `transformer/` folder or the complete pipeline, the card, the images that the card shows,
    and the run facts. Not checkpoints, optimizer or trainer state, logs, arguments, or anything else that lies there.
    """
    folder = Path(folder)
    found = {p.relative_to(folder).as_posix() for p in folder.glob("*") if p.is_file()}
    parts = ("transformer", "unet", "vae", "scheduler")
    found |= {p.relative_to(folder).as_posix() for name in parts for p in folder.glob(f"{name}/*")}
    wanted = {path for path in found if _WEIGHTS.fullmatch(path) or path in ("README.md", RUN_FACTS_NAME)}
    if "README.md" in wanted:
        shown = map(unquote, _CARD_IMAGE.findall((folder / "README.md").read_text(encoding="utf-8")))
        wanted |= {path for path in shown if _IMAGE.fullmatch(path) and (folder / path).is_file()}
    inside = folder.resolve()
    return sorted(path for path in wanted if (folder / path).resolve().is_relative_to(inside))


def check_access(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    instead: str = "or train without `--push_to_hub` and push later",
) -> str:
    """Creates the repository unless it exists, and checks that this token may write there. Before training.

    Args:
        repo_id: `user/name`, or `name` in the token's own namespace.
        token: None takes the one of `hf auth login` or `HF_TOKEN`.
        private: for a new repository; None leaves it to the account's default.
        revision: branch that will be pushed to; it must exist.
        instead: what else the user can do, for the errors; "" for nothing.

    Returns:
        The full id, `user/name`.

    Raises:
        SciflowError: no token, no permission, no such branch, or no Hub after several tries.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SciflowError(
            f"`hub_model_id` {repo_id!r} is no repository id: use `user/name` or `name` of letters, digits, "
            "'-', '_' and '.', at most 96 characters."
        ) from error
    if token is None and huggingface_hub.get_token() is None:
        raise SciflowError(
            f"push to {repo_id!r}: there is no Hub token here. Run `hf auth login`, set `HF_TOKEN`, or pass "
            f"`--hub_token`{_ending(instead)}"
        )
    api = HfApi(token=token)

    def check() -> str:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # create_repo is content with a repository that exists, writable or not.
        api.auth_check(full_id, write=True)
        if revision is not None:
            api.repo_info(full_id, revision=revision)
        return full_id

    try:
        return _with_retries(check)
    except Exception as error:  # the Hub's HTTP client has errors of its own
        where = f"{repo_id!r}" + (f" (branch {revision!r})" if revision is not None else "")
        raise SciflowError(f"push to {where}: {_advice(error, instead)}") from error


def upload(
    repo_id: str,
    folder: str | Path,
    *,
    files: Iterable[str] | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload by sciflow_hf",
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Uploads `files` of `folder` in one commit.

    Args:
        repo_id: full id, as `check_access` returned it.
        files: relative paths; None takes `publishable_files(folder)`. Others are refused.
        run_as_future: return at once with a `Future`; a failure is logged when it happens and raised by its
            `result()`.

    Raises:
        SciflowError: a file that must not be published, nothing to publish, or the Hub refused; everything is
            still in `folder`, and the message has the command that pushes it later.
    """
    folder = Path(folder)
    chosen = {path: folder / path for path in _checked_files(folder, files, token)}
    branch = f" --hub_revision {shlex.quote(revision)}" if revision is not None else ""
    later = f"sciflow-hf push {shlex.quote(str(folder.resolve()))} --hub_model_id {shlex.quote(repo_id)}{branch}"
    push = _pusher(repo_id, chosen, token, revision, commit_message, f"{str(folder)!r}; push it later with: {later}")
    return _start(push) if run_as_future else push()


def upload_checkpoint(
    repo_id: str,
    folder: str | Path,
    path_in_repo: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload by sciflow_hf",
) -> Future[CommitInfo]:
    """Uploads every file of a checkpoint to a folder of the repository, in one commit, in the background.

    Its optimizer, random states and manifest go along, so that a download of `path_in_repo` can be resumed from.

    Raises:
        SciflowError: a file with a token inside.
    """
    folder = Path(folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _refuse_secrets(folder, files, token)
    chosen = {f"{path_in_repo}/{path}": folder / path for path in files}
    return _start(_pusher(repo_id, chosen, token, revision, commit_message, f"{str(folder)!r}."))


def push_folder(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Push of a finished run",
) -> CommitInfo:
    """Pushes the folder of a finished run: what `DiffusionTrainer.push_to_hub` would have pushed at its end.

    A card that names another repository, or none, is written again for this one, unless somebody edited it.

    Args:
        folder: `output_dir` of a run, or one of its checkpoints.
        repo_id: `user/name`, or `name` in the token's own namespace; None takes what the run's facts say.
        token, private, revision: as in `check_access`.

    Raises:
        SciflowError: no result in the folder, no name for the repository, or the Hub refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SciflowError(f"`output_dir` {str(folder)!r} is no folder: name the `--output_dir` of a finished run.")
    if not any(_WEIGHTS.fullmatch(path) and path.endswith(".safetensors") for path in publishable_files(folder)):
        unfinished = sorted((p.name for p in folder.glob("checkpoint-*")), key=lambda name: (len(name), name))
        advice = (
            f"only checkpoints ({unfinished[-1]}). Finish the run by its command line and "
            "`--resume_from_checkpoint latest`, or push that checkpoint's folder"
            if unfinished
            else "no weights of an adapter, a network or a pipeline. Name the `--output_dir` of a finished run"
        )
        raise SciflowError(f"`output_dir` {str(folder)!r} holds no result to push, {advice}.")
    facts = read_facts(folder)
    name = repo_id or (facts.repo_name if facts else None)
    if name is None:
        raise SciflowError(f"`hub_model_id` is missing: {str(folder)!r} has no {RUN_FACTS_NAME} that names the run.")
    full_id = check_access(name, token=token, private=private, revision=revision, instead="")
    card = folder / "README.md"
    if facts and facts.repo_name != full_id:
        as_written = card.is_file() and card.read_text(encoding="utf-8") == str(model_card(facts))
        facts.repo_name = full_id
        if as_written:
            save_card(facts, folder)
        else:
            logger.warning("%s was edited and is pushed as it is: see that it names %s.", card, full_id)
    done = upload(full_id, folder, token=token, revision=revision, commit_message=commit_message)
    return cast(CommitInfo, done)


def _pusher(
    repo_id: str, files: dict[str, Path], token: str | None, revision: str | None, message: str, on_disk: str
) -> Callable[[], CommitInfo]:
    """A function that commits `files` (path in the repository -> file), and says where they are if it cannot."""
    api = HfApi(token=token)

    def commit() -> CommitInfo:
        # Made anew for every try: the client marks operations that it has used.
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)

    def push() -> CommitInfo:
        try:
            return _with_retries(commit)
        except Exception as error:  # the Hub's HTTP client has errors of its own
            raise SciflowError(
                f"push to {repo_id!r}: {_advice(error)} Nothing is lost, everything is on disk in {on_disk}"
            ) from error

    return push


def _start(push: Callable[[], CommitInfo]) -> Future[CommitInfo]:
    """`push` in the background, after those before it; a failure is logged when it happens."""
    future = huggingface_hub.run_as_future(push)
    future.add_done_callback(_log_failure)
    return future


def _checked_files(folder: Path, files: Iterable[str] | None, token: str | None) -> list[str]:
    """The files to upload, all of them publishable and none with a token inside."""
    allowed = publishable_files(folder)
    chosen = allowed if files is None else sorted(set(files))
    refused = sorted(set(chosen) - set(allowed))
    if refused:
        raise SciflowError(
            f"`files` {refused} of {str(folder)!r} do not exist or are not for the Hub; allowed there: {allowed}."
        )
    if not any(_WEIGHTS.fullmatch(path) for path in chosen):
        raise SciflowError(f"{str(folder)!r} holds no weights to push, only {chosen}: save the model first.")
    _refuse_secrets(folder, chosen, token)
    return chosen


def _refuse_secrets(folder: Path, files: Iterable[str], token: str | None) -> None:
    secrets = (token, huggingface_hub.get_token())
    for path in (p for p in files if p.endswith((".md", ".json"))):
        text = (folder / path).read_text(encoding="utf-8")
        if SECRET_VALUE.search(text) or any(secret and secret in text for secret in secrets):
            raise SciflowError(f"{str(folder / path)!r} contains an access token: remove it before pushing.")


def _log_failure(future: Future[CommitInfo]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.warning("%s", future.exception())


def _with_retries(call: Callable[[], T]) -> T:
    """`call()`, tried again after `RETRY_WAITS` where the Hub or the line to it is down."""
    for wait in RETRY_WAITS:
        _limit_silence()
        try:
            return call()
        except Exception as error:  # raised again where it is no trouble of the line
            if not (_is_server_trouble(error) or _is_connection_trouble(error)):
                raise
            logger.warning("Hub: %s; trying again in %g s", _masked(error), wait)
            time.sleep(wait)
    _limit_silence()
    return call()


def _limit_silence() -> None:
    """Sets `SILENCE` on the client that all calls share, unless the user's own client has a limit."""
    client = huggingface_hub.get_session()
    if client.timeout.read is None:
        client.timeout = SILENCE


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_server_trouble(error: Exception) -> bool:
    """5xx, too many requests, or an error page where the client expected JSON."""
    status = _status(error) or 0
    return isinstance(error, json.JSONDecodeError) or status >= 500 or status in (408, 429)


def _is_connection_trouble(error: Exception) -> bool:
    """Compared by class name, because huggingface_hub 1 and 2 raise them from different packages."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or "TransportError" in names


def _masked(error: Exception) -> str:
    """Its first line without secrets."""
    return SECRET_VALUE.sub(MASK, first_line(error))


def _advice(error: Exception, instead: str = "") -> str:
    """The cause and the fix, by the status that the Hub answered."""
    status = _status(error)
    if status == 401:
        text = "the Hub does not accept the token (401). Run `hf auth login`, or pass a valid `--hub_token`"
    elif status == 403:
        text = (
            "the token may not write there (403). Take a namespace of your own or an organisation where you "
            "may write (`--hub_model_id`), and a token that may write (`hf auth login` or `--hub_token`)"
        )
    elif status == 404:
        text = "the Hub knows no such repository or branch (404). Check `--hub_model_id` and `--hub_revision`"
    elif status == 409:
        text = (
            "conflict (409), somebody else is changing this repository. Try again in a minute, or take "
            "another `--hub_model_id`"
        )
    elif _is_server_trouble(error):
        text = f"the Hub is out of order ({status}, tried {len(RETRY_WAITS) + 1} times). Try again later"
    elif isinstance(error, OfflineModeIsEnabled):
        text = "the Hub client is offline. Unset `HF_HUB_OFFLINE`"
    elif _is_connection_trouble(error):
        text = (
            f"no connection to the Hub ({_masked(error)}, tried {len(RETRY_WAITS) + 1} times). Check the "
            "network, `HF_ENDPOINT` and the proxy settings"
        )
    else:
        text = f"{_masked(error)} ({type(error).__name__}). Mend this and try again"
    return text + _ending(instead)


def _ending(instead: str) -> str:
    return f", {instead}." if instead else "."
