"""`tokenyard watch`: for this machine alone, read-only, it follows the journals, and Ctrl-C ends it."""

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_run import made_run, write
from tokenyard.launch.main import main
from tokenyard.report.run_reader import Run
from tokenyard.report.server import Server, Watched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run", layers=2, experts=4, steps=20)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(Watched(Run(folder)), 0) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server: Server, path: str = "/data", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    headers = {"Cookie": f"tokenyard{server.server_port}={server.token}"} | headers
    link.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = link.getresponse()
    content = answer.read().decode()
    link.close()
    return answer.status, dict(answer.getheaders()), content


def test_it_serves_the_page_and_its_data(server: Server) -> None:
    status, headers, text = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'" in text and '"live":true' in text
    assert json.loads(ask(server)[2])["runs"][0]["steps"] == 20


def test_it_follows_the_journals(server: Server, folder: Path) -> None:
    status, headers, _ = ask(server)
    known = headers["ETag"]
    assert ask(server, If_None_Match=known)[0] == 304
    write(folder / "metrics.jsonl", [{"step": 21, "loss": 1.25}])
    status, headers, text = ask(server, If_None_Match=known)
    run = json.loads(text)["runs"][0]
    assert (status, run["steps"], run["facts"]["loss"]) == (200, 21, 1.25)
    assert headers["ETag"] != known


def test_a_wrong_line_is_told_and_later_forgiven(server: Server, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    good = path.read_text()
    path.write_text(good + "what\n{}\n")
    assert ask(server)[::2] == (500, f"{path}, line 21: not a JSON object; remove this line")
    path.write_text(good + '{"step": 21}\n')
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "", "localhost.evil.example:PORT"]
)
def test_other_names_are_refused(host: str, server: Server) -> None:
    assert ask(server, Host=host.replace("PORT", str(server.server_port)))[0] == 403


def test_localhost_is_a_name_of_it(server: Server) -> None:
    assert ask(server, Host=f"localhost:{server.server_port}")[0] == 200


def test_it_is_for_whom_has_the_token(server: Server) -> None:
    status, headers, _ = ask(server, server.url.partition(str(server.server_port))[2], Cookie="")
    assert status == 200 and headers["Set-Cookie"].endswith("; HttpOnly; SameSite=Strict; Path=/")
    assert ask(server, Cookie=headers["Set-Cookie"].partition(";")[0])[0] == 200
    for path in ("/", "/data", "/?token=", "/?token=x", "/data?token=%ff", "/nothing", f"/?token={server.token}x"):
        status, headers, text = ask(server, path, Cookie="")
        assert (status, "Set-Cookie" in headers) == (403, False) and server.token not in text
    assert ask(server, Cookie="tokenyard=x; \x7f=;;")[0] == 403 and len(server.token) >= 40


def test_a_browser_that_goes_away_is_no_matter(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        link = socket.create_connection(("127.0.0.1", server.server_port))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        link.sendall(f"GET /data?token={server.token} HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
        link.close()
    for error in (BrokenPipeError(), ConnectionResetError(), TimeoutError()):
        try:
            raise error
        except OSError:
            server.handle_error(None, None)
    assert ask(server)[0] == 200 and capsys.readouterr().err == ""


@pytest.mark.parametrize("path", ["/config.yaml", "/../config.yaml", "/data/", "/data?x", "/report/report.html", "*"])
def test_nothing_else_is_served(path: str, server: Server) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_is_read_only(method: str, server: Server) -> None:
    status, headers, _ = ask(server, method=method)
    assert status == 501
    assert "Access-Control-Allow-Origin" not in headers


def test_it_listens_on_the_loopback_alone(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_taken_port_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["watch", str(folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"tokenyard: --port {port}: Address already in use; nearest valid: --port 0")


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_it_with_0(folder: Path) -> None:
    command = [sys.executable, "-m", "tokenyard", "watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/\?token=[\w-]+ shows ", line)
        os.kill(process.pid, signal.SIGINT)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
        assert process.stderr.read().strip() == ""
