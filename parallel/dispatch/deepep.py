"""The deduplicated exchange by DeepEP's kernels (https://github.com/deepseek-ai/DeepEP), an optional package, on GPUs and in bf16.

DeepEP sends a token once to each rank with any of its experts, and sums the rows that come back. This module adds the gradients:
that of the way there is DeepEP's way back and the other way round, by the same handle. The host waits inside of DeepEP for the
numbers of rows. In the forward pass the shared expert is beside both ways, in the backward pass nothing is.

T own tokens, P tokens that come to this rank, K choices of each, D width, N ranks, R rows of this rank's experts.
"""

import importlib
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...moe.dispatch import DispatchedTokens, experts_or_dropped, permute, plan_choices, unpermute
from ...moe.recompute import keep
from ...moe.router import Routing
from ..config import DEEPEP_LACKS
from ..mesh import Axis
from ..progress import collective
from .base import ExpertParallelDispatcher


class Arriving(NamedTuple):
    """Tokens under way to this rank's experts, which must not be read before `event.current_stream_wait()`."""

    tokens_PD: Tensor
    weights_PK: Tensor
    experts_PK: Tensor
    """int64: the chosen ones of this rank's experts, from 0 on; -1 for those of other ranks."""
    rows: int
    """Choices of this rank's experts."""
    handle: Any
    """Where tokens came from, for the way back."""
    event: Any


class Link:
    """DeepEP's buffer of an axis, which grows when rows are wider."""

    def __init__(self, experts: int, axis: Axis) -> None:
        """Raises RuntimeError, in one line, if the package is not installed."""
        try:
            self.buffer_class: Any = importlib.import_module("deep_ep").Buffer
        except ImportError as error:
            right = "nearest valid: parallel.exchange=deduplicated"
            raise RuntimeError(f"parallel.exchange=deepep: {DEEPEP_LACKS}; {right}") from error
        self.experts, self.axis, self.row_bytes, self.buffer = experts, axis, 0, None

    def to_experts(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Arriving:
        """Starts to send tokens to the ranks of their experts; -1 is none."""
        buffer = self._buffer_for(x_TD)
        with collective("dispatch of deep_ep", self.axis):
            ranks_N, nodes, counts_E, goes_TN, _ = buffer.get_dispatch_layout(experts_TK, self.experts)
            tokens_PD, experts_PK, weights_PK, counts, handle, event = buffer.dispatch(
                x_TD.contiguous(),
                topk_idx=experts_TK,
                topk_weights=weights_TK.contiguous(),
                num_tokens_per_rank=ranks_N,
                num_tokens_per_rdma_rank=nodes,
                is_token_in_rank=goes_TN,
                num_tokens_per_expert=counts_E,
                async_finish=True,
            )
        return Arriving(tokens_PD, weights_PK, experts_PK, sum(counts), handle, event)

    def to_experts_again(self, x_TD: Tensor, handle: Any) -> Tensor:
        """Returns other rows of the same tokens at the ranks of their experts, (P, D)."""
        with collective("dispatch of deep_ep", self.axis):
            return self._buffer_for(x_TD).dispatch(x_TD.contiguous(), handle=handle)[0]

    def to_tokens(self, y_PD: Tensor, handle: Any, values_PK: Tensor | None = None, waits: bool = True) -> Any:
        """Returns the sum of each own token's rows, (T, D), that of its values, (T, K), and, unless it `waits`, the event."""
        with collective("combine of deep_ep", self.axis):
            return self._buffer_for(y_PD).combine(y_PD.contiguous(), handle, topk_weights=values_PK, async_finish=not waits)

    def _buffer_for(self, x: Tensor) -> Any:
        sizes, kind = (x.shape[1] * x.element_size(), self.axis.size), self.buffer_class
        if sizes[0] > self.row_bytes:
            configs, self.row_bytes = [kind.get_dispatch_config(sizes[1]), kind.get_combine_config(sizes[1])], sizes[0]
            nvlink = max(config.get_nvl_buffer_size_hint(*sizes) for config in configs)
            self.buffer = kind(self.axis.group, nvlink, max(config.get_rdma_buffer_size_hint(*sizes) for config in configs))
        return self.buffer


class _Dispatch(torch.autograd.Function):
    """Tokens (T, D) and weights (T, K) to `Arriving`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, link: Link) -> Any:
        arriving = keep(partial(link.to_experts, x_TD, weights_TK, experts_TK))
        ctx.link, ctx.handle = link, arriving.handle
        return tuple(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_TD, grad_weights_TK, _ = ctx.link.to_tokens(grads[0], ctx.handle, grads[1].contiguous())
        return grad_TD, grad_weights_TK, None, None


class _Combine(torch.autograd.Function):
    """Rows (P, D) to their sums (T, D), and the event."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, link: Link, handle: Any) -> Any:
        ctx.link, ctx.handle = link, handle
        sum_TD, _, event = keep(partial(link.to_tokens, y_PD, handle, waits=False))
        return sum_TD, event

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.link.to_experts_again(grads[0], ctx.handle), None, None


class DeepEPDispatcher(ExpertParallelDispatcher):
    """Experts are numbered in the order of the ranks of the axis."""

    def __init__(self, experts: int, axis: Axis, chunks: int = 1) -> None:
        super().__init__(chunks)
        self.experts, self.axis = experts, axis
        self.link = Link(experts, axis)

    def start_dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Arriving, int | None]:
        assert routing.keys_T is None, "rows carry no keys"
        experts_TK = experts_or_dropped(routing, self.experts)
        experts_TK = experts_TK.masked_fill(experts_TK >= self.experts, -1)
        padded = None if routing.padded_rows is None else routing.padded_rows * self.axis.size
        return Arriving(*_Dispatch.apply(x_TD, routing.weights_TK, experts_TK, self.link)), padded  # pyright: ignore[reportGeneralTypeIssues]

    def finish_dispatch(self, started: tuple[Arriving, int | None]) -> DispatchedTokens:
        arriving, padded = started
        arriving.event.current_stream_wait()
        experts = self.experts // self.axis.size
        chosen_PK = arriving.experts_PK.masked_fill(arriving.experts_PK < 0, experts)
        plan = plan_choices(chosen_PK, experts, padded, dropping=True, cut=False)
        if padded is None:
            plan = plan._replace(token_R=plan.token_R[: arriving.rows])
        return DispatchedTokens(permute(arriving.tokens_PD, plan), plan.counts_E, (arriving, plan))

    def start_combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> tuple[Tensor, Any]:
        arriving, plan = dispatched.metadata
        y_PD = unpermute(y_RD, arriving.weights_PK, plan)
        return _Combine.apply(y_PD, self.link, arriving.handle)  # pyright: ignore[reportReturnType]

    def finish_combine(self, started: tuple[Tensor, Any]) -> Tensor:
        sum_TD, event = started
        event.current_stream_wait()
        return sum_TD
