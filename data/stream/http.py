"""Files behind HTTP as seekable byte streams that survive servers that fail, stall or disconnect."""

import errno
import http.client
import io
import re
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, final

from ..errors import DataUnavailable
from .http_response import Response, get_from

TRANSIENT_STATUS = (408, 425, 429)
LONGEST_DELAY = 30.0
PROGRESS = 1 << 16
"""Bytes after which the time that was spent waiting is forgotten."""
SLOWEST = 1024.0
"""Bytes per second; time beyond that counts as waiting."""
PERMANENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors of the operating system that do not go away when tried again."""
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
Item = TypeVar("Item")


class RetryPolicy(NamedTuple):
    """How long to wait for a source that does not answer."""

    seconds: float = 240.0
    """In total, without progress."""
    stall: float = 30.0
    """On an open connection, without a byte."""
    closed: threading.Event = threading.Event()
    """Once it is set, nobody waits any more."""


def open_url(url: str, retry: RetryPolicy) -> io.BufferedReader:
    """Returns the file at `url`, for reading. Raises ValueError if the server refuses it."""
    return io.BufferedReader(HttpFile(url, retry), 1 << 20)


def retry_items(read: Callable[[int], Iterator[Item]], first: int, what: str, retry: RetryPolicy) -> Iterator[Item]:
    """Yields from `read(first)`; after a transient error at item n, from `read(first + n)`.

    Raises DataUnavailable if that goes on.
    """
    at, backoff = first, Backoff(what, retry)
    while True:
        begin = time.monotonic()
        try:
            for item in read(at):
                yield item
                at += 1
                backoff.reset()
                begin = time.monotonic()
            return
        except Exception as error:
            if not is_transient(error):
                raise
            backoff.wait(error, begin)


def retry_call(action: Callable[[], Item], what: str, retry: RetryPolicy) -> Item:
    """Returns the result of `action`, called again while it raises a transient error. Raises DataUnavailable if that goes on."""
    return next(retry_items(lambda _: iter([action()]), 0, what, retry))


@final
class HttpFile(io.RawIOBase):
    """A file behind one connection, which is reopened at the same byte when it fails."""

    def __init__(self, url: str, retry: RetryPolicy) -> None:
        self.url = url
        self.tag = ""
        """The server's ETag or date of the file."""
        self.size = -1
        """-1 until it is known: for a chunked response without a length, at its end."""
        self._at = self._place = self._end = 0
        """Offsets of the next byte to return, the next byte of the open response, and that response's end (-1: unknown)."""
        self._answered = False
        self._response: Response | None = None
        self._timeout = retry.stall
        self._backoff = Backoff(url, retry)
        self._retrying(self._connect)

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = b""
        while not data and not 0 <= self.size <= self._at:
            data = self._retrying(lambda: self._some(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        if self._at == self.size:
            self._backoff.reset()
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        while whence == io.SEEK_END and self.size < 0:
            self.read(1 << 20)
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if at != self._at:
            self._disconnect()
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _some(self, wanted: int) -> bytes:
        """Returns the next bytes of the open response, without those that it has before the requested one."""
        begin = time.monotonic()
        if self._response is None:
            self._connect()
        assert self._response is not None
        ahead = self._at - self._place
        left = wanted if self.size < 0 else min(wanted, self.size - self._at)
        data = self._response.some(min(ahead + left, 1 << 20))
        if not data and self.size < 0 and not ahead:
            self.size = self._place  # the last chunk was received, or the read would have raised
        elif not data and self._place == self._end:
            self._connect()  # the response is complete but shorter than requested, as servers may send
        elif not data:
            raise ConnectionError(f"connection closed at byte {self._place} of {self.size}")
        self._place += len(data)
        self._backoff.got(len(data), max(0, len(data) - ahead), begin)
        return data[ahead:]

    def _connect(self) -> None:
        response = self._response = get_from(self.url, self._at, self._timeout)
        self._place, self._end, size = _extent(response, self._at)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if self._place > self._at or 0 <= self._end <= self._at != size:
            raise ConnectionError(f"asked for byte {self._at} it answers from {self._place} to {self._end}")
        if self._answered and (tag != self.tag or (size != self.size and min(size, self.size) >= 0)):
            self._disconnect()
            raise ValueError(f"{self.url} changed while it was read: {self.size} bytes {self.tag}, now {size} bytes {tag}")
        if size < 0 and self.size < 0 and not response.chunked:
            self._disconnect()
            raise ValueError(f"{self.url} cannot be read: the server says neither how long it is nor where it ends; copy it here")
        self.size, self.tag, self._answered = max(size, self.size), tag, True

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _retrying(self, action: Callable[[], Item]) -> Item:
        while True:
            begin = time.monotonic()
            try:
                return action()
            except urllib.error.HTTPError as error:
                error.close()
                self._disconnect()
                if error.code < 500 and error.code not in TRANSIENT_STATUS:
                    raise ValueError(f"{self.url} cannot be read: HTTP {error.code} {str(error.reason).splitlines()[0]}") from None
                self._backoff.wait(error, begin)
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                self._backoff.wait(error, begin)


def _extent(response: http.client.HTTPResponse, asked: int) -> tuple[int, int, int]:
    """Returns the first byte and end of a response, and the size of the whole file; -1 for what it does not state.

    asked: the requested first byte. A server without ranges sends the file from its start.
    """
    partial, stated = response.status == 206, response.headers.get("Content-Range")
    if not partial or stated is None:
        begin = asked if partial else 0
        end = -1 if response.length is None else begin + response.length
        return begin, end, end
    found = RANGE.fullmatch(stated.strip())
    if found is None:
        raise ConnectionError(f"it answers with Content-Range: {stated}")
    return int(found[1]), int(found[2]) + 1, -1 if found[3] == "*" else int(found[3])


@final
class Backoff:
    """Exponential backoff between attempts. Counts only the time in which the source is asked."""

    def __init__(self, what: str, retry: RetryPolicy) -> None:
        self._what = what
        self._retry = retry
        self.reset()

    def reset(self) -> None:
        """Forgets the time spent, after progress."""
        self._delay, self._spent, self._got = 0.1, 0.0, 0

    def got(self, count: int, new: int, begin: float) -> None:
        """Counts bytes received since `begin`, `new` of them for the first time. Raises DataUnavailable if they come too slowly."""
        self._got += new
        self._spent += max(0.0, time.monotonic() - begin - count / SLOWEST)
        if self._got >= PROGRESS:
            self.reset()
        elif self._spent > self._retry.seconds:
            raise DataUnavailable(f"{self._what} gave {self._got} bytes in {self._spent:.0f} s")

    def wait(self, error: BaseException, begin: float) -> None:
        """Waits after an attempt that began at `begin` and failed. Raises DataUnavailable if the next one would come too late."""
        self._spent += time.monotonic() - begin
        if self._spent + self._delay > self._retry.seconds or self._retry.closed.wait(self._delay):
            reason = f"{type(error).__name__}: {error}"
            raise DataUnavailable(f"{self._what} did not answer for {self._spent:.0f} s ({reason})") from error
        self._spent += self._delay
        self._delay = min(2 * self._delay, LONGEST_DELAY)


def is_transient(error: BaseException) -> bool:
    """Whether an error may go away when tried again. huggingface_hub raises those of httpx."""
    import httpx

    if isinstance(error, ConnectionError | TimeoutError | httpx.HTTPError):
        status = getattr(getattr(error, "response", None), "status_code", 500)
        return status >= 500 or status in TRANSIENT_STATUS
    return isinstance(error, OSError) and error.errno is not None and error.errno not in PERMANENT
