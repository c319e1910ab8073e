"""Traces of steps for Perfetto with a summed table, and snapshots of a GPU's memory for pytorch.org/memory_viz, in RUN/profile."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ...parallel.progress import PROGRESS, in_phase
from ..config.complain import say
from ..session import Session

FOLDER = "profile"
ROWS = 60
"""Operators in the table, those with the most time of their own."""
ALLOCATIONS = 200_000
"""Allocations and frees, the newest ones, that a snapshot of memory has, with the stack of each."""

log = logging.getLogger("tokenyard")


class StepProfiler:
    """Profiles this rank, if it is one of profile.ranks. A context manager: at the end a trace that was begun is written."""

    def __init__(self, session: Session) -> None:
        config, mesh = session.config.profile, session.parallel.mesh
        self.session, self.device, self.rank, self.memory = session, session.device, mesh.rank, config.memory
        self.chosen = mesh.rank in config.ranks
        self.span = config.span(session.config.steps) if self.chosen else range(0)
        self.running: profile | None = None
        self.traced: list[int] = []
        """The steps in the trace so far."""

    def __enter__(self) -> "StepProfiler":
        if self.chosen and self.memory and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS, device=self.device)
            _when_out_of_memory(lambda *_: self._write_snapshot("out_of_memory"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.running is not None:
            self._write()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Traces the step inside, if it is one of profile.steps."""
        if step not in self.span:
            yield
            return
        if self.running is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
            self.running = profile(activities=activities, record_shapes=True, profile_memory=self.memory)
            self.running.start()
            PROGRESS.annotated = _annotated
        self.traced.append(step)
        with record_function(f"step {step}"):
            yield

    def after_step(self, step: int, snapshot: bool) -> None:
        """Writes the trace after its last step, and if `snapshot` was asked for, that of the memory."""
        if self.running is not None and step >= self.span[-1]:
            self._write()
        if snapshot and self.chosen and self.device.type == "cuda":
            self._write_snapshot(f"step{step}")
        elif snapshot and self.rank == 0 and self.device.type != "cuda":
            say("a CPU's memory has no snapshots: profile.memory=true with profile.steps counts the bytes of operators")

    def _write(self) -> None:
        """Ends the trace and writes it beside its table. On a GPU this waits for the device."""
        running, steps, self.running, self.span = self.running, self.traced, None, range(0)
        assert running is not None
        PROGRESS.annotated = None
        name = f"rank{self.rank}_step{steps[0]}" + (f"-{steps[-1]}" if len(steps) > 1 else "")
        try:
            with in_phase("profile"):
                running.stop()
                folder = self._folder()
                trace, table = folder / f"{name}.json.gz", folder / f"{name}.txt"
                running.export_chrome_trace(str(trace))
                table.write_text(summed(running.key_averages(), steps, f"rank {self.rank}", self.device.type, self.memory))
        except (OSError, RuntimeError) as error:  # a trace ends no run
            say(f"profile.steps: rank {self.rank} could not write its trace: {error}")
        else:
            log.info("profile: wrote %s, for https://ui.perfetto.dev, and %s", trace, table.name)

    def _write_snapshot(self, name: str) -> None:
        """Writes a pickle for PyTorch's own viewer. Nothing here reads one."""
        try:
            path = self._folder() / f"rank{self.rank}_memory_{name}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
        except (OSError, RuntimeError) as error:
            say(f"rank {self.rank} could not write a snapshot of memory: {error}")
        else:
            say(f"rank {self.rank} wrote {path}, for https://pytorch.org/memory_viz")

    def _folder(self) -> Path:
        folder = self.session.folder / FOLDER
        folder.mkdir(exist_ok=True)
        return folder


def _annotated(kind: str, name: str) -> AbstractContextManager[Any]:
    return record_function(f"{kind}: {name}")


def _when_out_of_memory(observe: Callable[..., None]) -> None:
    """Calls `observe` when an allocation on a GPU has failed, before the error unwinds and frees what was in the way."""
    torch._C._cuda_attach_out_of_memory_observer(observe)  # pyright: ignore[reportAttributeAccessIssue]


def summed(averages: Any, steps: list[int], what: str, device: str, memory: bool) -> str:
    """Returns the table: the phases of a step and what waits in it, as shares of its time, then torch's table of operators."""
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    total = sum(event.cpu_time_total for event in averages if event.key.startswith("step ")) or 1.0
    lines = [
        f"{span} of {what}: {total / len(steps) / 1e6:.4g} s a step on the host while tracing, which is slower than without",
        "",
    ]
    lines += [
        f"{'phase of a step, or wait inside':<52}{'calls':>8}{'host ms':>12}{'share':>8}"
        + (f"{'device ms':>12}" * (device == "cuda"))
    ]
    for kind in ("phase: ", "wait: "):
        found = [event for event in averages if event.key.startswith(kind)]
        for event in sorted(found, key=lambda event: -event.cpu_time_total):
            milliseconds = event.cpu_time_total / len(steps) / 1e3
            on_device = f"{event.device_time_total / len(steps) / 1e3:>12.3f}" if device == "cuda" else ""
            calls = event.count / len(steps)
            lines += [f"{event.key:<52.52}{calls:>8.3g}{milliseconds:>12.3f}{event.cpu_time_total / total:>8.1%}{on_device}"]
    kinds = ("self_device_time_total" if device == "cuda" else "self_cpu_time_total", "self_cpu_memory_usage")
    tables = [averages.table(sort_by=kind, row_limit=ROWS, max_name_column_width=60) for kind in kinds[: 1 + memory]]
    return "\n".join([*lines, "", *tables])
