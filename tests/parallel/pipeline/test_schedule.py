"""Schedules: order, dependencies, what a rank keeps, the bubble; and all ranks' lists run against each other."""

import pytest
from tokenyard.parallel.config import PipelineSchedule
from tokenyard.parallel.pipeline.schedule import (
    BACKWARD,
    FORWARD,
    WEIGHTS,
    Action,
    bubble,
    most_kept,
    schedule,
    stages_at,
    timeline,
)

CASES = [("1f1b", P, 1, M) for P in (2, 3, 4, 8) for M in (1, 2, P - 1, P, 2 * P, 4 * P + 1)]
CASES += [("interleaved", P, V, M) for P in (2, 3, 4, 8) for V in (2, 3, 4) for M in (P, 2 * P, 4 * P)]
ZERO_BUBBLE = [
    (name, P, V, M) for name, V in (("zbh1", 1), ("zbv", 2)) for P in (2, 3, 4, 8) for M in (1, 2, P, 2 * P - 1, 4 * P + 1)
]


def lists_of(kind: str, ranks: int, chunks: int, micros: int) -> list[list[Action]]:
    return [schedule(PipelineSchedule[kind], ranks, rank, chunks, micros) for rank in range(ranks)]


@pytest.mark.parametrize("case", CASES + ZERO_BUBBLE, ids=str)
def test_each_pass_once_and_in_order(case: tuple[str, int, int, int]) -> None:
    """A stage takes the micro-batches in order, in each kind of pass: gradients are added in one order on every layout."""
    name, ranks, chunks, micros = case
    kinds = [FORWARD, BACKWARD, WEIGHTS] if case in ZERO_BUBBLE else [FORWARD, BACKWARD]
    for rank, actions in enumerate(lists_of(*case)):
        for stage in stages_at(PipelineSchedule[name], ranks, ranks * chunks, rank):
            for kind in kinds:
                assert [a.micro for a in actions if a[:2] == (kind, stage)] == list(range(micros))
            for micro in range(micros):
                places = [actions.index(Action(kind, stage, micro)) for kind in kinds]
                assert places == sorted(places)
        assert len(actions) == len(kinds) * chunks * micros


@pytest.mark.parametrize("case", CASES + ZERO_BUBBLE, ids=str)
def test_ranks_do_not_wait_for_each_other(case: tuple[str, int, int, int]) -> None:
    _, ranks, chunks, micros = case
    spans = timeline(lists_of(*case), ranks * chunks, 1, 2)
    ended = {span.action: span.end for done in spans for span in done}
    assert len(ended) == (3 if case in ZERO_BUBBLE else 2) * ranks * chunks * micros
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


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_stage_is_on_one_rank(ranks: int) -> None:
    """s mod P; in a V stage 2 P - 1 - s is where stage s is."""
    for name, stages in (("1f1b", ranks), ("zbh1", ranks), ("interleaved", 3 * ranks), ("zbv", 2 * ranks)):
        found = [stages_at(PipelineSchedule[name], ranks, stages, rank) for rank in range(ranks)]
        if name == "zbv":
            assert found == [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]
        else:
            assert found == [list(range(rank, stages, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("case", [case for case in ZERO_BUBBLE if case[3] >= case[2] * case[1] - case[2] + 1], ids=str)
def test_zero_bubble_idles_as_little_as_published(case: tuple[str, int, int, int]) -> None:
    """Qi et al. 2024, table 1: (P - 1) (F + B - W) for zbh1 with F = B = W = 1; zbv: 0 from a rank's first to its last action, so
    that the ranks wait P - 1 forward passes until the first micro-batch arrives.
    """
    name, ranks, chunks, micros = case
    spans = timeline(lists_of(*case), ranks * chunks, 1, 1, 1)
    assert bubble(spans) == pytest.approx((ranks - 1) / (3 * chunks * micros), rel=1e-12)
    if name == "zbv":
        assert all(done[-1].end - done[0].begin == len(done) for done in spans)


@pytest.mark.parametrize("case", ZERO_BUBBLE, ids=str)
def test_zero_bubble_keeps_what_the_first_rank_of_1f1b_does(case: tuple[str, int, int, int]) -> None:
    """P micro-batches of all layers of a rank, until the gradients of their weights: 2 P of the halves of zbv."""
    _, ranks, chunks, micros = case
    for actions in lists_of(*case):
        assert most_kept(actions) == min(ranks, micros) * chunks
