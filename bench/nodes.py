"""Times the exchanges of expert parallelism over a slow link: `python -m tokenyard.bench.nodes plain deduplicated`.

Two network namespaces of this machine act as hosts (this needs root), with 2 gloo ranks each. The time is that of forward and
backward of one MoE layer whose experts are spread over the 4 ranks. The exchanges take turns within each repeat. Prints one line of
JSON for each exchange: median, fastest and slowest seconds (of the slowest rank), and the bytes that one pass sends over the link
in one direction.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.config import ModelConfig, MoEConfig
from ..moe.layer import MoELayer
from ..moe.model import Transformer
from ..parallel.apply import initialise, parallelize
from ..parallel.config import ParallelConfig
from ..parallel.mesh import build_mesh
from ..parallel.process_group import join, leave

# Two hosts on one Linux machine: network namespaces joined by a veth pair, whose rate can be limited. This needs root.

ADDRESSES = "10.77.0.1", "10.77.0.2"
"""The addresses of the two ends, which exist only in the two namespaces."""


class Host(NamedTuple):
    """One end of the veth pair."""

    name: str
    address: str
    interface: str

    def command(self, words: list[str]) -> list[str]:
        """Returns the command that runs `words` on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def sent_bytes(self) -> int:
        """Returns the bytes that this host has sent so far."""
        (link,) = json.loads(_ip("-netns", self.name, "-json", "-statistics", "link", "show", self.interface))
        return link["stats64"]["tx"]["bytes"]


@contextlib.contextmanager
def two_hosts(megabits: int | None = None) -> Iterator[tuple[Host, Host]]:
    """Creates both hosts, and deletes them afterwards. `megabits` limits each direction, in Mbit/s. OSError if not permitted."""
    hosts = tuple(Host(f"tokenyard-{os.getpid()}-{end}", address, f"host{end}") for end, address in enumerate(ADDRESSES))
    first, second = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        ends = [["name", host.interface, "netns", host.name] for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            _ip("-netns", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-netns", host.name, "link", "set", interface, "up")
            if megabits is not None:
                limit = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "50ms"]
                _run("tc", "-netns", host.name, "qdisc", "add", "dev", host.interface, *limit)
        yield first, second
    finally:
        for host in hosts:
            # Deleting one end deletes the pair.
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    """Returns the output of the command. Raises OSError if it is missing or fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


NODES, RANKS = 2, 2
PORT = 29510


def main(argv: list[str] | None = None) -> int:
    """Creates the hosts and starts the ranks; a process with a rank in its environment measures. Returns the exit code."""
    arguments = parse(argv)
    if "RANK" in os.environ:
        measure(arguments)
        return 0
    try:
        with two_hosts(arguments.megabits) as hosts:
            return start(hosts, sys.argv[1:] if argv is None else argv)
    except OSError as reason:
        print(f"tokenyard.bench.nodes: this machine has no network namespaces for us: {reason}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tokenyard.bench.nodes", description="Exchanges between two hosts, timed.")
    parser.add_argument("exchanges", nargs="*", default=["plain"], help="values of parallel.exchange (plain)")
    parser.add_argument("--megabits", type=int, default=200, help="rate of the link in each direction, Mbit/s (%(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="timed passes of each (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of each rank (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="d_model (%(default)s)")
    parser.add_argument("--experts", type=int, default=32, help="of the layer (%(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token (%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="width of an expert (%(default)s)")
    return parser.parse_args(argv)


def start(hosts: tuple[Host, Host], argv: list[str]) -> int:
    """Starts the ranks of both hosts with the environment that torchrun would give them. Returns 0 if all succeed, else 1."""
    processes = []
    for rank in range(NODES * RANKS):
        host = hosts[rank // RANKS]
        names = {"RANK": rank, "WORLD_SIZE": NODES * RANKS, "LOCAL_RANK": rank % RANKS, "LOCAL_WORLD_SIZE": RANKS}
        names |= {"GROUP_RANK": rank // RANKS, "GROUP_WORLD_SIZE": NODES, "OMP_NUM_THREADS": 1}
        names |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": host.interface}
        environment = os.environ | {name: str(value) for name, value in names.items()}
        words = [sys.executable, "-m", "tokenyard.bench.nodes", *argv]
        processes.append(subprocess.Popen(host.command(words), env=environment))
    return int(max(abs(process.wait()) for process in processes) > 0)


def measure(arguments: argparse.Namespace) -> None:
    """On each rank: time the exchanges in turn. Rank 0 prints the results."""
    join(torch.device("cpu"), 300)
    try:
        layers = {name: build(name, arguments) for name in arguments.exchanges}
        torch.manual_seed(dist.get_rank())
        x_BSD = torch.randn(1, arguments.tokens, arguments.width, requires_grad=True)
        passes = {name: [] for name in layers}
        for repeat in range(-1, arguments.repeats):
            for name, layer in layers.items():
                seconds = timed_pass(layer, x_BSD)
                # The first pass warms up.
                passes[name] += [seconds] if repeat >= 0 else []
        for name, layer in layers.items():
            report(name, passes[name], link_bytes(layer, x_BSD), arguments)
    finally:
        leave()


def build(exchange: str, arguments: argparse.Namespace) -> MoELayer:
    """Returns the MoE layer with this exchange and the experts spread over all ranks; the seed is the same for each exchange."""
    moe = MoEConfig(experts=arguments.experts, top_k=arguments.top_k, hidden=arguments.hidden)
    model = ModelConfig(layers=1, width=arguments.width, heads=4, kv_heads=4, vocabulary=64, moe=moe)
    with torch.device("meta"):
        empty = Transformer(model)
    config = with_exchange(ParallelConfig(expert=NODES * RANKS), exchange)
    parallel = parallelize(empty, build_mesh(config), config, torch.device("cpu"))
    initialise(parallel, seed=1)
    layer = parallel.model.blocks[0].moe
    assert layer is not None
    return layer


def with_exchange(config: ParallelConfig, exchange: str) -> ParallelConfig:
    """Returns `config` with parallel.exchange set, if this version has the setting."""
    known = {field.name: field for field in dataclasses.fields(ParallelConfig)}
    if "exchange" not in known:
        if exchange != "plain":
            raise ValueError(f"{exchange}: there is no setting parallel.exchange; nearest valid: plain")
        return config
    return dataclasses.replace(config, exchange=type(known["exchange"].default)(exchange))


def timed_pass(layer: MoELayer, x_BSD: Tensor) -> float:
    """Seconds of forward and backward on the slowest rank. All ranks start together."""
    dist.barrier()
    begin = perf_counter()
    one_pass(layer, x_BSD)
    seconds = torch.tensor(perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def one_pass(layer: MoELayer, x_BSD: Tensor) -> None:
    y_BSD, _ = layer(x_BSD)
    y_BSD.sum().backward()


def link_bytes(layer: MoELayer, x_BSD: Tensor) -> int:
    """Bytes that leave this host over the link in one pass, headers and barriers included, by the counter of its interface."""
    dist.barrier()
    before = _sent()
    one_pass(layer, x_BSD)
    dist.barrier()
    return _sent() - before


def report(name: str, seconds: list[float], sent: int, arguments: argparse.Namespace) -> None:
    if dist.get_rank() == 0:
        rounded = {key: round(of(seconds), 4) for key, of in (("median_s", statistics.median), ("min_s", min), ("max_s", max))}
        print(json.dumps({"exchange": name, **rounded, "link_bytes": sent, **vars(arguments)}), flush=True)


def _sent() -> int:
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return int((Path("/sys/class/net") / interface / "statistics/tx_bytes").read_text())


if __name__ == "__main__":
    sys.exit(main())
