"""Scopes across ranks: gathers the tokens of a scope, and sums over them.

L MoE layers, B sequences of this rank, S tokens of each here, E router columns, D data ranks, N context x tensor ranks,
T tokens of a scope.
"""

import math

from torch import Tensor

from ..moe.capacity import LocalScope
from ..moe.config import Scope
from .collectives import stack_over, sum_over
from .context import in_order, own_chunks
from .layout import DENSE
from .mesh import Axis, Mesh


class DistributedScope(LocalScope):
    """Tokens have the order of one device: by data rank, sequence, chunk of the sequence (context ranks), slice of a context
    rank's chunks (tensor rank), token."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def tokens(self, sequences: int, length: int, scope: Scope) -> int:
        return super().tokens(sequences, length, scope) * scope_axis(scope, self.mesh).size

    def total(self, x_BE: Tensor, scope: Scope) -> Tensor:
        return sum_over(super().total(x_BE, scope).clone(), scope_axis(scope, self.mesh))

    def gather(self, x_BSE: Tensor, scope: Scope) -> Tensor:
        if scope is Scope.rank:
            return super().gather(x_BSE, scope)
        x_DNBSE = stack_over(x_BSE, scope_axis(scope, self.mesh)).unflatten(0, (-1, self.mesh.sequence.size))
        x_DBSE = x_DNBSE.transpose(1, 2).flatten(2, 3)
        if self.mesh.context.size > 1:
            x_DBSE = in_order(x_DBSE, self.mesh.context, 2)
        return super().gather(x_DBSE.flatten(0, 1), scope)

    def local_part(self, x_GTE: Tensor, sequences: int, length: int, scope: Scope) -> Tensor:
        if scope is Scope.rank:
            return super().local_part(x_GTE, sequences, length, scope)
        data, context, tensor = self.mesh.data, self.mesh.context, self.mesh.tensor
        if scope is Scope.batch:
            x_GTE = super().local_part(x_GTE, sequences * data.size, length * self.mesh.sequence.size, scope)
            x_GTE = x_GTE[data.rank * sequences :][:sequences]
        if context.size > 1:
            x_GTE = own_chunks(x_GTE, context)
        return x_GTE.chunk(tensor.size, dim=1)[tensor.rank]

    def run_length(self, length: int) -> int:
        """Two chunks make a context rank's part of a sequence, which the tensor ranks slice."""
        return length if self.mesh.context.size == 1 else math.gcd(length, length * self.mesh.tensor.size // 2)


def scope_axis(scope: Scope, mesh: Mesh) -> Axis:
    """Returns the ranks that hold the tokens of a scope."""
    match scope:
        case Scope.sequence:
            return mesh.sums("context", "tensor")
        case Scope.batch:
            return mesh.sums(*DENSE[1:])
        case Scope.rank:
            return Axis(1, 0, None)


def scope_sum(x_LBE: Tensor, scope: Scope, mesh: Mesh) -> Tensor:
    """Sums over each whole scope, in at most one all-reduce: (L, B, E) for sequence, else (L, E). Not differentiable."""
    mine = x_LBE if scope is Scope.sequence else x_LBE.sum(1)
    return sum_over(mine.detach().clone(), scope_axis(scope, mesh))
