"""A server that fails, stalls and hangs up in the middle costs time and no row."""

import threading
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import config_of, names_in, opened, taken, write
from tokenyard.data.config import Corpus
from tokenyard.data.errors import DataUnavailable
from tokenyard.data.stream import http as stream_http
from tokenyard.data.stream.http import RetryPolicy, open_url


class Faulty(BaseHTTPRequestHandler):
    """One of five requests fails, one hangs up in the middle and one stalls."""

    folder: Path
    faults = True
    down = False
    requests = 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.requests += 1
        turn = kind.requests % 5 if kind.faults else 4
        path = kind.folder / self.path.lstrip("/")
        if kind.down or turn == 0:
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{len(data)}"')
        self.end_headers()
        part = data[start:]
        if turn in (1, 2):
            part = part[: max(1, len(part) // 2)]
        self.wfile.write(part)
        if turn == 2:
            self.wfile.flush()
            time.sleep(0.4)
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[type[Faulty], str]]:
    handler = type("Handler", (Faulty,), {"folder": tmp_path / "rows"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("kind", "ending"), [(Corpus.jsonl, "jsonl.gz"), (Corpus.parquet, "parquet"), (Corpus.lines, "txt")])
def test_the_same_rows_as_from_disk(server, tmp_path: Path, kind: Corpus, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are a tenth of a run's."""
    wait = stream_http.Backoff.wait

    def wait_less(self: Any, error: BaseException, begin: float) -> None:
        self._delay /= 10
        wait(self, error, begin)
        self._delay *= 10

    monkeypatch.setattr(stream_http.Backoff, "wait", wait_less)
    handler, address = server
    local = write(tmp_path / "rows", kind)
    remote = config_of(tmp_path / "rows", kind, path=f"{address}/{{0..5}}.{ending}", stall_seconds=0.2, workers=1)
    remote = replace(remote, patience_seconds=20.0)
    rows = taken(opened(remote), range(70))
    assert handler.requests > 20
    handler.faults = False
    assert np.array_equal(rows, taken(opened(remote), range(70)))
    # Another fingerprint is another order, of the same rows.
    assert set(names_in(rows)) == set(names_in(taken(opened(local), range(70))))


@pytest.mark.fault(19, "goes on at the same byte; exit code 75 with a checkpoint")
def test_reading_stays_at_its_byte(server, tmp_path: Path) -> None:
    handler, address = server
    handler.folder.mkdir()
    content = np.random.Generator(np.random.Philox(1)).bytes(300_000)
    (handler.folder / "a.bin").write_bytes(content)
    with open_url(f"{address}/a.bin", RetryPolicy(20, 0.2)) as file:
        assert file.read() == content
        file.seek(-1000, 2)
        assert file.read(10) == content[-1000:-990]


def test_a_missing_file_is_said_at_once(server, tmp_path: Path) -> None:
    handler, address = server
    handler.folder.mkdir()
    handler.faults = False
    with pytest.raises(ValueError, match=r"nothing\.txt cannot be read: HTTP 404"):
        opened(config_of(tmp_path / "rows", Corpus.lines, path=f"{address}/nothing.txt"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that servers answered."""
    seen, right = list[Any](), stream_http.get_from

    def get_from(*arguments: Any) -> Any:
        try:
            seen.append(right(*arguments))
        except urllib.error.HTTPError as error:
            seen.append(error)
            raise
        return seen[-1]

    monkeypatch.setattr(stream_http, "get_from", get_from)
    return seen


def test_a_file_that_changes_is_refused(server, answers: list[Any]) -> None:
    """When the connection is opened again. No connection stays open."""
    handler, address = server
    handler.folder.mkdir()
    handler.faults = False
    (handler.folder / "a.bin").write_bytes(bytes(5_000_000))
    with open_url(f"{address}/a.bin", RetryPolicy(20, 5)) as file:
        file.read(10)
        (handler.folder / "a.bin").write_bytes(bytes(5_000_001))
        file.seek(4_000_000)
        with pytest.raises(ValueError, match=r"a\.bin changed while it was read: 5000000 bytes \S+, now 5000001 bytes"):
            file.read(10)
        assert len(answers) == 2 and all(answer.closed for answer in answers)


def test_failed_answers_are_closed(server, answers: list[Any]) -> None:
    handler, address = server
    handler.folder.mkdir()
    handler.faults = False
    with pytest.raises(ValueError, match="HTTP 404"):
        open_url(f"{address}/a.bin", RetryPolicy(20, 5))
    handler.down = True
    with pytest.raises(DataUnavailable, match="HTTP Error 503"):
        open_url(f"{address}/a.bin", RetryPolicy(0.3, 5))
    assert [answer.code for answer in answers[:2]] == [404, 503] and all(answer.closed for answer in answers)


@pytest.mark.fault(19)
@pytest.mark.parametrize("workers", [0, 1])
def test_patience_ends_and_the_state_is_that_before(server, tmp_path: Path, workers: int) -> None:
    handler, address = server
    write(tmp_path / "rows", Corpus.jsonl)
    handler.faults = False
    path = f"{address}/{{0..5}}.jsonl.gz"
    remote = config_of(tmp_path / "rows", Corpus.jsonl, path=path, patience_seconds=1.0, stall_seconds=0.8, workers=workers)
    straight = taken(opened(remote), range(60))
    batches = opened(remote)
    rows = [taken(batches, range(3))]
    handler.down = True
    step = 3
    with pytest.raises(DataUnavailable, match=r"did not answer for"):
        while True:
            rows.append(taken(batches, range(step, step + 1)))
            step += 1
    handler.down = False
    again = opened(remote)
    again.restore(batches.state())
    assert batches.state()["step"] == step < 60
    assert np.array_equal(np.concatenate([*rows, taken(again, range(step, 60))]), straight)
