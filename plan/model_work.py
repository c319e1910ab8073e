"""What one token costs in each layer of a model: FLOPs by kind of product, and parameters. Without torch.

FLOPs are those of moe/param_count.py, in the forward pass; only their division by kind is made here.
"""

import itertools
import math
from dataclasses import dataclass, fields
from functools import cached_property

from ..moe.config import AttentionKind, ModelConfig
from ..moe.param_count import flops_by_layer, kv_width
from ..moe.param_shapes import block_shapes, shapes
from ..parallel.config import ParallelConfig
from ..parallel.pipeline.stages import copies_embedding, cut_layers, layers_on


@dataclass(frozen=True)
class LayerWork:
    """Of one layer, or of several together. Each FLOP count is that of one token's forward pass."""

    dense_flops: float = 0
    """Products of all tokens with the same weights: projections, dense and shared feed-forwards, router."""
    expert_flops: float = 0
    """Products of the routed experts that a token passes."""
    score_flops: float = 0
    """Queries with keys and weights with values: all that grows with the length of the sequence."""
    dense_parameters: int = 0
    expert_parameters: int = 0
    """Those of all experts."""
    layers: int = 0
    expert_layers: int = 0
    dense_feedforwards: int = 0
    heads: int = 0
    """Products with the head: one, and one for each depth of multi-token prediction."""

    def __add__(self, other: "LayerWork") -> "LayerWork":
        return LayerWork(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def flops(self) -> float:
        return self.dense_flops + self.expert_flops + self.score_flops


class ModelWork:
    """The layers of `config` for sequences of `length` tokens. Make one and ask it for many layouts."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        self.config, self.length = config, length
        by_layer, self._after = flops_by_layer(config, length)
        # With one token a layer has one pair of query and key, which is left in dense_flops: 1 of length / 2.
        without_scores, after = flops_by_layer(config, 1)
        self._layers = [self._layer(*numbers) for numbers in zip(range(config.layers), by_layer, without_scores, strict=True)]
        head = 2 * config.vocabulary * config.width
        found = {name: math.prod(shape) for name, shape in shapes(config).items()}
        self.embedding = LayerWork(dense_parameters=found["embedding.weight"])
        self.head = LayerWork(dense_flops=head, dense_parameters=found.get("head.weight", 0) + found["norm.weight"], heads=1)
        for index in range(config.mtp_depth):
            depth, rest = config.mtp_depth, config.mtp_depth * head
            layer = self._layer(config.layers + index, (self._after - head - rest) // depth, (after - head - rest) // depth)
            prediction = sum(size for name, size in found.items() if name.startswith(f"mtp.{index}."))
            more = prediction - layer.dense_parameters - layer.expert_parameters
            self.head += layer + LayerWork(dense_flops=head, dense_parameters=more, heads=1)
        self._by_cut: dict[tuple[object, ...], LayerWork] = {}

    def _layer(self, index: int, flops: int, without_scores: int) -> LayerWork:
        config, has_experts = self.config, self.config.moe_layer(index)
        found = {name: math.prod(shape) for name, shape in block_shapes(config, index).items()}
        of_experts = sum(size for name, size in found.items() if ".experts." in name)
        weights = sum(found.get(f"moe.experts.{name}", 0) for name in ("gate_up", "down"))
        experts = 2 * weights * config.moe.top_k // (config.moe.experts + config.moe.router.null_experts) if has_experts else 0
        return LayerWork(
            without_scores - experts,
            experts,
            flops - without_scores,
            sum(found.values()) - of_experts,
            of_experts,
            1,
            int(has_experts),
            int(config.dense_layer(index)),
        )

    @cached_property
    def whole(self) -> LayerWork:
        """All layers, embedding, head and multi-token prediction."""
        return sum(self._layers, self.embedding + self.head)

    @property
    def sliced_kv(self) -> bool:
        """Whether tensor ranks share what `kv_elements` counts."""
        return self.config.attention.kind is not AttentionKind.mla

    @cached_property
    def kv_elements(self) -> float:
        """Elements that attention of one token reads of another, mean over the layers: key and value, or the latent."""
        config = self.config
        return kv_width(config) * sum(not config.linear_layer(index) for index in range(config.layers)) / config.layers

    def slowest_rank(self, parallel: ParallelConfig) -> LayerWork:
        """Returns the work of the rank of a pipeline with most FLOPs, of the stages that `cut_layers` gives it."""
        if parallel.pipeline == 1:
            return self.whole
        key = (parallel.pipeline, parallel.pipeline_schedule, parallel.pipeline_stages, tuple(parallel.pipeline_layers or ()))
        if key not in self._by_cut:
            cut = cut_layers(self.config, parallel)
            sums = list(itertools.accumulate(self._layers, initial=LayerWork()))
            ranks = []
            for rank in range(parallel.pipeline):
                mine = layers_on(cut, parallel, rank)
                pieces = [_between(sums[piece.start], sums[piece.stop]) for piece in mine.values()]
                last = len(cut) - 1 in mine
                if 0 in mine or (last and copies_embedding(self.config, parallel)):
                    pieces.append(self.embedding)
                ranks.append(sum([*pieces, self.head] if last else pieces, LayerWork()))
            self._by_cut[key] = max(ranks, key=lambda work: work.flops)
        return self._by_cut[key]


def _between(before: LayerWork, after: LayerWork) -> LayerWork:
    return LayerWork(*(getattr(after, field.name) - getattr(before, field.name) for field in fields(after)))
