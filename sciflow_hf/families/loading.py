"""Loading published weights: where their parts are, errors that say what to do, and no progress bars."""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ..errors import SciflowError, first_line

MINI_KLEIN = "mini_klein"
PIPELINE = "pretrained_model_name_or_path"
SINGLE_FILE = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
START = "init_weights"
_NAMED = 3  # weights, in messages
_SAMPLED = 256  # blocks of a file


def model_source(name_or_path: str) -> str:
    """Where the parts of a model are loaded from: the package's own folder for `mini_klein`, else what was given."""
    return str(Path(__file__).parents[1] / "assets" / MINI_KLEIN) if name_or_path == MINI_KLEIN else name_or_path


@dataclass(frozen=True)
class Place:
    """Where one part of a pipeline is.

    Attributes:
        part: its name in the pipeline ("vae"); "" is the pipeline itself.
        path: a folder or Hub repository, or a single safetensors file.
        subfolder: of it; "" where that is the part alone.
        revision: branch, tag or commit of the repository.
        option: that names the path.
    """

    part: str
    path: str
    subfolder: str = ""
    revision: str | None = None
    option: str = PIPELINE

    @property
    def is_file(self) -> bool:
        return self.path.endswith(SINGLE_FILE)

    @property
    def source(self) -> str:
        return model_source(self.path)

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` behind the path."""
        return {"revision": self.revision} | ({"subfolder": self.subfolder} if self.subfolder else {})

    @functools.cached_property
    def identity(self) -> str:
        """Identity for caches: for a file its name and a hash of its size and of blocks of it."""
        if not self.is_file:
            return self.path
        size = os.path.getsize(self.path)
        digest = hashlib.sha256(f"{size}".encode())
        with open(self.path, "rb") as file:
            for start in range(0, size, max(size // _SAMPLED, 1 << 16)):
                file.seek(start)
                digest.update(file.read(1 << 16))
        return f"{Path(self.path).name}#{digest.hexdigest()[:8]}"

    @property
    def name(self) -> str:
        """`identity`, the same wherever a folder lies."""
        return Path(self.path).name if os.path.isdir(self.path) else self.identity


def place_of(part: str, path: str, option: str) -> Place:
    """The place of a part with a path of its own: of a pipeline that is the subfolder of its name.

    Raises:
        SciflowError: a file that is missing or of another kind.
    """
    if path.endswith(SINGLE_FILE) or os.path.isfile(path):
        if not path.endswith(SINGLE_FILE) or not os.path.isfile(path):
            what = "is no safetensors file, and no other is read" if os.path.isfile(path) else "is no file here"
            raise SciflowError(
                f"`{option}` {path!r} {what}. Give a folder, a Hub repository, or a single {SINGLE_FILE} file (`hf "
                "download` fetches one from a repository)."
            )
        return Place(part, path, option=option)
    from transformers.utils import cached_file

    with explain_loading(path, part, option):
        # Without a network a part that is in the Hub's cache is taken to be the part alone.
        lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        index = cached_file(model_source(path), "model_index.json", **lenient)
    return Place(part, path, part if index is not None else "", option=option)


def start_place(part: str, path: str) -> Place:
    """Where the weights of a network to start from are: as `place_of`, or in a run's folder, below the part's name.

    Raises:
        SciflowError: as `place_of`; pickles, of which none is opened.
    """
    folder = Path(path)
    of_run = (folder / part / "config.json").is_file() and not (folder / "model_index.json").is_file()
    if of_run and not (folder / "config.json").is_file():
        place = Place(part, path, part, option=START)
    else:
        found = [folder] if folder.is_file() or not folder.is_dir() else list(folder.rglob("*"))
        pickles = sorted(file for file in found if file.suffix in PICKLES)
        if pickles and not any(file.suffix == SINGLE_FILE for file in found):
            raise SciflowError(
                f"`{START}` {path!r}: {pickles[0].name} is a pickle, and none is opened, since that can run code. "
                "Convert it on the machine that made it, next to its network: `names = [name for name, _ in "
                "network.named_parameters()]; safetensors.torch.save_file(dict(zip(names, tensors, strict=True)), "
                "'network.safetensors')`, where the tensors have no names, as averages (EMA) are often kept "
                "(docs/families.md). Then give network.safetensors."
            )
        place = place_of(part, path, START)
    return place


def read_config(place: Place) -> dict[str, Any]:
    """The configuration of one part of a pipeline ("vae", "transformer", "scheduler"), or of the pipeline itself."""
    from diffusers import ConfigMixin

    with explain_loading(place.path, f"{place.part or 'pipeline'} configuration", place.option):
        names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
        reader: Any = type("Reader", (ConfigMixin,), {"config_name": names.get(place.part, "config.json")})
        found: dict[str, Any] = reader.load_config(place.source, **place.where)
        return found


def part_class(index: dict[str, Any], part: str) -> Any:
    """The class of a part of diffusers or transformers, as `model_index.json` has it; None for none."""
    library, kind = index.get(part) or ("", None)
    return None if kind is None else getattr(importlib.import_module(library), kind)


def check_part(place: Place, config: dict[str, Any], kind: Any) -> None:
    """Raises SciflowError where a part with a path of its own is of another kind than the pipeline's."""
    wanted, found = kind.__name__, config.get("_class_name")
    if of := getattr(kind, "config_class", None):  # of transformers, where a larger model may hold it
        wanted, found = of.model_type, config.get("model_type")
        found = wanted if of.base_config_key and of.base_config_key in config else found
    if found != wanted:
        found = found or config.get("_class_name") or config.get("model_type") or "no part of a pipeline"
        raise SciflowError(
            f"`{place.option}` {place.path!r} holds {found}, but the {place.part} of this pipeline is {wanted}."
        )


def load_part(kind: Any, place: Place, base: Place, *, dtype: torch.dtype, **options: Any) -> Any:
    """One part of a pipeline.

    A file that is not in the layout of diffusers or transformers is read by diffusers' `from_single_file`, where that
    knows the kind of part.

    Args:
        kind: its class, of diffusers or transformers.
        place: where its weights are.
        base: where its configuration is, if `place` is a file.
        options: of `from_pretrained`.

    Raises:
        SciflowError: it cannot be loaded, or some of its weights are missing.
    """
    with explain_loading(place.path, place.part, place.option):
        if place.option == START and place.is_file:
            _check_names(place, kind, base)
        if place.is_file:
            return _load_file(kind, place, base, dtype=dtype, **options)
        if place.option == PIPELINE:
            return kind.from_pretrained(place.source, dtype=dtype, **place.where, **options)
        given = {"dtype": dtype, "output_loading_info": True, **place.where, **options}
        given |= {"use_safetensors": True} if place.option == START else {}
        module, info = kind.from_pretrained(place.source, **given)
        if place.option == START:
            _check_start(place, kind, missing=info["missing_keys"], unknown=info["unexpected_keys"])
        _check_complete(place, kind, info["missing_keys"])
        return module


def describe_part(place: Place, kind: Any) -> dict[str, Any]:
    """Facts to load a part with its own path; see `CardFacts.parts`."""
    found = {"part": place.part, "option": place.option, "path": place.path, "subfolder": place.subfolder}
    found |= {"library": kind.__module__.partition(".")[0], "kind": kind.__name__}
    return found | {"single_file": place.is_file and _reads_single_file(kind)}


def _reads_single_file(kind: Any) -> bool:
    """Whether diffusers' `from_single_file` knows the published files of this kind of part."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return any(parent.__name__ in SINGLE_FILE_LOADABLE_CLASSES for parent in kind.__mro__)


def _load_file(kind: Any, place: Place, base: Place, *, dtype: torch.dtype, **options: Any) -> Any:
    from safetensors.torch import load_file

    if hasattr(kind, "config_class"):
        given: dict[str, Any] = {"config": kind.config_class.from_pretrained(base.source, **base.where), **options}
        given |= {"state_dict": load_file(place.path), "dtype": dtype, "output_loading_info": True}
        module, info = kind.from_pretrained(None, **given)
        _check_complete(place, kind, info["missing_keys"])
        return module
    if _reads_single_file(kind):
        given = {"config": base.source, "subfolder": base.subfolder, "config_revision": base.revision}
        try:
            return kind.from_single_file(place.path, dtype=dtype, **given, **options)
        except NotImplementedError as error:  # weights that are not there cannot be moved
            raise SciflowError(
                f"`{place.option}` {place.path!r} lacks weights of a {kind.__name__}. Is it of another model, or "
                "another part?"
            ) from error
    module, state = kind.from_config(kind.load_config(base.source, **base.where)), load_file(place.path)
    _check_complete(place, kind, module.state_dict().keys() - state.keys())
    module.load_state_dict(state, strict=False)
    return module.to(dtype).eval()


def _check_names(place: Place, kind: Any, base: Place) -> None:
    """Compares the names and shapes in a file with those of the network; not those of a published single file."""
    from safetensors import safe_open

    with safe_open(place.path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(p.shape) for name, p in empty_part(kind, base, read_config(base)).state_dict().items()}
    ends = {name.partition(".")[2] for name in found}  # without a wrapper's name, such as "module"
    if wanted.keys().isdisjoint(ends.union(found)) and _reads_single_file(kind) and not _is_adapter(found):
        return
    shapes = [f"{n!r} {found[n]}, here {wanted[n]}" for n in sorted(wanted.keys() & found) if wanted[n] != found[n]]
    _check_start(place, kind, missing=wanted.keys() - found.keys(), unknown=found.keys() - wanted.keys(), shapes=shapes)


def _is_adapter(names: Iterable[str]) -> bool:
    return any(".lora" in name for name in names)


def _check_start(
    place: Place, kind: Any, *, missing: Collection[str], unknown: Collection[str], shapes: Sequence[str] = ()
) -> None:
    """Raises SciflowError where weights to start from are not exactly those of the network."""
    absent, odd_names = ([f"{name!r}" for name in sorted(names)] for names in (missing, unknown))
    odd = {"lacks": absent, "holds, unknown here,": odd_names, "holds in another shape": list(shapes)}
    listed = [
        f"{what} {', '.join(names[:_NAMED])}" + f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)
        for what, names in odd.items()
        if names
    ]
    if listed:
        adapter = " It is an adapter: continue it by `--adapter_path`." * _is_adapter(unknown)
        raise SciflowError(
            f"`{START}` {place.path!r} does not fit this {kind.__name__}: it {'; it '.join(listed)}.{adapter} Give all "
            "weights of the same network, under the names of diffusers."
        )


def _check_complete(place: Place, kind: Any, missing: Collection[str]) -> None:
    missing = sorted(name for name in missing if not name.startswith("lm_head"))  # which nothing reads
    if missing:
        raise SciflowError(
            f"`{place.option}` {place.path!r} lacks {len(missing)} weights of a {kind.__name__}, the first "
            f"{missing[0]!r}. Give a folder, a Hub repository or a {SINGLE_FILE} file in the layout of "
            f"{kind.__module__.partition('.')[0]}, which reads no other of this part."
        )


def empty_part(kind: Any, place: Place, config: dict[str, Any]) -> torch.nn.Module:
    """One part without weights, on the meta device; `config` is its configuration, in `place`."""
    of = getattr(kind, "config_class", None)
    made = config if of is None else of.from_pretrained(place.source, **place.where)
    with torch.device("meta"):
        empty: torch.nn.Module = kind.from_config(made) if of is None else kind(made)
    return empty


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
def explain_loading(path: str, what: str, option: str = PIPELINE) -> Iterator[None]:
    """Turns the many errors of a missing or gated repository into one that says what to do."""
    try:
        yield
    except SciflowError:
        raise
    except Exception as error:  # every layer below has errors of its own, the HTTP client's included
        if away := unreachable(error):
            raise SciflowError(f"`{option}` {path!r}: its {what} {away}") from error
        file = "" if option == PIPELINE else f", or a single {SINGLE_FILE} file of this part"
        raise SciflowError(
            f"`{option}` {path!r}: cannot load its {what} ({first_line(error)}). It must be a "
            f"folder or a Hub repository in diffusers layout{file}; for a gated one accept its licence and run "
            "`hf auth login`."
        ) from error


def unreachable(error: BaseException) -> str:
    """The message if the Hub gave no answer, which diffusers calls a missing file; "" for another error."""
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
