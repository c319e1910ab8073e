"""The parts of `make gpu`, and their runner: a separate process, replaced if a part fails, crashes or is too slow. Needs no
torch."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from time import monotonic
from typing import IO, Any, NamedTuple


class Part(NamedTuple):
    name: str
    about: str
    module: str
    """The module of this package whose function `run` takes a Recorder."""
    seconds: float
    """Time limit."""
    group: str = "correctness"


PARTS = (
    Part("machine", "what this runs on", "machine", 90, "machine"),
    Part("products", "grouped products and activations, with empty, unaligned and single-row groups", "products", 40),
    Part("fused", "each Triton kernel against the code that it replaces, and against the bytes that it must move", "fused", 40),
    Part("presets", "every tiny model: forward, losses, gradients and three steps", "presets", 100),
    Part("routers", "every router, selection and capacity, the same way", "routers", 60),
    Part("exchanges", "NCCL with a world of one: collectives, FSDP2 and each exchange", "exchanges", 40),
    Part("waits", "where the host waits for the device", "waits", 60),
    Part("saves", "resume bit for bit, and an asynchronous save against a synchronous one", "saves", 60),
    Part("layouts", "two GPUs: each layout of two against one process", "layouts", 60),
    Part("layers", "forward and backward of MoE layers of known models", "layers", 110, "speed"),
    Part("attentions", "forward and backward of the attention of known models", "attentions", 40, "speed"),
    Part("steps", "whole training steps", "steps", 70, "speed"),
    Part("kernels", "where the time and the memory of a step go", "kernels", 50, "time"),
    Part("compile", "torch.compile on and off", "compiling", 70),
    Part("command", "tokenyard train, killed and resumed", "command", 60),
    Part("trainer", "tokenyard train of a larger model, against the bare step", "trainer", 80, "speed"),
)
TINY_FACTOR = 5.0
"""Factor of the time limits on a CPU."""
BY_NAME = {part.name: part for part in PARTS}
TOTAL_SECONDS = 465.0
"""Limit for all parts together; the rest of 8 minutes is for starting and reporting."""

LEAST_SECONDS = 3.0
"""A part that would have less time is skipped."""
LONGEST_LOG = 6000
"""Characters."""
Record = dict[str, Any]


class Runner:
    """`deadline` is the end of the whole run, by `time.monotonic`."""

    def __init__(self, device: str, scale: str, deadline: float) -> None:
        self.words = [device, scale]
        self.deadline = deadline
        self._worker: _Worker | None = None

    def run(self, part: Part) -> Iterator[Record]:
        """Yields the records of the part as they arrive; the last record has its duration."""
        begin = monotonic()
        limit = min(part.seconds, self.deadline - begin)
        if limit < LEAST_SECONDS:
            yield {"kind": "skip", "name": part.name, "text": "no time was left"}
        else:
            yield from self._asked(part, begin + limit, limit)
        yield {"kind": "took", "seconds": monotonic() - begin}

    def _asked(self, part: Part, end: float, limit: float) -> Iterator[Record]:
        if self._worker is None:
            self._worker = _Worker(self.words)
        worker = self._worker
        whole = stays = False
        for record in worker.ask(part.name, end):
            if record["kind"] == "end":
                whole, stays = True, record["stays"]
                break
            yield record
        if stays:
            return
        late = monotonic() >= end
        self.close()
        if not whole:
            why = f"took longer than {limit:.0f} s" if late else f"ended its process ({worker.ending()})"
            yield {"kind": "check", "name": f"{part.name} came to its end", "ok": False, "text": f"it {why}"}
        yield {"kind": "log", "text": worker.log}

    def close(self) -> None:
        """Kill the process and its children."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


class _Worker:
    """The worker process. After `kill`, `log` has the end of its standard error."""

    log = ""

    def __init__(self, words: list[str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def ask(self, part: str, end: float) -> Iterator[Record]:
        """Yields the records of the part until `end`, or until the process exits."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"part": part, "seconds": end - monotonic()}).encode() + b"\n")
            self._process.stdin.flush()
        for line in _lines(self._process.stdout, end):
            yield json.loads(line)

    def kill(self) -> None:
        """Kill the process and its children, and keep the end of its standard error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process, self._errors:  # waits, and closes the pipes
            self._errors.seek(0)
            self.log = self._errors.read().decode(errors="replace").strip()[-LONGEST_LOG:]

    def ending(self) -> str:
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _lines(pipe: IO[bytes], end: float) -> Iterator[bytes]:
    """Yields whole lines until the pipe is closed or the time is over."""
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := end - monotonic()) > 0 and selector.select(left):
            found = os.read(pipe.fileno(), 2**16)
            if not found:
                return
            *whole, held = (held + found).split(b"\n")
            yield from whole
