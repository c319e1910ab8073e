"""The exchange that the configuration asks for."""

import os

from ..config import Exchange, ParallelConfig
from ..layout import node_ranks
from ..mesh import Mesh
from .deduplicated import DeduplicatedDispatcher
from .exchanging import ExchangingDispatcher
from .gather import GatherDispatcher
from .hierarchical import hierarchical_dispatcher
from .plain import PlainDispatcher


def build_dispatcher(experts: int, mesh: Mesh, config: ParallelConfig) -> ExchangingDispatcher:
    """One for all layers: it has no state. `experts` are those of a layer on all ranks."""
    axis, chunks = mesh.axis("expert"), config.overlap_chunks
    match config.exchange:
        case Exchange.plain:
            return PlainDispatcher(experts, axis, chunks)
        case Exchange.deduplicated:
            return DeduplicatedDispatcher(experts, [axis], chunks)
        case Exchange.hierarchical:
            local = node_ranks(config, mesh.world, os.environ.get("LOCAL_WORLD_SIZE"))
            return hierarchical_dispatcher(experts, mesh, local, chunks)
        case Exchange.gather:
            return GatherDispatcher(experts, axis, chunks)
