"""What this rank does at this moment: the hang guard may have to tell, and time in collectives is time spent waiting for others.

One record for the process, as one training loop runs in it. The thread that trains writes it, the watchdog's thread reads it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from .mesh import Axis


class Progress:
    """Where the thread that trains is."""

    def __init__(self) -> None:
        self.step = 0
        """The optimizer step under way; the first is 1."""
        self.phase = "start"
        self.layer: int | None = None
        """The block whose forward or backward pass runs, or ran last."""
        self.collective: str | None = None
        """The one that was begun and has not ended."""
        self.last = "none"
        """The collective begun last."""
        self.number = 0
        """Collectives begun. Ranks begin the same ones, so a rank with fewer is behind."""
        self.since = monotonic()
        """When any of these last changed, or when `progress` was seen."""
        self.waited = 0.0
        """Seconds in collectives, all in all."""


PROGRESS = Progress()

Check = Callable[[str, Axis, list[int] | None, list[int] | None], None]
_checks: list[Check] = []
"""What is called before each collective; see collective_check.py."""


@contextmanager
def in_phase(phase: str) -> Iterator[None]:
    """`with` or decorator: what runs inside is this phase of the step."""
    before, PROGRESS.phase, PROGRESS.layer, PROGRESS.since = PROGRESS.phase, phase, None, monotonic()
    yield
    # Not after an error: where it was is what one wants to know.
    PROGRESS.phase, PROGRESS.layer, PROGRESS.since = before, None, monotonic()


def collective(
    name: str, axis: Axis, send: list[int] | None = None, receive: list[int] | None = None
) -> AbstractContextManager[None]:
    """Around a collective, or around the start of one. `send`, `receive`: the rows for and of each rank, if they are uneven."""
    if torch.compiler.is_compiling():  # compiled code may have no side effects
        return nullcontext()
    for check in _checks:
        check(name, axis, send, receive)
    PROGRESS.number, PROGRESS.last = PROGRESS.number + 1, f"{name} over {axis.size} ranks"
    return waiting(PROGRESS.last)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """For other ranks."""
    outer, PROGRESS.collective, PROGRESS.since = PROGRESS.collective, what, monotonic()
    begin = PROGRESS.since
    yield
    PROGRESS.collective, PROGRESS.since = outer, monotonic()
    PROGRESS.waited += PROGRESS.since - begin


def progress() -> None:
    """All ranks have just answered, and the thread that trains goes on waiting for what is under way: that is no hang."""
    PROGRESS.since = monotonic()


def waiting_for_device() -> AbstractContextManager[None]:
    """Around what the host reads of a GPU, which may be in a collective that the host has left behind."""
    return waiting(f"{PROGRESS.last} or what follows it on the device")


def check_before_collectives(check: Check | None) -> None:
    """Call `check` before each collective from now on; None: nothing."""
    _checks[:] = [] if check is None else [check]


def name_layers(blocks: Iterable[nn.Module]) -> None:
    """Let each block say when its forward pass begins and when its backward pass does."""
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(_enters(index))
        block.register_forward_hook(_enters_backward(index))


def _enters(index: int) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        PROGRESS.layer, PROGRESS.since = index, monotonic()

    return enter


def _enters_backward(index: int) -> Callable[..., None]:
    """The gradient of a block's output is there when its own backward pass begins."""
    enter = _enters(index)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(lambda _: enter())

    return leave
