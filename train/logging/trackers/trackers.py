"""Trackers show metrics.jsonl to people. Training neither stops nor waits for any of them, whatever it does."""

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from time import monotonic, sleep
from typing import Any

from ...config.config import TrackerConfig
from ...config.own_files import write_whole
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
    """Returns the trackers of `config.names`; only rank 0 may call it.

    `run_id`: see `run_identity`. `run_name`: run.name. `say` prints the one line about a failure, `events` records it.
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
    """Returns the id under which trackers know the run, stored in `run_dir`/run_id: the same after a resume, else a new one.

    It is not drawn from a seeded generator, because runs with the same seed are different runs.
    """
    path = run_dir / "run_id"
    if not (resumed and path.exists()):
        write_whole(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


class Trackers(AbstractTracker):
    """All trackers of a run, each behind its own thread and a queue of `capacity` calls; every call but `finish` returns at once.

    A tracker that raises is reported once; one that is too slow loses records, which `finish` counts; one that could not start gets
    no further calls.
    """

    name = "all"

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
        self._call("start", facts)

    def wait_for_start(self, patience: float) -> list[str]:
        """Waits until all have started, for `patience` seconds at most. Returns the names of those that have not."""
        deadline = monotonic() + patience
        while monotonic() < deadline and any(not worker.started and worker.error is None for worker in self._workers):
            sleep(0.02)
        for worker in self._workers:
            self._report(worker)
        return [worker.tracker.name for worker in self._workers if not worker.started]

    def log(self, record: Mapping[str, Any]) -> None:
        """Copies the record, so the caller may change it."""
        self._call("log", dict(record))
        for worker in self._workers:
            self._report(worker)

    def telemetry(self, record: Mapping[str, Any]) -> None:
        """Does not copy the record: the caller must not change it."""
        self._call("telemetry", record)

    def alert(self, kind: str, text: str) -> None:
        self._call("alert", kind, text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._call("sample", step, prompt, text)

    def console(self, text: str) -> None:
        self._call("console", text)

    def finish(self, exit_code: int = 0, summary: Mapping[str, Any] | None = None, patience: float | None = None) -> None:
        """Waits until the trackers have taken all records, for `patience` seconds at most."""
        deadline = monotonic() + (self._patience if patience is None else patience)
        for worker in self._workers:
            done = worker.finish(deadline, exit_code, dict(summary or {}))
            self._report(worker)
            missed = worker.offered - worker.delivered
            if missed or not done:
                end = "" if done else f" and it did not finish within {self._patience:g} s"
                name = worker.tracker.name
                self._say(f"tracker {name} missed {missed} of {worker.offered} records{end}; metrics.jsonl has all")
                self._event("tracker_incomplete", tracker=name, missed=missed, records=worker.offered, finished=done)
            if done and worker.started and (hint := worker.tracker.hint()):
                self._say(hint)

    def _call(self, method: str, *arguments: Any) -> None:
        for worker in self._workers:
            worker.offer(method, *arguments)

    def _report(self, worker: "_TrackerThread") -> None:
        """Reports the first error of a tracker, once. Called from the main thread, so that lines on the console do not mix."""
        if worker.error is None or worker.reported:
            return
        worker.reported = True
        name = worker.tracker.name
        self._say(f"tracker {name} failed: {worker.error}; training goes on, metrics.jsonl has all records")
        self._event("tracker_failed", tracker=name, error=worker.error)

    def _event(self, kind: str, **facts: Any) -> None:
        if self._events is not None:
            self._events.event(kind, **facts)


class _TrackerThread:
    """A thread that makes the calls to one tracker, in order."""

    def __init__(self, tracker: AbstractTracker, capacity: int):
        self.tracker = tracker
        self.queue: Queue = Queue(capacity)
        self.error: str | None = None
        self.reported = False
        self.started = False
        self.offered = 0  # records, written by the main thread only
        self.delivered = 0  # records, written by the worker only
        self._thread = Thread(target=self._run, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def offer(self, method: str, *arguments: Any) -> None:
        """Queues a call, or drops it if the queue is full."""
        self.offered += method == "log"
        with suppress(Full):
            self.queue.put_nowait((method, arguments))

    def finish(self, deadline: float, exit_code: int, summary: dict[str, Any]) -> bool:
        """Queues `finish` behind all other calls and waits for it. Returns False if `deadline` passes before."""
        try:
            self.queue.put(("finish", (exit_code, summary)), timeout=max(0.0, deadline - monotonic()))
            self.queue.put(None, timeout=max(0.0, deadline - monotonic()))
        except Full:
            return False
        self._thread.join(max(0.0, deadline - monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            method, arguments = item
            if method != "start" and not self.started:
                continue
            try:
                getattr(self.tracker, method)(*arguments)
                self.started |= method == "start"
                self.delivered += method == "log"
            except BaseException as error:  # also SystemExit: libraries raise it, and it must not end this thread
                self.error = self.error or " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
