"""A tracker that raises, sleeps or exits: what training notices of it (nothing) and what the user is told (one line)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from threading import Event
from time import perf_counter, sleep
from typing import Any

import pytest
from tokenyard.train.config.config import Config, ConfigError, TrackerConfig
from tokenyard.train.config.validate import check_rules
from tokenyard.train.logging.journal import Journal, read_journal
from tokenyard.train.logging.trackers.base import AbstractTracker
from tokenyard.train.logging.trackers.sections import charted, sectioned
from tokenyard.train.logging.trackers.trackers import Trackers, build_trackers, run_identity


@pytest.fixture
def events(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "events.jsonl")
    yield journal
    journal.close()


class Recorder(AbstractTracker):
    """Keeps its calls; `hook` runs in each of them first."""

    name = "recorder"

    def __init__(self, hook=lambda call, argument: None):
        self.calls: list[tuple[str, Any]] = []
        self.hook = hook

    def start(self, facts: Mapping[str, Any]) -> None:
        self._call("start", facts)

    def log(self, record: Mapping[str, Any]) -> None:
        self._call("log", record)

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._call("finish", (exit_code, summary))

    def _call(self, call: str, argument: Any) -> None:
        self.hook(call, argument)
        self.calls.append((call, argument))


def run(tracker: AbstractTracker, steps: int = 3, **options: Any) -> list[str]:
    """A short run; what it said."""
    said: list[str] = []
    trackers = Trackers([tracker], said.append, **options)
    trackers.start({"seed": 1})
    record = {}
    for step in range(1, steps + 1):
        record["step"] = step  # the same mapping each time
        trackers.log(record)
    trackers.finish(0, {"loss": 2.0})
    return said


def test_calls_arrive_in_order_and_records_are_copies():
    tracker = Recorder()
    assert run(tracker) == []
    logs = [("log", {"step": step}) for step in (1, 2, 3)]
    assert tracker.calls == [("start", {"seed": 1}), *logs, ("finish", (0, {"loss": 2.0}))]


@pytest.mark.fault(29, "training goes on; metrics.jsonl complete")
def test_a_tracker_that_raises_is_reported_once_and_called_again(events: Journal):
    def hook(call: str, argument: Any) -> None:
        if call == "log" and argument["step"] <= 2:
            raise RuntimeError(f"no route\nto host {argument['step']}")

    tracker, said = Recorder(hook), []
    trackers = Trackers([tracker], said.append, events)
    trackers.start({})
    for step in (1, 2, 3):
        trackers.log({"step": step})
        sleep(0.05)  # time for it to fail before the next
    trackers.finish()
    assert said == [
        "tracker recorder failed: RuntimeError: no route to host 1; training goes on, metrics.jsonl has all records",
        "tracker recorder missed 2 of 3 records; metrics.jsonl has all",
    ]
    assert [call for call, _ in tracker.calls] == ["start", "log", "finish"]
    failed, incomplete = read_journal(events.path)
    assert (failed["event"], failed["tracker"], failed["error"]) == (
        "tracker_failed",
        "recorder",
        "RuntimeError: no route to host 1",
    )
    assert (incomplete["event"], incomplete["missed"], incomplete["records"]) == ("tracker_incomplete", 2, 3)


@pytest.mark.fault(29)
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("bad key")])
def test_a_tracker_that_cannot_start_is_left_alone(error: BaseException):
    def hook(call: str, argument: Any) -> None:
        if call == "start":
            raise error

    tracker = Recorder(hook)
    said = run(tracker)
    assert said[0].startswith(f"tracker recorder failed: {type(error).__name__}")
    assert said[1:] == ["tracker recorder missed 3 of 3 records; metrics.jsonl has all"]
    assert tracker.calls == []


@pytest.mark.fault(29)
def test_a_slow_tracker_does_not_delay_training(events: Journal):
    said: list[str] = []
    trackers = Trackers([Recorder(lambda call, argument: sleep(10))], said.append, events, capacity=5, patience=0.2)
    trackers.start({})
    took = []
    for step in range(20):
        start = perf_counter()
        trackers.log({"step": step})
        took.append(perf_counter() - start)
    assert median(took) < 0.002
    assert max(took) < 1.0
    start = perf_counter()
    trackers.finish()
    assert perf_counter() - start < 3.0
    assert said == ["tracker recorder missed 20 of 20 records and it did not finish within 0.2 s; metrics.jsonl has all"]
    assert read_journal(events.path)[0]["finished"] is False


def test_records_beyond_the_queue_are_dropped_and_counted():
    busy, go = Event(), Event()

    def hook(call: str, argument: Any) -> None:
        busy.set()
        go.wait(10)

    tracker, said = Recorder(hook), []
    trackers = Trackers([tracker], said.append, capacity=4)
    trackers.start({})
    busy.wait(10)  # so the queue is empty again
    for step in range(10):
        trackers.log({"step": step})
    go.set()
    trackers.finish()
    assert [argument["step"] for call, argument in tracker.calls if call == "log"] == [0, 1, 2, 3]
    assert said == ["tracker recorder missed 6 of 10 records; metrics.jsonl has all"]


def test_one_broken_tracker_does_not_disturb_another():
    def hook(call: str, argument: Any) -> None:
        raise RuntimeError

    good, said = Recorder(), []
    trackers = Trackers([Recorder(hook), good], said.append)
    trackers.start({})
    trackers.log({"step": 1})
    trackers.finish()
    assert [call for call, _ in good.calls] == ["start", "log", "finish"]


def test_unknown_names_are_refused_in_one_line():
    names = "wandb, tensorboard, trackio, jsonl, none"
    with pytest.raises(ConfigError, match=rf"^tracker\.names=\[wandbb\]: may hold {names}; nearest valid: tracker.names=.wandb.$"):
        check_rules(Config(tracker=TrackerConfig(names=["wandbb"])), 1)


def test_jsonl_needs_no_tracker(tmp_path: Path):
    trackers = build_trackers(TrackerConfig(names=["jsonl"]), tmp_path, "id")
    trackers.start({})
    trackers.log({"step": 1})
    trackers.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_identity_is_kept_on_resume_only(tmp_path: Path):
    first = run_identity(tmp_path, resumed=False)
    assert run_identity(tmp_path, resumed=True) == first
    assert run_identity(tmp_path, resumed=False) != first
    assert len(first) == 8


def test_no_two_keys_of_a_record_share_a_place_in_the_sections() -> None:
    keys = ["loss", "loss_z_scaled", "lr", "grad_norm_router", "tokens_per_second", "mfu", "data_wait_fraction", "padding_fraction"]
    keys += ["dropped_fraction", "moe/dropped_fraction", "moe/load_cv_layer", "system/memory_peak_gb_rank", "data/a/share", "step"]
    shown = charted(dict.fromkeys(keys, 1.0))
    assert len({*map(sectioned, keys)}) == len(keys)
    assert {key.partition("/")[0] for key in shown} == {"train", "optimizer", "perf", "data", "moe"}
    assert list(map(sectioned, keys[:8:2])) == ["train/loss", "optimizer/lr", "perf/tokens_per_second", "perf/data_wait_fraction"]
    assert not {*map(sectioned, keys[-4:-2])} & shown.keys() and "train/step" not in shown
