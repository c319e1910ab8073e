"""How many elements of the parameters a rank holds, by block: between steps, and while they are gathered. Without torch."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..moe.config import ModelConfig
from ..parallel.config import ParallelConfig
from ..parallel.layout import expert_shard_ranks, rank_shapes, stays_whole
from ..train.config.state_bytes import Shapes
from .sized.operator_sizes import Gathered


class Held:
    """Elements of the parameters that a rank holds, by layer: between steps, and gathered."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, world: int, moments: Callable[[Shapes], int]) -> None:
        """`moments`: returns the bytes of the moments of parameters of these shapes."""
        self.model = model
        self.moments = Counter[str]()
        """Bytes of the optimizer's state on the device."""
        sharded, whole = rank_shapes(model, parallel, world), rank_shapes(model, replace(parallel, shard=1), world)
        self.sharded, self.whole, self.experts, self.cast, self.cast_of_experts = (Counter[str]() for _ in range(5))
        fsdp_of_experts = expert_shard_ranks(parallel, world) > 1
        self.copied = Counter[str]()
        self.whole_experts = Counter[str]()
        """Elements of experts that FSDP does not shard."""
        for name, shape in whole.items():
            part = _part(name, model.layers)
            own, full = math.prod(sharded[name]), math.prod(shape)
            self.sharded[part] += own
            self.moments[part] += moments({name: sharded[name]})
            if ".experts." in name and part != "root":
                self.experts[part] += full if fsdp_of_experts else 0
                self.whole_experts[part] += 0 if fsdp_of_experts else own
                self.cast_of_experts[part] += full
                if fsdp_of_experts and shape[0] % expert_shard_ranks(parallel, world):
                    self.copied[part] = full  # the last one stays
            elif not stays_whole(name, len(shape)):
                self.whole[part] += full
            if len(shape) > 1 and ".router." not in name and "_conv." not in name and part not in ("embedding", "head"):
                self.cast[part] += full

    def gathered(self, index: int) -> Gathered:
        """Returns what FSDP gathers of block `index`."""
        return Gathered(self.whole[str(index)], self.experts[str(index)], self.copied[str(index)])

    def gathered_of(self, index: int) -> int:
        """Returns the elements that FSDP gathers of block `index` in all."""
        return self.whole[str(index)] + self.experts[str(index)]

    def shards(self, index: int) -> int:
        """Returns the elements of block `index` that FSDP leaves a rank between steps."""
        return self.sharded[str(index)] - self.whole_experts[str(index)]

    def on(self, indices: Iterable[int], embedding: bool, head: bool, dense: bool) -> tuple[int, int, int, int]:
        """Returns elements held between steps, bytes of moments, elements gathered in all, and cast, of these blocks and the ends.

        Cast are weights of experts, and with `dense` others too.
        """
        parts = [*map(str, indices), *(["embedding"] if embedding else []), *(["head", "norm", "end"] if head else [])]
        whole = sum(self.whole[part] + self.experts[part] for part in parts)
        return (
            sum(self.sharded[part] for part in parts),
            sum(self.moments[part] for part in parts),
            whole,
            sum(self.cast[part] if dense else self.cast_of_experts[part] for part in parts),
        )

    def root(self, embedding: bool, head: bool) -> tuple[int, int]:
        """Returns the elements outside of blocks, held between steps and gathered."""
        parts = (["embedding"] if embedding else []) + (["head", "norm", "end"] if head else [])
        return sum(self.sharded[part] for part in parts), sum(self.whole[part] for part in parts)


def _part(name: str, layers: int) -> str:
    """Returns the block that a parameter belongs to, or what of the rest: embedding, norm, head, end."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return rest.partition(".")[0]
    if first == "mtp":
        depth, _, inside = rest.partition(".")
        return str(layers + int(depth)) if inside.startswith("block.") else "end"
    return first
