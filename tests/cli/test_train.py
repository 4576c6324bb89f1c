"""`sciflow-hf train` and `configs`: the recipes and their configs by name, from any folder."""

import configparser
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import CONFIGS, commands, prose_of

import sciflow_hf as sf
from sciflow_hf import files
from sciflow_hf.cli import main
from sciflow_hf.cli.configs import header
from sciflow_hf.cli.train import RECIPES
from sciflow_hf.families import BUILT_IN
from sciflow_hf.options import read_yaml, shipped_configs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line and the path of imports, which a training of its own process changes."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield


def test_every_recipe_has_a_family() -> None:
    assert {f"{name}.py" for name in RECIPES.values()} == {path.name for path in (ROOT / "recipes").glob("*.py")}
    assert set(RECIPES) - {"mini_klein", "dpo", "reward"} == set(BUILT_IN)
    for name in RECIPES.values():
        assert callable(importlib.import_module(name).main)


@pytest.mark.parametrize("family", RECIPES)
def test_the_recipe_gets_its_flags(family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command = next(words for file in CONFIGS for words in commands(prose_of(file)) if words[1:3] == ["train", family])
    with pytest.raises(SystemExit) as stop:
        main([*command[1:], "--lerning_rate", "1"])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert (
        message
        == f"sciflow-hf train {family}: error: unknown argument --lerning_rate 1; did you mean `--learning_rate`?\n"
    )


def test_a_family_of_ones_own_by_its_dotted_path(
    tiny_klein: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_mine.py").write_text(
        "import sciflow_hf as sf\n\n\nclass Halved(sf.Flux2Klein):\n"
        "    def compute_loss(self, *args, **options):\n"
        "        loss, levels = super().compute_loss(*args, **options)\n        return loss / 2, levels\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", sys.stdout), monkeypatch.setattr(sys, "stderr", sys.stderr)
    flags = ["--pretrained_model_name_or_path", str(tiny_klein), "--max_sequence_length", "12", "--use_cpu"]
    flags += ["--dataset_dir", str(tiny_cache), "--max_steps", "2", "--logging_steps", "1", "--report_to", "none"]
    losses = []
    for family in ("of_mine.Halved", "flux2_klein"):
        with pytest.raises(SystemExit) as stop:
            main(["train", family, *flags, "--output_dir", family])
        assert stop.value.code == 0
        log = json.loads((tmp_path / family / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
        losses.append(next(entry["loss"] for entry in log if "loss" in entry))
    assert losses[0] == losses[1] / 2


@pytest.mark.parametrize(
    "name, meant", [("flux2klein", "did you mean `flux2_klein`?"), ("nothing", "or a dotted path.")]
)
def test_an_unknown_family(name: str, meant: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", name, "--rank", "1"]) == 2
    message = capsys.readouterr().err
    assert f"family {name!r}: use one of flux2_klein, " in message and message.endswith(f"{meant}\n")
    assert main(["train", "no.such.module"]) == 2
    assert "no.such.module" in capsys.readouterr().err


# ---- configs ----


def test_configs_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "recipes" / "configs"
    assert list(shipped_configs()) == sorted(path.stem for path in folder.glob("*.yaml"))
    for name in ("flux2klein_4b_lora", "flux2klein_4b_lora.yaml", folder / "flux2klein_4b_lora.yaml"):
        assert read_yaml(name) == read_yaml(folder / "flux2klein_4b_lora.yaml")
    (tmp_path / "mine.yaml").write_text("base: flux2klein_4b_lora\nrank: 3\n")
    assert read_yaml("mine.yaml") == read_yaml("flux2klein_4b_lora") | {"rank": 3}
    (tmp_path / "flux2klein_demo").write_text("rank: 5\n")
    assert read_yaml("flux2klein_demo") == {"rank": 5}, "a file of the user's wins"


@pytest.mark.parametrize(
    "name, meant",
    [
        ("flux2klein_dem", "Did you mean `flux2klein_demo`"),
        ("recipes/configs/sd3_lora.yaml", "Did you mean `sd3_lora`"),
        ("mine.yaml", "(no such file). `sciflow-hf configs`"),
    ],
)
def test_a_config_that_is_not_there(name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sf.SciflowError, match=re.escape(meant)):
        read_yaml(name)


def test_configs_are_listed_with_hardware_and_time(capsys: pytest.CaptureFixture) -> None:
    assert main(["configs"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for name, file in shipped_configs().items():
        assert f"{name} {header(file)}" in listed
        assert re.search(r" Hardware[:,] .*\b[Tt]ime\b", header(file)), name


def test_a_config_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["configs", "--copy", "flux2klein_4b_lora", "--output_dir", str(tmp_path / "new")]) == 0
    copy = tmp_path / "new" / "flux2klein_4b_lora.yaml"
    assert read_yaml(copy) == read_yaml("flux2klein_4b_lora")
    copy.write_text("rank: 1\n")
    for name, message in (("flux2klein_4b_lora", f"{copy} exists"), ("flux", "use one of dit_cifar10, ")):
        assert main(["configs", "--copy", name, "--output_dir", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
    assert copy.read_text() == "rank: 1\n"


# ---- the package ----


def test_recipes_and_configs_are_parts_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sciflow_hf").rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == rooms | {"sciflow_hf.recipes"}
    assert setup["options"]["package_dir"].split() == ["sciflow_hf.recipes", "=", "recipes"]
    assert {"configs/*", "launch/*"} <= set(setup["options.package_data"]["sciflow_hf.recipes"].split())

    package = tmp_path / "site-packages" / "sciflow_hf"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert files.recipes_folder() == package / "recipes"
