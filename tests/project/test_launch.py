"""recipes/launch: every file is what its tool reads, and starts a recipe by flags that exist."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import Flux2Transformer2DModel
from documents import ROOT, faults, links, mentioned_flags, named_paths, option_strings

from sciflow_hf.options import read_yaml

FOLDER = ROOT / "recipes" / "launch"
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
ENGINES = {
    "one_gpu.yaml": (DistributedType.NO, 1),
    "four_gpus_bf16.yaml": (DistributedType.MULTI_GPU, 4),
    "fsdp2.yaml": (DistributedType.FSDP, 4),
    "zero2.yaml": (DistributedType.DEEPSPEED, 4),
}
JOBS = ("azure_ml.yaml", "amlt.yaml", "skypilot.yaml", "slurm.sh")


def name(path: Path) -> str:
    return path.name


def header(path: Path) -> str:
    """The comment that a file begins with."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
    end = next((i for i, line in enumerate(lines) if not re.match(r"#( |$)", line)), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def strings(value: object) -> Iterator[str]:
    """Every text in what a YAML holds."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def commands(path: Path) -> list[list[str]]:
    """The commands of a file's header and of its jobs, in words; "1" for what the shell or the tool puts in."""
    text = path.read_text(encoding="utf-8")
    jobs = [text] if path.suffix == ".sh" else list(strings(yaml.safe_load(text)))
    found = []
    for part in [header(path), *jobs]:
        part = re.sub(r"\\\n\s*", " ", part)
        part = re.sub(r'"?\$(\(\(.*?\)\)|\{\{.*?\}\}|\w+)"?', "1", part)
        found += re.findall(r"(?:accelerate launch|python) [^\n;&]*recipes/\w+\.py[^\n;&'`]*", part)
    return [shlex.split(command) for command in found]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_header_has_command_hardware_and_what_to_edit(path: Path):
    text = header(path)
    assert "\nHardware: " in text and "\nTo edit: " in text, text
    tool = {"slurm.sh": "sbatch", "azure_ml.yaml": "az ml job create --file", "amlt.yaml": "amlt run"}
    tool |= {"skypilot.yaml": "sky jobs launch"}
    start = tool.get(path.name, "accelerate launch --config_file")
    assert re.search(rf"^  {start} .*recipes/launch/{path.name}", text, re.MULTILINE), text
    assert [p for p in [*links(text), *named_paths(text)] if not (ROOT / p).exists()] == []
    known = {flag for recipe in (ROOT / "recipes").glob("train_*.py") for flag in option_strings(recipe)}
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert mentioned_flags(text) - known - launcher - {"--secret", "--requeue"} == set()


@pytest.mark.promise("B17")
@pytest.mark.parametrize("path", FILES, ids=name)
def test_commands_have_flags_that_exist(path: Path):
    found = commands(path)
    assert len(found) == 1, found
    for words in found:
        place = next(i for i, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
        assert faults(["python", *words[place:]]) == []
        assert "--resume_from_checkpoint" in words or path.name not in JOBS
        launched = launch_command_parser().parse_args(words[2:])
        assert (ROOT / launched.config_file).is_file() and launched.training_script == words[place]
        chosen = read_yaml(ROOT / words[words.index("--config") + 1])
        config = yaml.safe_load((ROOT / launched.config_file).read_text(encoding="utf-8"))
        assert (config["mixed_precision"] == "bf16") == chosen.get("bf16", False), "two files say how to compute"


# ---- accelerate ----


def test_there_is_a_test_for_every_file():
    assert {path.name for path in FILES} == {*ENGINES, *JOBS}


@pytest.mark.promise("B17")
@pytest.mark.parametrize("file", ENGINES)
def test_accelerate_reads_its_files(file: str):
    """Its own loader, which refuses keys that it does not know."""
    config = load_config_from_file(str(FOLDER / file))
    engine, processes = ENGINES[file]
    assert config.distributed_type == engine and config.num_processes == processes
    assert config.mixed_precision == "bf16" and not config.use_cpu
    known = vars(launch_command_parser().parse_args(["recipe.py"]))
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section or {}) <= set(known), "the launcher takes each key as an option"


def launcher_environment(file: str) -> dict[str, str]:
    """What `accelerate launch` gives to the ranks."""
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / file), "--main_process_port", "0", "x.py"])
    return prepare_multi_gpu_env(_validate_launch_command(args)[0])


def test_fsdp2_file_makes_the_plugin_that_we_test(monkeypatch):
    for key, value in launcher_environment("fsdp2.yaml").items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert set(plugin.transformer_cls_names_to_wrap) == set(Flux2Transformer2DModel._repeated_blocks)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16" and os.environ["ACCELERATE_USE_FSDP"] == "true"


# ---- Azure ML, AMLT, SkyPilot: packages too large for tests, so their documented keys ----

# CLI (v2) command job YAML schema, learn.microsoft.com/azure/machine-learning/reference-yaml-job-command
AZURE = {
    "": "$schema type name display_name experiment_name description tags command code environment "
    "environment_variables distribution compute resources limits inputs outputs identity services queue_settings",
    "distribution": "type process_count_per_instance",
    "resources": "instance_count instance_type shm_size docker_args properties",
    "inputs.*": "type path mode",
    "outputs.*": "type path mode name",
    "environment": "image conda_file build os_type description tags",
}
# sky/utils/schemas.py of SkyPilot 0.14, docs.skypilot.co/en/latest/reference/yaml-spec.html
SKYPILOT = {
    "": "name workdir num_nodes resources envs secrets file_mounts setup run config service volumes event_callback",
    "resources": "infra cloud region zone accelerators cpus memory instance_type use_spot disk_size disk_tier "
    "network_tier image_id ports labels autostop any_of ordered job_recovery volumes",
    "resources.job_recovery": "strategy max_restarts_on_errors recover_on_exit_codes",
    "file_mounts.*": "name source store persistent mode config",
}
# Not public; keys that public examples use.
AMLT = {
    "": "description target environment code storage jobs search env_defaults",
    "target": "service name workspace_name resource_group subscription_id",
    "environment": "image registry username setup",
    "code": "local_dir ignore",
    "storage.*": "storage_account_name container_name mount_dir local_dir",
    "jobs.*": "name sku process_count_per_node mpi preemptible sla_tier priority command submit_args tags",
}


def unknown_keys(value: object, documented: dict[str, str], place: str = "") -> list[str]:
    """Keys that a mapping has beyond the documented ones; "*" stands for any name or number."""
    if not isinstance(value, dict | list):
        return []
    pairs = value.items() if isinstance(value, dict) else [("*", item) for item in value]
    found = []
    if isinstance(value, dict) and place in documented:
        found = [f"{place}.{key}" for key in value if key not in documented[place].split()]
    for key, item in pairs:
        below = f"{place}.{key}".lstrip(".")
        known = [k for k in documented if k == below or k == f"{place}.*".lstrip(".")]
        found += unknown_keys(item, documented, known[0] if known else below)
    return found


@pytest.mark.promise("B18")
@pytest.mark.parametrize(
    ("file", "documented"), [("azure_ml.yaml", AZURE), ("skypilot.yaml", SKYPILOT), ("amlt.yaml", AMLT)]
)
def test_keys_of_job_files_are_documented(file: str, documented: dict[str, str]):
    job = yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))
    assert unknown_keys(job, documented) == []
    assert unknown_keys(job | {"comand": "x"}, documented) == [".comand"]


@pytest.mark.promise("B18")
def test_job_files_agree():
    azure, amlt, sky = (yaml.safe_load((FOLDER / f).read_text()) for f in JOBS[:3])
    assert azure["type"] == "command" and azure["distribution"]["type"] == "pytorch"
    used = set(re.findall(r"\$\{\{(inputs|outputs)\.(\w+)\}\}", azure["command"]))
    assert used == {(kind, key) for kind in ("inputs", "outputs") for key in azure[kind]}
    assert azure["outputs"]["run"]["mode"] == "rw_mount", "checkpoints must outlive the node"
    folders = azure["code"], amlt["code"]["local_dir"].removeprefix("$CONFIG_DIR/")
    assert [(FOLDER / folder).resolve() for folder in folders] == [ROOT, ROOT]
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [75] and sky["secrets"] == {"HF_TOKEN": None}
    words = {file: commands(FOLDER / file)[0] for file in JOBS}
    assert {w[w.index("--config_file") + 1] for w in words.values()} == {"recipes/launch/four_gpus_bf16.yaml"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_tokens(path: Path):
    assert not re.search(r"hf_\w{8}|(token|key|password)\s*[:=]\s*['\"]?\w{12}", path.read_text(), re.IGNORECASE)


# ---- Slurm ----


def test_slurm_script_is_bash_and_counts_its_gpus():
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert {"requeue", "open-mode"} <= set(options) and re.fullmatch(r"B:USR1@\d+", options["signal"])
    assert options["ntasks-per-node"] == "1" and f"SLURM_NNODES * {options['gpus-per-node']}))" in text


RANK = """
import signal, sys, time
def told(number, frame):
    print("rank saved", flush=True)
    sys.exit(int(sys.argv[1]))
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "the launcher would be ended by the signal"
signal.signal(signal.SIGUSR1, told)
print("rank started", " ".join(sys.argv[2:]), flush=True)
for _ in range(600):
    time.sleep(0.1)
"""


def slurm_run(tmp_path: Path, *, rank: str = RANK, status: int, tell: bool = False) -> tuple[int, str, str]:
    """Runs the script with stand-ins for Slurm and accelerate: exit status, output, calls of the stand-ins."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    calls.touch()
    (tmp_path / "rank.py").write_text(rank)
    stand_ins = {
        "srun": f'echo $$ > {tmp_path}/step; shift; SLURM_NODEID=1 exec "$@"',
        "scancel": f'echo "scancel $*" >> {calls}; kill -USR1 "$(cat {tmp_path}/step)"',
        "scontrol": f'if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*" >> {calls}; fi',
        "accelerate": f'exec {sys.executable} {tmp_path}/rank.py {status} "$@"',
    }
    for tool, script in stand_ins.items():
        (tools / tool).write_text(f"#!/bin/bash\n{script}\n")
        (tools / tool).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "VENV": str(tmp_path)}
    (tools / "activate").touch()
    env |= {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "CACHE": "my cache"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(["bash", FOLDER / "slurm.sh"], env=env, cwd=tmp_path, **pipes) as job:
        lines = []
        for line in job.stdout:
            lines.append(line)
            if tell and "rank started" in line:
                os.kill(job.pid, signal.SIGUSR1)  # as Slurm does, to the batch shell alone
    return job.returncode, "".join(lines), calls.read_text()


def test_slurm_script_passes_the_signal_on_and_queues_the_job_again(tmp_path):
    status, output, calls = slurm_run(tmp_path, status=1, tell=True)
    assert status == 1 and "rank saved" in output, output
    assert calls.splitlines() == ["scancel --signal=USR1 41", "scontrol requeue 41"]
    words = shlex.split(output.splitlines()[0].removeprefix("rank started "))
    place = words.index("recipes/train_flux2klein.py")
    args = launch_command_parser().parse_args(words[1 : place + 1])
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip) == (2, 8, 1, "node7")
    assert args.main_process_port == 20041 and "--dataset_dir my cache" in output


@pytest.mark.parametrize("status", [0, 2])
def test_slurm_script_does_not_queue_what_ends_by_itself(tmp_path, status):
    code, output, calls = slurm_run(tmp_path, rank=f"raise SystemExit({status})", status=status)
    assert code == status and calls == "", output
