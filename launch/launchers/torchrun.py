"""launch=torchrun: this host's ranks, started, watched and restarted by torch's elastic launcher in this process."""

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
from ...train.config.private_files import new_run_folder
from ...train.config.schema import quoted
from ...train.fault_tolerance.processes import LAUNCHER
from ...train.fault_tolerance.signals import SAVING, STOPPING, signals_blocked

# Signals that a launcher hands to the ranks it started, instead of ending by them.

ENDING = ("SIGHUP", "SIGQUIT")
"""Still end the launcher and the ranks at once."""


@contextmanager
def forwarding() -> Iterator[None]:
    """Inside the block the signals of fault_tolerance/signals.py go to the child processes of this one; only its main thread may.

    After it they do nothing: the ranks have ended as they were asked to, and so will this process. A child that is started inside
    gets no signal before it asks for them: it is born with them held back.
    """
    forward = Forward()
    for number in (*STOPPING, *SAVING):
        signal.signal(number, forward)
    try:
        with signals_blocked():
            yield
    finally:
        for number in (*STOPPING, *SAVING):
            signal.signal(number, signal.SIG_IGN)


class Forward:
    """The handler. A signal that asks to stop ends this process if there are no ranks yet; when they have ended it does nothing."""

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
    """The processes that `parent` started and that still run; none where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, owner, *_ = stat.read_text().rpartition(")")[2].split()
            if int(owner) == parent and state != "Z":
                found.append(int(stat.parent.name))
    return found


# What this host is called on the network that leads to another one. Linux, standard library.

SIOCGIFADDR = 0x8915
"""The request for the IPv4 address of an interface, netdevice(7)."""


def own_address(host: str) -> str | None:
    """This host's IP address on the way to `host`, its own included; None if there is no way yet. Nothing is sent."""
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue
            return probe.getsockname()[0]
    return None


def is_own(host: str) -> bool:
    """Whether `host` is this one, that is, whether an address of it can be bound here."""
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False


def is_first_here(port: int) -> bool:
    """Whether this process is the first on this host that asks for `port`, and until it ends the only one told so."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # A name that is no file: the kernel forgets it with the process, and each network namespace has its own.
        claim.bind(f"\0tokenyard-{port}")
    except OSError:
        claim.close()
        return False
    claim.detach()
    return True


def interface_of(address: str) -> str | None:
    """The network interface that has the IPv4 address."""
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
    """As getaddrinfo gives them, for datagrams; none for a name that nobody knows."""
    try:
        return socket.getaddrinfo(host.strip("[]"), 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []


def start_ranks(config: Config, argv: list[str]) -> int:
    """Runs `python -m tokenyard.train` with the same `argv` on launch.ranks ranks. Returns 0 or the first failure's code.

    Signals that ask the run to save or to stop go to the ranks, which end by themselves: torch's launcher would end them after 30
    seconds, whether or not their checkpoint is durable, and report the signal as a failure.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # The ranks would otherwise each take all cores, or, by torch's own default, one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // config.launch.ranks)))
    # A store of its own for each start of the ranks: in a shared one, ranks find the addresses of those that were killed.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[LAUNCHER] = str(os.getpid())
    handed = f"--signals-to-handle={','.join(ENDING)}"
    try:
        with forwarding():
            run(parse_args([handed, *_elastic(config), "-m", "tokenyard.train", *argv, *_shared_folder(config)]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:
            print(f"tokenyard: rank {rank} was the first to fail, exit code {failure.exitcode}", file=sys.stderr)
        return _shell_code(failure.exitcode)
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def check_hosts(config: Config) -> None:
    """ConfigError if ranks on several hosts could not find each other, or would not know of one run folder."""
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
    """The arguments of torch's launcher."""
    c = config.launch
    ranks = [f"--nnodes={c.nodes}", f"--nproc-per-node={c.ranks}", f"--max-restarts={c.max_restarts}"]
    if c.rendezvous is not None:
        return [*ranks, *_rendezvous(c.rendezvous)]
    if c.nodes == 1:
        return ["--standalone", *ranks]
    address = [f"--{flag}={os.environ[name]}" for flag, name in (("master-addr", "MASTER_ADDR"), ("master-port", "MASTER_PORT"))]
    return [f"--node-rank={os.environ['NODE_RANK']}", *address, *ranks]


def _rendezvous(endpoint: str) -> list[str]:
    """The same command on each host: whether this is the one at `endpoint` is found here, from the addresses of the host."""
    host, _, port = endpoint.rpartition(":")
    own = own_address(host)
    interface = interface_of(own) if own else None
    if interface:
        # By itself gloo takes the address of the host's name, which on many systems is a loopback one.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Left alone, torch compares names, and where names mislead nobody opens the store and all time out. One process alone may open
    # it, also where several launchers share a machine.
    opens = is_own(host) and is_first_here(int(port))
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=is_host={int(opens)}",
        *([f"--local-addr={own}"] if own else []),
    ]


def _shared_folder(config: Config) -> list[str]:
    """An override that makes all ranks, and all restarts of them, use one run folder."""
    return [f"run.dir={quoted(new_run_folder())}"] if config.run.dir is None else []


def _shell_code(code: int) -> int:
    """A process that a signal ended has a negative code in Python, and 128 + signal for a shell."""
    return code if code >= 0 else 128 - code
