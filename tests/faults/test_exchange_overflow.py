"""Rows without room in the symmetric exchange: all ranks end before the update, or, by the policy, drop and count them."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_run import checkpoint_steps, configured, state_of
from tokenyard.train.exit import ExitCode, RunStop
from tokenyard.train.fault_tolerance.supervisor import build_supervisor
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.logging.step_profiler import StepProfiler
from tokenyard.train.run import train, train_session
from tokenyard.train.setup import open_session

WORDS = ["parallel.expert=2", "parallel.exchange=symmetric", "parallel.exchange_rows=0.9", "steps=3", "telemetry.every=1"]
ROWS = 8 * 32 * 2
"""Of a layer."""
LEAST = 2 * (ROWS - 2 * math.ceil(0.9 * ROWS / 2))
"""Both ranks together have room for nine tenths of the rows of a layer; so many of two layers have none."""


def ended(folder: Path) -> tuple[str, int, bool]:
    """On a rank: why the run ends, its exit code, and whether weights and moments are bit for bit what they were."""
    session = open_session(configured(folder, *WORDS), torch.device("cpu"))
    before = state_of(session)
    with closing(session), build_run_logger(session) as run_logger, pytest.raises(RunStop) as stop:
        train(session, run_logger, build_supervisor(session, run_logger), StepProfiler(session))
    after = state_of(session)
    return str(stop.value), stop.value.exit_code, all(torch.equal(before[name], after[name]) for name in before)


def test_fatal(ranks: Any, tmp_path: Path) -> None:
    (text, code, same), other = ranks(2, ended, tmp_path / "run")
    assert other == (text, code, same) and same and code == ExitCode.overflow
    start, _, rest = text.partition("experts, and ")
    assert start == "step 1: parallel.exchange_rows=0.9: must leave room for the rows of each rank's "
    assert rest.endswith(
        "did not fit; nearest valid: parallel.exchange_rows=2.0, where all fit, or parallel.exchange_overflow=repair or drop"
    )
    assert int(rest.split()[0]) >= LEAST and "\n" not in text


def kept_on(folder: Path, policy: str) -> int:
    """On a rank: the exit code of a run that goes on."""
    session = open_session(configured(folder, *WORDS, f"parallel.exchange_overflow={policy}"), torch.device("cpu"))
    with closing(session), build_run_logger(session) as run_logger:
        return train_session(session, run_logger)


@pytest.mark.parametrize("policy", ["drop", "repair"])
def test_drop_and_repair(ranks: Any, tmp_path: Path, policy: str) -> None:
    """Two choices of each token, in two layers, are computed, or counted where they drop, and nowhere else counted as dropped.

    Repaired are those beyond an even share, for which the way back needs room.
    """
    assert ranks(2, kept_on, tmp_path / "run", policy) == [0, 0] and checkpoint_steps(tmp_path / "run")
    metrics = list(read_journal(tmp_path / "run" / "metrics.jsonl"))
    telemetry = [json.loads(line) for line in (tmp_path / "run" / "telemetry.jsonl").read_text().splitlines()]
    rows = {record["step"]: sum(record["rows_L"]) for record in telemetry if "rows_L" in record}
    assert [record["step"] for record in metrics] == sorted(rows) == [1, 2, 3]
    for record in metrics:
        overflow = record["moe/overflow_rows"]
        assert overflow >= (LEAST if policy == "drop" else 1)
        assert rows[record["step"]] + (overflow if policy == "drop" else 0) == 2 * ROWS
        assert record["dropped_fraction"] == 0
