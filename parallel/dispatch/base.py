"""What all exchanges share: rows depart and land in two calls each, so that there is something to compute in between."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...moe.dispatch import Beside, Compute, DispatchedTokens, Dispatcher, Passed
from ...moe.router import Routing


class ExchangingDispatcher(Dispatcher):
    """Cuts the tokens into `chunks`: the rows of the next one travel while the experts work on this one."""

    def __init__(self, chunks: int = 1) -> None:
        self.chunks = chunks

    @abstractmethod
    def send(self, x_TD: Tensor, routing: Routing) -> Any:
        """Start to send tokens to the ranks of their experts."""

    @abstractmethod
    def receive(self, sent: Any) -> DispatchedTokens:
        """Wait for the rows of this rank's experts."""

    @abstractmethod
    def send_back(self, y_RD: Tensor, arrived: DispatchedTokens) -> Any:
        """Start to send the experts' outputs to the ranks of their tokens."""

    @abstractmethod
    def receive_back(self, sent: Any) -> Tensor:
        """Wait for them: each own token's weighted sum, (T, D)."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> DispatchedTokens:
        return self.receive(self.send(x_TD, routing))

    def combine(self, y_RD: Tensor, arrived: DispatchedTokens) -> Tensor:
        return self.receive_back(self.send_back(y_RD, arrived))

    def run(self, x_TD: Tensor, routing: Routing, experts: Compute, beside: Beside) -> Passed:
        runs = x_TD.tensor_split(self.chunks) if self.chunks > 1 else [x_TD]  # even a split in one has a gradient to copy
        parts = list(zip(runs, split(routing, self.chunks), strict=True))
        sent, result, returning, rows = self.send(*parts[0]), beside(), [], 0
        for following in [*parts[1:], None]:
            # The next rows depart first: their counts are waited for, and the experts' work is only queued on a GPU.
            here, sent = sent, None if following is None else self.send(*following)
            arrived = self.receive(here)
            rows += len(arrived.tokens_RD)
            returning.append(self.send_back(experts(arrived.tokens_RD, arrived.counts_E), arrived))
        y = [self.receive_back(back) for back in returning]
        return Passed(torch.cat(y) if len(y) > 1 else y[0], result, rows)


def split(routing: Routing, chunks: int) -> list[Routing]:
    """The routing of each run of tokens; the statistics are of all."""
    if chunks == 1:
        return [routing]
    kept = [None] * chunks if routing.kept_TK is None else routing.kept_TK.tensor_split(chunks)
    parts = zip(routing.experts_TK.tensor_split(chunks), routing.weights_TK.tensor_split(chunks), kept, strict=True)
    return [routing._replace(experts_TK=e, weights_TK=w, kept_TK=k) for e, w, k in parts]
