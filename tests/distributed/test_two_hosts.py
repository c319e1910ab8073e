"""Expert parallelism between two network namespaces, one launcher in each: the losses are those of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenyard.bench.nodes import Host, two_hosts

RUN = ["debug=default", "device=cpu", "steps=3", "sample.prompt=''"]
PORT = 29500


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    context = two_hosts()
    try:
        pair = context.__enter__()
    except OSError as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    yield pair
    context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Returns the losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    words = [sys.executable, "-m", "tokenyard", "train", *RUN, f"run.dir={folder}/run", f"data.cache={folder}/cache"]
    subprocess.run(words, env=environment(), check=True, capture_output=True, timeout=120)
    return losses(folder / "run")


def test_the_same_command_on_both_hosts(hosts: tuple[Host, Host], alone: list[float], tmp_path: Path) -> None:
    launch = ["launch=torchrun", "launch.nodes=2", "launch.ranks=2", f"launch.rendezvous={hosts[0].address}:{PORT}"]
    words = [sys.executable, "-m", "tokenyard", "train", *launch, *RUN, "parallel.expert=4", *folders(tmp_path)]
    before = [host.sent_bytes() for host in hosts]
    run_on_both(hosts, [words, words])
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
    # Each step sends rows of tokens both ways in every layer; the rendezvous alone is some kilobytes.
    assert all(host.sent_bytes() - sent > 1_000_000 for host, sent in zip(hosts, before, strict=True))


def test_plain_torchrun_on_both_hosts(hosts: tuple[Host, Host], alone: list[float], tmp_path: Path) -> None:
    commands = []
    for rank, host in enumerate(hosts):
        address = [f"--master-addr={hosts[0].address}", f"--master-port={PORT + 1}", f"--local-addr={host.address}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
        train = ["-m", "tokenyard.train", *RUN, "parallel.expert=2", *folders(tmp_path)]
        commands.append(["env", f"GLOO_SOCKET_IFNAME={host.interface}", *torchrun, *address, *train])
    run_on_both(hosts, commands)
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def run_on_both(hosts: tuple[Host, Host], commands: list[list[str]]) -> None:
    """Runs a command on each host at the same time; both must succeed."""
    started = [
        subprocess.Popen(host.command(words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for host, words in zip(hosts, commands, strict=True)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


def losses(folder: Path) -> list[float]:
    found = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == 3
    return found


def folders(folder: Path) -> list[str]:
    return [f"run.dir={folder}/run", f"data.cache={folder}/cache"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
