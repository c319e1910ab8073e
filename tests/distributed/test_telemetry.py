"""No metric depends on the layout, and every choice counts once: with recomputation, accumulation, padding, evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.train.config.compose import compose
from tokenyard.train.fault_tolerance.supervisor import build_supervisor
from tokenyard.train.logging.expert_stats.collector import snapshot_records
from tokenyard.train.logging.run_logger import RunLogger
from tokenyard.train.logging.step_log import StepLog
from tokenyard.train.logging.step_profiler import StepProfiler
from tokenyard.train.run import train
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

COMMON = [
    *TINY_RUN,
    "precision=fp64",
    "steps=6",
    "evaluate.every=3",
    "evaluate.sequences=12",
    "checkpoint.every=0",
    "data.mask_documents=true",
    "model.dense_first=1",
    "model.layers=3",
    "model.moe.capacity.factor=0.8",
    "model.moe.balance.bias_rate=0.01",
    "telemetry.tier=detailed",
    "telemetry.every=2",
    "telemetry.window=4",
    "telemetry.probe=5",
]
LAYOUTS = {
    "recompute, 1 rank": (1, "parallel.recompute=block batch.micro=2"),
    "expert 2": (2, "parallel.expert=2 batch.micro=2"),
    "shard 2, recompute": (2, "parallel.shard=2 parallel.recompute=block"),
    "tensor 2 x expert 4": (4, "parallel.tensor=2 parallel.expert=4 parallel.recompute=block batch.micro=2"),
    "context 2 x shard 2": (4, "parallel.context=2 parallel.shard=4 parallel.expert=2 batch.micro=2"),
    "context 2 by heads": (2, "parallel.context=2 parallel.context_exchange=heads batch.micro=2"),
    "shard 2 x expert_tensor 2, gather": (4, "parallel.shard=2 parallel.expert_tensor=2 parallel.zero=1"),
    "deduplicated in chunks": (4, "parallel.expert=4 parallel.exchange=deduplicated parallel.overlap_chunks=2"),
}
OF_THE_LAYOUT = {"seconds", "vocabulary", "moe/rank_overload", "moe/exchange_skew"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return watched(tmp_path_factory.mktemp("one"), [])


def test_every_choice_is_counted_once(expected: list[dict[str, Any]]) -> None:
    assert sum(entry["tokens"] for entry in expected) < 6 * 8 * 32, "targets across documents are not counted"
    records = [entry for entry in expected if "counts_LE" in entry]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert [record["steps"] for record in records] == [2, 1, 1, 2]
    for record in records:
        trained = sum(entry["tokens"] for entry in expected if record["step"] - record["steps"] < entry["step"] <= record["step"])
        assert record["layers"] == [1, 2] and record["tokens_L"] == [trained, trained]
        for counts_E, dropped, rows in zip(record["counts_LE"], record["dropped_L"], record["rows_L"], strict=True):
            assert sum(counts_E) == 2 * trained
            assert rows + dropped == 2 * trained and dropped > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_numbers_of_one_process(ranks, tmp_path: Path, name: str, expected: list[dict[str, Any]]) -> None:
    world, overrides = LAYOUTS[name]
    folder, layout = tmp_path / "run", overrides.split()
    of_ranks = [watched(folder, layout)] if world == 1 else ranks(world, watched, folder, layout)
    for found in of_ranks:
        assert_same(found, expected)
    assert [entry.get("vocabulary") for entry in of_ranks[0]] == [entry.get("vocabulary") for entry in expected]


def test_the_busiest_rank_is_found(ranks, tmp_path: Path) -> None:
    """With one expert per rank, the overload of a rank is that of its expert, and over both layers that of their sum."""
    layout = [
        "model.moe.experts=4",
        "model.moe.top_k=1",
        "model.moe.capacity.factor=null",
        "parallel.expert=4",
        "telemetry.every=1",
        "data.mask_documents=false",
    ]
    for entry in (entry for entry in ranks(4, watched, tmp_path / "run", layout)[0] if "counts_LE" in entry):
        counts_LE = torch.tensor(entry["counts_LE"]).double()
        assert entry["moe/rank_overload"] == pytest.approx((counts_LE.amax(1) / counts_LE.mean(1)).max().item())
        assert entry["moe/exchange_skew"] == pytest.approx((counts_LE.amax(1).sum() / counts_LE.mean(1).sum()).item())


def test_watching_changes_no_weight(tmp_path: Path) -> None:
    weights = [weights_after(tmp_path / tier, [f"telemetry.tier={tier}"]) for tier in ("none", "detailed")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - OF_THE_LAYOUT:
            # whole numbers must be equal; others are sums in another order
            assert flat(ours[key]) == pytest.approx(flat(theirs[key]), rel=1e-9, abs=1e-12), (ours["step"], key)


def flat(value: Any) -> list[float]:
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    if isinstance(value, dict):
        return [number for key in value for number in flat(value[key])]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


class Keeps(RunLogger):
    """Keeps what the loop logs: one entry a step, with the record of telemetry.jsonl that came with it."""

    def __init__(self, session: Session) -> None:
        self.config, self.ranks = session.config, session.parallel.mesh.world
        self.entries: list[dict[str, Any]] = []

    def log_step(self, logged: StepLog) -> None:
        metrics, record = {}, None
        if logged.snapshot is not None:
            metrics, record = snapshot_records(logged.numbers, logged.snapshot, self.config, self.ranks)
        numbers = {"step": logged.step, "tokens": logged.numbers.tokens, **metrics}
        self.entries.append(numbers | (record or {}))


def watched(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Runs on a rank, without writing files."""
    config = compose([*COMMON, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", *overrides])
    session = open_session(config, torch.device("cpu"))
    run_logger = Keeps(session)
    train(session, run_logger, build_supervisor(session, run_logger), StepProfiler(session))
    return run_logger.entries


def weights_after(folder: Path, overrides: list[str]) -> list[torch.Tensor]:
    config = compose([*COMMON, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", "precision=fp32", *overrides])
    session = open_session(config, torch.device("cpu"))
    run_logger = Keeps(session)
    train(session, run_logger, build_supervisor(session, run_logger), StepProfiler(session))
    return [*session.parallel.model.state_dict().values(), torch.get_rng_state()]
