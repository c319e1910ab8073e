"""Forward and backward of a micro-batch as a CUDA graph: the host launches it as a whole instead of kernel by kernel.

A graph is a list of launches with the addresses that they read and write. So whatever the host decides from step to step (shapes,
coefficients, which statistics are collected) is part of the `_Key` of a graph, and what changes otherwise (token ids, the totals of
the global batch) is copied to where the graph reads it. Gradients are added up in buffers that last as long as the graph.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, _foreach_zero_  # pyright: ignore[reportPrivateImportUsage]

from ..moe.config import MoEConfig
from ..moe.token_info import BatchPosition
from ..parallel.apply import Parallel
from ..parallel.dispatch.symmetric import SymmetricDispatcher
from ..parallel.gradients import gradient_all_reduce
from ..parallel.object_collectives import from_all
from ..parallel.streams import Graph, capture
from .attention_logits import is_watched
from .batch import Rows
from .loss import Losses, Totals, without_graph
from .step import StepInput, backward, forward

log = logging.getLogger("tokenyard")

WARM_STEPS = 3
"""Steps in a row with the same key that run kernel by kernel before one is captured: kernels are compiled and chosen meanwhile."""


class _Key(NamedTuple):
    """What the host decides about the launches of a micro-batch."""

    shapes: list[torch.Size]
    micro_batches: int
    moe: MoEConfig
    """With the coefficients of the step."""
    capacity: float | None
    collects: list[bool]
    """Whether each router collects metrics."""
    rooms: list[int]
    """Bytes of the memory of each symmetric exchange, which moves when it grows. A micro-batch puts rows an even number of times,
    so a replay begins with the half of the memory with which the capture began."""


class _Captured(NamedTuple):
    key: _Key
    graph: Graph
    inputs: list[Tensor]
    share: Losses


class MicroBatchGraph:
    """Accumulates the gradients of a step by replaying a graph; see `accumulate`."""

    def __init__(self, parallel: Parallel) -> None:
        self.parameters = [sharded.parameter for sharded in parallel.parameters.values()]
        self.dtypes = [sharded.gradient_dtype for sharded in parallel.parameters.values()]
        self.gradients: list[Tensor] = []
        self.captured: _Captured | None = None
        self.failed = False
        self._key: _Key | None = None
        self._steps = 0
        """Steps in a row with `_key`."""

    def accumulate(self, parallel: Parallel, step_input: StepInput, totals: Totals) -> list[Losses]:
        """Does what `accumulate` in step.py does, and reduces gradients when all are there.

        The first steps of each key run kernel by kernel, and so do those whose attention logits are watched. If a capture fails
        on any rank, one line says so, and all later steps do. Collective.
        """
        self._begin()
        run = self._run(parallel, step_input, totals)
        shares = [run(rows) for rows in step_input.rows]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.detach()  # the reduction may move it to other memory
        with gradient_all_reduce(parallel):
            pass
        return shares

    def _begin(self) -> None:
        """Makes backward passes add to the buffers, which are zero."""
        self.gradients = self.gradients or [
            torch.zeros_like(parameter, dtype=dtype) for parameter, dtype in zip(self.parameters, self.dtypes, strict=True)
        ]
        _foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def _run(self, parallel: Parallel, step_input: StepInput, totals: Totals) -> Callable[[Rows], Losses]:
        """Returns what passes each micro-batch of this step forward and backward."""
        launch = partial(_launch, parallel, totals, step_input.position)
        shapes = [[x.shape for x in _inputs(rows, totals)] for rows in step_input.rows]
        if any(each != shapes[0] for each in shapes) or is_watched(parallel):
            return launch
        key = _key_of(parallel, shapes[0], totals, step_input.position)
        self._steps = self._steps + 1 if key == self._key else 1
        self._key = key
        known = self.captured is not None and self.captured.key == self._key
        if not known and self._steps > WARM_STEPS and not self.failed:
            self._capture(
                self._key, step_input.rows[0], totals, lambda rows, totals: _launch(parallel, totals, step_input.position, rows)
            )
            known = self.captured is not None
        return partial(self._replay, totals) if known else launch

    def _capture(self, key: _Key, rows: Rows, totals: Totals, launch: Callable[[Rows, Totals], Losses]) -> None:
        self.captured, error = None, None
        inputs = [x.clone() for x in _inputs(rows, totals)]
        rows, totals = _with_inputs(rows, totals, inputs)
        try:
            with capture() as graph:
                share = launch(rows, totals)
            self.captured = _Captured(key, graph, inputs, share)
        except RuntimeError as failure:
            error = str(failure).partition("\n")[0]
        if errors := [each for each in from_all(error) if each is not None]:
            self.captured, self.failed = None, True
            log.warning("cuda_graph=true: no graph could be captured, steps run kernel by kernel: %s", errors[0])

    def _replay(self, totals: Totals, rows: Rows) -> Losses:
        assert self.captured is not None
        for static, x in zip(self.captured.inputs, _inputs(rows, totals), strict=True):
            static.copy_(x)
        self.captured.graph.replay()
        return Losses(*(x.clone() for x in self.captured.share))


def _launch(parallel: Parallel, totals: Totals, position: BatchPosition | None, rows: Rows) -> Losses:
    """Passes a micro-batch forward and backward, kernel by kernel."""
    share = forward(parallel, rows, totals, position)
    backward(share)
    return without_graph(share)


def _key_of(parallel: Parallel, shapes: list[torch.Size], totals: Totals, position: BatchPosition | None) -> _Key:
    step, moe = (position or BatchPosition()).step, parallel.model.config.moe
    layers = [block.moe for block in parallel.model.blocks if block.moe is not None]
    return _Key(
        shapes,
        totals.micro_batches,
        moe.at(step),
        moe.capacity.factor_at(step),
        [layer.router.collects_metrics for layer in layers],
        [layer.dispatcher.buffers.half_bytes for layer in layers if isinstance(layer.dispatcher, SymmetricDispatcher)],
    )


def _inputs(rows: Rows, totals: Totals) -> list[Tensor]:
    """Returns what changes from one micro-batch to the next."""
    return [x for x in (rows.ids, rows.targets, rows.documents, *totals[:2], *totals.mtp_tokens) if isinstance(x, Tensor)]


def _with_inputs(rows: Rows, totals: Totals, inputs: list[Tensor]) -> tuple[Rows, Totals]:
    """Returns rows and totals with these tensors in the place of their own."""
    ids_BS, targets_BS, *others = inputs
    documents_BS = others.pop(0) if rows.documents is not None else None
    tokens, sequences, *mtp_tokens = others
    rows = rows._replace(ids=ids_BS, targets=targets_BS, documents=documents_BS)
    return rows, totals._replace(tokens=tokens, sequences=sequences, mtp_tokens=tuple(mtp_tokens))
