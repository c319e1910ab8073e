"""The parts of survival without ranks: windows, verdicts, who is blamed, where the time went, what ranks tell each other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenyard.train.config.config import NumericsConfig
from tokenyard.train.fault_tolerance.hang_diagnosis import Position, diagnose
from tokenyard.train.fault_tolerance.step_guard import Action, Guard, RecentSteps
from tokenyard.train.logging.goodput import KINDS, earlier_starts
from tokenyard.train.step_flags import RankFlags, encode_flags, is_sound, read_flags


def global_flags(loss: float, squared: float = 1.0, *tellings: RankFlags) -> Any:
    """What ranks are told, of which the first has the numbers."""
    tellings = tellings or (RankFlags(),)
    world, total = len(tellings), torch.zeros(0)
    for rank, rank_flags in enumerate(tellings):
        mine = torch.tensor([squared, loss] if rank == 0 else [0.0, 0.0], dtype=torch.float64)
        part = torch.cat([encode_flags(rank_flags, mine, rank, world), mine])
        total = part if rank == 0 else total + part
    global_flags, _ = read_flags(total, 0)
    return global_flags


def test_flags_are_counted_and_a_single_rank_is_named() -> None:
    asks = RankFlags(snapshot=True)
    found = global_flags(2.0, 9.0, asks, RankFlags(stop=True), RankFlags(stop=True, save=True), RankFlags(bad_data=True))
    assert (found.stop, found.save, found.bad_data, found.failed_writer, found.not_finite, found.rank) == (2, 1, 1, 0, 0, 3)
    assert (found.snapshot, found.writing, found.overflow) == (1, 0, 0)
    assert (found.loss, found.gradient_norm) == (2.0, 3.0)
    assert global_flags(math.nan, 1.0, RankFlags(), RankFlags()).rank == 0
    assert global_flags(1.0, math.inf).not_finite == 1
    assert global_flags(1.0, 1.0, RankFlags(seconds=0.25), RankFlags(seconds=0.5)).seconds == [0.25, 0.5]


def test_a_spike_needs_a_window_and_is_far_above_it() -> None:
    window = RecentSteps(32)
    for index in range(8):
        assert window.spike(1000.0, 1000.0, 6.0) is None
        window.add(4.0 + 0.01 * (index % 2), 1.0)
    assert window.spike(4.3, 1.1, 6.0) is None
    assert "loss 5 is" in str(window.spike(5.0, 1.0, 6.0))
    assert window.spike(4.0, 2.9, 6.0) is None
    assert "gradient norm 3.1 is" in str(window.spike(4.0, 3.1, 6.0))
    other = RecentSteps(32)
    other.restore(json.loads(json.dumps(window.state())))
    assert other.state() == window.state()


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_the_policy_decides_about_what_is_not_finite(policy: str) -> None:
    guard = Guard(NumericsConfig(on_nan=NumericsConfig().on_nan.__class__(policy), max_skips=2))
    fault = guard.fault(global_flags(math.nan))
    assert fault is not None and (fault.kind, fault.action) == ("not_finite", Action(policy))
    assert not guard.accepts(global_flags(math.nan)) and not guard.accepts_again(global_flags(1.0, math.inf))
    assert [guard.may_intervene() for _ in range(3)] == [True, True, False]


def test_a_spike_is_taken_the_second_time_if_it_is_only_to_be_reported() -> None:
    guard = Guard(NumericsConfig(spike_window=8))
    for _ in range(8):
        guard.record(global_flags(4.0))
    assert not guard.accepts(global_flags(9.0)) and guard.accepts_again(global_flags(9.0))


@pytest.mark.parametrize("tokens", [7, torch.tensor(7)])
def test_an_overflow_that_is_fatal_stops_before_the_update(tokens: int | torch.Tensor) -> None:
    """Its count is read with the flags, whether or not the tokens are."""
    numbers = torch.zeros(11, dtype=torch.float64)
    numbers[-2:] = torch.tensor([9.0, 2.0])
    found, read = read_flags(numbers, tokens, torch.tensor(5.0))
    assert (found.overflow, found.gradient_norm, found.loss, read) == (5, 3.0, 2.0, 7)
    fault = Guard(NumericsConfig()).fault(found)
    assert not is_sound(found) and fault is not None and (fault.kind, fault.action) == ("overflow", Action.stop)
    assert is_sound(read_flags(numbers, tokens, torch.tensor(0.0))[0]) and read_flags(numbers, tokens)[0].overflow == 0


def beat(
    rank: int, number: int = 5, collective: str | None = "all_reduce over 4 ranks", step: int = 3, layer: int | None = 1
) -> Position:
    return Position(rank, step, "forward", 1, collective, number, 9.0 - rank, "")


@pytest.mark.parametrize(
    ("beats", "ranks", "words"),
    [
        ([beat(0), beat(1), beat(3)], [2], "is frozen, or its host is gone"),
        ([beat(0), beat(1, collective=None), beat(2), beat(3)], [1], "has not reached this collective"),
        ([beat(0), beat(1), beat(2, number=4), beat(3)], [2], "is behind"),
        ([beat(0), beat(1), beat(2), beat(3, collective="all_to_all over 4 ranks")], [3], "skipped a collective"),
        ([beat(0), beat(1, step=4), beat(2), beat(3)], [1], "skipped a collective"),
    ],
)
def test_the_rank_that_the_others_wait_for(beats: list[Position], ranks: list[int], words: str) -> None:
    verdict = diagnose({each.rank: each for each in beats}, 4)
    assert verdict.ranks == ranks and words in verdict.text
    assert (verdict.step, verdict.layer, verdict.collective) == (3, 1, "all_reduce over 4 ranks")


def of_stage(rank: int, number: int, passes: int = 4, neighbour: int | None = None, in_schedule: bool = True) -> Position:
    """Of two stages with two ranks each."""
    waits = "all_to_all over 2 ranks" if neighbour is None else f"a message of rank {neighbour}"
    return Position(rank, 3, "forward", 1, waits, number, 9.0 - rank, "", rank // 2, neighbour, passes, in_schedule)


@pytest.mark.parametrize(
    ("beats", "ranks", "words"),
    [
        # The first stage has begun fewer collectives than the second, and waits for its gradients.
        ([of_stage(0, 2, neighbour=2), of_stage(1, 2, neighbour=3), of_stage(2, 9), of_stage(3, 8)], [3], "is behind"),
        # All is done on the first stage, whose ranks wait where the stages meet.
        ([of_stage(0, 9, in_schedule=False), of_stage(1, 9, in_schedule=False), of_stage(2, 5), of_stage(3, 4)], [3], "is behind"),
        # Ranks 2 and 3 hang together; rank 1 waits for rank 3, and rank 0 where the stages meet.
        (
            [of_stage(0, 9, in_schedule=False), of_stage(1, 9, neighbour=3), of_stage(2, 5), of_stage(3, 5)],
            [2, 3],
            "a different one",
        ),
        # Rank 1 has left out what rank 0 waits for, and has gone on; in the second stage rank 2 waits for rank 0.
        ([of_stage(0, 5, 3), of_stage(1, 4, 4, neighbour=3), of_stage(2, 1, 2, neighbour=0), of_stage(3, 2, 2)], [1], "skipped"),
        # Rank 1 waits in another collective than rank 0; nobody has begun fewer.
        (
            [
                of_stage(0, 2),
                of_stage(1, 2)._replace(collective="all_reduce over 2 ranks", step=4),
                of_stage(2, 9, neighbour=0),
                of_stage(3, 9, neighbour=1),
            ],
            [1],
            "entered a different one",
        ),
        # A message has got lost.
        (
            [of_stage(0, 2, neighbour=2), of_stage(1, 2, neighbour=3), of_stage(2, 3, neighbour=0), of_stage(3, 3, neighbour=1)],
            [0, 1, 2, 3],
            "wait for each other's messages",
        ),
    ],
)
def test_a_stage_that_waits_for_another_is_not_blamed(beats: list[Position], ranks: list[int], words: str) -> None:
    verdict = diagnose({each.rank: each for each in beats}, 4)
    assert verdict.ranks == ranks and words in verdict.text


def test_repeated_work_is_lost_and_no_longer_compute(tmp_path: Path) -> None:
    """Killed after step 9; the last accounting is of step 6; the run goes on after step 4."""
    seconds = dict.fromkeys(KINDS, 0.0) | {"compute": 20.0, "data": 2.0, "startup": 5.0}
    events = [{"event": "start", "step": 0}, {"event": "accounting", "step": 6, "seconds": seconds}]
    metrics = [{"step": step, "step_seconds": 2.0, "data_wait_fraction": 0.25} for step in range(1, 10)]
    for name, records in (("events", events), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found, restarts = earlier_starts(tmp_path, 4)
    assert restarts == 1
    assert found == seconds | {"lost": 10.0, "compute": 17.0, "data": 1.0}


def test_a_new_run_has_nothing_before_it(tmp_path: Path) -> None:
    assert earlier_starts(tmp_path, 0) == (dict.fromkeys(KINDS, 0.0), 0)
