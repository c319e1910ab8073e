"""The decoder: embed, blocks, norm, head. Pre-norm residual blocks, each attention and then a dense or MoE feed-forward.

B sequences, S tokens of each, D width, V vocabulary, T = B * S tokens, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, KeyValueCache, Turns, rotary_turns
from .config import ModelConfig
from .feedforward import FeedForward
from .layer import MoELayer
from .linear import Embedding, Linear, RMSNorm, TiedHead
from .router import RoutingStats, warn_of_lookahead
from .tokens import Place, Tokens, describe


class Transformer(nn.Module):
    """A causal language model.

    `activations` is the type that flows through the blocks; weights are kept in `weights` and cast where they are used, so bf16
    activations keep fp32 weights and fp32 gradients. Built on whatever device is current (`with torch.device("meta")`), with
    weights that are not initialised: see moe/init.py.
    """

    def __init__(self, config: ModelConfig, activations: torch.dtype = torch.float32, weights: torch.dtype | None = None) -> None:
        super().__init__()
        warn_of_lookahead(config.moe)
        self.config = config
        self.activations = activations
        self.weights = weights = weights or torch.promote_types(activations, torch.float32)
        self.embedding: nn.Module = Embedding(config.vocabulary, config.width, dtype=weights)
        self.layers = nn.ModuleDict({str(i): Block(config, i, weights) for i in range(config.layers)})
        self.norm = RMSNorm(config.width, config.norm_epsilon, dtype=weights)
        self.head: nn.Module = (
            TiedHead(self.embedding) if config.tie_embeddings else Linear(config.width, config.vocabulary, dtype=weights)
        )

    @property
    def blocks(self) -> list["Block"]:
        """The blocks in order."""
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def forward(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
        with_stats: bool = False,
        place: Place | None = None,
    ) -> Any:
        """Logits of shape (B, S, V); with `with_stats` a pair of those and the routing statistics of each MoE layer.

        valid_BS marks the tokens that the statistics count (None: all). With a `cache` (one per block, see
        `KeyValueCache`), ids_BS are the tokens that follow those already in it. `place` (None: the run's first rows) decides
        what is random in training; outside of it nothing is.
        """
        tokens = describe(ids_BS, valid_BS, (place or Place()) if self.training else None)
        start = cache[0].length if cache else 0
        x_BSD = self.embedding(ids_BS).to(self.activations)
        turns = rotary_turns(self.config, start, ids_BS.shape[1], ids_BS.device, self.activations)
        stats: list[RoutingStats] = []
        for index, block in enumerate(self.blocks):
            x_BSD, routed = block(x_BSD, turns, tokens._replace(layer=index), cache[index] if cache else None)
            if routed is not None:
                stats.append(routed)
        logits_BSV = self.head(self.norm(x_BSD))
        return (logits_BSV, stats) if with_stats else logits_BSV


class Block(nn.Module):
    """One transformer block, dense or MoE by its index: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, weights: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon, dtype=weights)
        self.attention = Attention(config, weights)
        self.feedforward_norm = RMSNorm(config.width, config.norm_epsilon, dtype=weights)
        if config.moe_layer(index):
            self.moe: MoELayer | None = MoELayer(config, weights)
            self.dense: FeedForward | None = None
        else:
            self.moe, self.dense = None, FeedForward(config.width, config.hidden, weights)

    def forward(
        self, x_BSD: Tensor, turns: Turns, tokens: Tokens | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), turns, cache)
        normed_BSD = self.feedforward_norm(x_BSD)
        if self.moe is None:
            assert self.dense is not None
            return x_BSD + self.dense(normed_BSD), None
        y_BSD, stats = self.moe(normed_BSD, tokens)
        return x_BSD + y_BSD, stats
