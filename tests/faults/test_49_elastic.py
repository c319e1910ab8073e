"""Fault 49: hosts are lost and come back; the run goes on with those that are there, at the same global batch, on one curve."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_run import losses, words
from fault_run import children, events_of, records
from forked_runs import ending, free_port, start_each, wait
from tokenyard.parallel.failpoints import VARIABLE
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.config.elastic import check_host_counts, fit_to_ranks
from tokenyard.train.config.validate import check_rules

STEPS, LOCAL = 18, 2
RUN = [
    f"steps={STEPS}",
    "precision=fp64",
    "checkpoint.every=0",
    f"checkpoint.local.every={LOCAL}",
    "batch.sequences=12",
    "batch.micro=3",
    "parallel.shard=4",
    "debug.stragglers_every=0",
]
ELASTIC = ["launch=torchrun", "launch.nodes=4", "launch.min_nodes=3", "launch.max_restarts=3"]


def command(folder: Path, endpoint: str) -> list[str]:
    local = f"checkpoint.local.folder={folder.parent / 'hosts'}"
    return words(folder, *RUN, *ELASTIC, local, f"launch.rendezvous={endpoint}")


def on(hosts: str, folder: Path, failpoints: str = "") -> list[int | None]:
    """The exit codes of one start on these hosts, of one rank each."""
    log = folder.parent / "log"
    environments = [{"TOKENYARD_HOST": host, "LOCAL_WORLD_SIZE": "1", "TOKENYARD_FAILPOINTS": failpoints} for host in hosts]
    started = start_each(len(hosts), command(folder, "localhost:29500"), log, environments)
    with ending(started):
        wait(started, 120.0, log)
    print(log.read_text())
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run on four hosts that nobody interrupts."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert on("abcd", folder) == [0] * 4
    return losses(folder)


def same_curve(folder: Path, straight: dict[int, float]) -> float:
    """The largest relative difference of a loss."""
    found = losses(folder)
    assert found.keys() == straight.keys()
    return max(abs(found[step] - straight[step]) / straight[step] for step in straight)


@pytest.mark.fault(49)
def test_four_hosts_three_and_four(tmp_path: Path, straight: dict[int, float], record_property: Any) -> None:
    """FSDP over all ranks, so that a lost host's shards are on the next host alone; each start has other shards."""
    folder = tmp_path / "run"
    assert on("abcd", folder, "step.begin:rank=2:step=8:SIGKILL")[2] == -signal.SIGKILL
    (lost,) = (tmp_path / "hosts").glob("*/c")
    shutil.rmtree(lost)
    assert on("abd", folder, "step.begin:rank=1:step=14:SIGKILL")[1] == -signal.SIGKILL
    assert on("abcd", folder) == [0] * 4
    resumed = [(event["step"], event["shard"]) for event in events_of(folder, "resume")]
    # A save that is under way at the kill is lost with it.
    assert resumed[0] in [(6, 3), (4, 3)] and resumed[1] in [(12, 4), (10, 4)]
    difference = same_curve(folder, straight)
    assert difference <= 1e-6
    after = f"{resumed[0][0]} and {resumed[1][0]}"
    text = f"4 -> 3 -> 4 ranks, killed after steps 7 and 13, went on after {after} (saved every {LOCAL})"
    record_property("measured", f"{text}: losses within {difference:.0e}")


class Host:
    """`tokenyard train launch=torchrun` on a host of its own name, with one rank. Killed, it takes the rank with it."""

    def __init__(self, name: str, line: list[str], log: Path) -> None:
        own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TOKENYARD_HOST": name, "PYTHONUNBUFFERED": "1"}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.log = log
        with log.open("ab") as file:
            start = [sys.executable, "-P", "-m", "tokenyard", "train", *line]
            self.process = subprocess.Popen(start, env=os.environ | own, stdout=file, stderr=file, start_new_session=True)

    def kill(self) -> None:
        for pid in [self.process.pid, *children(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow  # 3 minutes: torch's launchers wait for hosts that come and go
@pytest.mark.fault(49)
@pytest.mark.timeout(400)
def test_the_launchers_of_the_hosts_do_it(tmp_path: Path, straight: dict[int, float], record_property: Any) -> None:
    """kill -9 of a whole host, its folder with it; later a new one of another name takes its place. No command is given again."""
    folder, begin = tmp_path / "run", time.monotonic()
    port = free_port()
    line = [*command(folder, f"127.0.0.1:{port}"), "checkpoint.local.every=1"]
    # Slow steps, so that it is not over before the new host has joined.
    pauses = [f"step.begin:rank=0:restart=1:step={step}:sleep=5" for step in range(9, 14)]
    os.environ[VARIABLE] = ",".join(["step.begin:rank=0:restart=0:sleep=0.2", *pauses])
    # All of them have the address of the rendezvous here: the first one serves it, and the host that is lost must be another.
    hosts = {"a": Host("a", line, tmp_path / "a.log")}
    try:
        until(lambda: answers(port), hosts)
        hosts |= {name: Host(name, line, tmp_path / f"{name}.log") for name in "bcd"}
        until(lambda: last_step(folder) >= 5, hosts)
        hosts.pop("c").kill()
        for lost in (tmp_path / "hosts").glob("*/c"):
            shutil.rmtree(lost)
        until(lambda: any(event["shard"] == 3 for event in resumes(folder)), hosts)
        hosts["e"] = Host("e", line, tmp_path / "e.log")
        until(lambda: all(host.process.poll() is not None for host in hosts.values()), hosts)
        assert [host.process.returncode for host in hosts.values()] == [0] * 4, logs(hosts)
    finally:
        del os.environ[VARIABLE]
        for host in hosts.values():
            host.kill()
    assert [event["shard"] for event in resumes(folder)] == [3, 4]
    difference = same_curve(folder, straight)
    assert difference <= 1e-6
    seconds = time.monotonic() - begin
    text = f"by the launchers alone, a host killed and another one joined: losses within {difference:.0e}, {seconds:.0f} s"
    record_property("measured", text)


def until(holds: Callable[[], bool], hosts: dict[str, Host], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, logs(hosts)
        time.sleep(0.05)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


def logs(hosts: dict[str, Host]) -> str:
    return "\n".join(f"--- {name}\n{host.log.read_text(errors='replace')[-3000:]}" for name, host in hosts.items())


def last_step(folder: Path) -> int:
    return max((int(record["step"]) for record in records(folder)), default=0)


def resumes(folder: Path) -> list[dict[str, Any]]:
    try:
        return events_of(folder, "resume")
    except (OSError, ValueError):
        return []


def elastic(*overrides: str) -> Config:
    return compose([*ELASTIC, "launch.rendezvous=h:29500", *overrides])


@pytest.mark.parametrize(
    ("overrides", "world", "fitted"),
    [
        (["batch.sequences=12", "batch.micro=3", "parallel.shard=4"], 3, (3, 2)),
        (["batch.sequences=12", "parallel.shard=2"], 3, (3, 2)),
        (["batch.sequences=12", "batch.micro=1"], 3, (1, 1)),
        (["batch.sequences=24", "launch.ranks=2", "parallel.tensor=2", "parallel.shard=4"], 6, (3, 4)),
        (["batch.sequences=24", "launch.ranks=2", "parallel.expert=2", "parallel.shard=2"], 6, (2, 2)),
        (["batch.sequences=12"], 4, (1, None)),
    ],
)
def test_what_shrinks(overrides: list[str], world: int, fitted: tuple[int, int | None]) -> None:
    """A rank holds no more than before if that is possible, and no micro-batch is larger."""
    config = elastic(*overrides)
    said = fit_to_ranks(config, world)
    assert (config.parallel.shard, config.batch.micro) == fitted
    assert (said is None) == (world == 4)
    check_rules(config, world)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"launch.min_nodes=3: no number of hosts below .* nearest valid: .*batch.sequences=12"):
        check_host_counts(elastic("batch.sequences=16"))
    config = elastic("launch.min_nodes=2", "batch.sequences=16")
    check_host_counts(config)
    rule = r"launch.min_nodes=2: cannot go on with the 3 hosts that are there: batch.sequences must be a multiple of the 3 .*: 2$"
    with pytest.raises(ConfigError, match=rule):
        fit_to_ranks(config, 3)
