"""Fault 26 with engine=deepspeed: a gradient that is not finite is dropped, and nothing of it stays in DeepSpeed's sums."""

import importlib.util
import math
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import configured, events_of, losses, state_of
from test_numbers import watched_updates
from tokenyard.train.deepspeed import ZeroEngine
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install tokenyard[deepspeed]")


def spoiled_run(folder: Path, overrides: list[str], steps: dict[int, int]) -> dict[str, Any]:
    """On a rank of the pool; in each of `steps`, so many times in a row, rank 1 has a NaN among its gradients, accumulated ones."""
    session, seen, left = open_session(configured(folder, *overrides), torch.device("cpu")), [], dict(steps)
    assert isinstance(session.engine, ZeroEngine)
    zero, step_of = session.engine.zero, lambda: session.step + 1
    right = zero.compute

    def compute(*arguments: Any, last: bool) -> Any:
        result = right(*arguments, last=last)
        if last and session.parallel.mesh.rank == 1 and left.get(step_of(), 0) > 0:
            left[step_of()] -= 1
            first = zero._gradients()[0] if zero.stage else next(iter(session.parallel.parameters.values())).parameter.grad
            assert first is not None
            first.view(-1)[:1].fill_(math.nan)
        return result

    with ExitStack() as stack:
        stack.enter_context(closing(session))
        run_logger = stack.enter_context(build_run_logger(session))
        stack.enter_context(mock.patch.object(zero, "compute", compute))
        stack.enter_context(watched_updates(session, seen))
        code = train_session(session, run_logger)
    return {"code": code, "seen": seen, "state": state_of(session)}


@pytest.mark.fault(26)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_step_is_dropped_whole(zero: int, ranks: Any, tmp_path: Path) -> None:
    """Once: repeated, and bit for bit as if it had been well. Twice: skipped, weights and moments bitwise, and the run goes on."""
    options = ["parallel.expert=2", "batch.micro=2", "engine=deepspeed", f"engine.zero={zero}", "numerics.on_nan=skip"]
    healthy, once, skipped = (
        ranks(2, spoiled_run, tmp_path / name, options, steps)
        for name, steps in (("healthy", {}), ("once", {5: 1}), ("skipped", {5: 2}))
    )
    assert {result["code"] for result in [*healthy, *once, *skipped]} == {0}
    assert losses(tmp_path / "once") == losses(tmp_path / "healthy")
    for one, other in zip(healthy, once, strict=True):
        assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])
    assert [event["again"] for event in events_of(tmp_path / "once", "not_finite")] == ["transient"]
    assert [event["again"] for event in events_of(tmp_path / "skipped", "not_finite")] == ["persistent"]
    assert all(entry in result["seen"] for result in skipped for entry in [(5, False, True)])
    assert [step for step, _ in losses(tmp_path / "skipped")] == [1, 2, 3, 4, 6, 7, 8]
    assert all(bool(tensor.isfinite().all()) for result in skipped for tensor in result["state"].values())
