"""The hierarchical exchange: a token crosses to each node with any of its experts once, then goes to the ranks inside that node.

Between nodes a rank talks only to those with its own place in theirs (DeepSeek-V3, section 3.2.2). Both hops are deduplicated, so
with group-limited routing the slow network carries at most `top_groups` rows of a token when the nodes are the groups.
"""

from ..mesh import Axis, Mesh
from .deduplicated import DeduplicatedDispatcher


def hierarchical_dispatcher(experts: int, mesh: Mesh, node_ranks: int, chunks: int = 1) -> DeduplicatedDispatcher:
    """`node_ranks` ranks of a host; the ranks of the expert axis must fill whole nodes, or lie inside one."""
    return DeduplicatedDispatcher(experts, node_axes(mesh, node_ranks), chunks)


def node_axes(mesh: Mesh, node_ranks: int) -> list[Axis]:
    """The expert axis as nodes x ranks of a node; inside of one node it is one axis."""
    experts = mesh.sizes["expert"]
    inside = min(node_ranks, experts)
    assert experts % inside == 0
    if inside in (1, experts):
        return [mesh.axis("expert")]
    return [mesh.axis_of(ranks) for ranks in _groups(mesh.world, experts, inside)]


def _groups(world: int, experts: int, inside: int) -> list[list[list[int]]]:
    """The groups of ranks between nodes, and those inside of them."""
    starts = range(0, world, experts)
    between = [list(range(start + place, start + experts, inside)) for start in starts for place in range(inside)]
    return [between, [list(range(start, start + inside)) for start in range(0, world, inside)]]
