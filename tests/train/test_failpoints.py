"""Failpoints act where, when and as often as their variable says."""

import signal

import pytest
from tokenyard.parallel.failpoints import VARIABLE, failpoint


def test_nothing_happens_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not failpoint("step.begin", step=1)


def test_conditions_are_rank_step_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(VARIABLE, "a:rank=1:step=6:on,b:rank=0:on,c:times=2:on")
    assert [failpoint("a", step) for step in (5, 6)] == [False, True]
    assert not failpoint("b")
    assert [failpoint("c") for _ in range(3)] == [True, True, False]


def test_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    monkeypatch.setattr("os.kill", lambda pid, number: heard.append(number))
    monkeypatch.setenv(VARIABLE, "kill:SIGKILL,raise:raise,disk:enospc,late:sleep=0")
    assert failpoint("kill") and heard == [signal.SIGKILL]
    assert failpoint("late")
    with pytest.raises(RuntimeError, match="failpoint raise"):
        failpoint("raise")
    with pytest.raises(OSError, match="No space left"):
        failpoint("disk")
