"""The benchmark of the peers compares the same work, and says what it could not compare."""

from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
from tokenyard.bench.peers import cases, rounds
from tokenyard.bench.peers.__main__ import parse, table
from tokenyard.bench.peers.cases import CASES, SIDES, Case, groups, refusal, sides_of
from tokenyard.bench.peers.rounds import Measurement, SideResult, measure
from tokenyard.bench.timing import quartiles

TOY = Case(8, 2, 32, "fp32", width=64, layers=2, heads=4, vocabulary=256, sequences=2, length=32)
BY_NAME = {side.name: side for side in SIDES}


@pytest.fixture(scope="module")
def lines() -> dict[str, SideResult]:
    pytest.importorskip("transformers", reason="a side needs transformers (pip install 'tokenyard[hf]')")
    sides = sides_of(TOY, ["transformers grouped_mm"])
    return {line.side: line for line in measure("toy", TOY, sides, Measurement(rounds=2, warmup=1, threads=1))}


def test_first_losses_are_those_of_ours(lines: dict[str, SideResult]) -> None:
    ours, theirs = lines["tokenyard"].first_loss, lines["transformers grouped_mm"].first_loss
    assert theirs == pytest.approx(ours, rel=1e-5) and lines["transformers grouped_mm"].same
    assert lines["dense"].same is None and lines["dense"].first_loss != pytest.approx(ours, rel=1e-5)


def test_each_side_has_its_ratios(lines: dict[str, SideResult]) -> None:
    assert list(lines) == ["dense", "tokenyard", "transformers grouped_mm"]
    assert lines["dense"].of_dense == 1.0 and lines["tokenyard"].ours_is_faster == 1.0
    for line in lines.values():
        assert line.of_dense is not None and line.quartiles is not None and line.ours_is_faster is not None
        assert 0 < line.quartiles[0] <= line.of_dense <= line.quartiles[1]
        assert line.tokens_per_second is not None and line.tokens_per_second > 0 and line.peak_bytes is not None
    printed = table(list(lines.values())).splitlines()
    assert len(printed) == 5 and all(row.count("|") == 9 for row in printed)


def test_another_loss_is_another_work() -> None:
    def worker(loss: float) -> Any:
        return SimpleNamespace(side=BY_NAME["DeepSpeed"], losses=[loss])

    assert rounds._same(worker(9.0), worker(9.00005), TOY)
    with pytest.raises(RuntimeError, match=r"DeepSpeed begins with a loss of 9\.0, DeepSpeed with 9\.001: not the same work"):
        rounds._same(worker(9.0), worker(9.001), TOY)


def test_what_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    (line,) = measure("toy", TOY, [BY_NAME["Megatron-Core"]], Measurement())
    assert line.note == "not installed (pip install megatron-core)" and line.of_dense is None
    assert table([line]).splitlines()[-1].startswith("| toy | Megatron-Core | not installed (pip install megatron-core) |")


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: ModuleSpec(name, None))
    batched, case = BY_NAME["transformers batched_mm"], CASES["8x2-bf16"]
    assert refusal(batched, case, 64 * 2**30) == "needs 96 GiB: copies an expert's weights for each choice of a token"
    assert refusal(batched, TOY, 2**30) is None
    assert refusal(BY_NAME["torchtitan"], TOY, 2**30) == "computes experts in bf16 only"


def test_each_group_has_what_its_sides_are_compared_with() -> None:
    sides = sides_of(CASES["8x2-bf16"])
    assert list(groups(sides, 12)) == [sides] and len(sides) == 12
    split = list(groups(sides, 5))
    assert max(map(len, split)) == 5 and {side for group in split for side in group} == set(sides)
    first = {side: next(group for group in split if side in group) for side in sides}
    for side, group in first.items():
        assert {side.dense, side.ours} <= {other.name for other in group}


def test_what_a_side_is_compared_with_comes_along() -> None:
    assert [side.name for side in sides_of(TOY, ["DeepSpeed, drops"])] == ["dense", "tokenyard, drops", "DeepSpeed, drops"]
    assert not any("fp32 weights" in side.name for side in sides_of(TOY))


def test_words() -> None:
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 4.0) and quartiles([1.0]) == (1.0, 1.0)
    arguments = parse(["--cases", "8x2-fp32", "--sides", "DeepSpeed, drops", "--plain-memory"])
    assert arguments.cases == ["8x2-fp32"] and arguments.sides == ["DeepSpeed, drops"] and arguments.plain_memory
