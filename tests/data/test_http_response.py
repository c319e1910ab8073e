"""Servers that answer otherwise than files are served: nothing is lost, repeated or waited for beyond patience."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fault_run import heard
from streaming import config_of, names_in, opened, taken, write
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import BadData, DataUnavailable
from tokenyard.data.stream.http import RetryPolicy, open_url

Answer = Callable[["Server", bytes, int], None]
"""Gives the bytes of a file from one on."""


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    answer: Answer
    requests = 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.requests += 1
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.close_connection = True
        kind.answer(self, (kind.folder / self.path.lstrip("/").partition("?")[0]).read_bytes(), start)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def plainly(server: Server, data: bytes, start: int) -> None:
    server.head(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", Content_Length=len(data) - start)
    server.wfile.write(data[start:])


def in_chunks(server: Server, data: bytes, start: int) -> None:
    """From the beginning and without a length; the first answers break off in the middle."""
    server.head(200, Transfer_Encoding="chunked")
    for at in range(0, len(data), 1000):
        part = data[at : at + 1000]
        server.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        if server.requests % 3 == 1 and at > len(data) // 2:
            return
    server.wfile.write(b"0\r\n\r\n")


def until_it_hangs_up(server: Server, data: bytes, start: int) -> None:
    server.protocol_version = "HTTP/1.0"
    server.head(200)
    server.wfile.write(data)


def from_elsewhere(shift: int) -> Answer:
    """The first answer breaks off, and the others begin at another byte than the one asked for, as they say."""

    def answer(server: Server, data: bytes, start: int) -> None:
        at = max(0, start + shift) if start else 0
        end = min(len(data), at + len(data) - start)
        server.head(206, Content_Range=f"bytes {at}-{end - 1}/{len(data)}", Content_Length=len(data) - start)
        server.wfile.write(data[at:end] if start else data[: 1 << 20])

    return answer


def in_pieces(server: Server, data: bytes, start: int) -> None:
    """As servers with a largest answer do."""
    end = min(len(data), start + 700)
    server.head(206, Content_Range=f"bytes {start}-{end - 1}/{len(data)}", Content_Length=end - start)
    server.wfile.write(data[start:end])


def dripping(server: Server, data: bytes, start: int) -> None:
    server.head(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", Content_Length=len(data) - start)
    for at in range(start, len(data)):
        server.wfile.write(data[at : at + 1])
        server.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[type[Server], str]]:
    handler = type("Handler", (Server,), {"folder": tmp_path / "rows", "answer": staticmethod(plainly)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def served(data: DataConfig, address: str, ending: str) -> DataConfig:
    path = f"{address}/{{0..5}}.{ending}"
    return replace(data, path=path, patience_seconds=20.0, stall_seconds=2.0)


@pytest.mark.fault(
    31, "without a length, in chunks or in pieces: the same rows as from disk; with neither length nor end: refused by name"
)
@pytest.mark.parametrize("answer", [in_chunks, in_pieces])
@pytest.mark.parametrize(("kind", "ending"), [(Corpus.jsonl, "jsonl.gz"), (Corpus.parquet, "parquet"), (Corpus.lines, "txt")])
def test_the_same_rows_as_from_disk(server, tmp_path: Path, kind: Corpus, ending: str, answer: Answer) -> None:
    handler, address = server
    local = write(tmp_path / "rows", kind)
    handler.answer = staticmethod(answer)
    rows = taken(opened(served(local, address, ending)), range(70))
    assert sorted(set(names_in(rows))) == sorted(set(names_in(taken(opened(local), range(70)))))


@pytest.mark.fault(31)
def test_an_answer_without_length_or_end_is_refused(server, tmp_path: Path) -> None:
    handler, address = server
    write(tmp_path / "rows", Corpus.lines)
    handler.answer = staticmethod(until_it_hangs_up)
    with pytest.raises(ValueError, match=r"0\.txt cannot be read: the server says neither how long it is nor where it ends"):
        opened(config_of(tmp_path / "rows", Corpus.lines, path=f"{address}/{{0..5}}.txt"))


@pytest.mark.fault(31, "an answer from another byte: no byte twice, none left out")
def test_an_answer_from_another_byte(server) -> None:
    handler, address = server
    handler.folder.mkdir()
    content = np.random.Generator(np.random.Philox(1)).bytes(2_000_000)
    (handler.folder / "a.bin").write_bytes(content)
    earlier = "asked for byte 1999000 it answers from 1998000 to 1999000"
    later = "asked for byte 1048576 it answers from 1049576"
    for shift, reason in ((-1000, earlier), (1000, later)):
        handler.answer = staticmethod(from_elsewhere(shift))
        with open_url(f"{address}/a.bin", RetryPolicy(0.5, 2)) as file, pytest.raises(DataUnavailable, match=reason):
            read = b""
            while part := file.read1(1 << 16):
                read += part
                assert content.startswith(read)


@pytest.mark.fault(31, "a file that changes during the run: failed, exit 65")
def test_a_file_that_changes_in_the_run_has_failed(server, tmp_path: Path) -> None:
    _, address = server
    data = write(tmp_path / "rows", Corpus.lines)
    batches = opened(served(data, address, "txt"))
    taken(batches, range(1))
    for path in (tmp_path / "rows").iterdir():
        path.write_text("other\n" * 1000)
    with pytest.raises(BadData, match=r"lines: \d\.txt failed after 0 rows: the file changed since the run began"):
        taken(batches, range(1, 60))


@pytest.mark.fault(31, "a file that changes between two answers: refused")
def test_a_file_that_changes_between_two_answers(server) -> None:
    """The first answer breaks off; the next ones are of a file with another tag, or of another size."""
    handler, address = server
    handler.folder.mkdir()
    (handler.folder / "a.bin").write_bytes(bytes(2_000_000))
    for tag, more in (("b", 0), ("a", 5)):

        def answer(server: Server, data: bytes, start: int, tag: str = tag, more: int = more) -> None:
            size = len(data) + (more if start else 0)
            about = {"ETag": f'"{tag if start else "a"}"', "Content_Range": f"bytes {start}-{size - 1}/{size}"}
            server.head(206, **about, Content_Length=size - start)
            server.wfile.write(bytes(size - start) if start else data[: 1 << 20])

        handler.answer = staticmethod(answer)
        with open_url(f"{address}/a.bin", RetryPolicy(2, 2)) as file, pytest.raises(ValueError, match="changed while it was read"):
            file.read()


@pytest.mark.fault(31, "a redirect to another host: named once")
def test_another_host_that_a_server_redirects_to_is_named(server, tmp_path: Path) -> None:
    """Its own host is not."""
    handler, address = server
    data = write(tmp_path / "rows", Corpus.lines)
    elsewhere = address.replace("127.0.0.1", "localhost")

    def away(place: str) -> Answer:
        def answer(server: Server, content: bytes, start: int) -> None:
            if "?" in server.path:
                return plainly(server, content, start)
            return server.head(302, Location=f"{place}{server.path}?token=secret", Content_Length=0)

        return answer

    for place, said in ((address, 0), (elsewhere, 1)):
        handler.answer = staticmethod(away(place))
        with heard() as lines:
            assert taken(opened(served(data, address, "txt")), range(10)).shape[0] == 10
        assert [line for line in lines if "redirects" in line] == [
            f"data: {address.partition('//')[2]} redirects to {elsewhere.partition('//')[2]}"
        ] * said


@pytest.mark.fault(31, "a byte every 0.05 s: given up when patience ends")
def test_a_dripping_server_uses_up_patience(server) -> None:
    handler, address = server
    handler.folder.mkdir()
    (handler.folder / "a.bin").write_bytes(bytes(300))
    handler.answer = staticmethod(dripping)
    begin = time.monotonic()
    with (
        open_url(f"{address}/a.bin", RetryPolicy(1.0, 0.5)) as file,
        pytest.raises(DataUnavailable, match=r"gave \d+ bytes in 1 s"),
    ):
        file.read()
    assert time.monotonic() - begin < 5


@pytest.mark.fault(31)
def test_time_in_which_nobody_reads_uses_up_none(server) -> None:
    """The connection that was cut in the meantime is opened again."""
    handler, address = server
    handler.folder.mkdir()
    content = np.random.Generator(np.random.Philox(1)).bytes(4_000_000)
    (handler.folder / "a.bin").write_bytes(content)
    handler.answer = staticmethod(from_elsewhere(0))
    with open_url(f"{address}/a.bin", RetryPolicy(0.5, 2)) as file:
        first = file.read(10)
        time.sleep(0.8)
        assert first + file.read() == content
