"""The decoder: embed, blocks, norm, head. Pre-norm residual blocks, each attention and then a dense or MoE feed-forward.

B sequences, S tokens of each, D width, V vocabulary, T = B * S tokens, E experts.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .argument_checks import check_config, check_dtype, check_heads, check_ids
from .attention import Attention, KeyValueCache, LatentAttention
from .config import AttentionKind, ModelConfig
from .delta_net import DeltaNet
from .dropout import Dropout
from .feedforward import FeedForward
from .flexible_attention import block_masks
from .init import initialise
from .layer import MoELayer
from .linear import Embedding, Linear, RMSNorm, linear
from .param_count import count
from .rotary import RotaryTables, rotary_tables
from .router import RoutingStats, is_random, warn_of_lookahead
from .softmax import apply_softcap
from .token_info import BatchPosition, Purpose, TokenInfo, build_token_info, layer_keys

# Multi-token prediction (DeepSeek-V3, section 2.2): in training, module d predicts d tokens further than the model.
#
# At position i, module d (from 1) has seen the tokens up to i + d and predicts token i + d + 1.


def residual_norm(config: ModelConfig, dtype: torch.dtype) -> RMSNorm:
    """Returns a norm of the residual stream."""
    return RMSNorm(config.width, config.norm_epsilon, dtype, config.zero_centered_norms)


def attention_of(config: ModelConfig, dtype: torch.dtype, index: int) -> Attention | LatentAttention | DeltaNet:
    """Returns the attention of block `index`, or gated DeltaNet if the block has linear attention."""
    if config.linear_layer(index):
        return DeltaNet(config, dtype)
    latent = config.attention.kind is AttentionKind.mla
    return LatentAttention(config, dtype, index) if latent else Attention(config, dtype, index)


class MTPModule(nn.Module):
    """A block over the hidden states of the module before it, each joined with the embedding of the next token."""

    def __init__(self, config: ModelConfig, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm = (residual_norm(config, dtype) for _ in range(2))
        self.projection = Linear(2 * config.width, config.width, dtype)
        self.block = block
        self.norm = residual_norm(config, dtype)

    def forward(self, hidden_BSD: Tensor, embedded_BSD: Tensor, rotary: RotaryTables, tokens: TokenInfo) -> Any:
        """Returns the residual stream (B, S, D) for the next module, and the block's routing statistics (None if it is dense).

        hidden_BSD is the residual stream of the previous module or of the model, before its last norm or (mtp_after_norm) after it;
        embedded_BSD[:, i] is the embedding of token i + d, first in the joined vector, as in DeepSeek's published weights.
        """
        joined_BSD = torch.cat([self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)], dim=-1)
        x_BSD, routed, _ = self.block(self.projection(joined_BSD), rotary, tokens)
        return x_BSD, routed


def shift_left(x_BS: Tensor, tokens: int, fill: int | bool, documents_BS: Tensor | None = None) -> Tensor:
    """(B, S): the value `tokens` positions further; `fill` if that is beyond the sequence, or beyond the document."""
    shifted_BS = F.pad(x_BS[:, tokens:], (0, min(tokens, x_BS.shape[1])), value=fill)
    if documents_BS is None:
        return shifted_BS
    return shifted_BS.masked_fill(shift_left(documents_BS, tokens, -1) != documents_BS, fill)


HeadLoss = Callable[[Tensor, Tensor, "LMHead"], Tensor]
"""Takes hidden states (..., D), the weight (V, D) and the head, and returns a scalar."""


class LMHead(nn.Module):
    """x @ weight.T, times a multiplier, soft-capped. With tied embeddings it uses the weight of the embedding and owns none.

    A training step computes the loss inside, so that never all logits exist at once.
    """

    def __init__(
        self, width: int, vocabulary: int, dtype: torch.dtype, tied: nn.Module | None, multiplier: float, softcap: float | None
    ) -> None:
        super().__init__()
        self.multiplier, self.softcap = multiplier, softcap
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))
        self.owner = (self if tied is None else tied,)  # in a tuple, so that it is not registered a second time

    def forward(self, x: Tensor, loss: HeadLoss | None = None) -> Any:
        """Returns the logits (..., V) of hidden states (..., D), or the result of `loss` if it is given."""
        weight_VD = self.owner[0].get_parameter("weight")
        return self.to_logits(linear(x, weight_VD)) if loss is None else loss(x, weight_VD, self)

    def extra_repr(self) -> str:
        rows, width = self.owner[0].get_parameter("weight").shape
        return f"{width} -> {rows}{'' if self.owner[0] is self else ', tied to the embedding'}"

    def to_logits(self, products: Tensor) -> Tensor:
        """Applies the multiplier and the soft cap to the products with the weight."""
        logits = products if self.multiplier == 1.0 else products * self.multiplier
        return logits if self.softcap is None else apply_softcap(logits, self.softcap)

    def to_logits_backward(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Returns the gradient of the products from that of the logits; only a soft cap needs the logits."""
        if self.softcap is not None:
            assert logits is not None
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.multiplier == 1.0 else gradient * self.multiplier


def no_tokenizer() -> None:
    """The tokenizer of a model that no file was read for."""


class Layers(nn.ModuleDict):
    """Blocks by their index; `repr` shows neighbours that are alike once."""

    def __repr__(self) -> str:
        runs: list[tuple[list[str], str]] = []
        for index, text in ((index, repr(block)) for index, block in self.items()):
            if not runs or runs[-1][1] != text:
                runs.append(([], text))
            runs[-1][0].append(index)
        names = [f"({each[0]}):" if len(each) == 1 else f"({each[0]} to {each[-1]}): {len(each)} x" for each, _ in runs]
        lines = [f"{name} {text}" for name, (_, text) in zip(names, runs, strict=True)]
        return "\n".join(["Layers(", *(f"  {line}" for text in lines for line in text.split("\n")), ")"])


class Transformer(nn.Module):
    """A causal language model.

    `activations` is the dtype between the blocks; weights have the dtype `weights` and are cast where they are used, so with bf16
    activations weights and gradients are fp32. It is built on the current device. Its weights are those that training begins with
    at this seed (moe/init.py); seed=None leaves them uninitialised, and so does `with torch.device("meta")`. Raises TypeError or
    ValueError, one line, for a `config` that is no ModelConfig or describes no model.
    """

    def __init__(
        self,
        config: ModelConfig,
        activations: torch.dtype = torch.float32,
        weights: torch.dtype | None = None,
        *,
        seed: int | None = 1,
    ) -> None:
        super().__init__()
        check_config(config, "Transformer")
        check_heads(config)
        check_dtype("activations", activations)
        warn_of_lookahead(config.moe)
        self.config = config
        self.activations = activations
        self.weights = weights = weights or torch.promote_types(activations, torch.float32)
        self.rotary_tables: Callable[..., RotaryTables] = rotary_tables  # context parallelism replaces this and the next
        self.block_masks: Callable[..., Any] = block_masks
        self.embedding: nn.Module = Embedding(config.vocabulary, config.width, dtype=weights)
        self.layers = Layers({str(i): Block(config, i, weights) for i in range(config.layers)})
        self.norm = residual_norm(config, weights)
        self.embedding_dropout = Dropout(config.dropout, Purpose.embedding_dropout)
        self.output_dropout = Dropout(config.dropout, Purpose.output_dropout)
        self.is_random = is_random(config.moe) or config.dropout > 0 or config.moe.dropout > 0
        tied = self.embedding if config.tie_embeddings else None
        self.head = LMHead(config.width, config.vocabulary, weights, tied, config.output_multiplier, config.output_softcap)
        further = (Block(config, config.layers + i, weights) for i in range(config.mtp_depth))
        self.mtp = nn.ModuleDict({str(i): MTPModule(config, block, weights) for i, block in enumerate(further)})
        self.open_tokenizer: Callable[[], Any] = no_tokenizer
        if seed is not None:
            initialise(self, seed)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights, with `encode` and `decode` (data/tokenizer_types.py); None for a model made by hand."""
        return self.open_tokenizer()

    def extra_repr(self) -> str:
        config, found = self.config, count(self.config)
        sizes = f"{config.layers} layers, width {config.width}, vocabulary {config.vocabulary}"
        parameters = f"{found.total:,} parameters, {found.active:,} of a token"
        return f"{sizes}, {parameters}, {str(self.weights).removeprefix('torch.')}"

    @property
    def blocks(self) -> list["Block"]:
        """All blocks in order; those of multi-token prediction, which run only in training, come last."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @property
    def block_indices(self) -> list[int]:
        """The index of each of `blocks` in the whole model, of which a stage of a pipeline has a part."""
        return [*map(int, self.layers), *(self.config.layers + int(depth) for depth in self.mtp)]

    def forward(
        self,
        ids_BS: Tensor,
        valid_BS: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
        with_stats: bool = False,
        head_losses: list[HeadLoss] | None = None,
        position: BatchPosition | None = None,
        documents_BS: Tensor | None = None,
    ) -> Any:
        """Returns logits of shape (B, S, V); with `with_stats` a pair of these and the routing statistics of each MoE layer.

        Args:
            valid_BS: tokens that the statistics count; None: all.
            cache: one `KeyValueCache` per layer; ids_BS are then the tokens that follow those in it.
            head_losses: if given, returns a pair of losses and statistics. The first loss is that of the model; in training one
                follows for each module of multi-token prediction, and so do the statistics of its MoE layer.
            position: position in the run, which determines what is random in training; None: the first rows of the run.
            documents_BS: the document of each token (see moe/token_info.py); attention stays inside each document.
        """
        check_ids(ids_BS)
        tokens = build_token_info(ids_BS, valid_BS, (position or BatchPosition()) if self.training else None, self.is_random)
        start = cache[0].length if cache else 0
        rotary = self.rotary_tables(self.config, start, ids_BS.shape[1], ids_BS.device, self.activations, documents_BS)
        if cache is None:
            rotary = rotary._replace(blocks=self.block_masks(self.config, ids_BS, self.activations, documents_BS))
        x_BSD, earlier_BSD = self.embed(ids_BS, tokens), None
        stats: list[RoutingStats | None] = []
        for index, block in enumerate(self.layers.values()):
            seen, cached = tokens._replace(layer=index), cache[index] if cache else None
            x_BSD, routed, earlier_BSD = block(x_BSD, rotary, seen, cached, earlier_BSD)
            stats.append(routed)
        of_moe_layers = [routed for routed in stats if routed is not None]
        normed_BSD = self.output_dropout(self.norm(x_BSD), self.dropout_keys(x_BSD, tokens))
        if head_losses is None:
            logits_BSV = self.head(normed_BSD)
            return (logits_BSV, of_moe_layers) if with_stats else logits_BSV
        losses = [self.head(normed_BSD, head_losses[0])]
        if self.training:
            hidden_BSD = normed_BSD if self.config.mtp_after_norm else x_BSD
            losses += self.mtp_losses(hidden_BSD, ids_BS, tokens, rotary, of_moe_layers, head_losses[1:])
        return losses, of_moe_layers

    def mtp_losses(
        self,
        hidden_BSD: Tensor,
        ids_BS: Tensor,
        tokens: TokenInfo,
        rotary: RotaryTables,
        stats: list[RoutingStats],
        head_losses: list[HeadLoss],
    ) -> list[Tensor]:
        """Returns the loss of each module and appends to `stats`. A position of a module is valid if its target is."""
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if tokens.valid_BS is None else tokens.valid_BS
        losses = []
        for depth, (module, head_loss) in enumerate(zip(self.mtp.values(), head_losses, strict=True), 1):
            assert isinstance(module, MTPModule)
            ids_ahead_BS, valid_ahead_BS = shift_left(ids_BS, depth, 0), shift_left(valid_BS, depth, False, rotary.documents_BS)
            layer = self.config.layers + depth - 1
            seen = tokens._replace(ids_BS=ids_ahead_BS, valid_BS=valid_ahead_BS, layer=layer)
            x_BSD, routed = module(hidden_BSD, self.embed(ids_ahead_BS, seen), rotary, seen)
            stats += [] if routed is None else [routed]
            normed_BSD = self.output_dropout(module.norm(x_BSD), self.dropout_keys(x_BSD, seen))
            hidden_BSD = normed_BSD if self.config.mtp_after_norm else x_BSD
            losses.append(self.head(normed_BSD, head_loss))
        return losses

    def embed(self, ids_BS: Tensor, tokens: TokenInfo) -> Tensor:
        """Returns the embeddings (B, S, D) of ids (B, S), in the type of the activations.

        Raises ValueError for an id that is none; on a GPU the kernel fails instead.
        """
        try:
            x_BSD = self.embedding(ids_BS).to(self.activations)
        except IndexError:
            least, most = ids_BS.aminmax()
            wrong, rows = int(least if least < 0 else most), self.config.vocabulary
            nearest = f"ids_BS.clamp(0, {rows - 1})"
            raise ValueError(f"ids_BS: has the id {wrong}, must be in [0, {rows}); nearest valid: {nearest}") from None
        x_BSD = x_BSD if self.config.embedding_multiplier == 1.0 else x_BSD * self.config.embedding_multiplier
        return self.embedding_dropout(x_BSD, self.dropout_keys(x_BSD, tokens))

    def dropout_keys(self, x_BSD: Tensor, tokens: TokenInfo) -> Tensor | None:
        """Returns the random keys (B, S) of the tokens for dropout, None if there is none now."""
        return layer_keys(x_BSD, tokens) if self.embedding_dropout.drops else None


class Block(nn.Module):
    """A transformer block, dense or MoE by its index: x + attention(norm(x)), then x + feedforward(norm(x)).

    With sandwich norms the outputs of attention and feed-forward are normed too, before they are added (Gemma 2), or, without pre
    norms, only they (OLMo 2). The residual multiplier is a factor of what is added (Granite), and dropout acts on it. With the
    shortcut a block has both feed-forwards: its experts take what the dense one of the block before took (ScMoE, Cai et al. 2024,
    arXiv:2404.05019).
    """

    def __init__(self, config: ModelConfig, index: int, weights: torch.dtype) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = (
            residual_norm(config, weights) if config.pre_norms else None for _ in range(2)
        )
        self.attention = attention_of(config, weights, index)
        self.attention_post_norm, self.feedforward_post_norm = (
            residual_norm(config, weights) if config.sandwich_norms else None for _ in range(2)
        )
        self.residual_multiplier = config.residual_multiplier
        self.attention_dropout = Dropout(config.dropout, Purpose.attention_dropout)
        self.feedforward_dropout = Dropout(config.dropout, Purpose.feedforward_dropout)
        self.shortcut = config.moe.shortcut
        self.moe = MoELayer(config, weights, seed=None) if config.moe_layer(index) else None
        dense = config.dense_layer(index)
        sizes, settings = (config.width, config.hidden, weights), (config.activation, config.dropout, config.products)
        self.dense = FeedForward(*sizes, *settings) if dense else None

    def forward(
        self,
        x_BSD: Tensor,
        rotary: RotaryTables,
        tokens: TokenInfo | None = None,
        cache: KeyValueCache | None = None,
        earlier_BSD: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats | None, Tensor | None]:
        """Returns the residual stream, the routing statistics (None without experts), and `earlier_BSD` of the next block.

        That is the input of the feed-forward, which with the shortcut the experts of the next block take; None without it.
        """
        keys_BS = layer_keys(x_BSD, tokens or TokenInfo()) if self.attention_dropout.drops else None
        y_BSD = self.attention(x_BSD if self.attention_norm is None else self.attention_norm(x_BSD), rotary, cache)
        y_BSD = y_BSD if self.attention_post_norm is None else self.attention_post_norm(y_BSD)
        x_BSD = self._add(x_BSD, self.attention_dropout(y_BSD, keys_BS))
        input_BSD, stats = x_BSD if self.feedforward_norm is None else self.feedforward_norm(x_BSD), None
        if self.moe is not None:
            y_BSD, stats = self.moe(earlier_BSD if self.shortcut else input_BSD, tokens)
        if self.dense is not None:
            dense_BSD = self.dense(input_BSD, keys_BS)
            y_BSD = dense_BSD if self.moe is None else y_BSD + dense_BSD
        y_BSD = y_BSD if self.feedforward_post_norm is None else self.feedforward_post_norm(y_BSD)
        x_BSD = self._add(x_BSD, self.feedforward_dropout(y_BSD, keys_BS))
        return x_BSD, stats, input_BSD if self.shortcut else None

    def _add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + (y_BSD if self.residual_multiplier == 1.0 else y_BSD * self.residual_multiplier)
