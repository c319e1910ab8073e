"""Two passes side by side: the exchanges of one micro-batch travel while another micro-batch computes (as in DualPipe,
DeepSeek-V3, section 3.2.1, without a second copy of the weights).

Each pass has a thread, and one of them runs at a time. A pass hands over to the other where it would wait for an exchange that it
has started, and goes on when the other does the same or ends. So exchanges overlap with the one stream that computes. These places
follow from the layers and not from the data, so all ranks of a group come to their collectives in one order.
"""

from collections.abc import Callable
from contextlib import ExitStack
from threading import Condition, Thread
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..progress import PROGRESS
from ..streams import enter_thread

Attribute = tuple[Any, str]
"""An object and the name of an attribute."""


class Overlap:
    """Runs two passes at a time. `of_pass`: what holds for the pass that runs, so that each has a value of its own."""

    def __init__(self, device: torch.device, of_pass: list[Attribute]) -> None:
        self.device = device
        self.of_pass = [(PROGRESS, name) for name in ("phase", "layer", "collective")] + of_pass

    def run(self, one: Callable[[], None], other: Callable[[], None]) -> None:
        """Runs both: `one` begins, in this thread. If one of them raises an error, the other ends, and the error is raised."""
        global _pair
        assert _pair is None
        _pair = pair = _Pair(self.of_pass)
        modes = _get_current_dispatch_mode_stack()

        def beside() -> None:
            enter_thread(self.device)
            with ExitStack() as stack:
                for mode in modes:  # of a dry run: they belong to a thread
                    stack.enter_context(mode)
                other()

        thread = Thread(target=pair.run, args=(1, beside), name="overlap", daemon=True)
        try:
            thread.start()
            pair.run(0, one)
            thread.join()
        finally:
            _pair = None
        if pair.error is not None:
            raise pair.error


def exchange_started() -> None:
    """Must be called when an exchange has been started that `hand_over` may let travel."""
    if _pair is not None:
        _pair.started[_pair.running] = True


def hand_over() -> None:
    """Lets the other pass run, if there is one and this one has started an exchange since it last did so."""
    if _pair is not None and _pair.started[_pair.running]:
        _pair.hand_over()


def in_other_pass(holder: Any, name: str) -> Any:
    """Returns the value that an attribute of `of_pass` has in the pass that waits; None if no two passes run."""
    return None if _pair is None else _pair.values[_pair.of_pass.index((holder, name))]


class _Ended(Exception):
    """The other pass has raised an error."""


class _Pair:
    """Two passes, 0 and 1. The pass that runs is known by `running` and not by its thread: autograd has threads of its own."""

    def __init__(self, of_pass: list[Attribute]) -> None:
        self.of_pass = of_pass
        self.running = 0
        self.started = [False, False]
        self.ended = [False, False]
        self.error: BaseException | None = None
        self.values = self._now()
        """Those of the pass that does not run."""
        self._turn = Condition()

    def run(self, mine: int, work: Callable[[], None]) -> None:
        """Runs `work` as the pass `mine`, when it is its turn."""
        try:
            self._wait_for(mine)
            work()
        except BaseException as error:
            with self._turn:
                self.error = self.error or error  # nothing is swapped: reports show where it happened
                self._turn.notify_all()
        else:
            self.ended[mine] = True
            self._pass_on()

    def hand_over(self) -> None:
        mine = self.running
        self.started[mine] = False
        if not self.ended[1 - mine]:
            self._pass_on()
            self._wait_for(mine)

    def _pass_on(self) -> None:
        with self._turn:
            if not self.ended[1 - self.running] and self.error is None:
                now, self.running = self._now(), 1 - self.running
                for (holder, name), value in zip(self.of_pass, self.values, strict=True):
                    setattr(holder, name, value)
                self.values = now
            self._turn.notify_all()

    def _wait_for(self, mine: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self.running == mine or self.error is not None)
        if self.error is not None:
            raise _Ended

    def _now(self) -> list[Any]:
        return [getattr(holder, name) for holder, name in self.of_pass]


_pair: _Pair | None = None
"""The passes that run now."""
