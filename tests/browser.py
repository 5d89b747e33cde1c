"""A headless Chromium that opens one page: what it asked for, what it complained of, what its scripts say.

It is spoken to over the pipe of the DevTools protocol: JSON that ends with a zero byte.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT = 60  # seconds for an answer
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
_FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-pipe"]
# the numbers by which the browser knows its pipes
_ON_3_AND_4 = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab. problems: exceptions and errors of the console; requests: the URLs that were asked for."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._left = read, write, b""
        self._ids, self._session = itertools.count(1), ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command; what happens meanwhile is noted."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, path: Path, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        """A local page, when its scripts have run."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState == 'complete' && location.protocol == 'file:'")

    def ask(self, script: str) -> Any:
        """The value of an expression."""
        given = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in given, given
        return given["result"].get("value")

    def until(self, script: str) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + LIMIT
        while not self.ask(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def middle(self, selector: str, number: int) -> tuple[float, float]:
        """Where the middle of an element is in the window, scrolled there: of those that match, by number."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.ask(f"{found}.scrollIntoView({{block: 'center'}})")
        box = self.ask(f"{found}.getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._read], [], [], LIMIT)[0], "the browser does not answer"
            part = os.read(self._read, 2**20)
            assert part, "the browser is gone"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        said = json.loads(message)
        self._note(said.get("method"), said.get("params", {}))
        return said

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile, which ends with the block."""
    assert FOUND is not None
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", _ON_3_AND_4, str(their_read), str(their_write)]
    command += [FOUND, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, pass_fds=(their_read, their_write), **quiet)
    os.close(their_read)
    os.close(their_write)
    try:
        tab = Browser(read, write)
        yield tab
        tab.call("Browser.close")
        child.wait(LIMIT)
    finally:
        child.kill()
        child.wait()
        os.close(read)
        os.close(write)
