"""A headless Chromium, spoken to by the WebDriver protocol."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


class Browser:
    """One session; scripts run in the page that is open."""

    def __init__(self, url: str, profile: Path) -> None:
        self.session = url
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": CHROMIUM}
        logging = {"browser": "ALL", "performance": "ALL"}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": logging}
        self.session += f"/session/{self.post('/session', capabilities={'alwaysMatch': asked})['sessionId']}"

    def post(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(self.session + path, json.dumps(content).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.post("/execute/sync", script=script, args=arguments)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        self.post("/url", url=url)

    def until(self, script: str, seconds: float = 60) -> Any:
        """What the script returns, once that is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < end, script
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        element = self.post("/element", using="css selector", value=selector)
        self.post(f"/element/{next(iter(element.values()))}/click")

    def keys(self, *keys: str) -> None:
        """Pressed one after the other, in what has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def log(self, kind: str) -> list[str]:
        return [entry["message"] for entry in self.post("/se/log", type=kind)]

    def screenshot(self) -> bytes:
        """A PNG of what is in view."""
        return b64decode(self.cdp("Page.captureScreenshot", format="png")["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    driver = subprocess.Popen([str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/status", timeout=10).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        browser = Browser(url, profile)
        yield browser
        urllib.request.urlopen(urllib.request.Request(browser.session, method="DELETE"), timeout=60).close()
    finally:
        driver.terminate()
        driver.wait(60)
