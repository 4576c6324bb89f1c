"""Model card, access check and upload, against a small Hub of our own on the loopback interface."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import HubServer, Repo
from huggingface_hub import ModelCard

from sciflow_hf.errors import SciflowError
from sciflow_hf.hub.upload import publishable_files, upload
from sciflow_hf.report.model_card import CardFacts, save_card

TOKEN = "hf_" + "A1b2C3d4" * 4

FACTS = CardFacts(
    repo_name="user/figures-lora",
    family="flux2_klein",
    base_model="black-forest-labs/FLUX.2-klein-base-9B",
    pipeline_class="Flux2KleinPipeline",
    revision="abc123",
    adapter={
        "type": "lora",
        "rank": 128,
        "alpha": 128,
        "layers": "full",
        "matched": 144,
        "trainable_parameters": 12345678,
    },
    dataset={
        "names": ["figures_a", "/home/somebody/data/figures_b"],
        "samples": 1200,
        "eval_samples": 24,
        "groups": 400,
        "buckets": {(768, 1024): 800, "1024x768": 400},
    },
    non_default_args={
        "learning_rate": 1.0,
        "hub_token": TOKEN,
        "dataset_dir": ["/home/somebody/data/figures_b"],
    },
    metrics={
        "eval_loss": 1.125,
        "eval_base_loss": 1.5,
        "eval_gain": 0.375,
        "eval_gain_low": 0.25,
        "eval_gain_high": 0.5,
        "eval_loss_q1": 2.0,
        "eval_loss_q4": float("nan"),
    },
    global_step=1000,
    train_loss=1.2,
    versions={"diffusers": "0.42.1"},
    sample_images=["validation/step-001000/p00_seed42.png"],
    sample_prompts=["A bar chart | with [three] bars"],
)


def saved_run(folder: Path) -> Path:
    """A finished run's folder with a good deal that must not be published."""
    junk = [
        "checkpoint-5/optimizer.pt",
        "checkpoint-5/pytorch_lora_weights.safetensors",
        "optimizer.pt",
        "rng.pth",
    ]
    junk += [
        "trainer_state.json",
        "training_args.bin",
        "runs/events",
        "validation/contact_sheet.png",
        ".env",
        "a.png",
    ]
    junk += ["validation/step-000000/p00_seed42.png", "manifest.json", "transformer/optimizer.bin", "token"]
    wanted = ["pytorch_lora_weights.safetensors", "validation/step-001000/p00_seed42.png"]
    for name in junk + wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    save_card(FACTS, folder)
    return folder


def test_card_parses_back_with_its_metrics(tmp_path: Path) -> None:
    card = ModelCard.load(save_card(FACTS, tmp_path))
    results = {r.metric_type: r for r in card.data.eval_results}
    assert {k: r.metric_value for k, r in results.items()} == {
        "eval_loss": 1.125,
        "eval_base_loss": 1.5,
        "eval_gain": 0.375,
    }
    assert results["eval_gain"].metric_args == {"confidence_level": 0.95, "low": 0.25, "high": 0.5}
    assert results["eval_gain"].dataset_name == "figures_a, figures_b"
    assert card.data.base_model == FACTS.base_model
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.tags == ["lora", "text-to-image", "flux2_klein", "sciflow_hf", "scientific-figures"]
    assert card.data.model_name == "figures-lora"
    for line in (
        'pipeline = Flux2KleinPipeline.from_pretrained("black-forest-labs/FLUX.2-klein-base-9B", '
        'revision="abc123", torch_dtype=torch.bfloat16).to("cuda")',
        'pipeline.load_lora_weights("user/figures-lora")',
        "image = pipeline(prompt=prompt, height=768, width=1024).images[0]",
        "| gain (base - this) | 0.3750 (95 % interval: 0.2500 to 0.5000) |",
        "| quarter 1 (least noise) | 2.0000 |",
        "| adapter rank | 128 |",
        "| trained parameters | 12,345,678 |",
        "learning_rate: 1.0",
        "![A bar chart with three bars](validation/step-001000/p00_seed42.png)",
    ):
        assert line in card.text.splitlines(), line


def test_card_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    facts = replace(
        FACTS,
        repo_name="run-1",
        base_model=str(tmp_path / "base"),
        metrics={"eval_loss": 1.125, "eval_gain": 0.375, "eval_base_loss": float("nan")},
        interval_note="8 groups, it takes 10",
        sample_images=[],
        dataset={},
    )
    card = ModelCard.load(save_card(facts, tmp_path))
    assert [r.metric_type for r in card.data.eval_results] == ["eval_loss", "eval_gain"]
    assert card.data.eval_results[1].metric_args == {"interval": "not measured: 8 groups, it takes 10"}
    assert "0.3750 (95 % interval: not measured: 8 groups, it takes 10)" in card.text
    header = card.data.to_dict()
    assert "base_model" not in header and "base_model_relation" not in header
    assert 'load_lora_weights("path/to/run-1")' in card.text
    for absent in ("quarter", "base model |", "Samples", "nan", str(tmp_path)):
        assert absent not in card.text, absent
    empty = ModelCard.load(save_card(replace(facts, metrics={}), tmp_path))
    assert empty.data.eval_results is None and "Results" not in empty.text


def test_card_of_full_fine_tuning(tmp_path: Path) -> None:
    card = ModelCard.load(save_card(replace(FACTS, adapter=None, weight_name=None), tmp_path))
    assert card.data.base_model_relation == "finetune" and "lora" not in card.data.tags
    assert 'AutoModel.from_pretrained("user/figures-lora", subfolder="transformer"' in card.text
    assert "transformer=network" in card.text and "load_lora_weights" not in card.text


def test_card_and_facts_hold_no_tokens_and_no_local_paths(tmp_path: Path) -> None:
    args = {
        "hub_token": TOKEN,
        "nested": {"api_key": "k-123", "note": f"token is {TOKEN}"},
        "output_dir": str(Path.home() / "runs" / "x"),
        "windows": r"C:\Users\somebody\run",
        "learning_rate": 1e-4,
    }
    save_card(replace(FACTS, non_default_args=args), tmp_path)
    for name in ("README.md", "run_facts.json"):
        text = (tmp_path / name).read_text()
        for absent in (TOKEN, "k-123", "somebody", str(Path.home()), "NaN"):
            assert absent not in text, (name, absent)
        assert "***" in text and "0.0001" in text
    facts = json.loads((tmp_path / "run_facts.json").read_text())
    assert facts["non_default_args"]["output_dir"] == "x" and facts["non_default_args"]["windows"] == "run"
    assert facts["non_default_args"]["hub_token"] == facts["non_default_args"]["nested"]["api_key"] == "***"
    assert facts["dataset"]["buckets"] == {"768x1024": 800, "1024x768": 400}


def test_only_what_a_user_needs_is_publishable(tmp_path: Path) -> None:
    saved_run(tmp_path)
    assert publishable_files(tmp_path) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "run_facts.json",
        "validation/step-001000/p00_seed42.png",
    ]
    for name in (
        "config.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "x.safetensors.index.json",
    ):
        (tmp_path / "transformer" / name).write_text("{}")
    found = [name for name in publishable_files(tmp_path) if name.startswith("transformer/")]
    assert found == [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/x.safetensors.index.json",
    ]


def test_images_and_links_outside_the_folder_are_not_publishable(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "other.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "other.png")
    (folder / "README.md").write_text("![a](../other.png) ![b](link.png) ![c](/etc/hostname) ![d](run_facts.json)")
    assert publishable_files(folder) == ["README.md"]


def test_upload_refuses_state_and_tokens_before_any_request(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with pytest.raises(SciflowError, match=r"`files` \['optimizer.pt', 'trainer_state.json'\]"):
        upload("user/x", tmp_path, files=["README.md", "optimizer.pt", "trainer_state.json"])
    with pytest.raises(SciflowError, match="holds no weights"):
        upload("user/x", tmp_path, files=["README.md"])
    (tmp_path / "README.md").write_text(f"my token: {TOKEN}")
    with pytest.raises(SciflowError, match="contains an access token") as caught:
        upload("user/x", tmp_path)
    assert TOKEN not in str(caught.value)


PRELUDE = """
import json, sys
import sciflow_hf.hub.upload as hub
from sciflow_hf.errors import SciflowError
waits = []
hub.time.sleep = waits.append  # every wait of ours and of the client: counted, not slept
def attempt(call):
    waits.clear()
    try:
        result = call()
    except SciflowError as error:
        return {"error": str(error), "waits": list(waits)}
    return {"result": result if isinstance(result, str) else result.oid, "waits": list(waits)}
"""


def test_access_check_and_upload(hub: HubServer, tmp_path: Path) -> None:
    folder = saved_run(tmp_path / "run")
    code = """
answers = {"short": attempt(lambda: hub.check_access("figures", private=True))}
answers["again"] = attempt(lambda: hub.check_access("user/figures"))
answers["branch"] = attempt(lambda: hub.check_access("user/figures", revision="no-such-branch"))
answers["upload"] = attempt(lambda: hub.upload("user/figures", sys.argv[1], commit_message="step 1000"))
answers["future"] = attempt(lambda: hub.upload("user/figures", sys.argv[1], run_as_future=True).result())
answers["no repo"] = attempt(lambda: hub.upload("user/absent", sys.argv[1]))
answers["bad id"] = attempt(lambda: hub.check_access("a/b/c"))
print(json.dumps(answers))
"""
    answers = json.loads(hub.run(PRELUDE + code, tmp_path / "home", str(folder)).splitlines()[-1])
    assert answers["short"] == {"result": "user/figures", "waits": []}
    assert answers["again"]["result"] == "user/figures"
    assert hub.repos["user/figures"].private
    assert "'no-such-branch'" in answers["branch"]["error"] and "--hub_revision" in answers["branch"]["error"]
    assert "error" not in answers["upload"] and "error" not in answers["future"]
    assert hub.repos["user/figures"].files == {p: (folder / p).read_bytes() for p in publishable_files(folder)}
    assert hub.repos["user/figures"].messages == ["step 1000", "Upload by sciflow_hf"]
    assert "404" in answers["no repo"]["error"] and "everything is on disk" in answers["no repo"]["error"]
    assert "`hub_model_id` 'a/b/c'" in answers["bad id"]["error"]


def test_hub_failures_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    folder = saved_run(tmp_path / "run")
    hub.repos |= {"lab/readonly": Repo(), "user/figures": Repo()}
    hub.tokens["reader"] = {"name": "user", "orgs": ["lab"], "write": False}
    code = """
from urllib.request import urlopen
check = lambda repo="user/figures", **kw: attempt(lambda: hub.check_access(repo, **kw))
push = lambda: attempt(lambda: hub.upload("user/figures", sys.argv[1]))
background = lambda: attempt(lambda: hub.upload("user/figures", sys.argv[1], run_as_future=True).result())
def with_failure(route, status, times, call):
    urlopen(f"{sys.argv[2]}/fail/{route}/{status}/{times}").close()
    answer = call()
    urlopen(f"{sys.argv[2]}/recover").close()
    return answer
answers = {
    "401": check(token="wrong"),
    "403 namespace": check("somebody/else"),
    "403 exists": check("lab/readonly", token="reader"),
    "409": with_failure("auth-check", 409, 1, check),
    "503 twice": with_failure("create", 503, 2, check),
    "503 for ever": with_failure("create", 503, 99, check),
    "push 403": with_failure("commit", 403, 1, push),
    "push 409": with_failure("commit", 409, 1, push),
    "push 503 once": with_failure("commit", 503, 1, push),
    "push 503 for ever": with_failure("commit", 503, 99, push),
    "push 401": with_failure("preupload", 401, 1, push),
    "push background": with_failure("commit", 403, 1, background),
}
print(json.dumps(answers))
"""
    output = hub.run(PRELUDE + code, tmp_path / "home", str(folder), hub.url)
    answers = json.loads(output.splitlines()[-1])
    errors = {name: answer.get("error") for name, answer in answers.items()}
    assert "(401)" in errors["401"] and "`hf auth login`" in errors["401"] and "--hub_token" in errors["401"]
    assert "wrong" not in errors["401"]
    for name in ("403 namespace", "403 exists"):
        assert "(403)" in errors[name] and "--hub_model_id" in errors[name], name
    assert "conflict (409)" in errors["409"]
    for name in ("401", "403 namespace", "403 exists", "409"):
        assert answers[name]["waits"] == [], "nothing to wait for"
        assert "train without `--push_to_hub`" in errors[name]
    assert answers["503 twice"] == {"result": "user/figures", "waits": [2.0, 8.0]}
    assert answers["503 for ever"]["waits"] == [2.0, 8.0, 30.0]
    assert "(503, tried 4 times)" in errors["503 for ever"] and "without `--push_to_hub`" in errors["503 for ever"]
    for name in ("push 403", "push 409", "push 503 for ever", "push 401", "push background"):
        assert f"everything is on disk in '{folder}'" in errors[name], name
        assert f"sciflow-hf push {folder} --hub_model_id user/figures" in errors[name], name
    assert errors["push 503 once"] is None and answers["push 503 once"]["waits"] == [2.0]
    assert set(hub.repos["user/figures"].files) == set(publishable_files(folder))


def test_no_token_and_no_hub(hub: HubServer, tmp_path: Path) -> None:
    code = (
        PRELUDE
        + """
print(json.dumps(attempt(lambda: hub.check_access("user/figures", token=sys.argv[1] or None))))
"""
    )
    answer = json.loads(hub.run(code, tmp_path / "home", "", token=None).splitlines()[-1])
    assert "there is no Hub token here. Run `hf auth login`" in answer["error"] and not hub.requests
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        nowhere = f"import os; os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:{closed.getsockname()[1]}'\n"
        answer = json.loads(hub.run(nowhere + code, tmp_path / "home", TOKEN, token=None, fresh=True).splitlines()[-1])
    assert "no connection to the Hub" in answer["error"] and answer["waits"] == [2.0, 8.0, 30.0]
    assert TOKEN not in answer["error"]
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
    answer = json.loads(hub.run(offline + code, tmp_path / "home", TOKEN, token=None, fresh=True).splitlines()[-1])
    assert "Unset `HF_HUB_OFFLINE`" in answer["error"] and answer["waits"] == []


def test_pushed_lora_loads_by_its_hub_name(hub: HubServer, tmp_path: Path, tiny_klein: Path) -> None:
    """Push, download, `load_lora_weights("user/repo")`: the network computes what the trained one did."""
    code = """
import sys, torch
from diffusers import Flux2KleinPipeline
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from sciflow_hf.hub.upload import check_access, upload
from sciflow_hf.report.model_card import CardFacts, save_card

base, folder = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
inputs = {
    "hidden_states": torch.randn(1, 24, 16, generator=generator), "timestep": torch.tensor([0.3]),
    "encoder_hidden_states": torch.randn(1, 12, 48, generator=generator),
    "guidance": None, "return_dict": False,
    "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(6), torch.arange(1)),
    "txt_ids": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(12)),
}
load = lambda: Flux2KleinPipeline.from_pretrained(base, text_encoder=None, tokenizer=None)
pipeline = load()
before = pipeline.transformer(**inputs)[0].detach()
pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_out.0"]))
with torch.no_grad():
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=generator)
trained = pipeline.transformer(**inputs)[0].detach()
metadata = pipeline.transformer.peft_config["default"].to_dict()
Flux2KleinPipeline.save_lora_weights(
    folder, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
    transformer_lora_adapter_metadata=metadata,
)
facts = CardFacts(repo_name="user/figures", family="flux2_klein", base_model=base,
    pipeline_class="Flux2KleinPipeline", adapter={"type": "lora"}, metrics={"eval_loss": 0.5})
repo = check_access("figures")
save_card(facts, folder)
upload(repo, folder)
fresh = load()
fresh.load_lora_weights("user/figures")
loaded = fresh.transformer(**inputs)[0].detach()
assert (trained - before).abs().max() > 1e-2
assert (trained - loaded).abs().max() < 1e-5, (trained - loaded).abs().max()
assert ModelCard.load("user/figures").data.eval_results[0].metric_value == 0.5
tree = {entry.path for entry in HfApi().list_repo_tree("user/figures", recursive=True)}
assert tree == {"README.md", "pytorch_lora_weights.safetensors", "run_facts.json"}, tree
"""
    hub.run(code, tmp_path / "home", str(tiny_klein), str(tmp_path / "run"))
