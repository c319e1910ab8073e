"""How the ranks of a job find each other at MASTER_ADDR and MASTER_PORT, and what is wrong, by name, when they do not.

Each rank tells the store of rank 0 that it has arrived, and goes on when all have. Nothing is sent to other ranks before, so a rank
that is missing is known as such, and not as a collective that does not complete.
"""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import groupby
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

ATTEMPT_SECONDS, PAUSE_SECONDS = 5.0, 0.5
"""How long one connection may take, and the pause before the next."""
NOTICE_SECONDS = 30.0
"""After this long without a connection a host says what it waits for."""
ANSWER_SECONDS, READ_SECONDS = 10.0, 1.0
"""How much longer than rank 0 the others wait for what that says, and how long rank 0 stays so that they can read it."""


ALL = "all are here"


class CannotMeet(Exception):
    """The ranks do not find each other; the text is one line."""


class Rendezvous(NamedTuple):
    """Where this rank is in the world, from the environment of its launcher."""

    rank: int
    world: int
    host: str
    port: int

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"


def meet(limit_seconds: float, job: str, say: Callable[[str], None]) -> tuple[Store, Rendezvous]:
    """Returns the store that all ranks share, when all have arrived. `job` distinguishes this job from others.

    Raises CannotMeet after `limit_seconds`, or at once for what no time mends. `say` prints what a host waits for meanwhile.
    """
    place, deadline = read_place(), time.monotonic() + limit_seconds
    # The agent of torch's launcher keeps its store from start to start of the ranks. Without one each start has its own, and the
    # hosts may count starts differently: an agent whose ranks end because other hosts come or go does not count that.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agents_store() else "0"
    serves = place.rank == 0 and not _agents_store()
    if serves:
        _check_port(place)
    else:
        _connect(place, deadline, limit_seconds, say)
    store = PrefixStore(f"tokenyard/{start}", _open(place, serves, deadline, limit_seconds))
    _wait_for_all(store, place, job, deadline, limit_seconds)
    return store, place


def _agents_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def read_place() -> Rendezvous:
    """Raises CannotMeet, naming the variable, for an environment that cannot work."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        several = "is" if len(missing) == 1 else "are"
        raise CannotMeet(f"{', '.join(missing)} {several} not set for this rank; nearest valid: start it with launch=torchrun")
    values = {name: os.environ[name] for name in needed}
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 1)):
        if not values[name].isdecimal() or int(values[name]) < least:
            raise CannotMeet(f"{name}={values[name]}: must be a number from {least}; nearest valid: {name}={least}")
    rank, world, port = int(values["RANK"]), int(values["WORLD_SIZE"]), int(values["MASTER_PORT"])
    if port > 65535:
        raise CannotMeet(f"MASTER_PORT={port}: must be a port from 1 to 65535; nearest valid: MASTER_PORT=29500")
    if rank >= world:
        raise CannotMeet(f"RANK={rank}: must be below WORLD_SIZE={world}; nearest valid: RANK={world - 1}")
    return Rendezvous(rank, world, values["MASTER_ADDR"], port)


def _check_port(place: Rendezvous) -> None:
    """Raises CannotMeet if rank 0 cannot open its port."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", place.port))
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"{place}: another program on {socket.gethostname()} has this port, perhaps another job"
        else:
            text = f"{place}: rank 0 cannot open this port on {socket.gethostname()} ({error.strerror})"
        raise CannotMeet(f"{text}; nearest valid: MASTER_PORT={_free_port()}, on all ranks") from None


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _connect(place: Rendezvous, deadline: float, limit: float, say: Callable[[str], None]) -> None:
    """Returns when a program answers at the port: rank 0 may start later. Raises CannotMeet, which says why none does."""
    noticed = time.monotonic() + NOTICE_SECONDS
    while True:
        try:
            remaining = max(0.1, deadline - time.monotonic())
            socket.create_connection((place.host, place.port), timeout=min(ATTEMPT_SECONDS, remaining)).close()
        except OSError as error:
            now, why = time.monotonic(), _why(place, error)
            if now + PAUSE_SECONDS >= deadline:
                raise CannotMeet(f"{why}, for {limit:g} s") from None
            if now >= noticed and os.environ.get("LOCAL_RANK", "0") == "0":
                noticed = float("inf")
                say(f"rank {place.rank} waits for rank 0: {why}")
            time.sleep(PAUSE_SECONDS)
        else:
            return


def _why(place: Rendezvous, error: OSError) -> str:
    """Returns what a failed connection tells, and what to do."""
    if isinstance(error, socket.gaierror):
        return f"{place}: no host has this name ({error.strerror}); nearest valid: MASTER_ADDR=the address of rank 0's host"
    if isinstance(error, ConnectionRefusedError):
        return f"{place}: the host refuses connections, so rank 0 does not run there; nearest valid: rank 0's host and port"
    if isinstance(error, TimeoutError):
        return f"{place}: no answer; nearest valid: an address of rank 0's host that this one reaches, and a port that is open"
    reason = error.strerror or type(error).__name__
    return f"{place}: cannot be reached ({reason}); nearest valid: an address of rank 0's host on a network of this one"


def _open(place: Rendezvous, serves: bool, deadline: float, limit: float) -> Store:
    """Returns the store. Raises CannotMeet if what answers at the port is none."""
    made: list[Store] = []
    seconds = timedelta(seconds=max(1.0, deadline - time.monotonic()))

    def make() -> None:
        try:
            made.append(TCPStore(place.host, place.port, place.world, serves, seconds, wait_for_workers=False, multi_tenant=serves))
        except RuntimeError:
            return

    # A thread, because torch waits for ever for the answer of a program that is no store.
    opening = threading.Thread(target=make, daemon=True)
    opening.start()
    opening.join(seconds.total_seconds())
    if made:
        return made[0]
    if serves:
        try:
            socket.create_connection((place.host, place.port), timeout=ATTEMPT_SECONDS).close()
        except OSError as error:
            raise CannotMeet(f"{_why(place, error)}; rank 0 runs on {socket.gethostname()}") from None
    raise CannotMeet(f"{place}: what answers is not rank 0 but another program, for {limit:g} s; nearest valid: rank 0's port")


def _wait_for_all(store: Store, place: Rendezvous, job: str, deadline: float, limit: float) -> None:
    """Tells that this rank is here, and waits until rank 0 says that all are. Raises CannotMeet if it says something else."""
    prefix = "meeting"
    verdict, elsewhere = f"{prefix}/verdict", f"nearest valid: MASTER_PORT={_free_port()}, on all ranks of one of them"
    try:
        for what, mine in (("job", job), ("world", f"WORLD_SIZE={place.world}")):
            there = store.compare_set(f"{prefix}/{what}", "", mine).decode() if mine else ""
            if there != mine:
                raise CannotMeet(f"{place}: another job is there ({there}; this one is {mine}); {elsewhere}")
        # The agent of torch's launcher has given each rank out once.
        if store.add(f"{prefix}/rank{place.rank}", 1) > 1 and not _agents_store():
            raise CannotMeet(f"{place}: a rank {place.rank} is there, of another job or started twice; {elsewhere}")
        store.add(f"{prefix}/count", 1)
        if place.rank == 0:
            said = _count(store, place, prefix, deadline, limit)
            store.set(verdict, said)
            if said != ALL:
                time.sleep(READ_SECONDS)
        else:
            store.wait([verdict], timedelta(seconds=max(1.0, deadline - time.monotonic()) + ANSWER_SECONDS))
            said = store.get(verdict).decode()
    except RuntimeError:  # DistError
        raise CannotMeet(f"{place}: rank 0 was there and has gone; nearest valid: the cause is in its output") from None
    if said != ALL:
        raise CannotMeet(said)


def _count(store: Store, place: Rendezvous, prefix: str, deadline: float, limit: float) -> str:
    """Returns ALL when all ranks have arrived, and otherwise at the deadline which have not."""
    while store.add(f"{prefix}/count", 0) < place.world:
        if time.monotonic() >= deadline:
            missing = [rank for rank in range(place.world) if not store.check([f"{prefix}/rank{rank}"])]
            rule = f"{place.world - len(missing)} of {place.world} ranks have arrived, after {limit:g} s; missing: {spans(missing)}"
            return f"{place}: {rule}; nearest valid: their hosts' output says why, or a longer parallel.timeout_seconds"
        time.sleep(0.02)
    return ALL


def spans(numbers: list[int]) -> str:
    """Returns sorted numbers in words: `0, 8-15`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda each: each[1] - each[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
