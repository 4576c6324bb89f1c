"""Loading published weights: their configurations, errors that say what to do, and no progress bars."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ..errors import SciflowError, first_line

MINI_KLEIN = "mini_klein"


def model_source(name_or_path: str) -> str:
    """Where the parts of a model are loaded from: the package's own folder for `mini_klein`, else what was given."""
    return str(Path(__file__).parents[1] / "assets" / MINI_KLEIN) if name_or_path == MINI_KLEIN else name_or_path


def read_config(path: str, part: str = "", *, revision: str | None = None) -> dict[str, Any]:
    """The configuration of one part of a pipeline ("vae", "transformer", "scheduler"), or of the pipeline itself."""
    from diffusers import ConfigMixin

    with explain_loading(path, f"{part or 'pipeline'} configuration"):
        names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
        reader: Any = type("Reader", (ConfigMixin,), {"config_name": names.get(part, "config.json")})
        found: dict[str, Any] = reader.load_config(model_source(path), subfolder=part or None, revision=revision)
        return found


def check_kind(path: str, found: str, *, family: str, network: str) -> None:
    """Raises SciflowError where a checkpoint's network, of class `found`, is another than `family` trains."""
    if found != network:
        raise SciflowError(
            f"`pretrained_model_name_or_path` {path!r} holds a {found}, but `{family}` trains a {network}. Take the "
            "family of that model."
        )


def refuse_code(path: str, index: dict[str, Any], *, revision: str | None) -> None:
    """Raises SciflowError where a model folder asks for code of its own, which loading it would run.

    That is a class in `model_index.json` which is neither of diffusers nor of transformers, or an `auto_map` in the
    configuration of a part. Of a Hub repository these configurations are fetched, which loading needs anyway.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list | tuple) and value[0] is not None}
    found = [f"{file} has an `auto_map`" for file in _auto_maps(path, parts, revision)]
    for name, (library, kind) in parts.items():
        if library not in ("diffusers", "transformers") and not _of_diffusers(library):
            found.append(f"model_index.json has {library}.{kind} as {name}")
    if found:
        raise SciflowError(
            f"`pretrained_model_name_or_path` {path!r} asks for code of its own: {'; '.join(found)}. Nothing of it was "
            "run. Read that code, and where you trust it, add `--trust_remote_code`."
        )


def _of_diffusers(library: str) -> bool:
    """Whether `library` is a package of diffusers' pipelines, such as "stable_diffusion"."""
    return library.isidentifier() and importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None


def _auto_maps(path: str, parts: dict[str, Any], revision: str | None) -> Iterator[str]:
    """Configurations of the parts that send transformers' `Auto` classes to code in the folder."""
    from transformers.utils import cached_file

    for name, (library, kind) in parts.items():
        if library != "transformers":
            continue
        names = ["tokenizer_config.json" if "Tokenizer" in kind else "config.json"]
        names = ["processor_config.json", "preprocessor_config.json"] if "Processor" in kind else names
        for file in names:
            with explain_loading(path, f"{name} configuration"):
                where = {"subfolder": name, "revision": revision}
                local = cached_file(model_source(path), file, _raise_exceptions_for_missing_entries=False, **where)
                if local is not None and "auto_map" in json.loads(Path(local).read_text(encoding="utf-8")):
                    yield f"{name}/{file}"


@contextmanager
def explain_loading(path: str, what: str) -> Iterator[None]:
    """Turns the many errors of a missing or gated repository into one that says what to do."""
    try:
        yield
    except Exception as error:  # every layer below has errors of its own, the HTTP client's included
        if away := unreachable(error):
            raise SciflowError(f"`pretrained_model_name_or_path` {path!r}: its {what} {away}") from error
        raise SciflowError(
            f"`pretrained_model_name_or_path` {path!r}: cannot load its {what} ({first_line(error)}). It must be a "
            "folder or a Hub repository in diffusers layout; for a gated one accept its licence and run "
            "`hf auth login`."
        ) from error


def unreachable(error: BaseException) -> str:
    """What to say where the Hub gave no answer, which diffusers calls a missing file; "" for another error."""
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, LocalEntryNotFoundError):
        reason = reason.__cause__ or reason.__context__
    if reason is None:
        return ""
    return (
        f"is not on this machine, and the Hub cannot be reached ({first_line(reason.__cause__ or reason)}). Check the "
        "network, `HF_ENDPOINT` and the proxy settings, or fetch it with `hf download` where there is a network."
    )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of diffusers for a while: validation loads a small VAE again and again."""
    from diffusers.utils import logging as diffusers_logging

    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def vae_config(path: str, **where: Any) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL`; `where`: subfolder, revision."""
    from diffusers import AutoencoderKL

    with explain_loading(path, "VAE configuration"):
        return dict(AutoencoderKL.load_config(path, **where))


def load_vae(path: str, *, dtype: Any = None, **where: Any) -> Any:
    """An `AutoencoderKL`, frozen, in evaluation mode; float32 unless given."""
    from diffusers import AutoencoderKL

    with explain_loading(path, "VAE"), quiet_loading():
        vae = AutoencoderKL.from_pretrained(path, torch_dtype=dtype or torch.float32, **where)
        return vae.requires_grad_(False).eval()
