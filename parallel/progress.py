"""What this rank is doing now, for the watchdog's reports of hangs, and the time it spends waiting in collectives.

One record for the process, since one training loop runs in it. The training thread writes it, the watchdog's thread reads it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from .mesh import Axis


class Progress:
    """The position of the training thread."""

    def __init__(self) -> None:
        self.step = 0
        """The current optimizer step; the first is 1."""
        self.phase = "start"
        self.layer: int | None = None
        """The block whose forward or backward pass is running, or ran last."""
        self.collective: str | None = None
        """The collective that this rank has started and not completed."""
        self.last = "none"
        """The collective that it started last."""
        self.number = 0
        """How many collectives it has started. All ranks of a stage start the same ones, so one of them with fewer is behind."""
        self.neighbour: int | None = None
        """The rank of another stage that it waits for: for a message, or until that rank has taken one."""
        self.passes = 0
        """How many forward and backward passes through stages of a pipeline it has begun."""
        self.in_schedule = False
        """Whether it runs the schedule of a pipeline, in which stages are at different places rightly."""
        self.since = monotonic()
        """When any of these last changed, or `progress` was last called."""
        self.waited = 0.0
        """Seconds spent in collectives and waiting for the device."""
        self.annotated: Callable[[str, str], AbstractContextManager[Any]] | None = None
        """While a step is traced: wraps a phase or a wait, by its kind and name."""
        self.waited_for_device = 0.0
        """Those of them in which the host waited for the device."""


PROGRESS = Progress()

Check = Callable[[str, Axis, list[int] | None, list[int] | None], None]
_checks: list[Check] = []
"""Called before each collective; see collective_check.py."""


@contextmanager
def in_phase(phase: str) -> Iterator[None]:
    """Context manager or decorator: sets the phase of the step."""
    before, PROGRESS.phase, PROGRESS.layer, PROGRESS.since = PROGRESS.phase, phase, None, monotonic()
    with nullcontext() if PROGRESS.annotated is None else PROGRESS.annotated("phase", phase):
        yield
    # Not after an error, so that reports show where it happened.
    PROGRESS.phase, PROGRESS.layer, PROGRESS.since = before, None, monotonic()


def collective(
    name: str, axis: Axis, send: list[int] | None = None, receive: list[int] | None = None
) -> AbstractContextManager[None]:
    """Wraps a collective, or its start. `send` and `receive` are the rows for and from each rank, if they are uneven."""
    if torch.compiler.is_compiling():  # compiled code may have no side effects
        return nullcontext()
    for check in _checks:
        check(name, axis, send, receive)
    PROGRESS.number, PROGRESS.last = PROGRESS.number + 1, f"{name} over {axis.size} ranks"
    return waiting(PROGRESS.last)


@contextmanager
def waiting(what: str, neighbour: int | None = None) -> Iterator[None]:
    """Wraps code that waits for other ranks; for the message of one of them, `neighbour` is that rank."""
    outer, PROGRESS.collective, PROGRESS.since = PROGRESS.collective, what, monotonic()
    begin, PROGRESS.neighbour = PROGRESS.since, neighbour
    with nullcontext() if PROGRESS.annotated is None else PROGRESS.annotated("wait", what):
        yield
    PROGRESS.collective, PROGRESS.neighbour, PROGRESS.since = outer, None, monotonic()
    PROGRESS.waited += PROGRESS.since - begin


def progress() -> None:
    """Tells the watchdog that this is no hang: all ranks have just answered, though the training thread still waits."""
    PROGRESS.since = monotonic()


@contextmanager
def waiting_for_device() -> Iterator[None]:
    """Wraps a host read from a GPU, which may still be in a collective that the host has already passed."""
    before = PROGRESS.waited
    with waiting(f"{PROGRESS.last} or what follows it on the device"):
        yield
    PROGRESS.waited_for_device += PROGRESS.waited - before


def check_before_collectives(check: Check | None) -> None:
    """Calls `check` before each collective from now on; None removes it."""
    _checks[:] = [] if check is None else [check]


def name_layers(blocks: Iterable[tuple[int, nn.Module]]) -> None:
    """Registers hooks that set `PROGRESS.layer` when the forward or backward pass of a block (with its index) begins."""
    for index, block in blocks:
        block.register_forward_pre_hook(_enters(index))
        block.register_forward_hook(_enters_backward(index))


def _enters(index: int) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        PROGRESS.layer, PROGRESS.since = index, monotonic()

    return enter


def _enters_backward(index: int) -> Callable[..., None]:
    """The backward pass of a block begins when the gradient of its output is computed."""
    enter = _enters(index)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda _: enter())

    return leave
