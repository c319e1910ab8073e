"""Dropout whose masks are a function of tokens and columns alone, so of no layout, recomputation or accumulation.

C columns of x.
"""

import torch
from torch import Tensor, nn

from .token_info import Purpose, fold_in

LANES, LEVELS = 4, 2**16
"""A hash of 64 bits decides about four columns, with a number of 16 bits for each."""


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` in training, and scales the others so that the mean stays (Srivastava et al. 2014).

    The rate is rounded to a multiple of 2**-16, and so is the scale exact.
    """

    def __init__(self, rate: float, purpose: Purpose) -> None:
        super().__init__()
        self.purpose = purpose
        self.dropped_levels = min(round(rate * LEVELS), LEVELS - 1)
        self.scale = LEVELS / (LEVELS - self.dropped_levels)
        self.first_column = 0
        """Where the columns of x begin in the tensor of one device: above 0 if x is a slice."""

    def extra_repr(self) -> str:
        return f"{self.dropped_levels / LEVELS:g}"

    @property
    def drops(self) -> bool:
        """Whether elements are dropped now."""
        return self.training and self.dropped_levels > 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """(..., C) to (..., C). `keys` (...) are the random keys of the tokens, int64; needed only if `drops`."""
        if not self.drops:
            return x
        assert keys is not None
        return x.masked_fill(~self.keep(keys, x.shape[-1]), 0.0) * self.scale

    def keep(self, keys: Tensor, columns: int) -> Tensor:
        """Booleans (..., C): False for elements to drop."""
        start, end = self.first_column // LANES, -(-(self.first_column + columns) // LANES)
        words = torch.arange(start, end, device=keys.device)
        lanes = fold_in(fold_in(keys, self.purpose).unsqueeze(-1), words).view(torch.int16)
        return lanes.narrow(-1, self.first_column - start * LANES, columns) >= self.dropped_levels - LEVELS // 2
