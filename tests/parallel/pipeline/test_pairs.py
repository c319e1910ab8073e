"""Pairs of passes: every rank's list stays as it is, no rank waits for another for ever, and the bubble is as large as without."""

import pytest
from tokenyard.parallel.config import PipelineSchedule
from tokenyard.parallel.pipeline.pairs import Unit, units, with_pairs
from tokenyard.parallel.pipeline.schedule import BACKWARD, FORWARD, Action, most_kept, schedule

INTERLEAVED = PipelineSchedule["interleaved"]
CASES = [(P, V, M) for P in (2, 3, 4, 8) for V in (2, 3) for M in (P, 2 * P, 4 * P)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_are_of_neighbours_that_do_not_need_each_other(case: tuple[int, int, int]) -> None:
    ranks, chunks, micros = case
    for rank, found in enumerate(units(INTERLEAVED, *case, True)):
        actions = schedule(INTERLEAVED, ranks, rank, chunks, micros, overlap=True)
        assert [action for unit in found for action in unit] == actions
        pairs = [unit for unit in found if len(unit) == 2]
        assert all([action.kind for action in pair] == [FORWARD, BACKWARD] for pair in pairs)
        assert all(pair[0].micro != pair[1].micro for pair in pairs)
        if micros > ranks:  # all forward passes but those with which the schedule begins
            assert len(pairs) == chunks * micros - (2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] > case[0]], ids=str)
def test_the_bubble_is_that_of_passes_one_after_the_other(case: tuple[int, int, int]) -> None:
    """(P - 1) / (V M) of the work, if a pair takes as long as its passes one after the other, and there are several groups."""
    ranks, chunks, micros = case
    for backward in (1, 2):
        end = finished(units(INTERLEAVED, *case, True), ranks * chunks, backward)
        work = chunks * micros * (1 + backward)
        assert (end - work) / work == pytest.approx((ranks - 1) / (chunks * micros), rel=1e-12)


def finished(lists: list[list[Unit]], stages: int, backward: int) -> float:
    """Returns when the last rank is done: a unit begins when its rank is free and all that its actions need is there."""
    ended: dict[Action | None, float] = {None: 0.0}
    left, free = [list(units) for units in lists], [0.0] * len(lists)
    while any(left):
        rank = next(
            rank for rank, rest in enumerate(left) if rest and all(action.needs(stages) in ended for action in rest[0])
        )  # StopIteration: ranks wait for each other
        unit = left[rank].pop(0)
        begin = max(free[rank], *(ended[action.needs(stages)] for action in unit))
        free[rank] = begin + sum(1 if action.kind == FORWARD else backward for action in unit)
        ended |= dict.fromkeys(unit, free[rank])
    return max(free)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_keeps_one_micro_batch_more(case: tuple[int, int, int]) -> None:
    ranks, chunks, micros = case
    for rank in range(ranks):
        alone, beside = (most_kept(schedule(INTERLEAVED, ranks, rank, chunks, micros, overlap)) for overlap in (False, True))
        assert beside == min(alone + 1, chunks * micros)


def test_a_pair_whose_passes_need_each_other_is_none() -> None:
    """The last rank of 1f1b passes each micro-batch backward after its forward pass; the others then have pairs."""
    lists = [schedule(PipelineSchedule["1f1b"], 2, rank, 1, 3) for rank in range(2)]
    first, last = with_pairs(lists, 2)
    assert [len(unit) for unit in first] == [1, 2, 2, 1] and [len(unit) for unit in last] == [1] * 6


def test_ranks_that_wait_for_each_other_are_found() -> None:
    with pytest.raises(ValueError, match="ranks wait for each other: \\('B', 0, 0\\)"):
        with_pairs([[Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)]], 1)
