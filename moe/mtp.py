"""Multi-token prediction (DeepSeek-V3, section 2.2): in training, module d predicts the token d further than the model does.

B sequences, S tokens of each, D width. Position i of module d (from 1) has seen tokens up to i + d and predicts token i + d + 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .linear import Linear, RMSNorm
from .rotary import Turns
from .tokens import Tokens


class Prediction(nn.Module):
    """One module: a block over what the one before it made of each position, joined with the embedding of the next token."""

    def __init__(self, config: ModelConfig, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        self.hidden_norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        self.projection = Linear(2 * config.width, config.width, dtype)
        self.block = block
        self.norm = RMSNorm(config.width, config.norm_epsilon, dtype)

    def forward(self, hidden_BSD: Tensor, embedded_BSD: Tensor, turns: Turns, tokens: Tokens) -> Any:
        """The residual stream (B, S, D) for the next module, and the block's routing statistics (None if it is dense).

        hidden_BSD is the residual stream of the module before (of the model: before its last norm), embedded_BSD[:, i] the
        embedding of token i + d. The joined vector has the embedding first, as DeepSeek's published weights.
        """
        joined_BSD = torch.cat([self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)], dim=-1)
        return self.block(self.projection(joined_BSD), turns, tokens)


def ahead(x_BS: Tensor, tokens: int, fill: int | bool, documents_BS: Tensor | None = None) -> Tensor:
    """(B, S): at position i what stands at i + tokens; `fill` where that is beyond the sequence, or beyond i's document."""
    shifted_BS = F.pad(x_BS[:, tokens:], (0, min(tokens, x_BS.shape[1])), value=fill)
    if documents_BS is None:
        return shifted_BS
    return shifted_BS.masked_fill(ahead(documents_BS, tokens, -1) != documents_BS, fill)
