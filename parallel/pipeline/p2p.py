"""Activations and their gradients between the stages of a pipeline, asynchronous and received ahead.

Two ranks send to each other in one process group, in an order that both know (message_order.py).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..collectives import start_messages
from ..config import ParallelConfig
from ..mesh import Mesh, create_group
from ..progress import PROGRESS, waiting
from .message_order import Pair, lanes, needs_other_stage
from .schedule import BACKWARD, FORWARD, Action, place_of


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
    """The process groups in which this rank's stages send to their neighbours and receive. Created by all ranks together.

    Two ranks have one for both directions. With `on_world` the first lane (message_order.py) is in the group of all ranks; with
    `together` all lanes are in one, of the ranks of a pipeline if not of all.
    """

    def __init__(self, mesh: Mesh, config: ParallelConfig, on_world: bool = True, together: bool = False) -> None:
        self.kind, self.ranks, self.stages = config.pipeline_schedule, config.pipeline, config.pipeline_stages
        self.inner = mesh.world // self.ranks
        self.rank, self.place = mesh.rank, mesh.rank // self.inner
        apart = lanes(self.kind, self.ranks, self.stages)
        self.groups: dict[int, Any] = {}
        """By the place of the neighbour."""
        for lane in [[pair for pairs in apart for pair in pairs]] if together else apart:
            if on_world and lane[0] == apart[0][0]:
                group = mesh.everyone.group
            elif together or self.ranks == 2:
                group = mesh.axis("pipeline").group
            else:
                mine = next((pair for pair in lane if self.place in pair), (self.place,))
                group = create_group(self._ranks(mine, mesh.rank), partial(self._of_lane, lane))
            self.groups |= {sum(pair) - self.place: group for pair in lane if self.place in pair}

    def _ranks(self, places: Sequence[int], rank: int) -> list[int]:
        """Returns the ranks at `places` that have the same place inside their stages as `rank`."""
        return [place * self.inner + rank % self.inner for place in places]

    def _of_lane(self, pairs: list[Pair]) -> list[list[int]]:
        """Returns the two ranks of each pair, and the ranks that no pair has, each alone."""
        alone = [(place,) for place in range(self.ranks) if not any(place in pair for pair in pairs)]
        return [self._ranks(places, each) for places in (*pairs, *alone) for each in range(self.inner)]

    def place_of(self, stage: int) -> int:
        """Returns the place in the pipeline of the ranks that have `stage`."""
        return place_of(self.kind, self.ranks, stage)

    def peer(self, stage: int) -> int:
        """Returns the rank that has `stage` and the same place inside it as this rank."""
        return self.place_of(stage) * self.inner + self.rank % self.inner

    def ends(self, message: Action) -> tuple[int, int]:
        """Returns the places of the sender and of the receiver of the message that an action needs from another stage."""
        needed = message.needs(self.stages)
        assert needed is not None
        return self.place_of(needed.stage), self.place_of(message.stage)


class Mail:
    """The messages of one pass through the pipeline. `likes`: empty tensors like the messages to and from each stage, by the one
    to which the activations go; `order`: the messages between all stages in the order in which they are posted, each by the
    action that needs it."""

    def __init__(self, links: Links, likes: Mapping[int, StageMessage], order: Iterable[Action]) -> None:
        self.links, self.likes = links, likes
        self.waiting: dict[Any, deque[Action]] = {group: deque() for group in links.groups.values()}
        """By group, what this rank has not posted."""
        for message in order:
            sender, receiver = links.ends(message)
            if sender != receiver and links.place in (sender, receiver):
                self.waiting[links.groups[sender + receiver - links.place]].append(message)
        self.wanted: set[Action] = set()
        """Of these, what is needed next, so that it and those before it are to be posted."""
        self.made: dict[Action, StageMessage] = {}
        """Of these, what has been computed and is to be sent."""
        self.coming: dict[Action, tuple[StageMessage, list[Any]]] = {}
        """What is being received."""
        self.going: list[tuple[StageMessage, list[Any], int]] = []
        """What is being sent, and to which rank, kept until it has left."""
        self.here: dict[Action, StageMessage] = {}
        """What one stage of this rank computed for another one."""
        PROGRESS.in_schedule = True

    def expect(self, action: Action) -> None:
        """Begins to receive what `action` needs, if it comes from another rank, once all messages before it are posted."""
        if not needs_other_stage(action, self.links.stages) or action in self.coming or action in self.wanted:
            return
        sender, receiver = self.links.ends(action)
        if sender != receiver:
            self.wanted.add(action)
            self._post(self.links.groups[sender])

    def _post(self, group: Any) -> None:
        """Posts the messages of a group in their order, as far as one of them is wanted or made, until one has to be made first."""
        queue = self.waiting[group]
        until = max((index for index, message in enumerate(queue) if message in self.wanted or message in self.made), default=-1)
        for _ in range(until + 1):
            sender, receiver = self.links.ends(queue[0])
            if receiver == self.links.place:
                self._receive(queue.popleft(), self._rank(sender), group)
            elif queue[0] in self.made:
                self._send(queue.popleft(), self._rank(receiver), group)
            else:
                break

    def _rank(self, place: int) -> int:
        return place * self.links.inner + self.links.rank % self.links.inner

    def _receive(self, message: Action, sender: int, group: Any) -> None:
        self.wanted.discard(message)
        up = message.stage + (message.kind == BACKWARD)
        into = self.likes[up].each(torch.empty_like)
        self.coming[message] = into, start_messages([], [(sender, tensor) for tensor in into.tensors()], group)

    def _send(self, message: Action, receiver: int, group: Any) -> None:
        result = self.made.pop(message)
        self.going = list(self._on_their_way())
        self.going.append((result, start_messages([(receiver, tensor) for tensor in result.tensors()], [], group), receiver))

    def take(self, action: Action) -> StageMessage | None:
        """Returns what `action` needs from another stage; None for the first forward and the first backward pass."""
        PROGRESS.passes += 1
        if action in self.here:
            return self.here.pop(action)
        self.expect(action)
        if not needs_other_stage(action, self.links.stages):
            return None
        message, works = self.coming.pop(action)
        what, sender = ("activations", action.stage - 1) if action.kind == FORWARD else ("gradients", action.stage + 1)
        with waiting(f"{what} of micro-batch {action.micro} for stage {action.stage}", self.links.peer(sender)):
            for work in works:
                work.wait()
        return message

    def send(self, action: Action, result: StageMessage) -> None:
        """Sends the result of `action` to the rank that needs it, unless that is this rank, once its turn has come."""
        message = action._replace(stage=action.stage + (1 if action.kind == FORWARD else -1))
        result = result.each(lambda tensor: tensor.detach().contiguous())
        sender, receiver = self.links.ends(message)
        if sender == receiver:
            self.here[message] = result
            return
        self.made[message] = result
        PROGRESS.last = f"send of micro-batch {action.micro} from stage {action.stage}"
        self._post(self.links.groups[receiver])

    def _on_their_way(self) -> Iterator[tuple[StageMessage, list[Any], int]]:
        for result, works, to in self.going:
            if all(work.is_completed() for work in works):
                for work in works:
                    work.wait()
            else:
                yield result, works, to

    def close(self) -> None:
        """Waits until everything has left."""
        assert not any(self.waiting.values()), "a message has not been posted"
        for _, works, to in self.going:
            with waiting(PROGRESS.last, to):
                for work in works:
                    work.wait()
        self.going.clear()
        PROGRESS.in_schedule = False
