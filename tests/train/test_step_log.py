"""What the loop does on a GPU, done on a CPU: rows made a step ahead, logged steps told a step later, totals on the device. Nothing
that a run writes may be another for it, whatever ends the run. Streams and events are those of the double of torch.cuda."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cuda_double
import pytest
import torch
from fault_run import checkpoint_steps, configured, events_of, losses, rows_in
from test_numbers import EXPERT, spoiled_gradient
from tokenyard.checkpoint.store import read_facts, read_whole
from tokenyard.data.batch_sizes import BatchSizes
from tokenyard.data.batches import Batch
from tokenyard.moe.device import host_read
from tokenyard.parallel.mesh import Axis
from tokenyard.train import step as step_module
from tokenyard.train import step_flags as flags
from tokenyard.train.batch import BatchLoader
from tokenyard.train.config.compose import compose
from tokenyard.train.fault_tolerance.signals import STOP_REQUESTS
from tokenyard.train.logging.expert_stats.collector import ExpertStats
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import RankZeroLogger, build_run_logger
from tokenyard.train.logging.step_log import Stopwatch
from tokenyard.train.run import due_after, train_session
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)
TIMES = {"tokens_per_second", "step_seconds", "mfu", "data_wait_fraction", "seconds"}
BESIDE = ("checkpoint", "accounting")
"""Events of saves, which end when they end."""
STREAMED = ["data=jsonl", "data.window=16", "data.workers=2", "numerics.spike_sigma=null"]
WATCHED = ["telemetry.every=2", "telemetry.probe=2", "evaluate.every=4", "telemetry.window=2", "model.moe.balance.bias_rate=0.01"]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return rows_in(tmp_path / "rows")


def trained(folder: Path, overrides: list[str], late: bool, trouble: Callable[[Session], Any] | None = None) -> dict[str, Any]:
    """A run as on a CPU, or as on a GPU. `trouble`: a context around it."""
    places: list[str] = []

    def noted(x: torch.Tensor, place: str, assumed: Any) -> Any:
        places.append(place)
        return host_read(x, place, assumed)

    with ExitStack() as stack:
        session = stack.enter_context(closing(open_session(configured(folder, *overrides), CPU)))
        run_logger = stack.enter_context(build_run_logger(session))
        stack.enter_context(mock.patch.object(flags, "host_read", noted))
        if late:
            session.batch_loader.ahead = True
            if isinstance(run_logger, RankZeroLogger):
                run_logger.defers = True
            stack.enter_context(mock.patch.object(step_module, "kind_of", lambda _: "cuda"))
        if trouble is not None:
            stack.enter_context(trouble(session))
        code = train_session(session, run_logger)
        return {"code": code, "step": session.step, "places": places}


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records without what is of this machine."""
    records = read_journal(folder / name)
    return [{key: record[key] for key in record.keys() - TIMES if not key.startswith(("system/", "perf/"))} for record in records]


def assert_same(found: Path, expected: Path) -> None:
    """Journals, kinds of events and every bit of every checkpoint."""
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        assert told(found, name) == told(expected, name)
    kinds = [
        [(event["event"], event.get("step")) for event in read_journal(folder / "events.jsonl") if event["event"] not in BESIDE]
        for folder in (found, expected)
    ]
    assert kinds[0] == kinds[1]
    steps = checkpoint_steps(expected)
    assert checkpoint_steps(found) == steps
    for step in steps:
        ours, theirs = (folder / "checkpoints" / f"step_{step:08d}" for folder in (found, expected))
        assert read_facts(ours)["data_state"] == read_facts(theirs)["data_state"]
        tensors, wanted = read_whole(ours), read_whole(theirs)
        assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("data", ["tokenized", "streamed"])
def test_a_run_writes_the_same(tmp_path: Path, rows: str, data: str, every: int) -> None:
    words = [*WATCHED, f"log.every={every}", "model.mtp_depth=1", *([*STREAMED, rows] if data == "streamed" else [])]
    for name, late in (("cpu", False), ("gpu", True)):
        assert trained(tmp_path / name, words, late)["code"] == 0
    assert_same(tmp_path / "gpu", tmp_path / "cpu")
    assert len(told(tmp_path / "gpu", "metrics.jsonl")) == (8 if every == 1 else 5)


@pytest.mark.parametrize("data", ["tokenized", "streamed"])
def test_ranks_wait_once_a_step(ranks: Any, tmp_path: Path, rows: str, data: str) -> None:
    words = ["parallel.shard=2", "batch.micro=2", "model.mtp_depth=1", *([*STREAMED, rows] if data == "streamed" else [])]
    for name, late in (("cpu", False), ("gpu", True)):
        results = ranks(2, trained, tmp_path / name, words, late)
        assert [result["places"] for result in results] == [["flags, loss and norm"] * 8] * 2
    assert_same(tmp_path / "gpu", tmp_path / "cpu")


def asked_to_stop(step: int) -> Callable[[Session], Any]:
    def trouble(session: Session) -> Any:
        right = session.engine.step

        def asked(*args: Any) -> Any:
            if session.step + 1 == step:
                STOP_REQUESTS.stops.append("SIGTERM")
            return right(*args)

        stack = ExitStack()
        stack.callback(STOP_REQUESTS.clear)
        stack.enter_context(mock.patch.object(session.engine, "step", asked))
        return stack

    return trouble


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, rows: str) -> None:
    words = [*STREAMED, rows, "checkpoint.every=0"]
    assert trained(tmp_path / "straight", words, late=False)["code"] == 0
    stopped = trained(tmp_path / "run", words, True, asked_to_stop(4))
    assert stopped["step"] < 8 and [step for step, _ in losses(tmp_path / "run")] == list(range(1, stopped["step"] + 1))
    assert trained(tmp_path / "run", words, late=True)["step"] == 8
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def broken_at(step: int, error: Exception) -> Callable[[Session], Any]:
    def trouble(session: Session) -> Any:
        right = session.engine.step

        def breaks(*args: Any) -> Any:
            if session.step + 1 == step:
                raise error
            return right(*args)

        return mock.patch.object(session.engine, "step", breaks)

    return trouble


def test_an_error_leaves_the_steps_before_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        trained(tmp_path / "run", [], True, broken_at(6, RuntimeError("out of luck")))
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_device_that_failed_leaves_all_but_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still on the device cannot be had any more, and the error that ended the run is the one that is told."""

    def lost(_: Any) -> Any:
        raise RuntimeError("device-side assert")

    def trouble(session: Session) -> Any:
        stack = ExitStack()
        right = session.engine.step

        def breaks(*args: Any) -> Any:
            if session.step + 1 == 6:
                monkeypatch.setattr("tokenyard.train.logging.step_log.PendingLog.get", lost)
                raise ValueError("illegal memory access")
            return right(*args)

        stack.enter_context(mock.patch.object(session.engine, "step", breaks))
        return stack

    with pytest.raises(ValueError, match="illegal memory access"):
        trained(tmp_path / "run", [], True, trouble)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    assert events_of(tmp_path / "run", "failed")[0]["error"] == "ValueError: illegal memory access"


@pytest.mark.parametrize("policy", ["rollback", "skip", "stop"])
def test_a_step_that_cannot_be_taken(tmp_path: Path, rows: str, policy: str) -> None:
    words = [*STREAMED, rows, f"numerics.on_nan={policy}", "telemetry.every=2"]
    results = [
        trained(tmp_path / name, words, late, lambda session: spoiled_gradient(session, 0, {5: 2}, float("nan"), EXPERT))
        for name, late in (("cpu", False), ("gpu", True))
    ]
    assert [(r["code"], r["step"]) for r in results] == [(70, 4) if policy == "stop" else (0, 8)] * 2
    assert_same(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_stopped_the_run_is_trained_on_when_it_goes_on(tmp_path: Path, rows: str, late: bool) -> None:
    """The state of streamed data in the checkpoint is that of the steps that were taken."""
    words = [*STREAMED, rows, "numerics.on_nan=stop"]
    assert trained(tmp_path / "straight", words, late=False)["code"] == 0
    nan = trained(tmp_path / "run", words, late, lambda session: spoiled_gradient(session, 0, {5: 2}, float("nan"), EXPERT))
    assert nan["step"] == 4
    assert trained(tmp_path / "run", words, late)["step"] == 8
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def unreadable(step: int) -> Callable[[Session], Any]:
    def trouble(session: Session) -> Any:
        right = session.data.train.batch

        def batch(before: int, rows: range) -> Any:
            if before + 1 == step:
                raise OSError("shard 3 is gone")
            return right(before, rows)

        return mock.patch.object(session.data.train, "batch", batch)

    return trouble


def test_rows_that_cannot_be_read_are_told_in_their_own_step(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", [], True, unreadable(5)) | {"places": 0} == {"code": 65, "step": 4, "places": 0}
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4] and checkpoint_steps(tmp_path / "run")[-1] == 4
    (stopped,) = events_of(tmp_path / "run", "stopped")
    assert stopped["reason"] == "step 5: rank 0 could not read the rows"


def test_the_end_of_the_data(tmp_path: Path, rows: str) -> None:
    words = [*STREAMED, rows, "data.repeat=false", "steps=1000", "checkpoint.every=0", "batch.sequences=32"]
    ends = [trained(tmp_path / name, words, late) for name, late in (("cpu", False), ("gpu", True))]
    assert ends[0] == ends[1] and ends[0]["code"] == 0 and 2 < ends[0]["step"] < 1000
    assert_same(tmp_path / "gpu", tmp_path / "cpu")


def test_a_step_is_told_after_the_next_one(tmp_path: Path) -> None:
    there: list[int] = []

    def trouble(session: Session) -> Any:
        right = session.engine.step

        def counts(*args: Any) -> Any:
            there.append(len(losses(tmp_path / "run")))
            return right(*args)

        return mock.patch.object(session.engine, "step", counts)

    trained(tmp_path / "run", ["checkpoint.every=4"], True, trouble)
    assert there == [0, 0, 1, 2, 4, 4, 5, 6], "and before a checkpoint"


def test_a_hang_leaves_what_has_arrived(tmp_path: Path) -> None:
    """The watchdog's thread tells what the thread that hangs can tell no more."""
    found: list[int] = []
    with closing(open_session(configured(tmp_path / "run"), CPU)) as session, build_run_logger(session) as run_logger:
        assert isinstance(run_logger, RankZeroLogger)
        run_logger.defers = True
        right = session.engine.step

        def hangs(*args: Any) -> Any:
            if session.step + 1 == 3:
                found.append(len(losses(tmp_path / "run")))
                run_logger.on_hang("rank 0 hangs")
                found.append(len(losses(tmp_path / "run")))
            return right(*args)

        with mock.patch.object(session.engine, "step", hangs):
            train_session(session, run_logger)
    assert found == [1, 2]


def test_router_metrics_are_computed_in_steps_that_are_logged(tmp_path: Path) -> None:
    calls: list[int] = []

    def trouble(session: Session) -> Any:
        from tokenyard.moe import router

        right = router.compute_router_metrics
        return mock.patch.object(router, "compute_router_metrics", lambda *args: (calls.append(session.step + 1), right(*args))[1])

    trained(tmp_path / "run", ["log.every=3", "telemetry.every=4", "checkpoint.every=0"], False, trouble)
    logged = [3, 4, 6, 8]
    assert sorted(set(calls)) == logged == [step for step, _ in losses(tmp_path / "run")]
    assert [
        (record["step"], record["steps"], record["gauged"]) for record in read_journal(tmp_path / "run" / "telemetry.jsonl")
    ] == [
        (4, 4, 2),
        (8, 4, 2),
    ]


def test_what_follows_a_step_is_known_before(tmp_path: Path) -> None:
    config = configured(tmp_path / "run", "log.every=5", "evaluate.every=4", "checkpoint.every=3", "telemetry.every=7")
    with closing(open_session(config, CPU)) as session:
        expert_stats = ExpertStats(session)
        found = {step: due_after(step, config, expert_stats) for step in range(1, 9)}
    assert [step for step, due in found.items() if due.validate] == [4, 8]
    assert [step for step, due in found.items() if due.save] == [3, 6, 8]
    assert [step for step, due in found.items() if due.log] == [3, 4, 5, 6, 7, 8]


def test_a_batch_is_copied_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for nothing, and the copies not for what computes; that waits for them where the batch is used."""
    double = cuda_double.installed(monkeypatch)
    double.set_device(1)
    config = compose(["steps=3", "batch.sequences=4", "model=tiny"])
    made: list[tuple[int, range]] = []

    def batch(step: int, rows: range) -> Batch:
        made.append((step, rows))
        return Batch(torch.full((len(rows), 8), step), torch.ones(len(rows), 8, dtype=torch.int64))

    data: Any = SimpleNamespace(train=SimpleNamespace(batch=batch, sizes=BatchSizes(4)))
    feed = BatchLoader(config, data, Axis(2, 1, None), 1, SECOND)
    double.calls.clear()
    feed.prepare(1)
    assert made == [(1, range(1, 2)), (1, range(3, 4))]
    copies = [("copy to device", "cuda:1 side")] * 4
    assert double.of("MainThread") == [
        ("record", "cuda:1 default"),
        ("wait_event", "cuda:1 side"),
        *copies,
        ("record", "cuda:1 side"),
    ]
    double.calls.clear()
    first, second = feed.take(1)
    assert (first.first, second.first) == (1, 3) and first.valid == [8]
    assert double.of("MainThread") == [("wait_event", "cuda:1 default"), *[("record_stream", "cuda:1 default")] * 4]
    assert feed.take(2)[0].first == 1 and made[2:] == [(2, range(1, 2)), (2, range(3, 4))]
    feed.prepare(3)
    assert len(made) == 4, "there is no step after the last"
    feed.prepare(1)
    feed.take(0)
    assert feed.take(1) and [step for step, _ in made[4:]] == [1, 1, 0, 0, 1, 1], "rows of a step that is not next are dropped"


def test_time_is_the_devices_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    double = cuda_double.installed(monkeypatch)
    stopwatch = Stopwatch(SECOND)
    with stopwatch.paused():
        pass
    intervals, _, _ = stopwatch.take()
    with stopwatch.paused():
        pass
    assert {call.what for call in double.calls} == {"record"}
    assert len(intervals) == 2 and len(stopwatch.take()[0]) == 2
