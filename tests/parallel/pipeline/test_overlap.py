"""Two passes take turns at their exchanges, each with its own attributes; an error of one ends both."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tokenyard.parallel.pipeline.overlap import Overlap, exchange_started, hand_over, in_other_pass
from tokenyard.parallel.progress import PROGRESS, in_phase

CPU = torch.device("cpu")


def of_exchanges(name: str, exchanges: int, said: list[str]) -> Callable[[], None]:
    def work() -> None:
        with in_phase(name):
            for exchange in range(exchanges):
                exchange_started()
                hand_over()
                said.append(f"{PROGRESS.phase} {exchange}")
                hand_over()  # at another collective of the same exchange
                said.append("goes on")

    return work


def test_passes_take_turns_and_each_has_its_phase() -> None:
    said: list[str] = []
    before, threads = PROGRESS.phase, threading.active_count()
    Overlap(CPU, []).run(of_exchanges("forward", 2, said), of_exchanges("backward", 4, said))
    assert said[::2] == ["forward 0", "backward 0", "forward 1", "backward 1", "backward 2", "backward 3"]
    assert said[1::2] == 6 * ["goes on"]
    assert (PROGRESS.phase, threading.active_count()) == (before, threads)
    hand_over()  # outside of a pair it is nothing


def test_each_pass_has_its_own_attributes() -> None:
    module = SimpleNamespace(state="idle")
    seen: list[tuple[str, str]] = []

    def work(state: str) -> Callable[[], None]:
        def run() -> None:
            seen.append((module.state, in_other_pass(module, "state")))
            module.state = state
            exchange_started()
            hand_over()
            seen.append((module.state, in_other_pass(module, "state")))
            module.state = "idle"

        return run

    Overlap(CPU, [(module, "state")]).run(work("forward"), work("backward"))
    assert seen == [("idle", "idle"), ("idle", "forward"), ("forward", "backward"), ("backward", "idle")]
    assert module.state == "idle" and in_other_pass(module, "state") is None


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("exchanges", [0, 1])
def test_an_error_of_one_pass_ends_both(failing: int, exchanges: int) -> None:
    """The other pass waits for its turn, or has not begun; the phase stays that of the error."""
    ended: list[int] = []

    def fail() -> None:
        with in_phase("fails"):
            of_exchanges("exchange", exchanges, [])()
            raise ArithmeticError("made up")

    def go_on() -> None:
        of_exchanges("goes on", 5, [])()
        ended.append(1)

    before = PROGRESS.phase
    passes = [fail, go_on] if failing == 0 else [go_on, fail]
    with pytest.raises(ArithmeticError, match="made up"):
        Overlap(CPU, []).run(*passes)
    assert not ended and PROGRESS.phase == "fails"
    PROGRESS.phase = before
    said: list[str] = []
    Overlap(CPU, []).run(of_exchanges("forward", 1, said), of_exchanges("backward", 1, said))
    assert said[::2] == ["forward 0", "backward 0"]


def test_a_backward_pass_hands_over_inside_of_autograd() -> None:
    """In the second thread, in the place where a gradient is made."""
    said: list[str] = []

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            exchange_started()
            hand_over()
            said.append("backward")
            return grads[0]

    x = torch.ones(3, requires_grad=True)
    loss = Exchange.apply(Exchange.apply(x)).sum()  # pyright: ignore[reportOptionalMemberAccess]
    Overlap(CPU, []).run(of_exchanges("forward", 3, said), lambda: torch.autograd.backward(loss))
    assert [each for each in said if each != "goes on"] == ["forward 0", "backward", "forward 1", "backward", "forward 2"]
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 1.0]
