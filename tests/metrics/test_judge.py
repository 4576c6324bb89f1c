"""The judge against a server on the loopback interface that misbehaves: what it asks, retries, keeps and never says."""

import base64
import functools
import io
import itertools
import json
import logging
import re
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from judge_server import GOOD, JudgeServer, serving
from PIL import Image

from sciflow_hf.errors import SciflowError
from sciflow_hf.metrics.judge import endpoint
from sciflow_hf.metrics.judge import judge as judge_module
from sciflow_hf.metrics.judge.answers import NoAnswerError, Question, read_answer
from sciflow_hf.metrics.judge.arguments import JudgeArguments
from sciflow_hf.metrics.judge.endpoint import Endpoint
from sciflow_hf.metrics.judge.judge import Judge
from sciflow_hf.metrics.judge.rubric import SHIPPED, read_rubric
from sciflow_hf.metrics.judge.scoring import AXES, Answer, Error

KEY = "sk-Secret0123456789"
FINE = '{"errors": [], "broken": false}'
HALF = '{"errors": [{"d": "Missing: decoder", "s": "criti'
LIMIT = {"Content-Type": "application/json"}
COMPONENTS = json.dumps([{"name": "encoder", "description": "a box"}, {"name": "decoder"}])
ARROWS = json.dumps([{"source": "encoder", "target": "decoder", "label": None}])
TEXTS = json.dumps([{"text": "Encoder", "location": "left"}, {"text": "Decoder"}])
ROW = {"rubric_components": COMPONENTS, "rubric_arrows": ARROWS, "rubric_text": TEXTS}


def image(colour: Any = "red", size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


QUESTION = Question("text", "You check figures.", "Which texts are missing?", (image(),))


def asking(server: JudgeServer, waits: list[float] | None = None, **options: Any) -> Endpoint:
    """An endpoint that notes how long it would wait."""
    return Endpoint(server.url, "m", KEY, sleep=[].append if waits is None else waits.append, **options)


def judging(server: JudgeServer, folder: Path, **options: Any) -> Judge:
    args = JudgeArguments(judge_url=server.url, judge_model="m", judge_cache_dir=str(folder), **options)
    return Judge(args, ask=asking(server, max_calls=args.max_calls))


def columns(rows: int = 1, **changed: Any) -> dict[str, list[Any]]:
    return {name: [value] * rows for name, value in {"reference": image("blue"), **ROW, **changed}.items()}


# ---- what is asked ----


def test_a_call_holds_both_images_one_axis_and_the_schema(tmp_path: Path) -> None:
    with serving(FINE) as server:
        tall, wide = image("blue", (100, 2048)), image("red", (300, 200))
        assert judging(server, tmp_path)(["A figure. " * 90], [wide], **columns(reference=tall)) == [1.0]
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"} and len(server.requests) == 3
    asked = {}
    for _, headers, body in server.requests:
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert body["model"] == "m" and body["temperature"] == 0
        schema = body["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["errors"]["items"]["required"] == ["d", "s"]
        system, user = body["messages"]
        *pictures, words = user["content"]
        sent = [picture["image_url"]["url"].split(",", 1) for picture in pictures]
        assert {head for head, _ in sent} == {"data:image/jpeg;base64"}
        found = [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in sent]
        assert [picture.size for picture in found] == [(50, 1024), (300, 200)]  # the reference comes first
        assert found[0].getpixel((9, 9))[2] > 200 and found[1].getpixel((9, 9))[0] > 200
        assert system["role"] == "system" and '"broken": false' in system["content"]
        assert "A figure. " * 30 in words["text"] and "A figure. " * 31 not in words["text"]
        asked[words["text"].split("Look at the ")[1].split()[0]] = words["text"]
    assert "\n1. encoder: a box\n2. decoder\n" in asked["parts"] and "2 parts" in asked["parts"]
    assert "\n1. encoder -> decoder\n" in asked["arrows"] and "Encoder" not in asked["arrows"]
    assert '1. "Encoder" (left)\n2. "Decoder"\n' in asked["texts"] and "a box" not in asked["texts"]


def test_transparent_images_are_shown_on_white(tmp_path: Path) -> None:
    with serving(FINE) as server:
        asking(server)(Question("text", "s", "r", (Image.new("RGBA", (8, 8), (0, 0, 0, 0)),)))
    url = server.requests[0][2]["messages"][1]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).getpixel((4, 4)) == (255, 255, 255)


def test_without_a_key_none_is_sent_nor_a_password_of_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(GOOD) as server:
        Endpoint(server.url, "m")(QUESTION)
    assert "Authorization" not in server.requests[0][1]


# ---- servers that misbehave ----

LATER = {"Retry-After": "7"}
ANSWERED = [
    ("prose", [f"Let me look {{closely}}.\n```json\n{GOOD}\n```\nThat is all."], []),
    ("after a thought", [f"<think>as in {FINE}</think>{GOOD}"], []),
    (
        "parts",
        [(200, LIMIT, json.dumps({"choices": [{"message": {"content": [{"type": "text", "text": GOOD}]}}]}))],
        [],
    ),
    ("half JSON, then good", [HALF, GOOD], []),
    ("another schema, then good", ['{"score": 3}', GOOD], []),
    ("429 with Retry-After", [(429, LATER, "slow down"), GOOD], [7]),
    ("429 with an endless Retry-After", [(429, {"Retry-After": "1e9"}, ""), GOOD], [60]),
    ("429 with a date that is past", [(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, ""), GOOD], [0]),
    ("503 with nonsense for Retry-After", [(503, {"Retry-After": "soon"}, ""), GOOD], [1]),
    ("500 twice", [(500, {}, "oops"), (500, {}, "<html>"), GOOD], [1, 2]),
    ("closed connections", ["drop", "drop", "drop", GOOD], [1, 2, 4]),
    ("refuses temperature", [(400, LIMIT, '{"error": {"message": "temperature is not supported"}}'), GOOD], [0]),
]


@pytest.mark.parametrize(("script", "waits"), [a[1:] for a in ANSWERED], ids=[a[0] for a in ANSWERED])
def test_an_answer_in_the_end(script: list[Any], waits: list[float]) -> None:
    slept: list[float] = []
    with serving(*script) as server:
        assert asking(server, slept)(QUESTION) == Answer((Error("Missing: decoder", "critical"),))
    assert len(server.requests) == len(script)
    assert slept == [pytest.approx(wait, rel=0.25) for wait in waits]


def test_a_date_in_retry_after_is_obeyed() -> None:
    in_40_s = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    slept: list[float] = []
    with serving((429, {"Retry-After": in_40_s}, ""), GOOD) as server:
        asking(server, slept)(QUESTION)
    assert 20 < slept[0] <= 40


REFUSED = [
    ("empty", [""], 2, "the answer is empty"),
    ("prose alone", ["The figure looks fine to me."], 2, "no complete list of errors in JSON: 'The figure"),
    ("half JSON", [HALF], 2, "no complete list of errors"),
    ("cut off after a draft", [f"First {FINE} then {HALF}"], 2, "no complete list of errors"),
    ("another schema", ['{"errors": ["missing decoder"], "broken": false}'], 2, "no complete list of errors"),
    ("errors that are no list", ['{"errors": "none"}'], 2, "no complete list of errors"),
    ("a refusal", [(200, LIMIT, '{"choices": [{"message": {"content": null, "refusal": "no"}}]}')], 2, "is empty"),
    ("no choices", [(200, LIMIT, '{"choices": []}')], 2, "answered with application/json"),
    ("a message that is text", [(200, LIMIT, '{"choices": [{"message": "hello"}]}')], 2, "application/json"),
    ("a page", [(200, {"Content-Type": "text/html"}, "<html>Sign in</html>")], 2, "text/html: '<html>Sign in"),
    ("a picture", [(200, {"Content-Type": "image/png"}, "\x89PNG")], 2, "image/png"),
    ("400", [(400, {}, "content was filtered")], 1, "status 400: content was filtered"),
    ("413", [(413, {}, "too large")], 1, "status 413"),
    ("429 for ever", [(429, {}, "quota")], 6, "status 429: quota (tried 6 times)"),
    ("500 for ever", [(500, {}, "")], 6, "status 500"),
    ("dropped for ever", ["drop"], 6, "cannot be reached"),
]


@pytest.mark.parametrize(("script", "calls", "said"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_no_answer_costs_one_axis_and_says_why(script: list[Any], calls: int, said: str) -> None:
    slept: list[float] = []
    with serving(*script) as server, pytest.raises(NoAnswerError, match=re.escape(said)):
        asking(server, slept)(QUESTION)
    assert len(server.requests) == calls
    assert len(slept) == (5 if calls == 6 else 0) and sum(slept) <= 1.25 * (1 + 2 + 4 + 8 + 16)


def test_silence_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TRIES", 2)
    with serving("hang") as server, pytest.raises(NoAnswerError, match=r"no answer within 0.05 s \(tried 2 times\)"):
        asking(server, timeout=0.05)(QUESTION)
    assert len(server.requests) == 2


def test_an_answer_by_the_byte_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TRIES", 2)
    seconds = itertools.count()
    with serving("trickle") as server, pytest.raises(NoAnswerError, match="no answer within 30 s"):
        asking(server, timeout=30.0, clock=lambda: float(next(seconds)))(QUESTION)
    assert next(seconds) < 100


def test_an_endless_answer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LARGEST_ANSWER", 100)
    with serving(GOOD + " " * 200) as server, pytest.raises(NoAnswerError, match="larger than 100 bytes"):
        asking(server)(QUESTION)


ENDS = [(401, "does not accept the key"), (403, "does not let this key in"), (404, "no such address or model")]


@pytest.mark.parametrize(("status", "said"), [*ENDS, (302, "points to another address")])
def test_what_every_call_would_meet_ends_the_run_at_once(tmp_path: Path, status: int, said: str) -> None:
    with serving(FINE, (status, {"Location": "http://127.0.0.1:9/"}, "no")) as server:
        rows = {"rubric_text": [f'["{i}"]' for i in range(4)]}
        with pytest.raises(SciflowError, match=f"{said}.*{server.url} answered with status {status}"):
            judging(server, tmp_path, judge_parallel=1)(["a"] * 4, [image()] * 4, **rows)
        assert len(server.requests) == 2
        server.script = [FINE]
        assert judging(server, tmp_path)(["a"] * 4, [image()] * 4, **rows) == [1.0] * 4
    assert len(server.requests) == 2 + 3  # the first answer was kept


def test_a_call_that_is_stopped_waits_for_nothing() -> None:
    def answer(body: dict[str, Any]) -> Any:
        ask.stopped.set()
        return 500, {}, "busy"

    with serving(answer) as server:
        ask = Endpoint(server.url, "m")
        with pytest.raises(NoAnswerError, match=r"busy \(tried 1 time\)"):
            ask(QUESTION)


def test_a_server_that_is_down_ends_the_run(tmp_path: Path) -> None:
    with serving((503, {}, "maintenance")) as server:
        ask = asking(server)
        for _ in range(endpoint.GIVE_UP - 1):
            with pytest.raises(NoAnswerError):
                ask(QUESTION)
        with pytest.raises(SciflowError, match=r"failed 10 times in a row.*maintenance.*is kept"):
            ask(QUESTION)


# ---- rows ----


def test_a_failed_axis_makes_its_row_incomplete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: dict[str, Any]) -> Any:
        words = body["messages"][1]["content"][-1]["text"]
        return (400, {}, "filtered") if "arrows and connecting lines only" in words else GOOD

    with serving(answer) as server:
        found = judging(server, tmp_path / "a").judge(["a"], [image()], **columns())[0]
        assert found.columns() == {
            "judge": 0.5,
            "judge_component": 0.5,
            "judge_arrow": None,
            "judge_text": 0.5,
            "judge_incomplete": True,
            "judge_errors": json.dumps({axis: [["Missing: decoder", "critical"]] for axis in ("component", "text")}),
        }
        assert "1 image without an answer on every axis" in caplog.text and "filtered" in caplog.text
        theirs = judging(server, tmp_path / "a", scoring="published").judge(["a"], [image()], **columns())[0]
        assert (
            theirs.score.overall == pytest.approx(2 / 3) and theirs.score.axes["arrow"] == 1 and theirs.score.incomplete
        )
    assert len(server.requests) == 3 + 1  # a failure is not kept


def test_axes_without_elements_are_asked_only_as_published(tmp_path: Path) -> None:
    given = columns(rubric_arrows="[]", rubric_text=None)
    with serving(GOOD) as server:
        found = judging(server, tmp_path).judge(["a"], [image()], **given)[0]
        assert found.score.axes == {"component": 0.5, "arrow": None, "text": None} and len(server.requests) == 1
        assert judging(server, tmp_path, scoring="published")(["a"], [image()], **given) == [0.5]
    assert len(server.requests) == 3


def test_rows_without_rubric_or_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a reference alone all axes are asked; with elements alone one image is sent; with neither nothing."""
    empty = {name: [None, cell, None, float("nan")] for name, cell in ROW.items()}
    with serving(FINE) as server:
        scores = judging(server, tmp_path)(
            list("abcd"), [image(), image(), None, image()], reference=[image("blue"), None, image(), None], **empty
        )
        assert scores == [1.0, 1.0, None, None]
        sent = sorted(len(body["messages"][1]["content"]) - 1 for _, _, body in server.requests)
        assert sent == [1, 1, 1, 2, 2, 2]
        assert "no image" in caplog.text and "no `reference`, no elements in a rubric" in caplog.text
        with pytest.raises(SciflowError, match=r"one of the columns reference, rubric_components.*there are year"):
            judging(server, tmp_path)(["a"], [image()], year=[1])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rubric_text": "[{"}, r"row 0: `rubric_text` '\[\{' is no JSON"),
        ({"rubric_arrows": '{"source": "a"}'}, "row 0: `rubric_arrows` .*such as .*target"),
        ({"rubric_components": "[1]"}, "row 0: `rubric_components` .*is no list of objects"),
        ({"reference": "/nowhere/x.png"}, "row 0: its `reference` cannot be read .*x.png"),
        ({"reference": b"no picture"}, "row 0: its `reference` cannot be read"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named_before_anything_is_asked(tmp_path: Path, changed: Any, said: str) -> None:
    with serving(FINE) as server:
        with pytest.raises(SciflowError, match=said):
            judging(server, tmp_path)(["a"], [image()], **columns(**changed))
        assert not server.requests


# ---- what is kept ----


def test_a_rerun_costs_nothing_and_every_change_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text(SHIPPED.read_text(encoding="utf-8") + "# another version\n", encoding="utf-8")
    text = columns(rubric_components=None, rubric_arrows=None)
    with serving(GOOD) as server:

        def calls(prompt: str = "a", drawn: Any = None, model: str = "m", given: Any = text, **options: Any) -> int:
            before = len(server.requests)
            judge = judging(server, tmp_path / "answers", **options)
            judge.model = model
            assert judge([prompt], [drawn or image()], **given) == [0.5]
            return len(server.requests) - before

        assert calls() == 1 and calls() == 0
        assert "1 call with 2 images, about" in caplog.text and "0 calls with 0 images" in caplog.text
        assert "1 answer kept from before" in caplog.text
        file = tmp_path / "same.png"
        image().save(file)
        assert calls(drawn=file) == 0 and calls(drawn={"bytes": file.read_bytes(), "path": None}) == 0
        assert calls(prompt="b") == calls(drawn=image((255, 0, 1))) == calls(model="n") == 1
        assert calls(drawn=image(size=(32, 48))) == 1  # as many pixels of one colour
        assert calls(given=text | {"reference": [image("green")]}) == calls(given=text | {"reference": [None]}) == 1
        assert calls(given=text | {"rubric_text": ['["Encoder", "Output"]']}) == calls(rubric=str(rubric)) == 1
        assert calls() == 0 and calls(rubric=str(rubric)) == 0
        for kept in (tmp_path / "answers").rglob("*.json"):
            kept.write_text('{"errors": 3}' if kept.name < "8" else "{", encoding="utf-8")
        assert calls() == 1 and "the judge is asked again" in caplog.text and calls() == 0


def test_one_question_is_asked_once(tmp_path: Path) -> None:
    with serving(GOOD) as server:
        scores = judging(server, tmp_path)(["a"] * 5, [image()] * 5, **columns(5))
    assert len(server.requests) == 3 and len(set(scores)) == 1


# ---- limits ----


def test_max_calls_is_checked_before_and_counts_repeated_calls(tmp_path: Path) -> None:
    with serving(GOOD) as server:
        judge = judging(server, tmp_path, max_calls=4)
        judge(["a"], [image()], **columns())
        with pytest.raises(SciflowError, match=r"`max_calls` 4: 3 made, 3 more needed"):
            judge(["b"], [image()], **columns())
        assert len(server.requests) == 3
        server.script = [(500, {}, "")]
        with pytest.raises(NoAnswerError, match="`max_calls` 2 are used up"):
            asking(server, max_calls=2)(QUESTION)
        assert len(server.requests) == 3 + 2


def test_no_more_calls_at_once_than_allowed(tmp_path: Path) -> None:
    pair = threading.Barrier(2, timeout=30)

    def answer(body: dict[str, Any]) -> str:
        pair.wait()  # passes only if two calls are under way
        return GOOD

    with serving(answer) as server:
        judging(server, tmp_path, judge_parallel=2)(["a", "b"], [image()] * 2, **columns(2))
    assert len(server.requests) == 6 and server.most_at_once == 2


# ---- the key ----


def test_the_key_is_written_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the server repeats it, in answers and in errors."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SCIFLOW_JUDGE_KEY", f"{KEY}\n")  # as `$(cat file)` in some shells
    told, answers = f"Your key {KEY} is fine", [GOOD.replace("decoder", KEY), (400, {}, KEY), (500, {}, KEY), KEY]
    with serving(*answers) as server:
        monkeypatch.setattr(judge_module, "Endpoint", functools.partial(Endpoint, sleep=[].append))
        args = JudgeArguments(judge_url=server.url, judge_model="m", judge_cache_dir=str(tmp_path), judge_parallel=1)
        found = Judge(args).judge(["a"], [image()], **columns())[0]
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
        assert "***" in found.reason and "***" in found.columns()["judge_errors"]
        server.script = [(401, {}, told)]
        with pytest.raises(SciflowError) as refused:
            Judge(args)(["b"], [image()], **columns())
    said = [caplog.text, *capfd.readouterr(), str(found), repr(args), str(refused.value), repr(refused.value.__cause__)]
    said += [file.read_text(encoding="utf-8") for file in tmp_path.rglob("*") if file.is_file()]
    assert len(said) > 7 and "***" in said[5] and not any(KEY in text for text in said)


def test_a_key_in_the_wrong_place_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"judge_key_env": KEY}, {"judge_key_env": "sk_lower"}):
        with pytest.raises(SciflowError, match="never the key itself") as error:
            JudgeArguments(**options)
        assert options["judge_key_env"] not in str(error.value)
    with pytest.raises(SciflowError, match="`judge_key_env` NO_SUCH_KEY: this environment variable is not set"):
        JudgeArguments(judge_key_env="NO_SUCH_KEY")
    for url in (f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}", f"{KEY}", f"ftp://{KEY}/v1"):
        with pytest.raises(SciflowError, match="`judge_url`") as error:
            Endpoint(url, "m")
        assert KEY.lower() not in str(error.value).lower() or url.startswith("ftp")
    for key in (f"{KEY}\nX", f"{KEY} {KEY}", f"{KEY}é"):
        with pytest.raises(SciflowError, match="characters that no key has") as error:
            Endpoint("http://127.0.0.1:9/v1", "m", key)
        assert KEY not in str(error.value)


def test_what_the_judge_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SCIFLOW_JUDGE_URL", "SCIFLOW_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SciflowError, match="needs a model: give `--judge_model`, or set SCIFLOW_JUDGE_MODEL"):
        Judge(JudgeArguments(judge_cache_dir=str(tmp_path)))(["a"], [image()], **columns())
    monkeypatch.setenv("SCIFLOW_JUDGE_MODEL", "m")
    with pytest.raises(SciflowError, match="needs a server: give `--judge_url`"):
        Judge(JudgeArguments(judge_cache_dir=str(tmp_path)))(["a"], [image()], **columns())
    with serving(GOOD) as server:
        monkeypatch.setenv("SCIFLOW_JUDGE_URL", server.url)
        Judge(JudgeArguments(judge_cache_dir=str(tmp_path)))(["a"], [image()], **columns())
        assert server.requests[0][2]["model"] == "m"


# ---- rubrics ----


def test_a_rubric_of_ones_own(tmp_path: Path) -> None:
    texts = {axis: {"listed": "{number}: {elements}, {prompt} {odd}", "unlisted": "{images}"} for axis in AXES}
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({"system": "Be kind.", **texts}), encoding="utf-8")  # JSON is YAML
    rubric = read_rubric(file)
    assert (
        rubric.request("arrow", "a {elements} b", ["x", "y"], reference=True) == "2: 1. x\n2. y, a {elements} b {odd}"
    )
    assert rubric.request("arrow", "a", [], reference=False) == "The image is the drawn one; there is no reference."
    with serving(FINE) as server:
        judging(server, tmp_path / "kept", rubric=str(file))(["a"], [image()], **columns())
    assert {body["messages"][0]["content"] for _, _, body in server.requests} == {"Be kind."}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot be read as YAML"),
        ("- a", "no text for system, component.listed"),
        ("system: x", "no text for component.listed, component.unlisted, arrow.listed"),
        (
            SHIPPED.read_text(encoding="utf-8") + "\nlayout: x\n",
            "unknown layout; a rubric has system, component, arrow, text",
        ),
        (SHIPPED.read_text(encoding="utf-8").replace("{elements}", "them"), "component.listed has no {elements}"),
    ],
)
def test_a_rubric_that_lacks_something(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SciflowError, match=re.escape(said)):
        JudgeArguments(rubric=str(tmp_path / "own.yaml")), Judge(JudgeArguments(rubric=str(tmp_path / "own.yaml")))
    with pytest.raises(SciflowError, match="cannot be read as YAML"):
        read_rubric(tmp_path / "none.yaml")


def test_an_answer_may_lack_broken_and_bring_more() -> None:
    assert read_answer('{"errors": [{"d": "x", "s": "odd", "t": 1}], "note": "{"}') == Answer((Error("x", "odd"),))
    assert read_answer('{"errors": [], "broken": true}').broken
