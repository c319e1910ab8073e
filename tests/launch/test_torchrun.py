"""Addresses of this host, on the networks that every Linux machine has."""

import socket

import pytest
from tokenyard.launch.launchers.torchrun import check_hosts, interface_of, is_first_here, is_own, own_address
from tokenyard.train.config.compose import compose

ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737)."""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1"])
def test_a_loopback_address_is_ours(host: str) -> None:
    assert is_own(host)
    assert own_address(host) in ("127.0.0.1", "127.3.2.1", "::1")


def test_others_are_not() -> None:
    assert not is_own(ELSEWHERE)
    assert not is_own("no-such-host.invalid")
    assert own_address("no-such-host.invalid") is None


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of(ELSEWHERE) is None


def test_one_process_alone_is_the_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert is_first_here(port)
    assert not is_first_here(port)


def test_a_rendezvous_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    check_hosts(compose(["launch=torchrun", "launch.nodes=2", "run.dir=shared", "launch.rendezvous=host0:29500"]))
