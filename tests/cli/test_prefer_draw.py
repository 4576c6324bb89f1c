"""`sciflow-hf prefer draw`: the same files whatever happens in between, folders of its own, and bad input by name."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sciflow_hf as sf
from sciflow_hf.cli import main, prefer_draw
from sciflow_hf.data.prompts import read_prompts
from sciflow_hf.diffusion.randomness import hash64
from sciflow_hf.errors import SciflowError

PROMPTS = [
    {"prompt": "a plot", "kind": "line", "count": 3},
    {"prompt": "a chart", "kind": "bar", "width": 48},
    {"prompt": "a plot", "kind": "line", "seed": 9, "texts": ["x", "y"]},
    {"prompt": "a plot", "kind": "line"},
]
FLAGS = ["--num_candidates", 2, "--num_inference_steps", 1, "--height", 16, "--max_sequence_length", 12]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return file


@pytest.fixture(scope="module")
def draw(tiny_klein, prompts):
    def run(folder, *flags):
        words = ["prefer", "draw", "--model_path", tiny_klein, "--prompts_file", prompts, "--output_dir", folder]
        size = [] if "--width" in flags else ["--width", 32]
        return main([*map(str, [*words, *FLAGS, *size, "--device", "cpu", *flags])])

    return run


@pytest.fixture(scope="module")
def drawn(draw, tmp_path_factory):
    """The folder that all others are compared with. Read only."""
    folder = tmp_path_factory.mktemp("drawn") / "candidates"
    assert draw(folder) == 0
    return folder


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_the_table(drawn):
    """Columns of the prompts file travel; a prompt that is there twice is drawn anew; seeds are the generators'."""
    found = rows(drawn)
    assert [row["file_name"] for row in found] == [f"{i:05d}_{n:02d}.png" for i in range(4) for n in range(2)]
    assert [row["kind"] for row in found[::2]] == ["line", "bar", "line", "line"] and found[4]["texts"] == ["x", "y"]
    assert found[0]["count"] == 3 and "width" not in found[2] and "prompt" not in found[0]
    assert len({row["group_id"] for row in found}) == 4 and found[0]["group_id"] == found[1]["group_id"]
    assert found[3]["seed"] == hash64(0, "a chart", 0, "candidate", 1) & 0xFFFFFFFF
    assert found[4]["seed"] == hash64(9, "a plot", 0, "candidate", 0) & 0xFFFFFFFF
    assert found[6]["seed"] == hash64(0, "a plot", 1, "candidate", 0) & 0xFFFFFFFF
    pictures = {(drawn / row["file_name"]).read_bytes() for row in found}
    assert len(pictures) == 8


def test_images_and_latents_are_those_of_the_pipeline(drawn, tiny_klein):
    family = sf.Flux2Klein(pretrained_model_name_or_path=str(tiny_klein), max_sequence_length=12)
    pipeline = family.load_pipeline(family.load_model(dtype=torch.float32).eval())
    [encoded] = family.encode_validation_prompts(["a chart"], device="cpu", dtype=torch.float32)
    two = [row for row in rows(drawn) if row["caption"] == "a chart"]
    latents, images = family.draw(
        pipeline, encoded, height=16, width=32, num_inference_steps=1, guidance_scale=3.5,
        generators=[torch.Generator().manual_seed(row["seed"]) for row in two],
    )  # fmt: skip
    assert torch.equal(load_file(drawn / two[0]["latents_file"])["latents"], latents)
    for row, image in zip(two, images, strict=True):
        with Image.open(drawn / row["file_name"]) as found:
            assert found.size == (32, 16) and found.tobytes() == image.tobytes()
            assert found.info["group_id"] == row["group_id"] and found.info["seed"] == str(row["seed"])


def test_a_candidate_depends_on_no_other_prompt(draw, drawn, tmp_path):
    (tmp_path / "one.txt").write_text("a chart\n")
    draw(tmp_path / "one", "--prompts_file", tmp_path / "one.txt")
    assert (tmp_path / "one" / "00000_01.png").read_bytes() == (drawn / "00001_01.png").read_bytes()
    assert rows(tmp_path / "one")[1]["group_id"] == rows(drawn)[3]["group_id"]


@pytest.mark.parametrize("die_at", [1, 2, 4, 8, 13])  # draw.json, images, latents, ..., metadata.jsonl
def test_killed_and_continued(draw, drawn, tmp_path, monkeypatch, die_at):
    """kill -9 as a file is renamed: nothing that was complete is drawn again, and the folder is the same."""
    pid, calls = os.fork(), 0
    if pid == 0:
        replace = os.replace

        def replace_or_die(source, target):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_or_die
        draw(tmp_path / "a")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    there = len(list((tmp_path / "a").glob("latents/*.safetensors")))
    assert there == max(0, die_at - 2) // 3
    drawn_now, whole = [], sf.Flux2Klein.draw
    monkeypatch.setattr(sf.Flux2Klein, "draw", lambda *args, **options: drawn_now.append(1) or whole(*args, **options))
    assert draw(tmp_path / "a") == 0
    assert len(drawn_now) == 4 - there
    assert files(tmp_path / "a") == files(drawn)


def test_two_ranks_draw_what_one_does(draw, drawn, tmp_path, monkeypatch, capsys):
    """In either order; only the first one tells, and writes the table."""
    for rank in (1, 0):
        ranks = {"rank": rank, "world_size": 2, "barrier": lambda: None}
        monkeypatch.setattr(
            prefer_draw, "processes", lambda device, ranks=ranks: contextlib.nullcontext((torch.device("cpu"), ranks))
        )
        assert draw(tmp_path / "a") == 0
        mine = sorted(p.stem for p in (tmp_path / "a" / "latents").iterdir())
        if rank:
            assert mine == ["00001", "00003"] and not (tmp_path / "a" / "metadata.jsonl").exists()
            (tmp_path / "a" / "draw.json").write_bytes((drawn / "draw.json").read_bytes())  # of rank 0, before
    assert files(tmp_path / "a") == files(drawn)
    assert capsys.readouterr().out.count("8 candidates of 4 prompts in") == 1


def test_what_is_missing_is_drawn_again(draw, drawn, tmp_path):
    draw(tmp_path / "a")
    (tmp_path / "a" / "00001_01.png").unlink()
    (tmp_path / "a" / "latents" / "00002.safetensors").unlink()
    draw(tmp_path / "a")
    assert files(tmp_path / "a") == files(drawn)


def test_scores_of_images_that_are_as_they_were_are_kept(draw, drawn, tmp_path, caplog):
    folder, table = tmp_path / "a", "metadata.jsonl"
    shutil.copytree(drawn, folder)
    scored = [row | {"score": float(number)} for number, row in enumerate(rows(folder))]
    (folder / table).write_text("".join(json.dumps(row) + "\n" for row in scored))
    assert draw(folder) == 0 and rows(folder) == scored and not caplog.records
    (folder / scored[3]["file_name"]).unlink()
    assert draw(folder) == 0
    lost = [row | {"score": None} if number in (2, 3) else row for number, row in enumerate(scored)]
    assert rows(folder) == lost and "2 rows of images that were drawn again" in caplog.text


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--seed", 1], "`seed` was 0, not 1"),
        (["--num_candidates", 3], "`num_candidates` was 2, not 3"),
        (["--guidance_scale", 1], "`guidance_scale` was 3.5, not 1.0"),
        (["--width", 48], "`width` was 32, not 48"),
        (["--prompts_file", "other.txt"], "`prompts_file` was"),
        (["--model_path", "mini_klein"], "`model_path` was"),
        (["--max_sequence_length", 8], "`max_sequence_length` was 12, not 8"),
    ],
)
def test_a_folder_of_another_run(draw, drawn, tmp_path, monkeypatch, capsys, flags, match):
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("another\n")
    before = files(drawn)
    assert draw(drawn, *flags) == 2
    error = capsys.readouterr().err
    assert "holds candidates of another run" in error and match in error and files(drawn) == before


def test_a_folder_of_something_else(draw, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert draw(tmp_path) == 2
    assert "holds other files, such as 'notes.txt'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--num_candidates", 1], "`num_candidates` 1: at least 2"),
        (["--height", 12], "multiples of 8 for `flux2_klein`"),
        (["--num_inference_steps", 0], "`num_inference_steps` 0: at least 1"),
        (["--prompts_file", "none.txt"], "`prompts_file` 'none.txt': there is no such file. Give a .txt"),
        (["--split", "test"], "`split` 'test' is for data sets"),
        (["--guidance_scale", "nan"], "`guidance_scale` nan: a finite number"),
    ],
)
def test_mistakes(draw, tmp_path, capsys, flags, match):
    assert draw(tmp_path / "a", *flags) == 2
    error = capsys.readouterr().err
    assert match in error and "Traceback" not in error and not (tmp_path / "a").exists()


def test_a_full_disk(draw, drawn, tmp_path, monkeypatch, capsys):
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert draw(tmp_path / "a") == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error and "repeat the same command: it continues from here" in error
    assert draw(tmp_path / "a") == 0
    assert files(tmp_path / "a") == files(drawn)


def test_columns_that_cannot_travel_are_named(draw, tmp_path, caplog):
    row = {"prompt": "a chart", "caption": "mine", "number": 7, "made": {"by": "x"}, "kind": "bar"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert draw(tmp_path / "a", "--prompts_file", tmp_path / "p.jsonl") == 0
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert ["`caption`" in said[0], "`number`" in said[1], "neither texts nor numbers" in said[2]] == [True] * 3
    assert rows(tmp_path / "a")[0]["caption"] == "a chart" and rows(tmp_path / "a")[0]["kind"] == "bar"


def test_edits_name_their_sources(draw, tmp_path, capsys):
    Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "s.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "red", "source_images": ["s.png"]}) + "\n")
    assert draw(tmp_path / "a", "--prompts_file", tmp_path / "p.jsonl", "--height", 64, "--width", 96) == 0
    assert rows(tmp_path / "a")[0]["source_image"] == [str(tmp_path / "s.png")]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "red", "source_images": "none.png"}) + "\n")
    assert draw(tmp_path / "b", "--prompts_file", tmp_path / "p.jsonl") == 2
    assert "row 0: `source_images`" in capsys.readouterr().err


# ---- prompts ----


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = write(tmp_path, "p.txt", "\ufeffa plot, 5 µm\n\n  a chart  \n")
    assert read_prompts(file) == [{"prompt": "a plot, 5 µm"}, {"prompt": "a chart"}]


def test_tables_say_the_same(tmp_path, datasets_cache):
    import datasets

    table = [
        {"caption": "a plot", "width": 64, "height": None, "seed": 1, "kind": "bar", "source_images": "a.png, b.png"},
        {"caption": "a chart", "width": None, "height": 32, "seed": None, "kind": None, "source_images": None},
    ]
    folder = str(tmp_path)
    expected = [
        {"prompt": "a plot", "width": 64, "seed": 1, "kind": "bar",
         "source_images": [os.path.join(folder, "a.png"), os.path.join(folder, "b.png")]},
        {"prompt": "a chart", "height": 32},
    ]  # fmt: skip
    data = datasets.Dataset.from_list(table)
    data.to_parquet(tmp_path / "p.parquet")
    data.to_csv(tmp_path / "p.csv", index=False)
    data.to_pandas().to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    datasets.DatasetDict({"test": data, "train": data.select([1])}).save_to_disk(tmp_path / "saved")
    for name in ("p.parquet", "p.csv", "p.jsonl"):
        assert read_prompts(str(tmp_path / name)) == expected, name
    assert read_prompts(str(tmp_path / "saved"), split="test")[0]["prompt"] == "a plot"
    with pytest.raises(SciflowError, match=r"has the splits test, train\. Choose one by `--split`"):
        read_prompts(str(tmp_path / "saved"))
    with pytest.raises(SciflowError, match=r"`split` 'dev': .* has the splits test, train"):
        read_prompts(str(tmp_path / "saved"), split="dev")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"words": "x", "kind": 1}\n', "has the columns 'words', 'kind', but none called prompt, caption"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": " "}\n', "row 1: `prompt` is ' ', but must be a text"),
        ("p.jsonl", '{"prompt": [1]}\n', r"row 0: `prompt` is \[1\], but must be a text"),
        ("p.jsonl", '{"prompt": "x", "width": "wide"}\n', "row 0: `width` is 'wide', but must be an integer"),
        ("p.jsonl", '{"prompt": "x", "seed": 1.5}\n', "row 0: `seed` is 1.5, but must be an integer"),
        ("p.jsonl", "{\n", "Line 1 of .*p.jsonl is not JSON"),
        ("p.jsonl", "[]\n", r"Line 1 of .*p.jsonl is \[\], but must be such as"),
        ("p.csv", "prompt,kind\na, b, c\n", "Line 2 of .*p.csv has more fields"),
        ("p.parquet", "no", "cannot be read as parquet"),
        ("p.xlsx", "no", ".xlsx is not read. Give a .txt"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, name, text, match):
    with pytest.raises(SciflowError, match=match):
        read_prompts(write(tmp_path, name, text))
