"""Headless Chromium by its DevTools protocol: open, wait, click, upload, look. Nothing to install
but the browser: aiohttp comes with `datasets`.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The path of a Chromium on this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one headless Chromium, for use in a `with` block."""

    def __init__(self, profile: Path, width: int = 1240, height: int = 900):
        self.profile, self.size = profile, (width, height)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._count = 0

    def __enter__(self) -> "Browser":
        self.loop = asyncio.new_event_loop()
        self.process = subprocess.Popen(
            [
                find_chromium(),
                "--headless=new",
                "--no-sandbox",  # tests run as root in containers; the pages are our own
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--hide-scrollbars",
                "--no-first-run",
                "--remote-debugging-port=0",
                f"--user-data-dir={self.profile}",
                f"--window-size={self.size[0]},{self.size[1]}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._run(self._connect())
        return self

    def __exit__(self, *_: Any) -> None:
        self._run(self.session.close())
        self.process.terminate()
        self.process.wait(timeout=20)
        self.loop.close()

    def open(self, address: str) -> None:
        """Load a page and wait until it is there."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition: str, seconds: float = 60.0) -> float:
        """Wait until a JavaScript expression is true; the seconds that it took."""
        began = time.monotonic()
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"not true within {seconds:g} s: {condition}")
            time.sleep(0.05)
        return time.monotonic() - began

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Click an element; it must be there."""
        assert self.evaluate(
            f"(e => e && (e.click(), true))(document.querySelector({json.dumps(selector)}))"
        ), f"{selector} is not on the page"

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, as a visitor who types it."""
        self.evaluate(
            f"(e => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))"
        )
        self.call("Input.insertText", text=text)

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        assert node, f"{selector} is not on the page"
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def call(self, method: str, **parameters: Any) -> dict:
        """One command of the protocol, and its result."""
        return self._run(self._call(method, parameters))

    def _run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def _connect(self) -> None:
        port_file = self.profile / "DevToolsActivePort"
        for _ in range(600):
            if port_file.is_file() and port_file.read_text().strip():
                break
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self.socket = await self.session.ws_connect(
            pages[0]["webSocketDebuggerUrl"], max_msg_size=2**27
        )
        for domain in ("Page", "Network", "Runtime"):
            await self._call(f"{domain}.enable", {})

    async def _call(self, method: str, parameters: dict) -> dict:
        self._count += 1
        await self.socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self._count:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"].get("text")))
