"""Activations and their gradients between the stages of a pipeline, asynchronous and received ahead.

Each direction and kind has a process group of its own. In such a group each rank only sends, or only receives, in the order of its
schedule, so both ends see one order, and no message waits for one that goes the other way.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Mesh
from ..progress import PROGRESS, waiting
from .schedule import BACKWARD, FORWARD, Action


class Links:
    """The process groups between this rank's stages and their neighbours. Created by all ranks, in the same order."""

    def __init__(self, mesh: Mesh, stages: int) -> None:
        self.ranks, self.stages = mesh.sizes["pipeline"], stages
        self.inner = mesh.world // self.ranks
        self.rank, self.place = mesh.rank, mesh.rank // self.inner
        self.groups: dict[tuple[str, int], Any] = {}
        """By kind and place of the sender in the pipeline."""
        wraps = stages > self.ranks
        for kind, hop in ((FORWARD, 1), (BACKWARD, -1)):
            for place in range(self.ranks):
                other = (place + hop) % self.ranks
                if wraps or other == place + hop:
                    both = [at * self.inner + each for at in sorted((place, other)) for each in range(self.inner)]
                    self.groups[kind, place] = dist.new_group(both)

    def peer(self, stage: int) -> int:
        """Returns the rank that has `stage` and the same place inside it as this rank."""
        return stage % self.ranks * self.inner + self.rank % self.inner


class Mail:
    """The messages of one pass through the pipeline. `like` is an empty tensor with the shape of all of them."""

    def __init__(self, links: Links, like: Tensor) -> None:
        self.links, self.like = links, like
        self.coming: dict[Action, tuple[Tensor, Any]] = {}
        """What is being received, by the action that needs it."""
        self.going: list[tuple[Tensor, Any, int]] = []
        """What is being sent, and to which rank, kept until it has left."""
        PROGRESS.in_schedule = True

    def expect(self, action: Action) -> None:
        """Begins to receive what `action` needs, if it comes from another rank."""
        needed = action.needs(self.links.stages)
        if needed is None or needed.kind != action.kind or action in self.coming:
            return
        tensor, sender = torch.empty_like(self.like), self.links.peer(needed.stage)
        group = self.links.groups[action.kind, needed.stage % self.links.ranks]
        self.coming[action] = tensor, dist.irecv(tensor, sender, group=group)

    def take(self, action: Action) -> Tensor | None:
        """Returns what `action` needs from another rank; None for the first forward and the first backward pass."""
        PROGRESS.passes += 1
        self.expect(action)
        if action not in self.coming:
            return None
        tensor, work = self.coming.pop(action)
        what, sender = ("activations", action.stage - 1) if action.kind == FORWARD else ("gradients", action.stage + 1)
        with waiting(f"{what} of micro-batch {action.micro} for stage {action.stage}", self.links.peer(sender)):
            work.wait()
        return tensor

    def send(self, action: Action, result: Tensor) -> None:
        """Begins to send the result of `action` to the rank that needs it."""
        to = action.stage + (1 if action.kind == FORWARD else -1)
        result = result.detach().contiguous()
        group = self.links.groups[action.kind, action.stage % self.links.ranks]
        self.going = list(self._on_their_way())
        self.going.append((result, dist.isend(result, self.links.peer(to), group=group), self.links.peer(to)))
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
