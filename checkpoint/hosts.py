"""Which ranks share a host, and the rank on the next host that keeps a copy of a rank's files.

The hosts form a ring in the order of their first ranks. A rank sends its files to the rank of the same place on the next host, and
receives those of its counterpart on the host before: two connections for each rank, whatever the number of ranks.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..parallel.object_collectives import from_all, rank_and_world
from .fsync import sync

NAME = "TOKENYARD_HOST"
"""The environment variable with the name of this host, where several launchers share a machine; by default the system's name."""
CHUNK = 1 << 26
"""Bytes of a message; a rank holds two at a time."""


def host_name() -> str:
    """Returns the name of this host, as part of a path."""
    return (os.environ.get(NAME) or socket.gethostname()).replace("/", "_").lstrip(".") or "host"


@dataclass
class Hosts:
    """The hosts of all ranks, as seen from one rank."""

    rank: int
    names: list[str]
    """The host of each rank."""

    @property
    def name(self) -> str:
        return self.names[self.rank]

    def on(self, name: str) -> list[int]:
        """Returns the ranks of a host."""
        return [rank for rank, each in enumerate(self.names) if each == name]

    @property
    def first(self) -> bool:
        """Whether this is the first rank of its host, which tidies up the host's folder."""
        return self.names.index(self.name) == self.rank

    @property
    def alone(self) -> str | None:
        """Returns why no host can keep copies for another one, None if they can."""
        order = list(dict.fromkeys(self.names))
        if len(order) == 1:
            return f"all ranks are on one host, {self.name}, which has no neighbour"
        if len({self.names.count(name) for name in order}) > 1:
            return "the hosts have different numbers of ranks"
        return None

    def neighbours(self) -> tuple[int, int]:
        """Returns the ranks that receive this rank's files and that send theirs."""
        order = list(dict.fromkeys(self.names))
        place, own = self.on(self.name).index(self.rank), order.index(self.name)
        after, before = (self.on(order[(own + way) % len(order)])[place] for way in (1, -1))
        return after, before


def meet_hosts() -> Hosts:
    """Returns the hosts of all ranks. Collective."""
    return Hosts(rank_and_world()[0], from_all(host_name()))


class Ring:
    """This rank's connections to both neighbours, over gloo: what they carry is in host memory, and NCCL is training's."""

    def __init__(self, hosts: Hosts, limit_seconds: float) -> None:
        """Collective. `hosts` are not alone."""
        self.after, self.before = hosts.neighbours()
        # torch names the group of a pair by its ranks and by how many groups a rank has made. So all ranks make one in each round,
        # some of themselves alone: the edges of the ring take turns, and the last edge of an odd ring has a round of its own.
        order = list(dict.fromkeys(hosts.names))
        own, hosts_count = order.index(hosts.name), len(order)
        groups = {}
        for turn in range(1 if hosts_count == 2 else 2 + hosts_count % 2):
            ends = {_turn(own, hosts_count): self.after, _turn((own - 1) % hosts_count, hosts_count): self.before}
            ranks, limit = sorted({hosts.rank, ends.get(turn, hosts.rank)}), timedelta(seconds=limit_seconds)
            groups[ends.get(turn)] = dist.new_group(ranks, limit, "gloo", use_local_synchronization=True)
        self._to, self._from = groups[self.after], groups[self.before]

    def swap(self, mine: list[Path], theirs: list[Path]) -> bool:
        """Sends the files `mine` to the next host and writes those of the host before to `theirs`, durably.

        No `mine`: this rank has nothing to send. Returns whether the files of the host before came. Both neighbours must call it.
        Raises OSError for a file that cannot be written, after all messages have passed, and RuntimeError if a neighbour is gone.
        """
        sizes = torch.tensor([path.stat().st_size for path in mine] or [-1] * len(theirs))
        others = torch.empty_like(sizes)
        self._pass(sizes, others)
        chunks, failure = (chunk for path in mine for chunk in _chunks_of(path)), None
        for path, size in zip(theirs, others.tolist(), strict=True):
            failure = self._receive(path, size, chunks) or failure
        for chunk in chunks:
            self._pass(chunk, None)
        if failure is not None:
            raise failure
        return bool((others >= 0).all())

    def _receive(self, path: Path, size: int, chunks: Iterator[torch.Tensor]) -> OSError | None:
        """Writes one file of the host before while `chunks` are sent. Returns the error of the disk, if there was one."""
        failure, left = None, size
        if size < 0:
            return None
        try:
            file = path.open("xb", buffering=0)
        except OSError as error:
            file, failure = None, error
        while left > 0:
            buffer = torch.empty(min(left, CHUNK), dtype=torch.uint8)
            self._pass(next(chunks, None), buffer)
            left -= len(buffer)
            try:
                content = buffer.numpy().data
                while file is not None and failure is None and len(content):
                    content = content[file.write(content) :]
            except OSError as error:
                failure = error
        if file is not None:
            with file:
                sync(file)
        return failure

    def _pass(self, mine: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
        """Sends one message and receives one, at the same time: a ring of ranks that first sent would wait for ever."""
        works = [] if theirs is None else [dist.irecv(theirs, self.before, self._from)]
        works += [] if mine is None else [dist.isend(mine, self.after, self._to)]
        for work in works:
            if work is not None:
                work.wait()


def _turn(edge: int, hosts: int) -> int:
    """Returns the round in which the edge from host `edge` to the next one is made."""
    return 0 if hosts == 2 else 2 if hosts % 2 and edge == hosts - 1 else edge % 2


def _chunks_of(path: Path) -> Iterator[torch.Tensor]:
    with path.open("rb", buffering=0) as file:
        while content := file.read(CHUNK):
            yield torch.frombuffer(bytearray(content), dtype=torch.uint8)
