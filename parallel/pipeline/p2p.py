"""Activations and their gradients between the stages of a pipeline, asynchronous and received ahead.

Each direction and kind has a process group of two ranks for each neighbour. In it one rank only sends and the other only receives,
in the order of its schedule, so both ends see one order, and no message waits for one that goes the other way.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import PipelineSchedule
from ..mesh import Mesh, create_group
from ..progress import PROGRESS, waiting
from .schedule import BACKWARD, FORWARD, Action, place_of, stage_hops


class StageMessage(NamedTuple):
    """What a stage sends to the next one, or the gradients of it that the next one sends back."""

    x_BSD: Tensor
    """The residual stream."""
    earlier_BSD: Tensor | None = None
    """With model.moe.shortcut the input of the last feed-forward, if the next stage begins with experts, which take it."""
    pooled_LBC: Tensor | None = None
    """With model.moe.balance.pool_layers what is pooled of all MoE layers so far: `pooled_sums` of train/loss.py."""

    def each(self, function: Callable[[Tensor], Tensor]) -> "StageMessage":
        """Returns the message with `function` of each of its tensors."""
        return StageMessage._make(None if tensor is None else function(tensor) for tensor in self)

    def tensors(self) -> list[Tensor]:
        """Returns those that there are, in the order in which they travel."""
        return [tensor for tensor in self if tensor is not None]


class Links:
    """The process groups between this rank's stages and their neighbours, of two ranks each. Created by all ranks together."""

    def __init__(self, mesh: Mesh, kind: PipelineSchedule, stages: int) -> None:
        self.kind, self.ranks, self.stages = kind, mesh.sizes["pipeline"], stages
        self.inner = mesh.world // self.ranks
        self.rank, self.place = mesh.rank, mesh.rank // self.inner
        self.groups: dict[tuple[str, int, int], Any] = {}
        """By kind, and the places of the sender and of the receiver in the pipeline, one of which is this rank's."""
        for apart in disjoint(stage_hops(kind, self.ranks, stages)):
            for pass_kind, each in ((FORWARD, apart), (BACKWARD, [(receiver, sender) for sender, receiver in apart])):
                mine = next((hop for hop in each if self.place in hop), (self.place,))
                group = create_group(self._ranks(mine, mesh.rank), partial(self._pairs, each))
                if len(mine) > 1:
                    self.groups[pass_kind, *mine] = group

    def _ranks(self, places: Sequence[int], rank: int) -> list[int]:
        """Returns the ranks at `places` that have the same place inside their stages as `rank`."""
        return sorted(place * self.inner + rank % self.inner for place in places)

    def _pairs(self, hops: list[tuple[int, int]]) -> list[list[int]]:
        """Returns the two ranks of each hop, and the ranks that no hop has, each alone."""
        alone = [(place,) for place in range(self.ranks) if not any(place in hop for hop in hops)]
        return [self._ranks(places, each) for places in (*hops, *alone) for each in range(self.inner)]

    def place_of(self, stage: int) -> int:
        """Returns the place in the pipeline of the ranks that have `stage`."""
        return place_of(self.kind, self.ranks, stage)

    def peer(self, stage: int) -> int:
        """Returns the rank that has `stage` and the same place inside it as this rank."""
        return self.place_of(stage) * self.inner + self.rank % self.inner


def disjoint(hops: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Returns the hops in lists, in each of which every place occurs once at most."""
    found: list[list[tuple[int, int]]] = []
    for hop in hops:
        fitting = next((apart for apart in found if not any(place in other for other in apart for place in hop)), None)
        if fitting is None:
            found.append(fitting := [])
        fitting.append(hop)
    return found


class Mail:
    """The messages of one pass through the pipeline. `likes`: empty tensors like the messages to and from each stage, by the one
    to which the activations go."""

    def __init__(self, links: Links, likes: Mapping[int, StageMessage]) -> None:
        self.links, self.likes = links, likes
        self.coming: dict[Action, tuple[StageMessage, list[Any]]] = {}
        """What is being received, by the action that needs it."""
        self.going: list[tuple[Tensor, Any, int]] = []
        """What is being sent, and to which rank, kept until it has left."""
        self.here: dict[Action, StageMessage] = {}
        """What one stage of this rank computed for another one, by the action that needs it."""
        PROGRESS.in_schedule = True

    def expect(self, action: Action) -> None:
        """Begins to receive what `action` needs, if it comes from another rank."""
        needed = action.needs(self.links.stages)
        if needed is None or needed.kind != action.kind or action in self.coming:
            return
        place = self.links.place_of(needed.stage)
        if place == self.links.place:
            return
        message = self.likes[max(action.stage, needed.stage)].each(torch.empty_like)
        peer, group = self.links.peer(needed.stage), self.links.groups[action.kind, place, self.links.place]
        self.coming[action] = message, [dist.irecv(tensor, peer, group=group) for tensor in message.tensors()]

    def take(self, action: Action) -> StageMessage | None:
        """Returns what `action` needs from another stage; None for the first forward and the first backward pass."""
        PROGRESS.passes += 1
        if action in self.here:
            return self.here.pop(action)
        self.expect(action)
        if action not in self.coming:
            return None
        message, works = self.coming.pop(action)
        what, sender = ("activations", action.stage - 1) if action.kind == FORWARD else ("gradients", action.stage + 1)
        with waiting(f"{what} of micro-batch {action.micro} for stage {action.stage}", self.links.peer(sender)):
            for work in works:
                work.wait()
        return message

    def send(self, action: Action, result: StageMessage) -> None:
        """Begins to send the result of `action` to the rank that needs it, unless that is this rank."""
        to = action.stage + (1 if action.kind == FORWARD else -1)
        result, place = result.each(lambda tensor: tensor.detach().contiguous()), self.links.place_of(to)
        if place == self.links.place:
            self.here[action._replace(stage=to)] = result
            return
        peer, group = self.links.peer(to), self.links.groups[action.kind, self.links.place, place]
        self.going = list(self._on_their_way())
        self.going += [(tensor, dist.isend(tensor, peer, group=group), peer) for tensor in result.tensors()]
        PROGRESS.last = f"send of micro-batch {action.micro} from stage {action.stage}"

    def _on_their_way(self) -> Iterator[tuple[Tensor, Any, int]]:
        for tensor, work, to in self.going:
            if work.is_completed():
                work.wait()
            else:
                yield tensor, work, to

    def close(self) -> None:
        """Waits until everything has left."""
        for _, work, to in self.going:
            with waiting(PROGRESS.last, to):
                work.wait()
        self.going.clear()
        PROGRESS.in_schedule = False
