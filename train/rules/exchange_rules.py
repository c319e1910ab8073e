"""Rules between the settings of the exchange between experts' ranks."""

from collections.abc import Iterator

from ...parallel.config import Exchange
from ...parallel.layout import node_ranks
from ..config import Config
from ..environment import local_world_size
from ..launch_config import Launcher
from .broken import Broken, divisors

INTERVALS = {
    "parallel.node_ranks": "[1, inf)",
    "parallel.overlap_chunks": "[1, inf)",
}
"""Where each of these numbers must lie, unless it is null."""


def exchange(config: Config, world: int) -> Iterator[Broken]:
    p = config.parallel
    if p.overlap_chunks > 1 and config.model.moe.capacity.pad:
        yield Broken("parallel.overlap_chunks", "must be 1 with model.moe.capacity.pad=true, every chunk would be padded", [1])
    if p.exchange is Exchange.hierarchical:
        yield from _nodes(config, world)
    elif p.node_ranks is not None:
        yield Broken("parallel.node_ranks", f"must be null, only parallel.exchange={Exchange.hierarchical.value} reads it", [None])


def _nodes(config: Config, world: int) -> Iterator[Broken]:
    """The ranks that share experts are whole nodes, or lie inside one."""
    p = config.parallel
    local = local_world_size()
    if local is None and config.launch.kind is not Launcher.inline:  # they are still to be started
        local = config.launch.ranks
    ranks = node_ranks(p, world, local)
    if p.expert % ranks == 0 or ranks % p.expert == 0:
        return
    rule = f"must divide parallel.expert={p.expert} or be a multiple of it"
    if p.node_ranks is None:
        rule += f", and a node has {ranks} ranks"
    yield Broken("parallel.node_ranks", rule, divisors(p.expert))
