"""Records the routers' choices of one run and replays them in another run.

The choice of experts is discontinuous where two scores are nearly equal, and one other choice changes all later numbers. So a run
in another precision gets the choices of the first run, and the choices that it would have made are compared with them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...moe import router
from ...moe.config import MoEConfig, Selection
from ...moe.kernel_router import KernelRouting
from ...moe.scoring import ChosenExperts, to_scores

DECIDING = ("choose_experts", "route", "keep_best", "sample_second_expert")
"""The functions of moe/router.py whose result depends on the order of scores. With kernels `route` replaces `choose_experts`."""


@dataclass
class ChoiceLog:
    """The choices of a run in the order in which they were made, and how a replaying run differs."""

    made: dict[str, list[Any]] = field(default_factory=dict)
    compared: int = 0
    """Choices of tokens in the replaying run."""
    different: int = 0
    """Those that the replaying run would have made differently."""
    gap: float = 0.0
    """The largest difference of the scores there, relative to the standard deviation of a token's scores."""

    @property
    def share(self) -> float:
        return self.different / max(1, self.compared)


@contextmanager
def record_choices(choices: ChoiceLog) -> Iterator[None]:
    """Records the routers' decisions inside the block in `choices`."""

    def recording(name: str, decide: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            decided = decide(*args)
            if isinstance(decided, KernelRouting):
                choices.made.setdefault("choose_experts", []).append(ChosenExperts(decided.experts_BSK))
            else:
                choices.made.setdefault(name, []).append(decided)
            return decided

        return call

    with _replaced(recording):
        yield


@contextmanager
def replay_choices(choices: ChoiceLog) -> Iterator[None]:
    """Inside the block the routers decide as in `choices`; their own decisions are compared with these."""
    turn = {name: iter(made) for name, made in choices.made.items()}

    def repeating(name: str, decide: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            own = decide(*args)
            if isinstance(own, KernelRouting):
                given_BSK = next(turn["choose_experts"]).experts_BSK.to(own.experts_BSK.device)
                chosen = ChosenExperts(own.experts_BSK), ChosenExperts(given_BSK)
                _compare_choices(choices, *chosen, _ranked(*args), args[2], priced=False)
                return decide(*args, given_BSK)
            given = next(turn[name])
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


def _ranked(logits_BSE: Tensor, bias_E: Tensor | None, _valid_BS: Tensor | None, config: MoEConfig) -> Tensor:
    """What `route` chooses by."""
    logits_BSE, router = logits_BSE.detach(), config.router
    ranked_BSE = logits_BSE if router.softmax_after_top_k else to_scores(logits_BSE, router.score)
    return ranked_BSE if bias_E is None else ranked_BSE + bias_E


def _compare_choices(
    choices: ChoiceLog, own: ChosenExperts, given: ChosenExperts, ranked_BSE: Tensor, valid_BS: Tensor | None, priced: bool
) -> None:
    """`priced`: more than `ranked_BSE` decides the ranking, so only the number of differences is known."""
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
    choices.different += int(other.sum())
