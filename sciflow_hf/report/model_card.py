"""The model card of a run: a YAML header that the Hub reads and a short text, made of measured facts only."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..adapters.arguments import PIPELINE_TYPES
from ..adapters.formats.names import PROGRAMS
from ..adapters.layers import option_text
from ..errors import SciflowError, printable
from ..files import atomic_file

RUN_FACTS_NAME = "run_facts.json"
MASK = "***"
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|(AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|(glpat|glrt|pypi|nvapi|pplx)-[\w-]{20,}|(npm|gsk|r8|sk_live|dckr_pat)_\w{20,}|xox[abprs]-[\w-]{20,}"
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}|eyJ[\w-]+\.eyJ[\w-]+\.[\w-]+"
    r"|(?<=sig=)[\w%+/-]{20,}|(?<=AccountKey=)[\w+/]{20,}|(?<=://)[^\s/:@]+:[^\s/@]+(?=@))"
)
"""Access tokens of the Hub, OpenAI and its like, AWS, GitHub, GitLab, Google, Slack, PyPI, npm and others; web tokens,
signatures and keys of Azure storage; names and passwords in a URL."""
_SECRET_KEY = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
_NEEDS = {"QwenImageEditPlusPipeline": "torchvision"}
"""Packages that a pipeline needs beyond those of diffusers."""
KINDS = {"eval_gain_edit": "edits", "eval_gain_generation": "figures drawn from text"}
"""The gain of each kind of rows, and what they are."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class CardFacts:
    """Facts of a run. Values that were not measured are absent.

    Args:
        repo_name: `user/name` on the Hub, or the bare name of the folder where nothing is pushed.
        family: name of the model family.
        base_model: Hub id or local folder of the base pipeline.
        pipeline_class: name of the diffusers pipeline that loads the result.
        weight_name: the adapter's file; None for full fine-tuning.
        component: name of the trained network in the pipeline.
        size_arguments: arguments of the pipeline's call that draw the size of most figures; by default their height and
            width.
        call_arguments: code of further arguments in the pipeline's call.
        task: of the Hub's tasks.
        whole_pipeline: the folder loads by itself, with the code that it carries.
        revision: revision of the base model.
        parts: those of the base model that came from paths of their own: `part`, `option`, `library`, `kind` (its
            class), `path`, `subfolder`, and `single_file`, whether diffusers' `from_single_file` reads it.
        adapter: `type`, its options, `layers`, `matched`, `trainable_parameters` (see `adapter_facts`); None for full
            fine-tuning.
        dataset: `names` (or `name`), `samples` (trained on), `eval_samples`, `groups`, `buckets` as
            {"HxW" or (H, W): samples}; where there is a prior `prior_samples` and `prior_weight`, and where images were
            encoded in training `shown`, how. Where some are edits: `edits`, how many (True: unknown), `sources`, the
            most of one edit, `as_targets`, whether the first one is shown as its target is (see `EditViews`), and
            `source_size` (height, width) where users must resize it.
        non_default_args: hyper-parameters that differ from their defaults.
        metrics: `eval_loss`, `eval_base_loss`, `eval_gain`, `eval_gain_low`, `eval_gain_high`, and
            `eval_loss_q1` to `eval_loss_q4` (q1: the quarter with the least noise); loss and gain by kind, such as
            `eval_gain_edit_low`.
        interval_note: why the interval was not measured.
        global_step: optimizer steps.
        train_loss: mean training loss of the run.
        versions: package -> version.
        sample_images: paths inside the folder, with "/".
        sample_prompts: prompt of each sample image, in the same order; may be shorter.
        sample_sources: the images that each sample image edits, paths likewise.
        exports: file name -> the programs it is for, of LoRA files next to diffusers' own.
        other_formats: formats of `sciflow-hf export` that can hold the adapter.
        plot: path inside the folder of the plot of losses and learning rate.
        preferences: of a run on comparisons `loss`, one of `PREFERENCE_LOSSES`, `beta` and `axes`, the losers' names.
        rewards: of a run by rewards `algorithm`, `beta`, `rewards` (name -> weight) and `watched`, names.
    """

    repo_name: str
    family: str
    base_model: str
    pipeline_class: str
    weight_name: str | None = "pytorch_lora_weights.safetensors"
    component: str = "transformer"
    size_arguments: dict[str, int] = field(default_factory=dict)
    call_arguments: list[str] = field(default_factory=list)
    task: str = "text-to-image"
    whole_pipeline: bool = False
    revision: str | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)
    non_default_args: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    interval_note: str = ""
    global_step: int = 0
    train_loss: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    sample_images: list[str] = field(default_factory=list)
    sample_prompts: list[str] = field(default_factory=list)
    sample_sources: list[list[str]] = field(default_factory=list)
    exports: dict[str, str] = field(default_factory=dict)
    other_formats: list[str] = field(default_factory=list)
    plot: str | None = None
    preferences: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)


def public_value(value: Any, *, key: str = "") -> Any:
    """`value` as it may be published, in JSON types: secrets out, absolute paths cut to their last part."""
    if _SECRET_KEY.search(key):
        return MASK
    if isinstance(value, Mapping):
        named = {"x".join(map(str, k)) if isinstance(k, tuple) else str(k): v for k, v in value.items()}
        return {public_value(k): public_value(v, key=k) for k, v in named.items()}
    if isinstance(value, (list, tuple, set)):
        return [public_value(v) for v in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN
    text = printable(SECRET_VALUE.sub(MASK, str(value)))
    if os.path.isabs(text) or text.startswith("~") or PureWindowsPath(text).drive:
        return PureWindowsPath(text).name  # splits at both kinds of slashes
    return text.replace(str(Path.home()), "~")


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `user/name` and is no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def model_card(facts: CardFacts) -> ModelCard:
    """The card of a run; `data.eval_results` has the losses of base and result, and the gain's interval."""
    on_hub = is_hub_id(facts.base_model)
    relation, kind = ("finetune", []) if facts.adapter is None else ("adapter", [_adapter_tag(facts)])
    data = ModelCardData(
        base_model=facts.base_model if on_hub else None,
        base_model_relation=relation if on_hub else None,
        library_name="diffusers",
        pipeline_tag=_tasks(facts)[0],
        tags=[*kind, *_tasks(facts), facts.family, "sciflow_hf", "scientific-figures", *_method_tags(facts)],
        model_name=facts.repo_name.split("/")[-1],
        eval_results=_eval_results(facts) or None,
    )
    sections = (_introduction(facts), _usage(facts), _results(facts), _training(facts), _samples(facts))
    body = "\n\n".join(text for text in sections if text)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def save_card(facts: CardFacts, folder: str | Path) -> Path:
    """Writes `README.md`, and the same facts as `run_facts.json`, into `folder`; returns the card's path."""
    folder = Path(folder)
    _write(folder / RUN_FACTS_NAME, json.dumps(public_value(asdict(facts)), indent=2) + "\n")
    return _write(folder / "README.md", str(model_card(facts)))


def read_facts(folder: str | Path) -> CardFacts | None:
    """The facts that `save_card` wrote into `folder`; None if it wrote nothing. SciflowError if unreadable."""
    file = Path(folder) / RUN_FACTS_NAME
    if not file.is_file():
        return None
    try:
        return CardFacts(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SciflowError(
            f"{str(file)!r} is damaged or of another version ({error}). Take it away; the card stays as it is."
        ) from error


def _write(path: Path, text: str) -> Path:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def _tasks(facts: CardFacts) -> list[str]:
    """The Hub's tasks, the main one first."""
    edits = facts.dataset.get("edits", 0)
    tasks = list(dict.fromkeys([facts.task, *(["image-to-image"] if edits else [])]))
    return tasks[::-1] if edits == facts.dataset.get("samples") else tasks


def _measured(facts: CardFacts) -> dict[str, float]:
    """The metrics that are finite numbers."""
    return {
        key: float(value)
        for key, value in facts.metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _inline(text: Any, limit: int = 300) -> str:
    """One line of Markdown without characters that would end a link, a table cell or a piece of code."""
    line = " ".join(re.sub(r"[|\[\]`<>]", " ", str(public_value(text))).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _data_names(facts: CardFacts) -> str:
    names = facts.dataset.get("names", facts.dataset.get("name", []))
    return ", ".join(_inline(name) for name in ([names] if isinstance(names, str) else names))


def _gain_interval(facts: CardFacts, name: str = "eval_gain") -> tuple[float, float] | None:
    measured = _measured(facts)
    if f"{name}_low" in measured and f"{name}_high" in measured:
        return measured[f"{name}_low"], measured[f"{name}_high"]
    return None


def _gains(facts: CardFacts) -> dict[str, str]:
    """Metric -> what it is measured on: all held-out rows, and each kind where there are both."""
    both = KINDS.keys() <= _measured(facts).keys()
    return {"eval_gain": ""} | (KINDS if both else {})


def _no_interval(facts: CardFacts) -> str:
    return "not measured" + (f": {_inline(facts.interval_note)}" if facts.interval_note else "")


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    measured, labels = (
        _measured(facts),
        {"eval_loss": "Held-out loss", "eval_base_loss": "Held-out loss of the base model"},
    )
    spreads: dict[str, dict[str, Any]] = {}
    for name, kind in _gains(facts).items():
        labels[name] = "Base model's held-out loss minus this one's" + (f", {kind}" if kind else "")
        spreads[name] = {"interval": _no_interval(facts)}
        if (interval := _gain_interval(facts, name)) is not None:
            spreads[name] = {"confidence_level": 0.95, "low": interval[0], "high": interval[1]}
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type="custom",
            dataset_name=_data_names(facts) or "training data",
            dataset_split="held out",
            metric_type=key,
            metric_name=label,
            metric_value=measured[key],
            metric_args=spreads.get(key),
        )
        for key, label in labels.items()
        if key in measured
    ]


def _other_metrics(facts: CardFacts) -> dict[str, float]:
    """Metrics of a run other than losses: `eval_fid` as "fid"."""
    known = ["loss", "loss_edit", "loss_generation", "base_loss", "gain"]
    known += ["runtime", "samples_per_second", "steps_per_second"]
    names = {key: key.removeprefix("eval_") for key in _measured(facts) if key.startswith("eval_")}
    names = {key: name for key, name in names.items() if not (facts.preferences and name.startswith(_ORDERS))}
    return {
        name: _measured(facts)[key] for key, name in names.items() if not name.startswith("loss_q")
        and not name.startswith("gain_") and name not in known
    }  # fmt: skip


_ORDERS = ("right_orders", "margin", "winner_ratio", "loser_ratio")
_PAPERS = {"Diffusion-DPO": "2311.12908", "M-DPO": "2607.18091", "DiffusionNFT": "2509.16117"}


def _methods(facts: CardFacts) -> list[str]:
    """The papers whose method a run on comparisons or by rewards follows, the main one first; [] for another run."""
    if not facts.preferences:
        return ["DiffusionNFT"] if facts.rewards.get("algorithm") == "nft" else []
    return ["M-DPO", "Diffusion-DPO"] if str(facts.preferences.get("loss")).startswith("mdpo") else ["Diffusion-DPO"]


def _method_tags(facts: CardFacts) -> list[str]:
    own = [*(["dpo"] if facts.preferences else []), *(["reinforcement-learning"] if facts.rewards else [])]
    return [*own, *(f"arxiv:{_PAPERS[name]}" for name in _methods(facts))]


def _method(facts: CardFacts) -> str:
    """The sentence on the method of a run on comparisons or by rewards; "" for another run."""
    names = [f"{name} ([{_PAPERS[name]}](https://arxiv.org/abs/{_PAPERS[name]}))" for name in _methods(facts)]
    if facts.rewards:
        weights = facts.rewards.get("rewards", {}).items()
        rewards = ", ".join(
            f"`{_inline(name)}`" + (f" x {weight:g}" if weight != 1 else "") for name, weight in weights
        )
        method = f"{names[0]} with beta {facts.rewards.get('beta', 1):g}" if names else "its own best images (`rft`)"
        return f" It learnt from rewards of images that it drew itself: {rewards}. Method: {method}."
    if not facts.preferences:
        return ""
    loss, beta = _inline(facts.preferences.get("loss")), facts.preferences.get("beta")
    return (
        f" In each group one figure is better than the others. Method: {', based on '.join(names)}; `{loss}` with beta "
        f"{beta:g}, and the network that training began with as the reference."
    )


def _orders(facts: CardFacts) -> str:
    """The table of how held-out groups are ordered; "" where nothing was measured."""
    measured, cells = _measured(facts), []
    ranges = {f"q{i}": f"quarter {i} of the noise range" for i in range(1, 5)}
    for name, words in (("right_orders", "right orders"), ("margin", "margin")):
        for key in (key for key in measured if re.fullmatch(f"eval_{name}(_.*)?", key)):
            part = key.removeprefix(f"eval_{name}").lstrip("_")
            if part not in ("low", "high") and not part.endswith(("_low", "_high")):
                cells.append((key, words + (f", {ranges.get(part, part)}" if part else "")))
    cells += [(f"eval_{kind}_ratio", f"{kind}s' loss over the reference's") for kind in ("winner", "loser")]
    rows = []
    for key, words in cells:
        if key in measured:
            interval = _gain_interval(facts, key)
            spread = f" (95 % interval: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
            rows.append((words, f"{measured[key]:.4g}{spread}"))
    if not rows:
        return ""
    told = (
        "Right orders: the share of losers over which their winner has gained; a tie counts half (the reference: 0.5)."
    )
    return f"\n\n{told}\n\n" + _table(("", "held-out groups"), rows)


def _reward_results(facts: CardFacts) -> str:
    """The table of rewards of held-out prompts as training began and now; "" where nothing was measured."""
    measured, rows = _measured(facts), []
    for key in (key for key in measured if re.fullmatch(r"eval_(reward|watched)(_.*)?", key)):
        base, gain = key.replace("eval_", "eval_base_", 1), f"{key}_gain"
        if base in measured and gain in measured:
            interval = _gain_interval(facts, gain)
            spread = f" (95 % interval: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
            name = key.removeprefix("eval_").replace("_", " ")
            rows.append((name, f"{measured[base]:.4g}", f"{measured[key]:.4g}", f"{measured[gain]:.4g}{spread}"))
    if not rows:
        return ""
    told = "Rewards of held-out prompts, drawn with the same seeds; watched ones did not train. Higher is better."
    return f"## Results\n\n{told}\n\n" + _table(("", "before", "now", "gain"), rows)


def _samples_word(facts: CardFacts) -> str:
    if facts.preferences or facts.rewards:
        return "groups of figures" if facts.preferences else "prompts"
    return "figures" if facts.task == "text-to-image" or facts.dataset.get("edits") else "images"


def _kind(facts: CardFacts) -> str:
    if facts.adapter is None:
        return "fine-tuned network" if facts.base_model else "network"
    kinds = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT adapter"}
    return kinds.get(str(facts.adapter.get("type", "lora")), "adapter")


def _adapter_tag(facts: CardFacts) -> str:
    """`lora` is what the Hub knows LoRA and DoRA by."""
    kind = str((facts.adapter or {}).get("type", "lora"))
    return "lora" if kind == "dora" else kind


def _base(facts: CardFacts) -> str:
    if is_hub_id(facts.base_model):
        return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    return f"`{_inline(facts.base_model)}` (a local folder, not on the Hub)"


def _introduction(facts: CardFacts) -> str:
    article = "An" if _kind(facts) in ("adapter", "OFT adapter") else "A"
    samples = facts.dataset.get("samples")
    figures, edits = _samples_word(facts), facts.dataset.get("edits", 0)
    figures = f"captioned {figures}" if figures == "figures" else figures
    figures = "edits of figures" if edits and edits == samples else figures
    figures = f"{samples:,} {figures}" if isinstance(samples, int) else figures
    if edits and edits != samples:
        figures += f" ({'some' if edits is True else f'{edits:,}'} of them edits)"
    if not facts.base_model:
        return (
            f"# {facts.repo_name.split('/')[-1]}\n\nA network of the family `{facts.family}`, trained from scratch on "
            f"{figures} with `sciflow_hf` for {facts.global_step:,} steps."
        )
    return (
        f"# {facts.repo_name.split('/')[-1]}\n\n"
        f"{article} {_kind(facts)} for {_base(facts)}, trained on {figures} with `sciflow_hf` for "
        f"{facts.global_step:,} steps.{_method(facts)}"
    )


def _usage(facts: CardFacts) -> str:
    if facts.whole_pipeline:
        return _usage_of_pipeline(facts)
    on_hub = is_hub_id(facts.base_model)
    base = facts.base_model if on_hub else f"path/to/{_inline(facts.base_model)}"
    here = facts.repo_name if "/" in facts.repo_name else f"path/to/{facts.repo_name}"
    revision = f', revision="{facts.revision}"' if on_hub and facts.revision else ""
    pipeline, part, dtype = facts.pipeline_class, facts.component, "torch_dtype=torch.bfloat16"
    if facts.adapter is not None:
        classes, before, argument = pipeline, "", ""
        after = f'pipeline.load_lora_weights("{here}")\n'
        if facts.adapter.get("type", "lora") not in PIPELINE_TYPES:
            classes += "\nfrom peft import PeftModel"
            after = f'PeftModel.from_pretrained(pipeline.{part}, "{here}")  # puts the adapter into pipeline.{part}\n'
    else:
        classes, after, argument = f"AutoModel, {pipeline}", "", f", {part}=network"
        before = f'network = AutoModel.from_pretrained("{here}", subfolder="{part}", {dtype})\n'
    imports = f"from diffusers import {classes}\n"
    for own in (each for each in public_value(facts.parts) if facts.adapter is not None or each["part"] != part):
        name, kind = own["part"], own["kind"]
        path = own["path"] if is_hub_id(own["path"]) else f"path/to/{_inline(own['path'])}"
        if path.endswith(".safetensors") and not own["single_file"]:
            imports += "from safetensors.torch import load_file\n" * ("load_file" not in imports)
            after = f'pipeline.{name}.load_state_dict(load_file("{path}"))\n{after}'
            continue
        imports += f"from {own['library']} import {kind}\n"
        load = f'from_pretrained("{path}"' + (f', subfolder="{own["subfolder"]}"' if own["subfolder"] else "")
        if own["single_file"]:
            load = f'from_single_file("{path}", config="{base}", subfolder="{name}"'
        before += f"{name} = {kind}.{load}, {dtype})\n"
        argument += f", {name}={name}"
    sources, given = _sources(facts), ""
    if sources:
        imports += "from diffusers.utils import load_image\n"
        given = "image=source, " if len(sources) == 1 else "image=sources, "
    call = f"{given}prompt=prompt" + "".join(f", {name}={value}" for name, value in _size_arguments(facts).items())
    if "max_sequence_length" in facts.non_default_args:
        call += f", max_sequence_length={facts.non_default_args['max_sequence_length']}"
    call += "".join(f", {argument}" for argument in facts.call_arguments)
    return (
        f"## Use\n\n{_needed(facts)}```python\nimport torch\n{imports}\n{before}"
        f'pipeline = {pipeline}.from_pretrained("{base}"{revision}{argument}, {dtype}).to("cuda")\n'
        f"{after}{_loaded(facts, sources)}"
        f"image = pipeline({call}).images[0]\n```" + _files(facts, here)
    )


def _needed(facts: CardFacts) -> str:
    package = _NEEDS.get(facts.pipeline_class)
    return f"The pipeline needs `pip install {package}`.\n\n" if package else ""


def _size_arguments(facts: CardFacts) -> dict[str, int]:
    size = _largest_bucket(facts)
    return facts.size_arguments or ({} if size is None else dict(zip(("height", "width"), size, strict=True)))


def _sources(facts: CardFacts) -> list[str]:
    """Code that loads each source of an edit; [] where nothing was edited."""
    number = facts.dataset.get("sources", 1) if facts.dataset.get("edits") else 0
    found = [f'load_image("figure{i or ""}.png")' for i in range(number)]
    if found and (size := facts.dataset.get("source_size")):
        found[0] += f".resize(({size[1]}, {size[0]}))"  # width, height
    return found


def _loaded(facts: CardFacts, sources: Sequence[str]) -> str:
    """Lines of code that make the arguments of the pipeline's call."""
    if not sources:
        return 'prompt = "..."  # a caption in the style of the training data\n'
    sized = ", in the size that was trained on" if facts.dataset.get("source_size") else ""
    if len(sources) == 1:
        lines = f"source = {sources[0]}  # the figure to edit{sized}\n"
    else:
        lines = f"sources = [{', '.join(sources)}]  # the first is edited{sized}; as many as in training\n"
    if facts.dataset["edits"] != facts.dataset.get("samples"):
        lines = f"# Without `image` it draws from a caption alone.\n{lines}"
    return lines + 'prompt = "..."  # an instruction in the style of the training data\n'


def own_reader(adapter_type: str) -> str:
    """Reader of the file that a run writes for an adapter of this type."""
    if adapter_type in PIPELINE_TYPES:
        return "diffusers (`load_lora_weights`)"
    return "PEFT (`PeftModel.from_pretrained`)"


def conversion(adapter_path: str, formats: Sequence[str]) -> str:
    """How to write an adapter's file in these formats of other programs; "" for none."""
    if not formats:
        return ""
    programs, either = " and ".join(PROGRAMS[name] for name in formats), "|".join(formats)
    command = f"sciflow-hf export --adapter_path {adapter_path} --format {either} --output_file lora.safetensors"
    return f"For {programs}, convert it: `{command}`"


def _files(facts: CardFacts, here: str) -> str:
    """Which file of an adapter is for which program, and how to make one for the others."""
    if facts.adapter is None:
        return ""
    files = [(facts.weight_name, own_reader(facts.adapter.get("type", "lora"))), *facts.exports.items()]
    listed = "".join(f"\n- `{name}`: for {reader}" for name, reader in files)
    how = conversion(here, [name for name in facts.other_formats if f"lora_{name}.safetensors" not in facts.exports])
    return f"\n\nWhich file is for which program:\n{listed}" + (f"\n\n{how}" if how else "")


def _usage_of_pipeline(facts: CardFacts) -> str:
    here = facts.repo_name if "/" in facts.repo_name else f"path/to/{facts.repo_name}"
    return (
        "## Use\n\nThe repository is a pipeline with its code, `pipeline.py`, which runs with `trust_remote_code`.\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{here}", trust_remote_code=True).to("cuda")\n'
        f"output = pipeline({', '.join(facts.call_arguments)})\n```"
    )


def _buckets(facts: CardFacts) -> dict[str, int]:
    """ "HxW" -> samples, most samples first."""
    buckets = public_value(facts.dataset.get("buckets") or {})
    return dict(sorted(buckets.items(), key=lambda item: -item[1]))


def _largest_bucket(facts: CardFacts) -> tuple[int, int] | None:
    """(height, width) of the bucket with most samples."""
    found = re.fullmatch(r"(\d+)x(\d+)", next(iter(_buckets(facts)), ""))
    return (int(found[1]), int(found[2])) if found else None


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _results(facts: CardFacts) -> str:
    if facts.rewards:
        return _reward_results(facts)
    measured = _measured(facts)
    rows = [("base model", "eval_base_loss"), (f"with this {_kind(facts)}", "eval_loss")]
    cells = [(label, f"{measured[key]:.4f}") for label, key in rows if key in measured]
    for name, kind in _gains(facts).items():
        if name in measured:
            interval = _gain_interval(facts, name)
            spread = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else _no_interval(facts)
            what = "gain (base - this)" + (f", {kind}" if kind else "")
            cells.append((what, f"{measured[name]:.4f} (95 % interval: {spread})"))
    names = ("1 (least noise)", "2", "3", "4 (most noise)")
    quarters = [
        (f"quarter {name}", f"{measured[f'eval_loss_q{i}']:.4f}")
        for i, name in enumerate(names, start=1)
        if f"eval_loss_q{i}" in measured
    ]
    others = [(name.replace("_", " "), f"{value:.4g}") for name, value in _other_metrics(facts).items()]
    if not cells and not quarters and not others:
        return ""
    held_out = facts.dataset.get("eval_samples")
    figures = f"held-out {_samples_word(facts)}"
    figures = f"{held_out:,} {figures}" if isinstance(held_out, int) else figures
    what = "Preference" if facts.preferences else "Training"
    text = (
        f"## Results\n\n{what} loss on {figures}, at a fixed grid of noise levels with fixed noise; lower "
        "is better.\n\n" + _table(("", "held-out loss"), cells)
    )
    text += "\n\n" + _table(("noise range", "held-out loss"), quarters) if quarters else ""
    text += _orders(facts) if facts.preferences else ""
    return text + ("\n\n" + _table(("measured on samples", ""), others) if others else "")


def _training(facts: CardFacts) -> str:
    rows: list[tuple[str, str]] = [("optimizer steps", f"{facts.global_step:,}")]
    if facts.train_loss is not None and math.isfinite(facts.train_loss):
        rows.append(("mean training loss", f"{facts.train_loss:.4f}"))
    for key, value in (facts.adapter or {}).items():
        renamed = {"matched": "matched layers", "trainable_parameters": "trained parameters"}
        label = renamed.get(key, f"adapter {key}")
        if value:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else option_text(value)
            rows.append((label, f"{value:,}" if type(value) is int else f"`{_inline(text, 1000)}`"))
    rows += [(f"{own['part']}, instead of the base model's", f"`{_inline(own['path'])}`") for own in facts.parts]
    if _data_names(facts):
        rows.append(("data", f"`{_data_names(facts)}`"))
    for key, label in (("samples", _samples_word(facts)), ("eval_samples", "held out"), ("groups", "groups (papers)")):
        if isinstance(facts.dataset.get(key), int):
            rows.append((label, f"{facts.dataset[key]:,}"))
    if facts.dataset.get("edits") and facts.dataset["edits"] is not True:
        rows.append(("edits among these", f"{facts.dataset['edits']:,}"))
    if isinstance(prior := facts.dataset.get("prior_samples"), int):
        rows.append(("prior preservation", f"{prior:,} figures, weight {facts.dataset.get('prior_weight', 1):g}"))
    if shown := facts.dataset.get("shown"):
        rows.append(("images, encoded in training", str(shown)))
    if _buckets(facts):
        counts = ", ".join(f"{size}: {number:,}" for size, number in _buckets(facts).items())
        rows.append(("buckets (height x width: figures)", counts))
    text = "## Training\n\n" + _table(("", ""), rows)
    if facts.plot:
        text += f"\n\n![Losses and learning rate over training]({quote(facts.plot)})"
    if facts.non_default_args:
        args = public_value(facts.non_default_args)
        lines = "\n".join(f"{key}: {json.dumps(args[key], ensure_ascii=False)}" for key in sorted(args))
        text += f"\n\nOptions that differ from their defaults:\n\n```yaml\n{lines}\n```"
    if facts.versions:
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        text += f"\n\nVersions: {versions}."
    return text


def _samples(facts: CardFacts) -> str:
    """Sample images with their prompts; `hub.publishable_files` reads the paths back from here."""
    if not facts.sample_images:
        return ""
    number = len(facts.sample_images)
    prompts, sources = facts.sample_prompts + [""] * number, facts.sample_sources + [[]] * number
    pictures = [
        "".join(f"![source]({quote(source)}) " for source in edited)
        + f"![{_inline(prompt) or 'sample image'}]({quote(path)})" + (f"\n\n*{_inline(prompt)}*" if prompt else "")
        for path, prompt, edited in zip(facts.sample_images, prompts, sources, strict=False)
    ]  # fmt: skip
    edits = "Left of an edit: what it was made from.\n\n" if any(sources) else ""
    return f"## Samples\n\n{edits}" + "\n\n".join(pictures)
