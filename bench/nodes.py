"""Times the exchanges of expert parallelism between two hosts with a slow link: python -m tokenyard.bench.nodes plain deduplicated

Two network namespaces of this machine stand for the hosts (bench/nodes.py, so root is needed), with 2 gloo ranks each. What
is timed is forward and backward of one MoE layer whose experts are spread over the 4 ranks. The exchanges take turns within each
repeat. Standard output is JSON, a line each exchange: median, fastest and slowest seconds (of the slowest rank), and the bytes
that went over the link in one direction in one pass.
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

# Two hosts on one Linux machine: network namespaces joined by a virtual cable, whose rate can be limited. Needs root.

ADDRESSES = "10.77.0.1", "10.77.0.2"
"""Of the two ends; only the two namespaces know them."""


class Host(NamedTuple):
    """One end of the cable."""

    name: str
    address: str
    interface: str

    def command(self, words: list[str]) -> list[str]:
        """`words` to be run on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def sent_bytes(self) -> int:
        """What has left through the cable so far."""
        (link,) = json.loads(_ip("-netns", self.name, "-json", "-statistics", "link", "show", self.interface))
        return link["stats64"]["tx"]["bytes"]


@contextlib.contextmanager
def two_hosts(megabits: int | None = None) -> Iterator[tuple[Host, Host]]:
    """Both ends, gone afterwards. `megabits` a second limit each direction. OSError if this machine does not allow it."""
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
            # The cable goes with its ends.
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    """The command's output. OSError if it is not there or fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


NODES, RANKS = 2, 2
PORT = 29510


def main(argv: list[str] | None = None) -> int:
    """Without a rank in the environment: makes the hosts and starts the ranks. Returns the exit code."""
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
    """The ranks of both hosts, with the environment that torchrun would give them. Returns 0 if all succeeded, else 1."""
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
    """One rank: all exchanges in turn, then rank 0 prints."""
    join(torch.device("cpu"), 300)
    try:
        layers = {name: build(name, arguments) for name in arguments.exchanges}
        torch.manual_seed(dist.get_rank())
        x_BSD = torch.randn(1, arguments.tokens, arguments.width, requires_grad=True)
        passes = {name: [] for name in layers}
        for repeat in range(-1, arguments.repeats):
            for name, layer in layers.items():
                seconds = timed_pass(layer, x_BSD)
                # The first is for warming up.
                passes[name] += [seconds] if repeat >= 0 else []
        for name, layer in layers.items():
            report(name, passes[name], link_bytes(layer, x_BSD), arguments)
    finally:
        leave()


def build(exchange: str, arguments: argparse.Namespace) -> MoELayer:
    """The same layer with each exchange: same seed, experts over all ranks."""
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
    """`config` with parallel.exchange set, where there is such a setting."""
    known = {field.name: field for field in dataclasses.fields(ParallelConfig)}
    if "exchange" not in known:
        if exchange != "plain":
            raise ValueError(f"{exchange}: there is no setting parallel.exchange; nearest valid: plain")
        return config
    return dataclasses.replace(config, exchange=type(known["exchange"].default)(exchange))


def timed_pass(layer: MoELayer, x_BSD: Tensor) -> float:
    """Seconds of forward and backward on the slowest rank; all begin together."""
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
    """What left this host over the link in one pass, by the counter of its interface: headers and barriers included."""
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
