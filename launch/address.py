"""What this host is called on the network that leads to another one. Linux, standard library."""

import fcntl
import socket
import struct

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
