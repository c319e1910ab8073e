"""Expert tensor parallelism: the ranks of an expert_tensor group hold the same experts, each some of their hidden columns.

The ranks route different tokens (parallel folding), so each brings its rows to all of the group, all compute their part of all
rows, and each takes the parts of its own rows back and adds them up. It is around the experts and behind any dispatcher.
N ranks of the group, E experts of a rank, R rows of this rank, A rows of all of them.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from ..moe.dispatch import Choices, FusedDispatcher, LocalDispatcher
from ..moe.model import Transformer
from .collectives import stack_over
from .dispatch.flights import Exchange, depart, land
from .dispatch.plain import plan_arrivals, read_splits, reorder
from .layout import sliced_dim_of_experts
from .mesh import Axis, Mesh
from .pieces import Piece
from .tensor import narrowed, replace_parameter


def apply_expert_tensor_parallel(model: Transformer, mesh: Mesh, pieces: dict[str, Piece]) -> None:
    """Slice the experts' hidden columns, and put the exchange of rows around their computation. Updates `pieces`."""
    axis = mesh.axis("expert_tensor")
    for name, parameter in list(model.named_parameters()):
        dim = sliced_dim_of_experts(name)
        if dim is not None:
            replace_parameter(model, name, parameter.chunk(axis.size, dim)[axis.rank].contiguous())
            pieces[name] = narrowed(pieces[name], dim, axis)
    for block in model.blocks:
        if block.moe is not None:
            experts = block.moe.experts
            experts.adds_bias = experts.adds_bias and axis.rank == 0
            if isinstance(block.moe.dispatcher, FusedDispatcher):
                block.moe.dispatcher = LocalDispatcher(model.config.moe.experts)  # rows must be there to be shared
            experts.forward = functools.partial(share_rows, experts.forward, axis)


def share_rows(experts: Callable[..., Tensor], axis: Axis, x: Tensor, counts_E: Tensor, choices: Choices | None = None) -> Tensor:
    """Rows (R, D) to (R, D): `experts` gives this rank's part of the rows of all ranks; the sum of the parts is the output.

    Rows are gathered and scattered by all-to-alls, since ranks have different numbers of them; each is the other's gradient.
    """
    assert choices is None, "rows are shared, and tokens have none yet"
    came_NE = stack_over(counts_E, axis)
    sent_N, came_N = read_splits(counts_E.expand_as(came_NE), came_NE, axis.size * len(x))
    flight = depart(x.expand(axis.size, -1, -1).flatten(0, 1), Exchange(sent_N, came_N, axis))
    order_A, back_A = plan_arrivals(came_NE, sum(came_N))
    part_AD = experts(reorder(land(flight), order_A, back_A), came_NE.sum(0))
    flight = depart(reorder(part_AD, back_A, order_A), Exchange(came_N, sent_N, axis))
    return land(flight).view(axis.size, *x.shape).sum(0)
