"""The notebooks: small and without outputs; each runs, in a few steps here and in full in the acceptance tier."""

import contextlib
import json
import re
from pathlib import Path

import forked
import nbformat
import pytest
from nbclient import NotebookClient
from recipe_runs import ROOT, environment

FOLDER = ROOT / "notebooks"
NAMES = [
    "01_finetune_flux2klein", "02_caches_and_buckets", "03_your_own_model_family", "04_dit_from_scratch",
    "05_microscopy", "06_edit_figures", "07_preferences", "08_sciforma_in_small",
    "09_rewards",
]  # fmt: skip


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name, folder: Path, **env: str) -> tuple[list[str], int]:
    """Runs a notebook in `folder`: what each cell printed, and the number of pictures that it shows."""
    notebook = read(name)
    client = NotebookClient(notebook, timeout=720, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment(HF_HOME=str(folder / "hf"), **env))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [
        "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout")
        for cell in notebook.cells
    ]
    return texts, sum("image/png" in output.get("data", {}) for output in outputs)


CELLS = """
import json, sys
import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        pass

shell = Shell.instance()
shell.run_line_magic("matplotlib", "inline")
texts, pictures, (name, answer) = [], 0, sys.argv[1:]
for cell in nbformat.read(name, as_version=4).cells:
    if cell.cell_type == "code":
        with capture_output() as captured:
            done = shell.run_cell(cell.source)
        done.raise_error()
        texts.append(captured.stdout)
        pictures += sum("image/png" in output.data for output in captured.outputs) + hasattr(done.result, "_repr_png_")
open(answer, "w").write(json.dumps([texts, pictures]))
"""


def run_cells(name, folder: Path, **env: str) -> tuple[list[str], int]:
    """As `execute` in a few steps, but in a fork that has the libraries, without a kernel."""
    with contextlib.chdir(folder):
        job = (["-c", CELLS, FOLDER / f"{name}.ipynb", folder / "answer.json"], environment(FAST="1", **env))
        done = forked.run(job)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    texts, pictures = json.loads((folder / "answer.json").read_text())
    return texts, pictures


def numbers(pattern, texts):
    return [float(number) for number in re.findall(pattern, "\n".join(texts))]


def test_the_notebooks_are_these():
    assert sorted(path.name for path in FOLDER.iterdir() if path.suffix == ".ipynb") == [f"{n}.ipynb" for n in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_small_clean_and_valid(name):
    """Ruff reads notebooks, too: `.ci/run` lints the cells."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 25
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert [cell.id for cell in notebook.cells] == [f"{name[:2]}-{i:02d}" for i in range(1, len(notebook.cells) + 1)]
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    flag = 'FAST = os.environ.get("FAST") == "1"  # FAST=1: '
    assert notebook.cells[0].cell_type == "markdown" and flag in code[0].source
    assert "minute" in notebook.cells[0].source, "says how long it takes"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_notebook_names_are_there(name):
    text = "\n".join(cell.source for cell in read(name).cells)
    for path in re.findall(r"\b(?:docs|tests|recipes)/[\w/]+\.(?:md|py|yaml)", text):
        assert (ROOT / path).is_file(), path


# -- a few steps ---------------------------------------------------------------------------------------------------


def test_finetune_in_a_few_steps_and_push(tmp_path, hub):
    texts, pictures = run_cells(NAMES[0], tmp_path, **hub.env(tmp_path / "hf"), HUB_REPO="user/night")
    assert pictures == 5  # figures, bucket chart, training.png, contact sheet, strengths
    assert "16 figures to train on, 4 held out" in "".join(texts) and "pushed to user/night" in texts[-1]
    assert "A LoRA for" in texts[-1]
    pushed = hub.repos["user/night"].files
    assert {"pytorch_lora_weights.safetensors", "README.md", "training.png"} <= set(pushed)
    assert pushed["training.png"] == (tmp_path / "outputs/01_finetune/run/training.png").read_bytes()


def check_caches(texts, pictures):
    text = "".join(texts)
    assert pictures == 3  # figures, latents, bucket chart
    assert "whole: True" in text and "its bytes have changed" in text and "mended: True" in text
    assert text.count("latents equal: True") == 4 and "once more: 0 encoded" in text


def test_caches_in_a_few_figures(tmp_path):
    check_caches(*run_cells(NAMES[1], tmp_path))


def check_family(texts, pictures):
    """The family of the notebook steps as the built-in one; the mistakes that it shows, show."""
    right, *wrong = zip(*(numbers(rf"{what} (\d\.\de[+-]\d+)", texts) for what in ("loss", "gradient")), strict=True)
    assert max(right) < 1e-4 and len(wrong) == 2 and min(map(min, wrong)) > 0.1
    assert numbers(r"loss of a perfect network: (\S+)", texts) == [0.0]
    assert pictures == 3  # training.png, contact sheet, a drawn figure


def test_own_family_in_a_few_steps(tmp_path):
    check_family(*run_cells(NAMES[2], tmp_path))


def test_dit_in_a_few_steps(tmp_path):
    texts, pictures = run_cells(NAMES[3], tmp_path)
    assert pictures == 8 and "1257 images to train on, 540 held out" in "".join(texts)
    assert (tmp_path / "outputs/04_dit/model_index.json").is_file()
    assert numbers(r"held out (\d\.\d+)", texts)[0] == pytest.approx(2.1, abs=0.3)


def test_microscopy_in_a_few_steps(tmp_path):
    texts, pictures = run_cells(NAMES[4], tmp_path)
    assert pictures == 4 and "Held-out loss" in "".join(texts)
    assert (tmp_path / "outputs/05_microscopy/model_index.json").is_file()


def test_edits_in_a_few_steps(tmp_path):
    texts, pictures = run_cells(NAMES[5], tmp_path)
    assert pictures == 3  # pairs, contact sheet, edits
    assert "pairs to train on" in "".join(texts) and "Held-out loss" in "".join(texts)
    assert (tmp_path / "outputs/06_edits/run/pytorch_lora_weights.safetensors").is_file()


def test_preferences_in_a_few_steps(tmp_path):
    texts, pictures = run_cells(NAMES[6], tmp_path)
    text = "".join(texts)
    assert pictures == 3  # candidates, contact sheet, a drawn figure
    assert "groups to train on" in text and "'names_colour': False" in text
    assert (tmp_path / "outputs/07_preferences/run/pytorch_lora_weights.safetensors").is_file()


def test_course_in_a_few_steps(tmp_path):
    texts, pictures = run_cells(NAMES[7], tmp_path)
    assert pictures == 4  # three contact sheets, edits by stage
    assert "psnr" in "".join(texts) and "stage2 - base" in "".join(texts) and "stage3 - base" in "".join(texts)
    assert (tmp_path / "outputs/08_sciforma_in_small/stage3/pytorch_lora_weights.safetensors").is_file()


def test_rewards_in_a_few_steps(tmp_path):
    texts, pictures = run_cells(NAMES[8], tmp_path)
    assert pictures == 5  # before, curves, best and worst, before and after; best and worst of the hacked reward
    before, *_ = (json.loads(line) for line in "".join(texts).splitlines() if line.startswith("["))
    assert len(before) == 16 and all(0 < score <= 1 for score in before)
    run = tmp_path / "outputs/09_rewards/run"
    assert (run / "pytorch_lora_weights.safetensors").is_file() and len(list(run.glob("rollouts/*.png"))) == 2
    watched = (tmp_path / "outputs/09_rewards/hacked/log.jsonl").read_text()
    assert "eval_watched_white_page_gain_low" in watched


# -- in full -------------------------------------------------------------------------------------------------------


@pytest.mark.acceptance
def test_finetune_in_full(tmp_path):
    texts, _ = execute(NAMES[0], tmp_path)
    assert ": better)" in "".join(texts)


@pytest.mark.acceptance
def test_caches_in_full(tmp_path):
    check_caches(*execute(NAMES[1], tmp_path))


@pytest.mark.acceptance
def test_own_family_in_full(tmp_path):
    texts, pictures = execute(NAMES[2], tmp_path)
    check_family(texts, pictures)
    assert ": better)" in "".join(texts)


@pytest.mark.acceptance
def test_dit_in_full(tmp_path):
    """Digits that a classifier of real ones recognises, and that are no copies of training images."""
    texts, _ = execute(NAMES[3], tmp_path)
    assert numbers(r"'eval_class_accuracy': (\d\.\d+)", texts)[0] > 0.9
    drawn, held_out = numbers(r"drawn (\d\.\d+)", texts)[0], numbers(r"held out (\d\.\d+)", texts)[0]
    assert 0.7 * held_out < drawn < 1.5 * held_out


@pytest.mark.acceptance
def test_microscopy_in_full(tmp_path):
    """The mean of the samples is nearer to the truth than the measured image, and than one sample."""
    texts, _ = execute(NAMES[4], tmp_path)
    rows = {line[:16].strip(): numbers(r": (-?\d+\.\d) dB", [line]) for line in "".join(texts).splitlines()}
    measured, sample, mean = (rows[name] for name in ("measured", "one sample", "mean of samples"))
    assert all(m > s for m, s in zip(mean, sample, strict=True)) and sum(mean) > sum(measured) + 4 * 3


@pytest.mark.acceptance
def test_edits_in_full(tmp_path):
    texts, _ = execute(NAMES[5], tmp_path)
    assert ": better)" in "".join(texts)
