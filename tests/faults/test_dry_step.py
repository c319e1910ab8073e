"""The dry step leaves no trace, and says in one line what the run would have missed later."""

import os
import shutil
import time
from collections import namedtuple
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import configured, events_of, losses, state_of
from tokenyard.moe.layer import MoELayer
from tokenyard.train.fault_tolerance.dry_step import dry_step
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import run, train_session
from tokenyard.train.setup import open_session
from tokenyard.train.state import random_state

DRY = ["debug.dry_step=true"]


def traces(folder: Path, layout: list[str]) -> bool:
    """On ranks of the pool: whether weights, moments, random state and data are bit for bit what they were."""
    session = open_session(configured(folder, *layout), torch.device("cpu"))
    with closing(session), build_run_logger(session) as run_logger:
        before, random, data = state_of(session), random_state(), session.data.train.state()
        dry_step(session, run_logger)
        after = state_of(session)
        same = all(torch.equal(before[name], after[name]) for name in before) and data == session.data.train.state()
        return same and all(torch.equal(state, random_state()[name].tensor) for name, (_, state) in random.items())


@pytest.mark.parametrize("layout", [["parallel.expert=2"], ["parallel.shard=2", "batch.micro=2"]])
def test_it_leaves_no_trace(layout: list[str], ranks: Any, tmp_path: Path) -> None:
    assert all(ranks(2, traces, tmp_path / "run", [*DRY, *layout]))
    assert len(events_of(tmp_path / "run", "dry_step")) == 1 and not (tmp_path / "run" / "dry_step").exists()


def dried(folder: Path, restarts: str) -> None:
    """On ranks of the pool: the default, on ranks that were started again so often."""
    session = open_session(configured(folder, "debug.dry_step=null", "parallel.expert=2"), torch.device("cpu"))
    with (
        closing(session),
        build_run_logger(session) as run_logger,
        mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=restarts),
    ):
        dry_step(session, run_logger)


def test_ranks_that_are_started_again_do_not_try_again(ranks: Any, tmp_path: Path) -> None:
    for restarts in ("0", "1"):
        ranks(2, dried, tmp_path / restarts, restarts)
    assert [len(events_of(tmp_path / restarts, "dry_step")) for restarts in ("0", "1")] == [1, 0]


def test_a_run_with_it_is_bitwise_one_without(tmp_path: Path) -> None:
    assert run(configured(tmp_path / "with", *DRY)) == 0
    assert run(configured(tmp_path / "without")) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def without_room(folder: Path) -> int:
    """On ranks of the pool: the disk of the run folder is full."""
    full = namedtuple("usage", "total used free")(1, 1, 5000)
    session = open_session(configured(folder, *DRY, "parallel.expert=2"), torch.device("cpu"))
    with closing(session), build_run_logger(session) as run_logger, mock.patch.object(shutil, "disk_usage", lambda _: full):
        return train_session(session, run_logger)


def test_a_full_disk_is_found_before_the_first_step(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, without_room, tmp_path / "run") == [73, 73]
    (event,) = events_of(tmp_path / "run", "stopped")
    assert event["step"] == 0 and "5,000 bytes free" in event["reason"]


def short_of_memory(folder: Path, leaves_after: float) -> int:
    """On ranks of the pool: rank 1 has no memory in layer 1, where the other waits for it in the all-to-all."""
    session = open_session(configured(folder, *DRY, "parallel.expert=2"), torch.device("cpu"))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 1 has 1.00 GiB free.")

    def leave(code: int) -> None:
        time.sleep(leaves_after)
        end(code)

    end = os._exit
    if session.parallel.mesh.rank == 1:
        next(m for m in session.parallel.model.blocks[1].modules() if isinstance(m, MoELayer)).register_forward_pre_hook(fail)
        os._exit = leave
    with closing(session), build_run_logger(session) as run_logger:
        return train_session(session, run_logger)


@pytest.mark.fault(23)
@pytest.mark.parametrize("leaves_after", [0.0, 6.0], ids=["its connections close", "they stay open, as NCCL's seem to"])
def test_one_rank_short_of_memory_is_named_and_ends_all(leaves_after: float, ranks: Any, tmp_path: Path) -> None:
    """Without a launcher. By default a collective may take ten minutes."""
    with pytest.raises(Exception, match="died with exit code") as error:
        ranks(2, short_of_memory, tmp_path / "run", leaves_after, limit_seconds=100)
    said = str(error.value)
    assert said.count("died with exit code 73") == 2
    line = "tokenyard: the dry step failed at a step on rank 1, step 0, forward, layer 1: OutOfMemoryError: CUDA out of memory. "
    assert said.count(line + "Tried to allocate 2.00 GiB. GPU 1 has 1.00 GiB free.") == 1
    assert said.count("tokenyard: the dry step failed") == 1
    (event,) = events_of(tmp_path / "run", "stopped")
    assert event["code"] == 73 and "on rank 1" in event["reason"]
