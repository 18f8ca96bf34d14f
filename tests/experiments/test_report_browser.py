"""The report in a browser: its sample browser at work, on a desktop and at a phone's width, without a network."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cab_attention import H2O, Full, SnapKV
from experiments.longbench_qa.report.__main__ import main
from tests.experiments.report_cells import ROWS, write_cell

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
EVIL = "<img src=x onerror='window.evil = 1'></script><script>window.evil = 1</script>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver"),
]


class Browser:
    """A headless Chromium, by the WebDriver protocol."""

    def __init__(self, port: int, profile: Path) -> None:
        self.url, self.session = f"http://127.0.0.1:{port}", ""
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options = {"goog:chromeOptions": {"args": arguments, "binary": CHROMIUM}}
        options["goog:loggingPrefs"] = {"browser": "ALL"}
        self.session = f"/session/{self.post('/session', capabilities={'alwaysMatch': options})['sessionId']}"

    def post(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(self.url + self.session + path, json.dumps(content).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script: str) -> Any:
        return self.post("/execute/sync", script=script, args=[])

    def open(self, page: Path, fragment: str = "", width: int = 1280) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self.post("/url", url="about:blank")  # a fragment alone would not load the page anew
        self.post("/url", url=page.as_uri() + fragment)
        ready = "return document.readyState === 'complete' && document.getElementById('browser')?.hidden === false"
        for _ in range(300):
            if self.run(ready):
                return
            time.sleep(0.2)
        raise TimeoutError(f"{page} is not ready")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        found = Browser(port, tmp_path_factory.mktemp("profile"))
        yield found
        urllib.request.urlopen(urllib.request.Request(found.url + found.session, method="DELETE"), timeout=60).close()
    finally:
        driver.terminate()
        driver.wait(timeout=60)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for compress in ("after_prompt", "after_context"):
        write_cell(folder, Full(), [100.0, 100.0, 90.0], compress=compress)
        for budget in (32, 64, 128, 256, 512):
            write_cell(folder, H2O(budget), [0.0, 50.0, 90.0], {0: EVIL}, compress=compress)
        write_cell(folder, SnapKV(32), [100.0, None, 100.0], compress=compress)
    main([str(folder)])
    return folder / "report" / "report.html"


def test_a_link_chooses_a_sample_and_a_click_the_next(browser: Browser, page: Path):
    browser.open(page, f"#sample=demo_qa/{quote(ROWS[0].id)}")
    table = "[...document.querySelectorAll('.answers tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    [h2o, snapkv] = browser.run(f"return {table}")
    assert h2o[0] == "h2o" and all(EVIL in cell and "0.0" in cell and "43.8 % kept" in cell for cell in h2o[1:])
    assert snapkv[0] == "snapkv" and "answer 100.0" in snapkv[1] and snapkv[2:] == [""] * 4
    shown = browser.run("return document.getElementById('shown').innerText")
    assert ROWS[0].answers[0] in shown and ROWS[0].input.split()[-1] in shown
    assert browser.run("return document.querySelectorAll('.answers .heads i').length") == 6 * 4
    assert browser.run("return document.getElementById('previous').disabled")
    browser.run("document.getElementById('next').click()")
    chosen = browser.run("return [document.getElementById('sample').value, location.hash]")
    assert ROWS[0].id not in chosen[0] and chosen[1].startswith("#sample=demo_qa/")
    assert not browser.run("return document.getElementById('previous').disabled")
    second = f"#sample=demo_qa/{quote(ROWS[1].id)}/{quote('tiny,max_length=300, attention=cab, compress=after_prompt')}"
    browser.run(f"location.hash = {json.dumps(second)}")
    failed = browser.run(f"return {table}")[1][1]
    assert "failed: RuntimeError: no <memory> left" in failed and "failed samples" in failed
    assert browser.run("return document.getElementById('setting').value").endswith("compress=after_prompt")


def test_nothing_is_asked_for_nothing_of_a_record_runs_and_nothing_fails(browser: Browser, page: Path):
    browser.open(page, f"#sample=demo_qa/{quote(ROWS[0].id)}")
    assert browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.run("return window.evil === undefined && document.images.length === 0")
    assert browser.run("return document.querySelectorAll('.answers tbody tr').length") == 2
    assert browser.post("/se/log", type="browser") == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_does_not_scroll_sideways(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
    if width == 360:  # else nothing was too wide, and nothing shown
        assert browser.run("return [...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")


def test_the_keyboard_reaches_every_control_and_scrolling_box(browser: Browser, page: Path):
    browser.open(page)
    reached = "[...document.querySelectorAll('select, button, a[href], summary, .scroll')].every(e => e.tabIndex >= 0)"
    assert browser.run(f"return {reached}")
    browser.run("const box = document.getElementById('sample'); box.focus(); box.selectedIndex = 1; "
                "box.dispatchEvent(new Event('change'))")  # fmt: skip
    assert browser.run("return document.activeElement.id") == "sample"
    assert browser.run("return location.hash").startswith("#sample=demo_qa/")
