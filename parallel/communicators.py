"""Which process groups a layout and a model need, and what travels in each. Does not import torch or start anything."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from ..moe.config import ModelConfig, Scope
from ..moe.param_count import moe_layers
from ..moe.param_shapes import shapes
from .config import Exchange, ParallelConfig
from .layout import (
    DENSE,
    digits,
    ends,
    members,
    mesh_sizes,
    node_digits,
    product_of,
    sliced_dim,
    sliced_dim_of_experts,
    stays_whole,
)
from .pipeline.schedule import stage_hops
from .pipeline.stages import copies_embedding


class Use(NamedTuple):
    """An axis that a layout uses, by its dimensions."""

    names: tuple[str, ...]
    travels: str
    """What its ranks send to each other."""
    sums: bool = False
    """Whether that is only sums and small gathers, so that the groups of parts of its dimensions do, one after the other."""


class Communicator(NamedTuple):
    """A process group of a rank."""

    ranks: tuple[int, ...]
    uses: list[Use]
    """The axes that share it."""


def replicated(name: str, by_fsdp: bool, config: ModelConfig) -> tuple[str, ...]:
    """Returns the dimensions of the ranks that hold the same shard of a parameter. `by_fsdp`: FSDP shards it."""
    if ".experts." in name:
        sharded, sliced, dims = ("expert_shard",), sliced_dim_of_experts(name), ("expert_replicate",)
    else:
        sharded, sliced, dims = ("shard", "context"), sliced_dim(name, config), ("replicate",)
    whole = (dims[0].replace("replicate", "tensor"),) if sliced is None else ()
    return (*dims, *(() if by_fsdp else sharded), *whole)


def axes_used(config: ModelConfig, parallel: ParallelConfig) -> list[Use]:
    """Returns the axes that any stage may use, in the order in which all ranks create their groups; some may have one rank.

    Left out are those of the hierarchical exchange, and between stages.
    """
    has_experts, scopes = moe_layers(config) + config.mtp_depth > 0, {config.moe.balance.scope, config.moe.capacity.scope}
    found = [
        Use(DENSE, "once a step: counts, losses, norms and flags"),
        Use(("tensor",), "every layer: sequences gathered, partial sums scattered"),
        Use(("context",), "every attention: keys and values, or heads, of whole sequences"),
    ]
    if has_experts and parallel.exchange is not Exchange.hierarchical:
        found.append(Use(("expert",), "every MoE layer: tokens to their experts and back"))
    if has_experts:
        found.append(Use(("expert_tensor",), "every MoE layer: rows to all of them, partial sums back"))
    if parallel.shard > 1:
        found.append(Use(("shard", "context"), "FSDP2: weights gathered, gradients summed and scattered"))
        found += [Use(("expert_shard",), "FSDP2: the same for the weights of experts")] if has_experts else []
    by_fsdp = {name: parallel.shard > 1 and not stays_whole(name, len(shape)) for name, shape in shapes(config).items()}
    replicas = {replicated(name, sharded, config) for name, sharded in by_fsdp.items()}
    large = {("replicate",), ("expert_replicate",)} if parallel.shard > 1 else {DENSE[1:4], ("expert_replicate", "expert_shard")}
    for dims in sorted(replicas, key=lambda dims: (dims not in large, dims)):
        found.append(Use(dims, f"once a step: gradients{' of experts' * ('expert' in dims[0])} summed", sums=dims not in large))
    if has_experts and (Scope.sequence in scopes or config.moe.balance.sequence_coefficient):
        found.append(Use(("context", "tensor"), "scope sequence: counts of the tokens of a sequence", sums=True))
    if has_experts and Scope.batch in scopes:
        found.append(Use(DENSE[1:], "scope batch: counts of the tokens of a micro-batch", sums=True))
    return found


def communicators(config: ModelConfig, parallel: ParallelConfig, world: int, node: int, rank: int = 0) -> list[Communicator]:
    """Returns the process groups of a rank, the world's first, without the links to other stages. `node`: ranks of a node."""
    sizes = mesh_sizes(parallel, world)
    found: dict[tuple[int, ...], Communicator] = {}

    def add(ranks: tuple[int, ...], use: Use) -> None:
        if len(ranks) > 1:  # a rank alone has no group
            found.setdefault(ranks, Communicator(ranks, [])).uses.append(use)

    for use in axes_used(config, parallel):
        dims = digits(use.names, sizes)
        if not use.sums or len(product_of(rank, dims, found) or [()]) == 1:
            add(members(rank, dims), use)
    if parallel.exchange is Exchange.hierarchical:
        for dim in node_digits(sizes, node):
            add(members(rank, [dim]), Use(("expert",), "every MoE layer: tokens to nodes of their experts, or inside one"))
    if parallel.pipeline > 1 and copies_embedding(config, parallel):
        dims = ("replicate",) if parallel.shard > 1 else DENSE[1:4]
        both = ends(rank, digits(dims, sizes), parallel.pipeline, world)
        add(both, Use(("pipeline", *dims), "once a step: gradients of the copied embedding"))
    return list(found.values())


def links(parallel: ParallelConfig) -> int:
    """Returns the most groups of two ranks that a rank has for messages to and from the stages before and after its own."""
    hops = stage_hops(parallel.pipeline_schedule, parallel.pipeline, parallel.pipeline_stages)
    return max(2 * sum(place in hop for hop in hops) for place in range(parallel.pipeline))


def communicator_table(config: ModelConfig, parallel: ParallelConfig, world: int, node: int) -> Iterator[str]:
    """Yields a line for each axis that a rank uses, with the group of rank 0, and a line that counts the groups."""
    sizes, found = mesh_sizes(parallel, world), communicators(config, parallel, world, node)
    yield _line("group of", "ranks", "groups", "the first", "where", "what travels in it")
    for ranks, uses in found:
        nodes = len({rank // node for rank in ranks})
        place = str(world // len(ranks)), _listed(ranks), "inside a node" if nodes == 1 else f"over {nodes} nodes"
        for line in dict.fromkeys((*_named(use, len(ranks), sizes), use.travels) for use in uses):
            yield _line(*line[:2], *place, line[2])
            place = "", "the same", ""
    known = {ranks for ranks, _ in found}
    for use in axes_used(config, parallel):
        parts = product_of(0, digits(use.names, sizes), known) if use.sums else None
        if parts is not None and len(parts) > 1:
            size = math.prod(map(len, parts))
            yield _line(*_named(use, size, sizes), "", f"by {len(parts)} groups above", "", use.travels)
    several = links(parallel)
    if several:
        pair = f"0,{world // parallel.pipeline}"
        yield _line("a link between stages", "2", "", pair, "", "every micro-batch: activations forward, gradients back")
    yield f"A rank is in {len(found)} group{'s' * (len(found) != 1)}" + (f", and has {several} links." if several else ".")


def _line(name: str, ranks: str, groups: str, first: str, where: str, travels: str) -> str:
    return f"{name:<28}{ranks:>12}{groups:>8}  {first:<18}{where:<16}{travels}"


def _named(use: Use, size: int, sizes: dict[str, int]) -> tuple[str, str]:
    """Returns the dimensions of more than one rank, and their sizes if these make the `size` of the group."""
    dims = [dim for dim in use.names if sizes[dim] > 1]
    of_dims = [sizes[dim] for dim in dims]
    if use.names == DENSE:
        return "all ranks", str(size)
    return " x ".join(dims), " x ".join(map(str, of_dims)) if math.prod(of_dims) == size else str(size)


def _listed(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 3:
        return ",".join(map(str, ranks))
    run = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if run else f"{ranks[0]},{ranks[1]},..,{ranks[-1]}"
