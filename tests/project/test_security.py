"""Tokens stay out of what a run writes, logs and uploads; nothing is unpickled; no code of a model folder runs."""

import ast
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import edit as edit_index
from caches import encoder_settings, write_cache
from hub_server import HubServer
from PIL import Image
from recipe_runs import run
from trainings import make_trainer

import sciflow_hf as sf
from sciflow_hf.cli import main
from sciflow_hf.errors import SciflowError
from sciflow_hf.options import parse_args
from sciflow_hf.training.checkpoints import write_manifest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "sciflow_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])

# ---- tokens ----

TOKENS = {
    "HF_TOKEN": "hf_" + "EnvironmentToken" * 2,
    "hub_token": "CommandLineToken0123456789abcdef",  # of a Hub of one's own, without the usual beginning
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}


def holding(secrets: dict[str, str], texts: dict[str, bytes]) -> list[tuple[str, str]]:
    """(name of the text, name of the secret in it)."""
    return [(where, name) for where, text in texts.items() for name, s in secrets.items() if s.encode() in text]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tokens_are_nowhere_after_a_run(hub: HubServer, tmp_path, tiny_klein):
    """Trackers, logs, checkpoints, card, run facts, and every file on the Hub of a run with all strategies."""
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets={(32, 48): 40})
    user = hub.tokens.pop("dummy")
    hub.tokens |= {TOKENS["HF_TOKEN"]: user, TOKENS["hub_token"]: user}
    trackers = tmp_path / "trackers.yaml"
    trackers.write_text("report_to: [wandb, tensorboard]")
    home = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "TMPDIR": str(tmp_path)}
    done = run(
        *("--pretrained_model_name_or_path", tiny_klein, "--max_sequence_length", 12, "--dataset_dir", cache),
        *("--output_dir", tmp_path / "out", "--eval_fraction", 0.4, "--rank", 4, "--max_steps", 4, "--save_steps", 2),
        *("--use_cpu", True, "--push_to_hub", "--hub_model_id", "secret", "--hub_strategy", "all_checkpoints"),
        *("--hub_always_push", True, "--hub_token", TOKENS["hub_token"], "--log_level", "debug"),
        *("--config", trackers),
        **(hub.env(tmp_path / "home", token=TOKENS["HF_TOKEN"]) | home | {"WANDB_API_KEY": TOKENS["WANDB_API_KEY"]}),
    )
    written = files_below(tmp_path)
    kinds = (".wandb", "debug-internal.log", "tfevents", "trainer_state.json", "README.md", "optimizer.pt", ".log")
    assert all(any(kind in name for name in written) for kind in kinds), sorted(written)
    uploaded = {f"Hub: {name}": data for name, data in hub.repos["user/secret"].files.items()}
    assert {"Hub: README.md", "Hub: checkpoint-2/trainer_state.json"} <= {*uploaded}
    said = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    assert holding(TOKENS, written | uploaded | said) == []
    assert holding({"weights": "lora_A"}, written), "the search finds what is there"


def test_tokens_of_the_command_line_are_taken_out_of_it(monkeypatch):
    """W&B stores `sys.argv` with the run."""
    words = ["recipe.py", "--output_dir", "out", "--hub_token", "secret-1", "--hub_token=secret-2", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", words)
    (args,) = parse_args(sf.DiffusionTrainingArguments)
    assert args.hub_token == "secret-2" and args.seed == 3
    assert sys.argv == ["recipe.py", "--output_dir", "out", "--hub_token", "***", "--hub_token=***", "--seed", "3"]


# ---- pickles ----


def unsafe_calls(source: str) -> list[str]:
    """Calls and imports that could run code of a file: of modules that unpickle, of loaders not told to be safe."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [f"import {n}" for n in names if n.split(".")[0] in ("dill", "cloudpickle", "joblib", "shelve")]
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = ast.unparse(node.func)
        unsafe = {
            "torch.load": options.get("weights_only") != "True",
            "np.load": options.get("allow_pickle") != "False",
            "trust_remote_code": options.get("trust_remote_code") == "True",
        }
        bare = name in ("eval", "exec") or re.fullmatch(r"(pickle|marshal)\.\w+|yaml\.(?!safe_load)\w*load\w*", name)
        if bare or unsafe.get(name) or unsafe["trust_remote_code"] or options.get("shell") == "True":
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles(path: Path):
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


def test_the_search_for_unsafe_calls_finds_them():
    unsafe = "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)"
    unsafe += "pickle.load(f)", "pickle.Unpickler(f)", "yaml.load(f)", "yaml.full_load(f)", "eval(x)", "import dill"
    unsafe += "from joblib import load", "A.from_pretrained(p, trust_remote_code=True)", "run(x, shell=True)"
    assert [source for source in unsafe if not unsafe_calls(source)] == []
    safe = "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)\nmodel.eval()"
    assert unsafe_calls(safe) == []


class Touches:
    """Unpickling this runs code: it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path):
    """Path of a file that only code of a pickle or of a model folder makes."""
    return tmp_path / "code_was_run"


def test_a_pickle_with_code_is_refused_in_every_state_of_a_checkpoint(tmp_path, tiny_klein, marker):
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets={(32, 48): 8})
    family = sf.Flux2Klein(str(tiny_klein), max_sequence_length=12)
    out = tmp_path / "out"
    make_trainer(out, family, cache, max_steps=2, save_strategy="steps", save_steps=2).train()
    states = [path.name for path in (out / "checkpoint-2").iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert sorted(states) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    for name in states:
        file = out / "checkpoint-2" / name
        before = file.read_bytes()
        torch.save({"state": Touches(marker)}, file)
        resume = {"resume_from_checkpoint": str(out / "checkpoint-2"), "max_steps": 3}
        with pytest.raises(SciflowError, match=f"{name} is damaged"):
            make_trainer(out, family, cache, **resume).train()
        write_manifest(out / "checkpoint-2")  # somebody who means harm would write it anew, too
        with pytest.raises(SciflowError, match=r"checkpoint-2: its optimizer, .* could run code. They were not loaded"):
            make_trainer(out, family, cache, **resume).train()
        file.write_bytes(before)
        write_manifest(out / "checkpoint-2")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touches(marker)))
    assert marker.exists(), "it would have made the file"


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin", "lora.pt", "lora.ckpt"])
def test_adapters_that_are_pickles_are_refused(tmp_path, tiny_klein, marker, name):
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.save({"lora": Touches(marker)}, folder / name)
    family = sf.Flux2Klein(str(tiny_klein))
    for path in (folder, folder / name):
        with pytest.raises(SciflowError, match="safetensors"):
            network = family.load_model(dtype=torch.float32)
            sf.add_adapter(network, sf.AdapterArguments(adapter_path=str(path)), family=family)
    disguised = folder / "pytorch_lora_weights.safetensors"
    (folder / name).rename(disguised)
    with pytest.raises(SciflowError, match="no complete safetensors file"):
        sf.add_adapter(
            family.load_model(dtype=torch.float32), sf.AdapterArguments(adapter_path=str(disguised)), family=family
        )
    assert not marker.exists()


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_networks_that_are_pickles_with_code_are_refused(tmp_path, tiny_klein, marker, part, file):
    model = copy_of(tiny_klein, tmp_path)
    for weights in (model / part).glob("*.safetensors*"):
        weights.unlink()
    torch.save({"weight": Touches(marker)}, model / part / file)
    family = sf.Flux2Klein(str(model))
    with pytest.raises(SciflowError, match="`pretrained_model_name_or_path`"):
        if part == "transformer":
            family.load_model(dtype=torch.float32)
        else:
            family.load_encoders(device="cpu", dtype=torch.float32)
    assert not marker.exists()


# ---- code of a model folder ----

CODE = """
from pathlib import Path
from diffusers import Flux2KleinPipeline
from transformers import Qwen3ForCausalLM
Path({marker!r}).touch()
class Mine(Qwen3ForCausalLM):
    pass
class MyPipeline(Flux2KleinPipeline):
    pass
"""


def copy_of(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_part(model: Path, marker: Path) -> None:
    (model / "text_encoder" / "modeling_mine.py").write_text(CODE.format(marker=str(marker)))
    edit(model / "model_index.json", text_encoder=["modeling_mine", "Mine"])


def with_pipeline(model: Path, marker: Path) -> None:
    (model / "pipeline.py").write_text(CODE.format(marker=str(marker)))
    edit(model / "model_index.json", _class_name=["pipeline", "MyPipeline"])


def with_auto_tokenizer(model: Path, marker: Path) -> None:
    (model / "tokenizer" / "mine.py").write_text(CODE.format(marker=str(marker)))
    edit(model / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    edit(model / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})


def with_auto_model(model: Path, marker: Path) -> None:
    (model / "text_encoder" / "mine.py").write_text(CODE.format(marker=str(marker)))
    edit(model / "text_encoder" / "config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"})


def with_module_of_a_known_name(model: Path, marker: Path) -> None:
    (model / "text_encoder" / "transformers.py").write_text(CODE.format(marker=str(marker)))


def with_installed_package(model: Path, marker: Path) -> None:
    edit(model / "model_index.json", text_encoder=["antigravity", "Mine"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_part, "model_index.json has modeling_mine.Mine as text_encoder"),
        (with_pipeline, "model_index.json has pipeline.MyPipeline as _class_name"),
        (with_auto_tokenizer, "tokenizer/tokenizer_config.json has an `auto_map`"),
        (with_auto_model, "text_encoder/config.json has an `auto_map`"),
        (with_module_of_a_known_name, "custom code"),
        (with_installed_package, "model_index.json has antigravity.Mine as text_encoder"),
    ],
)
def test_a_model_folder_that_asks_for_code_is_refused(tmp_path, tiny_klein, marker, change, named):
    model = copy_of(tiny_klein, tmp_path)
    change(model, marker)
    family = sf.Flux2Klein(str(model))
    with pytest.raises(SciflowError, match=named) as caught:
        family.load_encoders(device="cpu", dtype=torch.float32)
    if change is not with_module_of_a_known_name:  # which diffusers refuses by itself
        assert "add `--trust_remote_code`" in str(caught.value)
        with pytest.raises(SciflowError, match=named):
            sf.Flux2Klein(str(model)).load_model(dtype=torch.float32)
    assert not marker.exists() and "antigravity" not in sys.modules


def test_a_trusted_folder_runs_its_code(tmp_path, tiny_klein, marker, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = copy_of(tiny_klein, tmp_path)
    with_part(model, marker)
    encoders = sf.Flux2Klein(str(model), trust_remote_code=True).load_encoders(device="cpu", dtype=torch.float32)
    assert marker.exists() and type(encoders.text_encoder).__name__ == "Mine"
    plain = sf.Flux2Klein(str(tiny_klein)).load_encoders(device="cpu", dtype=torch.float32)
    same = [family.encode_prompts(["a plot"], parts)["prompt_embeds"] for family, parts in (
        (sf.Flux2Klein(str(model), trust_remote_code=True), encoders), (sf.Flux2Klein(str(tiny_klein)), plain)
    )]  # fmt: skip
    assert torch.equal(*same)


def test_building_a_cache_takes_the_flag(tmp_path, tiny_klein, marker, monkeypatch, capsys):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = copy_of(tiny_klein, tmp_path)
    with_part(model, marker)
    Image.new("RGB", (48, 32)).save(tmp_path / "figure.png")
    (tmp_path / "figure.txt").write_text("a plot")
    words = ["cache", "build", "--family", "flux2_klein", "--pretrained_model_name_or_path", str(model), "--input_dir",
             str(tmp_path), "--output_dir", str(tmp_path / "cache"), "--resolution", "32", "--device", "cpu",
             "--max_sequence_length", "12"]  # fmt: skip
    assert main(words) == 2 and not marker.exists()
    assert "add `--trust_remote_code`" in capsys.readouterr().err
    assert main([*words, "--trust_remote_code"]) == 0 and marker.exists()
    assert len(sf.load_cache(tmp_path / "cache")) == 1


def test_a_repository_that_asks_for_code_is_refused(hub: HubServer, tmp_path, tiny_klein, marker):
    """Before its weights are fetched; one that asks for none is read as a folder is."""
    model = copy_of(tiny_klein, tmp_path)
    hub.add_dataset("user/plain", model)
    with_auto_tokenizer(model, marker)
    hub.add_dataset("user/asking", model)
    for name in ("user/plain", "user/asking"):
        hub.repos[name] = hub.repos.pop(f"datasets/{name}")
    code = """
import sciflow_hf as sf
print(sf.Flux2Klein("user/plain").config()["_class_name"])
try:
    sf.Flux2Klein("user/asking").config()
except sf.SciflowError as error:
    print(error)
"""
    said = hub.run(code, tmp_path / "home").splitlines()
    assert said[0] == "Flux2KleinPipeline" and "tokenizer/tokenizer_config.json has an `auto_map`" in said[1]
    assert not marker.exists() and not any("safetensors" in path for _, path, _ in hub.requests)


def test_a_run_of_ours_is_read_by_our_classes_never_by_its_code(tmp_path, marker):
    """A DiT's folder carries its code for programs without this package."""
    family = sf.DiT(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    family.save_network(family.load_model(dtype=torch.float32), tmp_path / "dit")
    code = [*(tmp_path / "dit").rglob("*.py")]
    assert len(code) == 2
    for file in code:
        file.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n{file.read_text()}")
    again = sf.DiT(pretrained_model_name_or_path=str(tmp_path / "dit"))
    again.load_pipeline(again.load_model(dtype=torch.float32))
    assert main(["sample", "--model_path", str(tmp_path / "dit"), "--output_dir", str(tmp_path / "images"),
                 "--num_inference_steps", "1", "--height", "8", "--width", "8", "--device", "cpu"]) == 0  # fmt: skip
    assert not marker.exists()


# ---- paths ----


def test_links_in_a_cache_are_followed_but_no_path_of_its_index_leaves_it(tmp_path):
    """The Hub's local cache is made of links. An index, which may come from anywhere, cannot make one."""
    cache = write_cache(tmp_path / "cache", buckets={(32, 48): 2})
    whole = sf.load_cache(cache)[0]["latents"]
    (file,) = cache.rglob("*.parquet")
    table = pq.read_table(file)
    first = Path(table["cache_path"][0].as_py())
    shutil.move(cache / first.parent, tmp_path / "elsewhere")
    (cache / first.parent).symlink_to(tmp_path / "elsewhere")
    assert torch.equal(sf.load_cache(cache)[0]["latents"], whole)
    for path in (f"2015/../../elsewhere/{first.name}", f"/{first}", str(tmp_path / "elsewhere" / first.name)):
        column = pa.array([path, *table["cache_path"].to_pylist()[1:]])
        place = table.column_names.index("cache_path")
        pq.write_table(table.set_column(place, "cache_path", column), file)
        with pytest.raises(SciflowError, match="outside of"):
            sf.load_cache(cache)


# ---- what data says ----


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module whose import leaves a mark, and the dotted path of a class in it."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Family: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "planted.Family"
    assert not (tmp_path / "imported").exists()


def test_a_family_that_a_run_names_is_not_imported(tmp_path, planted, capsys):
    (tmp_path / "run").mkdir()
    facts = {"family": planted, "base_model": "somebody/model"}
    (tmp_path / "run" / "run_facts.json").write_text(json.dumps(facts))
    words = ["sample", "--model_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "o"), "--prompts", "a bar"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"run_facts.json names the family {planted!r}" in said and "`--family my_module.MyFamily`" in said


def test_a_family_that_a_cache_names_is_not_imported(tmp_path, planted, tiny_klein, capsys):
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein) | {"family": planted})
    words = ["cache", "verify", "--dataset_dir", str(cache), "--sample", "1", "--input_dir", str(tmp_path)]
    assert main(words) == 2
    assert f"names the family {planted!r}, which is not built in" in capsys.readouterr().err


KEYS = [
    "hf_" + "a" * 24, "sk-proj-" + "a1" * 20, "sk-ant-api03-" + "b" * 30, "AKIA" + "ABCD" * 4, "ghp_" + "c" * 36,
    "github_pat_" + "d" * 40, "glpat-" + "e" * 20, "AIza" + "f" * 35, "xoxb-" + "1" * 24, "npm_" + "g" * 36,
    "pypi-" + "H" * 60, "gsk_" + "i" * 52, "nvapi-" + "j" * 60, "eyJhbGciOi.eyJzdWIiOi.dozjgNryP4J3",
    "ya29." + "k" * 60,
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:5])
def test_keys_of_other_services_are_masked(key):
    from sciflow_hf.report.model_card import MASK, public_value

    assert public_value({"a": [f"prompt with {key} inside"]}) == {"a": [f"prompt with {MASK} inside"]}
    assert public_value("a risk-free task, AKIAN, ask-me") == "a risk-free task, AKIAN, ask-me"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:word@host/x", "https://***@host/x"),
        (
            "https://x.blob.core.windows.net/c?sv=2024&sig=" + "aB%2" * 10,
            "https://x.blob.core.windows.net/c?sv=2024&sig=***",
        ),
        ("AccountName=x;AccountKey=" + "aB+/" * 20, "AccountName=x;AccountKey=***"),
    ],
)
def test_what_opens_a_storage_is_masked_in_its_address(text, shown):
    from sciflow_hf.report.model_card import MASK, public_value

    assert public_value(text).replace(MASK, "***") == shown
    assert public_value("https://host/user/data?page=2") == "https://host/user/data?page=2"


def test_control_characters_of_data_stay_out_of_messages(tmp_path, tiny_klein):
    """The name of an image would clear the terminal, or turn the rest of the line around."""
    from sciflow_hf.data.batches.loader import describe_row

    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets={(32, 48): 2})
    (file,) = cache.rglob("*.parquet")
    edit_index(file, image_path=lambda paths: ["a\x1b[2J\u202e.png", *paths[1:]])
    assert "(a[2J.png, payload" in describe_row(sf.load_cache(cache), 0)
    edit_index(
        file, bucket_h=lambda values: [2**32 + 32, *values[1:]], cache_path=lambda values: ["\x1b[2J", *values[1:]]
    )
    with pytest.raises(SciflowError) as caught:
        sf.load_cache(cache)
    assert "\x1b" not in str(caught.value)


def test_control_characters_of_captions_stay_out_of_cards():
    from sciflow_hf.report.model_card import public_value

    assert public_value("a\x1b[31mred\x07 bar\u202egnp.\n50 \u00b5m") == "a[31mred bargnp.\n50 \u00b5m"
