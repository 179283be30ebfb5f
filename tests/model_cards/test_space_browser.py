"""An exported Space, as a visitor sees it: its own app.py in a process, and headless Chromium.

`make test-browser` runs it (after `make chromium`). With CORTEXICON_SCREENSHOT=FILE it keeps the
picture, and shows the checkpoint of `make demo` if there is one.
"""

import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs pip install 'cortexicon[demo]'")

from cortexicon.model_cards.space_export import export_space

from .browser import Browser, find_chromium

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def address(kept_checkpoints, tmp_path_factory, repository):
    """Where the exported app listens."""
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: make chromium")
    folder = tmp_path_factory.mktemp("space") / "app"
    demo = repository / "runs" / "demo" / "lm"
    wanted = "CORTEXICON_SCREENSHOT" in os.environ and demo.is_dir()
    export_space(demo if wanted else kept_checkpoints / "lm", folder)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)  # the folder brings its own package
    log = folder.parent / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=out, stderr=out
        )
    found = None
    for _ in range(1200):
        found = re.search(r"URL:\s+(http://\S+)", log.read_text())
        if found or process.poll() is not None:
            break
        time.sleep(0.2)
    assert found, log.read_text()
    yield found[1].replace("0.0.0.0", "127.0.0.1")
    process.terminate()
    process.wait(timeout=30)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory, address):
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        opened.open(address)
        # The page reads a person by itself when it is opened.
        opened.wait("document.querySelector('#brain img')", seconds=120)
        yield opened


def shown(browser, selector):
    return browser.evaluate(f"document.querySelector('{selector}').innerText")


def test_a_visitor_reads_a_person(browser, tmp_path):
    before = browser.evaluate("document.querySelector('#carpets img').src")
    browser.type("input[type=number]", "41")
    browser.click("#read")
    browser.wait(f"document.querySelector('#carpets img').src !== {before!r}")
    browser.wait("document.querySelector('#brain img').complete")
    assert "R² of what comes back" in shown(browser, "#facts")
    assert "Age?" in shown(browser, "#answer")
    for name in ("carpets", "codes", "brain", "answer-picture"):
        assert browser.evaluate(f"document.querySelector('#{name} img').naturalWidth") > 500
    time.sleep(1.0)  # the progress bars fade
    picture = tmp_path / "space.png"
    browser.screenshot(picture)
    from PIL import Image

    image = Image.open(picture).convert("RGB")
    assert image.width == 1240
    assert image.height > 900
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100  # not a blank page
    if keep := os.environ.get("CORTEXICON_SCREENSHOT"):
        image.quantize(256, kmeans=1).save(picture, optimize=True)  # a third of the bytes
        shutil.copyfile(picture, keep)


def test_a_visitor_asks(browser):
    browser.type("#question input, #question textarea", "Sex?")
    browser.click("#ask")
    browser.wait("document.querySelector('#answer').innerText.includes('Sex?')")
    assert re.search(r"Sex\? [FM] \(\d+%\)", shown(browser, "#answer"))


def test_hostile_text_stays_text_on_the_page(browser):
    text = "<img src=x onerror=document.title=1> <fmri_3> {{7*7}}"
    browser.type("#question input, #question textarea", text)
    browser.click("#ask")
    browser.wait("document.querySelector('#answer').innerText.includes('onerror')")
    assert text in shown(browser, "#answer")
    assert browser.evaluate("document.querySelectorAll('#answer img').length") == 0
    assert browser.evaluate("document.title") == "Cortexicon"


def test_a_damaged_file_ends_in_a_message(browser, tmp_path):
    path = tmp_path / "<b>bad</b>.tsv".replace("/", "\u2215")
    path.write_bytes(b"\x00\x01 no table")
    browser.click("input[type=radio][value='A file of mine']")
    browser.wait("document.querySelector('input[type=file]')")
    browser.upload("input[type=file]", path)
    browser.wait("document.body.innerText.includes('bad')")
    browser.click("#read")
    browser.wait("document.querySelector('#facts [role=alert]')")
    message = shown(browser, "#facts")
    assert "The file" in message
    assert "/tmp" not in message
    assert "Traceback" not in browser.evaluate("document.body.innerText")


def test_the_page_asks_nobody_else(browser):
    outside = [
        url
        for url in browser.requests
        if not re.match(r"(http://127\.0\.0\.1[:/]|http://localhost[:/]|data:|blob:|about:)", url)
    ]
    assert outside == []
    assert browser.errors == []
