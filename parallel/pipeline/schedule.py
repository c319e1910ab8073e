"""Schedules of pipeline parallelism: lists of what each rank of a pipeline does, one action after the other. Without torch.

P ranks of a pipeline, V chunks of each, so P x V stages; M micro-batches. Stage s is on rank s mod P.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ..config import PipelineSchedule

FORWARD, BACKWARD = "F", "B"


class Action(NamedTuple):
    """A forward or backward pass of one micro-batch through one stage."""

    kind: str
    """FORWARD or BACKWARD."""
    stage: int
    micro: int

    def needs(self, stages: int) -> "Action | None":
        """Returns the action whose result this one needs; None for the forward pass of the first stage."""
        if self.kind == FORWARD:
            return None if self.stage == 0 else self._replace(stage=self.stage - 1)
        return Action(FORWARD, self.stage, self.micro) if self.stage == stages - 1 else self._replace(stage=self.stage + 1)


def schedule(kind: PipelineSchedule, ranks: int, rank: int, chunks: int, micros: int, overlap: bool = False) -> list[Action]:
    """Returns the actions of one rank: each micro-batch forward and backward through each of its stages.

    1f1b (PipeDream-Flush; Narayanan et al. 2021, section 2.2.1): after P - 1 - rank forward passes one forward and one backward
    pass take turns, so a rank keeps at most P - rank micro-batches. interleaved (section 2.2.2): each rank has V stages, and passes
    groups of P micro-batches through one after the other, which divides the bubble by V; M is a multiple of P. With `overlap` it
    begins with one forward pass more, so that none needs what the backward pass before it gives (pairs.py).
    """
    if kind is PipelineSchedule["1f1b"]:
        forward = [Action(FORWARD, rank, micro) for micro in range(micros)]
        backward = [Action(BACKWARD, rank, micro) for micro in range(micros)]
        warm = min(ranks - 1 - rank, micros)
    else:
        assert micros % ranks == 0
        order = [(c, m) for first in range(0, micros, ranks) for c in range(chunks) for m in range(first, first + ranks)]
        forward = [Action(FORWARD, c * ranks + rank, m) for c, m in order]
        backward = [Action(BACKWARD, (chunks - 1 - c) * ranks + rank, m) for c, m in order]
        warm = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks + overlap, len(forward))
    turns = [action for pair in zip(forward[warm:], backward, strict=False) for action in pair]
    return [*forward[:warm], *turns, *backward[len(forward) - warm :]]


class Span(NamedTuple):
    """When an action begins and ends."""

    action: Action
    begin: float
    end: float


def timeline(lists: list[list[Action]], stages: int, forward: float, backward: float) -> list[list[Span]]:
    """Runs the lists of all ranks against each other: an action begins when its rank is free and what it needs is there.

    `forward`, `backward`: the time of a pass through one stage; messages take none. Raises ValueError if ranks wait for each other.
    """
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in lists]
    left = sum(map(len, lists))
    while left:
        before = left
        for actions, done in zip(lists, spans, strict=True):
            while len(done) < len(actions):
                action = actions[len(done)]
                needed = action.needs(stages)
                if needed is not None and needed not in ended:
                    break
                begin = max(done[-1].end if done else 0.0, 0.0 if needed is None else ended[needed])
                ended[action] = begin + (forward if action.kind == FORWARD else backward)
                done.append(Span(action, begin, ended[action]))
                left -= 1
        if left == before:
            stuck = [str(tuple(actions[len(done)])) for actions, done in zip(lists, spans, strict=True) if len(done) < len(actions)]
            raise ValueError(f"ranks wait for each other: {', '.join(stuck)}")
    return spans


def bubble(spans: list[list[Span]]) -> float:
    """Returns the time in which a rank waits, over the time of its work; the mean over the ranks."""
    end = max(span.end for done in spans for span in done)
    work = [sum(span.end - span.begin for span in done) for done in spans]
    return sum(end - each for each in work) / sum(work)


def most_kept(actions: Iterable[Action]) -> int:
    """Returns the most micro-batches (of any stage of the rank) that have been forward and not yet backward."""
    kept = most = 0
    for action in actions:
        kept += 1 if action.kind == FORWARD else -1
        most = max(most, kept)
    return most
