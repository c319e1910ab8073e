"""Servers that lead elsewhere, and servers that never come to the point."""

import http.client
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from fault_run import heard
from tokenyard.data.errors import DataUnavailable
from tokenyard.data.stream import http_response
from tokenyard.data.stream.http import RetryPolicy, open_url

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwords"
Say = Callable[[socket.socket], object]


@pytest.fixture
def serve() -> Iterator[Callable[[Say], int]]:
    """Starts a server that answers each connection in these words; its port. `serve.heard` is what it was asked."""
    opened: list[socket.socket] = []

    def start(say: Say) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        opened.append(server)

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        def one(connection: socket.socket) -> None:
            with connection:
                start.heard.append(connection.recv(1 << 16).decode())  # pyright: ignore[reportFunctionMemberAccess]
                with suppress(OSError):
                    say(connection)

        threading.Thread(target=answer, daemon=True).start()
        return server.getsockname()[1]

    start.heard = []  # pyright: ignore[reportFunctionMemberAccess]
    yield start
    for server in opened:
        server.close()


def text(words: bytes) -> Say:
    return lambda connection: connection.sendall(words)


def to(place: str, code: int = 302) -> Say:
    return text(f"HTTP/1.1 {code} Elsewhere\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode("latin-1"))


def drip(words: bytes, endless: bytes) -> Say:
    """The words, then for ever one byte now and then."""

    def say(connection: socket.socket) -> None:
        connection.sendall(words)
        while True:
            connection.sendall(endless)
            time.sleep(0.05)

    return say


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_another_host_is_said_once(serve, code: int) -> None:
    other = serve(text(WHOLE))
    port = serve(to(f"http://localhost:{other}/there", code))
    with heard() as said:
        for _ in range(2):
            with open_url(f"http://127.0.0.1:{port}/x", RetryPolicy(2, 1)) as file:
                assert file.read() == b"words"
    assert said == [f"data: 127.0.0.1:{port} redirects to localhost:{other}"]
    assert not any("authorization" in asked.lower() or "cookie" in asked.lower() for asked in serve.heard)


def test_no_password_of_a_redirect_is_said() -> None:
    request, place = http_response.urllib.request.Request("http://1.1.1.1/x"), "http://me:passw0rd@1.0.0.1/y"
    with heard() as said:
        http_response.RedirectHandler().redirect_request(request, io.BytesIO(), 302, "", http.client.HTTPMessage(), place)
    assert said == ["data: 1.1.1.1 redirects to 1.0.0.1"]


def test_the_same_host_is_followed_without_a_word(serve) -> None:
    other = serve(text(WHOLE))
    port = serve(to(f"http://127.0.0.1:{other}/there"))
    with heard() as said, open_url(f"http://127.0.0.1:{port}/x", RetryPolicy(2, 1)) as file:
        assert file.read() == b"words" and not said


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file:///etc/passwd", "HTTP 302|another protocol"),
        ("ftp://127.0.0.1/x", "another protocol"),
        ("data:text/plain,words", "HTTP 302|another protocol"),
        ("http://169.254.169.254/latest/meta-data", "an address of this machine or its network"),
        ("http://2852039166/", "an address of this machine or its network"),
        ("http://[fe80::1]/", "an address of this machine or its network"),
        ("http://[::ffff:169.254.1.1]/", "an address of this machine or its network"),
    ],
)
def test_places_that_nobody_is_led_to(serve, place: str, why: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"cannot be read: .*({why})") as error:
        open_url(f"http://127.0.0.1:{serve(to(place))}/x", RetryPolicy(20, 10))
    assert "\n" not in str(error.value) and time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("far", "host"),
    [
        *(("1.1.1.1", host) for host in ("127.0.0.1", "10.1.2.3", "0.0.0.0", "169.254.1.1", "::1")),
        *(("10.1.2.3", host) for host in ("127.0.0.1", "0.0.0.0", "::", "169.254.1.1")),
    ],
)
def test_nothing_leads_nearer_home(far: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a name is the way."""
    known = {"home.example": host, "far.example": far}
    right = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *more, **rest: right(known.get(name, name), *more, **rest))
    request = http_response.urllib.request.Request("http://far.example/x")
    with pytest.raises(ValueError, match=r"redirects to http://home.example/y, an address of this machine"):
        http_response.RedirectHandler().redirect_request(
            request, io.BytesIO(), 302, "", http.client.HTTPMessage(), "http://home.example/y"
        )
    request = http_response.urllib.request.Request("https://far.example/x")
    with pytest.raises(ValueError, match="by another protocol"):
        http_response.RedirectHandler().redirect_request(
            request, io.BytesIO(), 302, "", http.client.HTTPMessage(), "http://far.example/y"
        )


def test_a_circle_is_one_line(serve) -> None:
    ports: list[int] = []
    ports.append(serve(lambda connection: to(f"http://127.0.0.1:{ports[0]}/x")(connection)))
    with pytest.raises(ValueError, match="cannot be read: HTTP 302") as error:
        open_url(f"http://127.0.0.1:{ports[0]}/x", RetryPolicy(5, 2))
    assert "\n" not in str(error.value)


def test_the_body_of_a_redirect_is_not_read(serve) -> None:
    other = serve(text(WHOLE))
    head = f"HTTP/1.1 302 Elsewhere\r\nLocation: http://127.0.0.1:{other}/x\r\nContent-Length: 99999999999\r\n\r\n".encode()
    begin = time.monotonic()
    with open_url(f"http://127.0.0.1:{serve(drip(head, bytes(1 << 16)))}/x", RetryPolicy(5, 2)) as file:
        assert file.read() == b"words" and time.monotonic() - begin < 2


ENDLESS = {
    "status": (b"HTTP/1.1 ", b"2"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "length of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"x"),
    "trailer": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwords\r\n0\r\n", b"X: y\r\n"),
}


@pytest.mark.fault(31, "heads, lengths of chunks and trailers that drip: given up when patience ends")
@pytest.mark.parametrize("part", ENDLESS)
def test_what_drips_before_and_behind_the_body(serve, part: str) -> None:
    port, begin = serve(drip(*ENDLESS[part])), time.monotonic()
    gone = pytest.raises(DataUnavailable, match=r"not whole after 0\.5 s|did not answer|gave 0 bytes")
    with gone, closing(open_url(f"http://127.0.0.1:{port}/x", RetryPolicy(1.0, 0.5))) as file:
        file.read()
    assert time.monotonic() - begin < 5
