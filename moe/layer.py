"""The MoE layer: route, dispatch, experts, combine.

B sequences, S tokens of each, T = B * S tokens, D width, R rows that arrived at the experts of this device.
"""

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .dispatch import Dispatcher, LocalDispatcher
from .experts import Experts
from .feedforward import FeedForward
from .linear import Linear
from .router import Router, RoutingStats
from .tokens import Tokens


class MoELayer(nn.Module):
    """A sparse feed-forward: each token passes its top-k experts and, if there is one, the shared expert.

    `dispatcher` decides where the experts are: on this device, or (parallel/expert.py) on other ranks too.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        moe = config.moe
        self.router = Router(config.width, moe, dtype)
        self.dispatcher: Dispatcher = LocalDispatcher(moe.experts)
        self.experts = Experts(moe.experts, config.width, moe.hidden, dtype, moe.activation, moe.bias)
        self.shared = FeedForward(config.width, moe.shared_hidden, dtype, config.activation) if moe.shared_hidden else None
        self.shared_gate = Linear(config.width, 1, dtype) if moe.shared_hidden and moe.shared_gate else None

    def forward(self, x_BSD: Tensor, tokens: Tokens | None = None) -> tuple[Tensor, RoutingStats]:
        """(B, S, D) to (B, S, D), and what the router did. Dropped tokens get zeros (the residual passes them on)."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_BSD, tokens)
        arrived = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(arrived.tokens_RD, arrived.counts_E)
        y_BSD = self.dispatcher.combine(y_RD, arrived).view_as(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self._shared(self.shared, x_BSD)
        return y_BSD, routing.stats

    def _shared(self, shared: FeedForward, x_BSD: Tensor) -> Tensor:
        return shared(x_BSD) if self.shared_gate is None else self.shared_gate(x_BSD).sigmoid() * shared(x_BSD)
