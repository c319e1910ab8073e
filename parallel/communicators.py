"""Which process groups a layout and a model need, and what travels in each. Does not import torch or start anything.

A rank is in `MOST` groups at most, since each has a communicator with buffers and threads of its own. Where more axes have ranks of
their own, those that lose least send messages in the group of all ranks, which has nothing else to do during a pass.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ..moe.config import ModelConfig, Scope
from ..moe.param_count import moe_layers
from ..moe.param_shapes import shapes
from .config import Exchange, ParallelConfig
from .layout import (
    DENSE,
    Digit,
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
from .pipeline.message_order import Pair, lanes
from .pipeline.stages import copies_embedding

MOST = 6
"""Process groups of a rank."""

LAST = 6
"""The place in `Use.gives_way` of what gives way only where links that share a group do not suffice."""


class Use(NamedTuple):
    """An axis that a layout uses, by its dimensions."""

    names: tuple[str, ...]
    travels: str
    """What its ranks send to each other."""
    sums: bool = False
    """Whether that is only sums and small gathers, so that the groups of parts of its dimensions do, one after the other."""
    gives_way: int = 0
    """Its place among those that send messages in the group of all ranks if there are too many groups; 0: it has a group always."""
    hop: Digit | None = None
    """The dimension itself, of a hop of the hierarchical exchange, which has no name."""


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


class Grouping(NamedTuple):
    """Which axes of a layout have process groups of their own."""

    by_messages: list[list[Digit]]
    """Those that have none: their ranks send messages in the group of all ranks."""
    links_on_world: bool
    """Whether links to other stages are there too: the first lane of them, or all if they are together."""
    links_together: bool
    """Whether all links of a pipeline are in one group."""
    links: int = 0
    """The most groups of a rank that have links alone."""


def axes_used(config: ModelConfig, parallel: ParallelConfig) -> list[Use]:
    """Returns the axes that any stage may use, in the order in which all ranks create their groups; some may have one rank.

    Left out are those of the hierarchical exchange, and between stages.
    """
    has_experts, scopes = moe_layers(config) + config.mtp_depth > 0, {config.moe.balance.scope, config.moe.capacity.scope}
    found = [
        Use(DENSE, "once a step: counts, losses, norms and flags"),
        Use(("tensor",), "every layer: sequences gathered, partial sums scattered"),
        Use(("context",), "every attention: keys and values, or heads, of whole sequences", gives_way=LAST),
    ]
    if has_experts and parallel.exchange is not Exchange.hierarchical:
        own_memory = parallel.exchange in (Exchange.symmetric, Exchange.deepep)
        found.append(Use(("expert",), "every MoE layer: tokens to their experts and back", gives_way=0 if own_memory else 5))
    if has_experts:
        found.append(Use(("expert_tensor",), "every MoE layer: rows to all of them, partial sums back", gives_way=3))
    if parallel.shard > 1:
        found.append(Use(("shard", "context"), "FSDP2: weights gathered, gradients summed and scattered"))
        found += [Use(("expert_shard",), "FSDP2: the same for the weights of experts")] if has_experts else []
    by_fsdp = {name: parallel.shard > 1 and not stays_whole(name, len(shape)) for name, shape in shapes(config).items()}
    replicas = {replicated(name, sharded, config) for name, sharded in by_fsdp.items()}
    large: list[tuple[str, ...]] = (
        [("expert_replicate",), ("replicate",)] if parallel.shard > 1 else [("expert_replicate", "expert_shard"), DENSE[1:4]]
    )
    for dims in sorted(replicas, key=lambda dims: (dims not in large, dims)):
        place = large.index(dims) + 1 if dims in large else 0
        travels = f"once a step: gradients{' of experts' * ('expert' in dims[0])} summed"
        found.append(Use(dims, travels, sums=not place, gives_way=place))
    if has_experts and (Scope.sequence in scopes or config.moe.balance.sequence_coefficient):
        found.append(Use(("context", "tensor"), "scope sequence: counts of the tokens of a sequence", sums=True))
    if has_experts and Scope.batch in scopes:
        found.append(Use(DENSE[1:], "scope batch: counts of the tokens of a micro-batch", sums=True))
    return found


def all_used(config: ModelConfig, parallel: ParallelConfig, world: int, node: int) -> list[Use]:
    """Returns `axes_used`, and before what is only summed the hops of the hierarchical exchange. `node`: ranks of a node."""
    found = axes_used(config, parallel)
    if parallel.exchange is Exchange.hierarchical:
        hops = node_digits(mesh_sizes(parallel, world), node)
        for place, hop in enumerate(hops):
            where = ("" if len(hops) == 1 else " between nodes", " inside a node")[place]
            use = Use(("expert",), f"every MoE layer: tokens to their experts{where} and back", gives_way=4 + place, hop=hop)
            found.insert(next((index for index, each in enumerate(found) if each.sums), len(found)), use)
    return found


def with_dims(config: ModelConfig, parallel: ParallelConfig, world: int, node: int) -> list[tuple[Use, list[Digit]]]:
    """Returns `all_used` with the dimensions of each."""
    sizes = mesh_sizes(parallel, world)
    return [(use, [use.hop] if use.hop else digits(use.names, sizes)) for use in all_used(config, parallel, world, node)]


def grouping(config: ModelConfig, parallel: ParallelConfig, world: int, node: int) -> Grouping:
    """Returns which axes have groups: all if they are not too many, else all but as few as possible of those that give way.

    Messages between stages are posted ahead of use, so they share no group with axes that are used in a pass.
    """
    uses, several = with_dims(config, parallel, world, node), parallel.pipeline > 1
    apart = lanes(parallel.pipeline_schedule, parallel.pipeline, parallel.pipeline_stages) if several else []
    found = Grouping([], True, False)
    choices = itertools.product((False, True)[: 1 + several], sorted({use.gives_way for use, _ in uses}))
    for together, place in sorted(choices, key=lambda choice: choice[1] == LAST):
        found = Grouping(*_given_way(uses, place), together)
        found = found._replace(links=_own_links(apart, found))
        if len(_groups(0, uses, found)) + found.links <= MOST:
            break
    return found


def _given_way(uses: list[tuple[Use, list[Digit]]], place: int) -> tuple[list[list[Digit]], bool]:
    """Returns what has no group if all uses up to `place` give way, and whether no pass uses any of that."""
    stays = {members(0, dims) for use, dims in uses if not use.sums and not 0 < use.gives_way <= place}
    giving = [(use, dims) for use, dims in uses if 0 < use.gives_way <= place and dims and members(0, dims) not in stays]
    return [dims for _, dims in giving], all(use.gives_way <= 2 for use, _ in giving)


def _groups(rank: int, uses: list[tuple[Use, list[Digit]]], found: Grouping) -> dict[tuple[int, ...], list[Use]]:
    """Returns the groups of a rank by their ranks, the world's first, without those of links, and what uses them."""
    groups: dict[tuple[int, ...], list[Use]] = {}
    by_messages = {members(rank, dims) for dims in found.by_messages}
    for use, dims in uses:
        ranks = members(rank, dims)
        if len(ranks) == 1 or ranks in by_messages:  # a rank alone has no group
            continue
        if not use.sums or len(product_of(rank, dims, {*groups, *by_messages}) or [()]) == 1:
            groups.setdefault(ranks, []).append(use)
    return groups


def _own_links(apart: list[list[Pair]], found: Grouping) -> int:
    if found.links_together or not apart:
        return int(bool(apart) and not found.links_on_world)
    places = {place for lane in apart for pair in lane for place in pair}
    rest = apart[found.links_on_world :]
    return max(sum(any(place in pair for pair in lane) for lane in rest) for place in places)


def communicators(config: ModelConfig, parallel: ParallelConfig, world: int, node: int, rank: int = 0) -> list[Communicator]:
    """Returns the process groups of a rank, the world's first, without those of links alone. `node`: ranks of a node."""
    groups = _groups(rank, with_dims(config, parallel, world, node), grouping(config, parallel, world, node))
    return [Communicator(ranks, used) for ranks, used in groups.items()]


def communicator_table(config: ModelConfig, parallel: ParallelConfig, world: int, node: int) -> Iterator[str]:
    """Yields a line for each axis that a rank uses, with the group of rank 0, and a line that counts the groups."""
    sizes, uses, found = (
        mesh_sizes(parallel, world),
        with_dims(config, parallel, world, node),
        grouping(config, parallel, world, node),
    )
    groups, by_messages = _groups(0, uses, found), {members(0, dims) for dims in found.by_messages}
    yield _line("group of", "ranks", "groups", "the first", "where", "what travels in it")
    for ranks, used in groups.items():
        nodes = len({rank // node for rank in ranks})
        place = str(world // len(ranks)), _listed(ranks), "inside a node" if nodes == 1 else f"over {nodes} nodes"
        for line in dict.fromkeys((*_named(use, len(ranks), sizes), use.travels) for use in used):
            yield _line(*line[:2], *place, line[2])
            place = "", "the same", ""
    for use, dims in uses:
        parts = product_of(0, dims, {*groups, *by_messages}) if use.sums else None
        if members(0, dims) in by_messages:
            yield _line(*_named(use, len(members(0, dims)), sizes), "", "messages in", "that of all", use.travels)
        elif parts is not None and len(parts) > 1:
            size = math.prod(map(len, parts))
            yield _line(*_named(use, size, sizes), "", f"by {len(parts)} groups above", "", use.travels)
    if parallel.pipeline > 1 and copies_embedding(config, parallel):
        dims = ("replicate",) if parallel.shard > 1 else DENSE[1:4]
        both = ends(0, digits(dims, sizes), parallel.pipeline, world)
        use = Use(("pipeline", *dims), "once a step: gradients of the copied embedding")
        yield _line(*_named(use, len(both), sizes), "", _listed(both), "that of all", use.travels)
    if parallel.pipeline > 1:
        pair, where = f"0,{world // parallel.pipeline}", "that of all" if found.links_on_world else ""
        yield _line("a link between stages", "2", "", pair, where, "every micro-batch: activations forward, gradients back")
    more = f", and in {found.links} of links to other stages" if found.links else ""
    yield f"A rank is in {len(groups)} group{'s' * (len(groups) != 1)}{more}."


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
