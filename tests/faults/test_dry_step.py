"""The dry step leaves no trace, and says in one line what the run would have missed later."""

import os
import shutil
from collections import namedtuple
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import configured, events_of, losses, state_of
from tokenyard.train.reporter import build_reporter
from tokenyard.train.run import run, train_session
from tokenyard.train.session import open_session
from tokenyard.train.state import random_state
from tokenyard.train.survival.dry_step import dry_step

DRY = ["debug.dry_step=true"]


def traces(folder: Path, layout: list[str]) -> bool:
    """On ranks of the pool: whether weights, moments, random state and data are bit for bit what they were."""
    session = open_session(configured(folder, *layout), torch.device("cpu"))
    with closing(session), build_reporter(session) as reporter:
        before, random, data = state_of(session), random_state(), session.data.train.state()
        dry_step(session, reporter)
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
    with closing(session), build_reporter(session) as reporter, mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=restarts):
        dry_step(session, reporter)


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
    with closing(session), build_reporter(session) as reporter, mock.patch.object(shutil, "disk_usage", lambda _: full):
        return train_session(session, reporter)


def test_a_full_disk_is_found_before_the_first_step(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, without_room, tmp_path / "run") == [73, 73]
    (event,) = events_of(tmp_path / "run", "stopped")
    assert event["step"] == 0 and "5,000 bytes free" in event["reason"]


def short_of_memory(folder: Path) -> int:
    """On ranks of the pool: one of them cannot do the step."""
    session = open_session(configured(folder, *DRY, "parallel.expert=1"), torch.device("cpu"))
    right = session.engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        numbers = right(*args, **kwargs)
        if session.parallel.mesh.rank == 1:
            raise torch.OutOfMemoryError("no memory")
        return numbers

    with closing(session), build_reporter(session) as reporter, mock.patch.object(session.engine, "step", step):
        return train_session(session, reporter)


def test_one_rank_short_of_memory_is_named(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, short_of_memory, tmp_path / "run") == [73, 73]
    assert "at a step on rank 1: OutOfMemoryError: no memory" in events_of(tmp_path / "run", "stopped")[0]["reason"]
