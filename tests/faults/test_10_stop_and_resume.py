"""Fault 10: stopped at 7 and at 13 and resumed each time, a run of 20 steps is bit for bit the one that was never stopped."""

import random
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fault_run import configured, events_of, state_of
from tokenyard.train.fault_tolerance.signals import handling_signals
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session
from tokenyard.train.state import random_state

STEPS = 20
LONG = [
    f"steps={STEPS}",
    "checkpoint.every=5",
    "schedule=cosine",
    "parallel.expert=2",
    "parallel.shard=2",
    "batch.micro=2",
    "model.moe.router.jitter=0.1",
    "model.moe.capacity.factor=1.0",
    "model.moe.capacity.policy=random",
    "model.moe.balance.bias_rate=0.01",
]


def stretch(folder: Path, stop: int | None, seed: int) -> dict[str, Any]:
    """On a rank of the pool: from where the run is to `stop`, or its end. Each step draws from all generators."""
    session, drawn = open_session(configured(folder, *LONG), torch.device("cpu")), []
    right, rank = session.engine.step, session.parallel.mesh.rank
    if session.step == 0:
        random.seed(seed + rank)
        np.random.seed(seed + rank)
        torch.manual_seed(seed + rank)

    def step(*args: Any) -> Any:
        if rank == 0 and stop is not None and session.step + 1 == stop - 1:
            (folder / "stop").touch()
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
        return right(*args)

    with (
        handling_signals(),
        closing(session),
        build_run_logger(session) as run_logger,
        mock.patch.object(session.engine, "step", step),
    ):
        code = train_session(session, run_logger)
        state = state_of(session) | {name: held.tensor for name, held in random_state().items()}
    return {"code": code, "step": session.step, "drawn": drawn, "state": state}


@pytest.mark.fault(10)
def test_two_stops_change_no_bit(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """Losses, norms, weights, moments and the state of all generators; with jitter, random drops and moving expert biases."""
    straight = ranks(4, stretch, tmp_path / "straight", None, 0)
    parts = [ranks(4, stretch, tmp_path / "stopped", stop, 100 * part) for part, stop in enumerate((7, 13, None))]
    assert [{(r["code"], r["step"]) for r in results} for results in parts] == [{(0, 7)}, {(0, 13)}, {(0, STEPS)}]
    assert [event["step"] for event in events_of(tmp_path / "stopped", "resume")] == [7, 13]
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
    for rank, one in enumerate(straight):
        other = parts[-1][rank]["state"]
        assert one["drawn"] == [draw for results in parts for draw in results[rank]["drawn"]]
        assert one["state"].keys() == other.keys()
        assert [name for name, tensor in one["state"].items() if not same_bits(tensor, other[name])] == []
    count = sum(len(one["state"]) for one in straight)
    record_property(
        "measured",
        f"stopped at 7 and 13 of {STEPS}, 4 ranks, jitter and random drops: losses, norms, draws and {count} tensors bitwise equal",
    )


def numbers(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_journal(folder / "metrics.jsonl")]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
