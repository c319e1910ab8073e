"""The error of a tensor by its worst row, so that a single wrong row is seen.

The error is the norm of the difference of the worst row, over the root mean square of the norms of all rows. Rounding changes all
rows a little; a wrong kernel makes single rows completely wrong, however many are right.
"""

import math

import torch
from torch import Tensor

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float64: 1e-11}
"""Limits for one operator or layer with random inputs, against fp64."""


def worst_row(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The error of rows along the last dimension. `floor` is the smallest norm to divide by. Infinite if the shapes differ."""
    return worst(value, expected, expected.shape[-1] if expected.ndim > 1 else expected.numel(), floor)


def worst_matrix(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The error of weights and their gradients, where each matrix counts as one row: one per expert, or the whole tensor."""
    return worst(value, expected, expected[0].numel() if expected.ndim > 2 and len(expected) else expected.numel(), floor)


def worst(value: Tensor, expected: Tensor, size: int, floor: float) -> float:
    """The error of rows of `size` elements."""
    if value.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    value, expected = (x.detach().cpu().double().reshape(-1, size) for x in (value, expected))
    typical = float(expected.square().sum(-1).mean().sqrt())  # the root mean square of the norms of the rows
    most = float((value - expected).norm(dim=-1).max()) / max(typical, floor, 1e-30)
    return most if not math.isnan(most) else math.inf
