"""The page in a browser, by the keyboard alone: `pytest -m acceptance`, with playwright and Chromium."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluations import HOSTILE, write_evaluation
from PIL import Image

from sciflow_hf.report.contact_sheet import save_image
from sciflow_hf.report.page import write_page
from sciflow_hf.report.page_data import LOG_NAME, page_of
from sciflow_hf.report.page_server import PageServer

pytestmark = pytest.mark.acceptance

VISIBLE = """() => [...document.querySelectorAll('.shot img')].map(i => i.complete && i.naturalWidth > 0)"""
PROMPTS = """() => [...document.querySelectorAll('.row .prompt')].map(e => e.textContent)"""
FOCUS = """() => document.activeElement.id || document.activeElement.className"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is missing: pip install -e '.[browser]'")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.fail("Chromium is missing: apt-get install chromium, or give its path in the variable CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a URL or a file in a window; at the end nothing may have been said on the console."""
    said: list[str] = []
    contexts = []

    def visit(url: str | Path, *, width: int = 1280, height: int = 900) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("requestfailed", lambda request: said.append(f"{request.url} {request.failure}"))
        tab.goto(url.as_uri() if isinstance(url, Path) else url)
        return tab

    visit.said = said  # type: ignore[attr-defined]
    yield visit
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("evaluation")
    records = write_evaluation(folder, prompts=30, models=("base", "lora", "dora"), size=(384, 256))
    return write_page(page_of(folder), folder), records


def until(tab: Any, expression: str) -> None:
    """Waits until it is true; playwright's own waiting needs `eval`, which the page's policy forbids."""
    for _ in range(300):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def press(tab: Any, *keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)


def reach(tab: Any, name: str, key: str = "Tab") -> None:
    """Presses a key until the element of this id, or the next one of this class, has the focus."""
    for _ in range(60):
        if tab.evaluate(FOCUS) == name:
            return
        press(tab, key)
    raise AssertionError(f"{name} is not reached by the keyboard")


def test_by_the_keyboard_alone(visit, evaluation):
    file, records = evaluation
    tab = visit(file)
    until(tab, f"({VISIBLE})().slice(0, 10).every(Boolean)")
    assert tab.evaluate(PROMPTS)[: len(HOSTILE) - 1] == [p.replace("\u202e", "") for p in HOSTILE[:-1]]

    reach(tab, "filter")  # filter
    tab.keyboard.type("BARS number 2")
    prompts = [r["prompt"] for r in records if r["model"] == "base"]
    matching = [p for p in prompts if all(word in p.lower() for word in ("bars", "number", "2"))]
    assert tab.evaluate(PROMPTS) == matching and 5 < len(matching) < 20
    assert tab.inner_text("#count") == f"{len(matching)} of 30 rows"
    press(tab, "Control+a", "Delete")

    reach(tab, "sort")  # by a score, worst first
    tab.keyboard.type("char")
    reach(tab, "of")
    tab.keyboard.type("base")
    base = {r["row"]: r for r in records if r["model"] == "base"}
    rows = sorted((r for r in base.values() if r["row"] != 1), key=lambda r: -r["character_error_rate"])
    shown = [row["prompt"] or str(row["row"]) for row in rows]  # a row without prompt has its name
    clean = [prompt.replace("\u202e", "") for prompt in shown]
    assert tab.evaluate(PROMPTS) == clean[:24]
    reach(tab, "order")
    tab.keyboard.type("best")
    assert tab.evaluate(PROMPTS) == clean[::-1][:24]
    reach(tab, "of", "Shift+Tab")
    press(tab, "End", "ArrowUp")  # the last is dora's difference from base, the one above it lora's
    assert tab.input_value("#of") == "-lora"
    gain = {r["row"]: r["character_error_rate"] - base[r["row"]]["character_error_rate"] for r in records
            if r["model"] == "lora" and r["row"] != 1}  # fmt: skip
    best = min(gain, key=gain.__getitem__)
    assert tab.evaluate(PROMPTS)[0] == (base[best]["prompt"].replace("\u202e", "") or str(best))

    reach(tab, "shot")  # the slider
    press(tab, "Tab", "Tab", "Tab", "Enter")
    assert tab.evaluate(FOCUS) == "slider" and tab.input_value("#before") == "base"
    assert tab.input_value("#after") == "lora"
    press(tab, "Home")
    assert "inset(0px 0px 0px 0%)" in tab.evaluate("getComputedStyle(document.getElementById('image-after')).clipPath")
    press(tab, "End", "ArrowLeft")
    assert tab.get_attribute("#slider", "aria-valuetext") == "99 % base, 1 % lora"
    assert "99%" in tab.evaluate("getComputedStyle(document.getElementById('image-after')).clipPath")
    assert tab.evaluate("document.getElementById('image-after').naturalWidth") == 384  # the image, no thumbnail
    press(tab, "PageDown")
    assert tab.inner_text("#viewer-title") == "2 of 30"
    press(tab, "Escape")
    assert not tab.is_visible("#viewer") and tab.evaluate(FOCUS) == "shot"

    tab.focus("#more")  # further rows
    press(tab, "Enter")
    assert len(tab.evaluate(PROMPTS)) == 30
    tab.focus("#tab-images")
    press(tab, "ArrowRight")
    assert tab.is_visible("#scores") and not tab.is_visible("#images")
    assert "Mean (95 % interval)" in tab.inner_text("#scores")


def test_a_file_without_its_images_shows_thumbnails(visit, evaluation, tmp_path):
    tab = visit(Path(shutil.copy(evaluation[0], tmp_path)))
    until(tab, f"({VISIBLE})().slice(0, 10).every(Boolean)")
    assert visit.said == []
    tab.locator(".shot").first.click()
    until(tab, "document.getElementById('viewer-note').textContent.includes('its thumbnail is shown')")
    until(tab, "document.getElementById('image-before').naturalWidth > 0")
    tab.close()
    assert {text for text in visit.said if not text.startswith("file:")} == {
        "Failed to load resource: net::ERR_FILE_NOT_FOUND"
    }
    visit.said.clear()


def test_on_a_phone(visit, evaluation):
    tab = visit(evaluation[0], width=390, height=844)
    until(tab, f"({VISIBLE})().slice(0, 2).every(Boolean)")
    for name in ("images", "scores", "details"):
        tab.click(f"#tab-{name}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.click("#tab-images")
    tab.locator(".shot").nth(2).click()
    box = tab.locator("#compare").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    tab.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    assert abs(int(tab.input_value("#slider")) - 80) < 5
    assert tab.evaluate("document.getElementById('viewer').scrollWidth") <= 390


def test_a_thousand_images_do_not_stall(visit, tmp_path):
    """No task of the page takes long, whatever is pressed."""
    records = write_evaluation(tmp_path, prompts=500, size=(256, 256), given=False)
    tab = visit(write_page(page_of(tmp_path), tmp_path))
    tab.evaluate("""() => { window.longest = 0; new PerformanceObserver(list => {
        for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
    }).observe({type: 'longtask', buffered: true}); }""")
    assert len(tab.evaluate(PROMPTS)) < 100  # not all at once
    assert tab.evaluate("thumbnails.size") <= 3 < tab.evaluate("blocks.length") == 21
    tab.select_option("#sort", "ocr")
    tab.select_option("#order", "last")
    tab.fill("#filter", "number 4")
    tab.fill("#filter", "")
    for _ in range(60):
        tab.mouse.wheel(0, 3000)
        tab.wait_for_timeout(20)
    tab.wait_for_timeout(200)
    assert len(tab.evaluate(PROMPTS)) > 100 and len(records) == 1000
    assert tab.evaluate("window.longest") < 2000, "milliseconds"


def test_a_page_follows_a_training(visit, tmp_path, monkeypatch):
    monkeypatch.setattr("sciflow_hf.report.page_server.SECONDS", 0.2)

    def draw(step: int) -> None:
        file = tmp_path / f"validation/step-{step:06d}/p00_seed0.png"
        save_image(Image.new("RGB", (96, 64), (step % 256, 0, 0)), file, {"prompt": "A bar chart"})

    def log(step: int) -> None:
        with (tmp_path / LOG_NAME).open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step, "loss_q1": 2 / step}) + "\n")

    draw(0)
    log(10)
    server = PageServer(tmp_path)
    threading.Thread(target=server.serve_forever).start()
    try:
        tab = visit(server.url)
        until(tab, f"({VISIBLE})().join() === 'true'")
        tab.locator(".shot").focus()
        draw(100)
        log(100)
        until(tab, f"({VISIBLE})().join() === 'true,true'")
        assert tab.inner_text("#live") == "Following"
        tab.click("#tab-losses")
        assert "0.01" in tab.get_attribute(".chart svg", "aria-label")
        tab.focus(".chart svg")
        press(tab, "End")
        assert "step 100" in tab.inner_text(".legend")
        assert all("net::ERR_ABORTED" in text for text in visit.said)  # so Chromium calls an answer 304
    finally:
        server.shutdown()
        server.server_close()
    until(tab, "document.getElementById('live').className === 'lost'")
    tab.close()
    assert all("data.json" in text or "ERR_" in text for text in visit.said)
    visit.said.clear()
