"""Fault 27: routers that send all tokens to one expert, or none to one: no hang, no NaN, an alarm, and every choice is counted."""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_run import configured, events_of, losses
from tokenyard.parallel.apply import local
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

RUN = [
    "steps=6",
    "checkpoint.every=0",
    "optimizer.lr=1e-4",
    "parallel.expert=2",
    "model.moe.experts=8",
    "model.moe.top_k=1",
    "model.moe.capacity.scope=sequence",
    "model.moe.router.bias=true",
    "telemetry.every=2",
    "telemetry.window=4",
    "numerics.spike_sigma=null",
]
TOKENS = 8 * 32
"""Tokens of a step: 8 sequences of 32."""


def crafted_run(folder: Path, bias: dict[int, float], *overrides: str) -> int:
    """On ranks of the pool: with a bias of the router that no logit can make up for. The exit code."""
    session = open_session(configured(folder, *RUN, *overrides), torch.device("cpu"))
    for name, sharded in session.parallel.parameters.items():
        if name.endswith("router.bias"):
            bias_E = local(sharded.parameter.detach())
            assert bias_E.shape == (8,)
            for expert, value in bias.items():
                bias_E[expert] = value
    with closing(session), build_run_logger(session) as run_logger:
        return train_session(session, run_logger)


@pytest.mark.fault(27)
@pytest.mark.parametrize("factor", ["null", "1.0"])
def test_all_tokens_to_one_expert(ranks: Any, tmp_path: Path, factor: str, record_property: Any) -> None:
    """Without a limit it computes them all; with one, it takes 4 of the 32 of each sequence."""
    folder = tmp_path / "run"
    assert ranks(2, crafted_run, folder, {5: 1e4}, f"model.moe.capacity.factor={factor}") == [0, 0]
    assert [step for step, loss in losses(folder) if math.isfinite(loss)] == [1, 2, 3, 4, 5, 6]
    for record in counted(folder, top_k=1):
        assert record["counts_LE"] == [[0] * 5 + [2 * TOKENS] + [0] * 2] * 2
        assert record["dropped_L"] == [0 if factor == "null" else 2 * 8 * (32 - 4)] * 2
    alerts = events_of(folder, "alert")
    assert [event["alert"] for event in alerts] == ["collapse", "collapse", "dead_experts"]
    assert [event["step"] for event in alerts] == [2, 2, 4] and alerts[2]["text"].startswith("14 experts")
    record_property(
        "measured", "all tokens to one expert: finite, alarms for collapse and dead experts, routed + dropped = tokens x k exactly"
    )


@pytest.mark.fault(27)
def test_an_expert_without_tokens(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """Its gradient is zero, its rank waits for nothing, and it is named when the window has passed."""
    folder = tmp_path / "run"
    assert ranks(2, crafted_run, folder, {3: -1e4}, "model.moe.top_k=2", "model.moe.capacity.factor=1.0") == [0, 0]
    assert [step for step, loss in losses(folder) if math.isfinite(loss)] == [1, 2, 3, 4, 5, 6]
    for record in counted(folder, top_k=2):
        assert all(counts_E[3] == 0 and sum(counts_E) == 2 * 2 * TOKENS for counts_E in record["counts_LE"])
        assert all(norms_E[3] == 0 and all(map(math.isfinite, norms_E)) for norms_E in record["grad_norm_LE"])
    texts = {event["step"]: event["text"] for event in events_of(folder, "alert") if event["alert"] == "dead_experts"}
    assert "3 of layer 0, 3 of layer 1" in texts[4]
    record_property("measured", "an expert without tokens: named, zero gradient, no NaN")


def counted(folder: Path, top_k: int) -> list[dict[str, Any]]:
    """The records of telemetry.jsonl, in each of which rows that experts computed and dropped choices make up all choices."""
    records = read_journal(folder / "telemetry.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6]
    for record in records:
        assert record["tokens_L"] == [2 * TOKENS] * 2
        sums = [rows + dropped for rows, dropped in zip(record["rows_L"], record["dropped_L"], strict=True)]
        assert sums == [sum(counts_E) for counts_E in record["counts_LE"]] == [2 * TOKENS * top_k] * 2
    return records
