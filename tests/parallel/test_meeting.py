"""Ranks that do not find each other are told why, over real sockets: one line with MASTER_ADDR and MASTER_PORT, in time."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenyard.parallel.meeting import CannotMeet, read_place, spans

SCRIPT = """
import sys
from tokenyard.parallel.meeting import CannotMeet, meet
try:
    store, place = meet(float(sys.argv[1]), sys.argv[2], lambda text: print("NOTICE", text))
    print("MET", place.rank)
except CannotMeet as error:
    print(error)
"""
LIMIT = 2.0


class Ranks:
    """Processes that meet, one for each rank that is started."""

    def __init__(self, world: int, port: int, host: str = "127.0.0.1") -> None:
        self.shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *ranks: int, limit: float = LIMIT, job: str = "") -> "Ranks":
        for rank in ranks:
            own = {**self.shared, "RANK": str(rank), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-P", "-c", SCRIPT, str(limit), job]
            settings = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            self.started.append(subprocess.Popen(command, env=os.environ | own, **settings))  # pyright: ignore
        return self

    def said(self) -> list[str]:
        """What each of them printed last."""
        return [process.communicate(timeout=60)[0].strip() for process in self.started]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """A program that is no store: it accepts and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_ranks_that_meet(port: int) -> None:
    """The first is the last to come."""
    ranks = Ranks(3, port).start(1, 2, limit=60)
    time.sleep(1)
    assert sorted(ranks.start(0, limit=60).said()) == ["MET 0", "MET 1", "MET 2"]


def test_addresses_that_lead_nowhere(port: int, silent: int) -> None:
    """One after the other is told apart: refused, another program, no such host, no answer."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filling = [socket.socket() for _ in range(4)]  # the kernel drops what its queue has no room for
        for each in filling:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        places = [("127.0.0.1", port), ("127.0.0.1", silent), ("no-such-host.invalid", port), full.getsockname()]
        ranks = [Ranks(2, number, host).start(1) for host, number in places]
        said = [each.said()[0] for each in ranks]
        for each in filling:
            each.close()
    words = [
        "refuses connections, so rank 0 does not run there",
        "not rank 0 but another program",
        "no host has this name",
        "no answer",
    ]
    for (host, number), text, word in zip(places, said, words, strict=True):
        assert text.startswith(f"MASTER_ADDR={host} MASTER_PORT={number}: ") and word in text, text
        assert "nearest valid: " in text and "for 2 s" in text and "\n" not in text


def test_missing_ranks_are_named_to_all(port: int) -> None:
    for text in Ranks(6, port).start(0, 3, limit=6).said():
        assert "2 of 6 ranks have arrived, after 6 s; missing: 1-2, 4-5; nearest valid: " in text, text


def test_two_jobs_with_one_port(port: int) -> None:
    first = Ranks(2, port).start(0, limit=12, job="7")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    texts = [Ranks(2, port).start(rank, job=job).said()[0] for rank, job in ((0, "8"), (1, "8"), (0, "7"))]
    assert "another program on " in texts[0] and "has this port, perhaps another job; nearest valid: MASTER_PORT=" in texts[0]
    assert "another job is there (7; this one is 8); nearest valid: MASTER_PORT=" in texts[1], texts
    other = Ranks(3, port).start(1, job="7").said()[0]
    assert "another job is there (WORLD_SIZE=2; this one is WORLD_SIZE=3)" in other
    assert first.start(1, limit=12, job="7").said() == ["MET 0", "MET 1"]


def test_a_rank_that_is_started_twice(port: int) -> None:
    ranks = Ranks(3, port).start(0, 1, 1, limit=5)
    assert sum("a rank 1 is there, of another job or started twice" in text for text in ranks.said()) == 1


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT=29500x: must be a number from 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be a port from 1 to 65535"),
        ({"RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2; nearest valid: RANK=1"),
    ],
)
def test_an_environment_that_cannot_work(changed: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500", **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CannotMeet) as error:
        read_place()
    assert str(error.value).startswith(text)


def test_spans_of_ranks() -> None:
    assert spans([0, 8, 9, 10, 12]) == "0, 8-10, 12" and spans([]) == ""


def test_a_run_says_it_once_for_a_host(port: int, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "tokenyard.train", "parallel.timeout_seconds=1", f"run.dir={tmp_path}/run", "device=cpu"]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    found = [
        subprocess.run(command, env={**os.environ, **own, "LOCAL_RANK": local}, capture_output=True, text=True, timeout=60)
        for local in ("0", "1")
    ]
    assert [each.returncode for each in found] == [73, 73]
    lines = [[line for line in each.stderr.splitlines() if line.startswith("tokenyard: ")] for each in found]
    assert lines[1] == [] and lines[0][0].startswith(f"tokenyard: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: the host refuses")
