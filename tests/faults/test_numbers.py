"""Faults 25 to 27: numbers that cannot be right are known to all ranks before an update, and nothing of them is ever saved."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import checkpoint_steps, configured, events_of, losses, state_of
from tokenyard.train import step as step_module
from tokenyard.train.logging import journal
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

POISON = {"nan": math.nan, "infinite": math.inf}


@contextmanager
def spoiled_gradient(session: Session, rank: int, steps: dict[int, int], value: float, name: str) -> Iterator[None]:
    """On one rank, in each of `steps` so many times in a row, one gradient is multiplied by, or made, a wrong value."""
    left = dict(steps)
    right = step_module.backward

    def backward(share: Any) -> None:
        right(share)
        step = session.step + 1
        if session.parallel.mesh.rank == rank and left.get(step, 0) > 0:
            left[step] -= 1
            gradient = session.parallel.parameters[name].parameter.grad
            assert gradient is not None
            gradient.mul_(value) if math.isfinite(value) else gradient.view(-1)[:1].fill_(value)

    with mock.patch.object(step_module, "backward", backward):
        yield


@contextmanager
def watched_updates(session: Session, seen: list[tuple[int, bool, bool]]) -> Iterator[None]:
    """For each computed step: its number, whether it was taken, and whether weights and moments are bit for bit what they were."""
    right = session.engine.step

    def step(*args: Any) -> Any:
        before = state_of(session)
        numbers = right(*args)
        after = state_of(session)
        same = all(torch.equal(before[name], after[name]) for name in before)
        seen.append((session.step + 1, numbers.updated, same))
        return numbers

    with mock.patch.object(session.engine, "step", step):
        yield


def spoiled_run(folder: Path, overrides: list[str], rank: int, steps: dict[int, int], value: float, name: str) -> dict[str, Any]:
    """A run on a rank of the pool; what it did."""
    session = open_session(configured(folder, *overrides), torch.device("cpu"))
    seen: list[tuple[int, bool, bool]] = []
    with ExitStack() as stack:
        stack.enter_context(closing(session))
        run_logger = stack.enter_context(build_run_logger(session))
        if steps:
            stack.enter_context(spoiled_gradient(session, rank, steps, value, name))
        stack.enter_context(watched_updates(session, seen))
        code = train_session(session, run_logger)
    finite = all(bool(tensor.isfinite().all()) for tensor in state_of(session).values())
    return {"code": code, "seen": seen, "step": session.step, "finite": finite, "state": state_of(session)}


EXPERT = "layers.1.moe.experts.down"
LAYOUT = ["parallel.expert=2"]
NO_SPIKES = ["numerics.spike_sigma=null"]


@pytest.mark.fault(26)
@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_nan_in_one_experts_gradient_on_one_rank(kind: str, policy: str, ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """All ranks agree before the update; the policy follows; no checkpoint holds a number that is not finite."""
    options = [*LAYOUT, *NO_SPIKES, f"numerics.on_nan={policy}"]
    results = ranks(2, spoiled_run, tmp_path / "run", options, 1, {5: 2}, POISON[kind], EXPERT)
    refused = [(step, same) for step, updated, same in results[0]["seen"] if not updated]
    assert refused == [(5, True), (5, True)]
    assert all([entry[:2] for entry in r["seen"]] == [entry[:2] for entry in results[0]["seen"]] for r in results)
    assert all(same for r in results for _, updated, same in r["seen"] if not updated)
    assert all(r["finite"] for r in results)
    (fault,) = events_of(tmp_path / "run", "not_finite")
    assert (fault["step"], fault["rank"], fault["again"]) == (5, 1, "persistent")
    assert any(EXPERT in name for name in fault["tensors"])
    assert [event["alert"] for event in events_of(tmp_path / "run", "alert")] == ["not_finite"]
    steps = [step for step, _ in losses(tmp_path / "run")]
    if policy == "stop":
        assert {r["code"] for r in results} == {70} and steps == [1, 2, 3, 4]
        assert checkpoint_steps(tmp_path / "run")[-1] == 4
    else:
        assert {r["code"] for r in results} == {0} and steps == [1, 2, 3, 4, 6, 7, 8]
        assert [record["steps"] for record in read_journal(tmp_path / "run" / "telemetry.jsonl")] == [3, 2, 2]  # none twice
    computed = [step for step, updated, _ in results[0]["seen"] if updated]
    assert computed == {"stop": [1, 2, 3, 4], "skip": [1, 2, 3, 4, 6, 7, 8], "rollback": [1, 2, 3, 4, 4, 6, 7, 8]}[policy]
    record_property("measured", "before the update, 2 of 2 ranks; weights and moments bitwise; 3 policies; 0 poisoned checkpoints")


def no_room(path: Path, text: str) -> None:
    raise OSError(28, "No space left on device", str(path))


def spoiled_run_without_room(*arguments: Any) -> dict[str, Any]:
    """The same; the journals cannot be cut back."""
    with mock.patch.object(journal, "write_whole", no_room):
        return spoiled_run(*arguments)


@pytest.mark.fault(26, "rolled back on a full disk: 70 on both ranks, in one line")
def test_a_rollback_without_room(ranks: Any, tmp_path: Path) -> None:
    options = [*LAYOUT, *NO_SPIKES, "numerics.on_nan=rollback"]
    results = ranks(2, spoiled_run_without_room, tmp_path / "run", options, 1, {5: 2}, math.nan, EXPERT)
    assert {r["code"] for r in results} == {70} and all(r["finite"] for r in results)
    (stopped,) = events_of(tmp_path / "run", "stopped")
    assert "not rolled back: run.dir=" in stopped["reason"] and "No space left on device" in stopped["reason"]


@pytest.mark.fault(26)
def test_skips_are_limited(ranks: Any, tmp_path: Path) -> None:
    options = [*LAYOUT, *NO_SPIKES, "numerics.on_nan=skip", "numerics.max_skips=2"]
    results = ranks(2, spoiled_run, tmp_path / "run", options, 0, dict.fromkeys(range(3, 9), 2), math.nan, EXPERT)
    assert {r["code"] for r in results} == {70} and {r["step"] for r in results} == {4}


@pytest.mark.fault(26)
def test_a_skipped_step_is_resumed_bit_for_bit(ranks: Any, tmp_path: Path) -> None:
    """AdamW has done fewer steps than the run, and the checkpoint knows."""
    options = [*LAYOUT, *NO_SPIKES, "numerics.on_nan=skip"]
    straight = ranks(2, spoiled_run, tmp_path / "straight", options, 1, {3: 2}, math.nan, EXPERT)
    ranks(2, spoiled_run, tmp_path / "resumed", [*options, "steps=6"], 1, {3: 2}, math.nan, EXPERT)
    resumed = ranks(2, spoiled_run, tmp_path / "resumed", options, 1, {}, math.nan, EXPERT)
    for one, other in zip(straight, resumed, strict=True):
        assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])


@pytest.mark.fault(26, "with Muon: skipped and rolled back, both end with the same weights and moments")
def test_muon_goes_on_after_a_step_that_is_not_taken(ranks: Any, tmp_path: Path) -> None:
    """QK-clip, which also changes weights, does not run in such a step."""
    options = [*LAYOUT, *NO_SPIKES, "optimizer=muon", "optimizer.qk_clip=0.01"]
    taken = {"skip": [1, 2, 3, 4, 6, 7, 8], "rollback": [1, 2, 3, 4, 4, 6, 7, 8]}
    states = []
    for policy, steps in taken.items():
        results = ranks(2, spoiled_run, tmp_path / policy, [*options, f"numerics.on_nan={policy}"], 1, {5: 2}, math.nan, EXPERT)
        assert {r["code"] for r in results} == {0} and all(r["finite"] for r in results)
        assert all([(step, same) for step, updated, same in r["seen"] if not updated] == [(5, True)] * 2 for r in results)
        assert [step for step, updated, _ in results[0]["seen"] if updated] == steps
        states.append([r["state"] for r in results])
    for skipped, rolled_back in zip(*states, strict=True):
        assert all(torch.equal(skipped[name], rolled_back[name]) for name in skipped)


@pytest.mark.fault(25)
def test_a_wrong_gradient_once_changes_nothing(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """The step is repeated; the second result is the one of a healthy machine."""
    healthy = ranks(2, spoiled_run, tmp_path / "healthy", [*LAYOUT, *SPIKES], 0, {}, 1.0, EXPERT)
    once = ranks(2, spoiled_run, tmp_path / "once", [*LAYOUT, *SPIKES], 1, {10: 1}, 1e4, EXPERT)
    for one, other in zip(healthy, once, strict=True):
        assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])
    assert losses(tmp_path / "once") == losses(tmp_path / "healthy")
    assert [(event["step"], event["again"]) for event in events_of(tmp_path / "once", "spike")] == [(10, "transient")]
    record_property("measured", "once: repeated, bitwise as healthy; always: exit code 70")


SPIKES = ["steps=12", "numerics.spike_window=8", "numerics.spike_sigma=6", "schedule.warmup=0", "optimizer.lr=1e-4"]


@pytest.mark.fault(25)
def test_a_wrong_gradient_always_stops(ranks: Any, tmp_path: Path) -> None:
    options = [*LAYOUT, *SPIKES, "numerics.on_spike=stop"]
    results = ranks(2, spoiled_run, tmp_path / "run", options, 1, {10: 99}, 1e4, EXPERT)
    assert {r["code"] for r in results} == {70} and checkpoint_steps(tmp_path / "run")[-1] == 9


@pytest.mark.fault(27)
def test_a_spike_is_skipped_and_counted(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    options = [*LAYOUT, *SPIKES, "numerics.on_spike=skip"]
    results = ranks(2, spoiled_run, tmp_path / "run", options, 1, {10: 99}, 1e4, EXPERT)
    assert {r["code"] for r in results} == {0}
    assert [step for step, _ in losses(tmp_path / "run")] == [*range(1, 10), 11, 12]
    assert [event["step"] for event in events_of(tmp_path / "run", "skipped")] == [10]
    record_property("measured", "step over 6 sigma skipped and counted")
