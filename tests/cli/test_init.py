"""`sciflow-hf init`: of any folder a YAML that trains, or the reason why not."""

import io
import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from documents import ROOT, parser_of
from PIL import Image

from sciflow_hf.cli import main
from sciflow_hf.data.inspect import figures
from sciflow_hf.options import read_yaml

CAPTION = "A bar chart with three blue bars"


def draw(file: Path, size: tuple[int, int] = (96, 64), seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def caption(file: Path, text: str = CAPTION) -> None:
    file.with_suffix(".txt").write_text(text, encoding="utf-8")


def tidy(folder: Path, count: int = 12) -> None:
    for i in range(count):
        draw(folder / f"{i}.png", seed=i)
        caption(folder / f"{i}.png", f"{CAPTION}, number {i}")


def messy(folder: Path) -> None:
    tidy(folder, 4)
    draw(folder / "in [v2]" / "wide.jpg", (300, 50))
    caption(folder / "in [v2]" / "wide.jpg", "A strip")
    draw(folder / "lost.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    caption(folder / "broken.png")
    (folder / "notes.docx").write_bytes(b"x")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")


def tiny(folder: Path) -> None:
    for i in range(3):
        draw(folder / f"{i}.png", (24, 16), seed=i)
        caption(folder / f"{i}.png")


def microscopy(folder: Path) -> None:
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 60_000, (64, 80), dtype=np.uint16)
        tifffile.imwrite(folder / f"cell{i}.tif", pixels)


def uncaptioned(folder: Path) -> None:
    for i in range(3):
        draw(folder / f"{i}.png")


def russian(folder: Path) -> None:
    for i in range(3):
        draw(folder / f"{i}.png", seed=i)
        caption(folder / f"{i}.png", "Столбчатая диаграмма, три столбца")


def read_only(folder: Path) -> None:
    tidy(folder, 3)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)


def one_image(folder: Path) -> None:
    tidy(folder, 1)


def huge(folder: Path) -> None:
    tidy(folder, 1)
    rows = [json.dumps({"file_name": "0.png", "caption": f"{CAPTION}, {i}"}) for i in range(5000)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def classes(folder: Path) -> None:
    for i in range(6):
        draw(folder / ("bars" if i % 2 else "pies") / f"{i}.png", (40, 40), seed=i)


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs the command on what a function makes: (status, the YAML's options, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(make: Callable[[Path], None], *flags: str) -> tuple[int, dict, str]:
        make(tmp_path / make.__name__)
        status = main(["init", make.__name__, "--memory_gb", "0", *flags])
        printed = capsys.readouterr()
        file = tmp_path / f"{make.__name__}.yaml"
        return status, read_yaml(file) if file.is_file() else {}, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    "make, family, says",
    [
        (tidy, "flux2_klein", "12 images, sides of 64 to 96 pixels"),
        (messy, "flux2_klein", "broken.png"),
        (huge, "flux2_klein", "5,000 captions, 5000 different"),
        (tiny, "flux2_klein", "3 images, sides of 16 to 24 pixels"),
        (microscopy, "microscopy_unet", "6 images, sides of 64 to 80 pixels"),
        (classes, "dit", "2 folders, taken for classes: bars, pies"),
        (russian, "flux2_klein", "most captions are written in Cyrillic letters"),
        (read_only, "flux2_klein", "3 images"),
        (one_image, "flux2_klein", "1 image, sides of 64 to 96 pixels"),
    ],
)
def test_a_yaml_that_trains(
    make: Callable, family: str, says: str, init: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, options, printed = init(make)
    assert status == 0 and says.replace("5000", "5,000") in printed
    assert options["input_dir"] == str(tmp_path / make.__name__) and options["output_dir"] == f"outputs/{make.__name__}"
    monkeypatch.setattr(sys, "argv", ["sciflow-hf"]), monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdout", sys.stdout), monkeypatch.setattr(sys, "stderr", sys.stderr)
    flags = ["--config", f"{make.__name__}.yaml", "--max_steps", "1", "--eval_strategy", "no", "--use_cpu"]
    flags += ["--validation_prompts"] * (family == "flux2_klein") + ["--save_strategy", "no"]
    if family == "microscopy_unet":
        flags += ["--block_out_channels", "8", "16", "--metric_tiles", "0"]
    if make in (huge, russian):  # building takes time
        assert parser_of(ROOT / "recipes" / "train_flux2klein.py").parse(flags)
        return
    with pytest.raises(SystemExit) as stop:
        main(["train", family, *flags])
    assert stop.value.code == 0 and (tmp_path / "outputs" / make.__name__ / "README.md").is_file()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda folder: folder.mkdir(), "holds no images"),
        (uncaptioned, "none of its 3 images has a caption. Looked for metadata.jsonl"),
        (lambda folder: None, "is no folder"),
    ],
)
def test_the_reason_why_not(make: Callable, says: str, init: Callable) -> None:
    make.__name__ = "folder"
    status, options, printed = init(make)
    assert status == 2 and options == {} and says in printed


@pytest.mark.parametrize(
    "memory, base, batch",
    [
        (85, "flux2klein_9b_lora", None), (24, "flux2klein_9b_lora", 1),
        (8, "sdxl_lora", 1), (6, "flux2klein_demo", None),
    ],
)  # fmt: skip
def test_the_model_fits_the_card(memory: int, base: str, batch: int | None, init: Callable, tmp_path: Path) -> None:
    status, options, _ = init(tidy, "--memory_gb", str(memory))
    text = (tmp_path / "tidy.yaml").read_text()
    assert status == 0 and f'base: "{base}"' in text
    assert options["per_device_train_batch_size"] == (batch or read_yaml(base)["per_device_train_batch_size"])


def test_long_figures_get_buckets_of_their_own(init: Callable, tmp_path: Path) -> None:
    """`messy` has one of 6:1 among five; mini_klein keeps to the shapes that it draws."""
    assert init(messy, "--memory_gb", "8")[1]["max_aspect_ratio"] == 4
    assert "20% of the figures are longer than 2:1" in (tmp_path / "messy.yaml").read_text()
    assert "max_aspect_ratio" not in init(tidy, "--memory_gb", "8")[1]
    (tmp_path / "messy.yaml").unlink()
    assert "max_aspect_ratio" not in init(lambda folder: None, "--output_file", "messy.yaml")[1]


def test_flags_answer_questions_and_the_rest_is_asked(
    init: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("sdxl\n\nresults\n"))
    status, options, printed = init(tidy)
    assert status == 0 and printed.count("? ") == 3 and "no GPU" in printed
    assert 'base: "sdxl_lora"' in (tmp_path / "tidy.yaml").read_text() and options["output_dir"] == "results"
    assert "this machine has 0: train it on another one" in (tmp_path / "tidy.yaml").read_text()

    monkeypatch.setattr(sys, "stdin", Terminal("never read\n"))
    flags = ["--model", "flux", "--max_steps", "7", "--output_dir", "x", "--output_file", "other.yaml"]
    assert init(lambda folder: tidy(folder), *flags)[0] == 0
    assert read_yaml("other.yaml")["max_steps"] == 7 and sys.stdin.readline() == "never read\n"


def test_mistakes(init: Callable, tmp_path: Path) -> None:
    (tmp_path / "tidy.yaml").write_text("rank: 1\n")
    status, options, printed = init(tidy)
    assert status == 2 and "tidy.yaml exists" in printed and options == {"rank": 1}
    status, _, printed = init(classes, "--model", "sdxl")
    assert status == 2 and "has no captions" in printed
    status, _, printed = init(tiny, "--max_steps", "0")
    assert status == 2 and "`max_steps` 0: at least 1" in printed


@pytest.mark.parametrize("make", [classes, microscopy])
def test_broken_images_are_named_without_captions_too(make: Callable, init: Callable, tmp_path: Path) -> None:
    def with_a_broken_one(folder: Path) -> None:
        make(folder)
        (folder / ("bars/broken.png" if make is classes else "zz.tif")).write_bytes(b"no picture")

    _, _, printed = init(with_a_broken_one)
    assert "6 images" in printed and re.search(r"unreadable image .*: 1: .*(broken\.png|zz\.tif)", printed)


def test_only_some_headers_of_many_images_are_read(init: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_LOOKED_AT", 5)
    _, _, printed = init(tidy)
    assert "12 images, sides of 64 to 96 pixels (of 5 that were looked at)" in printed
