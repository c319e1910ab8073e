"""Faults 18 and 26 in a live run of two ranks: rows that one rank alone cannot read; a rollback on streamed data."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import checkpoint_steps, configured, events_of, losses, rows_in, state_of
from test_numbers import EXPERT, spoiled_gradient
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

STREAMED = ["data=jsonl", "data.window=16", "data.workers=2", "parallel.expert=2", "numerics.spike_sigma=null"]


def unreadable(session: Session, step: int) -> Any:
    """Rank 1 has no rows for `step`."""
    right = session.data.train.batch

    def batch(before: int, rows: range) -> Any:
        if before + 1 == step and session.parallel.mesh.rank == 1:
            raise OSError("shard 3 is gone")
        return right(before, rows)

    return mock.patch.object(session.data.train, "batch", batch)


def run_of(folder: Path, overrides: list[str], unread: int | None, spoiled: dict[int, int]) -> dict[str, Any]:
    """On a rank of the pool."""
    session = open_session(configured(folder, *overrides), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(closing(session))
        run_logger = stack.enter_context(build_run_logger(session))
        if unread is not None:
            stack.enter_context(unreadable(session, unread))
        stack.enter_context(spoiled_gradient(session, 1, spoiled, float("nan"), EXPERT))
        code = train_session(session, run_logger)
        return {"code": code, "step": session.step, "state": state_of(session), "data": session.data.train.state()}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return rows_in(tmp_path / "rows")


@pytest.mark.fault(18, "rows that one rank of two cannot read: both end with 65 and a checkpoint of the step before")
def test_rows_that_one_rank_cannot_read(ranks: Any, tmp_path: Path) -> None:
    results = ranks(2, run_of, tmp_path / "run", ["parallel.expert=2"], 5, {})
    assert [(result["code"], result["step"]) for result in results] == [(65, 4)] * 2
    assert checkpoint_steps(tmp_path / "run")[-1] == 4 and [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    (stopped,) = events_of(tmp_path / "run", "stopped")
    assert stopped["reason"] == "step 5: rank 1 could not read the rows" and stopped["code"] == 65
    again = ranks(2, run_of, tmp_path / "run", ["parallel.expert=2"], None, {})
    straight = ranks(2, run_of, tmp_path / "straight", ["parallel.expert=2"], None, {})
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same_states(again, straight)


@pytest.mark.fault(26, "a rollback on streamed data: rows, counts, weights and moments bitwise those of a skip")
def test_a_rollback_on_streamed_data(ranks: Any, rows: str, tmp_path: Path) -> None:
    """Back to step 3, forward again, and around step 5: bit for bit what a run is that skips step 5."""
    rolled, skipped = (
        ranks(2, run_of, tmp_path / policy, [*STREAMED, rows, f"numerics.on_nan={policy}"], None, {5: 2})
        for policy in ("rollback", "skip")
    )
    assert {result["code"] for result in [*rolled, *skipped]} == {0}
    assert len(events_of(tmp_path / "rollback", "rolled_back")) == 1
    assert losses(tmp_path / "rollback") == losses(tmp_path / "skip")
    assert same_states(rolled, skipped) and [r["data"] for r in rolled] == [r["data"] for r in skipped]
    counts = [
        [{key: value for key, value in record.items() if key.startswith("data/")} for record in read_journal(path)]
        for path in (tmp_path / policy / "metrics.jsonl" for policy in ("rollback", "skip"))
    ]
    assert counts[0] == counts[1] and "data/jsonl/documents" in counts[0][0]


def same_states(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Bit for bit, on every rank."""
    pairs = [(one["state"], other["state"]) for one, other in zip(ours, theirs, strict=True)]
    return all(one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one) for one, other in pairs)
