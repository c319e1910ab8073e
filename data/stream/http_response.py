"""HTTP responses with a deadline for each read, and with redirects that are checked and logged."""

import functools
import http.client
import io
import ipaddress
import logging
import socket
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import IO, Any, final
from urllib.parse import urlsplit

log = logging.getLogger("tokenyard")


def get_from(url: str, begin: int, seconds: float) -> "Response":
    """Returns the server's response for the bytes from `begin` on. Raises TimeoutError if that takes longer than `seconds`.

    Raises ValueError for a redirect to another protocol, or to an address of this machine or its network from outside.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-", "Accept-Encoding": "identity"})
    return _opener().open(request, timeout=seconds)


@final
class DeadlineReader(io.RawIOBase):
    """Reads a socket up to a deadline: with a timeout per byte, a server that drips bytes would block its reader for ever."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._raw = sock, sock.makefile("rb", buffering=0)
        self._seconds = sock.gettimeout() or 60.0
        self.restart()

    def restart(self) -> None:
        """Sets the deadline anew."""
        self._end = time.monotonic() + self._seconds

    def readinto(self, buffer: memoryview) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"what it answers is not whole after {self._seconds:g} s")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()


@final
class Response(http.client.HTTPResponse):
    """A response whose headers, and each read of whose body, must arrive within the connection's timeout."""

    def __init__(self, sock: socket.socket, *arguments: Any, **settings: Any) -> None:
        super().__init__(sock, *arguments, **settings)
        self.fp.close()
        self._reader = DeadlineReader(sock)
        self.fp = io.BufferedReader(self._reader)

    def some(self, limit: int) -> bytes:
        """Returns up to `limit` bytes of the body, b"" at its end."""
        self._reader.restart()
        return self.read1(limit)


class HttpConnection(http.client.HTTPConnection):
    response_class = Response


class HttpsConnection(http.client.HTTPSConnection):
    response_class = Response


class HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(HttpConnection, req)


class HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(HttpsConnection, req)


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects; logs one to another host and refuses those that lead inside (see `get_from`)."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()  # otherwise urllib reads the whole body, however long it is
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise ValueError(f"{req.full_url} cannot be read: it redirects to {newurl}, by another protocol")
        if new.hostname != old.hostname:
            if _reach(new.hostname) < _reach(old.hostname):
                raise ValueError(
                    f"{req.full_url} cannot be read: it redirects to {newurl}, an address of this machine or its network"
                )
            _log_redirect(*(url.netloc.rpartition("@")[2] for url in (old, new)))  # without user and password
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _reach(host: str | None) -> int:
    """Returns how far away a host is: 0 link-local, 1 this machine, 2 its private networks, 3 public or without known address."""
    with suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return min(_reach_of(ipaddress.ip_address(str(each[4][0]).partition("%")[0])) for each in found)
    return 3


def _reach_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    address = getattr(address, "ipv4_mapped", None) or address
    nearest = (address.is_link_local, address.is_loopback or address.is_unspecified, not address.is_global, True)
    return nearest.index(True)


@functools.cache
def _log_redirect(host: str, other: str) -> None:
    """Logs a redirect, once per pair of hosts."""
    log.warning("data: %s redirects to %s", host, other)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(HttpHandler, HttpsHandler, RedirectHandler)
