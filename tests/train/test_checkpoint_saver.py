"""The saver plans once, copies before an update, and is loud about a change that came too early."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenyard.parallel.pieces import Held, whole
from tokenyard.train.checkpoint import saver as saver_module
from tokenyard.train.checkpoint.copies import Copies
from tokenyard.train.checkpoint.saver import Saver
from tokenyard.train.checkpoint.store import read_whole
from tokenyard.train.state import random_state, restore_random


def held(value: float = 1.0, size: int = 64) -> dict[str, Held]:
    return {"model.x": Held(whole((size,)), torch.full((size,), value))}


def test_the_plan_is_made_once_while_the_layout_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = saver_module.shares_of
    monkeypatch.setattr(saver_module, "shares_of", lambda offers: made.append(1) or plan(offers))
    saver = Saver(tmp_path)
    for step, size, times in ((1, 64, 1), (2, 64, 1), (3, 32, 2), (4, 32, 2)):
        assert saver.begin(step, held(step, size), {}) is None
        outcome = saver.finish()
        assert outcome is not None and outcome.error is None and outcome.path == saver.path_of(step)
        assert len(made) == times
    assert [read_whole(saver.path_of(step))["x"][0] for step in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert saver.step() is None and saver.finish() is None and saver.flags() == (False, False)


def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = Copies._copied
    monkeypatch.setattr(Copies, "_copied", lambda self, held: time.sleep(0.3) or copied(self, held))


def test_an_update_waits_for_the_copies_and_is_not_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_copies(monkeypatch)
    state, saver = held(), Saver(tmp_path)
    saver.begin(1, state, {})
    saver.release()
    state["model.x"].tensor.add_(1)
    outcome = saver.finish()
    assert outcome is not None and outcome.error is None and 0.2 < outcome.blocked_seconds <= outcome.seconds
    assert read_whole(outcome.path)["x"].eq(1).all()


def test_a_change_that_did_not_wait_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_copies(monkeypatch)
    state, saver = held(), Saver(tmp_path)
    saver.begin(1, state, {})
    time.sleep(0.1)
    state["model.x"].tensor.add_(1)
    outcome = saver.finish()
    assert outcome is not None and outcome.error is not None
    assert "RuntimeError: tensor 'model.x' changed while it was copied" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_all_generators_are_put_back() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    saved = {name: Held(piece, tensor.clone()) for name, (piece, tensor) in random_state().items()}
    expected = [random.random(), np.random.rand(), torch.rand(()).item()]
    restore_random(saved)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == expected
