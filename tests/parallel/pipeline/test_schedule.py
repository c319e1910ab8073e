"""Schedules: order, dependencies, what a rank keeps, the bubble; and all ranks' lists run against each other."""

import pytest
from tokenyard.parallel.config import PipelineSchedule
from tokenyard.parallel.pipeline.schedule import BACKWARD, FORWARD, Action, bubble, most_kept, schedule, timeline

CASES = [("1f1b", P, 1, M) for P in (2, 3, 4, 8) for M in (1, 2, P - 1, P, 2 * P, 4 * P + 1)]
CASES += [("interleaved", P, V, M) for P in (2, 3, 4, 8) for V in (2, 3, 4) for M in (P, 2 * P, 4 * P)]


def lists_of(kind: str, ranks: int, chunks: int, micros: int) -> list[list[Action]]:
    return [schedule(PipelineSchedule[kind], ranks, rank, chunks, micros) for rank in range(ranks)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_pass_once_and_in_order(case: tuple[str, int, int, int]) -> None:
    """A stage takes the micro-batches in order, forward and backward: gradients are added in one order on every layout."""
    _, ranks, chunks, micros = case
    for rank, actions in enumerate(lists_of(*case)):
        for stage in range(rank, ranks * chunks, ranks):
            for kind in (FORWARD, BACKWARD):
                assert [a.micro for a in actions if a[:2] == (kind, stage)] == list(range(micros))
        assert len(actions) == 2 * chunks * micros
        assert all(actions.index(a._replace(kind=FORWARD)) < index for index, a in enumerate(actions) if a.kind == BACKWARD)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_do_not_wait_for_each_other(case: tuple[str, int, int, int]) -> None:
    _, ranks, chunks, micros = case
    spans = timeline(lists_of(*case), ranks * chunks, 1, 2)
    ended = {span.action: span.end for done in spans for span in done}
    assert len(ended) == 2 * ranks * chunks * micros
    for done in spans:
        for span in done:
            needed = span.action.needs(ranks * chunks)
            assert needed is None or ended[needed] <= span.begin


def test_ranks_that_wait_for_each_other_are_found() -> None:
    """Forward and backward of the second micro-batch swapped on the last rank: it waits for itself."""
    lists = lists_of("1f1b", 2, 1, 2)
    lists[1][2:] = lists[1][:1:-1]
    with pytest.raises(ValueError, match="ranks wait for each other"):
        timeline(lists, 2, 1, 2)


@pytest.mark.parametrize("case", [case for case in CASES if case[3] >= case[1]], ids=str)
@pytest.mark.parametrize("backward", [1, 2])
def test_the_bubble_is_the_known_one(case: tuple[str, int, int, int], backward: int) -> None:
    """(P - 1) / (V M) of the work (Narayanan et al. 2021, section 2.2)."""
    _, ranks, chunks, micros = case
    spans = timeline(lists_of(*case), ranks * chunks, 1, backward)
    assert bubble(spans) == pytest.approx((ranks - 1) / (chunks * micros), rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_rank_keeps(case: tuple[str, int, int, int]) -> None:
    """P - rank micro-batches; interleaved 2 (P - rank - 1) + (V - 1) P + 1, of one chunk each. Never more than there are."""
    kind, ranks, chunks, micros = case
    for rank, actions in enumerate(lists_of(*case)):
        most = ranks - rank if kind == "1f1b" else 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1
        assert most_kept(actions) == min(most, chunks * micros)
