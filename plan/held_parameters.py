"""How many elements of the parameters a rank holds, by block: between steps, and while they are gathered. Without torch."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..moe.config import ModelConfig
from ..parallel.config import ParallelConfig
from ..parallel.layout import expert_shard_ranks, rank_shapes, shard_dim, stays_whole
from ..train.config.state_bytes import Shapes
from .sized.operator_sizes import Gathered, Group


class Held:
    """Elements of the parameters that a rank holds, by layer: between steps, and gathered."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, world: int, moments: Callable[[Shapes], int]) -> None:
        """`moments`: returns the bytes of the moments of parameters of these shapes."""
        self.model = model
        self.moments = Counter[str]()
        """Bytes of the optimizer's state on the device."""
        sharded, whole = rank_shapes(model, parallel, world), rank_shapes(model, replace(parallel, shard=1), world)
        self.sharded, self.cast, self.cast_of_experts, self.whole_experts = (Counter[str]() for _ in range(4))
        """Elements by part; `whole_experts` are those of experts that FSDP does not shard."""
        self.groups: dict[tuple[str, bool], Group] = {}
        """What FSDP gathers and reduces together, by part, and whether they are experts."""
        for name, shape in whole.items():
            part = _part(name, model.layers)
            own, full = math.prod(sharded[name]), math.prod(shape)
            of_experts = ".experts." in name and part != "root"
            ranks = expert_shard_ranks(parallel, world) if of_experts else math.lcm(parallel.context, parallel.shard)
            self.sharded[part] += own
            self.moments[part] += moments({name: sharded[name]})
            if of_experts:
                self.whole_experts[part] += 0 if ranks > 1 else own
                self.cast_of_experts[part] += full
            if not stays_whole(name, len(shape)) and (ranks > 1 or not of_experts):
                one = Group(full, own, full, full if shard_dim(shape, ranks) else 0)
                self.groups[part, of_experts] = self.groups.get((part, of_experts), Group()).joined(one)
            if len(shape) > 1 and ".router." not in name and "_conv." not in name and part not in ("embedding", "head"):
                self.cast[part] += full

    def gathered(self, index: int) -> Gathered:
        """Returns what FSDP gathers of block `index`."""
        return Gathered(*(self.groups.get((str(index), of_experts), Group()) for of_experts in (False, True)))

    def gathered_of(self, index: int) -> int:
        """Returns the elements that FSDP gathers of block `index` in all."""
        return sum(group.whole for group in self.gathered(index))

    def shards(self, index: int) -> int:
        """Returns the elements of block `index` that FSDP leaves a rank between steps."""
        return self.sharded[str(index)] - self.whole_experts[str(index)]

    def on(self, indices: Iterable[int], embedding: bool, head: bool, dense: bool) -> tuple[int, int, int, int]:
        """Returns elements held between steps, bytes of moments, elements gathered in all, and cast, of these blocks and the ends.

        Cast are weights of experts, and with `dense` others too.
        """
        parts = [*map(str, indices), *(["embedding"] if embedding else []), *(["head", "norm", "end"] if head else [])]
        whole = sum(group.whole for (part, _), group in self.groups.items() if part in parts)
        return (
            sum(self.sharded[part] for part in parts),
            sum(self.moments[part] for part in parts),
            whole,
            sum(self.cast[part] if dense else self.cast_of_experts[part] for part in parts),
        )

    def root(self, embedding: bool, head: bool) -> Group:
        """Returns what is outside of blocks, which is one group. Its shards count the last norm too."""
        parts = (["embedding"] if embedding else []) + (["head", "norm", "end"] if head else [])
        group = Group()
        for part in parts:
            group = group.joined(self.groups.get((part, False), Group()))
        return group._replace(shards=sum(self.sharded[part] for part in parts))


def _part(name: str, layers: int) -> str:
    """Returns the block that a parameter belongs to, or what of the rest: embedding, norm, head, end."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return rest.partition(".")[0]
    if first == "mtp":
        depth, _, inside = rest.partition(".")
        return str(layers + int(depth)) if inside.startswith("block.") else "end"
    return first
