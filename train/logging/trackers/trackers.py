"""Trackers are views of metrics.jsonl for people. Whatever one of them does, training neither stops nor waits for it."""

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from time import monotonic, sleep
from typing import Any

from ...config.config import TrackerConfig
from ...config.private_files import write_private
from ..journal import Journal
from .base import AbstractTracker


def build_trackers(
    config: TrackerConfig,
    run_dir: Path,
    run_id: str,
    run_name: str | None = None,
    say: Callable[[str], None] = print,
    events: Journal | None = None,
) -> "Trackers":
    """The trackers of `config.names`; only rank 0 may call it.

    `run_id`: see `run_identity`. `run_name`: run.name. `say` prints the one line about a failure, `events` keeps it.
    """
    trackers: list[AbstractTracker] = []
    for name in config.names:
        match name:
            case "wandb":
                from .wandb_tracker import WandbTracker

                trackers.append(WandbTracker(config, run_dir, run_id, run_name))
            case "tensorboard":
                from .tensorboard_tracker import TensorboardTracker

                trackers.append(TensorboardTracker(run_dir))
            case "trackio":
                from .trackio_tracker import TrackioTracker

                trackers.append(TrackioTracker(config, run_dir, run_id, run_name))
            case "jsonl" | "none":
                pass  # metrics.jsonl is written with or without trackers
    return Trackers(trackers, say, events)


def run_identity(run_dir: Path, resumed: bool) -> str:
    """The id under which trackers know the run, kept in `run_dir`/run_id: the same after a resume, else a new one.

    Not drawn from any seeded generator, as runs with the same seed are different runs.
    """
    path = run_dir / "run_id"
    if not (resumed and path.exists()):
        write_private(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


class Trackers:
    """All trackers of the run, each behind its own thread and queue of `capacity` records.

    A tracker that raises is reported once; one that is too slow loses records, which `finish` counts; one whose `start` failed is
    left alone from then on.
    """

    def __init__(
        self,
        trackers: list[AbstractTracker],
        say: Callable[[str], None] = print,
        events: Journal | None = None,
        capacity: int = 1000,
        patience: float = 60.0,
    ):
        """`patience`: seconds that `finish` waits for all of them together."""
        self._workers = [_TrackerThread(tracker, capacity) for tracker in trackers]
        self._say, self._events, self._patience = say, events, patience

    def start(self, facts: Mapping[str, Any]) -> None:
        """Returns at once; the trackers start beside the run."""
        for worker in self._workers:
            worker.offer(worker.start, facts)

    def ready(self, patience: float) -> list[str]:
        """Waits until all have started, for `patience` seconds at most; the names of those that have not."""
        deadline = monotonic() + patience
        while monotonic() < deadline and any(not worker.started and worker.error is None for worker in self._workers):
            sleep(0.02)
        for worker in self._workers:
            self._report(worker)
        return [worker.name for worker in self._workers if not worker.started]

    def log(self, record: Mapping[str, Any]) -> None:
        """Returns at once. The record is copied, so the caller may change it."""
        for worker in self._workers:
            worker.offer(worker.log, dict(record))
            self._report(worker)

    def telemetry(self, record: Mapping[str, Any]) -> None:
        """Returns at once, as do the next two. The caller leaves the record as it is."""
        for worker in self._workers:
            worker.offer(worker.telemetry, record)

    def alert(self, kind: str, title: str, text: str) -> None:
        for worker in self._workers:
            worker.offer(worker.alert, kind, title, text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        for worker in self._workers:
            worker.offer(worker.sample, step, prompt, text)

    def finish(self, exit_code: int = 0, summary: Mapping[str, Any] | None = None, patience: float | None = None) -> None:
        """Waits until the trackers have taken all records, but no longer than `patience`, by default that of all."""
        deadline = monotonic() + (self._patience if patience is None else patience)
        for worker in self._workers:
            done = worker.close(deadline, exit_code, dict(summary or {}))
            self._report(worker)
            self._report_losses(worker, done)

    def _report(self, worker: "_TrackerThread") -> None:
        """Say what failed first, once. From the main thread, so that lines of the console do not mix."""
        if worker.error is None or worker.reported:
            return
        worker.reported = True
        self._say(f"tracker {worker.name} failed: {worker.error}; training goes on, metrics.jsonl has all records")
        self._event("tracker_failed", tracker=worker.name, error=worker.error)

    def _report_losses(self, worker: "_TrackerThread", done: bool) -> None:
        missed = worker.offered - worker.delivered
        if done and not missed:
            return
        end = "" if done else f" and it did not finish within {self._patience:g} s"
        self._say(f"tracker {worker.name} missed {missed} of {worker.offered} records{end}; metrics.jsonl has all")
        self._event("tracker_incomplete", tracker=worker.name, missed=missed, records=worker.offered, finished=done)

    def _event(self, kind: str, **facts: Any) -> None:
        if self._events is not None:
            self._events.event(kind, **facts)


class _TrackerThread:
    """A thread that hands one tracker its calls, in order."""

    def __init__(self, tracker: AbstractTracker, capacity: int):
        self.name = tracker.name
        self.tracker = tracker
        self.queue: Queue = Queue(capacity)
        self.error: str | None = None
        self.reported = False
        self.started = False
        self.offered = 0  # records, written by the main thread only
        self.delivered = 0  # records, written by the worker only
        self._thread = Thread(target=self._run, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def offer(self, call: Callable, *arguments: Any) -> None:
        """Queue a call, or drop it if the queue is full."""
        self.offered += call == self.log
        with suppress(Full):
            self.queue.put_nowait((call, arguments))

    def close(self, deadline: float, exit_code: int, summary: dict[str, Any]) -> bool:
        """Queue `finish` behind all else and wait for it until `deadline`; False if that came first."""
        try:
            self.queue.put((self.finish, (exit_code, summary)), timeout=max(0.0, deadline - monotonic()))
            self.queue.put(None, timeout=max(0.0, deadline - monotonic()))
        except Full:
            return False
        self._thread.join(max(0.0, deadline - monotonic()))
        return not self._thread.is_alive()

    def start(self, facts: Mapping[str, Any]) -> None:
        self.tracker.start(facts)
        self.started = True

    def log(self, record: dict[str, Any]) -> None:
        if self.started:
            self.tracker.log(record)
            self.delivered += 1

    def telemetry(self, record: Mapping[str, Any]) -> None:
        if self.started:
            self.tracker.telemetry(record)

    def alert(self, kind: str, title: str, text: str) -> None:
        if self.started:
            self.tracker.alert(kind, title, text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        if self.started:
            self.tracker.sample(step, prompt, text)

    def finish(self, exit_code: int, summary: dict[str, Any]) -> None:
        if self.started:
            self.tracker.finish(exit_code, summary)

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            call, arguments = item
            try:
                call(*arguments)
            except BaseException as error:  # also SystemExit: libraries use it, and it may not end this thread
                self.error = self.error or " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
