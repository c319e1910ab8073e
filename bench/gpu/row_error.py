"""How far two tensors are apart, and how far they may be: a tolerance must see one wrong row.

The measure is that of the worst row: the norm of its difference, over the root mean square of the norms of all rows. Rounding makes
all rows a little wrong; a kernel that is wrong makes a row wrong altogether, however many are right.
"""

import math

import torch
from torch import Tensor

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float64: 1e-11}
"""Of one operator or layer with random inputs, against fp64."""


def worst_row(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Rows are along the last dimension. `floor` is the least norm that a row is measured by. Infinite for other shapes."""
    return worst(value, expected, expected.shape[-1] if expected.ndim > 1 else expected.numel(), floor)


def worst_matrix(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The same for weights and their gradients, where a matrix counts as one row: that of each expert, else all there is."""
    return worst(value, expected, expected[0].numel() if expected.ndim > 2 and len(expected) else expected.numel(), floor)


def worst(value: Tensor, expected: Tensor, size: int, floor: float) -> float:
    """The same with rows of so many elements."""
    if value.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    value, expected = (x.detach().cpu().double().reshape(-1, size) for x in (value, expected))
    most = float((value - expected).norm(dim=-1).max()) / max(norm_of_rows(expected), floor, 1e-30)
    return most if not math.isnan(most) else math.inf


def norm_of_rows(x_RN: Tensor) -> float:
    """The root mean square of the rows' norms."""
    return float(x_RN.double().square().sum(-1).mean().sqrt()) if x_RN.numel() else 0.0
