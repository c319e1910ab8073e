"""What watchdogs tell each other, without ranks: frozen ranks that should look or collect, and notes of another start."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tokenyard.train.exit import NOTE, STACKS, ExitCode, Failure, find_note, leave_note, remove_notes
from tokenyard.train.fault_tolerance import notices as notices_module
from tokenyard.train.fault_tolerance.hang_diagnosis import Position
from tokenyard.train.fault_tolerance.notices import Notices, Settled

TICK = 2.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the Notices of a rank; ranks 0 to 3 are one host, 4 to 7 another."""
    clock, run = Clock(), tmp_path / "run"
    run.mkdir()

    def make(rank: int, start: str = "now") -> Notices:
        memory = tmp_path / f"memory{rank // 4}"
        memory.mkdir(exist_ok=True)
        monkeypatch.setattr(notices_module, "MEMORY", memory)
        with mock.patch.dict(os.environ, LOCAL_RANK=str(rank % 4)):
            return Notices(run, rank, 8, TICK, start, clock)

    return make, clock, run


def position(rank: int, collective: str | None = "all_reduce", start: str = "now") -> Position:
    return Position(rank, 7, "forward", 3, collective, 9, 600.0, start)


def run_all(clock: Clock, settling: dict[int, Generator[float, None, Settled]]) -> dict[int, Settled]:
    """Runs them side by side until all have an answer."""
    due, answers = dict.fromkeys(settling, clock.now), {}
    while due:
        rank = min(due, key=lambda each: (due[each], each))
        clock.now = due[rank]
        try:
            due[rank] += next(settling[rank])
        except StopIteration as stop:
            answers[rank] = stop.value
            del due[rank]
    return answers


@pytest.mark.fault(43)
def test_the_next_rank_of_the_host_looks_where_the_first_is_frozen(host: Any) -> None:
    make, clock, run = host
    first, second = make(0), make(1)
    assert first.look() is None
    leave_note(run, Failure(5, 3, "OSError: gone", 1))
    clock.now += TICK
    assert second.look() is None, "the first has looked lately"
    clock.now += TICK
    assert second.look() == Failure(5, 3, "OSError: gone", 1)
    (run / NOTE).unlink()
    assert make(2).look() == Failure(5, 3, "OSError: gone", 1), "the file of the host has it"
    assert make(4).look() is None


@pytest.mark.fault(43)
def test_another_rank_collects_where_the_first_is_gone(host: Any) -> None:
    """Rank 0 raises the alarm and freezes, and rank 3 is frozen from the start."""
    make, clock, run = host
    ranks = {rank: make(rank) for rank in range(8) if rank != 3}
    for rank, each in ranks.items():
        each.put(position(rank))
    gone = ranks.pop(0).settle(position(0))
    next(gone)
    begin, answers = clock.now, run_all(clock, {rank: each.settle(position(rank)) for rank, each in ranks.items()})
    assert [settled.diagnosis.ranks for settled in answers.values()] == [[3]] * 6
    assert sum(settled.collected for settled in answers.values()) == 1
    assert all(settled.diagnosis.silent for settled in answers.values())
    assert clock.now - begin <= 3 * (2 * TICK + 1) + TICK
    assert not list((run / STACKS).glob("*.tmp"))


@pytest.mark.fault(43)
def test_notes_of_an_earlier_start_are_no_alarm(host: Any) -> None:
    make, clock, run = host
    old = make(4, start="before")
    old.put(position(4, None, start="before"))
    settling = old.settle(position(4, start="before"))
    with pytest.raises(StopIteration):
        while True:
            clock.now += next(settling)
    assert make(0).look() is None
    assert make(0, start="before").look() == find_note(run) == Failure(4, 7, "no progress for 600 s", ExitCode.hang, "before")
    mine = make(1)
    mine.put(position(1))
    assert list(mine._read_notes(run / STACKS, {})) == [1] and mine._read_verdict() is None
    remove_notes(run)
    assert sorted(path.name for path in (run / STACKS).iterdir()) == ["rank_1.txt", "rank_4.txt"]


def test_one_rank_alone_leaves_the_note(tmp_path: Path) -> None:
    assert [leave_note(tmp_path, Failure(rank, 1, "", 1)) for rank in (2, 0)] == [True, False]
    found = find_note(tmp_path)
    assert found is not None and found.rank == 2
    with mock.patch.object(Path, "exists", lambda _: False):  # both look before either writes
        assert not leave_note(tmp_path, Failure(1, 1, "", 1))
    (tmp_path / "file").touch()
    assert not leave_note(tmp_path / "file", Failure(1, 1, "", 1))
