"""Whole runs on the stages of a pipeline: they log and evaluate as one process does, and all stages know what goes wrong on one."""

import math
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import checkpoint_steps, configured, events_of, losses, state_of
from tokenyard.parallel.apply import local
from tokenyard.train import step as step_module
from tokenyard.train.fault_tolerance.signals import STOP_REQUESTS
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

MODEL = [
    "model.layers=3",
    "model.dense_first=1",
    "model.mtp_depth=1",
    "model.tie_embeddings=true",
    "model.moe.balance.bias_rate=0.01",
    "batch.micro=2",
    "precision=fp64",
]
WATCHED = ["steps=4", "telemetry.tier=detailed", "telemetry.every=2", "evaluate.every=2", "debug.dry_step=true"]
PIPELINE = ["parallel.pipeline=2"]
INTERLEAVED = [*PIPELINE, "parallel.pipeline_schedule=interleaved"]
ZBV = [*PIPELINE, "parallel.pipeline_schedule=zbv"]
UNCOPIED = [*PIPELINE, "parallel.pipeline_layers=[2,1]", "model.tie_embeddings=false", "model.mtp_depth=0"]
"""The first stage has experts, and the last one no copy of the embedding."""
TIMES = {"seconds", "step_seconds", "tokens_per_second", "mfu", "data_wait_fraction"}
RANKS = {"moe/rank_overload", "moe/exchange_skew"}
"""What a record says about this machine."""


def run(folder: Path, *overrides: str, spoiled: int = 0, flipped: int = 0, nan_loss: int = 0) -> dict[str, Any]:
    """On each rank; `spoiled`: a gradient of the last rank is NaN in that step, twice; `flipped`: a bit of its embedding then;
    `nan_loss`: the first rank's own share of the objective is NaN in that step, twice.
    """
    session = open_session(configured(folder, *MODEL, *overrides), torch.device("cpu"))
    parallel, right_pass, right_step, kept = session.parallel, step_module.pipeline_pass, session.engine.step, []
    last, right_forward = parallel.mesh.rank == parallel.mesh.world - 1, step_module.forward_stage

    def pipeline_pass(*arguments: Any) -> Any:
        shares = right_pass(*arguments)
        if last and session.step + 1 == spoiled:
            gradient = next(iter(reversed(parallel.parameters.values()))).parameter.grad
            assert gradient is not None
            gradient.fill_(math.nan)
        return shares

    def forward_stage(*arguments: Any) -> Any:
        y_BSD, share = right_forward(*arguments)
        if parallel.mesh.rank == 0 and session.step + 1 == nan_loss:
            share = share._replace(objective=share.objective * math.nan)
        return y_BSD, share

    def step(*arguments: Any) -> Any:
        before = state_of(session)
        numbers = right_step(*arguments)
        after = state_of(session)
        if not numbers.updated:
            kept.append(all(torch.equal(before[name], after[name]) for name in before))
        if last and session.step + 1 == flipped:
            local(parallel.parameters["embedding.weight"].parameter.detach()).view(torch.int64).view(-1)[3] ^= 1
        return numbers

    with ExitStack() as stack:
        stack.enter_context(closing(session))
        run_logger = stack.enter_context(build_run_logger(session))
        stack.enter_context(mock.patch.object(step_module, "pipeline_pass", pipeline_pass))
        stack.enter_context(mock.patch.object(step_module, "forward_stage", forward_stage))
        stack.enter_context(mock.patch.object(session.engine, "step", step))
        code = train_session(session, run_logger)
    STOP_REQUESTS.stops.clear()  # the process goes on
    return {"code": code, "kept": kept, "state": state_of(session)}


def several(runs: dict[str, tuple[Path, list[str], dict[str, int]]]) -> dict[str, dict[str, Any]]:
    return {name: run(folder, *overrides, **faults) for name, (folder, overrides, faults) in runs.items()}


@pytest.fixture(scope="module")
def results(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """All runs of two stages in one call of the ranks, and one process; each in a folder of its name."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "asked").mkdir()
    (folder / "asked" / "stop").touch()
    refuse = ["numerics.spike_sigma=null", "checkpoint.every=2"]
    runs: dict[str, tuple[Path, list[str], dict[str, int]]] = {
        "1f1b": (folder / "1f1b", [*PIPELINE, *WATCHED], {}),
        "interleaved": (folder / "interleaved", [*INTERLEAVED, *WATCHED], {}),
        "zbv": (folder / "zbv", [*ZBV, *WATCHED], {}),
        "skip": (folder / "skip", [*ZBV, *refuse, "steps=4", "numerics.on_nan=skip"], {"spoiled": 3}),
        "rollback": (folder / "rollback", [*PIPELINE, *refuse, "steps=4", "numerics.on_nan=rollback"], {"spoiled": 3}),
        "loss of zbv": (folder / "loss of zbv", [*ZBV, *refuse, "steps=4", "numerics.on_nan=rollback"], {"nan_loss": 3}),
        "loss": (folder / "loss", [*UNCOPIED, *refuse, "steps=4", "numerics.on_nan=rollback"], {"nan_loss": 3}),
        "flip": (folder / "flip", [*PIPELINE, "debug.replicas_every=2", "debug.on_divergence=stop", "steps=4"], {"flipped": 1}),
        "asked": (folder / "asked", PIPELINE, {}),
        "half": (folder / "half", [*PIPELINE, "steps=2"], {}),
        "resumed": (folder / "half", [*PIPELINE, "steps=4"], {}),
        "half of zbv": (folder / "moved", [*ZBV, "steps=2"], {}),
        "moved": (folder / "moved", [*PIPELINE, "steps=4"], {}),
    }
    run(folder / "one", *WATCHED)
    return folder, ranks(2, several, runs, limit_seconds=240)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_logs_are_those_of_one_process(results: Any, name: str) -> None:
    """Losses, norms, loads, the validation, and telemetry: the probe, biases, gradients of experts, similarity."""
    folder, _ = results
    for file in ("metrics.jsonl", "telemetry.jsonl"):
        ours, theirs = (read_journal(folder / each / file) for each in (name, "one"))
        assert len(ours) == len(theirs) > 1
        for one, other in zip(ours, theirs, strict=True):
            one, other = ({k: v for k, v in each.items() if not k.startswith(("system/", "perf/"))} for each in (one, other))
            assert set(one) == set(other)
            for key in set(one) - TIMES - RANKS:
                assert_same(one[key], other[key], key)
    assert {"classes", "coactivation", "vocabulary", "similarity", "bias_LE"} <= set(
        read_journal(folder / name / "telemetry.jsonl")[-1]
    )


def assert_same(one: Any, other: Any, key: str) -> None:
    if isinstance(one, dict):
        assert set(one) == set(other), key
        for name in one:
            assert_same(one[name], other[name], f"{key}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), key
        for first, second in zip(one, other, strict=True):
            assert_same(first, second, key)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12), key
    else:
        assert one == other, key


def test_a_nan_on_one_stage_stops_the_update_on_all(results: Any) -> None:
    """Skipped, or rolled back to the checkpoint of step 2; the weights of the refused step are bit for bit what they were.

    In the V the first rank has the last stage, whose NaN reaches the gradients of both.
    """
    folder, answers = results
    for name, rank in (("skip", 1), ("rollback", 1), ("loss", 0), ("loss of zbv", None)):
        assert [answer[name]["code"] for answer in answers] == [0, 0]
        assert all(answer[name]["kept"] == [True, True] for answer in answers), "computed twice, refused twice"
        (fault,) = events_of(folder / name, "not_finite")
        assert (fault["step"], fault["rank"]) == (3, rank)
        assert [step for step, _ in losses(folder / name)] == [1, 2, 4]
        assert all(tensor.isfinite().all() for answer in answers for tensor in answer[name]["state"].values())


def test_the_copies_of_the_embedding_are_compared(results: Any) -> None:
    folder, answers = results
    assert [answer["flip"]["code"] for answer in answers] == [71, 71]
    (event,) = events_of(folder / "flip", "replicas_differ")
    assert (event["step"], event["tensors"], event["ranks"]) == (2, ["embedding.weight"], [0, 1])


def test_a_run_stops_when_asked_and_resumes_bit_for_bit(results: Any) -> None:
    folder, answers = results
    assert [answer["asked"]["code"] for answer in answers] == [0, 0]
    assert checkpoint_steps(folder / "asked") == [1]
    for answer in answers:
        straight, resumed = answer["1f1b"]["state"], answer["resumed"]["state"]
        assert set(straight) == set(resumed)
        assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


def test_a_checkpoint_of_a_v_opens_on_stages_in_a_row(results: Any) -> None:
    _, answers = results
    for answer in answers:
        straight, moved = answer["1f1b"]["state"], answer["moved"]["state"]
        assert set(straight) == set(moved)
        for name, value in straight.items():
            torch.testing.assert_close(moved[name], value, rtol=1e-9, atol=1e-12)
