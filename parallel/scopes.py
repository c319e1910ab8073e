"""Scopes across ranks: which choices stand ahead of this rank's, and how often each expert was chosen in a whole scope.

L MoE layers, B sequences of this rank, E experts, D data ranks, N tensor ranks.
"""

from torch import Tensor

from ..moe.capacity import OneDevice, Queue
from ..moe.config import Scope
from .collectives import stack_over, sum_over
from .mesh import Mesh


class RankSurroundings(OneDevice):
    """The order of choices is that of one device: by data rank, sequence, slice of the sequence (tensor rank), token."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def queue(self, counts_BE: Tensor, tokens_per_sequence: int, scope: Scope) -> Queue:
        """Gathers the counts of the ranks that share the capacity."""
        if scope is Scope.rank:
            return super().queue(counts_BE, tokens_per_sequence, scope)
        tensor, tokens = self.mesh.tensor, tokens_per_sequence * self.mesh.tensor.size
        if scope is Scope.sequence:
            counts_NBE = stack_over(counts_BE, tensor)
            return Queue((counts_NBE.cumsum(0) - counts_NBE)[tensor.rank], tokens)
        counts_DNBE = stack_over(counts_BE, self.mesh.everyone).unflatten(0, (-1, tensor.size))
        counts_DBNE = counts_DNBE.transpose(1, 2)
        flat = counts_DBNE.flatten(0, 2)
        ahead_DBNE = (flat.cumsum(0) - flat).view_as(counts_DBNE)
        return Queue(ahead_DBNE[self.mesh.data.rank, :, tensor.rank], tokens * len(counts_BE) * self.mesh.data.size)


def scope_counts(counts_LBE: Tensor, scope: Scope, mesh: Mesh) -> Tensor:
    """Choices of each expert in the whole scope: (L, B, E) for sequence, else (L, E). One all-reduce at most."""
    match scope:
        case Scope.sequence:
            return sum_over(counts_LBE.clone(), mesh.tensor)
        case Scope.batch:
            return sum_over(counts_LBE.sum(1), mesh.everyone)
        case Scope.rank:
            return counts_LBE.sum(1)
