"""Files behind HTTP as seekable byte streams, which outlive servers that fail, stall or hang up in the middle."""

import http.client
import io
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, final

from .stop import DataUnavailable

TRANSIENT_STATUS = (408, 425, 429)
LONGEST_DELAY = 30.0
Item = TypeVar("Item")


class Patience(NamedTuple):
    """How long to wait for a source. Once `closed` is set nobody waits any more."""

    seconds: float = 240.0
    """Without any progress."""
    stall: float = 30.0
    """Without a byte on an open connection."""
    closed: threading.Event = threading.Event()


def open_url(url: str, patience: Patience) -> io.BufferedReader:
    """The file at `url`, for reading. ValueError if the server says that there is none."""
    return io.BufferedReader(HttpFile(url, patience), 1 << 20)


def patiently(read: Callable[[int], Iterator[Item]], first: int, what: str, patience: Patience) -> Iterator[Item]:
    """`read(first)`, and if the source fails at its n-th item `read(first + n)`. Raises DataUnavailable at the end of patience."""
    at, backoff = first, Backoff(what, patience)
    while True:
        try:
            for item in read(at):
                yield item
                at += 1
                backoff.reset()
            return
        except Exception as error:
            if not isinstance(error, transient_errors()):
                raise
            backoff.wait(error)


@final
class HttpFile(io.RawIOBase):
    """One connection that is opened again at the same byte when it fails."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url = url
        self.tag = ""
        """What the server says of the version of the file."""
        self.size = -1
        self._at = 0
        self._response: http.client.HTTPResponse | None = None
        self._timeout = patience.stall
        self._backoff = Backoff(url, patience)
        self._trying(self._connect)

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = min(len(buffer), self.size - self._at)
        if wanted <= 0:
            return 0
        data = self._trying(lambda: self._some(wanted))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if at != self._at:
            self._hang_up()
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _some(self, wanted: int) -> bytes:
        if self._response is None:
            self._connect()
        assert self._response is not None
        data = self._response.read(wanted)
        if not data:
            raise ConnectionError(f"connection closed at byte {self._at} of {self.size}")
        return data

    def _connect(self) -> None:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self._at}-", "Accept-Encoding": "identity"})
        response = self._response = urllib.request.urlopen(request, timeout=self._timeout)
        skipped = 0 if response.status == 206 else self._at
        size = int(response.headers.get("Content-Length") or -1) + (self._at - skipped)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if self.size >= 0 and (size, tag) != (self.size, self.tag):
            self._hang_up()
            raise ValueError(f"{self.url} changed while it was read: {self.size} bytes {self.tag}, now {size} bytes {tag}")
        self.size, self.tag = size, tag
        while skipped:  # a server that knows no ranges begins anew
            skipped -= len(response.read(min(skipped, 1 << 20))) or skipped

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _trying(self, action: Callable[[], Item]) -> Item:
        while True:
            try:
                done = action()
            except urllib.error.HTTPError as error:
                error.close()
                self._hang_up()
                if error.code < 500 and error.code not in TRANSIENT_STATUS:
                    raise ValueError(f"{self.url} cannot be read: HTTP {error.code} {error.reason}") from None
                self._backoff.wait(error)
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                self._backoff.wait(error)
            else:
                self._backoff.reset()
                return done


@final
class Backoff:
    """Waits between attempts, each time twice as long."""

    def __init__(self, what: str, patience: Patience) -> None:
        self._what = what
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """There was progress."""
        self._delay, self._since = 0.1, time.monotonic()

    def wait(self, error: BaseException) -> None:
        """Raises DataUnavailable if patience would end before the next attempt."""
        waited = time.monotonic() - self._since
        if waited + self._delay > self._patience.seconds or self._patience.closed.wait(self._delay):
            reason = f"{type(error).__name__}: {error}"
            raise DataUnavailable(f"{self._what} did not answer for {waited:.0f} s ({reason})") from error
        self._delay = min(2 * self._delay, LONGEST_DELAY)


def transient_errors() -> tuple[type[BaseException], ...]:
    """What may go away by itself; httpx is how huggingface_hub reads."""
    import httpx

    return ConnectionError, TimeoutError, httpx.HTTPError
