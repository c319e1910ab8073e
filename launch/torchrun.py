"""launch=torchrun: this host's ranks, started, watched and restarted by torch's elastic launcher in this process."""

import os
import sys

from ..train.config import Config, ConfigError
from ..train.folder import new_run_folder
from ..train.schema import quoted
from ..train.survival.family import LAUNCHER
from .address import interface_of, is_first_here, is_own, own_address
from .forwarding import ENDING, forwarding


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
