"""Headless Chromium over its debugging pipe: open a page, run JavaScript in it, and hear what it did wrong.

The DevTools protocol as JSON, one message per NUL, on file descriptors 3 and 4; no driver and no library is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The browser's program, if it is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. `errors` are console errors and uncaught exceptions, `requests` the addresses it asked for."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        self._home = tempfile.mkdtemp(prefix="h2t-browser-")
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        options += [f"--user-data-dir={self._home}", f"--window-size={width},{height}", "--remote-debugging-pipe"]
        command = " ".join(f"'{a}'" for a in [find(), *options])
        # The shell gives the pipe's ends the numbers 3 and 4 that Chromium expects.
        shell = f"exec {command} 3<&{to_child} 4>&{from_child}"
        self._process = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._number = b"", 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session: str | None = None
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._home, ignore_errors=True)

    def open(self, path: Path) -> None:
        """Opens a file and waits until it has loaded."""
        self._call("Page.navigate", {"url": path.resolve().as_uri()})
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        found = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in found:
            raise AssertionError(f"{script[:80]}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until the expression is true. Raises AssertionError."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {condition}")
            time.sleep(0.1)

    def key(self, name: str) -> None:
        """Presses and releases a key, such as ArrowRight."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Enter": 13}[name]
            self._call("Input.dispatchKeyEvent", {"type": kind, "key": name, "windowsVirtualKeyCode": code})

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Another size of the screen, light or dark."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", screen)
        self.media("screen", dark)

    def media(self, kind: str, dark: bool = False) -> None:
        """Shows the page as on a `screen` or in `print`, for those who like it light or dark."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"media": kind, "features": [feature]})

    def seen_by(self, deficiency: str) -> None:
        """Shows colours as people with a colour vision deficiency see them, such as deuteranopia; or `none`."""
        self._call("Emulation.setEmulatedVisionDeficiency", {"type": deficiency})

    def pdf(self, path: Path) -> None:
        """The page as printed."""
        found = self._call("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": False})
        path.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._hear(answer)

    def _hear(self, event: dict[str, Any]) -> None:
        kind, facts = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = facts["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.errors.append(str(facts["args"]))
        elif kind == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.errors.append(facts["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])

    def _next(self, seconds: float = 90) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], seconds)
            if not ready:
                raise AssertionError("the browser does not answer")
            read = os.read(self._read, 1 << 20)
            if not read:
                raise AssertionError("the browser has ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
