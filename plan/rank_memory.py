"""The memory of any rank in closed form: the most bytes that its device holds in a step, and what they are for, without running it.

Each kind of block runs once on sizes (plan/sized/); the rest is sums over the layers and micro-batches of the rank, in the order
of its schedule, in milliseconds and without torch. docs/plan.md says how near it comes to the dry run of the same rank.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

from ..moe.config import ModelConfig
from ..moe.param_shapes import shapes
from ..parallel.config import ParallelConfig, Recompute
from ..parallel.layout import expert_shard_ranks
from ..parallel.pipeline.schedule import BACKWARD, FORWARD, WEIGHTS, ZERO_BUBBLE, Action, schedule
from ..parallel.pipeline.stages import cut_layers, has_embedding, layers_on
from ..train.config.config import Config, GradientDtype, OptimizerConfig, Precision
from ..train.config.state_bytes import moment_bytes
from .held_parameters import Held
from .sized.exchange_sizes import memory_of_exchange
from .sized.layer_sizes import BlockShape
from .sized.operator_sizes import Casts
from .stage_memory import Pass, StagePlace, Stages

STEADY = 4
"""Micro-batches for each rank of a pipeline after which its memory repeats."""


class RankMemory(NamedTuple):
    """Bytes at the peak of a step."""

    peak: int
    parts: dict[str, int]
    """What the peak is made of, by what it is for."""
    rank: int
    """The rank of the pipeline: of all ranks those with this one need most."""


class MemoryModel:
    """Computes the memory of ranks for layouts of one model. Layouts that have blocks in common share their computation.

    `hot`: rows of the rank's experts over those of an even load. `node`: ranks of a node. `optimizer`: None for AdamW in fp32.
    """

    def __init__(
        self,
        model: ModelConfig,
        precision: Precision,
        length: int,
        hot: float = 1.0,
        node: int = 8,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        self.model, self.length, self.hot, self.node = model, length, hot, node
        optimizer, whole = optimizer or OptimizerConfig(), shapes(model)
        self.moments = lambda held: 0 if optimizer.offload else moment_bytes(held, whole, optimizer, precision)
        """Returns the bytes of moments on the device, of parameters of these shapes."""
        self.narrow = {Precision.fp32: 4, Precision.fp64: 8}.get(precision, 2)
        self.stored = max(4, self.narrow)
        self.kept = 0.5 if optimizer.gradients is GradientDtype.bf16 else 1.0
        """Bytes of a gradient between passes over those of a weight."""
        self._held: dict[Any, Held] = {}
        self._stages: dict[Any, Stages] = {}
        self._cuts: dict[Any, list[range]] = {}

    def memory(self, parallel: ParallelConfig, world: int, sequences: int, micro: int | None, most: float = math.inf) -> RankMemory:
        """Returns the memory of the rank that needs most. `sequences`: of the global batch; `micro`: as batch.micro.

        If a rank needs more than `most`, the others are not computed.
        """
        found = list[RankMemory]()
        for rank in (*range(parallel.pipeline)[-1:], *range(parallel.pipeline)[:-1]):
            found.append(self.of_rank(parallel, world, sequences, micro, rank, most))
            if found[-1].peak > most:
                break
        return max(found, key=lambda each: each.peak)

    def of_rank(
        self, parallel: ParallelConfig, world: int, sequences: int, micro: int | None, rank: int = 0, most: float = math.inf
    ) -> RankMemory:
        """Returns the memory of the ranks at place `rank` of the pipeline; a lower bound if that is above `most` already."""
        held, own = self._holding(parallel, world), sequences * parallel.tensor * parallel.context * parallel.pipeline // world
        micro = micro or own
        micros = own // micro
        cut = self._cut(parallel)
        mine = layers_on(cut, parallel, rank) if parallel.pipeline > 1 else {0: cut[0]}
        last = len(cut) - 1
        indices = [index for inside in mine.values() for index in inside]
        indices += [self.model.layers + depth for depth in range(self.model.mtp_depth)] if last in mine else []
        ends = has_embedding(self.model, 0 in mine, last in mine), last in mine
        sharded, moments, whole, casts = held.on(indices, *ends, Casts.step in self._casts(parallel, world, micros)[:1])
        base = Counter(
            {
                "weights": self.stored * sharded,
                "optimizer": moments,
                "casts of weights": self.narrow * casts if Casts.step in self._casts(parallel, world, micros) else 0,
                "gathered by FSDP": self.narrow * whole if parallel.shard > 1 and parallel.zero < 3 else 0,
            }
        )
        least = moments + int((1 + self.kept) * self.stored * sharded)
        if least > most:  # with gradients: more than there is without any activation
            return RankMemory(least, dict(base), rank)
        stages = self._of_layout(parallel, world, micro, held)
        base["exchange"] = memory_of_exchange(stages.shape, self.narrow)
        return self._walk(parallel, base, stages, mine, last, micros, rank, self._casts(parallel, world, micros))

    def _walk(
        self,
        parallel: ParallelConfig,
        base: Counter[str],
        stages: Stages,
        mine: dict[int, range],
        last: int,
        micros: int,
        rank: int,
        casts: tuple[Casts, Casts],
    ) -> RankMemory:
        """Adds up what the actions of a rank hold, one after the other."""
        actions, simulated = self._actions(parallel, len(mine), micros, rank)
        fsdp = parallel.shard > 1
        kept = 1.0 if fsdp and parallel.zero == 1 else self.kept  # FSDP keeps whole gradients in the dtype of its sums
        walk, defers = _Walk(base, kept, 1.0 if fsdp else kept), parallel.pipeline_schedule in ZERO_BUBBLE and parallel.pipeline > 1
        begun, sizes = set[tuple[str, int]](), (self.narrow, self.stored)
        later = DeferredSums(walk, stages, mine, last, parallel.zero, sizes) if fsdp and defers else None
        for action in actions:
            kind, index, final = action.kind, action.stage, action.micro == simulated - 1
            sums = parallel.zero > 1 or not fsdp or final
            place = StagePlace(
                *sizes,
                *casts,
                (kind, index) not in begun if later is None or kind == WEIGHTS else not later.keeps(index),
                fsdp and parallel.zero < 3,
                parallel.zero == 3 or action.micro == 0,
                sums and later is None,
                final and later is None,
                parallel.zero == 1 and fsdp and (BACKWARD, index) in begun and not defers,
                defers,
                action is actions[-1],
            )
            stage = stages.stage(mine[index], index == 0, index == last, place, parallel.pipeline > 1)
            walk.take({FORWARD: stage.forward, BACKWARD: stage.backward, WEIGHTS: stage.weights}[kind], kind)
            if later is not None and kind == BACKWARD:
                later.pending.add(index)
            if later is not None and kind == WEIGHTS:
                later.come(index, stage.deferred, (kind, index) not in begun, final, action is actions[-1])
            begun.add((kind, index))
        return RankMemory(walk.most, {name: size for name, size in walk.at.items() if size}, rank)

    def _actions(self, parallel: ParallelConfig, chunks: int, micros: int, rank: int) -> tuple[list[Action], int]:
        if parallel.pipeline == 1:
            micros = min(micros, 3)
            return [Action(kind, 0, micro) for micro in range(micros) for kind in (FORWARD, BACKWARD)], micros
        kind, ranks = parallel.pipeline_schedule, parallel.pipeline
        micros = min(micros, STEADY * ranks)
        return schedule(kind, ranks, rank, chunks, micros, parallel.pipeline_overlap), micros

    def _casts(self, parallel: ParallelConfig, world: int, micros: int) -> tuple[Casts, Casts]:
        """Of dense weights, and of experts, which FSDP gathers only if several ranks hold the same."""
        whole = Casts.step if micros > 1 and parallel.recompute is Recompute.none else Casts.each
        if parallel.shard == 1:
            return whole, whole
        return Casts.gathered, Casts.gathered if expert_shard_ranks(parallel, world // parallel.pipeline) > 1 else whole

    def _cut(self, parallel: ParallelConfig) -> list[range]:
        key = parallel.pipeline, parallel.pipeline_stages, parallel.pipeline_schedule, tuple(parallel.pipeline_layers or ())
        if key not in self._cuts:
            self._cuts[key] = cut_layers(self.model, parallel) if parallel.pipeline > 1 else [range(self.model.layers)]
        return self._cuts[key]

    def _holding(self, parallel: ParallelConfig, world: int) -> Held:
        inner = world // parallel.pipeline
        key = parallel.tensor, parallel.expert, parallel.expert_tensor, parallel.shard, expert_shard_ranks(parallel, inner)
        if key not in self._held:
            self._held[key] = Held(self.model, replace(parallel, pipeline=1, pipeline_layers=None), inner, self.moments)
        return self._held[key]

    def _of_layout(self, parallel: ParallelConfig, world: int, micro: int, held: Held) -> Stages:
        p, inner = parallel, world // parallel.pipeline
        key = (
            *(p.tensor, p.context, p.context_exchange, p.expert, p.expert_tensor, p.exchange, p.exchange_rows, p.node_ranks),
            *(p.overlap_chunks, p.recompute, p.shard, expert_shard_ranks(p, inner), micro),
        )
        if key not in self._stages:
            shape = BlockShape(self.model, parallel, micro, self.length, self.hot, self.node)
            self._stages[key] = Stages(shape, held)
        return self._stages[key]


class DeferredSums:
    """Gradients with FSDP and a zero-bubble schedule, whose backward passes leave those of products for later.

    Backward passes make whole gradients of embedding and head, wide ones. FSDP looks at all of its groups whenever deferred
    gradients have come: it reduces them, or with ZeRO-1 keeps wide ones until the last of a stage, of embedding and head until the
    last of all. Then it also frees the weights that it kept gathered.
    """

    def __init__(self, walk: "_Walk", stages: Stages, mine: dict[int, range], last: int, zero: int, sizes: tuple[int, int]) -> None:
        self.walk, self.stages, self.mine, self.last, self.zero = walk, stages, mine, last, zero
        self.narrow, self.stored = sizes
        self.pending, self.reduced = set[int](), set[int]()
        """Stages whose gradients outside of blocks are whole, and those of which there are shards."""

    def keeps(self, index: int) -> bool:
        """Whether there are gradients for a backward pass through this stage to add to."""
        embedding = has_embedding(self.stages.shape.config, False, self.last in self.pending)
        return index in self.pending or (index == 0 and embedding)

    def come(self, index: int, deferred: int, first: bool, final: bool, ends: bool) -> None:
        """So many deferred elements of a stage came. `ends`: they are the last of the step."""
        change, narrow, whole = self.walk.change, self.narrow * deferred, self.stored * deferred
        if self.zero > 1 or ends:
            before, (shards, kept) = self._root(self.reduced)[0], self._root(self.pending)
            alone = len({0, self.last} & self.pending) == 1  # torch refers to the last gradient until the sum is there
            self.reduced |= self.pending
            change("gathered by FSDP", -self.narrow * kept if ends and self.zero < 3 else 0)
            change("gradients", 0, self.stored * (kept + (shards if alone else 0)))
            change("gradients", self.stored * (self._root(self.reduced)[0] - before - kept))
            self.pending.clear()
        if self.zero == 1 and not final:
            change("gradients", (whole if first else 0) - narrow)
            return
        shards, gathered, largest = self.stages.reduction(self.mine[index], index == self.last)
        change("gathered by FSDP", -self.narrow * gathered if final and self.zero < 3 else 0)
        change("gradients", 0, self.stored * largest)
        grown, waited = shards if self.zero == 1 or first else 0, whole if self.zero == 1 and not first else 0
        change("gradients", self.stored * grown - narrow - waited)

    def _root(self, stages: set[int]) -> tuple[int, int]:
        """Elements outside of blocks of these stages, held between steps and gathered."""
        first, last = 0 in stages, self.last in stages
        group = self.stages.held.root(has_embedding(self.stages.shape.config, first, last), last)
        return group.shards, group.whole


class _Walk:
    """The level of memory through passes, and its peak.

    `kept`: bytes of gradients between passes over those that passes leave; `inside`: the same within backward passes, which for a
    mixture of FSDP's gradients and others is an upper bound. The gradient of the head is made by the forward pass, a wide one.
    """

    def __init__(self, base: Counter[str], kept: float, inside: float) -> None:
        self.kept, self.inside = kept, inside
        self.of_head = 0
        self.level, self.at = Counter(base), Counter(base)
        self.total = self.most = sum(base.values())

    def take(self, change: Pass, kind: str) -> None:
        parts, left = Counter(change.parts), Counter(change.left)
        if kind == FORWARD:
            self.of_head = left["gradients"] or self.of_head
        else:
            parts["gradients"] = round(self.inside * parts["gradients"])
            left["gradients"] = round(self.kept * (left["gradients"] + self.of_head)) - self.of_head
        if kind == BACKWARD:
            self.of_head = 0
        peak = self.total + change.peak - change.parts.get("gradients", 0) + parts["gradients"]
        if peak > self.most:
            self.most, self.at = peak, Counter(self.level)
            self.at.update(parts)
        self.level.update(left)
        self.total += change.end - change.left.get("gradients", 0) + left["gradients"]

    def change(self, name: str, size: int, passing: int = 0) -> None:
        """Of gradients `passing` bytes more exist for a moment while FSDP reduces them."""
        end = {name: size}
        self.take(Pass(max(0, size) + passing, {name: max(0, size), "reduced by FSDP": passing}, size, end), WEIGHTS)


def rank_memory(config: Config, world: int, rank: int | None = None, hot: float = 1.0, node: int = 8) -> RankMemory:
    """Returns the memory of the ranks that need most, or of those at place `rank` of the pipeline.

    The configuration has been validated; precision=auto counts as bf16. Memory outside of tensors (the device's context, NCCL,
    fragmentation) is not counted.
    """
    model = MemoryModel(config.model, config.precision, config.sequence_length, hot, node, config.optimizer)
    given = config.parallel, world, config.batch.sequences, config.batch.micro
    return model.memory(*given) if rank is None else model.of_rank(*given, rank)
