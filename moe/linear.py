"""Linear, embedding and norm whose weights may be wider than the activations: they are cast to the activations' type where used."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """x @ weight.T for x of shape (..., inputs); weight of shape (outputs, inputs), no bias."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Rows of weight (vocabulary, width) by token id."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class TiedHead(nn.Module):
    """x @ weight.T with the weight of an embedding, which stays the only owner of it."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.owner = (embedding,)  # in a tuple, so that it is not registered a second time

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.owner[0].get_parameter("weight").to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)
