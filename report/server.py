"""`tokenyard watch`: serves the page of a running run, only to its own user. It reads the run folder and changes nothing."""

import hmac
import json
import secrets
import signal
import sys
from argparse import Namespace
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..train.config.complain import one_line, printable
from .command import refuse
from .journal_reader import RunError
from .page import page
from .payload import payload
from .run_reader import Run

ADDRESS = "127.0.0.1"
COOKIE = "tokenyard"
"""The cookie with the token of the URL. Its name ends with the port, because cookies are not separate by port."""


def watch_command(arguments: Namespace) -> int:
    """Serves the page until Ctrl-C. Returns the exit code."""
    try:
        server = Server(Watched(Run(Path(arguments.run))), arguments.port)
    except RunError as error:
        return refuse(error)
    except OSError as error:
        return refuse(OSError(f"--port {arguments.port}: {error.strerror}; nearest valid: --port 0, which takes a free one"))
    # A shell makes background jobs ignore SIGINT; handle both signals in any case.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with server:
            print(f"{server.url} shows {printable(arguments.run)}; Ctrl-C ends this", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


class Watched:
    """A run, and the latest data of its page. Shared by the threads of all requests."""

    def __init__(self, run: Run):
        self._run = run
        self._lock = Lock()
        self._version = 0
        self._data: dict[str, Any] | None = None

    def latest(self, known: str | None) -> tuple[str, dict[str, Any] | None]:
        """Returns the version, and the data unless `known` is that version. Raises RunError if a journal has an invalid line."""
        with self._lock:
            if self._run.refresh() or self._data is None:
                self._version += 1
                self._data = payload([self._run], live=True)
            version = f'"{id(self):x}-{self._version}"'
            return version, None if known == version else self._data


class Server(ThreadingHTTPServer):
    """Listens only on the loopback address. Raises OSError if the port is taken."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int):
        super().__init__((ADDRESS, port), Handler)
        self.watched = watched
        self.token = secrets.token_urlsafe(32)
        """Required for access, because other users of this machine can reach the port too."""

    @property
    def url(self) -> str:
        """The URL to open in a browser."""
        return f"http://{ADDRESS}:{self.server_port}/?token={self.token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a closed connection; prints any other error in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"tokenyard: {one_line(f'a request failed: {error!r}')}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the page and its data."""

    server_version = "tokenyard"
    sys_version = ""
    timeout = 30.0
    """Seconds that a connection may stay silent."""

    def do_GET(self) -> None:
        """Answers one request."""
        assert isinstance(self.server, Server)
        # With DNS rebinding, a page from elsewhere still sends its own host name.
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")}:
            self._send(403, "text/plain", f"only for http://{ADDRESS}:{self.server.server_port}/")
        elif not self._may_look():
            self._send(403, "text/plain", "only with the token in the URL that tokenyard watch printed")
        elif self.path.partition("?token=")[0] not in ("/", "/data"):
            self._send(404, "text/plain", "there is / and /data")
        else:
            self._answer(self.server.watched)

    def _may_look(self) -> bool:
        """Whether the request has the token in its URL or cookie; compared in constant time."""
        assert isinstance(self.server, Server)
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie)
        except CookieError:
            cookie = None
        given = parse_qs(urlsplit(self.path).query).get("token", []) + ([] if cookie is None else [cookie.value])
        return any(hmac.compare_digest(one.encode(errors="replace"), self.server.token.encode()) for one in given)

    @property
    def _cookie(self) -> str:
        assert isinstance(self.server, Server)
        return f"{COOKIE}{self.server.server_port}"

    def _answer(self, watched: Watched) -> None:
        place = urlsplit(self.path).path
        known = self.headers.get("If-None-Match") if place == "/data" else None
        try:
            version, data = watched.latest(known)
        except (RunError, OSError) as error:
            return self._send(500, "text/plain", str(error))
        if data is None:
            return self._send(304, "application/json", "", version)
        if place == "/":
            return self._send(200, "text/html", page(data), version)
        return self._send(200, "application/json", json.dumps(data, allow_nan=False, separators=(",", ":")), version)

    def _send(self, status: int, kind: str, text: str, version: str | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        if version:
            assert isinstance(self.server, Server)
            self.send_header("ETag", version)
            self.send_header("Set-Cookie", f"{self._cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing to the terminal."""
