"""`tokenyard watch`: the page of a run that goes on, for this machine alone. It reads the journals and changes nothing."""

import json
import signal
import sys
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from .command import refuse
from .page import page
from .payload import payload
from .run import Run
from .tail import RunError

ADDRESS = "127.0.0.1"


def watch_command(arguments: Namespace) -> int:
    """Serves the page until Ctrl-C. Returns the exit code."""
    try:
        server = Server(Watched(Run(Path(arguments.run))), arguments.port)
    except RunError as error:
        return refuse(error)
    except OSError as error:
        return refuse(OSError(f"--port {arguments.port}: {error.strerror}; nearest valid: --port 0, which takes a free one"))
    # A shell that starts a job in the background lets it ignore Ctrl-C: what is asked for by name is heard all the same.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with server:
            print(f"http://{ADDRESS}:{server.server_port}/ shows {arguments.run}; Ctrl-C ends this", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


class Watched:
    """A run, and what the page was told last. Used by one thread for each request."""

    def __init__(self, run: Run):
        self._run = run
        self._lock = Lock()
        self._version = 0
        self._told: dict[str, Any] | None = None

    def news(self, known: str | None) -> tuple[str, dict[str, Any] | None]:
        """The version, and the page's data unless `known` is that version. RunError if a journal has a wrong line."""
        with self._lock:
            if self._run.refresh() or self._told is None:
                self._version += 1
                self._told = payload([self._run], live=True)
            version = f'"{id(self):x}-{self._version}"'
            return version, None if known == version else self._told


class Server(ThreadingHTTPServer):
    """Listens on the loopback address only; raises OSError if the port is taken."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int):
        super().__init__((ADDRESS, port), Handler)
        self.watched = watched


class Handler(BaseHTTPRequestHandler):
    """GET of the page and of its data; there is nothing else."""

    server_version = "tokenyard"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers one request."""
        assert isinstance(self.server, Server)
        # A page of elsewhere whose name is made to lead here (DNS rebinding) still sends that name.
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")}:
            self._send(403, "text/plain", f"only for http://{ADDRESS}:{self.server.server_port}/")
        elif self.path not in ("/", "/data"):
            self._send(404, "text/plain", "there is / and /data")
        else:
            self._answer(self.server.watched)

    def _answer(self, watched: Watched) -> None:
        known = self.headers.get("If-None-Match") if self.path == "/data" else None
        try:
            version, data = watched.news(known)
        except (RunError, OSError) as error:
            return self._send(500, "text/plain", str(error))
        if data is None:
            return self._send(304, "application/json", "", version)
        if self.path == "/":
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
        if version:
            self.send_header("ETag", version)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for people."""
