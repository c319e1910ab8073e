"""Routing through whole runs: randomness and expert bias resume bit for bit, are recorded, and travel in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from tokenyard.checkpoint.store import read_whole
from tokenyard.moe.init import expert_biases
from tokenyard.moe.token_info import BatchPosition
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.evaluation import evaluate_session
from tokenyard.train.fault_tolerance.supervisor import build_supervisor
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import NullLogger
from tokenyard.train.run import micro_batches, run
from tokenyard.train.setup import open_session
from tokenyard.train.step import StepInput, train_step

MOE, ROUTER, BALANCE, CAPACITY = "model.moe", "model.moe.router", "model.moe.balance", "model.moe.capacity"
TINY = [
    "steps=4",
    "sequence_length=16",
    "batch.sequences=4",
    "model.layers=2",
    "model.width=32",
    "model.heads=4",
    f"{MOE}.hidden=32",
    "model.vocabulary=264",
    "data=synthetic",
    "data.synthetic_documents=64",
    "tokenizer=bytes",
    "tracker=jsonl",
    "evaluate.every=0",
    "evaluate.sequences=4",
    "checkpoint.every=2",
    "sample.prompt=''",
    "telemetry.tier=detailed",
    "telemetry.every=2",
]
ROUTED = [
    f"{ROUTER}.score=sigmoid",
    f"{ROUTER}.jitter=0.1",
    f"{ROUTER}.noise=true",
    "model.dropout=0.1",
    f"{MOE}.dropout=0.4",
    f"{ROUTER}.null_experts=2",
    f"{BALANCE}.bias_rate=0.01",
    f"{BALANCE}.sequence_coefficient=0.02",
    f"{BALANCE}.importance_coefficient=0.1",
    f"{CAPACITY}.policy=random",
    f"{CAPACITY}.schedule=[1,0.5,2,1.0,4,0]",
]
BIAS = "layers.0.moe.router.expert_bias"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))

    def configured(name: str, *overrides: str) -> Config:
        return compose([*TINY, *ROUTED, f"run.dir={tmp_path / name}", f"data.cache={tmp_path / 'cache'}", *overrides])

    return configured


def test_a_resumed_run_draws_the_same_and_records_what_is_on(config: Any, tmp_path: Path) -> None:
    run(config("straight"))
    run(config("stopped", "steps=2", "schedule=constant"))
    run(config("again", "steps=2", "schedule=constant"))
    records = [read_journal(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped", "again")]
    numbers = [
        [
            {k: v for k, v in r.items() if "second" not in k and k not in ("mfu", "data_wait_fraction") and k[:7] != "system/"}
            for r in of_run
        ]
        for of_run in records
    ]
    assert numbers[1] == numbers[2]
    record = records[0][0]
    assert record["loss_balance_scaled"] == pytest.approx(0.01 * 2 * record["loss_balance"])
    assert record["loss_balance_sequence_scaled"] == pytest.approx(0.02 * 2 * record["loss_balance_sequence"])
    assert record["loss_importance_scaled"] == pytest.approx(0.1 * 2 * record["loss_importance"])
    assert record["loss_z_scaled"] == pytest.approx(0.001 * 2 * record["loss_z"])
    assert [r["moe/capacity_factor"] for r in records[0]] == [0.5, 1.0, 1.0, 0.0]
    assert records[0][0]["dropped_fraction"] > records[0][1]["dropped_fraction"] > 0 == records[0][3]["dropped_fraction"]
    for r in records[0]:
        assert 0 < r["moe/null_fraction"] < 1
        dropped = r["moe/dropped/layer_0"] + r["moe/dropped/layer_1"]
        real = 2 * 64 * 2 * (1 - r["moe/null_fraction"])  # layers x tokens x top-k
        assert r["dropped_fraction"] == pytest.approx(dropped / real)


def test_a_run_that_goes_on_is_bitwise_the_uninterrupted_one(config: Any, tmp_path: Path) -> None:
    run(config("straight"))
    early = tmp_path / "straight" / "checkpoints" / "step_00000002"
    run(config("resumed", f"checkpoint.resume={early}"))
    whole, resumed = (read_whole(tmp_path / name / "checkpoints" / "step_00000004") for name in ("straight", "resumed"))
    assert whole.keys() == resumed.keys() and BIAS in whole
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert whole[BIAS].shape == (10,) and whole[BIAS].dtype == torch.float32 and whole[BIAS].abs().max() > 0.005


def test_the_bias_moves_once_a_step_by_the_counts_of_the_step(config: Any) -> None:
    session = open_session(config("steps", "batch.micro=1"), torch.device("cpu"))
    biases = list(expert_biases(session.parallel.model).values())
    assert len(biases) == 2 and not any(bias.any() for bias in biases)
    rows = micro_batches(session, build_supervisor(session, NullLogger()))
    assert [part.first for part in rows] == [0, 1, 2, 3]
    numbers = train_step(session.parallel, session.engine.optimizer, StepInput(rows, 0.0, None, BatchPosition(1, 1)))
    for bias, counts in zip(biases, numbers.counts_LE, strict=True):
        expected = [0.01 * ((counts.sum() > 10 * n).int() - (counts.sum() < 10 * n).int()).item() for n in counts]
        torch.testing.assert_close(bias, torch.tensor(expected))
    before = [bias.clone() for bias in biases]
    evaluate_session(session)
    assert all(torch.equal(one, other) for one, other in zip(before, biases, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_an_opened_model_has_the_bias_in_fp32(config: Any, tmp_path: Path, precision: str) -> None:
    run(config("run"))
    model = tokenyard.load_model(tmp_path / "run", precision=precision)
    assert model.get_buffer(BIAS).dtype == torch.float32
    assert torch.equal(model.get_buffer(BIAS), read_whole(tmp_path / "run" / "checkpoints" / "step_00000004")[BIAS])
    ids_BS = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids_BS)
        assert torch.equal(model(ids_BS), logits), "nothing is random"
        model.get_buffer(BIAS)[:] = torch.linspace(1, -1, 10)
        assert not torch.equal(model(ids_BS), logits), "the bias counts"
