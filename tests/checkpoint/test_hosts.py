"""Files travel around a ring of hosts, of any length and of any size."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenyard.checkpoint import hosts
from tokenyard.checkpoint.hosts import Hosts, Ring
from tokenyard.checkpoint.local_tier import LocalTier
from tokenyard.parallel.object_collectives import rank_and_world
from tokenyard.parallel.shard import LocalShard, whole

SIZES = [0, 5, 700, 4099]


def passed_on(folder: Path, silent: int) -> tuple[bool, list[bytes]]:
    """On ranks of the pool, each a host: what the rank before has sent; `silent` sends nothing. Messages have 1000 bytes."""
    rank, world = rank_and_world()
    here = Hosts(rank, list("abcd")[:world])
    mine = [folder / f"{rank}.{part}" for part in range(2)]
    for part, path in enumerate(mine):
        path.write_bytes(bytes([rank]) * SIZES[(rank + part) % 4])
    theirs = [folder / f"{rank}.from.{part}" for part in range(2)]
    with mock.patch.object(hosts, "CHUNK", 1000):
        came = Ring(here, 60.0).swap([] if rank == silent else mine, theirs)
    return came, [path.read_bytes() for path in theirs if path.exists()]


def test_a_ring_of_any_length(ranks: Any, tmp_path: Path) -> None:
    """An odd one has an edge that no two turns can hold; of two hosts both edges are one connection."""
    for world in (2, 3, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        found = ranks(world, passed_on, folder, silent=1)
        for rank, (came, contents) in enumerate(found):
            before = (rank - 1) % world
            assert came == (before != 1)
            assert contents == ([] if before == 1 else [bytes([before]) * SIZES[(before + part) % 4] for part in range(2)])


def test_the_seconds_of_a_save_end_when_it_has_ended(tmp_path: Path) -> None:
    """And not when the next one begins, an interval later."""
    tier = LocalTier(tmp_path, Hosts(0, ["a"]), 60.0)
    begin = time.perf_counter()
    tier.start(1, {"x": LocalShard(whole((3,)), torch.ones(3))}, {})
    assert tier._thread is not None
    tier._thread.join()
    ended = time.perf_counter() - begin
    time.sleep(0.1)
    outcome = tier.finish()
    assert outcome is not None and outcome.error is None and 0 < outcome.seconds <= ended
