"""A headless Chromium, driven over the DevTools protocol: just what the tests of pages need, with the standard library alone."""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A Chromium with one page. `complaints` are errors of its console; `requests` the addresses that it asked for."""

    def __init__(self, width: int = 1280, height: int = 900):
        assert CHROMIUM is not None
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.events: list[dict[str, Any]] = []
        self.calls = 0
        self.socket = connected(self._address())
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()
        os.killpg(self.process.pid, 15)
        self.process.wait(20)
        self.profile.cleanup()

    def open(self, address: str) -> None:
        """Loads a page and waits until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, holds: Any, seconds: float = 20.0) -> None:
        """Waits for a condition: a function, or an expression in the page."""
        end = time.monotonic() + seconds
        while not (self.run(holds) if isinstance(holds, str) else holds()):
            assert time.monotonic() < end, holds
            self.call("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 20))", awaitPromise=True)

    def press(self, key: str) -> None:
        """A key that has no character, as ArrowRight."""
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Enter": 13, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, from top to bottom."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[str]:
        """What the console says went wrong, since the page was opened."""
        self.run("0")
        found = [event for event in self.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        found += [
            e for e in self.events if e["method"] == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "warning")
        ]
        return [json.dumps(event["params"]) for event in found]

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        self.run("0")
        sent = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer; events on the way are kept."""
        self.calls += 1
        send(self.socket, json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(receive(self.socket))
            if message.get("id") == self.calls:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def _address(self) -> str:
        """The page's address for the protocol, as soon as the browser listens."""
        file = Path(self.profile.name) / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (file.is_file() and file.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.05)
        port = file.read_text().split("\n")[0]
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.05)


def connected(address: str) -> socket.socket:
    """A WebSocket (RFC 6455) to a ws:// address."""
    parts = urlsplit(address)
    assert parts.hostname is not None
    link = socket.create_connection((parts.hostname, parts.port or 80), timeout=60)
    key = base64.b64encode(os.urandom(16)).decode()
    head = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    link.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += link.recv(1)
    assert b" 101 " in answer, answer
    return link


def send(link: socket.socket, text: str) -> None:
    """A text message in one frame; a client's are masked."""
    content, mask = text.encode(), os.urandom(4)
    size = len(content)
    length = bytes([128 | size]) if size < 126 else bytes([254]) + struct.pack(">H", size)
    length = length if size < 65536 else bytes([255]) + struct.pack(">Q", size)
    masked = (int.from_bytes(content, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")).to_bytes(size, "big")
    link.sendall(b"\x81" + length + mask + masked)


def receive(link: socket.socket) -> str:
    """The next text message, of however many frames."""
    message = b""
    while True:
        first, second = exactly(link, 2)
        size = second & 127
        if size >= 126:
            size = int.from_bytes(exactly(link, 2 if size == 126 else 8), "big")
        content = exactly(link, size)
        if first & 15 in (0, 1):
            message += content
            if first & 128:
                return message.decode()


def exactly(link: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = link.recv(min(size, 1 << 20))
        assert part, "Chromium ended"
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
