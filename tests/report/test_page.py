"""`report.html`: one file whose data and images are those of the folder, whatever stands in it; and its server."""

import base64
import hashlib
import http.client
import io
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import HOSTILE, write_evaluation
from PIL import Image
from trainings import make_trainer

from sciflow_hf.cli import main
from sciflow_hf.errors import SciflowError
from sciflow_hf.report import page as page_module
from sciflow_hf.report.contact_sheet import save_image
from sciflow_hf.report.page import Page, Picture, Row, page_html, served_html, write_page
from sciflow_hf.report.page_data import LOG_NAME, page_of
from sciflow_hf.report.page_server import PageServer
from sciflow_hf.training import finish as finish_module
from sciflow_hf.training.finish import finish

HISTORY = [
    {"step": 10, "loss": 0.5, "loss_q1": 0.2, "loss_q4": 0.8, "learning_rate": 1e-3, "grad_norm": 0.1, "epoch": 0.1},
    {"step": 20, "loss": 0.4, "loss_q2": 0.3, "learning_rate": 5e-4, "grad_norm": float("nan"), "epoch": 0.2},
    {"step": 20, "eval_loss": 0.3, "eval_base_loss": 0.6, "eval_gain": 0.3, "eval_gain_low": 0.1,
     "eval_gain_high": 0.5, "eval_loss_q1": 0.25, "eval_fid": 12.0, "eval_runtime": 3.0},
]  # fmt: skip


class Elements(HTMLParser):
    """The elements of a document, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style", "title") and data.strip():
            self.texts.append((self.tags[-1][0], data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def data(self) -> list[Any]:
        return [json.loads(text) for tag, text in self.texts if tag == "script" and text[0] == "{"]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """An evaluation of eight prompts by two models, and its rows. Read only."""
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, write_evaluation(folder, prompts=8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training under way: two prompts, two steps, an edit's source, and a log."""
    for step in (0, 300):
        for prompt in (0, 1):
            file = tmp_path / f"validation/step-{step:06d}/p{prompt:02d}_seed7.png"
            save_image(Image.new("RGB", (24, 16), (step % 256, 9, 9)), file, {"prompt": f"prompt {prompt}"})
    save_image(Image.new("L", (24, 16)), tmp_path / "validation/sources/p01_source0.png", {})
    options = {"learning_rate": 1e-3, "hub_token": "hf_" + "y" * 30}
    facts = {"family": "flux2_klein", "adapter": {"type": "lora", "rank": 4}, "options": options}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / LOG_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in HISTORY))
    return tmp_path


# ---- the file ----


def test_the_file_is_one_document_that_needs_no_network(evaluation):
    folder, _ = evaluation
    text = page_html(page_of(folder), folder)
    found = Elements(text)
    assert text.startswith("<!doctype html>") and len(found.named("html")) == 1
    assert re.findall(r"https?:|//[a-z]|url\(|@import", re.sub(r'"data:image[^"]*"|// .*', "", text)) == []
    assert [tag for tag, given in found.tags for name in ("src", "srcset", "data", "action") if name in given] == []
    assert {given["href"] for _, given in found.tags if "href" in given} == {"data:,", "#main"}
    ids = [given["id"] for _, given in found.tags if "id" in given]
    assert len(ids) == len(set(ids))
    assert not any(name.startswith("on") or name == "style" for _, given in found.tags for name in given)


def test_the_policy_allows_this_script_and_nothing_else(evaluation):
    folder, _ = evaluation
    for text, connect in ((page_html(page_of(folder), folder), "'none'"), (served_html(page_of(folder), 5), "'self'")):
        found = Elements(text)
        policy = next(m["content"] for m in found.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        code = {tag: text for tag, text in found.texts if not (tag == "script" and text[0] == "{")}
        for tag in ("script", "style"):
            digest = base64.b64encode(hashlib.sha256(code[tag].encode()).digest()).decode()
            assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["connect-src"] == connect and "unsafe" not in policy


def test_data_and_thumbnails_are_those_of_the_folder(evaluation):
    folder, records = evaluation
    data, *blocks = Elements(page_html(page_of(folder), folder)).data()
    assert data["columns"] == ["source", "reference", "base", "lora"] and data["base"] == "base"
    assert data["metrics"] == {"ocr": True, "character_error_rate": False}
    for record in records:
        row = data["rows"][record["row"]]
        assert row["facts"] == {"seed": str(record["seed"]), "size": "96 x 64", "kind": "bar chart"}
        picture = row["pictures"][record["model"]]
        assert (picture["path"], picture["width"], picture["height"]) == (record["image"], 96, 64)
        assert picture["scores"]["ocr"] == record["ocr"]
        assert picture["scores"]["character_error_rate"] == (
            None if record["row"] == 1 else record["character_error_rate"]
        )
        copied = ["training image paper.png"] if record["training_image"] else []
        assert picture["note"] == ", ".join((["incomplete"] if record["row"] == 2 else []) + copied)
        uri = blocks[data["blocks"][record["image"]]][record["image"]]
        small = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
        with Image.open(folder / record["image"]) as image:
            assert np.array_equal(np.asarray(small), np.asarray(image))  # smaller than a thumbnail: without loss
    assert set(data["blocks"]) == {path for block in blocks for path in block}
    assert ["ocr", "0.5 (0.4 to 0.6)", "0.5 (0.4 to 0.6)"] in data["scores"][0]["rows"]
    assert ["ocr", "+0.3 (0.1 to 0.5)"] in data["scores"][1]["rows"]
    assert ["images/lora/3.png", "lora", "paper.png", "0.990"] in data["scores"][2]["rows"]
    assert data["scores"][3]["rows"] == [["base", "1"]] and len(data["scores"]) == 4
    assert data["details"][0]["rows"] == [["96 x 64", "8"]]
    assert ["api_key", "***"] in data["details"][1]["rows"]


def test_hostile_prompts_stay_text(evaluation):
    folder, _ = evaluation
    text = page_html(page_of(folder), folder)
    found = Elements(text)
    shown = [row["prompt"] for row in found.data()[0]["rows"]]
    assert shown[:5] == [prompt.replace("\u202e", "") for prompt in HOSTILE]
    blocks = 1  # of thumbnails: fewer than 48 images
    assert len(found.named("script")) == len(found.texts) - 2 == 2 + blocks and "alert" not in str(found.tags)
    assert text.count("</script") == 2 + blocks and "<!--" not in text
    title = '</title><script>alert("x")</script>{{data}} \\1'
    texts = Elements(page_html(Page(title), folder)).texts
    assert next(text for tag, text in texts if tag == "title") == title


def test_large_images_become_small_ones(tmp_path):
    write_evaluation(tmp_path, prompts=1, size=(900, 600), given=False)
    _, block = Elements(page_html(page_of(tmp_path), tmp_path)).data()
    sizes = {Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in block.values()}
    assert sizes == {(320, 213)}


def test_more_images_have_smaller_thumbnails(tmp_path, monkeypatch):
    write_evaluation(tmp_path, prompts=8, size=(400, 400), given=False)
    monkeypatch.setattr(page_module, "MANY", 4)  # 16 images: a quarter of the pixels
    _, block = Elements(page_html(page_of(tmp_path), tmp_path)).data()
    assert {Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in block.values()} == {
        (160, 160)
    }


# ---- what is missing ----


def test_missing_broken_and_foreign_images_are_named(tmp_path):
    folder = tmp_path / "evaluation"
    records = write_evaluation(folder, given=False)
    (folder / "images/base/0.png").unlink()
    whole = (folder / "images/lora/1.png").read_bytes()
    (folder / "images/lora/1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images/lora/2.png").write_bytes(b"<html>")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "secret.png", {})
    (folder / "images/lora/3.png").unlink()
    (folder / "images/lora/3.png").symlink_to(tmp_path / "secret.png")
    records[8]["image"] = "../secret.png"
    pq.write_table(pa.Table.from_pylist(records), folder / "scores.parquet")
    data, block = Elements(page_html(page_of(folder), folder)).data()
    told = "\n".join(data["notices"])
    assert "1 image missing: images/base/0.png." in told
    assert "2 images outside the folder, left out: " in told and "secret.png" in told
    assert "2 images cannot be read: images/lora/1.png, images/lora/2.png." in told
    assert len(block) == 12 - 5
    assert data["rows"][0]["pictures"]["base"]["problem"] == "missing"


def test_an_evaluation_that_has_not_ended_shows_its_images(tmp_path):
    write_evaluation(tmp_path, prompts=11, given=False)
    (tmp_path / "scores.parquet").unlink()
    page = page_of(tmp_path)
    assert [row.name for row in page.rows] == [str(i) for i in range(11)] and page.columns == ["base", "lora"]
    assert "scores.parquet is missing" in page.notices[0]
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json cannot be read" in page_of(tmp_path).notices[0]
    (tmp_path / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(SciflowError, match=r"scores.parquet' cannot be read .*Run the evaluation again"):
        page_of(tmp_path)
    pq.write_table(pa.table({"row": [1], "caption": ["x"]}), tmp_path / "scores.parquet")
    with pytest.raises(SciflowError, match="no column `model`, only row, caption"):
        page_of(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert main(["page", str(tmp_path), "--write"]) == 2
    said = capsys.readouterr().err
    assert "has no images to show" in said and "scores.parquet" in said and "It holds notes.txt." in said
    assert main(["page", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    for file in write_evaluation(tmp_path, prompts=1, given=False):
        (tmp_path / file["image"]).unlink()
    with pytest.raises(SciflowError, match=r"no images to show. 2 images missing: images/base/0.png"):
        page_of(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- a training ----


def test_a_run_shows_steps_side_by_side(run):
    page = page_of(run)
    assert page.columns == ["source", "before training", "step 300"] and page.base == "before training"
    assert [(row.prompt, sorted(row.pictures)) for row in page.rows] == [
        ("prompt 0", ["before training", "step 300"]),
        ("prompt 1", ["before training", "source", "step 300"]),
    ]
    assert page.rows[0].pictures["step 300"] == Picture(
        "validation/step-000300/p00_seed7.png", 24, 16, page.rows[0].pictures["step 300"].version
    )
    assert page.subtitle == "flux2_klein · lora, rank 4 · 20 steps so far" and page.notices == []
    options = next(table for table in page.details if table.title == "Options")
    assert ["hub_token", "***"] in options.rows and ["learning_rate", "0.001"] in options.rows


def test_charts_hold_the_log(run):
    lines = {chart.title: {line.name: line for line in chart.lines} for chart in page_of(run).charts}
    training = lines.pop("Training loss")
    assert (training["all"].steps, training["all"].values) == ([10, 20], [0.5, 0.4])
    assert training["quarter 1 (least noise)"].values == [0.2] and training["quarter 4 (most noise)"].values == [0.8]
    held_out = lines.pop("Held-out loss")
    assert held_out["trained"].values == [0.3] and held_out["base model"].steps == [0, 20]
    assert held_out["trained"].low == pytest.approx([0.1]) and held_out["trained"].high == pytest.approx([0.5])
    assert lines.pop("Held-out loss by noise range").keys() == {"quarter 1 (least noise)"}
    assert lines.pop("Learning rate")["learning rate"].values == [1e-3, 5e-4]
    assert lines.pop("Grad norm")["Grad norm"].values == [0.1]  # NaN is no point
    assert lines.pop("Held-out fid")["Held-out fid"].values == [12.0]
    assert lines.keys() == {"Held-out gain"}


def test_a_log_that_is_being_written(run):
    with (run / LOG_NAME).open("a") as log:
        log.write('{"step": 30, "loss"')
    assert page_of(run).notices == [] and page_of(run).charts[0].lines[0].steps == [10, 20]
    with (run / LOG_NAME).open("a") as log:
        log.write(': 0.3}\n7\n{"step": 40, "loss": 0.2}\n')
    page = page_of(run)
    assert page.charts[0].lines[0].steps == [10, 20, 30, 40]
    assert page.notices == ["log.jsonl, line 5: is no JSON object and was left out."]


def test_a_run_of_an_earlier_version_has_its_log_in_checkpoints(run):
    (run / LOG_NAME).unlink()
    assert page_of(run).notices == ["No losses were logged yet."]
    for step, history in ((9, []), (20, HISTORY)):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert page_of(run).charts[0].lines[0].values == [0.5, 0.4]
    (run / "run.json").rename(run / "checkpoint-20/run.json")  # which a run under way has there alone
    assert page_of(run).subtitle == "flux2_klein · lora, rank 4 · 20 steps so far"


def test_images_of_other_prompts_are_left_out_and_named(run):
    save_image(Image.new("RGB", (8, 8)), run / "validation/step-000000/p00_seed7.png", {"prompt": "another"})
    page = page_of(run)
    assert "before training" not in page.rows[0].pictures
    assert page.notices == ["1 image of other prompts left out, such as validation/step-000000/p00_seed7.png."]


def test_a_training_writes_its_log_and_its_page(tmp_path, family, even_cache, monkeypatch, caplog, capsys):
    options = dict(eval_fraction=0.3, save_strategy="steps", save_steps=2)
    trainer = make_trainer(tmp_path, family, even_cache, max_steps=4, **options)
    trainer.train()
    finish(trainer)
    assert f"Page: {tmp_path / 'report.html'}" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert written == trainer.state.log_history
    data = Elements((tmp_path / "report.html").read_text()).data()[0]
    assert data["notices"] == ["No validation images: `--validation_prompts` draws them during training."]
    buckets = {size: int(number) for size, number in data["details"][0]["rows"]}
    assert sum(buckets.values()) == len(trainer.train_dataset) and buckets.keys() <= {"32x48", "48x32", "24x64"}

    def fail(*_: Any) -> None:
        raise RuntimeError("no paper")

    monkeypatch.setattr(finish_module, "write_page", fail)
    resumed = make_trainer(tmp_path, family, even_cache, max_steps=5, eval_fraction=0.3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    finish(resumed)  # a page that fails costs a warning
    assert "report.html was not written (no paper)" in caplog.text and "--write" in caplog.text
    steps = [json.loads(line)["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 5, 5] and "Trained 5 steps." in capsys.readouterr().out


# ---- the server ----


@pytest.fixture
def server(run: Path) -> Iterator[PageServer]:
    server = PageServer(run)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: PageServer, path: str, host: str = "127.0.0.1", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.server_address)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_server_shows_the_page_and_its_images(server, run):
    assert server.server_address[0] == "127.0.0.1"
    status, body, headers = ask(server, "/")
    assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
    (data,) = Elements(body.decode()).data()  # no thumbnails inside
    assert data["follow"] == 5 and len(data["rows"]) == 2
    path = "validation/step-000300/p00_seed7.png"
    assert ask(server, f"/{path}?1")[:2] == (200, (run / path).read_bytes())
    status, body, headers = ask(server, f"/thumbnails/{path}")
    assert status == 200 and headers["Content-Type"] == "image/webp"
    assert Image.open(io.BytesIO(body)).getpixel((0, 0)) == (300 % 256, 9, 9)


@pytest.mark.parametrize(
    "path",
    [
        "/run.json", "/log.jsonl", "/validation/", "/validation/step-000300", "/../run.json",
        "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/validation/../run.json", "/thumbnails/run.json",
        "/thumbnails//etc/passwd", "/report.html",
        "/validation/step-000300/..%2fstep-000300/p00_seed7.png", "/%00", "/thumbnails/",
    ],
)  # fmt: skip
def test_the_server_gives_out_nothing_else(server, path):
    status, body, _ = ask(server, path)
    assert status == 404 and b"root:" not in body and b"hub_token" not in body and b"p00" not in body


def test_the_server_answers_to_its_own_names_only(server):
    for host in ("127.0.0.1:8765", "localhost:9000", "localhost"):
        assert ask(server, "/data.json", host)[0] == 200
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", ""):
        assert ask(server, "/data.json", host)[0] == 421
    connection = http.client.HTTPConnection(*server.server_address)
    connection.request("POST", "/")
    assert connection.getresponse().status == 501
    connection.close()


def test_the_server_follows_the_folder(server, run):
    status, body, headers = ask(server, "/data.json")
    assert status == 200 and json.loads(body)["columns"][-1] == "step 300"
    assert ask(server, "/data.json", If_None_Match=headers["ETag"])[:2] == (304, b"")
    new = "validation/step-000600/p00_seed7.png"
    save_image(Image.new("RGB", (24, 16)), run / new, {"prompt": "prompt 0"})
    with (run / LOG_NAME).open("a") as log:
        log.write('{"step": 600, "loss": 0.1}\n')
    status, body, _ = ask(server, "/data.json", If_None_Match=headers["ETag"])
    data = json.loads(body)
    assert status == 200 and data["columns"][-1] == "step 600" and data["charts"][0]["lines"][0]["steps"][-1] == 600
    assert ask(server, f"/{new}")[0] == 200
    (run / new).write_bytes(b"torn")
    assert ask(server, f"/thumbnails/{new}?2")[0] == 404
    (run / LOG_NAME).rename(run / "away")
    (run / "validation").rename(run / "gone")
    (run / "run.json").unlink()
    status, body, _ = ask(server, "/data.json")
    assert status == 503 and b"has no images to show" in body


def test_ports(run, server, capsys):
    port = server.server_address[1]
    assert main(["page", str(run), "--port", str(port)]) == 2
    assert f"`port` {port}: cannot be used (Address already in use)" in capsys.readouterr().err
    assert main(["page", str(run), "--port", "70000"]) == 2
    assert "`port` 70000: 0 to 65535" in capsys.readouterr().err


def test_the_command_writes_the_file(run, capsys):
    assert main(["page", str(run), "--write"]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    first = (run / "report.html").read_bytes()
    assert write_page(page_of(run), run).read_bytes() == first and not list(run.glob(".*tmp"))


def test_a_page_is_a_plain_structure(tmp_path):
    """As others fill it, without a folder of ours."""
    save_image(Image.new("RGB", (8, 8), "red"), tmp_path / "a b/ü#?.png", {})
    row = Row("1", "a prompt", {"x": Picture("a b/ü#?.png", 8, 8, scores={"m": float("inf")})})
    page = Page("t", columns=["x"], metrics={"m": True}, rows=[row])
    data, block = Elements(page_html(page, tmp_path)).data()
    assert data["rows"][0]["pictures"]["x"]["scores"] == {"m": None} and list(block) == ["a b/ü#?.png"]
