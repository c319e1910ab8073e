"""What the passes through a stage need: blocks one after the other, the embedding before them and the head behind."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ..parallel.pipeline.stages import has_embedding
from .held_parameters import Held
from .sized.autograd import Buffer, Node, Value, run_backward
from .sized.ends import embed, embedding_of, end, run_block
from .sized.layer_sizes import BlockShape
from .sized.operator_sizes import Around, Casts, Gathered, Group, Sized

NOTHING = Gathered()


class Pass(NamedTuple):
    """Bytes of a pass beyond those that were held when it began."""

    peak: int
    parts: dict[str, int]
    """What the peak is made of. Negative where the pass has freed what was held."""
    end: int
    left: dict[str, int]
    """What the end is made of."""


class StagePlace(NamedTuple):
    """Where weights come from and where their gradients go, in one micro-batch."""

    narrow: int
    """Bytes of an activation."""
    stored: int
    """Bytes of a weight."""
    casts: Casts
    of_experts: Casts
    """The same of the weights of experts."""
    first: bool
    """No gradient exists yet."""
    whole: bool
    """FSDP keeps weights gathered within the step."""
    gathers: bool
    """FSDP gathers weights in the forward pass."""
    reduces: bool
    """FSDP reduces gradients after this micro-batch."""
    final: bool
    """It is the last micro-batch of the step."""
    waited: bool
    """FSDP has kept whole gradients of earlier micro-batches (parallel.zero=1)."""
    defers: bool
    """The gradients of weights come later."""
    ends: bool
    """No pass follows in this step."""


class Unit(NamedTuple):
    """Forward and backward of a block, of the embedding, or of the end."""

    forward: Pass
    backward: Pass
    weights: Pass
    """The gradients of weights that the backward pass left. FSDP's are there at the end, narrow and whole."""
    deferred: int
    """Elements of the latter."""
    root: int = 0
    """Bytes of whole gradients of weights outside of blocks, which the end of the pass reduces."""


class Stages:
    """Computes stages of one layout. Blocks of one kind are computed once."""

    def __init__(self, shape: BlockShape, held: Held) -> None:
        self.shape, self.held = shape, held
        self._units: dict[Any, Unit] = {}
        self._stages: dict[Any, Unit] = {}

    def stage(self, layers: range, first: bool, last: bool, place: StagePlace, pipeline: bool) -> Unit:
        """Returns the passes through `layers`. In a pipeline what comes and goes is kept until the backward pass."""
        key = layers, first, last, place, pipeline
        if key not in self._stages:
            self._stages[key] = self._stage(layers, first, last, place, pipeline)
        return self._stages[key]

    def _stage(self, layers: range, first: bool, last: bool, place: StagePlace, pipeline: bool) -> Unit:
        config, fsdp = self.shape.config, place.casts is Casts.gathered
        stream = place.narrow * self.shape.tokens * config.width
        shared = first and last and (config.tie_embeddings or config.mtp_depth > 0)
        group = self.held.root(has_embedding(config, first, last), last)
        root = group.whole
        units, grown = [self._embedding(layers, place, shared, group)] if first else [], [0] if first else []
        grows = place.stored if fsdp and place.reduces and (place.first or place.waited) else 0
        for index in layers:
            units.append(self._block(index, layers, place))
            grown.append(grows * self.held.shards(index))
        if last:
            units.append(self._end(layers, place, shared, group))
            grown.append(grows * sum(self.held.shards(config.layers + depth) for depth in range(config.mtp_depth)))
        gathers = place.narrow * root if fsdp and not place.whole else 0
        forward = _Sum({"gathered by FSDP": gathers, "residual stream": stream})
        for unit in units:
            forward.add(unit.forward)
        left = Counter(forward.now)
        left.subtract({"gathered by FSDP": gathers, "residual stream": stream})
        if pipeline:
            left["residual stream"] += stream * ((not first) + (not last))
        backward = _Sum({"gathered by FSDP": gathers, "gradients of activations": 0 if last else stream})
        for unit, shards in zip(reversed(units), reversed(grown), strict=True):
            backward.add(unit.backward)
            backward.now["gradients"] += shards
        after = Counter(backward.now)
        # The gradient of the stage's input leaves; that of its output has come or was made here.
        after.subtract({"gathered by FSDP": gathers, "gradients of activations": 0 if first else stream})
        if shared and not fsdp and not place.first:
            after["gradients"] -= place.stored * self.held.sharded["embedding"]
        if fsdp and root:
            self._reduce_root(backward, group, [unit.root for unit in units], place)
            kept = group.shards if place.reduces else root
            made = place.stored * kept if place.first or (place.waited and place.reduces) else 0
            after["gradients"] += made - sum(unit.root for unit in units)
            after["gradients"] -= place.stored * root if place.waited and place.reduces else 0
        if pipeline:
            after["residual stream"] -= stream * ((not first) + (not last))
        weights = _Sum({})
        for unit in units:
            weights.add(unit.weights)
        return Unit(
            Pass(*forward.most, sum(left.values()), dict(left)),
            Pass(*backward.most, sum(after.values()), dict(after)),
            Pass(*weights.most, sum(weights.now.values()), dict(weights.now)),
            sum(unit.deferred for unit in units),
        )

    def _reduce_root(self, backward: "_Sum", group: Group, narrow: list[int], place: StagePlace) -> None:
        """Gradients of weights outside of blocks, `narrow` bytes of each, are reduced last, as those of a block are."""
        now, stored = backward.now, place.stored
        if not place.reduces:
            if place.first:  # widened one after the other
                now["gradients"] += stored * group.whole + max(narrow) - sum(narrow)
                backward.note()
            return
        now["gathered by FSDP"] -= place.narrow * group.whole if place.ends or not place.whole else 0
        now["gradients"] -= sum(narrow) if place.waited else 0  # added in place
        size = stored if place.waited else place.narrow
        flat = {"reduced by FSDP": stored * group.whole}
        now.update(flat)
        backward.add(Pass(size * group.copied, {"gradients": size * group.copied}, 0, {}))
        now["gradients"] += size * group.last + stored * group.shards - (stored * group.whole if place.waited else sum(narrow))
        backward.note()

    def _block(self, index: int, layers: range, place: StagePlace) -> Unit:
        around = None
        if place.casts is Casts.gathered:
            after, before = (self.held.gathered(near) if near in layers else NOTHING for near in (index + 1, index - 1))
            around = Around(self.held.gathered(index), after, before)
        reduced = self.held.gathered(index + 1).dense.whole if around is not None and index + 1 in layers else 0
        kind = self.shape.config.layer_kind(index)
        return self._unit((kind, around, reduced), place, lambda rank, x: [run_block(rank, self.shape, index, x, around)], reduced)

    def _embedding(self, layers: range, place: StagePlace, shared: bool, root: Group) -> Unit:
        """What FSDP gathers of the first block is under way, and the flat buffer of the root module lives until it is there."""
        following = self.held.gathered(layers[0]) if layers else NOTHING

        def run(rank: Sized, _: Value) -> list[Value]:
            if place.casts is Casts.gathered:
                rank.begin_stage(root, following)
            return [embed(rank, self.shape, shared)]

        return self._unit(("embedding", shared, root, following), place, run, 0)

    def _end(self, layers: range, place: StagePlace, shared: bool, root: Group) -> Unit:
        """The backward pass of a module of multi-token prediction gathers the block before it."""
        further = range(self.shape.config.layers, self.shape.config.layers + self.shape.config.mtp_depth)
        fsdp, held = place.casts is Casts.gathered, self.held.gathered
        arounds = [
            Around(held(index), NOTHING, held(index - 1) if layers or depth else NOTHING) if fsdp else None
            for depth, index in enumerate(further)
        ]
        before = (held(layers[-1]) if layers else Gathered(root)) if fsdp else NOTHING

        def run(rank: Sized, x: Value) -> list[Value]:
            rank.shared_root = {embedding_of(self.shape.config)} if shared else set()
            return end(rank, self.shape, x, before, arounds)

        return self._unit(("end", before, shared), place, run, 0)

    def _unit(self, what: Any, place: StagePlace, run: Callable[[Sized, Value], list[Value]], reduced: int) -> Unit:
        if (what, place) not in self._units:
            self._units[what, place] = run_unit(self.shape, place, run, reduced)
        return self._units[what, place]

    def reduction(self, layers: range, last: bool) -> tuple[int, int, int]:
        """Returns elements of the blocks of a stage: that FSDP leaves a rank, gathers in all, and reduces at most at once."""
        config = self.shape.config
        blocks = [*layers, *(range(config.layers, config.layers + config.mtp_depth) if last else [])]
        largest = max((group.whole for index in blocks for group in self.held.gathered(index)), default=0)
        return sum(map(self.held.shards, blocks)), sum(map(self.held.gathered_of, blocks)), largest


class _Sum:
    """The level of memory through passes, and its peak."""

    def __init__(self, held: dict[str, int]) -> None:
        self.now = Counter(held)
        self.most = 0, dict[str, int]()
        self.note()

    def note(self) -> None:
        """The level may be a peak by itself."""
        self.add(Pass(0, {}, 0, {}))

    def add(self, each: Pass) -> None:
        total = sum(self.now.values()) + each.peak
        if total > self.most[0]:
            parts = Counter(self.now)
            parts.update(each.parts)
            self.most = total, dict(parts)
        self.now.update(each.left)


def run_unit(shape: BlockShape, place: StagePlace, run: Callable[[Sized, Value], list[Value]], reduced: int) -> Unit:
    """Runs a part of the model forward and backward on sizes. `reduced`: elements of FSDP's reduction before."""
    rank = Sized(shape.config.width, place.narrow, place.stored, place.casts, place.of_experts, place.first)
    rank.whole, rank.gathers, rank.reduces = place.whole, place.gathers, place.reduces
    rank.final, rank.waited, rank.defers = place.final, place.waited, place.defers
    meter, elements, arrived = rank.meter, shape.tokens * shape.config.width, list[Buffer]()

    def arrive(gradient: Buffer) -> list[Buffer | None]:
        arrived.append(gradient)
        return []

    meter.label = "residual stream"
    x = Value(rank.new(elements), Node(meter, [], arrive))
    assert x.node is not None
    x.node.order = 0
    begun = Counter(meter.held)
    meter.begin()
    outputs = run(rank, x)
    forward_most = _minus(meter.at_peak, begun)
    nodes = [y.node for y in outputs if y.node is not None]
    loss = outputs[0].buffer.size <= rank.wide
    del x, outputs
    rank.release_block()
    rank.flat.clear()
    kept = Counter(meter.held)
    meter.label = "gradients of activations"
    gradients = [rank.bytes(rank.wide if loss else rank.narrow * elements) for _ in nodes]
    rank.reduced = (
        [rank.labelled("reduced by FSDP", lambda: rank.bytes(place.stored * reduced))] if reduced and place.reduces else []
    )
    begun = Counter(meter.held)
    begun["reduced by FSDP"] = 0
    meter.begin()
    run_backward(nodes, gradients)
    backward_most = _minus(meter.at_peak, begun)
    rank.reduced.clear()
    rank.sharded.clear()
    ended = _minus(meter.held, begun)
    rank.deferred.clear()
    weights = _minus(Counter(meter.held), begun)
    weights = Counter({name: weights.get(name, 0) - ended.get(name, 0) for name in {*weights, *ended}})
    of_fsdp, each, of_step = (rank.deferred_elements[casts] for casts in (Casts.gathered, Casts.each, Casts.step))
    stays = round(place.narrow * sum(of_fsdp) + (place.stored * sum([*each, *of_step]) if place.first else 0))
    wide = 0 if place.first else place.stored * max(each, default=0)  # those of a step's casts are added as they are
    most = stays + round(place.narrow * max([*each, *of_step], default=0) + wide)
    weights["gradients"] += stays
    left = dict(kept)
    return Unit(
        Pass(sum(forward_most.values()), forward_most, sum(left.values()), left),
        Pass(sum(backward_most.values()), backward_most, sum(ended.values()), ended),
        Pass(most, {"gradients": most}, sum(weights.values()), dict(weights)),
        round(sum(of_fsdp)),
        sum(buffer.size for buffer in rank.root_gradients.values()) if place.casts is Casts.gathered else 0,
    )


def _minus(one: Counter[str], other: Counter[str]) -> dict[str, int]:
    return {name: one[name] - other[name] for name in {*one, *other} if one[name] != other[name]}
