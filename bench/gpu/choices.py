"""The routers' choices of one run, kept, and made again in another run.

Which experts a token chooses jumps where two are nearly equal, and everything after that would differ. So a run in another
precision is given the choices of the first one, and what it would have chosen itself is compared with these.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...moe import router
from ...moe.config import Selection
from ...moe.scoring import ChosenExperts

DECIDING = ("choose_experts", "keep_best", "sample_second_expert")
"""Functions of moe/router.py that go by the order of scores."""


@dataclass
class ChoiceLog:
    """In the order in which they were made."""

    made: dict[str, list[Any]] = field(default_factory=dict)
    compared: int = 0
    """Choices of tokens, in runs that were given these."""
    other: int = 0
    """Of them, what that run would have chosen otherwise."""
    gap: float = 0.0
    """By how much the scores differed there, at most, as a share of the deviation of a token's scores."""

    @property
    def share(self) -> float:
        return self.other / max(1, self.compared)


@contextmanager
def kept(choices: ChoiceLog) -> Iterator[None]:
    """Inside, what the routers decide goes into `choices`."""

    def keeping(name: str, decide: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            decided = decide(*args)
            choices.made.setdefault(name, []).append(decided)
            return decided

        return call

    with _replaced(keeping):
        yield


@contextmanager
def again(choices: ChoiceLog) -> Iterator[None]:
    """Inside, the routers decide as in `choices`, and what they would have decided themselves is compared."""
    turn = {name: iter(made) for name, made in choices.made.items()}

    def repeating(name: str, decide: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            own, given = decide(*args), next(turn[name])
            if isinstance(own, ChosenExperts):
                there = own.experts_BSK.device
                mask_BSK = None if given.mask_BSK is None else given.mask_BSK.to(there)
                given = ChosenExperts(given.experts_BSK.to(there), mask_BSK)
                priced = args[2].router.selection is Selection.sinkhorn
                _compare_choices(choices, own, given, args[0].detach(), args[1], priced)
                return given
            given = given.to(own.device)
            _count(choices, own != given)
            return given

        return call

    with _replaced(repeating):
        yield


@contextmanager
def _replaced(make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in DECIDING:
            stack.enter_context(patch.object(router, name, make(name, getattr(router, name))))
        yield


def _compare_choices(
    choices: ChoiceLog, own: ChosenExperts, given: ChosenExperts, ranked_BSE: Tensor, valid_BS: Tensor | None, priced: bool
) -> None:
    """`priced`: what is ranked is not `ranked_BSE` alone, so that only the number is known."""
    if own.mask_BSK is not None and given.mask_BSK is not None:
        _count(choices, own.mask_BSK != given.mask_BSK)
        return
    ours, theirs = (one.experts_BSK.sort(dim=-1).values for one in (own, given))
    other_BS = (ours != theirs).any(-1)
    if valid_BS is not None:
        other_BS = other_BS & valid_BS
    _count(choices, other_BS)
    if other_BS.any() and not priced:
        worth = [ranked_BSE.gather(-1, one.experts_BSK).sum(-1) for one in (own, given)]
        finite = ranked_BSE.isfinite()
        deviation_BS = ranked_BSE.where(finite, ranked_BSE.where(finite, torch.inf).amin(-1, keepdim=True)).std(-1)
        gap_BS = ((worth[0] - worth[1]) / deviation_BS.clamp(min=1e-30))[other_BS]
        choices.gap = max(choices.gap, float(gap_BS.max()))


def _count(choices: ChoiceLog, other: Tensor) -> None:
    choices.compared += other.numel()
    choices.other += int(other.sum())
