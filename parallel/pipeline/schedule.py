"""Schedules of pipeline parallelism: lists of what each rank of a pipeline does, one action after the other. Without torch.

P ranks of a pipeline, V chunks of each, so P x V stages; M micro-batches.
"""

from collections import deque
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from ..config import PipelineSchedule

FORWARD, BACKWARD, WEIGHTS = "F", "B", "W"
ZERO_BUBBLE = PipelineSchedule["zbh1"], PipelineSchedule["zbv"]
"""Schedules in which a backward pass leaves the gradients of weights to an action of their own."""


class Action(NamedTuple):
    """A forward or backward pass of one micro-batch through one stage, or the gradients of the weights that such a pass left."""

    kind: str
    """FORWARD, BACKWARD or WEIGHTS."""
    stage: int
    micro: int

    def needs(self, stages: int) -> "Action | None":
        """Returns the action whose result this one needs; None for the forward pass of the first stage."""
        if self.kind == WEIGHTS:
            return self._replace(kind=BACKWARD)
        if self.kind == FORWARD:
            return None if self.stage == 0 else self._replace(stage=self.stage - 1)
        return Action(FORWARD, self.stage, self.micro) if self.stage == stages - 1 else self._replace(stage=self.stage + 1)


def place_of(kind: PipelineSchedule, ranks: int, stage: int) -> int:
    """Returns the rank of `stage`: s mod P. With zbv stages go down the ranks and up again, so the last is where the first is."""
    return min(stage, 2 * ranks - 1 - stage) if kind is PipelineSchedule["zbv"] else stage % ranks


def stage_hops(kind: PipelineSchedule, ranks: int, stages: int) -> list[tuple[int, int]]:
    """Returns the ranks of a pipeline between which activations travel: each pair of sender and receiver once."""
    hops = {(place_of(kind, ranks, stage), place_of(kind, ranks, stage + 1)) for stage in range(stages - 1)}
    return sorted(hop for hop in hops if hop[0] != hop[1])


def stages_at(kind: PipelineSchedule, ranks: int, stages: int, rank: int) -> list[int]:
    """Returns the stages of a rank, of `stages` in all."""
    return [stage for stage in range(stages) if place_of(kind, ranks, stage) == rank]


def schedule(kind: PipelineSchedule, ranks: int, rank: int, chunks: int, micros: int, overlap: bool = False) -> list[Action]:
    """Returns the actions of one rank: each micro-batch forward and backward through each of its stages.

    1f1b (PipeDream-Flush; Narayanan et al. 2021, section 2.2.1): after P - 1 - rank forward passes one forward and one backward
    pass take turns, so a rank keeps at most P - rank micro-batches. interleaved (section 2.2.2): each rank has V stages, and passes
    groups of P micro-batches through one after the other, which divides the bubble by V; M is a multiple of P. With `overlap` it
    begins with one forward pass more, so that none needs what the backward pass before it gives (pairs.py). zbh1 and zbv: see
    `_zero_bubble`.
    """
    if kind in ZERO_BUBBLE:
        return _zero_bubble(kind, ranks, micros)[rank]
    if kind is PipelineSchedule["1f1b"]:
        return _one_by_one(ranks, rank, micros)
    assert micros % ranks == 0
    order = [(c, m) for first in range(0, micros, ranks) for c in range(chunks) for m in range(first, first + ranks)]
    forward = [Action(FORWARD, c * ranks + rank, m) for c, m in order]
    backward = [Action(BACKWARD, (chunks - 1 - c) * ranks + rank, m) for c, m in order]
    return _in_turns(forward, backward, min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks + overlap, len(forward)))


def _one_by_one(ranks: int, rank: int, micros: int) -> list[Action]:
    forward, backward = ([Action(kind, rank, micro) for micro in range(micros)] for kind in (FORWARD, BACKWARD))
    return _in_turns(forward, backward, min(ranks - 1 - rank, micros))


def _in_turns(forward: list[Action], backward: list[Action], warm: int) -> list[Action]:
    """Returns `warm` forward passes, then a forward and a backward pass in turns, then the other backward passes."""
    turns = [action for pair in zip(forward[warm:], backward, strict=False) for action in pair]
    return [*forward[:warm], *turns, *backward[len(forward) - warm :]]


@cache
def _zero_bubble(kind: PipelineSchedule, ranks: int, micros: int) -> list[list[Action]]:
    """Returns the actions of all ranks, with backward passes that compute the gradients of inputs alone (Qi et al. 2024,
    arXiv:2401.10241): those of weights fill the time in which a rank would wait.

    If a forward pass, a backward pass and the gradients of weights take equal times: zbh1, in the order of 1f1b, idles for P - 1 of
    these times, a third of what 1f1b does. zbv, with two stages on each rank in a V, does not idle between the first and the last
    action of a rank if M is at least 2 P - 1. A rank keeps at most as many micro-batches as the first one of 1f1b, P (of one
    stage; 2 P of zbv's halves).
    """
    order = _one_by_one if kind is PipelineSchedule["zbh1"] else _down_and_up
    orders = [deque(order(ranks, rank, micros)) for rank in range(ranks)]
    most = stages = ranks * (2 if kind is PipelineSchedule["zbv"] else 1)
    lists, later = [list[Action]() for _ in orders], [deque[Action]() for _ in orders]
    kept, ended = [0] * ranks, set[Action | None]([None])
    while any(orders) or any(later):
        now = list[Action]()
        for rank in range(ranks):
            ready = orders[rank] and orders[rank][0].needs(stages) in ended
            if ready and (kept[rank] < most or orders[rank][0].kind != FORWARD):
                action = orders[rank].popleft()
            elif later[rank]:
                action = later[rank].popleft()
            else:
                continue
            if action.kind == BACKWARD:
                later[rank].append(action._replace(kind=WEIGHTS))
            kept[rank] += {FORWARD: 1, BACKWARD: 0, WEIGHTS: -1}[action.kind]
            lists[rank].append(action)
            now.append(action)
        assert now, "ranks wait for each other"
        ended.update(now)
    return lists


def _down_and_up(ranks: int, rank: int, micros: int) -> list[Action]:
    """Returns the passes of the V of zbv: as many forward passes as arrive before the first comes back, then all four in turns."""
    down, up = rank, 2 * ranks - 1 - rank
    passes = [(FORWARD, down), (FORWARD, up), (BACKWARD, down), (BACKWARD, up)]
    f_down, f_up, b_down, b_up = (deque(Action(kind, stage, micro) for micro in range(micros)) for kind, stage in passes)
    begin = [f_down] * (2 * (ranks - rank) - 1) + [f_up, f_down] * rank + [f_up, b_up] * (ranks - rank)
    return [left.popleft() for left in begin + [f_down, b_down, f_up, b_up] * micros if left]


class Span(NamedTuple):
    """When an action begins and ends."""

    action: Action
    begin: float
    end: float


def timeline(lists: list[list[Action]], stages: int, forward: float, backward: float, weights: float = 1) -> list[list[Span]]:
    """Runs the lists of all ranks against each other: an action begins when its rank is free and what it needs is there.

    `forward`, `backward`: the time of a pass through one stage; `weights`: of the gradients that a backward pass left; messages
    take none. Raises ValueError if ranks wait for each other.
    """
    times = {FORWARD: forward, BACKWARD: backward, WEIGHTS: weights}
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
                ended[action] = begin + times[action.kind]
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


def most_kept(actions: list[Action]) -> int:
    """Returns the most micro-batches (of any stage of the rank) that have been forward and not yet wholly backward."""
    last = WEIGHTS if any(action.kind == WEIGHTS for action in actions) else BACKWARD
    kept = (action.kind == FORWARD for action in actions), (action.kind == last for action in actions)
    return max(accumulate(begins - ends for begins, ends in zip(*kept, strict=True)))
