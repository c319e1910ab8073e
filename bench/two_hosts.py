"""Two hosts on one Linux machine: network namespaces joined by a virtual cable, whose rate can be limited. Needs root."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

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
