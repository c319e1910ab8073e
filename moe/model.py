"""The decoder: embed, blocks, norm, head. Pre-norm residual blocks, each attention and then a dense or MoE feed-forward.

B sequences, S tokens of each, D width, V vocabulary, T = B * S tokens, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, KeyValueCache
from .config import AttentionKind, ModelConfig
from .feedforward import FeedForward
from .flexible_attention import block_masks
from .head import Head, HeadLoss
from .layer import MoELayer
from .linear import Embedding, RMSNorm
from .mla import LatentAttention
from .mtp import Prediction, ahead
from .rotary import Turns, rotary_turns
from .router import RoutingStats, draws, warn_of_lookahead
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
        tied = self.embedding if config.tie_embeddings else None
        self.head = Head(config.width, config.vocabulary, weights, tied, config.output_multiplier, config.output_softcap)
        further = (Block(config, config.layers + i, weights) for i in range(config.mtp_depth))
        self.mtp = nn.ModuleDict({str(i): Prediction(config, block, weights) for i, block in enumerate(further)})

    @property
    def blocks(self) -> list["Block"]:
        """All blocks in order; those of multi-token prediction, which only training runs, come last."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
        with_stats: bool = False,
        head_losses: list[HeadLoss] | None = None,
        place: Place | None = None,
        documents_BS: Tensor | None = None,
    ) -> Any:
        """Logits of shape (B, S, V); with `with_stats` a pair of those and the routing statistics of each MoE layer.

        valid_BS marks the tokens that the statistics count (None: all). With a `cache` (one per layer, see `KeyValueCache`),
        ids_BS are the tokens that follow those already in it. With `head_losses` a pair of losses instead of logits and the
        statistics: the first is what head_losses[0] makes of the last hidden states, and in training one follows for each module
        of multi-token prediction (see moe/mtp.py), as do the statistics of its MoE layer. `place` (None: the run's first rows)
        decides what is random in training; outside of it nothing is. `documents_BS` (see moe/documents.py) keeps attention inside
        of each document.
        """
        tokens = describe(ids_BS, valid_BS, (place or Place()) if self.training else None, draws(self.config.moe))
        start = cache[0].length if cache else 0
        turns = rotary_turns(self.config, start, ids_BS.shape[1], ids_BS.device, self.activations, documents_BS)
        if cache is None:
            turns = turns._replace(blocks=block_masks(self.config, ids_BS, self.activations, documents_BS))
        x_BSD = self._embed(ids_BS)
        stats: list[RoutingStats | None] = []
        for index, block in enumerate(self.layers.values()):
            x_BSD, routed = block(x_BSD, turns, tokens._replace(layer=index), cache[index] if cache else None)
            stats.append(routed)
        of_moe_layers = [routed for routed in stats if routed is not None]
        if head_losses is None:
            logits_BSV = self.head(self.norm(x_BSD))
            return (logits_BSV, of_moe_layers) if with_stats else logits_BSV
        losses = [self.head(self.norm(x_BSD), head_losses[0])]
        if self.training:
            losses += self._predict_further(x_BSD, ids_BS, tokens, turns, of_moe_layers, head_losses[1:])
        return losses, of_moe_layers

    def _predict_further(
        self, x_BSD: Tensor, ids_BS: Tensor, tokens: Tokens, turns: Turns, stats: list[RoutingStats], head_losses: list[HeadLoss]
    ) -> list[Tensor]:
        """The loss of each module, whose positions are valid if their targets are; adds to `stats`."""
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if tokens.valid_BS is None else tokens.valid_BS
        losses = []
        for depth, (module, head_loss) in enumerate(zip(self.mtp.values(), head_losses, strict=True), 1):
            assert isinstance(module, Prediction)
            ids_ahead_BS, valid_ahead_BS = ahead(ids_BS, depth, 0), ahead(valid_BS, depth, False, turns.documents_BS)
            layer = self.config.layers + depth - 1
            seen = tokens._replace(ids_BS=ids_ahead_BS, valid_BS=valid_ahead_BS, layer=layer)
            x_BSD, routed = module(x_BSD, self._embed(ids_ahead_BS), turns, seen)
            stats += [] if routed is None else [routed]
            losses.append(self.head(module.norm(x_BSD), head_loss))
        return losses

    def _embed(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.embedding(ids_BS).to(self.activations)
        return x_BSD if self.config.embedding_multiplier == 1.0 else x_BSD * self.config.embedding_multiplier


class Block(nn.Module):
    """One transformer block, dense or MoE by its index: x + attention(norm(x)), then x + feedforward(norm(x)).

    With sandwich norms also what is added is normed (Gemma 2).
    """

    def __init__(self, config: ModelConfig, index: int, weights: torch.dtype) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.width, config.norm_epsilon, dtype=weights)

        latent = config.attention.kind is AttentionKind.mla
        self.attention_norm, self.feedforward_norm = norm(), norm()
        self.attention = LatentAttention(config, weights, index) if latent else Attention(config, weights, index)
        self.attention_post_norm = norm() if config.sandwich_norms else None
        self.feedforward_post_norm = norm() if config.sandwich_norms else None
        moe = config.moe_layer(index)
        self.moe = MoELayer(config, weights) if moe else None
        self.dense = None if moe else FeedForward(config.width, config.hidden, weights, config.activation)

    def forward(
        self, x_BSD: Tensor, turns: Turns, tokens: Tokens | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        y_BSD = self.attention(self.attention_norm(x_BSD), turns, cache)
        x_BSD = x_BSD + (y_BSD if self.attention_post_norm is None else self.attention_post_norm(y_BSD))
        y_BSD, stats = self._feedforward(self.feedforward_norm(x_BSD), tokens)
        return x_BSD + (y_BSD if self.feedforward_post_norm is None else self.feedforward_post_norm(y_BSD)), stats

    def _feedforward(self, x_BSD: Tensor, tokens: Tokens | None) -> tuple[Tensor, RoutingStats | None]:
        if self.moe is not None:
            return self.moe(x_BSD, tokens)
        assert self.dense is not None
        return self.dense(x_BSD), None
