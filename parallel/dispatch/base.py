"""The base of all exchanges: dispatch and combine in two halves each, so that computation overlaps with communication."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...moe.dispatch import DispatchedTokens, Dispatcher, DispatcherOutput, ExpertsFn, OverlapFn
from ...moe.router import Routing


class ExpertParallelDispatcher(Dispatcher):
    """Exchanges rows with the ranks of their experts, in `chunks` of tokens: one travels while the experts compute another."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.narrow = False
        """Whether tokens travel to the experts in e4m3."""

    @abstractmethod
    def start_dispatch(self, x_TD: Tensor, routing: Routing) -> Any:
        """Starts to send tokens to the ranks of their experts."""

    @abstractmethod
    def finish_dispatch(self, started: Any) -> DispatchedTokens:
        """Waits for the rows of this rank's experts."""

    @abstractmethod
    def start_combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> Any:
        """Starts to send the experts' outputs to the ranks of their tokens."""

    @abstractmethod
    def finish_combine(self, started: Any) -> Tensor:
        """Waits for them. Returns the weighted sum of each own token, (T, D)."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> DispatchedTokens:
        return self.finish_dispatch(self.start_dispatch(x_TD, routing))

    def combine(self, y_RD: Tensor, dispatched: DispatchedTokens) -> Tensor:
        return self.finish_combine(self.start_combine(y_RD, dispatched))

    def run(self, x_TD: Tensor, routing: Routing, experts: ExpertsFn, overlap_fn: OverlapFn) -> DispatcherOutput:
        x_chunks = x_TD.tensor_split(self.chunks) if self.chunks > 1 else [x_TD]  # even a split in one has a gradient to copy
        chunks = list(zip(x_chunks, split(routing, self.chunks), strict=True))
        following, finish_overlapped, combining, rows = self.start_dispatch(*chunks[0]), overlap_fn(), [], 0
        for next_chunk in [*chunks[1:], None]:
            # The next rows start first: the host waits for their counts, and only queues the experts' work on a GPU.
            started, following = following, None if next_chunk is None else self.start_dispatch(*next_chunk)
            dispatched = self.finish_dispatch(started)
            rows += len(dispatched.tokens_RD)
            combining.append(self.start_combine(dispatched.through(experts), dispatched))
        overlapped = finish_overlapped()
        y = [self.finish_combine(started) for started in combining]
        return DispatcherOutput(torch.cat(y) if len(y) > 1 else y[0], overlapped, rows)


def split(routing: Routing, chunks: int) -> list[Routing]:
    """Returns the routing of each chunk of tokens; the statistics stay those of all tokens."""
    if chunks == 1:
        return [routing]
    kept = [None] * chunks if routing.kept_TK is None else routing.kept_TK.tensor_split(chunks)
    keys = [None] * chunks if routing.keys_T is None else routing.keys_T.tensor_split(chunks)
    parts = zip(routing.experts_TK.tensor_split(chunks), routing.weights_TK.tensor_split(chunks), kept, keys, strict=True)
    return [routing._replace(experts_TK=e, weights_TK=w, kept_TK=k, keys_T=key) for e, w, k, key in parts]
