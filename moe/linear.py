"""Linear, embedding and norms. Weights may be wider than the activations: they are cast to the activations' type where used."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import linear


class Linear(nn.Module):
    """x @ weight.T + bias for x of shape (..., inputs); weight of shape (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.adds_bias = bias
        """False where the output is one part of a sum and another part has the bias already."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None and self.adds_bias else None
        return linear(x, self.weight, bias)


class Embedding(nn.Module):
    """Rows of weight (vocabulary, width) by token id."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


class HeadsNorm(nn.Module):
    """RMSNorm over all heads together, for x of shape (..., H, h), where this device may hold some of the heads.

    `add_up` sums a tensor over the devices that hold the others; `width` is that of all heads.
    """

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.epsilon = width, epsilon
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.add_up: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        squares = squares if self.add_up is None else self.add_up(squares)
        normed = wide * (squares / self.width + self.epsilon).rsqrt()
        return (normed * self.weight.to(wide.dtype).view(x.shape[-2:])).to(x.dtype)
