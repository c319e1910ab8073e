"""The bytes of optimizer states, and the blocks in which 8-bit ones share a scale. Without torch.

Routers and tensors of one dimension (norms, biases) are few and keep moments as wide as weights.
"""

import itertools
import math
from collections.abc import Mapping

from ...parallel.layout import stays_whole
from .config import OptimizerConfig, OptimizerStates, Precision

LARGEST_BLOCK = 256
"""Elements, as in the moments of Dettmers et al. 2022 at most 2048; a scale of 4 bytes for each."""
CUTS = 8
"""Into so many equal parts, or any number that divides it, a row is cut between blocks, if its length allows so many."""


def block_of(columns: int) -> int:
    """Returns the elements of a block, which is a part of a row of the GLOBAL tensor: the same on every layout."""
    part = columns // math.gcd(columns, CUTS)
    return next(part // pieces for pieces in itertools.count(1) if part % pieces == 0 and part // pieces <= LARGEST_BLOCK)


def states_of(states: OptimizerStates, name: str, dims: int) -> OptimizerStates:
    """Returns how the moments of the parameter `name` are kept: fp32 stands for the dtype of the weights."""
    return OptimizerStates.fp32 if stays_whole(name, dims) else states


def moment_bytes(shapes: Mapping[str, tuple[int, ...]], optimizer: OptimizerConfig, precision: Precision) -> int:
    """Returns the bytes of both moments of parameters of these shapes, wherever they are."""
    wide, total = 8 if precision is Precision.fp64 else 4, 0
    for name, shape in shapes.items():
        elements = math.prod(shape)
        match states_of(optimizer.states, name, len(shape)):
            case OptimizerStates.fp32:
                total += 2 * wide * elements
            case OptimizerStates.bf16:
                total += 2 * 2 * elements
            case OptimizerStates.int8:
                total += 2 * (elements + 4 * elements // block_of(shape[-1]))
    return total
