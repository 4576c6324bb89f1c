"""`--hub_strategy` as in transformers, and `sciflow-hf push`, over a Hub on the loopback interface."""

import json
from pathlib import Path

import pytest
from caches import encoder_settings, write_cache
from hub_server import HubServer
from safetensors.torch import load

from sciflow_hf.cli import main
from sciflow_hf.training.checkpoints import checkpoint_fault

# huggingface_hub reads its address once, at import: every client is a process of its own.
PRELUDE = """
import logging, shutil, sys
from pathlib import Path
from urllib.request import urlopen
from trainings import make_trainer
from transformers import TrainerCallback
import sciflow_hf as sf
import sciflow_hf.hub.upload

sciflow_hf.hub.upload.RETRY_WAITS = (0.0, 0.0, 0.0)
klein, cache, out, url = sys.argv[1:]
family = sf.Flux2Klein(klein, max_sequence_length=12)
def trainer(name, **options):
    steps = dict(max_steps=4, save_steps=2, save_strategy="steps", save_total_limit=1, report_to=[])
    push = dict(push_to_hub=True, hub_model_id=name)
    return make_trainer(Path(out) / name, family, cache, **(steps | push | options))
"""

STRATEGIES = """
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    trainer(strategy, hub_strategy=strategy, hub_always_push=True).train()
trainer("epochs", hub_strategy="every_save", save_strategy="epoch", max_steps=-1, num_train_epochs=1).train()
"""

HELD = """
class Held(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            on_disk.append(sorted(path.name for path in (Path(out) / "held").glob("checkpoint-*")))
    def on_train_end(self, args, state, control, **kwargs):
        on_disk.append(sorted(path.name for path in (Path(out) / "held").glob("checkpoint-*")))
        urlopen(f"{url}/release").close()  # the Trainer waits for pushes after this
on_disk = []
held = trainer("held", hub_strategy="all_checkpoints", max_steps=6)
held.add_callback(Held())
urlopen(f"{url}/hold").close()
held.train()
print(on_disk)
urlopen(f"{url}/fail/commit/403/1").close()
failing = trainer("failing", hub_strategy="every_save", hub_always_push=True)
failing.train()
"""

PUSH = """
from sciflow_hf.cli import main
first = trainer("first", push_to_hub=False, eval_fraction=0.4, hub_model_id="by-trainer")
first.train()
first.evaluate()
first.push_to_hub()
second = trainer("second", push_to_hub=False, eval_fraction=0.4, hub_model_id=None)
second.train()
second.evaluate()
second.save_model()
second.create_model_card()
shutil.copytree(Path(out) / "second", Path(out) / "edited")
with open(Path(out) / "edited" / "README.md", "a") as card:
    card.write("By hand.\\n")
push = lambda *words: main(["push", *map(str, words)])
assert push(Path(out) / "second", "--hub_model_id", "by-command", "--private") == 0
assert push(Path(out) / "second") == 0, "the facts now name the repository"
assert push(Path(out) / "edited", "--hub_model_id", "edited") == 0
assert push(Path(out) / "second" / "checkpoint-4", "--hub_model_id", "checkpoint") == 0
for status in (401, 403, 409, 503):
    for route in ("auth-check", "commit"):
        urlopen(f"{url}/fail/{route}/{status}/9").close()
        assert push(Path(out) / "second") == 2
        urlopen(f"{url}/recover").close()
assert push(Path(out) / "second", "--hub_token", "no-such-token") == 2
"""


def run(hub: HubServer, code: str, tmp_path: Path, tiny_klein: Path) -> str:
    """What the client wrote to stdout and stderr."""
    cache = write_cache(tmp_path / "cache", settings=encoder_settings(tiny_klein), buckets={(32, 48): 16})
    code = f"import sys; sys.stderr = sys.stdout\n{PRELUDE}{code}"
    return hub.run(code, tmp_path / "home", str(tiny_klein), str(cache), str(tmp_path / "out"), hub.url)


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def below(files: dict[str, bytes], place: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{place}/"): data for name, data in files.items() if name.startswith(f"{place}/")}


def tensors(files: dict[str, bytes]) -> dict[str, list]:
    """Of the LoRA file, whose header may name its metadata in any order."""
    return {name: value.tolist() for name, value in load(files["pytorch_lora_weights.safetensors"]).items()}


def without_times(facts: dict) -> dict:
    metrics = {k: v for k, v in facts["metrics"].items() if not k.endswith(("_runtime", "_per_second"))}
    return facts | {"metrics": metrics}


def test_strategies_push_what_those_of_transformers_push(hub: HubServer, tmp_path, tiny_klein):
    run(hub, STRATEGIES, tmp_path, tiny_klein)
    repos, steps = {name.removeprefix("user/"): repo for name, repo in hub.repos.items()}, (2, 4)
    assert repos["end"].messages == [] and repos["end"].files == {}
    saves = [f"Training in progress, step {step}" for step in steps]
    both = [message for save in saves for message in (save, f"{save}, checkpoint")]
    assert repos["every_save"].messages == saves
    assert repos["checkpoint"].messages == repos["all_checkpoints"].messages == both
    assert repos["epochs"].messages == ["Training in progress, epoch 1"]
    top = {"README.md", "pytorch_lora_weights.safetensors", "run_facts.json"}
    assert {*repos["every_save"].files} - {"training.png"} == top
    places = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
    }
    for strategy, wanted in places.items():
        files = repos[strategy].files
        assert {name.split("/")[0] for name in files if "checkpoint" in name} == wanted
        newest = tmp_path / "out" / strategy / "checkpoint-4"
        assert tensors(files) == tensors(read(newest))
        for place in wanted:
            for name, data in below(files, place).items():
                (tmp_path / strategy / place / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / strategy / place / name).write_bytes(data)
            assert checkpoint_fault(tmp_path / strategy / place) is None, "it can be resumed from"
    assert below(repos["checkpoint"].files, "last-checkpoint") == read(tmp_path / "out/checkpoint/checkpoint-4")
    assert {"optimizer.pt", "trainer_state.json", "manifest.json"} <= {*read(tmp_path / "out/checkpoint/checkpoint-4")}


def test_a_push_under_way_is_left_alone(hub: HubServer, tmp_path, tiny_klein):
    """Saves meanwhile are not pushed, the checkpoint being pushed stays, and a refusal does not stop the run."""
    output = run(hub, HELD, tmp_path, tiny_klein)
    held, failing = hub.repos["user/held"], hub.repos["user/failing"]
    assert held.messages == ["Training in progress, step 2", "Training in progress, step 2, checkpoint"]
    assert "[['checkpoint-2'], ['checkpoint-2', 'checkpoint-6']]" in output
    assert {"optimizer.pt", "manifest.json"} <= {*below(held.files, "checkpoint-2")}
    assert failing.messages == ["Training in progress, step 4"] and "403" in output


def test_push_command(hub: HubServer, tmp_path, tiny_klein):
    """A run pushed later is on the Hub as one that was pushed at its end; every refusal says what to do."""
    output = run(hub, PUSH, tmp_path, tiny_klein)
    at_end, later = hub.repos["user/by-trainer"], hub.repos["user/by-command"]
    assert {*at_end.files} == {*later.files} and later.private
    assert later.files["README.md"].replace(b"by-command", b"by-trainer") == at_end.files["README.md"]
    assert tensors(later.files) == tensors(at_end.files)
    facts = [without_times(json.loads(repo.files["run_facts.json"])) for repo in (at_end, later)]
    assert facts[1] == facts[0] | {"repo_name": "user/by-command"}
    assert b'load_lora_weights("user/by-command")' in later.files["README.md"]
    edited = hub.repos["user/edited"].files["README.md"]
    assert edited.endswith(b"By hand.\n") and "was edited and is pushed as it is" in output
    assert {*hub.repos["user/checkpoint"].files} == {"pytorch_lora_weights.safetensors"}
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 9 and not any("train without" in line for line in errors)
    for line, status in zip(errors, (401, 401, 403, 403, 409, 409, 503, 503, 401), strict=True):
        assert f"({status}" in line and "push to 'user/by-command'" in line
    assert all("sciflow-hf push" in line and "--hub_model_id user/by-command" in line for line in errors[1:8:2])
    assert "Traceback" not in output and "no-such-token" not in output


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no weights of an adapter, a network or a pipeline"),
        (("notes.txt", "README.md"), "no weights of an adapter"),
        (("checkpoint-9/optimizer.pt", "checkpoint-10/optimizer.pt"), "only checkpoints (checkpoint-10). Finish"),
        (("model_index.json", "scheduler/scheduler_config.json"), "no weights"),
        (("pytorch_lora_weights.safetensors",), "`hub_model_id` is missing"),
        (("pytorch_lora_weights.safetensors", "run_facts.json"), "is damaged or of another version"),
    ],
)
def test_push_refuses_a_folder_without_a_result(tmp_path, capsys, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert main(["push", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_push_of_no_folder(tmp_path, capsys):
    assert main(["push", str(tmp_path / "none")]) == 2
    assert "is no folder: name the `--output_dir`" in capsys.readouterr().err
