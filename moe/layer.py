"""The MoE layer: route, dispatch, experts, combine; the shared expert overlaps with dispatch and combine.

B sequences, S tokens of each, T = B * S tokens, D width, F hidden width of the shared expert.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .argument_checks import check_config, check_dtype, check_hidden
from .config import ModelConfig, Products
from .dispatch import Dispatcher, FusedDispatcher, LocalDispatcher
from .experts import Experts
from .feedforward import FeedForward
from .fp8 import round_tokens
from .init import initialise
from .linear import Linear
from .router import Router, RoutingStats
from .token_info import TokenInfo, layer_keys


class MoELayer(nn.Module):
    """A sparse feed-forward: each token passes its top-k experts and, if there is one, the shared expert.

    Its weights, of type `dtype`, are those that block `index` of a model has when training begins with this seed (moe/init.py);
    seed=None leaves them uninitialised. `dispatcher` knows where the experts are: on this device, or (parallel/dispatch/) on other
    ranks too. Raises TypeError or ValueError, one line, for a `config` that is no ModelConfig or describes no layer with experts.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, *, seed: int | None = 1, index: int = 0) -> None:
        super().__init__()
        check_config(config, "MoELayer")
        check_dtype("dtype", dtype)
        if not config.moe.experts:
            raise ValueError("moe.experts=0: must be at least 1 in a layer with experts; nearest valid: moe.experts=1")
        self.config, moe = config, config.moe
        self.router = Router(config.width, moe, dtype)
        # The fused gradient of a choice's weight takes products for the exact ones that those in FP8 are not.
        self.dispatcher: Dispatcher = (FusedDispatcher if moe.products is Products.wide else LocalDispatcher)(moe.experts)
        settings = moe.activation, moe.bias, moe.dropout, moe.products
        self.experts = Experts(moe.experts, config.width, moe.hidden, dtype, *settings)
        settings = config.activation, moe.dropout, moe.products
        self.shared = FeedForward(config.width, moe.shared_hidden, dtype, *settings) if moe.shared_hidden else None
        self.rounds_tokens = False
        """Whether the experts take tokens as they arrive if they travel in FP8: on every layout, also where they do not travel."""
        self.shared_gate = Linear(config.width, 1, dtype) if moe.shared_hidden and moe.shared_gate else None
        if seed is not None:
            initialise(self, seed, f"layers.{index}.moe.")

    def forward(self, x_BSD: Tensor, tokens: TokenInfo | None = None) -> tuple[Tensor, RoutingStats]:
        """(B, S, D) to (B, S, D), and the router's statistics. Dropped tokens get zeros; the residual carries them on."""
        check_hidden(x_BSD, self.config.width)
        routing, keys_BS = self.router(x_BSD, tokens), None
        if self.experts.dropout.drops:
            keys_BS = layer_keys(x_BSD, tokens or TokenInfo())
            routing = routing._replace(keys_T=keys_BS.flatten())
        shared = partial(self._start_shared, x_BSD, keys_BS)
        x_TD = round_tokens(x_BSD.flatten(0, 1)) if self.rounds_tokens else x_BSD.flatten(0, 1)
        y_TD, shared_BSD, rows, overflow = self.dispatcher.run(x_TD, routing, self.experts, shared)
        if self.router.null is not None:
            y_TD = y_TD + self.router.null(x_BSD.flatten(0, 1), routing.experts_TK, routing.weights_TK)
        y_BSD = y_TD.view_as(x_BSD)
        stats, metrics = routing.stats._replace(overflow=overflow), routing.stats.router_metrics
        if metrics is not None:
            rows = rows if isinstance(rows, Tensor) else torch.full_like(metrics.tokens, rows)
            stats = stats._replace(router_metrics=metrics._replace(rows=rows))
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD, stats

    def _start_shared(self, x_BSD: Tensor, keys_BS: Tensor | None) -> Callable[[], Tensor | None]:
        """Computes the first product of the shared expert. Returns a function for the rest, which returns its output."""
        if self.shared is None:
            return lambda: None
        return partial(self._finish_shared, x_BSD, self.shared.hidden_columns(x_BSD, keys_BS))

    def _finish_shared(self, x_BSD: Tensor, hidden_BSF: Tensor) -> Tensor:
        assert self.shared is not None
        y_BSD = self.shared.down_product(hidden_BSF)
        return y_BSD if self.shared_gate is None else self.shared_gate(x_BSD).sigmoid() * y_BSD

    def extra_repr(self) -> str:
        moe, capacity = self.config.moe, self.config.moe.capacity
        factor = capacity.factor or capacity.schedule
        room = f"capacity {factor} of scope {capacity.scope.value}" if factor else "dropless"
        numbers = sum(parameter.numel() for parameter in self.parameters())
        sizes = f"{moe.experts} experts x {self.config.width} x {moe.hidden}, top_k={moe.top_k}, {room}"
        return f"{sizes}, {numbers:,} parameters, {str(self.experts.down.dtype).removeprefix('torch.')}"
