"""The bytes of optimizer states, and the blocks in which 8-bit ones share a scale. Without torch.

Routers and tensors of one dimension (norms, biases) are few and keep moments as wide as weights.
"""

import itertools
import math
from collections.abc import Mapping

from ...parallel.layout import stays_whole
from .config import GradientDtype, OptimizerConfig, OptimizerStates, Precision
from .matrices import one_moment

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


def gradient_bytes(name: str, dims: int, optimizer: OptimizerConfig, precision: Precision) -> int:
    """Returns the bytes of an element of the gradient of the parameter `name`."""
    if optimizer.gradients is GradientDtype.bf16 and not stays_whole(name, dims):
        return 2
    return 8 if precision is Precision.fp64 else 4


Shapes = Mapping[str, tuple[int, ...]]


def moment_bytes(held: Shapes, whole: Shapes, optimizer: OptimizerConfig, precision: Precision) -> int:
    """Returns the bytes of the moments of what a rank holds of each parameter, wherever they are; of Muon there is one.

    `whole`: the shapes of the parameters on all ranks.
    """
    wide, total = 8 if precision is Precision.fp64 else 4, 0
    for name, shape in held.items():
        elements = math.prod(shape)
        if one_moment(name, whole[name], optimizer.of_matrices):
            total += wide * elements
            continue
        match states_of(optimizer.states, name, len(shape)):
            case OptimizerStates.fp32:
                total += 2 * wide * elements
            case OptimizerStates.bf16:
                total += 2 * 2 * elements
            case OptimizerStates.int8:
                total += 2 * (elements + 4 * elements // block_of(whole[name][-1]))
    return total
