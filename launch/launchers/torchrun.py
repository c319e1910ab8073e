"""launch=torchrun: torch's elastic launcher, in this process, starts, watches and restarts the ranks of this host."""

import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ...train.config.config import Config, ConfigError
from ...train.config.own_files import new_run_folder
from ...train.config.schema import quoted
from ...train.fault_tolerance.processes import LAUNCHER
from ...train.fault_tolerance.signals import SAVING, STOPPING, signals_blocked

# The signals that ask a run to save or stop are forwarded to the ranks instead of ending the launcher.

ENDING = ("SIGHUP", "SIGQUIT")
"""Signals that end the launcher and the ranks at once."""


@contextmanager
def forwarding() -> Iterator[None]:
    """Forwards the signals of fault_tolerance/signals.py to the child processes inside the block. For the main thread.

    Afterwards the signals are ignored: the ranks have stopped as requested, and this process is about to end. Children start with
    these signals blocked, and receive them once they unblock them.
    """
    forward = SignalForwarder()
    for number in (*STOPPING, *SAVING):
        signal.signal(number, forward)
    try:
        with signals_blocked():
            yield
    finally:
        for number in (*STOPPING, *SAVING):
            signal.signal(number, signal.SIG_IGN)


class SignalForwarder:
    """The signal handler. A stop signal ends this process if no rank was started yet, and does nothing after they ended."""

    def __init__(self) -> None:
        self.stopping = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        ranks = children(os.getpid())
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number in STOPPING:
            if not ranks and not self.stopping:
                raise SystemExit(128 + number)
            self.stopping = True


def children(parent: int) -> list[int]:
    """Returns the running child processes of `parent`; empty without /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, owner, *_ = stat.read_text().rpartition(")")[2].split()
            if int(owner) == parent and state != "Z":
                found.append(int(stat.parent.name))
    return found


# This host's address on the network that leads to another one. Linux, standard library.

SIOCGIFADDR = 0x8915
"""The request for the IPv4 address of an interface, netdevice(7)."""


def own_address(host: str) -> str | None:
    """Returns the IP address from which this host reaches `host`, which may be itself; None if there is no route.

    Nothing is sent.
    """
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue
            return probe.getsockname()[0]
    return None


def is_own(host: str) -> bool:
    """Whether `host` is this host: whether one of its addresses can be bound here."""
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False


def is_first_here(port: int) -> bool:
    """Whether this process is the first on this host to call this for `port`. True for one process until that ends."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # An abstract name: the kernel frees it when the process ends, and each network namespace has its own.
        claim.bind(f"\0tokenyard-{port}")
    except OSError:
        claim.close()
        return False
    claim.detach()
    return True


def interface_of(address: str) -> str | None:
    """Returns the network interface that has the IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _addresses(host: str):
    """getaddrinfo for datagrams; empty for an unknown name."""
    try:
        return socket.getaddrinfo(host.strip("[]"), 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []


LAST_CALL_SECONDS = 10
"""How long the hosts that have met, if launch.min_nodes are enough, wait for further ones."""


def start_ranks(config: Config, argv: list[str]) -> int:
    """Runs `python -m tokenyard.train` with `argv` on launch.ranks ranks. Returns 0 or the exit code of the first rank that failed.

    Signals that ask the run to save or stop are forwarded to the ranks, which stop by themselves: torch's launcher would kill them
    after 30 seconds, whether or not their checkpoint is durable, and report the signal as a failure.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Otherwise each rank would use all cores or, by torch's default, one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // config.launch.ranks)))
    # Each start of the ranks gets its own store: in a shared one they would find the addresses of killed ranks.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[LAUNCHER] = str(os.getpid())
    # One run folder for all ranks and all their restarts.
    folder = [f"run.dir={quoted(new_run_folder())}"] if config.run.dir is None else []
    launcher = [f"--signals-to-handle={','.join(ENDING)}", *_elastic(config)]
    try:
        with forwarding():
            run(parse_args([*launcher, "-m", "tokenyard.train", *argv, *folder]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:
            print(f"tokenyard: rank {rank} was the first to fail, exit code {failure.exitcode}", file=sys.stderr)
        # A process that a signal ended has a negative code in Python, and 128 + signal in a shell.
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def check_hosts(config: Config) -> None:
    """Raises ConfigError if ranks on several hosts could not find each other, or would use different run folders."""
    nodes = config.launch.nodes
    if nodes == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if missing and config.launch.rendezvous is None:
        rule = f"needs {', '.join(missing)} in the environment of each host, or launch.rendezvous"
        raise ConfigError.of("launch.nodes", nodes, rule, f"launch.nodes={nodes} launch.rendezvous=HOST:29500")
    if config.run.dir is None:
        raise ConfigError.of("run.dir", "null", f"must be a folder that all launch.nodes={nodes} hosts see", "run.dir=runs/NAME")


def _elastic(config: Config) -> list[str]:
    """Returns the arguments of torch's launcher: nodes, ranks, restarts, and where the hosts meet."""
    c = config.launch
    nodes = c.nodes if c.min_nodes is None else f"{c.min_nodes}:{c.nodes}"
    ranks = [f"--nnodes={nodes}", f"--nproc-per-node={c.ranks}", f"--max-restarts={c.max_restarts}"]
    if c.rendezvous is not None:
        return [*ranks, *_rendezvous(c.rendezvous)]
    if c.nodes == 1:
        return ["--standalone", *ranks]
    address = [f"--{flag}={os.environ[name]}" for flag, name in (("master-addr", "MASTER_ADDR"), ("master-port", "MASTER_PORT"))]
    return [f"--node-rank={os.environ['NODE_RANK']}", *address, *ranks]


def _rendezvous(endpoint: str) -> list[str]:
    """Arguments for the same command on all hosts: whether this one is at `endpoint` is derived from its addresses."""
    host, _, port = endpoint.rpartition(":")
    own = own_address(host)
    interface = interface_of(own) if own else None
    if interface:
        # gloo's default is the address of the host's name, which on many systems is a loopback address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # torch's default compares names, and where names mislead no host opens the store and all time out. Only one process may open
    # it, even if several launchers share a machine.
    opens = is_own(host) and is_first_here(int(port))
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=is_host={int(opens)},last_call_timeout={LAST_CALL_SECONDS}",
        *([f"--local-addr={own}"] if own else []),
    ]
