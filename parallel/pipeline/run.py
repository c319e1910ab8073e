"""Runs the schedule of a rank: forward and backward passes of its stages, and the messages between them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.deferred import WeightGradient, add_weight_gradients
from ..config import PipelineSchedule
from ..progress import in_phase
from .message_order import message_order
from .overlap import Overlap
from .p2p import Links, Mail, StageMessage
from .pairs import Unit, units
from .schedule import BACKWARD, FORWARD, WEIGHTS, ZERO_BUBBLE, Action


@dataclass
class Pipeline:
    """This rank's part of a pipeline."""

    kind: PipelineSchedule
    ranks: int
    rank: int
    layers: dict[int, range]
    """The layers of each stage of this rank, by stage."""
    stages: int
    """Of all ranks."""
    rows: dict[int, list[int]]
    """For each stage of this rank the places of its MoE layers among those of the model, with multi-token prediction."""
    moe_layers: int
    """MoE layers of the model, with multi-token prediction."""
    predicting: int
    """Those of multi-token prediction, the last ones, which run only in training."""
    copied: set[str]
    """Names of the parameters that the first stage has and the last one has a copy of."""
    links: Links
    collects_metrics: bool = False
    """Whether routers collect metrics in this step, which a stage without routers has to know too."""
    ended: set[int] = field(default_factory=set)
    """The stages of this rank whose last backward pass of the step runs or has run: it makes their gradients final."""
    overlap: Overlap | None = None
    """Runs pairs of passes side by side; None: each pass runs alone."""

    @property
    def last(self) -> int:
        """The stage with the head."""
        return self.stages - 1

    @property
    def defers_weights(self) -> bool:
        """Whether backward passes leave the gradients of weights to actions of their own."""
        return self.kind in ZERO_BUBBLE

    @property
    def all_rows(self) -> list[int]:
        """`rows` of all stages of this rank, in the order of the layers."""
        return sorted(row for rows in self.rows.values() for row in rows)

    def stage_of(self, layer: int) -> int:
        """Returns the stage of this rank that has `layer`; the layers of multi-token prediction are on the last one."""
        return next((stage for stage, inside in self.layers.items() if layer in inside), self.last)

    def has_ended(self, name: str) -> bool:
        """Whether the gradient of parameter `name` is final after the pass that runs: after all of them for the embedding."""
        part, _, rest = name.partition(".")
        if part == "layers":
            return self.stage_of(int(rest.partition(".")[0])) in self.ended
        return len(self.ended) == len(self.layers) if part == "embedding" else self.last in self.ended

    def units(self, micros: int) -> list[Unit]:
        """Returns the schedule of this rank for `micros` micro-batches."""
        return units(self.kind, self.ranks, len(self.layers), micros, self.overlap is not None)[self.rank]

    def messages(self, micros: int) -> list[Action]:
        """Returns the messages between all stages in the order in which they are posted, each by the action that needs it."""
        return message_order(self.kind, self.ranks, len(self.layers), micros, self.overlap is not None)


class StageResult(NamedTuple):
    """What a stage computes of a micro-batch."""

    output: StageMessage
    """For the next stage; of the last stage nobody uses it."""
    objective: Tensor
    """The stage's own share of the objective: the losses of its layers, and of the head if it has that."""


Forward = Callable[[int, int, StageMessage | None], StageResult]
"""Takes a stage, a micro-batch, and the message from the stage before it (None for the first stage)."""


def run_schedule(
    pipeline: Pipeline,
    micros: int,
    likes: Mapping[int, StageMessage],
    forward: Forward,
    around: Callable[[Action, bool], AbstractContextManager[None]],
    deferred: list[WeightGradient],
) -> None:
    """Passes `micros` micro-batches forward and backward through this rank's stages. Collective over the pipeline.

    `likes`: see `Mail`. `around` takes an action that computes gradients, and whether it is among the last, and wraps it with the
    message that follows it. `deferred`: to which backward passes append the gradients of weights that they leave. A stage
    differentiates its output, with the gradient that it receives, and its own share of the objective together: no auxiliary loss
    has to travel.
    """
    mail, schedule = Mail(pipeline.links, likes, pipeline.messages(micros)), pipeline.units(micros)
    kept: dict[tuple[int, int], tuple[StageMessage | None, StageResult]] = {}
    left: dict[tuple[int, int], list[WeightGradient]] = {}

    def act(action: Action, received: StageMessage | None, last: bool) -> None:
        if action.kind == FORWARD:
            received = received and received.each(Tensor.requires_grad_)
            with _named(action):
                kept[action.stage, action.micro] = received, (result := forward(action.stage, action.micro, received))
            if action.stage < pipeline.last:
                mail.send(action, result.output)
            return
        if action.kind == WEIGHTS:
            with around(action, last), _named(action):
                add_weight_gradients(left.pop((action.stage, action.micro)))
            return
        into, result = kept.pop((action.stage, action.micro))
        with around(action, last):
            with _named(action):
                _backward(result, received)
            left[action.stage, action.micro], deferred[:] = deferred[:], []
            if into is not None:
                mail.send(action, into.each(_gradient))

    for unit, following in zip(schedule, [*schedule[1:], ()], strict=True):
        received = [mail.take(action) for action in unit]
        for action in following:
            mail.expect(action)
        passes = [partial(act, action, message, not following) for action, message in zip(unit, received, strict=True)]
        if pipeline.overlap is not None and len(passes) == 2:
            pipeline.overlap.run(*passes)
        else:
            passes[0]()
    mail.close()


def run_forward(
    pipeline: Pipeline, likes: Mapping[int, StageMessage], forward: Callable[[int, StageMessage | None], StageMessage]
) -> None:
    """Passes one micro-batch forward through this rank's stages. Collective over the pipeline. `likes`: see `Mail`."""
    mail = Mail(pipeline.links, likes, [Action(FORWARD, stage, 0) for stage in range(1, pipeline.stages)])
    for stage in pipeline.layers:
        action = Action(FORWARD, stage, 0)
        output = forward(stage, mail.take(action))
        if stage < pipeline.last:
            mail.send(action, output)
    mail.close()


def _named(action: Action) -> AbstractContextManager[None]:
    """The phase that a hang is reported with."""
    what = {FORWARD: "forward", BACKWARD: "backward", WEIGHTS: "gradients of weights"}[action.kind]
    return in_phase(f"{what} of micro-batch {action.micro} through stage {action.stage}")


def _backward(result: StageResult, received: StageMessage | None) -> None:
    pairs: list[tuple[Tensor, Tensor | None]] = [(result.objective, None)]
    if received is not None:
        pairs += zip(result.output.tensors(), received.tensors(), strict=True)
    outputs, gradients = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    torch.autograd.backward(outputs, gradients)


def _gradient(received: Tensor) -> Tensor:
    assert received.grad is not None
    return received.grad
