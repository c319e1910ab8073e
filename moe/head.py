"""The head: from the last hidden states to logits. A training step takes its loss inside, so that all logits never exist at once.

D width, V vocabulary (on this device), T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .products import linear
from .softmax import softcapped

HeadLoss = Callable[[Tensor, Tensor, "Head"], Tensor]
"""From hidden states (..., D), the weight (V, D) and the head to a scalar."""


class Head(nn.Module):
    """x @ weight.T, times a multiplier, softly capped. With tied embeddings the embedding stays the only owner of the weight."""

    def __init__(
        self, width: int, vocabulary: int, dtype: torch.dtype, tied: nn.Module | None, multiplier: float, softcap: float | None
    ) -> None:
        super().__init__()
        self.multiplier, self.softcap = multiplier, softcap
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))
        self.owner = (self if tied is None else tied,)  # in a tuple, so that it is not registered a second time

    def forward(self, x: Tensor, loss: HeadLoss | None = None) -> Any:
        """Logits (..., V) of hidden states (..., D), or what `loss` makes of these."""
        weight_VD = self.owner[0].get_parameter("weight")
        return self.shape(linear(x, weight_VD)) if loss is None else loss(x, weight_VD, self)

    def shape(self, products: Tensor) -> Tensor:
        """Logits from the products with the weight."""
        logits = products if self.multiplier == 1.0 else products * self.multiplier
        return logits if self.softcap is None else softcapped(logits, self.softcap)

    def shape_backward(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """The gradient of the products from that of the logits, which only a soft cap needs."""
        if self.softcap is not None:
            assert logits is not None
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.multiplier == 1.0 else gradient * self.multiplier
