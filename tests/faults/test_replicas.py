"""Fault 25: a bit that flips in one replica's weight is found, named, and mended from the others."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import checkpoint_steps, configured, events_of, losses
from tokenyard.parallel.apply import local
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import OnDivergence
from tokenyard.train.engine import TorchEngine
from tokenyard.train.fault_tolerance import replicas as divergence
from tokenyard.train.fault_tolerance.replicas import Difference, Replicas, differences, hash_of
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import single_step, train_session
from tokenyard.train.setup import open_session

NAME = "layers.0.attention.qkv"


def flipped_run(folder: Path, overrides: list[str], rank: int, steps: list[int]) -> dict[str, Any]:
    """A run on ranks of the pool; on one of them a bit of one weight flips after each of `steps`."""
    session = open_session(configured(folder, *overrides), torch.device("cpu"))
    right, name = session.engine.step, next(name for name in session.parallel.parameters if ".attention." in name)

    def step(*args: Any) -> Any:
        numbers = right(*args)
        if session.step + 1 in steps and session.parallel.mesh.rank == rank:
            local(session.parallel.parameters[name].parameter.detach()).view(torch.int32).view(-1)[3] ^= 1
        return numbers

    with ExitStack() as stack:
        stack.enter_context(closing(session))
        run_logger = stack.enter_context(build_run_logger(session))
        stack.enter_context(mock.patch.object(session.engine, "step", step))
        code = train_session(session, run_logger)
    begin = time.perf_counter()
    found = differences(session.parallel)
    return {"code": code, "name": name, "found": found, "seconds": time.perf_counter() - begin}


@pytest.mark.fault(25)
@pytest.mark.parametrize("layout", [["parallel.expert=4"], ["parallel.shard=2", "parallel.expert=2"]])
def test_a_flipped_bit_is_named_within_n_steps(layout: list[str], ranks: Any, tmp_path: Path, record_property: Any) -> None:
    options = [*layout, "debug.replicas_every=2", "checkpoint.every=0", "debug.on_divergence=stop"]
    results = ranks(4, flipped_run, tmp_path / "run", options, 2, [3])
    assert {result["code"] for result in results} == {71}
    (event,) = events_of(tmp_path / "run", "replicas_differ")
    assert (event["step"], event["tensors"]) == (4, [results[0]["name"]])
    assert event["ranks"] == ([2] if len(layout) == 1 else [0, 2])
    assert checkpoint_steps(tmp_path / "run") == []
    record_property("measured", "one bit: rank and tensor named within N steps; repaired from the majority; again: exit code 71")


@pytest.mark.fault(25)
def test_it_is_copied_from_the_majority_once(ranks: Any, tmp_path: Path) -> None:
    """Once: the run goes on as a healthy one. Again on the same rank: the device may be broken, and the run stops."""
    options = ["parallel.expert=4", "debug.replicas_every=1", "checkpoint.every=0"]
    healthy = ranks(4, flipped_run, tmp_path / "healthy", options, 2, [])
    once = ranks(4, flipped_run, tmp_path / "once", options, 2, [3])
    assert {r["code"] for r in [*healthy, *once]} == {0} and not any(r["found"] for r in once)
    assert losses(tmp_path / "once") == losses(tmp_path / "healthy")
    assert [event["repaired"] for event in events_of(tmp_path / "once", "replicas_differ")] == [True]
    again = ranks(4, flipped_run, tmp_path / "again", options, 2, [3, 5])
    assert {r["code"] for r in again} == {71}


def timed(folder: Path) -> dict[str, float]:
    """The default model on a rank of the pool: seconds of a comparison and of a step, and how often one is due."""
    data = ["data=synthetic", "data.synthetic_documents=128", f"data.cache={folder.parent / 'cache'}", "tokenizer=bytes"]
    config = compose([*data, "evaluate.sequences=8", "tracker=jsonl", f"run.dir={folder}"])
    session = open_session(config, torch.device("cpu"))
    with closing(session):
        single_step(session)
        steps = [lasted(lambda: single_step(session)) for _ in range(5)]
        comparisons = [lasted(lambda: differences(session.parallel)) for _ in range(6)][1:]
        held = sum(local(sharded.parameter).numel() for sharded in session.parallel.parameters.values())
        every = session.config.debug.replicas_every
        return {"step": median(steps), "comparison": median(comparisons), "every": every, "held": held}


def lasted(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@pytest.mark.fault(25)
def test_a_comparison_costs_less_than_a_hundredth_of_the_time(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """At the default interval, of every weight of the default model, on ranks that hold all of them."""
    found = ranks(2, timed, tmp_path / "run")[0]
    share = found["comparison"] / (found["every"] * found["step"] + found["comparison"])
    assert share <= 0.01
    cost = f"{found['held']:,} weights compared in {found['comparison']:.3f} s, a step is {found['step']:.2f} s"
    record_property("measured", f"{cost}: {share:.3%} of the time at the default of {found['every']} steps")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_flipped_bit_changes_the_hash(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 5).to(dtype)
    expected, bits = hash_of(tensor), tensor.element_size() * 8
    words = tensor.view({64: torch.int64, 32: torch.int32, 16: torch.int16}[bits]).view(-1)
    for element in (0, 17, len(words) - 1):
        for bit in range(bits - 1):
            words[element] ^= 1 << bit
            assert hash_of(tensor) != expected
            words[element] ^= 1 << bit
    assert hash_of(tensor) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_hash_is_of_the_values_and_their_places(dtype: torch.dtype) -> None:
    """However they lie in memory, in more than one block."""
    tensor = torch.randn(2**19 + 5).to(dtype)
    part = tensor[1:-2]
    assert hash_of(part) == hash_of(part.clone()) == hash_of(part.view(1, -1))
    assert len({int(hash_of(each)) for each in (part, part.roll(1), part.roll(2**18), tensor[2:-1])}) == 4


def test_a_repair_waits_for_the_copies_of_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step that was skipped they may still be under way: no update has waited for them."""
    done: list[str] = []
    debug = SimpleNamespace(replicas_every=1, on_divergence=OnDivergence.repair)
    session: Any = SimpleNamespace(step=0, config=SimpleNamespace(debug=debug), parallel=None, engine=object.__new__(TorchEngine))
    session.saver = SimpleNamespace(wait_for_copies=lambda: done.append("copied"))
    run_logger: Any = mock.Mock()
    replicas = Replicas(session, run_logger)
    monkeypatch.setattr(divergence, "differences", lambda _: [Difference("x", [1], 0, [0, 1, 2])])
    monkeypatch.setattr(Replicas, "_repair", lambda self, difference: done.append(difference.name))
    session.step = 1
    replicas.compare()
    assert done == ["copied", "x"]
