"""Ranks that do not find each other are told why, over real sockets: one line with MASTER_ADDR and MASTER_PORT, in time."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch.distributed as dist
from tokenyard.parallel.meeting import CannotMeet, meet, read_place, spans

LIMIT = 2.0
KEPT: list[Any] = []
"""The stores, which serve others as long as the process group of a run holds them."""


class Role(NamedTuple):
    """Who a rank of the pool is in a job."""

    rank: int
    world: int
    port: int
    host: str = "127.0.0.1"
    limit: float = LIMIT
    job: str = ""
    delay: float = 0.0


def play(roles: list[Role | None]) -> str:
    """What this rank says in its role."""
    role = roles[dist.get_rank()]
    if role is None:
        return ""
    time.sleep(role.delay)
    own = {"RANK": role.rank, "WORLD_SIZE": role.world, "MASTER_ADDR": role.host, "MASTER_PORT": role.port}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in own.items()}):
        try:
            store, place = meet(role.limit, role.job, print)
        except CannotMeet as error:
            return str(error)
        KEPT.append(store)
        return f"met as {place.rank}"


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


def test_ranks_that_meet(port: int, ranks: Any) -> None:
    """The first is the last to come."""
    roles = [Role(rank, 4, port, limit=60, delay=0.5 * (rank == 0)) for rank in range(4)]
    assert ranks(4, play, roles) == ["met as 0", "met as 1", "met as 2", "met as 3"]


def test_addresses_that_lead_nowhere(port: int, silent: int, ranks: Any) -> None:
    """One after the other is told apart: refused, another program, no such host, no answer."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filling = [socket.socket() for _ in range(4)]  # the kernel drops what its queue has no room for
        for each in filling:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        places = [("127.0.0.1", port), ("127.0.0.1", silent), ("no-such-host.invalid", port), full.getsockname()]
        said = ranks(4, play, [Role(1, 2, number, host) for host, number in places])
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


def test_missing_ranks_are_named_to_all(port: int, ranks: Any) -> None:
    said = ranks(4, play, [Role(0, 6, port), None, Role(3, 6, port), None])
    for text in (said[0], said[2]):
        assert "2 of 6 ranks have arrived, after 2 s; missing: 1-2, 4-5; nearest valid: " in text, text


def test_two_jobs_with_one_port(port: int, ranks: Any) -> None:
    first, other = Role(0, 2, port, limit=4, job="7"), Role(0, 2, port, job="8", delay=1)
    said = ranks(4, play, [first, other, other._replace(rank=1), other._replace(rank=1, world=3, job="7")])
    assert "1 of 2 ranks have arrived" in said[0], said
    assert "another program on " in said[1] and "has this port, perhaps another job; nearest valid: MASTER_PORT=" in said[1]
    assert "another job is there (7; this one is 8); nearest valid: MASTER_PORT=" in said[2]
    assert "another job is there (WORLD_SIZE=2; this one is WORLD_SIZE=3)" in said[3]


def test_a_rank_that_is_started_twice(port: int, ranks: Any) -> None:
    said = ranks(4, play, [Role(0, 4, port), Role(1, 4, port), Role(1, 4, port, delay=0.5), Role(3, 4, port)])
    assert sum("a rank 1 is there, of another job or started twice" in text for text in said[1:3]) == 1, said
    assert sum("3 of 4 ranks have arrived, after 2 s; missing: 2;" in text for text in said) == 3


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


JOINS = """
import torch, torch.distributed as dist
from tokenyard.parallel.process_group import join
join(torch.device("cpu"), 20.0, limit_seconds=20.0)
total = torch.ones(1)
dist.all_reduce(total)
print(total.item())
"""


@pytest.mark.parametrize("counts", [((0, 0), (1, 1)), ((0, 0), (1, 0))], ids=["agent's store", "own stores"])
def test_ranks_that_are_started_again_meet(counts: tuple[tuple[int, int], ...], port: int) -> None:
    """In the store of torch's agent, which has what the first start left; or in stores of their own, with counts that differ."""
    agents, outputs = counts[1][0] == counts[1][1], []
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if agents else None
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": str(agents), "OMP_NUM_THREADS": "1"}
    for start, of_ranks in enumerate(counts):
        own["MASTER_PORT"] = str(port if agents else port + 1 + start)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", JOINS],
                env={**os.environ, **own, "RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(count)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, count in enumerate(of_ranks)
        ]
        outputs += [rank.communicate(timeout=100)[0].strip() for rank in ranks]
    assert outputs == ["2.0"] * 4
    del kept
